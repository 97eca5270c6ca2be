"""Processes as /proc shows them, held so that no other one can take their place while they are read.

A `Process` is a descriptor of `/proc/<pid>`: reads through it fail once that very process is gone, whoever has its number by
then. What a process may change about itself (its program, its parent) is read again at the end by those who relied on it.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

from openshell_supervisor.callers.caller import CallerError

# proc(5), /proc/pid/stat: a process's line is some 300 bytes.
_STAT_BYTES = 4096
# Of a command line; it only names scripts for people.
MAX_CMDLINE_BYTES = 64 * 1024
MAX_FOREIGN = 4096


class Process:
    """One process. Raises `CallerError` (unsettled) when it is gone, `caller_unreadable` when it may not be looked at."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._directory = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self._gone(error) from error
        try:
            self.parent, self.started = self.stat()
        except BaseException:
            os.close(self._directory)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._directory)

    def stat(self) -> tuple[int, int]:
        """(parent's pid, start in clock ticks since boot)."""
        fields = self._read("stat", _STAT_BYTES).rpartition(b") ")[2].split()
        if len(fields) < 20:
            raise CallerError("caller_unknown", f"process {self.pid} is gone", unsettled=True)
        return int(fields[1]), int(fields[19])  # fields 4 and 22 of proc(5)

    def program(self) -> str:
        """The target of `exe`, as the kernel writes it."""
        try:
            return os.readlink("exe", dir_fd=self._directory)
        except OSError as error:
            raise self._gone(error) from error

    def open_program(self) -> int:
        """A descriptor of the very file that it executes, whatever its path leads to by now; the caller's to close."""
        try:
            return os.open("exe", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError as error:
            raise self._gone(error) from error

    def arguments(self) -> list[str]:
        """Its command line, as it likes to show it."""
        return self._read("cmdline", MAX_CMDLINE_BYTES).decode("utf-8", "replace").split("\0")

    def mount_namespace(self) -> int:
        """The inode of the mount namespace that its paths are of."""
        try:
            return os.stat("ns/mnt", dir_fd=self._directory).st_ino
        except OSError as error:
            raise self._gone(error) from error

    def holds(self, inode: int) -> bool:
        """Has it the socket open (still)?"""
        try:
            descriptors = os.open("fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError as error:
            raise self._gone(error) from error
        try:
            return _among(descriptors, f"socket:[{inode}]")
        finally:
            os.close(descriptors)

    def _read(self, name: str, size: int) -> bytes:
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
            try:
                return os.read(descriptor, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._gone(error) from error

    def _gone(self, error: OSError) -> CallerError:
        if isinstance(error, PermissionError):
            return CallerError("caller_unreadable", f"process {self.pid} may not be looked at: {error.strerror}")
        return CallerError("caller_unknown", f"process {self.pid} is gone", unsettled=True)


def _among(descriptors: int, link: str) -> bool:
    for name in os.listdir(descriptors):
        try:
            if os.readlink(name, dir_fd=descriptors) == link:
                return True
        except FileNotFoundError:
            continue  # closed meanwhile, or the listing's own
    return False


class Holders:
    """Finds every process that has a socket open. `root` is the workload's first process, `supervisor` its reaper (ours).

    All processes are looked at, not only the workload's: a socket that somebody else shares is nobody's for certain. Of those
    that may not be looked at (without CAP_SYS_PTRACE every process can close itself: prctl(2), PR_SET_DUMPABLE), the workload's
    make the answer uncertain when they are above or below a holder, from which the socket is inherited, or when nobody else
    holds it. Others are passed over: agents for keys always close themselves, and are nobody's parents.
    """

    def __init__(self, root: int, supervisor: int) -> None:
        self._root = root
        self._supervisor = supervisor
        self._foreign: dict[int, int] = {}  # pid -> inode of its directory in /proc, which no other process ever has

    def of(self, inode: int, *, spare_root: bool = False) -> list[int]:
        """The pids that hold the socket, ascending; empty where nobody does. Raises `CallerError` (caller_unreadable).

        `spare_root`: the first process is still our own launcher, which closes itself to everybody.
        """
        link = f"socket:[{inode}]"
        own = str(self._supervisor)
        found, closed = [], []
        for name in os.listdir("/proc"):
            if not name.isdigit() or name == own:
                continue
            try:
                descriptors = os.open(f"/proc/{name}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except PermissionError:
                closed.append(int(name))
                continue
            except OSError:
                continue  # gone meanwhile
            try:
                if _among(descriptors, link):
                    found.append(int(name))
            except PermissionError:
                closed.append(int(name))
            except OSError:
                continue  # gone meanwhile
            finally:
                os.close(descriptors)
        spared = self._root if spare_root else 0
        hidden = [pid for pid in closed if pid != spared and self._is_of_the_workload(pid)]
        hiding = [pid for pid in hidden if not found or any(_related(pid, holder) for holder in found)]
        if hiding:
            shown = ", ".join(map(str, hiding[:8]))
            raise CallerError(
                "caller_unreadable",
                f"failed to resolve peer binary: processes [{shown}] of the workload may not be looked at, and may share it",
            )
        return sorted(found)

    def _is_of_the_workload(self, pid: int) -> bool:
        """Does it descend from the workload's first process, or from an orphan of it that fell to us?

        Our own other children (the guard, launchers) are children of ours in the session that we are in; an orphan of the
        workload is in the workload's, or in one that it made.
        """
        try:
            directory = os.stat(f"/proc/{pid}").st_ino
            if self._foreign.get(pid) == directory:
                return False
            at, below = pid, 0
            while at not in (0, 1, self._supervisor):
                if at == self._root:
                    return True
                below = at
                at = _relations(at)[0]
            if at == self._supervisor and _relations(below)[1] != os.getsid(self._supervisor):
                return True
        except OSError:
            return False  # gone meanwhile: it holds nothing any more
        if len(self._foreign) >= MAX_FOREIGN:
            self._foreign.clear()
        self._foreign[pid] = directory
        return False


def _related(one: int, other: int) -> bool:
    """Is one of the two processes an ancestor of the other? Those that are gone have no relations."""
    return _above(one, other) or _above(other, one)


def _above(ancestor: int, pid: int) -> bool:
    try:
        while pid > 1:
            if pid == ancestor:
                return True
            pid = _relations(pid)[0]
    except OSError:
        pass  # it ended meanwhile
    return False


def _relations(pid: int) -> tuple[int, int]:
    """(parent's pid, session); raises `OSError` when it is gone."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read(_STAT_BYTES).rpartition(b") ")[2].split()
    return int(fields[1]), int(fields[3])
