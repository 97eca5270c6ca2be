"""The workload's life as an operator sees it: exit codes, signals, time limits, terminals, PID 1, and what is left behind."""

from __future__ import annotations

import os
import pathlib
import pty
import random
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator

import product
import pytest

import hosts


@pytest.fixture
def place() -> Iterator[pathlib.Path]:
    """A directory every user can use."""
    with tempfile.TemporaryDirectory(prefix="oss-e2e-") as name:
        pathlib.Path(name).chmod(0o777)
        yield pathlib.Path(name)


def start(place: pathlib.Path, script: str, *options: str, wrap: product.Wrap | None = None) -> subprocess.Popen[str]:
    """Start the product with a shell script as workload and wait until the script says `up`."""
    argv = product.argv(place, product.DENY_ALL, ["sh", "-c", script], options)
    process = subprocess.Popen(
        wrap(argv) if wrap else argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        stdin=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if line.strip() != "up":
        raise AssertionError(f"{line!r} {process.communicate(timeout=20)}")
    return process


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -KILL $$", 137)],
)
def test_the_workloads_exit_code_is_ours(script: str, code: int) -> None:
    """Own code, or 128 plus the signal; the event names the real process and code."""
    ran = product.run(["sh", "-c", script])
    assert ran.code == code, ran.err
    (line,) = ran.lines("PROC:TERMINATE")
    assert line.startswith("PROC:TERMINATE [INFO] sh(")
    assert line.endswith(f"[exit:{code}]")


def test_missing_program_is_explained() -> None:
    """Exit code 1 with step and hint; not the code of some workload."""
    ran = product.run(["no-such-program-here"])
    assert ran.code == 1
    assert "cannot run 'no-such-program-here'" in ran.err
    assert "Traceback" not in ran.err


def test_timeout_is_124() -> None:
    """`--timeout` ends a workload that ignores SIGTERM: TERM, grace, KILL, exit code 124, a critical event."""
    begun = time.monotonic()
    ran = product.run(
        ["sh", "-c", "trap '' TERM; sleep 30 & wait; sleep 30"], options=["--timeout", "0.5", "--grace", "0.5"]
    )
    assert ran.code == 124, ran.err
    assert time.monotonic() - begun < 15
    assert ran.lines("PROC:TERMINATE [CRIT]")


@pytest.mark.parametrize(
    ("name", "code"), [("TERM", 143), ("INT", 130), ("HUP", 129), ("QUIT", 131), ("USR1", 138), ("USR2", 140)]
)
def test_signals_are_passed_on(place: pathlib.Path, name: str, code: int) -> None:
    """Each signal reaches the workload's whole group; a workload that dies of it gives 128+n."""
    process = start(place, "sleep 30 & echo up; wait")
    process.send_signal(getattr(signal, f"SIG{name}"))
    process.communicate(timeout=20)
    assert process.returncode == code


def test_a_workload_that_handles_term_keeps_its_own_code(place: pathlib.Path) -> None:
    """SIGTERM does not make 143 by itself: the code is what the workload returns."""
    process = start(place, "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done")
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 9


def test_a_workload_that_ignores_term_is_killed_after_the_grace(place: pathlib.Path) -> None:
    """TERM, grace, KILL: the end comes, and the code says by what."""
    process = start(place, "trap '' TERM; echo up; while :; do sleep 0.05; done", "--grace", "0.4")
    begun = time.monotonic()
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 137
    assert 0.3 < time.monotonic() - begun < 10


def test_a_signal_before_the_workload_exists_ends_the_start(place: pathlib.Path) -> None:
    """SIGTERM at any moment of the start ends it with 143 (or the workload's end), and the workload never runs on."""
    for delay in (0.0, 0.02, 0.05, 0.08, 0.12, 0.2):
        argv = product.argv(place, product.DENY_ALL, ["sleep", "30"])
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/")
        time.sleep(delay)
        process.terminate()
        _, err = process.communicate(timeout=20)
        assert process.returncode in (143, -signal.SIGTERM), err.decode()
        assert b"Traceback" not in err


@pytest.mark.root
def test_signals_without_cap_kill(place: pathlib.Path) -> None:
    """Podman's driver takes CAP_KILL: the workload of another uid is still signalled, through its own identity."""
    process = start(
        place, "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done", wrap=lambda a: hosts.without_caps(a, "kill")
    )
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 9, err


@pytest.mark.root
def test_as_pid_one_it_reaps_and_forwards(place: pathlib.Path) -> None:
    """As init of a PID namespace: orphans are reaped, SIGTERM is not lost, the exit code is the workload's."""
    zombies = "grep -l 'State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l"
    script = f"for i in 1 2 3 4 5; do (sleep 0.05 &) ; done; sleep 0.5; {zombies}; exit 3"
    ran = product.run(["sh", "-c", script], wrap=lambda a: ["unshare", "--pid", "--fork", "--mount-proc", *a])
    assert (ran.code, ran.out.strip()) == (3, "0"), ran.err
    argv = product.argv(
        place, product.DENY_ALL, ["sh", "-c", "trap 'exit 4' TERM; echo up; while :; do sleep 0.05; done"]
    )
    process = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *argv],
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 4


def test_background_processes_do_not_outlive_the_workload(place: pathlib.Path) -> None:
    """What the workload leaves behind, its own sessions included, is ended with it."""
    mark = place / "mark"
    mark.touch(mode=0o666)
    mark.chmod(0o666)
    # The pause is for what runs in the background to have written once, on a loaded machine too.
    writer = f"setsid sh -c 'while :; do date +%s.%N >>{mark}; sleep 0.05; done' &"
    script = f"{writer} until [ -s {mark} ]; do sleep 0.05; done; exit 0"
    ran = product.run(["sh", "-c", script])
    assert ran.code == 0, ran.err
    before = mark.read_text()
    assert before
    time.sleep(0.3)
    assert mark.read_text() == before


def inside(inode: int) -> list[int]:
    """Every process in a network namespace."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}/ns/net").st_ino == inode:
                found.append(int(name))
        except OSError:
            continue
    return found


@pytest.fixture
def outer() -> Iterator[int]:
    """The pid of a process in a network namespace of its own: the host of a test, which nobody else changes."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up; echo up; exec sleep 120"], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    yield holder.pid
    holder.kill()
    holder.wait()


def links(pid: int) -> set[str]:
    """The interfaces in the namespace of a process."""
    return {line.split(":")[0].strip() for line in pathlib.Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]}


@pytest.mark.root
@pytest.mark.parametrize("who", ["root", "user"])
def test_kill_nine_leaves_nothing(place: pathlib.Path, outer: int, who: str) -> None:
    """After SIGKILL of the supervisor at random moments: no process of the workload, no interface, no run directory."""
    before = links(outer)
    here = os.stat(f"/proc/{outer}/ns/net").st_ino
    runs = place / "runs"
    runs.mkdir()
    runs.chmod(0o1777)
    place.chmod(0o755)
    there = ["nsenter", f"--net=/proc/{outer}/ns/net"]
    options = ["--run-dir", str(runs)]
    chance = random.Random(20261122)
    for _ in range(8):
        argv = product.argv(place, product.DENY_ALL, ["sh", "-c", "setsid sleep 30 & sleep 30"], options, records=False)
        argv = [*there, *(hosts.unprivileged(argv) if who == "user" else argv)]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
        time.sleep(chance.uniform(0.05, 0.8))
        namespaces = {namespace(pid) for pid in descendants(process.pid)} - {
            here,
            0,
            os.stat("/proc/self/ns/net").st_ino,
        }
        process.kill()
        process.wait()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            left = [pid for inode in namespaces for pid in inside(inode)]
            if not left and links(outer) == before:
                break
            time.sleep(0.05)
        assert not left
        assert links(outer) == before
    time.sleep(0.3)
    last = product.argv(place, product.DENY_ALL, ["true"], options, records=False)
    subprocess.run([*there, *(hosts.unprivileged(last) if who == "user" else last)], check=True, cwd="/", timeout=60)
    assert list(runs.iterdir()) == []


def namespace(pid: int) -> int:
    """The inode of a process's network namespace, 0 when it is gone."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def descendants(pid: int) -> list[int]:
    """The pids below `pid`, with it."""
    found = [pid]
    for one in found:
        try:
            text = pathlib.Path(f"/proc/{one}/task/{one}/children").read_text()
        except OSError:
            continue
        found += [int(item) for item in text.split()]
    return found


def test_a_terminal_of_its_own(place: pathlib.Path) -> None:
    """On a terminal the workload gets another one, in a session of its own, with our size; its output and code come back."""
    pid, master = pty.fork()
    if pid == 0:
        script = "test -t 0 && tty; stty size; ps -o sid= -p $$ | tr -d ' '; read line; echo got:$line; exit 6"
        argv = product.argv(place, product.DENY_ALL, ["sh", "-c", script], ["--interactive"])
        os.execv(argv[0], argv)
    output = b""
    sent = False
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            try:
                data = os.read(master, 4096)
            except OSError:
                break
            if not data:
                break
            output += data
        if b"/dev/pts/" in output and not sent:
            sent = True
            os.write(master, b"hello\n")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 6, output
    assert b"got:hello" in output
    assert os.ttyname(master).encode() not in output


def test_workdir_and_environment(place: pathlib.Path) -> None:
    """The working directory is the one asked for; the proxy and trust variables are there, the secrets are not."""
    env = {
        "OPENSHELL_SANDBOX_TOKEN": "secret-token",
        "OPENSHELL_SANDBOX_ID": "box-1",
        "HTTP_PROXY": "http://user:pw@corp:1",
    }
    ran = product.run(["sh", "-c", "pwd; env"], options=["--workdir", str(place)], env=env)
    lines = ran.out.splitlines()
    assert lines[0] == str(place)
    block = dict(line.split("=", 1) for line in lines[1:] if "=" in line)
    assert block["OPENSHELL_SANDBOX"] == "1"
    assert block["HTTPS_PROXY"] == block["http_proxy"] == block["ALL_PROXY"]
    assert block["HTTPS_PROXY"].endswith(":3128")
    assert pathlib.Path(block["SSL_CERT_FILE"]).name == "ca-bundle.pem"
    assert "secret-token" not in ran.out + ran.err


def test_a_reader_that_goes_away_does_not_end_the_run(place: pathlib.Path) -> None:
    """With nobody reading standard error, the workload runs on and its code is ours."""
    argv = product.argv(place, product.DENY_ALL, ["sh", "-c", "exit 2"])
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/")
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(timeout=30) == 2
