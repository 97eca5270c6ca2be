"""Where the kernel refuses a step, the veth rung says which and undoes the rest; where the supervisor is killed,
nothing stays. Each refusal is the kernel's: capabilities that are gone, a filter that an outer runtime could have set.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

import hosts
from openshell_supervisor.boundary import bypass, nft, veth
from openshell_supervisor.boundary.nft import Rule
from openshell_supervisor.errors import BoundaryError

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("outer_namespace")]

Wrap = Callable[[list[str]], list[str]]

# Builds the rung once, as the supervisor would, and says what came of it and what it left in its own process.
ATTEMPT = """
import asyncio, json, os, pathlib, sys, threading
from openshell_supervisor.boundary import veth
from openshell_supervisor.errors import BoundaryError
if "no-codec" in sys.argv:
    sys.modules["pyroute2"] = None
if "no-netfilter" in sys.argv:
    import pyseccomp as sc
    rules = sc.SyscallFilter(sc.ALLOW)
    rules.set_attr(sc.Attr.CTL_NNP, 0)
    rules.add_rule(sc.ERRNO(1), "socket", sc.Arg(0, sc.EQ, 16), sc.Arg(2, sc.EQ, 12))
    rules.load()
if "nothing-started" in sys.argv:
    import pyseccomp as sc
    rules = sc.SyscallFilter(sc.ALLOW)
    rules.set_attr(sc.Attr.CTL_NNP, 0)
    for call in ("execve", "execveat", "fork", "vfork"):
        rules.add_rule(sc.KILL_PROCESS, call)
    rules.load()
descriptors = lambda: sorted(os.readlink(entry) for entry in pathlib.Path("/proc/self/fd").iterdir() if entry.exists())
async def main():
    before = descriptors()
    try:
        boundary = await veth.build("sandbox-5eed5eed", 3128, None)
    except BoundaryError as error:
        outcome = {"step": error.step, "errno": error.errno_name, "message": error.message, "hint": error.hint}
    else:
        outcome = {"rung": boundary.rung, "whole_pyroute2": "pyroute2" in sys.modules}
        await boundary.close()
    await asyncio.sleep(0.05)
    outcome |= {"leaked": [left for left in descriptors() if left not in before], "threads": threading.active_count()}
    print(json.dumps(outcome))
asyncio.run(main())
"""


def attempt(wrap: Wrap, *arguments: str) -> dict[str, Any]:
    done = hosts.run(wrap([sys.executable, "-c", ATTEMPT, *arguments]), env={**os.environ, "PATH": "/nowhere:/usr/bin"})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_rich_host_builds_it() -> None:
    """The control of the refusals below: with nothing taken away the same program builds the rung."""
    assert attempt(lambda argv: argv) == {"rung": "veth", "whole_pyroute2": False, "leaked": [], "threads": 1}


def test_root_of_a_user_namespace_is_root_enough() -> None:
    """A user without privileges who is root in a user namespace, as in a rootless container, builds the rung there."""
    if not hosts.userns_allowed():
        pytest.skip("needs a kernel that lets a user make a user namespace")
    found = attempt(lambda argv: hosts.unprivileged(["unshare", "--user", "--map-root-user", "--net", *argv]))
    assert found == {"rung": "veth", "whole_pyroute2": False, "leaked": [], "threads": 1}


def test_no_program_is_started() -> None:
    """No `ip`, no `nft`, no `nsenter`, no fork: under a filter that kills whoever tries, the rung is built."""
    assert attempt(lambda argv: argv, "nothing-started")["rung"] == "veth"


def test_the_library_is_whole_for_whoever_imports_it_later() -> None:
    """The rung takes only the codec of pyroute2; imported afterwards, the library is complete and works."""
    program = ATTEMPT + "import pyroute2; pyroute2.netlink.nlmsg; pyroute2.IPRoute().close()"
    done = hosts.run([sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("wrap", "arguments", "step", "number"),
    [
        pytest.param(lambda argv: hosts.outer_seccomp(argv, "socket=16"), [], "netlink", "EPERM", id="no netlink"),
        pytest.param(lambda argv: hosts.without_caps(argv, "sys_admin"), [], "namespace", "EPERM", id="no SYS_ADMIN"),
        pytest.param(
            lambda argv: hosts.outer_seccomp(argv, "unshare:NEWNET"), [], "namespace", "EPERM", id="unshare filtered"
        ),
        pytest.param(lambda argv: hosts.outer_seccomp(argv, "setns"), [], "enter", "EPERM", id="setns filtered"),
        pytest.param(lambda argv: argv, ["no-codec"], "codec", None, id="no pyroute2"),
        pytest.param(lambda argv: hosts.without_caps(argv, "net_admin"), [], "links", "EPERM", id="no NET_ADMIN"),
        pytest.param(lambda argv: hosts.outer_seccomp(argv, "listen"), [], "listener", "EPERM", id="listen filtered"),
        pytest.param(lambda argv: argv, ["no-netfilter"], "fence", "EPERM", id="netfilter filtered"),
        pytest.param(hosts.unprivileged, [], "namespace", "EPERM", id="unprivileged user"),
    ],
)
def test_each_refused_step_is_named_and_undone(
    wrap: Wrap, arguments: list[str], step: str, number: str | None, links: Callable[[], list[str]]
) -> None:
    """The error names step and errno; links, descriptors and threads are as before."""
    outcome = attempt(wrap, *arguments)
    assert (outcome.get("step"), outcome.get("errno")) == (step, number), outcome
    assert step in outcome["message"] and "sandbox-5eed5eed" in outcome["message"]
    assert (number is None) or outcome["hint"]
    assert outcome["leaked"] == []
    assert outcome["threads"] == 1
    assert links() == ["lo"]


def unknown_to_this_kernel(name: str, *, required: bool) -> Rule:
    """A rule with an expression that no kernel has: what a kernel without nft_log or nft_ct answers to ours."""
    return Rule(name, (("no_such_thing", b""),), required)


def with_rule_replaced(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    original = nft.ruleset

    def poorer(*arguments: Any) -> tuple[Rule, ...]:
        return tuple(
            unknown_to_this_kernel(rule.name, required=rule.required) if rule.name in names else rule
            for rule in original(*arguments)
        )

    monkeypatch.setattr(nft, "ruleset", poorer)


async def test_a_kernel_that_cannot_report_gets_the_fence_and_says_so(
    monkeypatch: pytest.MonkeyPatch, recorder: Any, telemetry: Any, inside: Callable[..., Any]
) -> None:
    """Without log and ct the refusals hold all the same; an event of severity Medium and the detail name what is
    missing."""
    with_rule_replaced(monkeypatch, "log_tcp", "established")
    boundary = await veth.build("sandbox-5eed5eed", 3128, telemetry)
    try:
        way = "print(json.dumps([attempt(lambda: tcp('10.200.0.1', p))[0] for p in (3128, 3129)]))"
        assert inside(boundary, way) == ["connected", "ECONNREFUSED"]
        assert boundary.detail["fence_left_out"] == {"established": "ENOENT", "log_tcp": "ENOENT"}
        assert recorder.lines[-1] == (
            "CONFIG:DEGRADED [MED] Bypass attempts are refused but not all reported: "
            "established ENOENT, log_tcp ENOENT [ns:sandbox-5eed5eed]"
        )
    finally:
        await boundary.close()


async def test_a_kernel_without_nflog_gets_the_fence_and_says_so(
    monkeypatch: pytest.MonkeyPatch, recorder: Any, telemetry: Any
) -> None:
    """Where the log cannot be opened the rung stands and says that attempts go unreported. (The errno is made up: the
    namespace is new, so nothing in it can refuse the socket for us.)"""

    def refused(group: int) -> None:
        raise OSError(111, os.strerror(111))

    monkeypatch.setattr(bypass, "open_log", refused)
    boundary = await veth.build("sandbox-5eed5eed", 3128, telemetry)
    await boundary.close()
    assert boundary.detail["bypass_monitor"] == "off: ECONNREFUSED"
    assert "nflog ECONNREFUSED" in recorder.lines[3]


@pytest.mark.parametrize("rule", ["reject_tcp4", "drop_other", "proxy"])
async def test_without_its_fence_there_is_no_rung(
    monkeypatch: pytest.MonkeyPatch, recorder: Any, telemetry: Any, links: Callable[[], list[str]], rule: str
) -> None:
    """A kernel that refuses one required rule gets no rung at all: an error, an event, and nothing left."""
    with_rule_replaced(monkeypatch, rule)
    with pytest.raises(BoundaryError) as caught:
        await veth.build("sandbox-5eed5eed", 3128, telemetry)
    assert (caught.value.step, caught.value.errno_name) == ("fence", "ENOENT")
    assert f"NFT_MSG_NEWRULE {rule}" in caught.value.message
    assert recorder.lines[-1].startswith("CONFIG:FAILED [MED] Failed to install bypass detection rules")
    assert links() == ["lo"]


# Builds the rung with a workload of its own in it, says so, and waits to be killed.
VICTIM = """
import asyncio, os, subprocess, sys
from openshell_supervisor.boundary import veth
print("importing", flush=True)
async def main():
    boundary = await veth.build(f"sandbox-{os.getpid():08x}", 3128, None)
    print("built", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_sigkill_at_any_moment_leaves_nothing(links: Callable[[], list[str]]) -> None:
    """Twenty supervisors killed between their first step and long after their last: no link stays."""
    moments = random.Random(7)
    for turn in range(20):
        victim = subprocess.Popen([sys.executable, "-c", VICTIM], stdout=subprocess.PIPE)
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"importing\n"
        if turn % 4 == 3:
            assert victim.stdout.readline() == b"built\n"
        else:
            time.sleep(moments.uniform(0, 0.025))
        victim.send_signal(signal.SIGKILL)
        victim.wait(timeout=10)
        victim.stdout.close()
    deadline = time.monotonic() + 5
    while links() != ["lo"]:
        assert time.monotonic() < deadline, links()
        time.sleep(0.02)


def test_nothing_is_mounted_or_named() -> None:
    """The namespace has no name: /run/netns and the mount table are as before while a rung stands."""
    mounts = pathlib.Path("/proc/self/mountinfo").read_text()
    names = sorted(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else None
    victim = subprocess.Popen([sys.executable, "-c", VICTIM], stdout=subprocess.PIPE)
    try:
        assert victim.stdout is not None
        assert [victim.stdout.readline() for _ in range(2)] == [b"importing\n", b"built\n"]
        assert pathlib.Path(f"/proc/{victim.pid}/mountinfo").read_text() == mounts
        assert (sorted(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else None) == names
    finally:
        victim.kill()
        victim.wait()
        victim.stdout and victim.stdout.close()
