"""Which rung each kind of host gets, and what the statement says of it. Every refusal is the kernel's own."""

from __future__ import annotations

import errno
import pathlib
import sys

import product
import pytest

import hosts

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "telemetry"))
from schema import assert_valid

PLAIN = None
HOSTS = {
    "root": PLAIN,
    "root without CAP_SYS_ADMIN": lambda argv: hosts.without_caps(argv, "sys_admin"),
    "root without CAP_NET_ADMIN": lambda argv: hosts.without_caps(argv, "net_admin"),
    "root without both": lambda argv: hosts.without_caps(argv, "net_admin", "sys_admin"),
    "root without any capability": lambda argv: hosts.without_caps(argv),
    "root, setns refused": lambda argv: hosts.outer_seccomp(argv, "setns"),
    "root, mounts refused": lambda argv: hosts.outer_seccomp(argv, *hosts.MOUNT_CALLS),
    "user": hosts.unprivileged,
    "user, setns and mounts refused": lambda argv: hosts.unprivileged(
        hosts.outer_seccomp(argv, "setns", *hosts.MOUNT_CALLS)
    ),
    "user, user namespaces off": hosts.userns_off,
    "user, unshare refused": lambda argv: hosts.unprivileged(hosts.outer_seccomp(argv, "unshare")),
    "root, unshare refused": lambda argv: hosts.outer_seccomp(argv, "unshare"),
    "root, unshare unknown (gVisor)": lambda argv: hosts.outer_seccomp(argv, "unshare", answer=errno.EINVAL),
}
# (host, rung in auto, errno of the network layer when it is degraded)
EXPECTED = [
    ("root", "veth", None),
    ("root without CAP_SYS_ADMIN", "loopback", None),
    ("root without CAP_NET_ADMIN", "loopback", None),
    ("root without both", "loopback", None),
    ("root without any capability", "loopback", None),
    ("root, setns refused", "loopback", None),
    ("root, mounts refused", "veth", None),
    ("user", "loopback", None),
    ("user, setns and mounts refused", "loopback", None),
    ("user, user namespaces off", "observed", "ENOSPC"),
    ("user, unshare refused", "observed", "EPERM"),
    ("root, unshare refused", "observed", "EPERM"),
    ("root, unshare unknown (gVisor)", "observed", "EINVAL"),
]
# Inside: nothing on the way out, and no capability left.
LOOK = """
grep -h CapEff /proc/self/status
curl -sS -m 3 --noproxy '*' http://198.51.100.1/ 2>&1
curl -s -m 5 -o /dev/null -w '%{http_code}' http://198.51.100.1/
"""


@pytest.mark.root
@pytest.mark.parametrize(("host", "rung", "number"), EXPECTED, ids=[row[0] for row in EXPECTED])
def test_auto_takes_the_strongest_rung(host: str, rung: str, number: str | None) -> None:
    """`auto` starts everywhere, takes the strongest rung of the host, and calls it enforced only where a probe held."""
    ran = product.run(["sh", "-c", LOOK], wrap=HOSTS[host], options=["--network-mode", "auto"])
    assert ran.code == 0, ran.err
    assert ran.rung == rung, ran.err
    network = ran.layer("network")
    assert "CapEff:\t0000000000000000" in ran.out
    if rung == "observed":
        assert (network["state"], network["errno"]) == ("degraded", number)
        assert (ran.statement or {})["egress"] == "observe"
        assert len(ran.lines("CONFIG:DEGRADED [MED]")) >= 1
        assert ran.lines('FINDING:LOGGED [HIGH] "Egress Enforcement Unavailable"')
    else:
        assert network["state"] == "enforced"
        assert network["detail"]["probed"] is True
        assert network["detail"]["canaries"] >= 4
        assert "Failed to connect" in ran.out
        assert ran.out.endswith("403"), "the proxy must be reachable and deny"
        assert not ran.lines("CONFIG:DEGRADED [MED] Network isolation")
    for event in ran.events:
        assert_valid(event)


@pytest.mark.root
@pytest.mark.parametrize("host", ["user, user namespaces off", "root, unshare refused"])
@pytest.mark.parametrize("options", [["--network-mode", "isolated"], ["--egress", "enforce"], ["--require", "network"]])
def test_what_cannot_be_had_is_refused_when_demanded(host: str, options: list[str]) -> None:
    """`isolated`, an explicit `--egress enforce` and `--require network` never start a workload without a boundary."""
    ran = product.run(["sh", "-c", "echo STARTED"], wrap=HOSTS[host], options=options)
    assert ran.code == 1
    assert "STARTED" not in ran.out
    assert "hint:" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.root
@pytest.mark.parametrize("host", ["root", "user"])
def test_host_mode_observes_as_asked(host: str) -> None:
    """`host` lets the denied request through, logs it as observed with its reason, and says so in the statement."""
    ran = product.run(["sh", "-c", "exit 5"], wrap=HOSTS[host], options=["--host-network"])
    assert ran.code == 5, ran.err
    assert ran.rung == "observed"
    assert ran.layer("network")["state"] == "off"
    assert ran.lines("CONFIG:DEGRADED [MED] Network isolation degraded")


@pytest.mark.root
@pytest.mark.skipif(not pathlib.Path("/dev/vsock").exists(), reason="needs the host program vsock in the kernel")
def test_a_way_that_no_namespace_holds_is_not_called_enforced() -> None:
    """Where the host refuses the filter, AF_VSOCK stays open beside the network namespace: the statement says so."""
    options = ["--declare-external", "syscalls"]  # else the start is refused, because the workload's filters fail too
    ran = product.run(["true"], options=options, wrap=lambda argv: hosts.outer_seccomp(argv, "prctl=22"))
    network = ran.layer("network")
    assert network["state"] == "degraded", ran.err
    assert "AF_VSOCK" in network["reason"]


@pytest.mark.root
def test_observe_behind_a_boundary_is_not_called_enforced() -> None:
    """`--egress observe` behind an isolating rung reads `off`: a proxy that lets everything pass enforces nothing."""
    ran = product.run(["true"], options=["--egress", "observe"])
    assert ran.rung == "veth"
    assert ran.layer("network")["state"] == "off"


@pytest.mark.root
@pytest.mark.parametrize("host", ["root", "user", "root without any capability"])
def test_privileges_are_stated_as_verified(host: str) -> None:
    """The privileges layer is enforced only for a workload that is not root."""
    ran = product.run(["sh", "-c", "id -u"], wrap=HOSTS[host])
    layer = ran.layer("privileges")
    assert layer["detail"]["no_new_privs"] is True
    if host == "root without any capability":
        assert layer["state"] == "degraded"
    else:
        assert layer["state"] == "enforced"
        assert int(ran.out) != 0
