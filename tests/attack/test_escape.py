"""Every way out of every enforcing rung, tried by a workload for which each of them would have led somewhere.

One fight per rung (see arena.py), many questions about it. What a witness outside received counts for more than what the
attacker believes.
"""

from __future__ import annotations

import functools
from typing import Any

import arena
import pytest

pytestmark = pytest.mark.root
RUNGS = list(arena.RUNGS)
EXPECTED_RUNG = {"veth": "veth", "netns": "loopback", "userns": "loopback", "userns, own user": "loopback"}
# A network namespace holds no pathname socket: the file's mode does (docs/threats.md). 0666 is an open door by its owner's will.
COVERED = {"path socket 0600": "ECONNREFUSED", "path socket 0666": "ECONNREFUSED"}
WAYS = [
    *("tcp", "tcp, any address", "tcp, loopback", "tcp6, loopback", "tcp6", "tcp6, mapped", "metadata", "fast open"),
    *("tcp, proxy host", "dns tcp", "dns udp", "dns tcp, proxy host", "dns udp, proxy host"),
    *("udp", "udp, proxy host", "udp6", "abstract stream", "abstract datagram"),
]
OPTIONAL_WAYS = [f"{name}{where}" for name in ("mptcp", "sctp", "udplite") for where in ("", ", proxy host")]
POWERS = [
    *("raw icmp", "raw ip", "raw6", "packet", "xdp", "ping", "ping, proxy host"),
    *("netlink route", "netlink link", "nftables"),
]


@functools.cache
def fought(rung: str) -> dict[str, Any]:
    """One fight per rung and session."""
    report = arena.fight(rung)
    assert report["inside"] is not None, report["stderr"]
    return report


def answers(rung: str) -> dict[str, str]:
    """What the attacker got, by attempt."""
    found: dict[str, str] = fought(rung)["inside"]["answers"]
    return found


@pytest.mark.parametrize("rung", RUNGS)
def test_the_fight_was_fair(rung: str) -> None:
    """The rung is the one meant, the statement promises it, the proxy answers inside, and every destination answers outside."""
    report = fought(rung)
    assert report["statement"]["network_mode"]["rung"] == EXPECTED_RUNG[rung]
    assert report["statement"]["layers"][0]["state"] == "enforced"
    assert report["inside"]["proxy"].startswith("HTTP/1.1 403")
    ways = {name: answer for name, answer in report["control"].items() if not name.startswith("neighbour: setns")}
    assert set(ways.values()) == {"opened"}, ways
    assert set(WAYS) < set(ways)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rung", RUNGS)
def test_no_destination_is_reached(rung: str, way: str) -> None:
    """A destination that answers outside does not answer inside, and never saw the attempt's token."""
    assert answers(rung)[way] not in ("opened", "silence")
    assert f"token of {way}" not in fought(rung)["seen"]


@pytest.mark.parametrize("rung", RUNGS)
def test_no_other_transport_reaches_out(rung: str) -> None:
    """The same for MPTCP, SCTP and UDP-Lite, as far as this kernel has them (outside as inside)."""
    mine = {name: answer for name, answer in answers(rung).items() if name in OPTIONAL_WAYS}
    assert set(mine) == set(OPTIONAL_WAYS) & set(fought(rung)["control"])
    assert not [name for name, answer in mine.items() if answer in ("opened", "silence")]
    assert not [name for name in mine if f"token of {name}" in fought(rung)["seen"]]


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("rung", RUNGS)
def test_no_socket_goes_round_the_stack(rung: str, power: str) -> None:
    """Raw, packet and ping sockets, and changes by netlink, are refused by the kernel."""
    assert answers(rung)[power] in ("EPERM", "EACCES", "EAFNOSUPPORT", "EPROTONOSUPPORT", "EHOSTUNREACH")


@pytest.mark.parametrize("rung", RUNGS)
def test_vsock(rung: str) -> None:
    """A vsock port that is taken outside cannot be seen from inside, or the statement says that it can."""
    told = str(fought(rung)["statement"]["layers"][0])
    shared = answers(rung).get("vsock", "no such family in this kernel") == "opened"
    assert not shared or "vsock" in told, "shared with the outside, and the statement is silent"


@pytest.mark.parametrize("rung", RUNGS)
def test_pathname_sockets_outside_are_closed(rung: str) -> None:
    """What a network namespace does not cover mounts cover: a 0600 socket of another user is closed, and a 0666 one too."""
    assert {name: answers(rung)[name] for name in COVERED} == COVERED


@pytest.mark.parametrize("victim", ["supervisor", "guard", "pid 1", "neighbour"])
@pytest.mark.parametrize("rung", RUNGS)
def test_processes_outside_are_out_of_reach(rung: str, victim: str) -> None:
    """/proc, ptrace, process_vm_readv, pidfd_getfd and setns fail on every process outside, of whatever uid."""
    mine = {name: answer for name, answer in answers(rung).items() if name.startswith(f"{victim}:")}
    assert len(mine) >= 15
    opened = sorted(name for name, answer in mine.items() if answer == "opened")
    assert not opened
    assert victim != "neighbour" or "token of stolen socket" not in fought(rung)["seen"]


@pytest.mark.parametrize("rung", RUNGS)
def test_nested_namespaces_win_nothing(rung: str) -> None:
    """Root of a namespace of one's own has no power over the sandbox's network, and a fresh network leads nowhere."""
    mine = {name: answer for name, answer in answers(rung).items() if name.startswith("nested:")}
    assert len(mine) == 8
    assert mine.pop("nested: fresh namespace") in ("nothing", "EPERM", "ENOSPC")
    assert not [name for name, answer in mine.items() if answer not in ("EPERM", "EACCES", "ENOSPC", "EINVAL")], mine


@pytest.mark.parametrize("rung", RUNGS)
def test_no_privilege_is_left(rung: str) -> None:
    """No capability in any set, no way back to root, no core dump, no kernel knob, no character for an outer terminal."""
    got = answers(rung)
    assert got["namespace"] == "own"
    assert got["capabilities"] == "none"
    assert got["core size"] == "none"
    assert got["set-uid program"] in ("harmless", "no set-uid program here")
    refused = ("setuid(0)", "setgid(0)", "setgroups", "sysctl core_pattern", "sysctl ip_forward", "tiocsti")
    assert not [name for name in refused if got[name] == "opened"]


@pytest.mark.parametrize("rung", RUNGS)
def test_nothing_is_inherited(rung: str) -> None:
    """Descriptors 0 to 2 and nothing else."""
    assert fought(rung)["inside"]["possessions"]["descriptors"] == []
