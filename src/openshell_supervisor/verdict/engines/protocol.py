"""What an engine is: something that evaluates a named rule of `openshell.sandbox` on a JSON input.

The question is synchronous, because `decide` is. An engine that has to ask somebody is a `PreparedEngine`: what it will be
asked is fetched beforehand, and the synchronous question finds the answer or fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


class EngineError(Exception):
    """The evaluation failed, or gave no result."""


class EngineUnavailable(EngineError):
    """The engine cannot be asked at all: the fault of the way to it, not of the question."""


class Engine(Protocol):
    """Evaluates a rule of `openshell.sandbox` on a JSON input. Raises `EngineError`."""

    def ask(self, rule: str, document: str) -> Any:
        """The value of `rule` for the input `document` (JSON text, ASCII only)."""
        ...


@runtime_checkable
class PreparedEngine(Protocol):
    """An engine that answers from afar."""

    @property
    def outage(self) -> str:
        """Why nothing can be decided now, or an empty string."""
        ...

    async def prepare(self, decide: Callable[[], object]) -> None:
        """Have at hand every answer that `decide` asks for. It may be called several times, and never raises."""
        ...

    def ask(self, rule: str, document: str) -> Any:
        """The prepared value. Raises `EngineUnavailable` where there is none, `EngineError` where there cannot be one."""
        ...


@dataclass(frozen=True, slots=True)
class Rules:
    """What is pushed: a module, the package it is in (with slashes), its name in the server, and documents by key."""

    module: str
    package: str
    name: str
    data: Mapping[str, object] = field(default_factory=dict)
    probe: tuple[str, str] = ("egress_authorization", '{"runtime":{"require_binary_identity":false}}')
