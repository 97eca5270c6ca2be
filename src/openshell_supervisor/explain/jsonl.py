"""JSON lines from a file that may be anything: bounded, and every fault with its line number."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from openshell_supervisor.errors import SettingsError

MAX_LINE = 1 << 20
"""Bytes of one line. A policy has at most 256 KiB, an event some 10 KiB."""
MAX_FILE = 4 << 30
"""Bytes of a file. A sandbox that logs a hundred requests a second for a day writes half of it; it is read line by line."""
MAX_SHOWN = 80
"""Characters of somebody's text that an error repeats."""


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's object with its number, counted from 1; empty lines are left out.

    Raises `SettingsError` for a file that cannot be read, that is none, or is too large, and for a line that is no JSON object.
    """
    # O_NONBLOCK: a FIFO with no writer must be an error and not a hang.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        what = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise SettingsError(
            f"{path}: the file cannot be read: {what}",
            code="unreadable_file",
            hint="check the path and its permissions",
        ) from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise SettingsError(f"{path}: it is not a regular file", code="invalid_file", hint="name a file of JSON lines")
    with open(descriptor, "rb") as file:
        if found.st_size > MAX_FILE:
            size = f"{found.st_size >> 20} MiB, more than {MAX_FILE >> 20} MiB"
            raise SettingsError(f"{path}: the file has {size}", code="invalid_file", hint="split it")
        number = 0
        # One that grows while it is read (a sandbox is writing it) is read to where it ended at first.
        while file.tell() < found.st_size and (line := file.readline(MAX_LINE + 1)):
            number += 1
            if len(line) > MAX_LINE:
                fault(path, number, f"the line is longer than {MAX_LINE >> 10} KiB", "one object per line")
            if line.strip():
                yield number, _object(path, number, line)


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        fault(path, number, "the line is not valid UTF-8")
    except ValueError as error:
        fault(
            path, number, f"the line is not JSON: {error}", "one object per line; a last line may have been cut short"
        )
    except RecursionError:
        fault(path, number, "the line is nested too deeply")
    if not isinstance(value, dict):
        fault(path, number, "the line is not a JSON object", "one object per line")
    return value


def fault(path: Path, number: int, message: str, hint: str = "") -> NoReturn:
    """Refuse a line. Raises `SettingsError` with `file:line: message`."""
    raise SettingsError(f"{path}:{number}: {message}", code="invalid_file", hint=hint)


def shown(value: object) -> str:
    """A value of the file's for an error message: short and without control characters."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
