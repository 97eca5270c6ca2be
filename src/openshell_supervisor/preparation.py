"""Everything that can fail before the host is touched, in that order: hardening, policy, identity, limits, plan."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from openshell_supervisor import __version__, report, rundir
from openshell_supervisor.confine import hardening
from openshell_supervisor.confine import identity as identities
from openshell_supervisor.confine import plan as plans
from openshell_supervisor.confine.failure import FailureHandler
from openshell_supervisor.confine.seccomp import workload_filters
from openshell_supervisor.enforcement import Layer
from openshell_supervisor.errors import ConfineError
from openshell_supervisor.policy import yaml_file
from openshell_supervisor.policy.defaults import default_policy
from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.policy.not_built import not_built
from openshell_supervisor.proxy.authority import CertificateAuthority, finish
from openshell_supervisor.sandbox import Sandbox, start_launcher
from openshell_supervisor.settings import Settings, believe
from openshell_supervisor.telemetry.events import Context, Severity, Telemetry
from openshell_supervisor.telemetry.plain_log import LateLogger
from openshell_supervisor.telemetry.sinks import ConsoleSink, JsonlSink
from openshell_supervisor.workload import environ
from openshell_supervisor.workload.child import Child
from openshell_supervisor.workload.reaper import Reaper, become_subreaper
from openshell_supervisor.workload.terminal import Terminal

# Where a container image may carry a policy (contract 5.1); tried in this order when none is named.
POLICY_ON_DISK = (Path("/etc/openshell/policy.yaml"), Path("/etc/navigator/policy.yaml"))
PID_LIMIT_FILE = Path("/sys/fs/cgroup/pids.max")

log = LateLogger("openshell_supervisor.preparation")


def make_telemetry(settings: Settings) -> Telemetry:
    sinks: list[Any] = [ConsoleSink(settings.log_level)]
    if settings.ocsf_file is not None:
        sinks.append(JsonlSink(settings.ocsf_file))
    context = Context(settings.sandbox_id, settings.sandbox_name, image=settings.image, version=__version__)
    return Telemetry(context, sinks)


@contextlib.asynccontextmanager
async def prepared(
    settings: Settings, telemetry: Telemetry, begun: int | None, *, attached: bool = True
) -> AsyncIterator[Sandbox]:
    """Everything that can fail before the host is touched, in that order; the run directory is removed at the end.

    `begun` is where a certificate authority begun earlier arrives, None to make it here. Not `attached`: no terminal is taken,
    because no workload will want one.
    """
    closed = hardening.harden()
    hardening.scrub_environment(environ.WITHHELD)
    for given in settings.without_effect:
        log.info("without effect", setting=given)
    if settings.status_file is not None:
        report.forget_status(settings.status_file)
    policy = _load_policy(settings, telemetry)
    own_rules = _load_rules(settings, policy)
    if policy.landlock is not None and policy.landlock.hard_requirement:
        believe(settings, Layer.FILESYSTEM, "the policy (landlock.compatibility: hard_requirement)")
    identity = identities.resolve(_identity_inputs(settings, policy))
    identities.must_be_possible(identity)
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
        interactive = attached and (settings.tty or (os.isatty(0) and os.isatty(1)))
        terminal = stack.enter_context(Terminal()) if interactive else None
        launchers = [start_launcher(reaper, terminal)]
        stack.callback(_discard_all, launchers)
        authority = asyncio.create_task(asyncio.to_thread(finish, begun))
        trust = asyncio.create_task(_write_trust(settings, authority, directory))
        plan = asyncio.create_task(_plan(settings, policy, directory, trust, same_user=identity.uid == os.geteuid()))
        failures = FailureHandler(telemetry, settings.best_effort, settings.external)
        sandbox = Sandbox(
            settings,
            telemetry,
            reaper,
            policy,
            identity,
            directory,
            authority,
            trust,
            plan,
            failures,
            terminal,
            launchers,
            limit,
            memory_closed=closed,
            own_rules=own_rules,
        )
        try:
            yield sandbox
        finally:
            await _forget(plan)


async def _write_trust(
    settings: Settings, authority: asyncio.Task[CertificateAuthority], directory: Path
) -> environ.Trust:
    """The two PEM files, in the run directory or where the driver wants them (contract 5.2)."""
    files = (await authority).write(settings.tls_dir or directory, extra=settings.upstream_ca)
    return environ.Trust(files.ca, files.bundle)


async def _plan(
    settings: Settings, policy: SandboxPolicy, directory: Path, trust: asyncio.Task[environ.Trust], *, same_user: bool
) -> plans.Plan:
    """The launcher's plan, once the files exist that its file rules name."""
    files = await trust
    netlink = settings.netlink
    wishes = plans.Wishes(
        policy,
        policy.netlink if netlink is None else netlink,
        directory,
        readable=(files.certificate, files.bundle),
        workdir=str(settings.workdir.absolute()) if settings.workdir else None,
        standing_in=_standing_in(),
        skip=settings.external,
        self_probe=settings.self_probe,
        same_user=same_user,
    )
    return await asyncio.to_thread(plans.make, wishes, workload_filters)


async def _forget(plan: asyncio.Task[plans.Plan]) -> None:
    """Close a plan that was made; one that could not be has been told already."""
    await asyncio.wait({plan})
    if not plan.cancelled() and plan.exception() is None:
        plan.result().close()


def _standing_in() -> str:
    """The directory that the workload starts in without --workdir; "/", which grants nothing, where it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return "/"


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
    loaded = yaml_file.load(path, files=settings.policy_rules is not None)
    telemetry.config(
        "loaded", "Loaded sandbox policy from a local file", path=str(path), rules=len(loaded.policy.network_policies)
    )
    for problem in (*loaded.warnings, *not_built(loaded.policy)):
        telemetry.config(
            "validated",
            f"Policy warning: {problem.text(str(path))}",
            severity=Severity.MEDIUM,
            unmapped={"warning": problem.code},
        )
    return loaded.policy


def _load_rules(settings: Settings, policy: SandboxPolicy) -> str:
    """The operator's own module, checked, or an empty string. Raises `PolicyError` with the place of what is wrong, also for
    patterns of the policy that such rules would read otherwise."""
    if settings.policy_rules is None:
        return ""
    from openshell_supervisor.verdict.own_rules import load_rules

    return load_rules(settings.policy_rules, policy, str(settings.policy), embedded=not settings.opa_url)


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


@contextlib.asynccontextmanager
async def engine_of(sandbox: Sandbox) -> AsyncIterator[None]:
    """While it lasts, an OPA server decides, where one was named; its outages are said. Raises `SettingsError` for its name."""
    settings = sandbox.settings
    if not settings.opa_url:
        yield
        return
    from openshell_supervisor.verdict.engines.opa_client import opa_address

    address = opa_address(settings.opa_url, settings.opa_token_file, settings.opa_ca)
    told: Callable[[str], None] = lambda reason: _say_engine(sandbox.telemetry, reason)  # noqa: E731
    if sandbox.own_rules:
        from openshell_supervisor.verdict.own_rules import PushedRules

        async with PushedRules(address, told) as sandbox.pushed:
            await sandbox.generation.prepare(lambda: None)  # an outage is said now, not at the first question
            yield
        return
    from openshell_supervisor.verdict.engines.opa_server import OpaServerEngine

    async with OpaServerEngine(address, told=told) as sandbox.engine:
        yield


def _say_engine(telemetry: Telemetry, reason: str) -> None:
    if not reason:
        telemetry.config("restored", "The policy engine answers again: requests are decided", engine="opa")
        return
    message = "The policy engine cannot be asked: every request is denied until it answers"
    telemetry.config(
        "degraded",
        message,
        enabled=None,
        severity=Severity.MEDIUM,
        ok=False,
        engine="opa",
        reason_id="engine_unavailable",
        error=reason,
    )
