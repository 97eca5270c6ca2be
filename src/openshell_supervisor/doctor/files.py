"""Reading a host's small files below one root, bounded; a file that is not there or may not be read is None.

The root is "/" in production. Tests give another one, because not every runtime can exist on a test machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# A mountinfo of a host with a thousand containers; everything else that is read here has a few hundred bytes.
MAX_BYTES = 512 * 1024


@dataclass(frozen=True, slots=True)
class Files:
    """The file system as the checks see it; every path is given as on the host, absolute."""

    root: Path = Path("/")
    remembered: Mapping[str, str] = field(default_factory=dict)

    def remember(self, *paths: str) -> Files:
        """The same, with these files as they are now: what is found in them later may be our own doing."""
        return Files(self.root, {path: self.text(path) or "" for path in paths})

    def text(self, path: str) -> str | None:
        """The content, at most `MAX_BYTES`, None where it cannot be read. Never waits for a FIFO's other end."""
        if path in self.remembered:
            return self.remembered[path]
        try:
            descriptor = os.open(self._place(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            try:
                return file.read(MAX_BYTES).decode("utf-8", "replace")
            except OSError:  # /proc/self/attr/current answers EINVAL where no LSM is active
                return None

    def word(self, path: str) -> str | None:
        """The content of a one-line file, without what surrounds it."""
        content = self.text(path)
        return None if content is None else content.strip("\0 \n\t")

    def number(self, path: str) -> int | None:
        """The number in a one-line file; None where there is none."""
        content = self.word(path)
        return int(content) if content is not None and content.lstrip("-").isdigit() else None

    def lines(self, path: str) -> list[str]:
        """The lines; none where it cannot be read."""
        return (self.text(path) or "").splitlines()

    def fields(self, path: str) -> dict[str, str]:
        """`Name: value` lines, as in /proc/self/status."""
        pairs = (line.partition(":") for line in self.lines(path))
        return {name.strip(): value.strip() for name, separator, value in pairs if separator}

    def exists(self, path: str) -> bool:
        """True when there is something of that name (a directory that hides it counts as absence)."""
        return os.path.lexists(self._place(path))

    def names(self, path: str) -> list[str]:
        """What a directory holds, sorted; nothing where it cannot be listed."""
        try:
            return sorted(os.listdir(self._place(path)))
        except OSError:
            return []

    def head(self, path: str, count: int) -> bytes:
        """The first `count` bytes as they are; empty where it cannot be read."""
        try:
            with open(self._place(path), "rb") as file:
                return file.read(count)
        except OSError:
            return b""

    def _place(self, path: str) -> Path:
        return self.root / path.lstrip("/")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo (proc_pid_mountinfo(5)): `root` is the place inside of the file system that is mounted at `point`."""

    root: str
    point: str
    options: frozenset[str]
    kind: str
    source: str
    super_options: str


def mounts(files: Files) -> list[Mount]:
    """The mounts of this process, in order; lines of another shape are left out."""
    found = []
    for line in files.lines("/proc/self/mountinfo"):
        left, separator, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if separator and len(before) >= 6 and len(after) >= 3:
            found.append(
                Mount(before[3], before[4], frozenset(before[5].split(",")), after[0], after[1], " ".join(after[2:]))
            )
    return found
