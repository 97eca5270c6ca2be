"""The failure handler: the one place where a failed step becomes a state, or the end of the start.

Four rules, and no other:
  - a layer that the operator declared external is not attempted (`external`);
  - three subsystems may fail where `OPENSHELL_BEST_EFFORT_FAILURES` is set, by upstream's names (`tolerated`);
  - file rules follow the policy's own word: best effort is `degraded`, a hard requirement ends the start;
  - everything else ends the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from openshell_supervisor.enforcement import Enforcement, Layer, State
from openshell_supervisor.errors import HostError
from openshell_supervisor.telemetry.events import Severity, Telemetry
from openshell_supervisor.telemetry.plain_log import LateLogger

VARIABLE = "OPENSHELL_BEST_EFFORT_FAILURES"

log = LateLogger("openshell_supervisor.failure")


class Subsystem(StrEnum):
    """What may fail where best effort was opted in to (S2-03 to S2-05); the names are upstream's."""

    NETWORK_NAMESPACE = "network-namespace"
    SUPERVISOR_SECCOMP = "supervisor-seccomp"
    WORKLOAD_SECCOMP = "workload-seccomp"

    @property
    def layer(self) -> Layer:
        """The layer of the statement that this subsystem makes."""
        return _LAYERS[self]


_LAYERS = {
    Subsystem.NETWORK_NAMESPACE: Layer.NETWORK,
    Subsystem.SUPERVISOR_SECCOMP: Layer.SUPERVISOR_SYSCALLS,
    Subsystem.WORKLOAD_SECCOMP: Layer.SYSCALLS,
}


@dataclass(frozen=True, slots=True)
class FailureHandler:
    """What this run does with a failed step. `best_effort` is whether the variable is set, `external` what was declared."""

    telemetry: Telemetry
    best_effort: bool = False
    external: frozenset[Layer] = frozenset()

    def declared(self, layer: Layer) -> Enforcement | None:
        """The entry of a layer that the operator gave away, None where it is ours."""
        if layer not in self.external:
            return None
        return Enforcement(layer, State.EXTERNAL, "declared external: an outer sandbox owns it, nothing was tried here")

    def failed(self, subsystem: Subsystem, error: HostError) -> Enforcement:
        """The entry of a layer whose step failed, where that is tolerated. Raises `error` where it is not."""
        if not self.best_effort:
            raise error
        log.warning(
            f"continuing without it, because the operator set {VARIABLE}", subsystem=subsystem, error=error.message
        )
        return Enforcement(
            subsystem.layer,
            State.TOLERATED,
            f"{VARIABLE} is set: {subsystem} failed: {error.message}",
            errno=error.errno_name,
            detail={"subsystem": subsystem, "step": error.step, "error": error.message, "probed": False},
        )

    def file_rules_failed(self, error: HostError, *, hard: bool) -> Enforcement:
        """The filesystem entry after a failure, with upstream's finding. Raises `error` where the policy insists."""
        enforcing = error.step == "landlock_restrict_self"
        self.telemetry.finding(
            "landlock-enforce-failed" if enforcing else "landlock-unavailable",
            "Landlock Filesystem Sandbox Unavailable",
            f"Running WITHOUT filesystem restrictions: {error.message}" if not hard else error.message,
            severity=Severity.HIGH,
            alert=True,
            confidence="High",
            remediation=error.hint,
        )
        if hard:
            raise error
        return Enforcement(
            Layer.FILESYSTEM,
            State.DEGRADED,
            f"{error.message}; the policy says best effort",
            errno=error.errno_name,
            detail={"step": error.step, "probed": False},
        )
