"""`openshell-supervisor check POLICY`: everything there is to say about a policy file, as text.

It starts nothing and decides nothing; it runs the same reading as a start does and prints what came of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openshell_supervisor.errors import PolicyError, Problem
from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.policy.not_built import not_built
from openshell_supervisor.policy.yaml_file import load


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of checking one file. `policy` is None exactly when there are problems of reading it."""

    source: str
    policy: SandboxPolicy | None
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """True when the supervisor would start with it."""
        return not self.problems


def examine(path: Path) -> Checked:
    """Check a file. Never raises for what is in it or for a file that is not there."""
    try:
        loaded = load(path)
    except PolicyError as error:
        return Checked(str(path), None, error.problems, ())
    return Checked(str(path), loaded.policy, (), (*loaded.warnings, *not_built(loaded.policy)))


def check(path: Path) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """The problems and the warnings of a policy file; with problems the supervisor would not start."""
    checked = examine(path)
    return checked.problems, checked.warnings


def report(path: Path | str) -> tuple[str, bool]:
    """What the CLI prints for a file, with a trailing newline, and whether the supervisor would start with it."""
    checked = examine(Path(path))
    return f"{render(checked)}\n", checked.ok


def render(checked: Checked) -> str:
    """The outcome for a person, without a trailing newline: each finding with place, code and hint, then one summary line."""
    lines = [line for problem in checked.problems for line in _lines(checked.source, "error", problem)]
    lines += [line for problem in checked.warnings for line in _lines(checked.source, "warning", problem)]
    lines.append(f"{checked.source}: {_summary(checked)}")
    return "\n".join(lines)


def _lines(source: str, severity: str, problem: Problem) -> list[str]:
    place = ":".join(str(part) for part in (source, problem.line, problem.column) if part)
    where = f"{problem.path}: " if problem.path else ""
    lines = [f"{place}: {severity}: {where}{problem.message} [{problem.code}]"]
    return [*lines, f"    hint: {problem.hint}"] if problem.hint else lines


def _summary(checked: Checked) -> str:
    counts = ", ".join(
        part for part in (_count(checked.problems, "error"), _count(checked.warnings, "warning")) if part
    )
    if checked.policy is None or checked.problems:
        return f"not usable: {counts}"
    rules = checked.policy.network_policies
    endpoints = sum(len(rule.endpoints) for rule in rules.values())
    allows = (
        f"{_count(tuple(rules), 'rule')}, {_count((0,) * endpoints, 'endpoint')}"
        if rules
        else "allows no network at all"
    )
    return f"ok: {allows}" + (f"; {counts}" if counts else "")


def _count(items: Sequence[object], word: str) -> str:
    return f"{len(items)} {word}{'s' if len(items) != 1 else ''}" if items else ""
