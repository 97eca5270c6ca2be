"""The entries of the enforcement statement, each made from what was verified and tried, never from what was asked.

One function per layer; `confine.failure` decides what a failure comes to. The statement's readers are in `report`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openshell_supervisor.confine import landlock
from openshell_supervisor.confine.failure import FailureHandler, Subsystem
from openshell_supervisor.confine.identity import Identity
from openshell_supervisor.confine.plan import Plan
from openshell_supervisor.confine.prelude import PreludeFacts
from openshell_supervisor.confine.selfprobe import NOTHING, Seen
from openshell_supervisor.enforcement import Enforcement, Layer, State
from openshell_supervisor.errors import ConfineError, RungFailure
from openshell_supervisor.policy.model import SandboxPolicy

# Rights of files that the statement cannot do without: where the kernel does not mediate truncate(2) (before ABI 3), a file
# that is listed read-only can be emptied (isolation.md 2.1).
INDISPENSABLE = frozenset(("truncate",))
# What no Landlock has a right for, up to ABI 7 (landlock(7), "Current limitations"): file modes and owners alone decide it.
NEVER_MEDIATED = ("chmod", "chown", "utime", "xattr", "stat", "access", "chdir", "pathname sockets")


@dataclass(frozen=True, slots=True)
class Confined:
    """What the launcher answered when it had confined itself, and what its twin saw of each layer. `exposed` says why the
    workload could act through a process outside of all this; empty where a wall is in between."""

    answer: Mapping[str, Any]
    seen: Mapping[Layer, Seen]
    probed: bool = True
    exposed: str = ""

    def of(self, layer: Layer) -> Seen:
        """What was tried of this layer."""
        return self.seen.get(layer, NOTHING)


@dataclass(frozen=True, slots=True)
class Identified:
    """How the probe's own connection was told: the table that was asked, the program found, and why that is not enough."""

    table: str = ""
    binary: str = ""
    problem: str = ""


def network(
    *,
    requested: str,
    rung: str,
    egress: str,
    failures: tuple[RungFailure, ...],
    evidence: Mapping[str, object],
    gaps: tuple[str, ...],
    given: Enforcement | None,
) -> Enforcement:
    """`enforced` only for an isolating rung that was probed, a proxy that enforces, and no `gaps`. `given` is the entry of a
    network that was declared external, or whose failure was tolerated."""
    failed = [{"rung": f.rung, "step": f.step, "errno": f.errno, "error": f.message} for f in failures]
    detail = {**evidence, "failed_rungs": failed}
    if given is not None:
        how = "the proxy enforces for clients that use it" if egress == "enforce" else "verdicts are only logged"
        return Enforcement(
            Layer.NETWORK, given.state, f"{given.reason}; {how}", errno=given.errno, detail={**given.detail, **detail}
        )
    if rung == "observed" and requested == "host":
        reason = "network mode host was asked for: verdicts are logged, egress is not enforced"
        return Enforcement(Layer.NETWORK, State.OFF, reason, asked=False, detail=detail)
    if rung == "observed":
        last = next((f.errno for f in reversed(failures) if f.errno), None)
        why = (
            "no boundary could be built: " + "; ".join(f.brief() for f in failures) if failures else "no boundary here"
        )
        reason = f"verdicts are only logged, {why}"
        return Enforcement(Layer.NETWORK, State.DEGRADED, reason, errno=last, detail=detail)
    if egress == "observe":
        reason = f"--egress observe was asked for: rung {rung} leaves only the proxy, which lets denied requests pass"
        return Enforcement(Layer.NETWORK, State.OFF, reason, asked=False, detail=detail)
    if gaps:
        reason = f"rung {rung} leaves only the proxy, but the workload can get around it: " + "; ".join(gaps)
        return Enforcement(Layer.NETWORK, State.DEGRADED, reason, detail=detail)
    reason = (
        f"rung {rung}: only the proxy was reachable from inside ({evidence['canaries']} other destinations were tried)"
    )
    return Enforcement(Layer.NETWORK, State.ENFORCED, reason, detail=detail)


def filesystem(plan: Plan, confined: Confined, handler: FailureHandler) -> Enforcement:
    """The file rules. Raises `ConfineError` where the policy makes them a hard requirement and they do not hold."""
    layer = Layer.FILESYSTEM
    declared = handler.declared(layer)
    if declared is not None:
        return declared
    if plan.file_rules_error is not None:
        return handler.file_rules_failed(plan.file_rules_error, hard=plan.hard)
    if plan.ruleset is None:
        return Enforcement(layer, State.OFF, "the policy has no file rules", asked=False, detail=_terminals(confined))
    refused = confined.answer["landlock"]
    if refused:
        error = ConfineError(
            f"Landlock: the kernel made the ruleset and does not let the workload enter it: {os.strerror(refused)}",
            code="landlock_enforce_failed",
            step="landlock_restrict_self",
            errno=refused,
            hint="16 Landlock domains at most can be nested: too many lie around this container"
            if refused == errno.E2BIG
            else "look for a seccomp profile of the container's runtime that refuses landlock_restrict_self",
        )
        return handler.file_rules_failed(error, hard=plan.hard)
    seen = confined.of(layer)
    word, sentence = landlock.summary(plan.ruleset)
    detail = {
        **landlock.detail(plan.ruleset),
        "extent": word,
        "never_mediated": NEVER_MEDIATED,
        **_terminals(confined),
        **_probed(confined, seen),
    }
    reason = _not_shown(confined, seen, "no place outside of the file rules could be tried")
    if seen.breaches:
        error = ConfineError(
            f"Landlock: the kernel took the ruleset and does not hold it: {reason}",
            code="landlock_not_held",
            step="self-probe",
            hint="the kernel, or a filter around it, says that it does what it does not do",
        )
        return handler.file_rules_failed(error, hard=plan.hard)
    if reason:
        return _unproven(layer, reason, detail, hard=plan.hard)
    lacking = sorted(INDISPENSABLE & set(plan.ruleset.missing_rights))
    if lacking:
        return _unproven(
            layer, f"this kernel does not mediate {', '.join(lacking)}; {sentence}", detail, hard=plan.hard
        )
    if detail.get("terminals") == "shared":
        sentence += "; it shares the terminals of its user"
    return Enforcement(layer, State.ENFORCED, f"{word}: {sentence}", detail=detail)


def _terminals(confined: Confined) -> dict[str, object]:
    """Whether the other terminals of the workload's user are out of its reach; nothing where their modes see to that."""
    private = confined.answer.get("terminals")
    return {} if private is None else {"terminals": "private" if private else "shared"}


def _unproven(layer: Layer, reason: str, detail: dict[str, object], *, hard: bool) -> Enforcement:
    if hard:
        raise ConfineError(
            f"landlock.compatibility is hard_requirement, and the file rules do not hold: {reason}",
            code="landlock_not_held",
            step="self-probe",
            hint="run on a kernel with Landlock ABI 3 or later (Linux 6.2), or write best_effort",
        )
    return Enforcement(layer, State.DEGRADED, reason, detail=detail)


def syscalls(plan: Plan, confined: Confined, handler: FailureHandler) -> Enforcement:
    """The workload's system call filters. Raises `ConfineError` where they failed and that is not tolerated."""
    layer = Layer.SYSCALLS
    declared = handler.declared(layer)
    if declared is not None:
        return declared
    if plan.filters_error is not None:
        return handler.failed(Subsystem.WORKLOAD_SECCOMP, plan.filters_error)
    refused = confined.answer["filters"]["workload"]
    if refused:
        error = ConfineError(
            f"the workload's system call filters cannot be installed: {os.strerror(refused)}",
            code="workload_seccomp_failed",
            step="workload-seccomp",
            errno=refused,
            hint="allow seccomp in the container's runtime, declare the layer with --declare-external syscalls where an "
            "outer sandbox owns it, or set OPENSHELL_BEST_EFFORT_FAILURES to start without",
        )
        return handler.failed(Subsystem.WORKLOAD_SECCOMP, error)
    seen = confined.of(layer)
    detail = {"filters": confined.answer["filters_added"], **_probed(confined, seen)}
    reason = _not_shown(confined, seen, "no refused call could be tried")
    added = confined.answer["filters_added"]
    if added is not None and added < len(plan.workload_filters):
        reason = f"the kernel took {len(plan.workload_filters)} filters, and counts {added}"
    if reason:
        error = ConfineError(
            f"the workload's system call filters were installed and do not hold: {reason}",
            code="workload_seccomp_not_held",
            step="workload-seccomp",
            hint="the kernel, or a filter around it, says that it does what it does not do; declare the layer with "
            "--declare-external syscalls where an outer sandbox owns it, or set OPENSHELL_BEST_EFFORT_FAILURES",
        )
        return handler.failed(Subsystem.WORKLOAD_SECCOMP, error)
    if confined.exposed:
        return Enforcement(layer, State.DEGRADED, confined.exposed, detail=detail)
    reason = f"{len(plan.workload_filters)} filters" + (
        f", {len(seen.tried)} refused calls tried" if seen.tried else ""
    )
    return Enforcement(layer, State.ENFORCED, reason, detail=detail)


def privileges(identity: Identity, confined: Confined) -> Enforcement:
    """From what the launcher verified about itself and its twin could not take back, never from the plan.

    Raises `ConfineError` for a privilege that the twin took back: that is never tolerated.
    """
    verified = dict(confined.answer["privileges"])
    seen = confined.of(Layer.PRIVILEGES)
    detail = {**verified, **_probed(confined, seen)}
    if identity.uid == 0 or verified["uid"] == 0:
        reason = "the workload keeps uid 0, without capabilities: " + (identity.note or "the supervisor runs as root")
        return Enforcement(Layer.PRIVILEGES, State.DEGRADED, reason, detail=detail)
    if not verified["no_new_privs"] or verified["capabilities"] or seen.breaches:
        raise ConfineError(
            "privileges can be had again: " + (", ".join(seen.breaches) or "capabilities or set-uid programs"),
            code="privileges_not_held",
            step="self-probe",
            hint="the kernel, or a filter around it, says that it dropped what it did not drop",
        )
    if confined.exposed:
        return Enforcement(Layer.PRIVILEGES, State.DEGRADED, confined.exposed, detail=detail)
    reason = f"uid {verified['uid']}, gid {verified['gid']}, no capabilities, no_new_privs; uid 0 cannot be taken again"
    return Enforcement(Layer.PRIVILEGES, State.ENFORCED, reason, detail=detail)


def supervisor_syscalls(facts: PreludeFacts) -> Enforcement:
    """The supervisor's own filter, which was verified and tried when it was installed."""
    detail = {
        "probed": True,
        "threads": facts.threads,
        "filters": [facts.filters_before, facts.filters_after],
        "tried": facts.tried,
    }
    reason = f"on all {facts.threads} threads, {len(facts.tried)} refused calls tried"
    return Enforcement(Layer.SUPERVISOR_SYSCALLS, State.ENFORCED, reason, detail=detail)


def binary_identity(policy: SandboxPolicy, identified: Identified, *, relaxed: bool, egress: str) -> Enforcement:
    """Which program asks. `enforced` only where the probe's own connection was told to be the twin's, and the proxy enforces."""
    layer = Layer.BINARY_IDENTITY
    asked = any(rule.binaries for rule in policy.network_policies.values())
    detail = {"probed": bool(identified.binary), "table": identified.table, "probe": identified.binary}
    if relaxed:
        reason = "OPENSHELL_NETWORK_BINARY_IDENTITY turns it off" + (
            ": every program counts as allowed" if asked else ""
        )
        return Enforcement(layer, State.OFF, reason, asked=False)
    if identified.problem:
        reason = f"every program counts as allowed: {identified.problem}"
        return Enforcement(layer, State.DEGRADED if asked else State.OFF, reason, asked=asked, detail=detail)
    if not asked:
        rules = "; its rules allow no program" if policy.network_policies else ""
        return Enforcement(layer, State.OFF, f"the policy lists no binaries{rules}", asked=False, detail=detail)
    if egress != "enforce":
        reason = "programs are told apart, and verdicts are only logged"
        return Enforcement(layer, State.DEGRADED, reason, detail=detail)
    reason = f"each connection's program is looked up and hashed ({identified.table}); the probe's own was told rightly"
    return Enforcement(layer, State.ENFORCED, reason, detail=detail)


def _probed(confined: Confined, seen: Seen) -> dict[str, object]:
    return seen.detail() if confined.probed else {"probed": False}


def _not_shown(confined: Confined, seen: Seen, untried: str) -> str:
    """Why a layer is not shown to hold; empty where it is, or where the operator gave up the self-probe."""
    if seen.breaches:
        return "tried from inside, and not refused: " + "; ".join(seen.breaches)
    return untried if confined.probed and not seen.evidence else ""
