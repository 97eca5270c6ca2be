"""Where events go: standard error for people, a JSONL file for machines, memory for readers inside this process.

A sink has no opinion on an event but one: the console shows nothing below its level, except that Medium and above
reach it at any level, since a lost control that nobody sees is the fault this project exists to mend. No sink raises
for trouble of its own: an agent must not be able to end its supervisor by filling a disk.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import stat
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openshell_supervisor.errors import SettingsError
from openshell_supervisor.telemetry import ocsf
from openshell_supervisor.telemetry.levels import Level, parse_level, timestamp
from openshell_supervisor.telemetry.line_writer import STDERR, LineWriter
from openshell_supervisor.telemetry.plain_log import configure_plain_logging

__all__ = ["ConsoleSink", "JsonlSink", "MemorySink", "configure_plain_logging", "encode"]

type Event = dict[str, Any]

# Events kept in memory for readers inside the process: a page of denials is at most 100.
MEMORY_EVENTS = 1024
# UTF-8 of characters that end a line or start a terminal sequence for some readers, though JSON allows them raw:
# DEL, C1 controls, line and paragraph separator.
_RAW_CONTROLS = re.compile(b"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9]")


class ConsoleSink:
    """One line per event on standard error: `<UTC time>Z OCSF <shorthand>`."""

    def __init__(self, level: str = "info", writer: LineWriter = STDERR) -> None:
        """`level` is error, warn, info, debug, trace or a RUST_LOG filter; an unknown word raises `SettingsError`."""
        self._shows_all = parse_level(level) <= Level.INFO
        self._writer = writer

    def write(self, event: Event, line: str) -> None:
        if self._shows_all or event["severity_id"] >= ocsf.Severity.MEDIUM:
            self._writer.write(f"{timestamp()} OCSF {line}")

    def close(self) -> None:
        self._writer.close()


class JsonlSink:
    """One JSON object per line, keys sorted, appended to a file that only we may read.

    An event is written at once, in one write(2) on a descriptor in append mode, so nothing is buffered here and two
    supervisors may share a file. A failing write (a full disk) is counted in `lost` and reported once on standard
    error.
    """

    def __init__(self, path: Path | str, *, report: Callable[[str], None] = STDERR.write) -> None:
        """Open or create `path` (mode 0600). Raises `SettingsError` when it cannot be opened, or is a symbolic link or
        anything but a regular file: who may plant a link must not choose what the supervisor appends to."""
        self.path = Path(path)
        self.lost = 0
        self._report = report
        self._encode = _encoder()
        self._descriptor = _open_regular(self.path)
        self._torn = _lacks_newline(self._descriptor)

    def write(self, event: Event, line: str) -> None:
        if self._descriptor < 0:
            self.lost += 1
            return
        data = self._encode(event) + b"\n"
        if self._torn:
            data = b"\n" + data  # an earlier line broke off; do not let this one be read as its end
        try:
            _write_all(self._descriptor, data)
        except OSError as error:
            self._torn = _lacks_newline(self._descriptor)
            self._lose(error)
        else:
            self._torn = False

    def close(self) -> None:
        """Close the file; says how many events were lost, if any were. Events after that count as lost."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        with contextlib.suppress(OSError):  # EIO of a network file system; there is nothing left to save
            os.close(descriptor)
        if self.lost:
            self._report(f"openshell: {self.lost} OCSF events could not be written to {self.path}")

    def _lose(self, error: OSError) -> None:
        self.lost += 1
        if self.lost == 1:
            self._report(f"openshell: OCSF events are being lost: {self.path}: {error.strerror}")


class MemorySink:
    """The newest events, for tests and for readers inside the process. `dropped` counts those that no longer fit."""

    def __init__(self, capacity: int = MEMORY_EVENTS) -> None:
        self._kept: deque[tuple[Event, str]] = deque(maxlen=capacity)
        self.dropped = 0

    @property
    def events(self) -> list[Event]:
        """The events, oldest first."""
        return [event for event, _ in self._kept]

    @property
    def lines(self) -> list[str]:
        """Their one-line forms, without time."""
        return [line for _, line in self._kept]

    def clear(self) -> None:
        """Forget all; `dropped` starts at zero again."""
        self._kept.clear()
        self.dropped = 0

    def write(self, event: Event, line: str) -> None:
        if len(self._kept) == self._kept.maxlen:
            self.dropped += 1
        self._kept.append((event, line))

    def close(self) -> None:
        """Nothing to do: what was collected stays readable."""


def encode(event: Event) -> bytes:
    """`event` as JSON without newline: keys sorted, no blanks, non-ASCII as UTF-8 except what some readers take for
    the end of a line or a terminal's control sequence, which is escaped. Never raises for an odd value: that becomes
    its text."""
    return _encoder()(event)


@functools.cache
def _encoder() -> Callable[[Event], bytes]:
    # Imported here: only a supervisor that writes a file needs it, and it costs the start ten milliseconds.
    import msgspec

    fast = msgspec.json.Encoder(order="sorted").encode

    def encoded(event: Event) -> bytes:
        try:
            data = fast(event)
        except (TypeError, ValueError, OverflowError):  # UnicodeEncodeError is a ValueError: a lone surrogate
            text = json.dumps(ocsf.plain(event), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
            data = text.encode("utf-8", "replace")
        if _RAW_CONTROLS.search(data):
            return _RAW_CONTROLS.sub(lambda found: b"\\u%04x" % ord(found[0].decode()), data)
        return data

    return encoded


def _open_regular(path: Path) -> int:
    # O_NONBLOCK and O_NOCTTY are for what is refused below: opening a serial line may wait for its carrier, opening a
    # terminal may make it ours. They mean nothing for the regular file that is accepted.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        if path.is_symlink():
            raise _unusable(path, "is a symbolic link", "name the file itself") from error
        raise _unusable(path, f"cannot be opened: {error.strerror}", "name a file in a writable directory") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _unusable(path, "is not a regular file", "name a file that is new or was written by a supervisor")
    return descriptor


def _unusable(path: Path, what: str, hint: str) -> SettingsError:
    return SettingsError(f"OCSF file {path} {what}", code="ocsf_file_unusable", hint=hint)


def _lacks_newline(descriptor: int) -> bool:
    try:
        size = os.fstat(descriptor).st_size
        return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
    except OSError:
        return True  # unknown: an empty line too many is harmless, a joined one is not


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
