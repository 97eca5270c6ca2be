"""The ladder: try the rungs from the top, each for real, and keep the first that holds.

There is no separate probe that could disagree with the attempt: a rung is built, the launcher enters it, and the caller's
`settle` (which starts the proxy there and looks from inside) accepts it or not. A failed rung is undone whole, its launcher is
discarded, and its failure is remembered for the statement.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from openshell_supervisor.boundary import loopback, observed
from openshell_supervisor.boundary.boundary import Boundary
from openshell_supervisor.boundary.launcher_link import Launcher, entering
from openshell_supervisor.enforcement import errno_name
from openshell_supervisor.errors import BoundaryError, RungFailure
from openshell_supervisor.telemetry.events import Telemetry

# The rungs of each mode, strongest first.
RUNGS: Mapping[str, tuple[str, ...]] = {
    "isolated": ("veth", "loopback"),
    "auto": ("veth", "loopback", "observed"),
    "host": ("observed",),
    "external": ("external",),
    **{rung: (rung,) for rung in ("veth", "loopback", "observed")},  # for a rehearsal
}
DEFAULT_PROXY_PORT = 3128  # proxy.md 1.1


@dataclass(frozen=True, slots=True)
class Ascent[L: Launcher, S]:
    """The rung that holds, the launcher inside it, what `settle` made there, and the failures above it."""

    boundary: Boundary
    launcher: L
    settled: S
    failures: tuple[RungFailure, ...]


async def climb[L: Launcher, S](
    mode: str,
    *,
    label: str,
    identity: Mapping[str, object],
    new_launcher: Callable[[], L],
    settle: Callable[[Boundary, L], Awaitable[S]],
    telemetry: Telemetry,
) -> Ascent[L, S]:
    """Climb down the rungs of `mode` until one settles. Raises `BoundaryError` when none does, naming every failure.

    `settle` raises `BoundaryError` to refuse a rung (it must undo what it started); any other exception ends the climb.
    """
    failures: list[RungFailure] = []
    last: int | None = None
    for rung in RUNGS[mode]:
        launcher = new_launcher()
        boundary: Boundary | None = None
        try:
            boundary = await _build(rung, label, launcher, identity, telemetry)
            settled = await settle(boundary, launcher)
        except BoundaryError as error:
            last = error.errno or last
            failures.append(RungFailure(rung, error.step, errno_name(error.errno), error.message))
            await _undo(boundary, launcher)
        except BaseException:
            await _undo(boundary, launcher)
            raise
        else:
            return Ascent(boundary, launcher, settled, tuple(failures))
    none = BoundaryError(
        "Network namespace creation failed and proxy mode requires isolation. "
        + "; ".join(f.brief() for f in failures),
        code="boundary_unavailable",
        step=failures[-1].step,
        errno=last,
        hint="allow user namespaces (or CAP_NET_ADMIN and CAP_SYS_ADMIN) in this container, in its seccomp profile too "
        "(`openshell-supervisor doctor` tries them); to start without a boundary, choose --network-mode auto without --egress "
        "enforce, which observes and says so, or set OPENSHELL_BEST_EFFORT_FAILURES",
    )
    none.failures = tuple(failures)
    raise none


async def _build(
    rung: str, label: str, launcher: Launcher, identity: Mapping[str, object], telemetry: Telemetry
) -> Boundary:
    if rung == "loopback":
        return await loopback.build(label, DEFAULT_PROXY_PORT, launcher, identity, telemetry)
    if rung in ("observed", "external"):
        return await observed.build(label, DEFAULT_PROXY_PORT, launcher, rung=rung)
    from openshell_supervisor.boundary import veth  # its netlink library is imported only where the rung is tried

    boundary = await veth.build(label, DEFAULT_PROXY_PORT, telemetry)
    try:
        with entering(rung):
            await launcher.ask({"op": "enter", "how": "join", "inode": boundary.netns_inode}, [_descriptor(boundary)])
    except BoundaryError:
        await boundary.close()
        raise
    return boundary


def _descriptor(boundary: Boundary) -> int:
    if boundary.netns_fd is None:  # a missing descriptor must never mean "run in the host's namespace"
        raise BoundaryError("rung veth: no namespace descriptor", code="boundary_unavailable", step="open namespace")
    return boundary.netns_fd


async def _undo(boundary: Boundary | None, launcher: Launcher) -> None:
    launcher.discard()
    if boundary is not None:
        await boundary.close()
