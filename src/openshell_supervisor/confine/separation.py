"""What keeps a workload from processes and files of its own user outside: a user namespace, and code it cannot rewrite.

A network namespace alone does not: a process may take descriptors out of any other process of its user (pidfd_getfd(2),
ptrace(2)), and a supervisor that runs as the workload's user runs code that the workload may write. A user namespace closes the
first (the kernel's ptrace check asks for capabilities in the target's namespace), read-only mounts in it the second.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from openshell_supervisor.confine.identity import Identity

# linux/capability.h: to map all users for a child, its parent needs CAP_SETUID and CAP_SETGID; CAP_SYS_ADMIN makes it the
# master of a namespace whose owner it is not.
MAPPING_CAPABILITIES = (1 << 6) | (1 << 7) | (1 << 21)


def can_map(effective: int) -> bool:
    """True when a process with these effective capabilities may write another process's user maps (user_namespaces(7))."""
    return effective & MAPPING_CAPABILITIES == MAPPING_CAPABILITIES


def write_identity_maps(pid: int) -> None:
    """Map every user and group of this namespace to itself in the namespace of `pid`. Raises OSError.

    Without CAP_SETFCAP the kernel refuses to map uid 0 (kernel/user_namespace.c, verify_root_map); then all others are mapped.
    """
    for kind in ("uid", "gid"):
        extents = [tuple(map(int, line.split())) for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
        target = Path(f"/proc/{pid}/{kind}_map")
        try:
            target.write_text(_lines((first, count) for first, _, count in extents))
        except PermissionError:
            target.write_text(_lines(_without_zero(first, count) for first, _, count in extents))


def _without_zero(first: int, count: int) -> tuple[int, int]:
    return (first, count) if first > 0 else (1, count - 1)


def _lines(extents: Iterable[tuple[int, int]]) -> str:
    return "\n".join(f"{first} {first} {count}" for first, count in extents if count > 0)


def user_namespace() -> int:
    """The inode of this process's user namespace."""
    return Path("/proc/self/ns/user").stat().st_ino


def traced_by_parents_only() -> bool:
    """True where Yama lets a process open another's memory only if it is its ancestor, whoever's they are (gVisor says so too;
    Documentation/admin-guide/LSM/Yama.rst, ptrace_scope 1 to 3)."""
    try:
        return int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text()) > 0
    except (OSError, ValueError):
        return False


def neighbours(uid: int, own: frozenset[int]) -> list[int]:
    """The processes of user `uid` that are not `own`: what a workload without a user namespace of its own could take from."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) not in own and entry.stat().st_uid == uid:
                found.append(int(entry.name))
        except OSError:
            continue  # it ended while we looked
    return found


@dataclass(frozen=True, slots=True)
class Code:
    """Code of ours that the workload's user could change: directories to make read-only, the directories on the way to them
    that it could rename away (outermost first), and links that it could point elsewhere."""

    directories: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    links: tuple[str, ...] = ()


# Kernel settings that uid 0 may write by its mode bits alone, without a capability: core_pattern, for one, names a program
# that the kernel runs outside every namespace (core(5)).
KERNEL_SETTINGS = ("/proc/sys", "/proc/sysrq-trigger", "/sys")


def out_of_reach(identity: Identity) -> Code:
    """What the workload must not be able to write: our code, and for uid 0 the kernel's settings."""
    code = writable_code(identity)
    settings = tuple(path for path in KERNEL_SETTINGS if identity.uid == 0 and Path(path).exists())
    return replace(code, directories=(*code.directories, *settings))


def writable_code(identity: Identity) -> Code:
    """What of the code that the supervisor runs lies in the hands of `identity`, by owner and mode bits."""
    package = Path(__file__).resolve().parent.parent
    named = {package, Path(sys.prefix), Path(sys.base_prefix), *(Path(entry) for entry in sys.path if entry)}
    named = {path.absolute() for path in named if path.is_dir()}
    directories = sorted({str(path.resolve()) for path in named if _may_change(path.resolve(), identity)})
    outermost = tuple(path for path in directories if not any(path.startswith(other + "/") for other in directories))
    ways = {one for path in outermost for one in Path(path).parents if one != one.parent}
    anchors = sorted(str(one) for one in ways if _may_rename(one, identity))
    links = {str(one) for path in named for one in (path, *path.parents) if one.is_symlink()}
    return Code(
        outermost, tuple(anchors), tuple(sorted(link for link in links if _may_write(Path(link).parent, identity)))
    )


def _may_change(path: Path, identity: Identity) -> bool:
    """May `identity` write in `path`, change a file right in it, or replace a directory on the way to it?"""
    return any(_may_write(one, identity) for one in (path, *path.parents, *_sample(path)))


def _may_write(path: Path, identity: Identity) -> bool:
    """May `identity` write this file or in this directory? The owner may always, because it can change the mode."""
    status = path.lstat()
    if status.st_uid == identity.uid:
        return True
    if stat.S_ISLNK(status.st_mode) or (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        return False
    groups = {identity.gid, *(identity.groups or (() if os.geteuid() == 0 else os.getgroups()))}
    return bool(status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and status.st_gid in groups))


def _may_rename(path: Path, identity: Identity) -> bool:
    """May `identity` rename or replace this entry? In a sticky directory its owner may (rename(2), EPERM)."""
    return _may_write(path.parent, identity) or path.lstat().st_uid == identity.uid


def _sample(path: Path) -> Iterable[Path]:
    """What lies directly in a code directory: a root-owned directory may hold files of another user."""
    try:
        return list(path.iterdir())
    except OSError:
        return []
