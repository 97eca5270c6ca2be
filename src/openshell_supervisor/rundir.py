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
from collections.abc import Mapping
from pathlib import Path

from openshell_supervisor.errors import SettingsError

PREFIX = "openshell-run-"
LOCK = ".openshell-lock"
OVERFLOW_UID = 65534  # kernel/sys.c: how a user without a mapping is shown


def create(chosen: Path | None, environment: Mapping[str, str]) -> Path:
    """Make the run's own directory, mode 0755 (the workload reads the certificates in it as another user).

    `chosen` is the operator's; without it /run/openshell, $XDG_RUNTIME_DIR/openshell and the temporary directory are tried in
    this order. Raises `SettingsError` when none can be used.
    """
    candidates = [chosen] if chosen is not None else list(_defaults(environment))
    refusals = []
    for base in candidates:
        path = None
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
            if path is not None:
                remove(path)
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
    always = (Path("/run/openshell"), *named)
    try:
        return (*always, Path(tempfile.gettempdir()))
    except FileNotFoundError:  # no directory for temporary files can be written
        return always


def _check(base: Path) -> None:
    """Refuse a directory in which another user could swap ours, here or at any directory above it.

    Each must belong to root or to us, and be writable by others only with the sticky bit (path_resolution(7)).
    """
    if not stat.S_ISDIR(base.lstat().st_mode):
        raise OSError(0, "is not a directory, or a symbolic link")
    trusted = {0, os.geteuid()} if _root_is_mapped() else {OVERFLOW_UID, os.geteuid()}
    for one in (base.resolve(), *base.resolve().parents):
        status = one.stat()
        if status.st_uid not in trusted:
            raise OSError(0, f"{one} belongs to user {status.st_uid}, who could replace what is in it")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
            raise OSError(0, f"others can rename what is in {one} (its mode needs the sticky bit)")


def _root_is_mapped() -> bool:
    """False inside a user namespace that does not know root: its files then show the overflow user as their owner."""
    return any(line.split()[0] == "0" for line in Path("/proc/self/uid_map").read_text().splitlines())


def _sweep(base: Path) -> None:
    """Remove the directories of runs that are over: ours by owner, name and lock file, and the lock is free."""
    for path in base.glob(f"{PREFIX}*"):
        try:
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # no lock file: not one of ours, or one that is being made right now
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
        except BlockingIOError:
            pass  # its supervisor lives
        finally:
            os.close(lock)


def remove(path: Path) -> None:
    """Remove the directory and the files in it; it holds no subdirectories. Never follows a symbolic link."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # removed already, or replaced by something that is not ours
    try:
        for name in os.listdir(directory):
            os.unlink(name, dir_fd=directory)
        path.rmdir()
    except OSError:
        pass  # a file system that went away: nothing in it outlives its use
    finally:
        os.close(directory)
