"""What happens on a rung before it is accepted: the proxy starts there, the launcher confines itself, and both are looked at
from inside.

A rung is refused with a `BoundaryError` when the look from inside finds a way out. What no packet shows (processes of the same
user outside, code that the workload could rewrite) is collected as gaps, and a rung with gaps is never called enforced.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openshell_supervisor.boundary import probe
from openshell_supervisor.boundary.boundary import Boundary
from openshell_supervisor.callers.lookup import Callers
from openshell_supervisor.callers.tables import ProcTable, SocketDiagnostics
from openshell_supervisor.confine.identity import effective_capabilities
from openshell_supervisor.confine.plan import Plan
from openshell_supervisor.confine.selfprobe import NOTHING, Seen, canary, judge
from openshell_supervisor.confine.separation import (
    Code,
    can_map,
    neighbours,
    out_of_reach,
    traced_by_parents_only,
    user_namespace,
    write_identity_maps,
)
from openshell_supervisor.enforcement import Layer
from openshell_supervisor.errors import BoundaryError, LaunchError
from openshell_supervisor.layers import Confined, Identified
from openshell_supervisor.proxy.frontend import Proxy, ProxyOptions
from openshell_supervisor.sandbox import Sandbox
from openshell_supervisor.workload.child import Child, interpreter

# After the workload's end, live exchanges have nobody left to answer; this is for the last events only.
PROXY_DRAIN_SECONDS = 1.0
NAMED_SOCKETS = 4  # so many paths make a sentence; the status file has them all


@dataclass(slots=True)
class Settled:
    """A rung that holds: the proxy on it, its task, and what was verified from inside."""

    proxy: Proxy
    serving: asyncio.Task[None]
    egress: str
    evidence: dict[str, object]
    confined: Confined
    user_namespace: int = 0
    gaps: tuple[str, ...] = ()
    code_in_reach: bool = False
    callers: Callers | None = None
    identified: Identified = field(default_factory=Identified)


async def settle(sandbox: Sandbox, boundary: Boundary, child: Child, *, insist: bool) -> Settled:
    """Start the proxy on the rung, confine the launcher, and look from inside. Raises `BoundaryError` for a rung that leaks.

    `insist`: the proxy enforces although nothing here keeps the workload on the way to it, for those that do take it.
    """
    settings = sandbox.settings
    enforces = settings.egress != "observe" and (boundary.isolated or insist)
    egress = "enforce" if enforces else "observe"
    options = ProxyOptions(egress=egress, pins=settings.resolve, upstream_ca=settings.upstream_ca)
    authority = await sandbox.authority
    proxy = Proxy(options, generation=lambda: sandbox.generation, telemetry=sandbox.telemetry, authority=authority)
    nonce = secrets.token_hex(16)
    proxy.answer_probe(nonce)
    serving = asyncio.create_task(proxy.serve(boundary.listener), name="proxy")
    settled = Settled(proxy, serving, egress, {}, Confined({}, {}))
    try:
        masters = await _confine(sandbox, boundary, child, settled, nonce)
        if boundary.watch is not None:
            boundary.watch()
    except BaseException:
        await stop_proxy(settled)
        raise
    if sandbox.terminal is not None and masters:
        sandbox.terminal.adopt(masters[0])
    return settled


async def _confine(sandbox: Sandbox, boundary: Boundary, child: Child, settled: Settled, nonce: str) -> list[int]:
    """Let the launcher confine itself and its twin try; fills in `settled`. Answers the master of a terminal that was made anew.

    Raises `BoundaryError` where a way out was found.
    """
    separated = await _separate(boundary, child)
    code = out_of_reach(sandbox.identity) if boundary.isolated else Code()
    plan = await sandbox.plan
    await _meet_callers(sandbox, child, settled)
    with canary(plan.canary), contextlib.ExitStack() as undo:
        request = confine_request(sandbox, code, plan, cover=boundary.isolated)
        answer, masters = await child.ask(request, plan.descriptors())
        for master in masters:
            undo.callback(os.close, master)
        finding = await probe.inspect(boundary, child, nonce, [one.request for one in plan.tries])
        if not finding.tight:
            what = f"leaks: {', '.join(finding.leaks)}" if finding.leaks else "the proxy cannot be reached from inside"
            raise BoundaryError(f"rung {boundary.rung} {what}", code="boundary_leaks", step="probe")
        undo.pop_all()
    _introduce(sandbox, settled)
    separated = separated and answer["user_namespace"] != user_namespace()
    walled = separated or answer["landlock"] == 0
    seen = judge(plan.tries, finding.tries, answer["controls"])
    settled.user_namespace = answer["user_namespace"] if separated else 0
    settled.code_in_reach = bool(code.directories)
    settled.confined = Confined(answer, seen, sandbox.settings.self_probe, "" if walled else _exposed(sandbox, child))
    settled.gaps = (*_gaps(sandbox, child, separated, code, answer), *finding.gaps, *_open_sockets(plan, seen))
    settled.evidence = {
        **boundary.detail,
        **finding.detail,
        "user_namespace": separated,
        "sockets_covered": len(plan.sockets) if boundary.isolated else 0,
        "gaps": list(settled.gaps),
    }
    return masters


async def _meet_callers(sandbox: Sandbox, child: Child, settled: Settled) -> None:
    """Let the proxy ask who calls, by the socket table of the place that the launcher is in; unless nobody wants to know."""
    if sandbox.settings.relaxed_identity:
        return
    sandbox.callers_known(True)
    try:
        _, (netlink,) = await child.ask({"op": "diagnostics"})
        table: SocketDiagnostics | ProcTable = SocketDiagnostics(socket.socket(fileno=netlink))
    except LaunchError as refused:
        try:
            table = ProcTable(child.pid)
        except OSError as error:
            why = f"sock_diag: {refused.errno_name or refused.message}; /proc/net/tcp: {error.strerror}"
            settled.identified = Identified(problem=f"the kernel does not show whose a connection is ({why})")
            return
    settled.callers = Callers(table, child.pid)
    settled.proxy.identify_with(settled.callers)


def _introduce(sandbox: Sandbox, settled: Settled) -> None:
    """Was the twin's own connection told to be what it was: a connection of our interpreter? If not, nobody's will be."""
    if settled.callers is not None:
        twin = settled.proxy.twin
        problem = "it was not looked at" if twin is None else twin.problem
        if twin is not None and not problem and not _same_file(twin.binary, interpreter()):
            problem = f"it was taken for {twin.binary}"
        if problem:
            problem = f"the probe's own connection could not be told: {problem}"
        settled.identified = Identified(settled.callers.table, twin.binary if twin is not None else "", problem)
    sandbox.callers_known(not settled.identified.problem)


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


async def _separate(boundary: Boundary, child: Child) -> bool:
    """Give the workload a user namespace besides its network namespace; False where the host does not allow it."""
    if boundary.detail.get("method") == "userns":
        return True
    if not boundary.isolated or not can_map(effective_capabilities()):
        return False
    try:
        await child.ask({"op": "separate"})
    except LaunchError:
        return False
    try:
        write_identity_maps(child.pid)
    except OSError as error:
        raise BoundaryError(
            f"cannot map users for the workload: {error.strerror}",
            code="boundary_maps",
            step="uid_map",
            errno=error.errno,
        ) from error
    return True


def _gaps(sandbox: Sandbox, child: Child, separated: bool, code: Code, answer: dict[str, Any]) -> tuple[str, ...]:
    """What lets a workload of this identity around its boundary although no packet can: said, never passed over."""
    gaps = []
    if not sandbox.memory_closed and not separated:
        gaps.append("the host does not let the supervisor close its own memory to its user (prctl(2), PR_SET_DUMPABLE)")
    if not separated:
        own = frozenset({os.getpid(), child.pid})
        count = len(neighbours(sandbox.identity.uid, own))
        gaps.append(f"no user namespace keeps it from the descriptors of its user's other processes ({count} run now)")
    if code.directories and not answer["protected"]:
        gaps.append(f"it may write where that leads outside ({', '.join(code.directories)})")
    if code.links:
        gaps.append(f"it may point links to the supervisor's code elsewhere ({', '.join(code.links)})")
    return tuple(gaps)


def _open_sockets(plan: Plan, seen: Mapping[Layer, Seen]) -> tuple[str, ...]:
    """Sockets of programs outside that the workload could connect to by their paths."""
    if plan.sockets_unknown:
        return (f"sockets that programs outside have bound to paths cannot be told ({plan.sockets_unknown})",)
    reached = [name for name, outcome in seen.get(Layer.NETWORK, NOTHING).tried.items() if outcome == "succeeded"]
    if not reached:
        return ()
    more = f" and {len(reached) - NAMED_SOCKETS} more" if len(reached) > NAMED_SOCKETS else ""
    return (f"it can connect to sockets of programs outside ({', '.join(reached[:NAMED_SOCKETS])}{more})",)


def _exposed(sandbox: Sandbox, child: Child) -> str:
    """Why a workload without user namespace and Landlock domain can act through another process; empty where there is none."""
    uid = sandbox.identity.uid
    if traced_by_parents_only():
        return ""
    if uid != os.geteuid() and not neighbours(uid, frozenset({os.getpid(), child.pid})):
        return ""
    return (
        f"other processes of uid {uid} can be made to act for it (/proc/PID/mem): neither a user namespace nor a Landlock "
        "domain keeps it from them"
    )


def confine_request(sandbox: Sandbox, code: Code, plan: Plan, *, cover: bool = False) -> dict[str, Any]:
    """The launcher's `confine` request for this sandbox; `code` is what must be out of the workload's reach, and with `cover` the
    sockets of programs outside too. The plan's descriptors go beside it."""
    planned = {**plan.request(), "cover": plan.sockets if cover else []}
    if planned["terminals"] is not None:
        planned["terminals"]["own"] = sandbox.terminal is not None
    return {
        "op": "confine",
        "identity": sandbox.identity.as_plan(),
        "read_only": list(code.directories),
        "anchors": list(code.anchors),
        **planned,
        "open_files": sandbox.open_files,
        "cwd": str(sandbox.settings.workdir) if sandbox.settings.workdir else None,
        "die_with_parent": True,
        "parent": os.getpid(),
    }


async def stop_proxy(settled: Settled) -> None:
    """Drain the proxy and end its task; safe to call twice."""
    await settled.proxy.drain(PROXY_DRAIN_SECONDS)
    settled.serving.cancel()
    await asyncio.wait({settled.serving}, timeout=PROXY_DRAIN_SECONDS)
    if settled.callers is not None:
        await asyncio.to_thread(settled.callers.close)
