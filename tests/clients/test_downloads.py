"""300 MB through the sandbox: every byte arrives and the supervisor's memory stays flat, inspected or relayed in the kernel."""

from __future__ import annotations

import pathlib
import re
import subprocess
import time

import content
import product
import pytest
import sandboxed

# What the supervisor may grow by while 300 MB pass: buffers of one connection, and the allocator's slack.
GROWTH_KIB = 24 * 1024
SECONDS = 30.0

SCRIPT = """
cd {home}
curl -sS {url}/public/hello; touch warm; while [ ! -e go ]; do sleep 0.05; done
curl -sS {option} {url}/public/big | sha256sum
touch done; while [ ! -e end ]; do sleep 0.05; done
"""


@pytest.mark.parametrize("option", ["--http1.1"])
@pytest.mark.parametrize("mode", ["inspected", "passed"])
def test_big_download_in_flat_memory(mode: str, option: str, site: sandboxed.Site, home: pathlib.Path) -> None:
    """The digest of 300 MB is right, and the supervisor's peak is at most 24 MiB above what it had after a small answer."""
    lacking = sandboxed.missing(("curl",))
    if lacking:
        pytest.skip(lacking)
    text = sandboxed.policy(("GET /public/**",), inspected=mode == "inspected")
    script = SCRIPT.format(home=home, url=site.url, option=option)
    (home / "run").mkdir()
    line = sandboxed.bare(product.argv(home / "run", text, ["sh", "-c", script], site.options()))
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        try:
            wait_for(home / "warm")
            before = memory_kib(running.pid, "VmRSS")
            (home / "go").touch()
            wait_for(home / "done")
            peak = memory_kib(running.pid, "VmHWM")
            (home / "end").touch()
            out, err = running.communicate(timeout=SECONDS)
        finally:
            running.kill()
    assert content.big_digest() in out.decode(), err.decode()
    assert peak - before < GROWTH_KIB, f"{before} KiB before, {peak} KiB at most"


def wait_for(path: pathlib.Path) -> None:
    """Until the workload or the test has made this file."""
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not come"
        time.sleep(0.02)


def memory_kib(pid: int, what: str) -> int:
    """A line of /proc/PID/status (proc(5)), in KiB."""
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"^{what}:\s+(\d+) kB", text, re.MULTILINE)[1])  # type: ignore[index]
