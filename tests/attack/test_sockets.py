"""A program outside that listens on a path: its socket asks for the file's mode alone, so the path is covered up inside."""

from __future__ import annotations

import pathlib
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import product
import pytest

import hosts

Wrap = Callable[[Sequence[str]], list[str]]
CONNECT = """
import socket, sys
try:
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect(sys.argv[1])
    print("connected")
except OSError as error:
    print(error.errno)
"""
BARE = "version: 1\nnetwork_policies: {}\n"
AS = pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(list, id="root", marks=pytest.mark.root),
        pytest.param(lambda argv: hosts.without_caps(argv, "sys_admin"), id="userns", marks=pytest.mark.root),
        pytest.param(hosts.unprivileged, id="user"),
    ],
)


@pytest.fixture
def bus() -> Iterator[pathlib.Path]:
    """A socket that every user may connect to, where a path is short enough for one (unix(7): 108 bytes)."""
    place = pathlib.Path(tempfile.mkdtemp(prefix="oss-bus-", dir="/tmp"))
    place.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(place / "bus"))
        (place / "bus").chmod(0o777)
        server.listen(8)
        yield place / "bus"
    shutil.rmtree(place)


def connecting(bus: pathlib.Path) -> list[str]:
    """A workload that tries."""
    return [sys.executable, "-I", "-c", CONNECT, str(bus)]


@AS
def test_it_is_covered_and_stays_what_it_was_outside(bus: pathlib.Path, wrap: Wrap) -> None:
    """Refused inside, said in an event, and untouched for everybody else."""
    ran = product.run(connecting(bus), policy=BARE, options=["--network-mode", "isolated"], wrap=wrap)
    assert ran.out.strip() == "111", ran.err  # ECONNREFUSED
    assert ran.layer("network")["state"] == "enforced"
    assert "CONFIG:COVERED" in ran.err
    assert hosts.run(wrap(connecting(bus))).stdout.strip() == "connected"


@AS
def test_a_policy_can_name_it(bus: pathlib.Path, wrap: Wrap) -> None:
    """A path in the file rules is the operator's word: it stays in reach."""
    policy = f"version: 1\nfilesystem_policy: {{read_write: ['{bus}']}}\nnetwork_policies: {{}}\n"
    options = ["--network-mode", "isolated", "--declare-external", "filesystem"]  # the interpreter is in no rule
    ran = product.run(connecting(bus), policy=policy, options=options, wrap=wrap)
    assert ran.out.strip() == "connected", ran.err


@pytest.mark.root
def test_where_it_cannot_be_covered_nothing_is_called_enforced(bus: pathlib.Path) -> None:
    """A host that refuses mounts leaves it in reach: the statement names the way, and `--require network` starts nothing."""
    wrap: Wrap = lambda argv: hosts.outer_seccomp(argv, "mount")  # noqa: E731
    ran = product.run(connecting(bus), policy=BARE, wrap=wrap)
    assert ran.out.strip() == "connected", ran.err
    network = ran.layer("network")
    assert network["state"] == "degraded"
    assert str(bus) in network["reason"]
    refused = product.run(connecting(bus), policy=BARE, options=["--require", "network"], wrap=wrap)
    assert (refused.code, refused.out) == (1, "")


def test_host_mode_covers_nothing(bus: pathlib.Path) -> None:
    """Where no boundary was asked for, none is there, and none is claimed."""
    ran = product.run(connecting(bus), policy=BARE, options=["--network-mode", "host"])
    assert ran.out.strip() == "connected", ran.err
    assert "CONFIG:COVERED" not in ran.err


def test_a_socket_that_the_user_may_not_use_is_no_gap(bus: pathlib.Path) -> None:
    """Its mode holds already: neither a mount nor a word is needed for the layer to hold."""
    bus.chmod(0o600)
    ran = product.run(connecting(bus), policy=BARE, wrap=hosts.unprivileged)
    assert ran.out.strip() != "connected"
    assert ran.layer("network")["state"] == "enforced", ran.err
