"""The log for everything that is not an event: one line each, `<time> <LEVEL> <target>: <message> key=value …`.

Rooms write `structlog.get_logger("openshell_supervisor.boundary").info("veth pair made", name=name)`. Libraries that
log through the standard library come out in the same form, from WARN up and with query strings cut, because their
texts are not ours to trust. No line ever holds a second one.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from typing import Any

from openshell_supervisor.telemetry.levels import Level, parse_level, timestamp
from openshell_supervisor.telemetry.line_writer import STDERR, LineWriter
from openshell_supervisor.telemetry.ocsf import clean
from openshell_supervisor.telemetry.shorthand import one_line
from openshell_supervisor.telemetry.wording import without_query

TARGET = "openshell_supervisor"
_BARE = re.compile(r"[^\s\"=\\]+")
_LABELS = {"exception": "ERROR", "critical": "ERROR", "error": "ERROR", "warning": "WARN", "warn": "WARN"}
_wanted: list[tuple[Level, LineWriter]] = [(Level.INFO, STDERR)]  # what was last asked for; one entry
_LEVELS = {"debug": Level.DEBUG, "info": Level.INFO, "warning": Level.WARN, "error": Level.ERROR}
_STDLIB_LABELS = ((logging.ERROR, "ERROR"), (logging.WARNING, "WARN"), (logging.INFO, "INFO"))


def configure_plain_logging(level: str = "info", writer: LineWriter = STDERR) -> None:
    """Send structlog and the standard library's logging to standard error, from `level` up. May be called again.

    `level` as in `levels.parse_level`; an unknown word raises `SettingsError`.
    """
    chosen = parse_level(level)
    _wanted[:] = [(chosen, writer)]
    if "structlog" in sys.modules:
        _configure_structlog()
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _LibraryHandler)]:
        root.removeHandler(handler)
    root.addHandler(_LibraryHandler(writer, max(chosen, Level.WARN)))


def _configure_structlog() -> None:
    import structlog

    chosen, writer = _wanted[-1]
    # structlog has no level below debug: trace shows what debug shows.
    minimum = max(int(chosen), logging.DEBUG)
    structlog.configure(
        processors=[_render],
        wrapper_class=structlog.make_filtering_bound_logger(minimum),
        logger_factory=lambda *target: _PlainLogger(writer, *target),
        cache_logger_on_first_use=False,  # so that a second call holds for loggers that exist already
    )


def _say_nothing(message: str, **fields: object) -> None:
    """What a logger answers below the level that was asked for."""


class LateLogger:
    """A structlog logger that is made when it first has something to say: importing structlog delays the workload by 8 ms."""

    def __init__(self, target: str) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        if _LEVELS.get(name, Level.ERROR) < _wanted[-1][0]:
            return _say_nothing
        if "structlog" not in sys.modules:
            _configure_structlog()
        import structlog

        return getattr(structlog.get_logger(self._target), name)


def plain_line(level: str, target: str, message: str, fields: Mapping[str, object]) -> str:
    """One log line without newline; a value with blanks, quotes or `=` is written as a JSON string. What looks like a
    query string is cut: error texts quote URLs, and URLs hold tokens."""
    shown = "".join(f" {key}={_value(value)}" for key, value in fields.items())
    text = without_query(f"{target}: {message}{shown}")
    return one_line(clean(f"{timestamp()} {level} {text}"))


def _value(value: object) -> str:
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(clean(text), ensure_ascii=False)


class _PlainLogger:
    """What structlog calls with the finished line; every level goes the same way."""

    def __init__(self, writer: LineWriter, target: str = TARGET) -> None:
        self.target = target
        self._writer = writer

    def msg(self, line: str) -> None:
        self._writer.write(line)

    debug = info = warning = warn = error = critical = exception = fatal = log = msg


def _render(logger: _PlainLogger, method: str, event: MutableMapping[str, Any]) -> str:
    message = str(event.pop("event", ""))
    failure = event.pop("exc_info", None)
    fields = dict(event)
    if failure:
        fields["exception"] = _failure(failure)
    return plain_line(_LABELS.get(method, method.upper()), logger.target, message, fields)


def _failure(failure: object) -> str:
    """An exception, or True for the one being handled, as its traceback with ` | ` between the lines."""
    if isinstance(failure, BaseException):
        lines = traceback.format_exception(failure)
    elif isinstance(failure, tuple):
        lines = traceback.format_exception(*failure)
    else:
        lines = [traceback.format_exc()]
    return " | ".join("".join(lines).strip().splitlines())


class _LibraryHandler(logging.Handler):
    """Log records of libraries, in the same form."""

    def __init__(self, writer: LineWriter, level: int) -> None:
        super().__init__(level)
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # a format string that does not fit its arguments
            message = str(record.msg)
        fields = {"exception": _failure(record.exc_info)} if record.exc_info else {}
        label = next((label for least, label in _STDLIB_LABELS if record.levelno >= least), "DEBUG")
        self._writer.write(plain_line(label, record.name, message, fields))
