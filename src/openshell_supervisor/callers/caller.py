"""The answer, and the one error of this room."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """The program that holds the connection, as the kernel names it (`/proc/<pid>/exe`).

    `ancestors` are the programs above it, nearest first, up to the workload's first process. `cmdline` are absolute paths
    in their arguments: for people to read, because the workload chooses them. `sha256` is the hash of `binary`'s content.
    Where `problem` is set (a sentence; `problem_id` is its stable name), nobody was identified and all else is empty.
    """

    binary: str = ""
    ancestors: tuple[str, ...] = ()
    cmdline: tuple[str, ...] = ()
    sha256: str = ""
    problem: str = ""
    problem_id: str = ""
    pid: int = 0

    @property
    def weight(self) -> int:
        """Characters of its paths: what remembering it costs."""
        return len(self.binary) + sum(map(len, self.ancestors)) + sum(map(len, self.cmdline))


class CallerError(Exception):
    """Who asks cannot be told. `code` is stable: caller_unknown, caller_ambiguous, caller_unreadable or binary_changed.

    `unsettled` says that something changed under our hands, so that a second look may answer.
    """

    def __init__(self, code: str, text: str, *, unsettled: bool = False) -> None:
        super().__init__(text)
        self.code = code
        self.unsettled = unsettled
