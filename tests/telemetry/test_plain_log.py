"""The log for what is not an event, as a person reads it on standard error."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openshell_supervisor.errors import SettingsError
from openshell_supervisor.telemetry.plain_log import configure_plain_logging, plain_line
from telemetry.hostile import hostile_text

PRELUDE = """
import logging, structlog
from openshell_supervisor.telemetry.sinks import configure_plain_logging
"""


def run(code: str, level: str = "info") -> list[str]:
    """What `code` logs in a process of its own, without the time stamps (checked for their form)."""
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}configure_plain_logging({level!r})\n{code}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == "", "nothing goes to standard output: that is the workload's"
    lines = done.stderr.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", line) for line in lines), done.stderr
    return [line[25:] for line in lines]


def test_a_line_has_level_target_message_and_fields() -> None:
    """`<time> <LEVEL> <target>: <message> key=value`, values with blanks quoted, WARN spelt as upstream does."""
    code = 'log = structlog.get_logger("openshell_supervisor.boundary")\n'
    code += (
        'log.info("veth made", name="veth-h-1", mtu=1500)\nlog.warning("odd", why="two words", eq="a=b", empty="")\n'
    )
    code += 'structlog.get_logger().error("no target")'
    assert run(code) == [
        "INFO openshell_supervisor.boundary: veth made name=veth-h-1 mtu=1500",
        'WARN openshell_supervisor.boundary: odd why="two words" eq="a=b" empty=""',
        "ERROR openshell_supervisor: no target",
    ]


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("error", ["error"]),
        ("warn", ["warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("openshell=debug,info", ["info", "warning", "error"]),
        ("debug", ["debug", "info", "warning", "error"]),
        ("trace", ["debug", "info", "warning", "error"]),
    ],
)
def test_levels(level: str, shown: list[str]) -> None:
    """Nothing below the chosen level is shown."""
    code = "for name in ('debug', 'info', 'warning', 'error'): getattr(structlog.get_logger('t'), name)(name)"
    assert [line.split()[-1] for line in run(code, level)] == shown


def test_a_second_call_changes_the_level_of_loggers_that_exist() -> None:
    """Settings come after the first log line; the loggers made before follow, and nothing is said twice."""
    code = "log = structlog.get_logger('t'); log.info('one'); configure_plain_logging('error'); log.info('two')\n"
    code += "log.error('three'); logging.getLogger('lib').warning('four'); logging.getLogger('lib').error('five')"
    assert [line.split()[-1] for line in run(code)] == ["one", "three", "five"]


def test_an_exception_is_one_line() -> None:
    """A traceback is kept, on the line it belongs to."""
    code = "try: 1 / 0\nexcept ZeroDivisionError: structlog.get_logger('t').exception('failed')\n"
    code += "try: 1 / 0\nexcept ZeroDivisionError as e: structlog.get_logger('t').error('failed', exc_info=e)"
    lines = run(code)
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("ERROR t: failed exception=")
        assert "ZeroDivisionError: division by zero" in line


def test_libraries_speak_in_the_same_form_from_warn_up() -> None:
    """Records of the standard library: WARN and above whatever our level, queries cut, bad format strings survived."""
    code = """
log = logging.getLogger("asyncio")
log.setLevel(logging.DEBUG)
log.info("not shown")
log.warning("slow %s", "GET http://h/a?token=hunter2 now")
log.error("bad %d", "x")
log.warning("two\\nlines")
"""
    assert run(code, "debug") == [
        "WARN asyncio: slow GET http://h/a?[redacted] now",
        "ERROR asyncio: bad %d",
        "WARN asyncio: two lines",
    ]


def test_an_unknown_level_is_refused() -> None:
    """A typing error in --log-level is an error of the settings, not a silent default."""
    with pytest.raises(SettingsError):
        configure_plain_logging("verbose")


@given(hostile_text(), hostile_text())
def test_no_text_forges_a_line(message: str, value: str) -> None:
    """Whatever a message, a key, a target or a value holds, the line stays one line of valid UTF-8."""
    line = plain_line("INFO", message, message, {message: value, "k": value})
    assert len((line + "x").splitlines()) == 1
    line.encode()


@given(st.text("abc/= &", min_size=1))
def test_no_query_string_is_logged(rest: str) -> None:
    """A URL in an error text loses its query, in messages and in values."""
    line = plain_line("INFO", "t", f"GET http://h/a?secret{rest}", {"url": f"http://h/a?secret{rest}"})
    assert "secret" not in line


def test_importing_the_sinks_is_cheap() -> None:
    """structlog and the JSON encoder are loaded when they are used, not when the room is."""
    code = "import sys, openshell_supervisor.telemetry.sinks; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30, env=dict(os.environ)
    )
    assert not {"structlog", "msgspec", "asyncio"} & set(loaded.stdout.split())
