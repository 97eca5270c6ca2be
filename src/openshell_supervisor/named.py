"""Files and directories that the operator names: looked at before anything starts, and refused with a hint."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from openshell_supervisor.errors import SettingsError

MAX_FILE_BYTES = 16 * 1024 * 1024  # the policy loader's own limit is lower; a bundle of all public roots has 250 KiB
MAX_NAME_BYTES = 240  # NAME_MAX is 255 (linux/limits.h); a temporary name beside the file takes the rest


def refuse(code: str, message: str, hint: str) -> SettingsError:
    """The error for an unusable name."""
    return SettingsError(message, code=code, hint=hint)


def path(value: str | None) -> Path | None:
    """As it was given; None where nothing was."""
    return Path(value) if value else None


def existing_file(value: str | None, name: str) -> Path | None:
    """A file to be read: regular, readable and of a size that nobody writes by hand; never waits for a pipe's other end."""
    if not value:
        return None
    path = Path(value)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        os.close(descriptor)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a path"
        raise refuse(
            "unreadable_file", f"{name}: cannot read {value}: {why}", "name a file that this user can read"
        ) from None
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
        hint = f"name a regular file of at most {MAX_FILE_BYTES >> 20} MiB"
        raise refuse("unreadable_file", f"{name}: {value} is not a regular file, or too large", hint)
    return path


def pem(path: Path | None) -> Path | None:
    """A file of certificates. Raises `SettingsError` for one that holds none."""
    if path is not None and b"-----BEGIN CERTIFICATE-----" not in path.read_bytes():
        raise refuse(
            "invalid_file",
            f"--upstream-ca: {path} holds no PEM certificate",
            "convert it with `openssl x509 -outform PEM`",
        )
    return path


def directory(value: str | None, name: str) -> Path | None:
    """An existing directory. Raises `SettingsError`."""
    if value and not is_directory(Path(value)):
        raise refuse("unreadable_file", f"{name}: {value} is not a directory", "create it, or name another")
    return path(value)


def is_directory(path: Path) -> bool:
    """True for a directory, and a link to one."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def output(value: str | None, name: str) -> Path | None:
    """A file to be written later: its directory must exist and be writable now, so that nothing starts in vain."""
    if not value:
        return None
    path = Path(value)
    fits = len(os.fsencode(path.name)) <= MAX_NAME_BYTES and "\0" not in value
    if not fits or is_directory(path) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise refuse(
            "unwritable_file", f"{name}: cannot write {value}", "the directory must exist and be writable by this user"
        )
    return path
