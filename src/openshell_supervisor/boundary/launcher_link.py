"""What the rungs need of a launcher process, without knowing the room it lives in.

A rung asks the launcher to enter the place it built. A launcher that failed half-way is not asked again: the ladder discards
it and starts another, so nothing of a failed attempt can remain in the process that becomes the workload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from openshell_supervisor.errors import BoundaryError, LaunchError


class Launcher(Protocol):
    """A process that confines itself on request and later becomes the workload."""

    async def ask(
        self, request: Mapping[str, Any], descriptors: Sequence[int] = ()
    ) -> tuple[dict[str, Any], list[int]]:
        """Answer and passed descriptors of one request; raises `LaunchError` naming the step that failed."""
        ...

    def discard(self) -> None:
        """Kill it."""
        ...


@contextmanager
def entering(rung: str) -> Iterator[None]:
    """Turn a launcher's failure inside the block into the rung's `BoundaryError`, step and errno kept."""
    try:
        yield
    except LaunchError as error:
        raise BoundaryError(
            f"rung {rung}: {error.message}",
            code="boundary_unavailable",
            step=error.step,
            errno=error.errno,
            hint=error.hint,
        ) from error
