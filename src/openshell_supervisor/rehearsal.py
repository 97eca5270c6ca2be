"""The life of a sandbox without a workload: each rung taken for real, the launcher confined and probed there, all undone.

What a doctor says must not come from a second opinion of what the host allows; so this takes the very steps of a start, rung by
rung instead of down to the first that holds.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from openshell_supervisor.ascent import own_calls, state, take
from openshell_supervisor.enforcement import Enforcement, Layer, State, Statement
from openshell_supervisor.errors import BoundaryError, RungFailure, SupervisorError
from openshell_supervisor.inside import stop_proxy
from openshell_supervisor.preparation import prepared
from openshell_supervisor.sandbox import Sandbox
from openshell_supervisor.settings import Settings
from openshell_supervisor.telemetry.events import Context, Telemetry

RUNGS = ("veth", "loopback", "observed")
UNTRIED = "the supervisor's own filter is tried once, after the rungs"


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """One rung: what a start on it would state, or why there is no such start. `failure` is the rung's own, `refusal` that of
    a layer that may not fail (its code and message); neither is set when `statement` is. `seconds` is how long it took."""

    rung: str
    statement: Statement | None
    failure: RungFailure | None
    refusal: str | None
    seconds: float


async def rehearse(settings: Settings, rungs: Sequence[str] = RUNGS) -> tuple[Rehearsal, ...]:
    """Try every rung with these settings' policy and options. Raises `SupervisorError` for what ends a start before any rung.

    The supervisor's own filter comes last, and stays: it takes from this process what the rungs need, so call this once.
    """
    tried = []
    with _own_directory(settings) as elsewhere:
        async with prepared(elsewhere, Telemetry(Context()), None, attached=False) as sandbox:
            for rung in rungs:
                tried.append(await _one(sandbox, rung))
            own = _own_calls(sandbox)
    return tuple(_with(one, own) for one in tried)


@contextlib.contextmanager
def _own_directory(settings: Settings) -> Iterator[Settings]:
    """The settings with a run directory that is gone afterwards, where that can be had: a rehearsal leaves nothing behind."""
    with contextlib.ExitStack() as stack:
        if settings.run_dir is None:
            with contextlib.suppress(OSError):  # then the run's own places are tried, and said
                place = stack.enter_context(tempfile.TemporaryDirectory(prefix="openshell-rehearsal-"))
                settings = replace(settings, run_dir=Path(place), without_effect=())
                Path(place).chmod(0o755)  # the workload's user reads in there
        yield settings


async def _one(sandbox: Sandbox, rung: str) -> Rehearsal:
    began = time.monotonic()
    statement, failure, refusal = None, None, None
    try:
        ascent = await take(sandbox, rung, insist=False)
        try:
            placeholder = Enforcement(Layer.SUPERVISOR_SYSCALLS, State.OFF, UNTRIED, asked=False)
            statement = await state(sandbox, ascent, None, own=placeholder)
        finally:
            ascent.launcher.discard()
            await stop_proxy(ascent.settled)
            await ascent.boundary.close()
    except BoundaryError as error:
        failure = (
            error.failures[0] if error.failures else RungFailure(rung, error.step, error.errno_name, error.message)
        )
    except SupervisorError as error:
        refusal = f"{error.message} [{error.code}]"
    return Rehearsal(rung, statement, failure, refusal, time.monotonic() - began)


def _own_calls(sandbox: Sandbox) -> Enforcement:
    try:
        return own_calls(sandbox)
    except SupervisorError as error:
        return Enforcement(Layer.SUPERVISOR_SYSCALLS, State.DEGRADED, f"{error.message}: a start would be refused")


def _with(tried: Rehearsal, own: Enforcement) -> Rehearsal:
    if tried.statement is None:
        return tried
    layers = [own if item.layer is own.layer else item for item in tried.statement.layers]
    return Rehearsal(tried.rung, tried.statement.with_layers(layers), tried.failure, tried.refusal, tried.seconds)
