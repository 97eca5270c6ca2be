"""The enforcement statement's readers: the status file, the log, the telemetry, and the decision of `--require`.

One truth, many readers: everything here is computed from a `Statement` and adds nothing to it.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from openshell_supervisor.boundary.ladder import Failure
from openshell_supervisor.confine.identity import Identity
from openshell_supervisor.enforcement import Enforcement, Layer, State, Statement
from openshell_supervisor.errors import ConfineError, SettingsError
from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.telemetry.events import Severity, Telemetry


def write_status(path: Path, statement: Statement) -> None:
    """Replace `path` with the statement as JSON, atomically (rename(2) within the directory). Raises `SettingsError`."""
    text = json.dumps(statement.as_json(), indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SettingsError(
            f"--status-file: cannot write {path}: {error.strerror}",
            code="unwritable_file",
            hint="name a writable place",
        ) from error


def forget_status(path: Path) -> None:
    """Remove what an earlier run left: until this run has a statement, there is none. Raises `SettingsError`."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(
            f"--status-file: cannot replace {path}: {error.strerror}",
            code="unwritable_file",
            hint="name a writable place",
        ) from error


def announce(statement: Statement, failures: tuple[Failure, ...], telemetry: Telemetry) -> None:
    """Say the statement as events: one line with every layer, and `CONFIG:DEGRADED` with its finding where it is due."""
    network = statement.layer(Layer.NETWORK)
    if statement.rung == "observed":
        worst = failures[-1] if failures else None
        telemetry.degraded(
            statement.requested_mode,
            effective=statement.effective_mode,
            egress=statement.egress,
            error="; ".join(failure.brief() for failure in failures) or None,
            errno=network.errno,
            probe=worst.step if worst else None,
        )
    elif statement.egress == "observe":
        telemetry.degraded(statement.requested_mode, effective=statement.effective_mode, egress="observe", asked=True)
    states = " ".join(f"{item.layer.value}:{item.state.value}" for item in statement.layers)
    telemetry.config(
        "stated",
        f"Enforcement statement [rung:{statement.rung} egress:{statement.egress} {states}]",
        enabled=None,
        unmapped={"rung": statement.rung, **{item.layer.value: item.state.value for item in statement.layers}},
    )
    for item in statement.layers:
        if item.state is State.DEGRADED and not (item.layer is Layer.NETWORK and statement.rung == "observed"):
            telemetry.config(
                "degraded",
                f"Layer {item.layer.value} does not hold",
                enabled=None,
                severity=Severity.MEDIUM,
                ok=False,
                status_code=item.errno,
                layer=item.layer.value,
                error=item.reason,
            )


def require(statement: Statement, required: frozenset[Layer]) -> None:
    """Raise `ConfineError` when a required layer neither holds nor was declared external."""
    unmet = statement.unmet(required)
    if unmet:
        raise ConfineError(
            "required layers do not hold: "
            + "; ".join(f"{item.layer.value} is {item.state.value} ({item.reason})" for item in unmet),
            code="requirement_unmet",
            step="require",
            hint="run where the host allows the layer, or drop it from --require",
        )


def network_layer(
    *,
    requested: str,
    rung: str,
    egress: str,
    failures: tuple[Failure, ...],
    evidence: dict[str, object],
    gaps: tuple[str, ...],
) -> Enforcement:
    """The network layer's entry: `enforced` only for an isolating rung that was probed, a proxy that enforces, and no `gaps`."""
    detail = {
        **evidence,
        "failed_rungs": [{"rung": f.rung, "step": f.step, "errno": f.errno, "error": f.message} for f in failures],
    }
    if rung == "observed" and requested == "host":
        reason = "network mode host was asked for: verdicts are logged, egress is not enforced"
        return Enforcement(Layer.NETWORK, State.OFF, reason, asked=False, detail=detail)
    if rung == "observed":
        errno = next((f.errno for f in reversed(failures) if f.errno), None)
        reason = "no boundary could be built, verdicts are only logged: " + "; ".join(f.brief() for f in failures)
        return Enforcement(Layer.NETWORK, State.DEGRADED, reason, errno=errno, detail=detail)
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


def other_layers(
    policy: SandboxPolicy, identity: Identity, privileges: dict[str, Any], *, relaxed_identity: bool
) -> list[Enforcement]:
    """The entries of all layers but the network; `privileges` is what the launcher verified about itself."""
    asks_files = policy.filesystem is not None
    asks_binaries = any(rule.binaries for rule in policy.network_policies.values())
    files = (
        "asked for by the policy, but file rules are not built yet" if asks_files else "the policy has no file rules"
    )
    if relaxed_identity:
        binaries = "OPENSHELL_NETWORK_BINARY_IDENTITY turns it off"
    elif asks_binaries:
        binaries = "the policy lists binaries, but telling them apart is not built yet: every process counts as allowed"
    else:
        binaries = "the policy lists no binaries"
    return [
        Enforcement(Layer.FILESYSTEM, State.OFF, files, asked=asks_files),
        Enforcement(Layer.SYSCALLS, State.OFF, "the system call filter is not built yet", asked=False),
        _privilege_layer(identity, privileges),
        Enforcement(Layer.SUPERVISOR_SYSCALLS, State.OFF, "the system call filter is not built yet", asked=False),
        Enforcement(Layer.BINARY_IDENTITY, State.OFF, binaries, asked=asks_binaries),
    ]


def _privilege_layer(identity: Identity, verified: dict[str, Any]) -> Enforcement:
    """From what the launcher verified about itself, never from the plan."""
    if identity.uid == 0 or verified["uid"] == 0:
        reason = "the workload keeps uid 0, without capabilities: " + (identity.note or "the supervisor runs as root")
        return Enforcement(Layer.PRIVILEGES, State.DEGRADED, reason, detail=verified)
    if not verified["no_new_privs"] or verified["capabilities"]:
        return Enforcement(Layer.PRIVILEGES, State.DEGRADED, "capabilities or set-uid programs remain", detail=verified)
    reason = f"uid {verified['uid']}, gid {verified['gid']}, no capabilities, no_new_privs; uid 0 cannot be taken again"
    return Enforcement(Layer.PRIVILEGES, State.ENFORCED, reason, detail=verified)
