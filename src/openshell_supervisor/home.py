"""The workload's HOME and PATH under file rules: tools stop, or never start, over a home or a program that they may not open.

git ends at a ~/.gitconfig that it may not read, Go at a cache that it may not make; bash ends at the first program of the name
in PATH, though a later one may be run (Landlock answers EACCES at open and exec, while stat(2) and access(2) say all is well).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from openshell_supervisor.confine.baseline import FileRules, beneath
from openshell_supervisor.confine.identity import Identity

PREFIX = "openshell-home-"
SHARED = "/tmp"  # what a user without a home has for one; everybody's files lie there


def usable(home: str, rules: FileRules) -> bool:
    """True when `home` is a directory of its own that the rules let the workload read."""
    place = os.path.realpath(home)
    if not os.path.isdir(place) or place == os.path.realpath(SHARED):
        return False
    return within(place, rules)


def make(identity: Identity, rules: FileRules) -> Path | None:
    """A new empty directory of the workload's own, mode 0700; None where the rules make no directory for it writable, or it
    cannot be made."""
    if not _allowed(os.path.realpath(SHARED), map(os.path.realpath, rules.read_write)):
        return None
    try:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=SHARED))
        _lock(path)  # held until this process ends, by whatever means
        if identity.uid != os.geteuid():
            os.chown(path, identity.uid, identity.gid)
    except OSError:
        return None
    return path


def remove(path: Path, uid: int) -> None:
    """Remove it with all that the workload left in it, and the homes of that user whose supervisors were killed: nobody holds
    their lock. Follows no symbolic link; what cannot be removed stays. Blocks, for as long as a workload made it big."""
    shutil.rmtree(path, ignore_errors=True)
    for other in Path(SHARED).glob(f"{PREFIX}*"):
        try:
            if other.lstat().st_uid == uid:
                os.close(_lock(other))
                shutil.rmtree(other, ignore_errors=True)
        except OSError:
            continue  # its supervisor lives, or it is no directory


def _lock(path: Path) -> int:
    """The directory, locked for as long as the descriptor is open. Raises OSError where somebody else holds it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def within(place: str, rules: FileRules) -> bool:
    """True when a rule allows something on this real path."""
    return _allowed(place, _places(rules))


def search_path(path: str, rules: FileRules) -> str:
    """`path` with the directories that the rules do not open at its end. Not without them: "Permission denied" says more than
    "command not found"."""
    places = _places(rules)
    open_first = sorted(path.split(":"), key=lambda one: not _allowed(os.path.realpath(one or "."), places))
    return ":".join(open_first)


def _places(rules: FileRules) -> list[str]:
    return [os.path.realpath(rule) for rule in (*rules.read_only, *rules.read_write)]


def _allowed(place: str, rules: Iterable[str]) -> bool:
    return any(beneath(place, rule) for rule in rules)
