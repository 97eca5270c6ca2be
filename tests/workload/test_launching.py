"""The launcher, its client and the reaper, as real processes on the real kernel."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

import hosts
from openshell_supervisor.confine import launcher
from openshell_supervisor.errors import LaunchError
from openshell_supervisor.workload.child import Child
from openshell_supervisor.workload.reaper import Reaper

LAUNCHER = pathlib.Path(launcher.ENTRY)
SELF = {"uid": os.geteuid(), "gid": os.getegid(), "groups": None}
OTHER = {"uid": 64001, "gid": 64001, "groups": []}
HERE = os.stat("/proc/self/ns/net").st_ino


# The beginning of a little supervisor of its own: argv holds the launcher's path and a `confine` request.
SUPERVISING = (
    "import asyncio, json, os, sys, pathlib\n"
    "from openshell_supervisor.workload.child import Child\n"
    "from openshell_supervisor.workload.reaper import Reaper\n"
    "async def main():\n"
    "    r = Reaper(); r.install(); c = Child.start(r, pathlib.Path(sys.argv[1]))\n"
    "    me = {'uid': os.getuid(), 'gid': os.getgid(), 'groups': None}\n"
)


@pytest.fixture
async def reaper() -> AsyncIterator[Reaper]:
    """A reaper on the test's loop."""
    reaper = Reaper()
    reaper.install()
    yield reaper
    reaper.uninstall()


def confinement(identity: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A `confine` request."""
    plain = {"cwd": None, "read_only": [], "anchors": [], "filters": {}, "open_files": None, "die_with_parent": False}
    return {"op": "confine", "identity": identity, **plain, **more}


def making(identity: dict[str, Any]) -> dict[str, Any]:
    """An `enter` request that makes a namespace."""
    return {"op": "enter", "how": "make", "port": 3128, "backlog": 8, "identity": identity, "outside": HERE}


async def run_in(child: Child, script: str, out: pathlib.Path) -> str:
    """Become a shell that runs `script` with its output in a file; answers what it printed."""
    await child.execute(
        {"op": "exec", "argv": ["sh", "-c", f"exec >{out} 2>&1; {script}"], "env": {"PATH": os.environ["PATH"]}}
    )
    async with asyncio.timeout(20):
        await child.exited
    return out.read_text()


async def test_workload_inherits_three_descriptors_and_default_signals(reaper: Reaper, open_tmp: pathlib.Path) -> None:
    """The workload sees descriptors 0-2 alone (the inherited canary is closed), no ignored SIGPIPE, an empty mask."""
    canary = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(canary, True)
    try:
        child = Child.start(reaper, LAUNCHER)
        await child.ask(confinement(SELF))
        out = await run_in(child, "ls /proc/$$/fd; grep -E 'SigIgn|SigBlk' /proc/self/status", open_tmp / "out")
    finally:
        os.close(canary)
    numbers = out.split("Sig")[0].split()
    assert numbers == ["0", "1", "2"]
    ignored = int(out.split("SigIgn:")[1].split()[0], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1))
    assert int(out.split("SigBlk:")[1].split()[0], 16) == 0


async def test_environment_is_exactly_the_given_one(reaper: Reaper, open_tmp: pathlib.Path) -> None:
    """Neither the supervisor's environment nor the launcher's reaches the workload; odd bytes survive."""
    os.environ["OSS_TEST_SECRET"] = "must-not-leak"
    try:
        child = Child.start(reaper, LAUNCHER)
        assert b"must-not-leak" not in pathlib.Path(f"/proc/{child.pid}/environ").read_bytes()
        await child.execute(
            {
                "op": "exec",
                "argv": ["/bin/sh", "-c", f"cat /proc/$$/environ >{open_tmp}/out"],
                "env": {"A": "b\udcffc", "PATH": "/bin"},
            }
        )
        await child.exited
    finally:
        del os.environ["OSS_TEST_SECRET"]
    block = (open_tmp / "out").read_bytes()
    assert set(block.rstrip(b"\0").split(b"\0")) == {b"A=b\xffc", b"PATH=/bin"}


@pytest.mark.root
async def test_drop_is_whole_and_verified(reaper: Reaper, open_tmp: pathlib.Path) -> None:
    """From root: identity, groups and every capability set are gone in the workload itself, and no_new_privs is on."""
    open_tmp.chmod(0o777)
    child = Child.start(reaper, LAUNCHER)
    answer, _ = await child.ask(confinement(OTHER))
    assert answer["privileges"]["bounding_set_empty"] is True
    out = await run_in(child, "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs)' /proc/$$/status", open_tmp / "out")
    facts = {line.split(":")[0]: line.split(":")[1].split() for line in out.splitlines()}
    assert facts["Uid"] == facts["Gid"] == ["64001"] * 4
    assert facts["Groups"] == []
    assert {facts[name][0] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0000000000000000"}
    assert facts["NoNewPrivs"] == ["1"]


@pytest.mark.root
async def test_root_that_stays_root_regains_nothing_by_exec(reaper: Reaper, open_tmp: pathlib.Path) -> None:
    """uid 0 without capabilities stays without them across exec, where plain root would get them all back."""
    child = Child.start(reaper, LAUNCHER)
    await child.ask(confinement({"uid": 0, "gid": 0, "groups": None}))
    out = await run_in(child, "grep CapEff /proc/self/status; chown 1 /etc/hostname && echo CHANGED", open_tmp / "out")
    assert "0000000000000000" in out
    assert "CHANGED" not in out


@pytest.mark.parametrize("wrap", ["plain", "unprivileged"])
def test_drop_is_idempotent_for_a_user_that_fits(wrap: str, open_tmp: pathlib.Path, repo_root: pathlib.Path) -> None:
    """An entrypoint that already runs as the wanted user succeeds, without privilege, and is verified all the same."""
    script = open_tmp / "idempotent.py"
    script.write_text(
        SUPERVISING + "    a, _ = await c.ask({**json.loads(sys.argv[2]), 'identity': me})\n"
        "    print(json.dumps(a)); c.discard()\n"
        "asyncio.run(main())\n"
    )
    argv = [sys.executable, str(script), str(LAUNCHER), json.dumps(confinement(SELF))]
    done = hosts.run(hosts.unprivileged(argv) if wrap == "unprivileged" else argv)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["privileges"]["no_new_privs"] is True


@pytest.mark.root
async def test_made_namespace_has_nothing_but_lo(reaper: Reaper, open_tmp: pathlib.Path) -> None:
    """The made namespace holds lo alone and no route; the workload in it cannot make an interface; the listener works."""
    open_tmp.chmod(0o777)
    child = Child.start(reaper, LAUNCHER)
    answer, descriptors = await child.ask(making(OTHER))
    assert answer["attempts"] == [["netns", None, None]]
    assert answer["inode"] != HERE
    assert os.fstat(descriptors[1]).st_ino == answer["inode"]
    os.close(descriptors[1])
    with socket.socket(fileno=descriptors[0]) as listener:
        assert listener.getsockname() == ("127.0.0.1", 3128)
        await child.ask(confinement(OTHER))
        out = await run_in(
            child, "tail -n +3 /proc/net/dev; tail -n +2 /proc/net/route; ip link add dummy0 type dummy", open_tmp / "o"
        )
    assert [line.split(":")[0].strip() for line in out.splitlines()[:1]] == ["lo"]
    assert "not permitted" in out


def test_wrong_namespace_is_refused(open_tmp: pathlib.Path) -> None:
    """A launcher that finds itself in another namespace than the promised one never becomes a workload."""

    async def attempt() -> None:
        reaper = Reaper()
        reaper.install()
        child = Child.start(reaper, LAUNCHER)
        with pytest.raises(LaunchError) as caught:
            await child.ask({"op": "enter", "how": "stay", "inode": HERE + 1})
        assert caught.value.step == "verify namespace"
        child.discard()
        await child.exited

    asyncio.run(attempt())


async def test_failing_exec_is_told_apart_from_the_workloads_own_code(reaper: Reaper) -> None:
    """A program that does not exist is a LaunchError with errno ENOENT, not an exit code of the workload."""
    child = Child.start(reaper, LAUNCHER)
    with pytest.raises(LaunchError) as caught:
        await child.execute({"op": "exec", "argv": ["no-such-program"], "env": {"PATH": "/bin"}})
    assert (caught.value.step, caught.value.errno_name) == ("exec", "ENOENT")
    child.discard()


async def test_lost_launcher_is_reported(reaper: Reaper) -> None:
    """A launcher killed while it is asked is an error that names the step, not a hang."""
    child = Child.start(reaper, LAUNCHER)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(LaunchError) as caught:
        await child.ask({"op": "confine", "identity": SELF})
    assert caught.value.code == "launcher_lost"


async def test_malformed_requests_are_answered(reaper: Reaper) -> None:
    """The launcher answers nonsense with an error instead of dying with a traceback."""
    child = Child.start(reaper, LAUNCHER)
    for request in ({"op": "nonsense"}, {"op": "enter"}, {"op": "confine", "identity": {}}, {"op": "probe", "ways": 3}):
        with pytest.raises(LaunchError) as caught:
            await child.ask(request)
        assert caught.value.code == "launch_step_failed"
    child.discard()


async def test_orphans_are_reaped_and_statuses_kept(reaper: Reaper) -> None:
    """Of twenty children and their orphans, every known status arrives and no zombie stays."""
    from openshell_supervisor.workload.reaper import become_subreaper

    become_subreaper()
    started = [reaper.spawn(["/bin/sh", "-c", f"(sleep 0.05 &) ; exit {n}"], {}, {}) for n in range(20)]
    async with asyncio.timeout(20):
        assert [await future for _, future in started] == list(range(20))
        for _ in range(100):
            mine = subprocess.run(
                ["ps", "--ppid", str(os.getpid()), "-o", "stat=,comm="], capture_output=True, text=True
            ).stdout
            if "sleep" not in mine and not any(line.startswith("Z") for line in mine.splitlines()):
                return
            await asyncio.sleep(0.02)
    raise AssertionError(mine)


async def test_parent_death_ends_the_workload(open_tmp: pathlib.Path) -> None:
    """When the supervisor is killed, the kernel kills the workload's first process."""
    script = open_tmp / "parent.py"
    script.write_text(
        SUPERVISING
        + "    await c.ask({**json.loads(sys.argv[2]), 'identity': me, 'die_with_parent': True, 'parent': os.getpid()})\n"
        "    await c.execute({'op': 'exec', 'argv': ['sleep', '60'], 'env': {'PATH': '/bin:/usr/bin'}})\n"
        "    print(c.pid, flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script), str(LAUNCHER), json.dumps(confinement(SELF))], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert pathlib.Path(f"/proc/{pid}/comm").read_text().strip() == "sleep"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX":
                return
        except FileNotFoundError:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the workload outlived its supervisor")
