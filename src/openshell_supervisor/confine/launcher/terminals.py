"""Terminals of the workload's own: a devpts in which nobody else's are, and in it the terminal that the workload runs on.

Every process of a terminal's user may open it, read what is typed there and write escape sequences to it (pty(7)). A workload of
the supervisor's own user would find all of its user's in /dev/pts; so they are covered up, under every name that they have.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import struct
import termios

from openshell_supervisor.confine.launcher import mounts
from openshell_supervisor.confine.launcher.kernel import (
    MS_BIND,
    TYPE_CHECKING,
    StepError,
    libc,
    system_call,
)

if TYPE_CHECKING:
    from openshell_supervisor.confine.launcher.kernel import Request

MS_NOSUID, MS_NOEXEC = 2, 8  # linux/mount.h
SYS_LANDLOCK_ADD_RULE = 445  # asm-generic/unistd.h: the same on every architecture
LANDLOCK_RULE_PATH_BENEATH = 1  # linux/landlock.h
PTS = "/dev/pts"
# Kernel documentation, filesystems/devpts: everybody may make pairs, slaves are as openpty(3) leaves them. No gid=, because the
# group tty (5 by custom) need not be mapped here; slaves then have the group of who opens them.
OPTIONS = b"newinstance,ptmxmode=0666,mode=0620"
SLAVE_MAJORS = range(136, 144)  # Unix98 slaves (kernel documentation, admin-guide/devices.txt)


def take(wanted: Request | None, descriptors: list[int]) -> tuple[bool | None, list[int]]:
    """Cover up the terminals outside; answers whether none of them can be opened by a name any more (None: not asked for), and
    the master of the workload's own terminal where that was made anew.

    `wanted` is {directory_rights, file_rights, own}: what the ruleset, descriptor 0, is to allow on /dev/pts and on those of the
    descriptors 0-2 that are terminals (bit masks; 0: no rule), and whether these three are a terminal of the supervisor's making.
    """
    if wanted is None:
        return None, []
    made, private = make_private()
    passed = renew() if made and wanted["own"] else []
    if wanted["directory_rights"]:
        allow(descriptors[0], wanted["directory_rights"], wanted["file_rights"])
    return private, passed


def make_private() -> tuple[bool, bool]:
    """Mount a devpts of our own over the one there is, and cover what else shows the old ones: a container's /dev/console is
    such a file. Answers whether it was mounted, and whether no terminal outside is in reach any more."""
    try:
        places, devices = instances()
    except OSError:
        return False, False
    made = False
    if os.path.isdir(PTS) and mounts.own_namespace():
        made = libc.mount(b"devpts", PTS.encode(), b"devpts", ctypes.c_ulong(MS_NOSUID | MS_NOEXEC), OPTIONS) == 0
    for place in places if made else ():
        if shows(place, devices):
            cover = PTS if os.path.isdir(place) else "/dev/null"
            libc.mount(cover.encode(), os.fsencode(place), None, ctypes.c_ulong(MS_BIND), None)
    return made, not any(shows(place, devices) for place in (PTS, *places))


def instances() -> tuple[list[str], set[int]]:
    """Where a devpts or a file of one is mounted, and their device numbers."""
    found = [(device, place) for device, place, kind in mounts.mounted() if kind == "devpts"]
    return [place for _, place in found], {device for device, _ in found}


def shows(place: str, devices: set[int]) -> bool:
    """Does this path lead into one of these file systems?"""
    try:
        return os.stat(place).st_dev in devices
    except OSError:
        return False


def renew() -> list[int]:
    """The workload's terminal once more, in its own devpts, so that it has a name there (ttyname(3)); answers the master.

    None where that cannot be had: the old one serves as well, without a name.
    """
    try:
        master, slave = os.openpty()
    except OSError:
        return []
    fcntl.ioctl(slave, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))
    for number in range(3):
        os.dup2(slave, number)
    os.close(slave)
    return [master]


def allow(ruleset: int, directory_rights: int, file_rights: int) -> None:
    """Add the rules that could not be made before the mount; a script's `>/dev/stderr` opens the terminal that it has."""
    add_rule(ruleset, PTS, directory_rights)
    for number in range(3):
        try:
            status = os.fstat(number)
        except OSError:
            continue
        if stat.S_ISCHR(status.st_mode) and os.major(status.st_rdev) in SLAVE_MAJORS:
            add_rule(ruleset, f"/proc/self/fd/{number}", file_rights)


def add_rule(ruleset: int, path: str, rights: int) -> None:
    """landlock_add_rule(2) for a path, where it exists. Raises StepError."""
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        # struct landlock_path_beneath_attr, which is packed
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, handle))
        number = system_call(SYS_LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, ctypes.addressof(rule), 0)
    finally:
        os.close(handle)
    if number:
        raise StepError("landlock_add_rule", number)
