"""The private namespaces that the container tests live in: a user and mounts that exist only there and end there."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import time

import pytest
import rootless

pytestmark = pytest.mark.root
GONE_TIMEOUT = 5.0


def alive(pid: int) -> bool:
    """True while the process runs; one that only waits for a lazy init to collect it does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_runs_in_the_namespaces_dies_with_them_and_nothing_outside_changed(open_tmp: pathlib.Path) -> None:
    """The user is real inside, unknown outside; after SIGKILL of the holder no process or mount stays."""
    if missing := rootless.missing():
        pytest.skip(missing)
    passwd, mounts = (pathlib.Path(path).read_text() for path in ("/etc/passwd", "/proc/self/mountinfo"))
    with rootless.RootlessHost(open_tmp / "cache") as host:
        inside = subprocess.run(host.command(["id", "-un"]), capture_output=True, text=True, timeout=GONE_TIMEOUT)
        assert inside.stdout.strip() == "oss-e2e"
        with subprocess.Popen(host.command(["sleep", "300"])) as sleeper:
            assert str(rootless.UID) not in pathlib.Path("/etc/passwd").read_text()
            os.kill(host.holder, signal.SIGKILL)
            sleeper.wait(GONE_TIMEOUT)
            deadline = time.monotonic() + GONE_TIMEOUT
            while alive(host.inside) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not alive(host.inside)
    assert pathlib.Path("/etc/passwd").read_text() == passwd
    assert pathlib.Path("/proc/self/mountinfo").read_text() == mounts
