"""What the rehearsal comes to: which rung each mode would take, what would hold on it, and whether the demands would be met.

Pure: everything is computed from the rehearsed statements and adds nothing to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openshell_supervisor.boundary.ladder import RUNGS
from openshell_supervisor.enforcement import Layer, Statement

if TYPE_CHECKING:
    from openshell_supervisor.rehearsal import Rehearsal


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung as it was rehearsed. `errno` is symbolic; `step` and `errno` are None for a rung that works."""

    name: str
    works: bool
    why: str
    step: str | None
    errno: str | None
    seconds: float
    statement: Statement | None

    def as_json(self) -> dict[str, object]:
        """The shape in `--json`."""
        return {
            "rung": self.name,
            "works": self.works,
            "why": self.why,
            "step": self.step,
            "errno": self.errno,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """What a network mode would take: the rung, None where it would refuse to start, and the rungs above it that failed."""

    mode: str
    rung: Rung | None
    passed_over: tuple[Rung, ...]

    @property
    def statement(self) -> Statement | None:
        """What would hold."""
        return self.rung.statement if self.rung else None

    def as_json(self) -> dict[str, object]:
        """The shape in `--json`."""
        statement = self.statement
        return {
            "mode": self.mode,
            "rung": self.rung.name if self.rung else None,
            "egress": statement.egress if statement else None,
            "network": statement.layer(Layer.NETWORK).state.value if statement else None,
            "passed_over": [rung.as_json() for rung in self.passed_over],
        }

    def sentence(self) -> str:
        """For a person."""
        failed = ", ".join(f"{rung.name} ({rung.errno or rung.step})" for rung in self.passed_over)
        instead = f" instead of {failed}" if failed else ""
        statement = self.statement
        if self.rung is None or statement is None:
            return (
                f"network mode {self.mode} would refuse to start: no rung of it works: {failed or 'none was rehearsed'}"
            )
        network = statement.layer(Layer.NETWORK)
        return f"network mode {self.mode} would take the rung {self.rung.name}{instead}: network {network.state}"


@dataclass(frozen=True, slots=True)
class Demand:
    """The layers of `--require`, and those that would not hold, each with the reason."""

    layers: tuple[Layer, ...]
    unmet: tuple[tuple[Layer, str, str], ...]

    @property
    def met(self) -> bool:
        """True also when nothing was demanded."""
        return not self.unmet

    def as_json(self) -> dict[str, object]:
        """The shape in `--json`."""
        unmet = [{"layer": layer.value, "state": state, "reason": reason} for layer, state, reason in self.unmet]
        return {"layers": [layer.value for layer in self.layers], "met": self.met, "unmet": unmet}

    def sentence(self) -> str:
        """For a person."""
        if not self.layers:
            return "nothing was demanded (--require LAYERS)"
        if self.met:
            return f"--require {','.join(self.layers)} would be met"
        return "--require would not be met: " + "; ".join(
            f"{layer} {state} ({why})" for layer, state, why in self.unmet
        )


def rungs(rehearsals: Iterable[Rehearsal]) -> tuple[Rung, ...]:
    """The rehearsed rungs, strongest first."""
    found = {item.rung: _rung(item) for item in rehearsals}
    return tuple(found[name] for name in RUNGS["auto"] if name in found)


def _rung(item: Rehearsal) -> Rung:
    if item.statement is not None:
        network = item.statement.layer(Layer.NETWORK)
        why = (
            network.reason if item.rung != "observed" else "can always be had: verdicts are logged, nothing is enforced"
        )
        return Rung(item.rung, True, why, None, None, item.seconds, item.statement)
    if item.failure is None:
        return Rung(item.rung, False, "it was not rehearsed", "rehearsal", None, item.seconds, None)
    failure = item.failure
    return Rung(item.rung, False, failure.message, failure.step, failure.errno, item.seconds, None)


def choose(mode: str, rehearsed: Sequence[Rung], *, egress: str | None = None) -> Choice:
    """The first rung of the mode that works. Who wants egress enforced gets no rung that cannot (as the supervisor does)."""
    wanted = "isolated" if mode == "auto" and egress == "enforce" else mode
    by_name = {rung.name: rung for rung in rehearsed}
    passed: list[Rung] = []
    for name in RUNGS[wanted]:
        rung = by_name.get(name)
        if rung is not None and rung.works:
            return Choice(mode, rung, tuple(passed))
        if rung is not None:
            passed.append(rung)
    return Choice(mode, None, tuple(passed))


def demand(required: frozenset[Layer], choice: Choice) -> Demand:
    """Would `--require` be met? Where nothing would start, nothing is."""
    wanted = tuple(layer for layer in Layer if layer in required)
    if choice.statement is None:
        return Demand(wanted, tuple((layer, "unknown", choice.sentence()) for layer in wanted))
    unmet = choice.statement.unmet(required)
    return Demand(wanted, tuple((item.layer, item.state.value, item.reason) for item in unmet))
