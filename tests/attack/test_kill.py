"""Killing and stopping what holds the sandbox: a workload of the supervisor's own user may, and gains nothing by it."""

from __future__ import annotations

import os
import pathlib
import random
import subprocess
import sys
import time

import arena
import pytest

pytestmark = pytest.mark.root
# Tries to get out every 50 ms for as long as it lives, in three processes of which two left the session; `{extra}` first.
FUGITIVE = """
import ctypes, os, pathlib, signal, socket, sys, time
port, log, extra = int(sys.argv[1]), open(sys.argv[2], "a"), sys.argv[3]
supervisor = os.getppid()
def cmdline(pid):
    try: return open(f"/proc/{{pid}}/cmdline").read()
    except OSError: return ""
guards = [int(p) for p in os.listdir("/proc") if p.isdigit() and "guard.py" in cmdline(p)
          and open(f"/proc/{{p}}/stat").read().rpartition(") ")[2].split()[1] == str(supervisor)]
for g in guards if extra == "both" else ():
    log.write(f"keeper {g}\\n")
log.flush()
def live(kind):
    log.write(f"{{kind}} {{os.getpid()}}\\n"); log.flush()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        for address in (("203.0.113.7", port), ("127.0.0.1", port)):
            try:
                s = socket.create_connection(address, 0.3)
                s.sendall(b"token of fugitive")
                log.write("OUT\\n"); log.flush()
            except OSError:
                pass
        time.sleep(0.05)
for kind in ("daemon", "nested"):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            if kind == "nested":
                ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)
            live(kind)
        os._exit(0)
time.sleep(0.4)
print("up", flush=True)
def send(pid, number):
    try: os.kill(pid, number); return "sent"
    except OSError as error: return str(error.errno)
if extra == "supervisor": print(send(supervisor, signal.SIGKILL), flush=True)
if extra == "guard": print([send(g, signal.SIGKILL) for g in guards], flush=True)
if extra == "both":
    for g in guards: send(g, signal.SIGSTOP)
    send(supervisor, signal.SIGKILL)
live("first")
""".replace("{{", "{").replace("}}", "}")


def fugitives(log: pathlib.Path) -> list[tuple[str, int]]:
    """What of the workload still lives (zombies do not), by kind."""
    alive = []
    for line in log.read_text().splitlines():
        kind, _, pid = line.partition(" ")
        if not pid:
            continue
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            alive.append((kind, int(pid)))
    return alive


def started(rung: str, place: pathlib.Path, extra: str) -> subprocess.Popen[str]:
    """A sandbox with fugitives in it, up."""
    (place / "fugitive.py").write_text(FUGITIVE)
    (place / "log").touch()
    (place / "log").chmod(0o666)
    command = [sys.executable, "-I", str(place / "fugitive.py"), "9", str(place / "log"), extra]
    process = arena.start(rung, place, command)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n", process.communicate(timeout=20)
    return process


def settle(place: pathlib.Path, kinds: set[str]) -> list[tuple[str, int]]:
    """Wait up to 3 s until nothing of these kinds lives; answers what does, and ends it for good."""
    end = time.monotonic() + 3
    while time.monotonic() < end:
        left = [found for found in fugitives(place / "log") if found[0] in kinds]
        if not left:
            break
        time.sleep(0.05)
    for _, pid in fugitives(place / "log"):
        os.kill(pid, 9)
    return left


def guard_of(supervisor: int) -> int:
    """The pid of the guard."""
    for child in pathlib.Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        if "guard.py" in pathlib.Path(f"/proc/{child}/cmdline").read_text():
            return int(child)
    raise AssertionError("no guard")


@pytest.fixture
def place(open_tmp: pathlib.Path) -> pathlib.Path:
    """A directory every user can use."""
    open_tmp.chmod(0o777)
    return open_tmp


@pytest.mark.parametrize("rung", ["veth", "userns, own user"])
def test_sigkill_of_the_supervisor_leaves_no_process(rung: str, place: pathlib.Path) -> None:
    """The guard ends what left the session, too."""
    process = started(rung, place, "-")
    process.kill()
    process.wait()
    assert settle(place, {"first", "daemon"}) == []
    assert "OUT" not in (place / "log").read_text()


@pytest.mark.parametrize("rung", ["veth", "userns, own user"])
def test_sigkill_of_the_supervisor_leaves_nothing_in_nested_namespaces(rung: str, place: pathlib.Path) -> None:
    """Not even a process that hid in namespaces of its own."""
    process = started(rung, place, "-")
    process.kill()
    process.wait()
    assert settle(place, {"nested"}) == []


@pytest.mark.parametrize("rung", ["veth", "userns, own user"])
def test_an_orderly_end_leaves_no_process(rung: str, place: pathlib.Path) -> None:
    """SIGTERM: everything is gone, the nested ones included."""
    process = started(rung, place, "-")
    process.terminate()
    process.communicate(timeout=20)
    assert settle(place, {"first", "daemon", "nested"}) == []


@pytest.mark.parametrize("rung", ["veth", "userns, own user"])
def test_sigkill_of_the_guard_opens_nothing(rung: str, place: pathlib.Path) -> None:
    """The sandbox holds without its guard, and the orderly end still clears away."""
    process = started(rung, place, "-")
    os.kill(guard_of(process.pid), 9)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=20)
    assert settle(place, {"first", "daemon", "nested"}) == []
    assert "OUT" not in (place / "log").read_text()


def test_a_workload_of_another_user_cannot_signal_them(place: pathlib.Path) -> None:
    """Started by root, neither supervisor nor guard can be signalled from inside (EPERM)."""
    for extra in ("supervisor", "guard"):
        process = started("veth", place, extra)
        assert process.stdout is not None
        assert process.stdout.readline().strip() in ("1", "['1']")
        process.terminate()
        process.communicate(timeout=20)


@pytest.mark.parametrize("victims", ["supervisor", "guard", "both"])
def test_killing_its_keepers_gains_a_workload_of_the_same_user_nothing(victims: str, place: pathlib.Path) -> None:
    """It may (the user is the same), and nothing leaves by it: no way out opens, and without guard and supervisor only the
    proxy is lost."""
    process = started("userns, own user", place, victims)
    time.sleep(1.5)
    if victims == "guard":
        assert process.poll() is None
        process.terminate()
    else:
        assert process.wait(timeout=10) == -9
    left = settle(place, {"first", "daemon", "nested"})
    process.communicate(timeout=20)
    assert left == [] or victims == "both"
    assert "OUT" not in (place / "log").read_text()


@pytest.mark.parametrize("rung", ["veth", "userns, own user"])
def test_kill_at_random_moments_leaves_nothing(rung: str, place: pathlib.Path) -> None:
    """SIGKILL of the supervisor at 10 random moments: no process; what little it leaves in files goes with the next start."""
    chance = random.Random(rung)
    runs = place / "runs"
    runs.mkdir()
    place.chmod(0o755)  # a run directory below one that others may write to would be refused
    if "own user" in rung:
        os.chown(runs, arena.UID, arena.UID)
    files = place / "files"
    files.mkdir()
    files.chmod(0o777)
    marker = f"31{chance.randrange(10**6):06d}"
    for _ in range(10):
        process = arena.start(rung, files, ["sleep", marker], "--run-dir", str(runs))
        time.sleep(chance.uniform(0.03, 0.5))
        process.kill()
        process.communicate(timeout=20)
        assert process.returncode == -9, "it ended by itself: nothing was interrupted"
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _running(marker):
        time.sleep(0.1)
    left = _running(marker)
    for pid in left:
        os.kill(pid, 9)
    assert left == []
    assert arena.start(rung, files, ["true"], "--run-dir", str(runs)).wait(timeout=30) == 0
    assert list(runs.iterdir()) == []


def _running(marker: str) -> list[int]:
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if words[:2] == [b"sleep", marker.encode()]:
            found.append(int(entry.name))
    return found
