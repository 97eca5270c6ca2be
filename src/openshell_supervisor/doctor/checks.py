"""What one look at the host found: a `Check` with a stable id, a state, and for what is wrong a hint that mends it.

Whatever could not be found out is a warning, never `ok`: a check that did not happen is no good news. This module knows neither
what is checked nor how it is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class State(StrEnum):
    """`info` states a fact that is neither good nor bad."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    INFO = "info"


class Severity(StrEnum):
    """What a check that is not `ok` costs: `high` a layer, `medium` a part of one or a stronger way to it, `low` comfort."""

    NONE = "none"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `id` is dotted and stable, `facts` are JSON-able; a warning or a failure always has a hint."""

    id: str
    state: State
    severity: Severity
    summary: str
    hint: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = self.state in (State.WARNING, State.FAILED)
        if wrong and not self.hint:
            raise ValueError(f"check {self.id} is {self.state} and has no hint")
        if wrong == (self.severity is Severity.NONE):
            raise ValueError(f"check {self.id} is {self.state} with severity {self.severity}")

    def as_json(self) -> dict[str, object]:
        """The shape in `--json`."""
        return {
            "id": self.id,
            "state": self.state.value,
            "severity": self.severity.value,
            "summary": self.summary,
            "hint": self.hint,
            "facts": dict(self.facts),
        }


def ok(name: str, summary: str, /, **facts: object) -> Check:
    """It was tried, and it works."""
    return Check(name, State.OK, Severity.NONE, summary, facts=facts)


def info(name: str, summary: str, /, **facts: object) -> Check:
    """A fact."""
    return Check(name, State.INFO, Severity.NONE, summary, facts=facts)


def warning(name: str, severity: Severity, summary: str, hint: str, /, **facts: object) -> Check:
    """Something is worse than it could be, or may be."""
    return Check(name, State.WARNING, severity, summary, hint, facts)


def failed(name: str, severity: Severity, summary: str, hint: str, /, **facts: object) -> Check:
    """It was tried, and the host refused."""
    return Check(name, State.FAILED, severity, summary, hint, facts)


def inconclusive(name: str, summary: str, hint: str, /, **facts: object) -> Check:
    """It could not be found out."""
    return Check(name, State.WARNING, Severity.MEDIUM, summary, hint, {**facts, "inconclusive": True})
