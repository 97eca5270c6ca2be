"""What a program is: its content by hash, and the first content that was seen under its path.

Upstream trusts on first use: whatever runs under a path first is what that path means for as long as the supervisor lives, and
other content under it later is refused. Hashes are remembered by the file's fingerprint, so a program is read once.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections import OrderedDict
from typing import NamedTuple

from openshell_supervisor.callers.caller import CallerError
from openshell_supervisor.callers.processes import Process

# Distinct paths that are trusted. An entry is some 200 bytes. Beyond it new ones are refused, not old ones forgotten: else a
# workload could make us forget what it wants to replace.
MAX_TRUSTED = 16384
MAX_HASHES = 4096
# Change times advance with the kernel's tick (4 ms at most) or a file system's own grain (2 s on the coarsest, FAT): a file
# changed so recently could change again and look the same (git's "racily clean").
RACY_SECONDS = 2.0
# node and the like have 100 MiB; a program of more than this would keep a thread busy for seconds at every change.
MAX_PROGRAM_BYTES = 2 * 1024**3
DELETED = " (deleted)"
# What memfd_create(2) makes has a name that the workload chooses freely, slashes included; it is not a path and names nothing.
MEMFD = "/memfd:"


class Fingerprint(NamedTuple):
    """What tells that a file is the same, and unchanged (proc inode numbers apart, as upstream)."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int


def fingerprint(status: os.stat_result) -> Fingerprint:
    """The fingerprint in a file's status; times in nanoseconds."""
    return Fingerprint(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Programs:
    """The hashes and the trust of one run; usable from several threads. `root` is the workload's first process, through whose
    root directory paths are looked up."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._trusted: dict[str, str] = {}
        self._hashes: OrderedDict[Fingerprint, str] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, process: Process, target: str, status: os.stat_result) -> str:
        """The path that a program is known by: the link's target, without the kernel's mark of a deleted file.

        The path must lead to the very file that runs. Only a deleted one leads nowhere; then the process must live in the
        workload's mount namespace, because in another one the workload could have mounted any file at any path. Raises
        `CallerError` (caller_ambiguous).
        """
        if target.startswith(MEMFD):
            return MEMFD
        there = _status(f"/proc/{self._root}/root{target}") or _status(target)
        if there is not None:
            if (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino):
                return target
            text = f"another file is at {target} than the one that runs under that path"
            raise CallerError("caller_ambiguous", text, unsettled=True)
        if target.endswith(DELETED) and process.mount_namespace() == self._mount_namespace():
            return target.removesuffix(DELETED)
        raise CallerError("caller_ambiguous", f"the program {target} cannot be found at its path", unsettled=True)

    def _mount_namespace(self) -> int:
        status = _status(f"/proc/{self._root}/ns/mnt")
        return status.st_ino if status is not None else 0

    def verified(self, path: str, descriptor: int) -> str:
        """The SHA-256 of the open program, as hexadecimal digits. Raises `CallerError` (binary_changed) where `path` was seen
        with other content first."""
        digest = self._digest(path, descriptor)
        if path == MEMFD:
            return digest  # no path, so no trust in one
        with self._lock:
            first = self._trusted.get(path)
            if first is None:
                if len(self._trusted) >= MAX_TRUSTED:
                    raise CallerError(
                        "caller_unknown", f"more than {MAX_TRUSTED} programs were seen: {path} is one too many"
                    )
                first = self._trusted[path] = digest
        if first != digest:
            raise CallerError(
                "binary_changed",
                f"binary integrity check failed: Binary integrity violation: {path} hash changed since its first use",
            )
        return digest

    def _digest(self, path: str, descriptor: int) -> str:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode) or before.st_size > MAX_PROGRAM_BYTES:
            raise CallerError("caller_unknown", f"{path} is no program that can be hashed")
        known = self._hashes.get(fingerprint(before))
        if known is not None:
            return known
        began = time.time()
        digest = _hash(descriptor)
        if fingerprint(os.fstat(descriptor)) != fingerprint(before):
            raise CallerError("binary_changed", f"{path} changed while it was read", unsettled=True)
        if began - before.st_ctime > RACY_SECONDS:
            with self._lock:
                self._hashes[fingerprint(before)] = digest
                while len(self._hashes) > MAX_HASHES:
                    self._hashes.popitem(last=False)
        return digest


def _hash(descriptor: int) -> str:
    with open(os.dup(descriptor), "rb", buffering=0) as file:
        os.lseek(descriptor, 0, os.SEEK_SET)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
