"""Up to the statement: the file rules are said, a rung is taken, the supervisor closes its own calls, and each layer is stated.

The story around it is `supervisor`'s; `rehearsal` takes the same steps without a workload.
"""

from __future__ import annotations

import dataclasses
import secrets

from openshell_supervisor import layers
from openshell_supervisor.boundary import ladder
from openshell_supervisor.boundary.boundary import Boundary
from openshell_supervisor.confine import baseline, prelude
from openshell_supervisor.confine.failure import Subsystem
from openshell_supervisor.confine.plan import Plan
from openshell_supervisor.enforcement import Enforcement, Layer, Statement
from openshell_supervisor.errors import BoundaryError, ConfineError
from openshell_supervisor.inside import NAMED_SOCKETS, Settled, settle
from openshell_supervisor.sandbox import Sandbox
from openshell_supervisor.telemetry.events import Severity
from openshell_supervisor.telemetry.plain_log import LateLogger
from openshell_supervisor.workload.child import Child

log = LateLogger("openshell_supervisor.ascent")

type Ascent = ladder.Ascent[Child, Settled]


def say_file_rules(sandbox: Sandbox, plan: Plan) -> None:
    """The ruleset as events, in upstream's words, and what is not as the policy reads."""
    telemetry = sandbox.telemetry
    if plan.file_rules is None:
        return
    for note in plan.file_rules.notes:
        telemetry.config("validated", note, severity=Severity.MEDIUM, unmapped={"warning": "file_rules"})
    if plan.ruleset is None:
        return
    compat = "HardRequirement" if plan.hard else "BestEffort"
    telemetry.config(
        "applying",
        "Applying Landlock filesystem sandbox",
        abi=f"V{plan.ruleset.abi}",
        compat=compat,
        ro=len(plan.file_rules.read_only),
        rw=len(plan.file_rules.read_write),
    )
    telemetry.config(
        "built", "Landlock ruleset built", rules_applied=plan.ruleset.applied, skipped=len(plan.ruleset.skipped)
    )
    for skipped in plan.ruleset.skipped:
        if skipped.missing and skipped.path in (*baseline.READ_ONLY, *baseline.READ_WRITE):
            continue  # no image has all of these
        if skipped.missing:
            telemetry.config(
                "validated", "A path of the policy's file rules does not exist: no rule", path=skipped.path
            )
        else:
            telemetry.config(
                "degraded",
                "Skipping inaccessible Landlock path (best-effort)",
                enabled=None,
                severity=Severity.MEDIUM,
                ok=False,
                path=skipped.path,
                error=skipped.reason,
            )


def say_sockets(sandbox: Sandbox, plan: Plan, boundary: Boundary) -> None:
    """Programs outside that listen on paths are out of reach now, which a workload that wanted one would not understand."""
    if plan.sockets and boundary.isolated:
        shown = ", ".join(plan.sockets[:NAMED_SOCKETS]) + (" …" if len(plan.sockets) > NAMED_SOCKETS else "")
        sandbox.telemetry.config(
            "covered",
            "Sockets of programs outside cannot be connected to; name a path in filesystem_policy to allow it",
            count=len(plan.sockets),
            paths=shown,
        )


def say_terminals(sandbox: Sandbox, settled: Settled) -> None:
    """A workload of the supervisor's own user that could not be given terminals of its own reaches those of its user."""
    if settled.confined.answer.get("terminals") is False:
        sandbox.telemetry.config(
            "validated",
            "The workload can open the other terminals of its user: read what is typed there, and write to them",
            severity=Severity.MEDIUM,
            unmapped={"warning": "shared_terminals"},
        )


async def climb(sandbox: Sandbox) -> tuple[Ascent, Enforcement | None]:
    """The rung that holds, and the network's entry where it is not the rung's to say: declared external, or tolerated."""
    settings = sandbox.settings
    declared = sandbox.failures.declared(Layer.NETWORK)
    if declared is not None:
        return await take(sandbox, "external", insist=True), declared
    # An explicit wish to enforce excludes the rung that cannot: auto then refuses instead of observing.
    mode = "isolated" if settings.network_mode == "auto" and settings.egress == "enforce" else settings.network_mode
    try:
        return await take(sandbox, mode, insist=False), None
    except BoundaryError as error:
        if not error.failures or settings.egress == "enforce":  # a flag's demand, which no variable takes back
            raise
        tolerated = sandbox.failures.failed(Subsystem.NETWORK_NAMESPACE, error)
        ascent = await take(sandbox, "host", insist=True)
        return dataclasses.replace(ascent, failures=error.failures), tolerated


async def take(sandbox: Sandbox, mode: str, *, insist: bool) -> Ascent:
    return await ladder.climb(
        mode,
        label=f"sandbox-{secrets.token_hex(4)}",
        identity=sandbox.identity.as_plan(),
        new_launcher=sandbox.new_launcher,
        settle=lambda boundary, child: settle(sandbox, boundary, child, insist=insist),
        telemetry=sandbox.telemetry,
    )


async def state(
    sandbox: Sandbox, ascent: Ascent, given: Enforcement | None, *, own: Enforcement | None = None
) -> Statement:
    """The statement, with the supervisor's own filter put in place (unless `own` is its entry). `given` is the network's entry
    from `climb`. Raises `ConfineError` for what may not fail."""
    settings, settled, failures = sandbox.settings, ascent.settled, sandbox.failures
    plan, rung = await sandbox.plan, ascent.boundary.rung
    network = layers.network(
        requested=settings.network_mode,
        rung=rung,
        egress=settled.egress,
        failures=ascent.failures,
        evidence=settled.evidence,
        gaps=settled.gaps,
        given=given,
    )
    return Statement.of(
        requested_mode=settings.network_mode,
        effective_mode="isolated" if ascent.boundary.isolated else "external" if rung == "external" else "host",
        rung=rung,
        egress=settled.egress,
        policy_generation=sandbox.generation_number,
        layers=[
            network,
            layers.filesystem(plan, settled.confined, failures),
            layers.syscalls(plan, settled.confined, failures),
            layers.privileges(sandbox.identity, settled.confined),
            own or own_calls(sandbox),
            layers.binary_identity(
                sandbox.policy, settled.identified, relaxed=settings.relaxed_identity, egress=settled.egress
            ),
        ],
    )


def own_calls(sandbox: Sandbox) -> Enforcement:
    """Forbid ourselves, every thread, what only the boundary's making needed; whoever takes the supervisor over gets less."""
    layer = Layer.SUPERVISOR_SYSCALLS
    declared = sandbox.failures.declared(layer)
    if declared is not None:
        return declared
    try:
        facts = prelude.install(prelude.prelude_program())
    except ConfineError as error:
        return sandbox.failures.failed(Subsystem.SUPERVISOR_SECCOMP, error)
    return layers.supervisor_syscalls(facts)
