"""Which paths a workload may read and write: the policy's own, and what a developer's tools need on any image.

A policy names what is special to it; nobody lists the C library. So the baseline is added, as far as it exists, and a GPU's
devices where there is one. Nothing that the policy listed is taken away, and nothing that it listed read-only becomes writable
by what is added here, under whatever name; where the two cannot both be had, the read-only entry wins and a note says what is
missing. Pure but for the questions that are passed in. It opens nothing and knows nothing of Landlock's calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from openshell_supervisor.policy.model import FilesystemPolicy, SandboxPolicy

# The reference's proxy baseline; the places of programs and libraries where an image has not merged them into /usr; and where
# runtimes read how much memory and how many processors they have (a JVM that cannot see its cgroup's limit takes the host's
# memory for its own, and the kernel kills it).
READ_ONLY = (
    "/usr",
    "/lib",
    "/etc",
    "/app",
    "/var/log",
    "/proc",
    "/dev/urandom",
    "/bin",
    "/sbin",
    "/lib32",
    "/lib64",
    "/sys/fs/cgroup",
    "/sys/devices/system/cpu",
)
# Besides /tmp, what shells (null, tty), terminals (ptmx, pts), multiprocessing (shm) and tests (zero, full, random) open.
READ_WRITE = (
    "/tmp",
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/tty",
    "/dev/ptmx",
    "/dev/pts",
    "/dev/shm",
)
# The first two are also what a GPU is known by: NVIDIA's driver, and the one of WSL2.
GPU_MARKS = ("/dev/nvidiactl", "/dev/dxg")
GPU_READ_ONLY = ("/run/nvidia-persistenced", "/usr/lib/wsl")
GPU_READ_WRITE = (*GPU_MARKS, "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")
TERMINALS = "/dev/pts"
PROC = "/proc"  # CUDA writes /proc/<pid>/task/<tid>/comm


@dataclass(frozen=True, slots=True)
class FileRules:
    """Absolute paths, normalised, each in one of the two lists. `added`: those of them that the policy did not ask for.
    `notes`: sentences for the operator, where something is not as the policy reads. `terminals`: how /dev/pts is allowed, where
    it was kept out of the lists; empty where it is in them or is not allowed."""

    read_only: tuple[str, ...]
    read_write: tuple[str, ...]
    added: tuple[str, ...]
    notes: tuple[str, ...]
    terminals: Literal["", "read_only", "read_write"] = ""


def asked(policy: SandboxPolicy) -> bool:
    """True when the policy wants files to be restricted: it has a `filesystem_policy` or a `landlock` section."""
    return policy.filesystem is not None or policy.landlock is not None


def listing(directory: str) -> Iterable[str]:
    """The names in a directory; none where it cannot be listed."""
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return ()


def file_rules(
    policy: SandboxPolicy,
    *,
    workdir: str | None,
    standing_in: str,
    readable: tuple[str, ...] = (),
    own_terminals: bool = False,
    exists: Callable[[str], bool] = os.path.exists,
    names: Callable[[str], Iterable[str]] = listing,
    real: Callable[[str], str] = os.path.realpath,
) -> FileRules:
    """The lists for one workload.

    `workdir` is the operator's --workdir, `standing_in` the directory that the workload starts in without one (both absolute);
    `readable` are files of ours that the workload reads. `own_terminals`: the launcher may mount another /dev/pts and adds its
    rule itself, so it is in no list. `exists`, `names` (of a directory's entries) and `real` (a path without symbolic links)
    ask the file system.
    """
    section = policy.filesystem or FilesystemPolicy()
    include_workdir = (
        section.include_workdir is not False
    )  # unwritten means true, and so does a section that is not there
    lists = _Lists(section, exists, real)
    if include_workdir and workdir:
        lists.take_workdir(normal(workdir))
    _add_gpu(lists, exists, names)
    for path in READ_ONLY:
        lists.offer_read_only(path)
    for path in READ_WRITE:
        lists.offer_read_write(path)
    for path in readable:
        lists.offer_read_only(normal(path))
    if include_workdir and not workdir:
        lists.offer_standing_in(normal(standing_in))
    lists.note_what_cannot_be_taken_back()
    terminals = lists.take_terminals() if own_terminals else ""
    return FileRules(tuple(lists.read_only), tuple(lists.read_write), tuple(lists.added), tuple(lists.notes), terminals)


def normal(path: str) -> str:
    """Without doubled separators, `.` and a separator at the end. `..` stays: only the kernel knows what it comes to."""
    if not path.startswith("/"):
        return path
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def beneath(path: str, directory: str) -> bool:
    """True when `path` is `directory` or lies in it, by their text."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


class _Lists:
    """The two lists while they grow; what the policy wrote is in them from the start."""

    def __init__(self, section: FilesystemPolicy, exists: Callable[[str], bool], real: Callable[[str], str]) -> None:
        self.exists, self.real = exists, real
        self.added: list[str] = []
        self.notes: list[str] = []
        self.read_write = list(dict.fromkeys(map(normal, section.read_write)))
        if "/" in self.read_write:
            self.read_write.remove("/")
            self.notes.append("/ is not made writable, although the policy lists it: that would be no restriction")
        listed = dict.fromkeys(map(normal, section.read_only))
        self.notes += [
            f"{path} is listed read-only and read-write: it is writable" for path in listed if path in self.read_write
        ]
        self.read_only = [path for path in listed if path not in self.read_write]
        self.explicit = {path: real(path) for path in self.read_only}

    def offer_read_only(self, path: str) -> None:
        """Add what exists and is not allowed already."""
        if path not in self.read_only and path not in self.read_write and self.exists(path):
            self.read_only.append(path)
            self.added.append(path)

    def offer_read_write(self, path: str) -> None:
        """Add what exists, unless that would make writable what the policy lists read-only."""
        if path in self.read_write or not self.exists(path):
            return
        inside = [listed for listed, place in self.explicit.items() if beneath(place, self.real(path))]
        if inside:
            self.notes.append(f"{path} is not made writable: the policy lists {inside[0]} read-only")
            return
        self.read_write.append(path)
        self.added.append(path)

    def promote(self, path: str) -> None:
        """Make writable even what the policy lists read-only, and say so."""
        if path in self.read_write or not self.exists(path):
            return
        if path in self.read_only:
            self.read_only.remove(path)
            self.notes.append(f"{path} is listed read-only and made writable: a GPU needs it")
        self.read_write.append(path)
        self.added.append(path)

    def take_workdir(self, path: str) -> None:
        """The operator's own choice: writable whatever the policy says, but never the root directory."""
        if path == "/":
            self.notes.append("/ is the working directory and is not made writable: that would be no restriction")
        elif path not in self.read_write:
            if path in self.explicit:
                self.notes.append(f"{path} is listed read-only and is the working directory: it is writable")
            self.read_only = [listed for listed in self.read_only if listed != path]
            self.read_write.append(path)

    def offer_standing_in(self, path: str) -> None:
        """Where the workload happens to start: writable if nothing speaks against it, and a note if something does."""
        place = self.real(path)
        if any(beneath(place, self.real(listed)) for listed in self.read_write):
            return
        against = next((listed for listed in self.read_only if _overlap(place, self.real(listed))), None)
        if place == "/" or against is not None:
            why = "it is the root directory" if place == "/" else f"{against} is read-only"
            self.notes.append(
                f"the working directory {path} is not writable: {why} (name a directory with --workdir or under read_write)"
            )
            return
        self.read_write.append(path)

    def take_terminals(self) -> Literal["", "read_only", "read_write"]:
        """Take /dev/pts out of the lists, where it exists; answers in which of them it was."""
        if not self.exists(TERMINALS) or TERMINALS not in (*self.read_only, *self.read_write):
            return ""
        writable = TERMINALS in self.read_write
        (self.read_write if writable else self.read_only).remove(TERMINALS)
        self.added = [path for path in self.added if path != TERMINALS]
        return "read_write" if writable else "read_only"

    def note_what_cannot_be_taken_back(self) -> None:
        """A right that holds for a directory holds for all that lies in it; Landlock has no exceptions."""
        writable = {path: self.real(path) for path in self.read_write}
        for listed, place in self.explicit.items():
            above = next((path for path, root in writable.items() if beneath(place, root)), None)
            if above is not None and listed in self.read_only:
                self.notes.append(f"{listed} is listed read-only but is writable, because it lies in {above}")


def _overlap(one: str, other: str) -> bool:
    return beneath(one, other) or beneath(other, one)


def _add_gpu(lists: _Lists, exists: Callable[[str], bool], names: Callable[[str], Iterable[str]]) -> None:
    """The devices of a GPU, where there is one: the cards are /dev/nvidia0, 1, …; other suffixes are not cards."""
    if not any(exists(mark) for mark in GPU_MARKS):
        return
    numbers = ((name, name.removeprefix("nvidia")) for name in names("/dev") if name.startswith("nvidia"))
    cards = tuple(f"/dev/{name}" for name, number in numbers if number.isascii() and number.isdecimal())
    for path in GPU_READ_ONLY:
        lists.offer_read_only(path)
    for path in (*GPU_READ_WRITE, *cards):
        lists.offer_read_write(path)
    lists.promote(PROC)
