"""A network namespace of its own for the supervisor's side of each test, so that the machine's real one stays
untouched, and small programs that try things from inside the workload's.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

from openshell_supervisor.boundary.boundary import Boundary
from openshell_supervisor.telemetry.events import Context, Telemetry

# What a program inside may need: a scratch function that reports an errno by name and how long it took.
PRELUDE = """
import errno, json, os, socket, struct, sys, time
def attempt(work):
    start = time.monotonic()
    try:
        answer = work()
    except OSError as error:
        answer = errno.errorcode.get(error.errno, repr(error))
    return [answer, time.monotonic() - start]
def tcp(host, port, family=socket.AF_INET, timeout=5):
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect((host, port))
        return "connected"
def send(host, port, family=socket.AF_INET, kind=socket.SOCK_DGRAM, protocol=0):
    with socket.socket(family, kind, protocol) as sock:
        sock.sendto(b"x" * 16, (host, port))
        return "sent"
"""


@dataclass
class Recorder:
    """A telemetry sink that keeps what it gets."""

    events: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def write(self, event: dict[str, Any], line: str) -> None:
        self.events.append(event)
        self.lines.append(line)

    def close(self) -> None:
        pass

    async def wait_for(self, text: str, *, within: float = 3.0) -> dict[str, Any]:
        """The first event whose line contains `text`; fails when none comes in time."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            for event, line in zip(self.events, self.lines, strict=True):
                if text in line:
                    return event
            await asyncio.sleep(0.01)
        raise AssertionError(f"no event with {text!r} among {self.lines}")


@functools.cache
def _schema() -> ModuleType:
    path = pathlib.Path(__file__).parent.parent / "telemetry" / "schema.py"
    spec = importlib.util.spec_from_file_location("ocsf_schema_for_boundary", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Everything that was reported in this test; at its end each event must be valid OCSF."""
    kept = Recorder()
    yield kept
    for event in kept.events:
        _schema().assert_valid(event)


@pytest.fixture
def telemetry(recorder: Recorder) -> Telemetry:
    """A real `Telemetry` that writes to `recorder`."""
    return Telemetry(Context(sandbox_id="test", hostname="test"), [recorder])


def sh(command: str) -> str:
    """Run a shell command in the calling thread's namespaces; its output, and a failure of the test if it fails."""
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.fixture
def shell() -> Callable[[str], str]:
    """`shell(command)`: run it here, get its output."""
    return sh


@pytest.fixture
def outer_namespace() -> Iterator[None]:
    """Run the test's thread in a fresh network namespace with `lo` up; the machine's own comes back afterwards.

    The test's thread is the process's first one, so subprocesses and the event loop are in there as well.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.unshare(os.CLONE_NEWNET)
        try:
            sh("ip link set lo up")
            yield
        finally:
            os.setns(home, os.CLONE_NEWNET)
    finally:
        os.close(home)


@pytest.fixture
def inside() -> Callable[..., Any]:
    """`inside(boundary, program, uid=…)`: run a Python program in the boundary's namespace; what it prints, as JSON.

    The program enters by setns itself, as the launcher does, then drops to `uid`.
    """

    def run(boundary: Boundary, program: str, *, uid: int | None = None, timeout: float = 20.0) -> Any:
        fd = boundary.netns_fd
        assert fd is not None
        drop = f"os.setgroups([]); os.setresgid({uid},{uid},{uid}); os.setresuid({uid},{uid},{uid})\n" if uid else ""
        enter = f"import os\nos.setns({fd}, os.CLONE_NEWNET)\nos.close({fd})\n"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", enter + drop + PRELUDE + textwrap.dedent(program)],
            pass_fds=[fd],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def links() -> Callable[[], list[str]]:
    """`links()`: the names of the network links of this namespace, sorted."""
    return lambda: sorted(entry["ifname"] for entry in json.loads(sh("ip -json link")))


@pytest.fixture
def descriptors() -> Callable[[], list[str]]:
    """`descriptors()`: what this process's open descriptors lead to, without those of the listing itself."""

    def read() -> list[str]:
        found = []
        for entry in pathlib.Path("/proc/self/fd").iterdir():
            try:
                found.append(f"{entry.name} -> {os.readlink(entry)}")
            except FileNotFoundError:
                continue
        return sorted(found)

    return read
