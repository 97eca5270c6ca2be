"""The directory the workload starts in, a mount namespace of its own, and directories made read-only in it."""

from __future__ import annotations

import ctypes
import os
import struct

from openshell_supervisor.confine.launcher.kernel import (
    CLONE_NEWNS,
    LOCKED_FLAGS,
    MS_BIND,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    libc,
    system_call,
)

MS_PRIVATE, MS_SLAVE = 1 << 18, 1 << 19  # linux/mount.h, as the next
MOUNT_ATTR_RDONLY = 1
SYS_MOUNT_SETATTR = 442  # asm-generic/unistd.h: the same on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000  # linux/fcntl.h
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
    """Make directories read-only, with every mount in them, in a mount namespace of our own; True when every one of them is.

    `anchors`, the directories above them, become mount points too: a mount point cannot be renamed away (rename(2), EBUSY).
    """
    paths = [path for path in paths if writable_mounts(path)]
    if not paths:
        return True
    if not own_namespace():
        return False
    for path in (*anchors, *paths):
        name = os.fsencode(path)
        if libc.mount(name, name, None, ctypes.c_ulong(MS_BIND | MS_REC), None) < 0:
            return False
    return all(make_read_only(path) for path in paths)


def cover(paths: list[str]) -> None:
    """Lay an empty file over each of these, as far as that can be had: connect(2) to it is refused (ECONNREFUSED). Whether it
    was had is seen by trying."""
    if paths and own_namespace():
        for path in paths:
            libc.mount(b"/dev/null", os.fsencode(path), None, ctypes.c_ulong(MS_BIND), None)


def make_read_only(path: str) -> bool:
    """Every mount at and beneath `path` becomes read-only, and none arrives later from outside. Answers what is so afterwards."""
    name = os.fsencode(path)
    libc.mount(None, name, None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    # struct mount_attr {attr_set, attr_clr, propagation, userns_fd}, Linux 5.12; where it is missing, one mount after the other.
    wanted = ctypes.create_string_buffer(struct.pack("=QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0), 32)
    place = ctypes.create_string_buffer(name)
    system_call(
        SYS_MOUNT_SETATTR, AT_FDCWD, ctypes.addressof(place), AT_RECURSIVE, ctypes.addressof(wanted), len(wanted)
    )
    for left in writable_mounts(path):
        flags = sum(twin for flag, twin in LOCKED_FLAGS if os.statvfs(left).f_flag & flag)
        remount = ctypes.c_ulong(MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
        if libc.mount(None, os.fsencode(left), None, remount, None) < 0:
            return False
    return not writable_mounts(path)


def writable_mounts(path: str) -> list[str]:
    """`path`, and the mount points beneath it, as far as they are not read-only."""
    beneath = (place for _, place, _ in mounted() if place.startswith(f"{path}/"))
    return [place for place in (path, *beneath) if not read_only(place)]


def read_only(place: str) -> bool:
    """True for a mount that is, and for one that cannot be looked at: it is covered by another, or not ours to enter."""
    try:
        return bool(os.statvfs(place).f_flag & MS_RDONLY)
    except OSError:
        return True


def mounted() -> list[tuple[int, str, str]]:
    """What is mounted: device number, mount point and type of file system (proc_pid_mountinfo(5))."""
    found = []
    with open("/proc/self/mountinfo", errors="surrogateescape") as table:
        for line in table:
            fields = line.split()
            major, minor = fields[2].split(":")
            kind = fields[fields.index("-", 6) + 1]
            found.append((os.makedev(int(major), int(minor)), unescaped(fields[4]), kind))
    return found


def unescaped(path: str) -> str:
    """A path of mountinfo, in which space, tab, newline and backslash are written in octal."""
    for code in ("040", "011", "012", "134"):
        path = path.replace(f"\\{code}", chr(int(code, 8)))
    return path
