"""One sandbox tries to make the next one weaker: by using up what a boundary is made of."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import arena
import product
import pytest

import hosts

pytestmark = pytest.mark.root
# The kernel counts namespaces per user and per ancestor; a small limit stands for a patient attacker.
LIMIT = 4
HOARDER = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
won = 0
for _ in range(10):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, b"+" if libc.unshare(0x10000000 | 0x40000000) == 0 else b"-")
        time.sleep(40)
        os._exit(0)
    won += os.read(reading, 1) == b"+"
print("up", won, flush=True)
time.sleep(40)
"""


def limited(argv: list[str]) -> list[str]:
    """`argv` as the attacker's user in a user namespace that may hold only `LIMIT` network namespaces."""
    script = f'echo {LIMIT} > /proc/sys/user/max_net_namespaces && exec "$@"'
    return hosts.unprivileged(
        ["unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-c", script, "sh", *argv], uid=arena.UID
    )


@pytest.mark.parametrize("filtered", [False, True], ids=["bare", "filtered"])
@pytest.mark.parametrize(
    "options", [["--network-mode", "auto"], ["--network-mode", "isolated"], ["--require", "network"]], ids=" ".join
)
def test_a_used_up_limit_is_not_passed_over(open_tmp: pathlib.Path, options: list[str], filtered: bool) -> None:
    """A hoarder of namespaces gets none under the workload's filters. Without them it leaves none for the next sandbox of its
    user: `auto` says loudly that it only observes, `isolated` and `--require network` start nothing."""
    open_tmp.chmod(0o777)
    first, second = open_tmp / "first", open_tmp / "second"
    for place in (first, second):
        place.mkdir()
        place.chmod(0o777)
    filters = [] if filtered else ["--declare-external", "syscalls"]
    hoarding = [sys.executable, "-I", "-c", HOARDER]
    hoard = product.argv(first, product.DENY_ALL, hoarding, ["--network-mode", "isolated", *filters])
    follow = product.argv(second, product.DENY_ALL, ["echo", "STARTED"], options)
    script = f"""
import subprocess, sys
hoarder = subprocess.Popen({hoard!r}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
line = hoarder.stdout.readline()
done = subprocess.run({follow!r}, capture_output=True, text=True, stdin=subprocess.DEVNULL)
hoarder.terminate(); hoarder.wait()
print(line); print(done.stdout); print(done.stderr); sys.exit(done.returncode)
"""
    line = limited([sys.executable, "-c", script])
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd="/", stdin=subprocess.DEVNULL)
    word, won = done.stdout.split()[:2]
    assert word == "up"
    if filtered:
        assert int(won) == 0
        assert done.returncode == 0, done.stdout
        return
    assert 0 < int(won) < LIMIT, "the hoarder met no limit: the test shows nothing"
    if options[-1] == "auto":
        assert "CONFIG:DEGRADED [MED]" in done.stdout
        assert "network              degraded" in done.stdout
    else:
        assert "STARTED" not in done.stdout
        assert done.returncode == 1
