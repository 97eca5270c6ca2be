"""The agent that wants out, against file rules, filters and privileges: what it tries works outside and fails inside.

The attempts themselves are `confined.py`.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import arena
import product
import pytest
from cell import USERS, Wrap, attacker, field_of_battle, inside, lay_out, outside, own, policy

import hosts


@pytest.fixture
def field() -> Iterator[pathlib.Path]:
    """See `cell.field_of_battle`."""
    with field_of_battle() as path:
        yield path


@pytest.mark.parametrize("as_whom", USERS)
def test_no_way_around_the_file_rules(as_whom: Wrap, field: pathlib.Path) -> None:
    """Links, descriptors, names in /proc, exchanges and moves: each works for this user outside, none inside."""
    fair = outside(attacker(field))
    assert set(fair.values()) == {"opened"}, fair
    (field / "renamed").rename(field / "writable")
    lay_out(field)
    ran = product.run(
        attacker(field), policy=policy([field / "readable"], [field / "writable"]), wrap=as_whom, timeout=60
    )
    assert ran.layer("filesystem")["state"] == "enforced", ran.err
    assert not {name for name, outcome in inside(ran).items() if outcome == "opened"}
    for place in ("hidden", "readable"):
        assert {one.name for one in (field / place).iterdir()} == {"f", "moves", "goes"}
        assert {one.read_text() for one in (field / place).iterdir()} == {"secret"}


@pytest.mark.parametrize("with_files", [True, False], ids=["file rules", "no file rules"])
@pytest.mark.parametrize("mode", ["host", "isolated"])
def test_a_neighbour_of_the_same_user_is_out_of_reach(mode: str, with_files: bool) -> None:
    """Whatever the rung and the policy, no other process of the user can be read, written, traced or limited from inside."""
    if mode == "isolated" and not hosts.userns_allowed():
        pytest.skip("needs user namespaces for unprivileged users")
    text = policy() if with_files else product.DENY_ALL
    neighbour = subprocess.Popen(own(["sleep", "60"]), cwd="/")
    try:
        fair = outside(attacker(victim=neighbour.pid))
        ran = product.run(
            attacker(victim=neighbour.pid), policy=text, options=["--network-mode", mode], wrap=own, timeout=60
        )
    finally:
        neighbour.kill()
        neighbour.wait()
    seen = inside(ran)
    tried = {name for name, outcome in fair.items() if outcome == "opened"}
    assert {"signal", "open its memory", "read its environment", "its limits"} <= tried, fair
    through = {name for name in tried if seen[name] == "opened"}
    # A signal is held by the file rules' scope alone: without them it goes by user (docs/threat-model.md).
    assert through <= (set() if with_files else {"signal"}), seen
    assert {ran.layer(name)["state"] for name in ("syscalls", "privileges")} == {"enforced"}


@pytest.mark.root
@pytest.mark.parametrize("mode", ["isolated", "host"])
def test_no_terminal_of_its_user_but_its_own(mode: str) -> None:
    """A terminal outside, of the same user, cannot be opened from inside a boundary, and a new one works; without a boundary
    it may be, and then the statement says so."""
    code = (
        "import os, pty, sys\n"
        "try: os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY); print('opened')\n"
        "except OSError as error: print(error.errno)\n"
        "main, side = pty.openpty(); os.write(side, b'x'); print(os.read(main, 1))"
    )
    main, side = os.openpty()
    try:
        name = os.ttyname(side)
        os.chown(name, arena.UID, -1)
        command = [sys.executable, "-I", "-c", code, name]
        assert hosts.run(own(command)).stdout.split() == ["opened", "b'x'"]
        ran = product.run(command, policy=policy(), options=["--network-mode", mode], wrap=own)
    finally:
        os.close(main)
        os.close(side)
    outcome, new = ran.out.split()
    stated = "shared" if outcome == "opened" else "private"
    assert (stated, new) == (ran.layer("filesystem")["detail"]["terminals"], "b'x'"), ran.err
    assert mode == "host" or stated == "private"


@pytest.mark.parametrize("as_whom", USERS)
def test_limits_of_its_own_can_be_set_and_nobody_elses(as_whom: Wrap) -> None:
    """A process sets its own limits; its supervisor's and its guard's it can neither read nor set."""
    code = (
        "import os, resource as r\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (99, 99)); print(r.getrlimit(r.RLIMIT_NOFILE)[0])\n"
        "pids = [int(p) for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid()]\n"
        "def through(pid):\n"
        "    try: r.prlimit(pid, r.RLIMIT_CPU)\n"
        "    except OSError: return False\n"
        "    return True\n"
        "print(os.getppid() in pids, [pid for pid in pids if through(pid)])"
    )
    ran = product.run([sys.executable, "-I", "-c", code], policy=policy(), wrap=as_whom)
    assert ran.out.split("\n")[:2] == ["99", "True []"], ran.out + ran.err


# --- what one run leaves for the next ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["inner rule", "alias", "place named by a link", "workdir"])
def test_a_planted_link_does_not_widen_the_next_run(way: str, field: pathlib.Path) -> None:
    """A directory that a policy names and a workload may replace: a link in its place gives the next run nothing."""
    build, alias, place = field / "writable" / "build", field / "alias", field / "place"
    build.mkdir(mode=0o755)
    alias.symlink_to(build)
    place.symlink_to(field / "writable")
    if os.geteuid() == 0:
        for one in (build, alias, place):
            os.chown(one, arena.UID, arena.UID, follow_symlinks=False)
    writable: dict[str, list[object]] = {
        "inner rule": [field / "writable", build],
        "alias": [field / "writable", alias],
        "place named by a link": [place, build],
        "workdir": [field / "writable"],
    }
    text, options = policy([], writable[way]), ["--workdir", str(build)] if way == "workdir" else []
    text = text.replace("include_workdir: false", "include_workdir: true") if way == "workdir" else text
    plant = f"echo kept > {build}/own && rm -r {build} && ln -s {field / 'hidden'} {build} && echo PLANTED"
    first = product.run(["sh", "-c", plant], policy=text, options=options, wrap=own)
    assert first.out == "PLANTED\n", first.err
    again = product.run(["sh", "-c", f"cat {field}/hidden/f; echo x > {field}/hidden/new"], policy=text, wrap=own)
    assert (again.out, (field / "hidden" / "new").exists()) == ("", False), again.err


def test_a_killed_supervisor_leaves_no_canary() -> None:
    """The files that the self-probe needs outside of the file rules are gone once the workload runs, and after SIGKILL too."""
    places = [pathlib.Path(name) for name in ("/var/tmp", "/run/lock", "/dev/shm", "/tmp")]

    def canaries() -> set[pathlib.Path]:
        uid = arena.UID if os.geteuid() == 0 else os.geteuid()
        found = (one for place in places if os.access(place, os.R_OK) for one in place.glob(".self-probe*"))
        return {one for one in found if one.stat().st_uid == uid}

    before = canaries()
    with tempfile.TemporaryDirectory(prefix="oss-kill-") as name:
        directory = pathlib.Path(name)
        directory.chmod(0o777)
        line = product.argv(directory, policy(), ["sh", "-c", "echo RUNS; sleep 60"], records=False)
        supervisor = subprocess.Popen(own(line), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/")
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "RUNS\n"
        during = canaries() - before
        supervisor.kill()
        supervisor.wait()
        supervisor.stdout.close()
    assert (during, canaries() - before) == (set(), set())
