"""What the rehearsal comes to: which rung each mode would take, what would hold on it, and whether the demands would be met.

Pure: everything is computed from the rehearsed statements by the functions that a start uses, and adds nothing to them.
"""

from __future__ import annotations

import errno as errno_module
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from openshell_supervisor import layers
from openshell_supervisor.boundary.ladder import RUNGS
from openshell_supervisor.confine.failure import FailureHandler, Subsystem
from openshell_supervisor.enforcement import Enforcement, Layer, State, Statement
from openshell_supervisor.errors import BoundaryError, RungFailure
from openshell_supervisor.settings import Settings
from openshell_supervisor.telemetry.events import Context, Telemetry

if TYPE_CHECKING:
    from openshell_supervisor.rehearsal import Rehearsal

OBSERVED = "can always be had: verdicts are logged, nothing is enforced"


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung as it was rehearsed: its statement, or why it cannot be had, or the refusal of a layer that may not fail (then
    the start ends there). `step` and `errno` (symbolic) are None for a rung that works."""

    name: str
    why: str
    seconds: float
    statement: Statement | None = None
    step: str | None = None
    errno: str | None = None
    refusal: str | None = None

    @property
    def works(self) -> bool:
        """True when a start on it would come to a statement."""
        return self.statement is not None and self.refusal is None

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

    def failure(self) -> RungFailure:
        """As the ladder remembers it."""
        return RungFailure(self.name, self.step or "rehearsal", self.errno, self.why)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a start in a network mode comes to: a rung and the statement, or neither and why; and the rungs above that failed."""

    mode: str
    rung: str | None
    statement: Statement | None
    passed_over: tuple[Rung, ...] = ()
    refusal: str | None = None

    def as_json(self) -> dict[str, object]:
        """The shape in `--json`."""
        statement = self.statement
        return {
            "mode": self.mode,
            "starts": statement is not None,
            "rung": self.rung,
            "egress": statement.egress if statement else None,
            "network": statement.layer(Layer.NETWORK).state.value if statement else None,
            "refusal": self.refusal,
            "passed_over": [rung.as_json() for rung in self.passed_over],
        }

    def sentence(self) -> str:
        """For a person."""
        if self.statement is None:
            return f"network mode {self.mode} would refuse to start: {self.refusal}"
        failed = ", ".join(f"{rung.name} ({rung.errno or rung.step})" for rung in self.passed_over)
        instead = f" instead of {failed}" if failed else ""
        network = self.statement.layer(Layer.NETWORK)
        return (
            f"network mode {self.mode} would take the rung {self.rung}{instead}: network {network.state}, egress "
            f"{self.statement.egress}"
        )


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


def wanted(settings: Settings) -> tuple[str, ...]:
    """The rungs to rehearse: all, and what stands in for them where the network was declared external."""
    return (*(("external",) if Layer.NETWORK in settings.external else ()), *RUNGS["auto"])


def rungs(rehearsals: Iterable[Rehearsal]) -> tuple[Rung, ...]:
    """What was rehearsed, in the same order."""
    return tuple(_rung(item) for item in rehearsals)


def _rung(item: Rehearsal) -> Rung:
    if item.refusal is not None:
        return Rung(item.rung, item.refusal, item.seconds, step="layer", refusal=item.refusal)
    if item.statement is None:
        step, errno, why = "rehearsal", None, "it was not rehearsed"
        if item.failure is not None:
            step, errno, why = item.failure.step, item.failure.errno, item.failure.message
        return Rung(item.rung, why, item.seconds, step=step, errno=errno)
    own = item.statement.layer(Layer.SUPERVISOR_SYSCALLS)
    why = OBSERVED if item.rung == "observed" else item.statement.layer(Layer.NETWORK).reason
    if own.state is State.DEGRADED:  # the rehearsal goes on where a start would not
        return Rung(item.rung, own.reason, item.seconds, item.statement, "layer", own.errno, own.reason)
    return Rung(item.rung, why, item.seconds, item.statement)


def choose(settings: Settings, rehearsed: Sequence[Rung], mode: str) -> Choice:
    """What a start with these settings in `mode` comes to, step by step as `ascent.climb` goes.

    Who wants egress enforced gets no rung that cannot; a network that is external is not attempted; best effort falls to the
    lowest rung where a start would end.
    """
    handler = FailureHandler(Telemetry(Context()), settings.best_effort, settings.external)
    by_name = {rung.name: rung for rung in rehearsed}
    declared = handler.declared(Layer.NETWORK)
    if declared is not None:
        return _given(settings, mode, by_name.get("external"), declared, ())
    passed: list[Rung] = []
    for name in RUNGS["isolated" if mode == "auto" and settings.egress == "enforce" else mode]:
        rung = by_name.get(name)
        if rung is None:
            continue
        if rung.refusal is not None:
            return Choice(mode, None, None, tuple(passed), rung.refusal)
        if rung.statement is not None:
            statement = _with_network(mode, rung, rung.statement, tuple(passed), None)
            return Choice(mode, name, statement, tuple(passed))
        passed.append(rung)
    why = "no rung of it works: " + ("; ".join(rung.failure().brief() for rung in passed) or "none was rehearsed")
    # A flag's demand to enforce is taken back by no variable.
    if not settings.best_effort or settings.egress == "enforce" or not passed:
        return Choice(mode, None, None, tuple(passed), why)
    last = next((rung.errno for rung in reversed(passed) if rung.errno), "")
    error = BoundaryError(
        why, code="boundary_unavailable", step=passed[-1].step or "", errno=getattr(errno_module, last, None)
    )
    tolerated = handler.failed(Subsystem.NETWORK_NAMESPACE, error)
    return _given(settings, mode, by_name.get("observed"), tolerated, tuple(passed))


def _given(settings: Settings, mode: str, rung: Rung | None, given: Enforcement, passed: tuple[Rung, ...]) -> Choice:
    """A start without a boundary of ours, where the proxy enforces for those that use it."""
    if rung is None or rung.statement is None or rung.refusal is not None:
        return Choice(mode, None, None, passed, rung.why if rung else "it was not rehearsed")
    egress = "observe" if settings.egress == "observe" else "enforce"
    statement = replace(rung.statement, egress=egress)
    return Choice(mode, rung.name, _with_network(mode, rung, statement, passed, given), passed)


def _with_network(
    mode: str, rung: Rung, statement: Statement, passed: tuple[Rung, ...], given: Enforcement | None
) -> Statement:
    """The statement with the network's entry as a start in this mode makes it: a rehearsed rung knows nothing of the others."""
    before = statement.layer(Layer.NETWORK)
    evidence: dict[str, Any] = {name: value for name, value in before.detail.items() if name != "failed_rungs"}
    entry = layers.network(
        requested=mode,
        rung=rung.name,
        egress=statement.egress,
        failures=tuple(one.failure() for one in passed),
        evidence=evidence,
        gaps=tuple(evidence.get("gaps", ())),
        given=given,
    )
    others = [entry if item.layer is Layer.NETWORK else item for item in statement.layers]
    return replace(statement.with_layers(others), requested_mode=mode)


def demand(required: frozenset[Layer], choice: Choice) -> Demand:
    """Would `--require` be met? Where nothing would start, nothing is."""
    demanded = tuple(layer for layer in Layer if layer in required)
    if choice.statement is None:
        return Demand(demanded, tuple((layer, "unknown", choice.sentence()) for layer in demanded))
    unmet = choice.statement.unmet(required)
    return Demand(demanded, tuple((item.layer, item.state.value, item.reason) for item in unmet))
