"""Paths that a policy names, opened step by step, so that it is known who could have led them elsewhere.

open(2) follows symbolic links without a word about where they lie. A link in a place that a workload may write is the
workload's word, not the policy's: here each link's directory is noted, and `led_astray` says whether one of them counts. Every
step is taken from an open directory, so nothing that is renamed meanwhile changes what was looked at.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

MAX_LINKS = 40  # as the kernel's own walk (path_resolution(7), MAXSYMLINKS)


@dataclass(slots=True)
class Found:
    """What a path led to: a descriptor (O_PATH, owned), its status, where it really is, and the real directories of the links
    on the way."""

    descriptor: int
    status: os.stat_result
    real: str
    holders: tuple[str, ...]

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.descriptor)


def find(path: str) -> Found:
    """Walk an absolute path. Raises OSError as open(2) would, and ValueError for a relative path or one with a NUL."""
    if not path.startswith("/"):
        raise ValueError("path is not absolute")
    holders: list[str] = []
    names = path.split("/")
    here = _open("/", None)
    try:
        while names:
            name = names.pop(0)
            if name in ("", "."):
                continue
            step = _open(name, here)
            status = os.fstat(step)
            if not stat.S_ISLNK(status.st_mode):
                os.close(here)
                here = step
                continue
            holders.append(_where(here))
            target = os.readlink("", dir_fd=step)
            os.close(step)
            if len(holders) > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if f"{holders[-1]}/".startswith(
                "/proc/"
            ):  # its links may lead to what has no name (proc(5)): the kernel jumps
                there = os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=here)
                os.close(here)
                here = there
                continue
            names[:0] = target.split("/")
            if target.startswith("/"):
                os.close(here)
                here = _open("/", None)
        return Found(here, os.fstat(here), _where(here), tuple(holders))
    except BaseException:
        os.close(here)
        raise


def led_astray(found: Found, places: Iterable[str]) -> str:
    """The writable place (a real path) out of which a link in it led this path; empty where none did."""
    for place in places if found.holders else ():
        inside = f"{place}/"
        leaves = not f"{found.real}/".startswith(inside)
        if leaves and any(f"{holder}/".startswith(inside) for holder in found.holders):
            return place
    return ""


def _open(name: str, directory: int | None) -> int:
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)


def _where(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")
