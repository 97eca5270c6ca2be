"""The life of a sandbox, told once: settings, policy, boundary, proxy, launch, workload, drain, exit code.

Each step is a room's; this module only puts them in order and carries their answers on. What confines returns an
`Enforcement`; they become one `Statement` before the workload runs its first instruction.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable

from openshell_supervisor import imports, outfit, report
from openshell_supervisor.ascent import climb, say_file_rules, say_sockets, say_terminals, state
from openshell_supervisor.boundary.boundary import Boundary
from openshell_supervisor.confine.plan import Plan
from openshell_supervisor.confine.separation import Code
from openshell_supervisor.enforcement import Statement
from openshell_supervisor.errors import LaunchError
from openshell_supervisor.inside import Settled, confine_request, stop_proxy
from openshell_supervisor.preparation import engine_of, make_telemetry, prepared
from openshell_supervisor.proxy.frontend import Proxy
from openshell_supervisor.sandbox import Sandbox, start_launcher
from openshell_supervisor.settings import Settings
from openshell_supervisor.telemetry.events import Process
from openshell_supervisor.telemetry.line_writer import STDERR
from openshell_supervisor.telemetry.plain_log import LateLogger, configure_plain_logging
from openshell_supervisor.workload import process
from openshell_supervisor.workload.child import Child
from openshell_supervisor.workload.guard import Mark

log = LateLogger("openshell_supervisor.supervisor")


async def run(settings: Settings, authority: int | None = None) -> int:
    """Live one sandbox's life; answers the exit code. Raises `SupervisorError` for everything that can be explained.

    `authority` is where a certificate authority begun earlier arrives (`proxy.authority.begin`), None to make it here.
    """
    configure_plain_logging(settings.log_level)
    telemetry = make_telemetry(settings)
    early = _catch_early_signals()
    try:
        async with prepared(settings, telemetry, authority) as sandbox, engine_of(sandbox):
            return await _live(sandbox)
    except asyncio.CancelledError:
        if not early:
            raise
        return 128 + early[0]
    finally:
        telemetry.close()


def _catch_early_signals() -> list[int]:
    """Until the workload exists, a signal that ends ends us, in order; PID 1 would otherwise never see it (signal(7))."""
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    caught: list[int] = []

    def interrupt(number: int) -> None:
        caught.append(number)
        if main is not None:
            main.cancel()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        loop.add_signal_handler(number, interrupt, number)
    return caught


async def _live(sandbox: Sandbox) -> int:
    """From the boundary to the exit code."""
    settings = sandbox.settings
    say_file_rules(sandbox, await sandbox.plan)
    ascent, network = await climb(sandbox)
    try:
        say_terminals(sandbox, ascent.settled)
        say_sockets(sandbox, await sandbox.plan, ascent.boundary)
        statement = await state(sandbox, ascent, network)
        report.announce(statement, ascent.failures, sandbox.telemetry)
        STDERR.write(statement.table())
        report.require(statement, settings.require)
        return await _run_workload(sandbox, ascent.boundary, ascent.launcher, ascent.settled, statement)
    finally:
        ascent.launcher.discard()
        await stop_proxy(ascent.settled)
        await ascent.boundary.close()


async def _run_workload(
    sandbox: Sandbox, boundary: Boundary, child: Child, settled: Settled, statement: Statement
) -> int:
    settings, telemetry = sandbox.settings, sandbox.telemetry
    workload = process.Workload(
        child,
        grace=settings.grace,
        timeout=settings.timeout,
        signal_as=lambda group, number: _signal_as(sandbox, group, number),
    )
    workload.forward_signals()
    mark = Mark(child.pid, boundary.netns_inode or 0, settled.user_namespace)
    guard = process.Guard.start(sandbox.reaper, sandbox.directory, settings.status_file)
    guard.watch(mark)
    on_loss: Callable[[asyncio.Task[None]], None] = lambda task: _proxy_lost(task, workload)  # noqa: E731
    settled.serving.add_done_callback(on_loss)
    warming: asyncio.Task[None] | None = None
    described = Process(settings.command[0], child.pid)
    own_home = outfit.home_of(sandbox)
    try:
        block = outfit.environment(sandbox, boundary, str(own_home or sandbox.identity.home))
        request = {"op": "exec", "argv": list(settings.command), "env": block}
        if settings.status_file is not None:
            report.write_status(settings.status_file, statement)
        if settled.code_in_reach:
            await _close_the_doors(sandbox, settled, guard)
        try:
            await process.run_attached(child, request, sandbox.terminal)
        except LaunchError as error:
            raise outfit.explained(error, sandbox, block) from error
        if not settled.code_in_reach:  # else it is warm already
            warming = asyncio.create_task(_warm(settled.proxy, sandbox), name="proxy warm-up")
        telemetry.process_launched(described)
        outcome = await workload.wait()
        if sandbox.terminal is not None:
            await sandbox.terminal.drain()
        if outcome.timed_out:
            telemetry.process_terminated(described, None, timed_out=True)
        telemetry.process_terminated(described, outcome.code)
        return outcome.code
    finally:
        workload.release_signals()
        settled.serving.remove_done_callback(on_loss)
        if warming is not None:
            warming.cancel()
        left = await process.clear_away(mark, frozenset({guard.pid}))
        if left:
            log.warning("processes of the workload could not be ended", pids=left)
        if own_home is not None:
            await outfit.forget_home(own_home, sandbox)
        guard.dismiss()


async def _close_the_doors(sandbox: Sandbox, settled: Settled, guard: process.Guard) -> None:
    """The workload's user may change our code: load all of it now, and nothing once the workload runs."""
    await _warm(settled.proxy, sandbox)
    await asyncio.to_thread(imports.load)
    await guard.ready()
    imports.seal()


async def _warm(proxy: Proxy, sandbox: Sandbox) -> None:
    """Import the proxy's inspection and the engine while the workload starts; then let the collector run, past what stays."""
    engine = asyncio.to_thread(lambda: sandbox.generation.warm())
    for failure in await asyncio.gather(proxy.warm(), engine, return_exceptions=True):
        if failure is not None:  # the first request meets it again, and is denied
            log.error("the proxy cannot be made ready: what needs it will be denied", error=repr(failure))
    gc.freeze()
    gc.enable()


async def _signal_as(sandbox: Sandbox, group: int, number: int) -> None:
    """Send a signal through a launcher that took the workload's identity: we lack CAP_KILL over it."""
    child = start_launcher(sandbox.reaper)
    try:
        # No file rules: a domain of its own could not signal into the workload's (landlock(7), scoped signals).
        await child.ask({**confine_request(sandbox, Code(), Plan()), "cwd": None})
        await child.ask({"op": "signal", "group": group, "signal": int(number)})
    except LaunchError as error:
        log.warning("cannot signal the workload", step=error.step, errno=error.errno_name)
    finally:
        child.discard()


def _proxy_lost(task: asyncio.Task[None], workload: process.Workload) -> None:
    """The proxy ended while the workload runs: nothing can leave any more, so end the workload instead of letting it hang."""
    if task.cancelled():
        return
    log.error("the proxy ended; ending the workload", error=repr(task.exception()))
    workload.request_end()
