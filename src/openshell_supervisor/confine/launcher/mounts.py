"""The directory the workload starts in, a mount namespace of its own, and directories made read-only in it."""

from __future__ import annotations

import ctypes
import os

from openshell_supervisor.confine.launcher.kernel import (
    CLONE_NEWNS,
    LOCKED_FLAGS,
    MS_BIND,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    libc,
)

MS_SLAVE = 1 << 19  # linux/mount.h
_own: list[bool] = []  # whether the namespace could be had, once that was tried


def own_namespace() -> bool:
    """A mount namespace of our own, from which nothing gets out; False where that cannot be had. Tried once.

    In the user namespace that we come from, the new one's mounts still share what is mounted with the old one's
    (mount_namespaces(7)): what is made read-only here would be so for the whole machine. What comes from there still arrives.
    """
    if not _own:
        made = libc.unshare(CLONE_NEWNS) == 0
        _own.append(made and libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_SLAVE), None) == 0)
    return _own[0]


def stand_anew(wanted: str | None, mounted: bool) -> None:
    """Go to the wanted directory. Without one, and with mounts made, enter the present one again: a mount does not cover the
    directory that a process already stands in. Where it may not be entered, "/" is safe."""
    if wanted:
        os.chdir(wanted)
    elif mounted:
        try:
            os.chdir(os.getcwd())
        except OSError:
            os.chdir("/")


def protect(paths: list[str], anchors: list[str]) -> bool:
    """Make directories read-only in a mount namespace of our own, best effort; True when every one of them is.

    `anchors`, the directories above them, become mount points too: a mount point cannot be renamed away (rename(2), EBUSY).
    """
    paths = [path for path in paths if not os.statvfs(path).f_flag & MS_RDONLY]
    if not paths:
        return True
    if not own_namespace():
        return False
    for path in (*anchors, *paths):
        name = os.fsencode(path)
        if libc.mount(name, name, None, ctypes.c_ulong(MS_BIND | MS_REC), None) < 0:
            return False
    for path in paths:
        flags = sum(twin for flag, twin in LOCKED_FLAGS if os.statvfs(path).f_flag & flag)
        remount = ctypes.c_ulong(MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
        if libc.mount(None, os.fsencode(path), None, remount, None) < 0 or not os.statvfs(path).f_flag & MS_RDONLY:
            return False
    return True
