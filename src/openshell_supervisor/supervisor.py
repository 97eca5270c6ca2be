"""The life of a sandbox, told once: settings, policy, boundary, proxy, launch, workload, drain, exit code.

Each step is a room's; this module only puts them in order and carries their answers on. What confines returns an
`Enforcement`; they become one `Statement` before the workload runs its first instruction.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import secrets
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from openshell_supervisor import __version__, imports, report, rundir
from openshell_supervisor.boundary import ladder
from openshell_supervisor.boundary.boundary import Boundary
from openshell_supervisor.confine import identity as identities
from openshell_supervisor.confine.separation import Code
from openshell_supervisor.enforcement import Statement
from openshell_supervisor.errors import ConfineError, LaunchError, PolicyError
from openshell_supervisor.inside import Settled, confine_request, settle, stop_proxy
from openshell_supervisor.policy import yaml_file
from openshell_supervisor.policy.defaults import default_policy
from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.policy.not_built import not_built, refusals
from openshell_supervisor.proxy.authority import finish
from openshell_supervisor.proxy.frontend import Proxy
from openshell_supervisor.sandbox import Sandbox, start_launcher
from openshell_supervisor.settings import Settings
from openshell_supervisor.telemetry.events import Context, Process, Severity, Telemetry
from openshell_supervisor.telemetry.line_writer import STDERR
from openshell_supervisor.telemetry.plain_log import LateLogger, configure_plain_logging
from openshell_supervisor.telemetry.sinks import ConsoleSink, JsonlSink
from openshell_supervisor.workload import environ, process
from openshell_supervisor.workload.child import Child
from openshell_supervisor.workload.guard import Mark
from openshell_supervisor.workload.reaper import Reaper, become_subreaper
from openshell_supervisor.workload.terminal import Terminal

PR_SET_DUMPABLE = 4  # linux/prctl.h
# Where a container image may carry a policy (contract 5.1); tried in this order when none is named.
POLICY_ON_DISK = (Path("/etc/openshell/policy.yaml"), Path("/etc/navigator/policy.yaml"))
PID_LIMIT_FILE = Path("/sys/fs/cgroup/pids.max")

log = LateLogger("openshell_supervisor.supervisor")


async def run(settings: Settings, authority: int | None = None) -> int:
    """Live one sandbox's life; answers the exit code. Raises `SupervisorError` for everything that can be explained.

    `authority` is where a certificate authority begun earlier arrives (`proxy.authority.begin`), None to make it here.
    """
    configure_plain_logging(settings.log_level)
    telemetry = _telemetry(settings)
    early = _catch_early_signals()
    try:
        async with _prepared(settings, telemetry, authority) as sandbox:
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


def _telemetry(settings: Settings) -> Telemetry:
    sinks: list[Any] = [ConsoleSink(settings.log_level)]
    if settings.ocsf_file is not None:
        sinks.append(JsonlSink(settings.ocsf_file))
    context = Context(settings.sandbox_id, settings.sandbox_name, image=settings.image, version=__version__)
    return Telemetry(context, sinks)


@contextlib.asynccontextmanager
async def _prepared(settings: Settings, telemetry: Telemetry, begun: int | None) -> AsyncIterator[Sandbox]:
    """Everything that can fail before the host is touched, in that order; the run directory is removed at the end."""
    # Same-uid processes must not read our memory, environment or descriptors through /proc (prctl(2), PR_SET_DUMPABLE).
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    for given in settings.without_effect:
        log.info("without effect", setting=given)
    if settings.status_file is not None:
        report.forget_status(settings.status_file)
    policy = _load_policy(settings, telemetry)
    identity = identities.resolve(_identity_inputs(settings, policy))
    if identity.note:
        telemetry.config("validated", f"Workload identity: {identity.note}", uid=identity.uid, gid=identity.gid)
    _check_pid_limit(settings)
    limit = _raise_open_files()
    reaper = Reaper()
    become_subreaper()
    reaper.install()
    with contextlib.ExitStack() as stack:
        stack.callback(reaper.uninstall)
        directory = rundir.create(settings.run_dir, os.environ)
        stack.callback(rundir.remove, directory)
        terminal = stack.enter_context(Terminal()) if settings.tty or (os.isatty(0) and os.isatty(1)) else None
        launchers = [start_launcher(reaper, terminal)]
        stack.callback(_discard_all, launchers)
        authority = asyncio.create_task(asyncio.to_thread(finish, begun))
        yield Sandbox(settings, telemetry, reaper, policy, identity, directory, authority, terminal, launchers, limit)


def _raise_open_files() -> tuple[int, int]:
    """Raise our own limit on descriptors as far as it goes; answers what it was, for the workload. A tunnel takes six."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, hard


def _discard_all(launchers: list[Child]) -> None:
    for child in launchers:
        child.discard()


def _load_policy(settings: Settings, telemetry: Telemetry) -> SandboxPolicy:
    """The named file, else one in the image, else the default that allows nothing. Raises `PolicyError`."""
    path = settings.policy or next((candidate for candidate in POLICY_ON_DISK if candidate.is_file()), None)
    if path is None:
        telemetry.config("default", "No policy file on disk, using restrictive default", path=str(POLICY_ON_DISK[0]))
        return default_policy()
    loaded = yaml_file.load(path)
    telemetry.config(
        "loaded", "Loaded sandbox policy from a local file", path=str(path), rules=len(loaded.policy.network_policies)
    )
    refused = refusals(loaded.policy)
    if refused:
        raise PolicyError(refused, source=str(path))
    for problem in (*loaded.warnings, *not_built(loaded.policy)):
        telemetry.config(
            "validated",
            f"Policy warning: {problem.text(str(path))}",
            severity=Severity.MEDIUM,
            unmapped={"warning": problem.code},
        )
    return loaded.policy


def _identity_inputs(settings: Settings, policy: SandboxPolicy) -> identities.IdentityInputs:
    named = policy.process
    return identities.IdentityInputs(
        run_as_user=named.run_as_user if named else "",
        run_as_group=named.run_as_group if named else "",
        oci_user=settings.oci_user,
        sandbox_uid=settings.sandbox_uid,
        sandbox_gid=settings.sandbox_gid,
        workdir=str(settings.workdir or ""),
        environment=os.environ,
    )


def _check_pid_limit(settings: Settings) -> None:
    """Contract 1.5: a missing pids limit is a warning, or fatal where the operator requires one."""
    try:
        limited = PID_LIMIT_FILE.read_text().strip().isdigit()
    except OSError:
        limited = False
    if limited:
        return
    if settings.require_pid_limit:
        raise ConfineError(
            "no limit on the number of processes is set (OPENSHELL_REQUIRE_RUNTIME_PID_LIMIT)",
            code="pid_limit_missing",
            step="pid limit",
            hint="start the container with --pids-limit",
        )
    log.debug("no limit on the number of processes", file=str(PID_LIMIT_FILE))


async def _live(sandbox: Sandbox) -> int:
    """From the boundary to the exit code."""
    settings = sandbox.settings
    ascent = await _climb(sandbox)
    try:
        statement = _statement(sandbox, ascent)
        report.announce(statement, ascent.failures, sandbox.telemetry)
        STDERR.write(statement.table())
        report.require(statement, settings.require)
        return await _run_workload(sandbox, ascent.boundary, ascent.launcher, ascent.settled, statement)
    finally:
        ascent.launcher.discard()
        await stop_proxy(ascent.settled)
        await ascent.boundary.close()


async def _climb(sandbox: Sandbox) -> ladder.Ascent[Child, Settled]:
    settings = sandbox.settings
    # An explicit wish to enforce excludes the rung that cannot: auto then refuses instead of observing.
    mode = "isolated" if settings.network_mode == "auto" and settings.egress == "enforce" else settings.network_mode
    return await ladder.climb(
        mode,
        label=f"sandbox-{secrets.token_hex(4)}",
        identity=sandbox.identity.as_plan(),
        new_launcher=sandbox.new_launcher,
        settle=lambda boundary, child: settle(sandbox, boundary, child),
        telemetry=sandbox.telemetry,
    )


def _statement(sandbox: Sandbox, ascent: ladder.Ascent[Child, Settled]) -> Statement:
    settled = ascent.settled
    others = report.other_layers(
        sandbox.policy,
        sandbox.identity,
        settled.privileges,
        relaxed_identity=sandbox.settings.relaxed_identity,
    )
    rung = ascent.boundary.rung
    effective = "host" if rung == "observed" else "isolated"
    network = report.network_layer(
        requested=sandbox.settings.network_mode,
        rung=rung,
        egress=settled.egress,
        failures=ascent.failures,
        evidence=settled.evidence,
        gaps=settled.gaps,
    )
    return Statement.of(
        requested_mode=sandbox.settings.network_mode,
        effective_mode=effective,
        rung=rung,
        egress=settled.egress,
        policy_generation=sandbox.generation_number,
        layers=[network, *others],
    )


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
    try:
        request = {"op": "exec", "argv": list(settings.command), "env": _environment(sandbox, boundary)}
        if settings.status_file is not None:
            report.write_status(settings.status_file, statement)
        if settled.code_in_reach:
            await _close_the_doors(sandbox, settled, guard)
        await process.run_attached(child, request, sandbox.terminal)
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


def _environment(sandbox: Sandbox, boundary: Boundary) -> dict[str, str]:
    identity = sandbox.identity
    return environ.workload_environment(
        os.environ,
        session=environ.Session(identity.user, identity.home, sandbox.terminal is not None),
        user_variables=sandbox.settings.user_variables,
        proxy_url=boundary.proxy_url,
        trust=_write_trust(sandbox),
    )


def _write_trust(sandbox: Sandbox) -> environ.Trust:
    """The two PEM files, in the run directory or where the driver wants them (contract 5.2)."""
    settings = sandbox.settings
    files = sandbox.authority.result().write(settings.tls_dir or sandbox.directory, extra=settings.upstream_ca)
    sandbox.telemetry.config("enabled", "TLS termination enabled: ephemeral CA generated")
    return environ.Trust(files.ca, files.bundle)


async def _signal_as(sandbox: Sandbox, group: int, number: int) -> None:
    """Send a signal through a launcher that took the workload's identity: we lack CAP_KILL over it."""
    child = start_launcher(sandbox.reaper)
    try:
        await child.ask({**confine_request(sandbox, Code()), "cwd": None})
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
