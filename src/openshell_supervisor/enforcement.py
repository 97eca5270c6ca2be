"""What every confining step returns, and the one statement that is made of it.

Never a bool, never None: a step answers with an `Enforcement`, which names the layer, the state, the reason and, where a
system call failed, its errno. The `Statement` collects one per layer; the log, the status file, the exit decision of
`--require` and the gateway all read that one object. This room imports nothing of ours.
"""

from __future__ import annotations

import errno as errno_module
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum


class Layer(StrEnum):
    """The things that can be confined, in the order in which they are reported."""

    NETWORK = "network"
    FILESYSTEM = "filesystem"
    SYSCALLS = "syscalls"
    PRIVILEGES = "privileges"
    SUPERVISOR_SYSCALLS = "supervisor_syscalls"
    BINARY_IDENTITY = "binary_identity"


class State(StrEnum):
    """How a layer ended up. `enforced` holds and was probed; `degraded` was asked for and does not hold; `tolerated` failed
    and best-effort was opted in to; `external` was declared to be somebody else's job; `off` was not asked for."""

    ENFORCED = "enforced"
    DEGRADED = "degraded"
    TOLERATED = "tolerated"
    EXTERNAL = "external"
    OFF = "off"


def errno_name(number: int | None) -> str | None:
    """The symbolic name of an errno (1 -> "EPERM"), or None for None; an unknown number becomes "E<number>"."""
    if number is None:
        return None
    return errno_module.errorcode.get(number, f"E{number}")


@dataclass(frozen=True, slots=True)
class Enforcement:
    """What one layer achieved. `errno` is a symbolic name such as "EPERM"; `detail` holds JSON-able evidence."""

    layer: Layer
    state: State
    reason: str
    asked: bool = True
    errno: str | None = None
    detail: Mapping[str, object] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """True when the layer is confined, by us (probed) or by declaration of the operator."""
        return self.state in (State.ENFORCED, State.EXTERNAL)


@dataclass(frozen=True, slots=True)
class Statement:
    """The enforcement statement: what was asked, what holds, and why not. Exactly one `Enforcement` per layer."""

    requested_mode: str
    effective_mode: str
    rung: str | None
    egress: str
    policy_generation: int
    layers: tuple[Enforcement, ...]

    @classmethod
    def of(
        cls,
        *,
        requested_mode: str,
        effective_mode: str,
        rung: str | None,
        egress: str,
        policy_generation: int,
        layers: Iterable[Enforcement],
    ) -> Statement:
        """Order the layers; a layer nobody reported is a programming error and raises `ValueError`."""
        by_layer = {item.layer: item for item in layers}
        missing = [layer for layer in Layer if layer not in by_layer]
        if missing:
            raise ValueError(f"no enforcement was reported for {', '.join(missing)}")
        ordered = tuple(by_layer[layer] for layer in Layer)
        return cls(requested_mode, effective_mode, rung, egress, policy_generation, ordered)

    def with_layers(self, layers: Iterable[Enforcement]) -> Statement:
        """The same statement with other entries."""
        return replace(self, layers=tuple(layers))

    def layer(self, layer: Layer) -> Enforcement:
        """The entry for one layer."""
        return next(item for item in self.layers if item.layer is layer)

    def unmet(self, required: Iterable[Layer]) -> tuple[Enforcement, ...]:
        """The entries among `required` that are neither `enforced` nor `external`."""
        wanted = set(required)
        return tuple(item for item in self.layers if item.layer in wanted and not item.holds)

    def as_json(self) -> dict[str, object]:
        """The shape of `--status-file`, as plain JSON types."""
        return {
            "network_mode": {"requested": self.requested_mode, "effective": self.effective_mode, "rung": self.rung},
            "egress": self.egress,
            "policy_generation": self.policy_generation,
            "layers": [
                {
                    "layer": item.layer.value,
                    "state": item.state.value,
                    "reason": item.reason,
                    "errno": item.errno,
                    "detail": dict(item.detail),
                }
                for item in self.layers
            ],
        }

    def table(self) -> str:
        """The statement for a person: one line per layer, columns aligned, no trailing newline."""
        head = (
            f"network mode {self.requested_mode} -> {self.effective_mode}, rung {self.rung or '-'}, "
            f"egress {self.egress}, policy generation {self.policy_generation}"
        )
        rows = [("LAYER", "STATE", "WHY")]
        for item in self.layers:
            why = f"{item.reason} [{item.errno}]" if item.errno else item.reason
            rows.append((item.layer.value, item.state.value, why))
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{layer:<{widths[0]}}  {state:<{widths[1]}}  {why}" for layer, state, why in rows]
        return "\n".join([head, *lines])
