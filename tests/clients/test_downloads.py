"""Big transfers through the sandbox: every byte arrives and the supervisor's memory stays flat, inspected or relayed."""

from __future__ import annotations

import hashlib
import pathlib
import re
import shutil
import subprocess
import sys
import time

import content
import product
import pytest
import sandboxed

# What the supervisor may grow by while hundreds of MiB pass: buffers of one connection, and the allocator's slack.
GROWTH_KIB = 24 * 1024
SECONDS = 30.0

# curl's options, MiB. The size that the users download; less where h2 in Python carries every byte three times.
DOWNLOADS = {"inspected": ("--http1.1", 300), "inspected, h2": ("--http2", 40), "passed": ("--http1.1", 300)}

SCRIPT = """
cd {home}
curl -sS {url}/public/hello; touch warm; while [ ! -e go ]; do sleep 0.05; done
{transfer}
touch done; while [ ! -e end ]; do sleep 0.05; done
"""


@pytest.mark.parametrize("name", DOWNLOADS)
def test_big_download_in_flat_memory(name: str, site: sandboxed.Site, home: pathlib.Path) -> None:
    """The digest of 300 MiB is right, and the supervisor's peak is at most 24 MiB above what it had after a small answer."""
    option, blocks = DOWNLOADS[name]
    out = transfer(f"curl -sS {option} '{site.url}/public/big?{blocks}' | sha256sum", name, site, home)
    assert content.big_digest(blocks) in out


@pytest.mark.parametrize("option", ["--http1.1", pytest.param("--http2")])
def test_big_upload_in_flat_memory(option: str, site: sandboxed.Site, home: pathlib.Path) -> None:
    """The same upwards: 40 MiB arrive whole at the upstream."""
    size = 40 << 20
    out = transfer(f"head -c {size} /dev/zero | curl -sS {option} -T - {site.url}/up/x", "inspected", site, home)
    assert f"{size} {hashlib.sha256(bytes(size)).hexdigest()}" in out


def test_client_that_stops_reading_is_not_read_for(site: sandboxed.Site, home: pathlib.Path) -> None:
    """An HTTP/2 client that takes 64 KiB of 100 MiB and no more does not make the supervisor hold the rest."""
    command = f"{sys.executable} programs/h2_stalled.py {sandboxed.HOST}:{sandboxed.PORT} /public/big?100 1.5"
    assert transfer(command, "inspected", site, home).endswith("\n65535\n")


def transfer(command: str, mode: str, site: sandboxed.Site, home: pathlib.Path) -> str:
    """Run one transfer in a sandbox, hold the supervisor's memory to its bound, and answer what the workload printed."""
    lacking = sandboxed.missing(("curl",))
    if lacking:
        pytest.skip(lacking)
    text = sandboxed.policy(("GET /public/**", "PUT /up/**"), inspected=mode.startswith("inspected"))
    script = SCRIPT.format(home=home, url=site.url, transfer=command)
    shutil.copytree(sandboxed.PROGRAMS, home / "programs")
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
    assert out, err.decode()
    assert peak - before < GROWTH_KIB, f"{before} KiB before, {peak} KiB at most"
    return out.decode()


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
