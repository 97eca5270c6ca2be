"""The enforcement statement's readers: the status file, the log, the telemetry, and the decision of `--require`.

One truth, many readers: everything here is computed from a `Statement` and adds nothing to it.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from openshell_supervisor.enforcement import Enforcement, Layer, State, Statement
from openshell_supervisor.errors import ConfineError, RungFailure, SettingsError
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


def announce(statement: Statement, failures: tuple[RungFailure, ...], telemetry: Telemetry) -> None:
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
            subsystem=str(network.detail["subsystem"]) if "subsystem" in network.detail else None,
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
        if item.state in (State.TOLERATED, State.DEGRADED) and not _said_already(item, statement):
            telemetry.config(
                "degraded",
                f"Layer {item.layer.value} does not hold",
                enabled=None,
                severity=Severity.MEDIUM,
                ok=False,
                status_code=item.errno,
                unmapped={"enforcement_state": item.state.value},
                layer=item.layer.value,
                subsystem=item.detail.get("subsystem"),
                errno=item.errno,
                error=item.reason,
            )


def _said_already(item: Enforcement, statement: Statement) -> bool:
    return item.layer is Layer.NETWORK and statement.rung == "observed"


def require(statement: Statement, required: frozenset[Layer]) -> None:
    """Raise `ConfineError` when a required layer neither holds nor was declared external."""
    unmet = statement.unmet(required)
    if unmet:
        raise ConfineError(
            "required layers do not hold: "
            + "; ".join(f"{item.layer.value} is {item.state.value} ({item.reason})" for item in unmet),
            code="requirement_unmet",
            step="require",
            hint=_mending(unmet),
        )


def _mending(unmet: tuple[Enforcement, ...]) -> str:
    """What to do about required layers that do not hold: a layer that nobody asked for is not the host's fault."""
    off = {item.layer for item in unmet if item.state is State.OFF}
    if Layer.FILESYSTEM in off:
        return "give the policy a filesystem_policy section: without one there are no file rules"
    if off:
        return f"nothing asks for {', '.join(sorted(off))} here: ask for it, or drop it from --require"
    return "run where the host allows the layer (`openshell-supervisor doctor` says what it allows), or drop it from --require"
