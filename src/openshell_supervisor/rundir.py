"""The one writable directory of a run: certificates for the workload, removed at the end.

Every run gets a fresh subdirectory with a random name, made by mkdtemp(3), so a directory prepared by somebody else is never
used and nothing in it is followed. The first candidate that this user may safely write is taken. A lock file tells a living
run's directory from one that a killed supervisor left; those are swept at the next start.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from openshell_supervisor.errors import SettingsError

PREFIX = "sandbox-"
LOCK = ".lock"
# A directory without a lock file may be one that is being made right now; after this long nobody is making it any more.
YOUNG_SECONDS = 60.0


def create(chosen: Path | None, environment: Mapping[str, str]) -> Path:
    """Make the run's own directory, mode 0755 (the workload reads the certificates in it as another user).

    `chosen` is the operator's; without it /run/openshell, $XDG_RUNTIME_DIR/openshell and the temporary directory are tried in
    this order. Raises `SettingsError` when none can be used.
    """
    candidates = [chosen] if chosen is not None else list(_defaults(environment))
    refusals = []
    for base in candidates:
        try:
            if base.name == "openshell" or chosen is not None:
                base.mkdir(mode=0o755, exist_ok=True)
            _check(base)
            _sweep(base)
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            # Held until this process ends, by whatever means: the descriptor is meant to stay open.
            fcntl.flock(os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), fcntl.LOCK_EX)
            path.chmod(0o755)
        except OSError as error:
            refusals.append(f"{base}: {error.strerror or error}")
            continue
        return path
    raise SettingsError(
        "no directory can be written for this run: " + "; ".join(refusals),
        code="no_run_directory",
        hint="mount a tmpfs (podman: --tmpfs /run/openshell) or name a directory with --run-dir",
    )


def _defaults(environment: Mapping[str, str]) -> tuple[Path, ...]:
    runtime = environment.get("XDG_RUNTIME_DIR")
    named = (Path(runtime) / "openshell",) if runtime and os.geteuid() != 0 else ()
    return (Path("/run/openshell"), *named, Path(tempfile.gettempdir()))


def _check(base: Path) -> None:
    """Refuse a directory in which another user could swap ours: not a directory, or writable by others without sticky bit."""
    status = base.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(0, "is not a directory, or a symbolic link")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
        raise OSError(0, "others can rename what is in it (mode needs the sticky bit)")


def _sweep(base: Path) -> None:
    """Remove the directories of runs that are over: ours by owner and name, and their lock is free."""
    for path in base.glob(f"{PREFIX}*"):
        try:
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            if time.time() - status.st_mtime > YOUNG_SECONDS:
                remove(path)
            continue
        except OSError:
            continue  # not one of ours after all
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
        except BlockingIOError:
            pass  # its supervisor lives
        finally:
            os.close(lock)


def remove(path: Path) -> None:
    """Remove the directory and the files in it; it holds no subdirectories."""
    try:
        for entry in os.scandir(path):
            os.unlink(entry.path)
        path.rmdir()
    except OSError:
        pass  # removed already, or on a file system that went away: nothing in it outlives its certificates' use
