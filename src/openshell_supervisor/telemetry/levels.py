"""What the operator wants to read, in the words of `--log-level` and of RUST_LOG; and the time stamp of every line."""

from __future__ import annotations

import time
from enum import IntEnum

from openshell_supervisor.errors import SettingsError

DEFAULT = "info"


class Level(IntEnum):
    """Levels with the numbers that Python's logging gives them; `trace` is ours."""

    TRACE = 5
    DEBUG = 10
    INFO = 20
    WARN = 30
    ERROR = 40


_NAMES = {
    "trace": Level.TRACE,
    "debug": Level.DEBUG,
    "info": Level.INFO,
    "warn": Level.WARN,
    "warning": Level.WARN,
    "error": Level.ERROR,
    "off": Level.ERROR,  # fatal errors are shown in any case
}


def parse_level(value: str) -> Level:
    """The default level of `value`: a level name, or a RUST_LOG filter such as `openshell=debug,info`.

    Of a filter, directives for single targets are skipped, as is what is not understood; one without a default level
    gives `info`. A single word that is no level raises `SettingsError`.
    """
    words = [word.strip().lower() for word in value.split(",")]
    known = [_NAMES[word] for word in words if word in _NAMES]
    if known:
        return known[-1]
    if len(words) == 1 and "=" not in words[0] and words[0]:
        raise SettingsError(
            f"log level {value!r} is not known",
            code="log_level_unknown",
            hint="use one of error, warn, info, debug, trace",
        )
    return _NAMES[DEFAULT]


def timestamp() -> str:
    """Now, UTC, as `2026-05-04T00:27:18.331Z`."""
    now = time.time_ns()
    seconds, rest = divmod(now, 1_000_000_000)
    return f"{_to_the_second(seconds)}.{rest // 1_000_000:03d}Z"


def _to_the_second(seconds: int) -> str:
    # strftime costs more than the rest of a line; within one second it gives the same text.
    global _last
    last = _last
    if last[0] != seconds:
        _last = last = (seconds, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)))
    return last[1]


_last: tuple[int, str] = (-1, "")
