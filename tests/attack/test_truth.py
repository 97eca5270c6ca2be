"""Attempts to make the statement say `enforced` where it does not hold. Every lie below is told to it by the kernel itself."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import arena
import product
import pytest

import hosts

pytestmark = pytest.mark.root
POLICY = arena.POLICY.format(uid=arena.UID)
LONELY_UID = 64009  # nobody else's, not even another test's
NO_USERNS = ("unshare:NEWUSER", "clone:NEWUSER")
STATUS = "grep -hE '^(NoNewPrivs|Cap...|Groups|Uid)' /proc/self/status"


@pytest.fixture
def place(open_tmp: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory every user can use."""
    open_tmp.chmod(0o777)
    yield open_tmp


def faking(*calls: str) -> product.Wrap:
    """A host whose seccomp profile answers success to calls that it does not carry out."""
    return lambda argv: hosts.outer_seccomp(argv, *calls, answer=0)


@pytest.mark.parametrize("call", ["prctl", "capset", "setresuid", "setresgid", "unshare", "setns"])
def test_calls_that_only_pretend_to_succeed_are_not_believed(call: str) -> None:
    """A faked success is found out: what the statement calls enforced is true of the workload's own /proc/self/status."""
    ran = product.run(["sh", "-c", STATUS], policy=POLICY, wrap=faking(call))
    if ran.statement is None or not ran.out:
        assert ran.code == 1, ran.err
        assert "Traceback" not in ran.err
        return
    facts = {name: value.split() for name, _, value in (line.partition(":") for line in ran.out.splitlines())}
    if ran.layer("privileges")["state"] == "enforced":
        assert facts["NoNewPrivs"] == ["1"]
        assert not any(int(facts[name][0], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"))
        assert facts["Uid"] == [str(arena.UID)] * 4
    if ran.layer("network")["state"] == "enforced":
        assert ran.layer("network")["detail"]["canaries"] >= 4
        assert ran.rung in ("veth", "loopback")
    else:
        assert ran.rung == "observed"


def test_groups_that_only_seem_to_be_gone_are_not_believed() -> None:
    """setgroups that does nothing leaves the supervisor's groups; the workload does not start with them."""
    with_groups = ["setpriv", "--groups", "4,20"]
    ran = product.run(["id", "-G"], policy=POLICY, wrap=lambda argv: [*with_groups, *faking("setgroups")(argv)])
    assert ran.out.split() in ([], [str(arena.UID)]), ran.out


@pytest.mark.parametrize(
    "options",
    [
        ["--network-mode", "isolated"],
        ["--require", "binary_identity"],
        ["--policy-rules", "x"],
    ],
)
def test_no_statement_of_an_earlier_run_is_left_standing(place: pathlib.Path, options: list[str]) -> None:
    """A start that fails does not leave `network: enforced` of the run before for readers to find."""
    status = place / "status.json"
    argv = product.argv(place, POLICY, ["true"])
    assert subprocess.run(argv, cwd="/", capture_output=True, timeout=60).returncode == 0
    assert "enforced" in status.read_text()
    again = product.argv(place, POLICY, ["true"], options)
    again = hosts.outer_seccomp(again, "unshare") if "isolated" in options else again
    assert subprocess.run(again, cwd="/", capture_output=True, timeout=60).returncode != 0
    if "binary_identity" in options and status.exists():
        assert json.loads(status.read_text())["layers"][5]["state"] == "off"
        return
    assert not status.exists()


def test_the_status_file_is_whole_or_absent(place: pathlib.Path) -> None:
    """SIGKILL at random moments of the start: a reader never finds half a document."""
    chance, seen, status = random.Random(7), 0, place / "status.json"
    for _ in range(12):
        argv = product.argv(place, POLICY, ["sleep", "5"])
        process = subprocess.Popen(argv, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + chance.uniform(0.1, 1.6)
        while time.monotonic() < end:
            try:
                text = status.read_text()
            except FileNotFoundError:
                continue
            seen += 1
            assert len(json.loads(text)["layers"]) == 6
        process.kill()
        process.wait()
        status.unlink(missing_ok=True)
    assert seen, "no run came far enough: the test shows nothing"


def test_a_killed_supervisors_statement_goes_with_it(place: pathlib.Path) -> None:
    """SIGKILL in the moment in which the statement appears: nobody reads `enforced` of a dead run, or it names its process."""
    status = place / "status.json"
    for _ in range(5):
        argv = product.argv(place, POLICY, ["sleep", "5"])
        process = subprocess.Popen(argv, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while not status.exists() and time.monotonic() < end:
            pass
        process.kill()
        process.wait()
        gone = time.monotonic() + 2
        while status.exists() and time.monotonic() < gone:
            time.sleep(0.02)
        assert not status.exists() or str(process.pid) in status.read_text()


def test_planted_links_choose_no_file(place: pathlib.Path) -> None:
    """A symbolic link where the status or the events go: the status replaces the link itself, the events refuse it."""
    victim = place / "victim"
    victim.write_text("precious")
    os.symlink(victim, place / "status.json")
    ran = subprocess.run(product.argv(place, POLICY, ["true"]), cwd="/", capture_output=True, timeout=60)
    assert ran.returncode == 0
    assert victim.read_text() == "precious"
    assert not (place / "status.json").is_symlink()
    (place / "events.jsonl").unlink()
    os.symlink(victim, place / "events.jsonl")
    ran = subprocess.run(product.argv(place, POLICY, ["true"]), cwd="/", capture_output=True, timeout=60)
    assert ran.returncode == 2
    assert victim.read_text() == "precious"


def test_without_a_user_namespace_later_neighbours_count() -> None:
    """Where no user namespace can be had, a process of the same uid that starts later is in reach: not `enforced`."""
    alone = arena.POLICY.format(uid=LONELY_UID)
    ran = product.run(["true"], policy=alone, wrap=lambda argv: hosts.outer_seccomp(argv, *NO_USERNS))
    assert ran.rung == "veth"
    assert ran.layer("network")["state"] != "enforced"


def test_without_a_user_namespace_present_neighbours_count() -> None:
    """A process of the same uid that runs now makes it `degraded`, with the reason."""
    sleeper = subprocess.Popen(hosts.unprivileged(["sleep", "30"], uid=arena.UID))
    try:
        ran = product.run(["true"], policy=POLICY, wrap=lambda argv: hosts.outer_seccomp(argv, *NO_USERNS))
    finally:
        sleeper.kill()
        sleeper.wait()
    assert ran.layer("network")["state"] == "degraded"
    assert "user namespace" in ran.layer("network")["reason"]


def test_a_root_workload_with_kernel_knobs_is_not_called_enforced() -> None:
    """Whoever may write core_pattern has the kernel run programs outside. (Asked with access(2); never written.)"""
    look = f"{sys.executable} -I -c \"import os; print(os.access('/proc/sys/kernel/core_pattern', os.W_OK))\""
    nested = f"unshare --user --map-root-user --mount --pid --fork --mount-proc {look} 2>/dev/null"
    undo = f"unshare --user --map-root-user --mount sh -c 'umount /proc/sys; {look}' 2>/dev/null"
    ran = product.run(["sh", "-c", f"{look}; {nested}; {undo}"], wrap=lambda argv: hosts.without_caps(argv))
    assert ran.rung == "loopback"
    assert "False" in ran.out
    assert "True" not in ran.out or ran.layer("network")["state"] != "enforced"


@pytest.mark.parametrize("variable", ["OPENSHELL_EGRESS=observe", "OPENSHELL_NETWORK_MODE=host"])
@pytest.mark.parametrize(
    "flags", [["--require", "network"], ["--network-mode", "isolated"], ["--egress", "enforce"]], ids=" ".join
)
def test_an_images_environment_does_not_loosen_a_flag(variable: str, flags: list[str]) -> None:
    """What the operator demands on the command line holds against variables baked into an image, or nothing starts."""
    name, _, value = variable.partition("=")
    ran = product.run(["echo", "STARTED"], policy=POLICY, options=flags, env={name: value})
    assert "STARTED" not in ran.out or ran.layer("network")["state"] == "enforced"


@pytest.mark.parametrize("empty", ["", " ", ","])
def test_an_empty_flag_does_not_cancel_a_demand(empty: str) -> None:
    """OPENSHELL_REQUIRE=network stands although --require is given without a name."""
    ran = product.run(
        ["echo", "STARTED"],
        policy=POLICY,
        options=["--require", empty, "--host-network"],
        env={"OPENSHELL_REQUIRE": "network"},
    )
    assert "STARTED" not in ran.out


def test_quiet_logging_does_not_hide_a_degradation() -> None:
    """RUST_LOG=error and OPENSHELL_LOG_LEVEL=error, baked in: CONFIG:DEGRADED and the statement are still printed."""
    quiet = {"RUST_LOG": "error", "OPENSHELL_LOG_LEVEL": "error"}
    ran = product.run(["true"], policy=POLICY, env=quiet, wrap=lambda argv: hosts.outer_seccomp(argv, "unshare"))
    assert ran.rung == "observed"
    assert ran.lines("CONFIG:DEGRADED [MED]")
    assert "network              degraded" in ran.err


def test_a_dead_proxy_does_not_leave_a_running_workload(place: pathlib.Path) -> None:
    """SIGSTOP of the supervisor stops the only way out with it: a request hangs, a direct connection is refused."""
    script = (
        "echo up; read go; curl -sS -m 2 http://203.0.113.1/; curl -sS -m 2 --noproxy '*' http://203.0.113.1/; echo end"
    )
    process = subprocess.Popen(
        product.argv(place, POLICY, ["sh", "-c", script]),
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert any(line == "up\n" for line in process.stdout)
        process.send_signal(signal.SIGSTOP)
        process.stdin.write("go\n")
        process.stdin.flush()
        said = []
        for line in process.stdout:
            said.append(line)
            if line == "end\n":
                break
        text = "".join(said)
        assert "timed out" in text
        assert "Failed to connect" in text
    finally:
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=20)
