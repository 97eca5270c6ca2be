"""The netlink opt-in, each way, with programs as developers have them: Python, Node and C list the interfaces, or cannot."""

from __future__ import annotations

import errno
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import filtered
import pytest

import hosts
from openshell_supervisor.confine import seccomp
from openshell_supervisor.confine.seccomp import FilterOptions
from openshell_supervisor.policy.model import Netlink

PROGRAMS = pathlib.Path(__file__).with_name("netlink")
LANGUAGES = ("python", "node", "c")
# NETLINK_ROUTE, NETLINK_SOCK_DIAG, NETLINK_KOBJECT_UEVENT: what each way gives.
REFUSED = dict.fromkeys(("AF_NETLINK/0", "AF_NETLINK/4", "AF_NETLINK/15"), errno.EPERM)
ROUTE_ONLY = {**REFUSED, "AF_NETLINK/0": 0}
ALL = dict.fromkeys(REFUSED, 0)
ALWAYS_REFUSED = dict.fromkeys(("AF_PACKET", "AF_BLUETOOTH", "AF_VSOCK", "AF_ALG"), errno.EPERM)
ALWAYS_ALLOWED = dict.fromkeys(("AF_INET", "AF_UNIX"), 0)
WAYS = {Netlink.DENIED: REFUSED, Netlink.ROUTE: ROUTE_ONLY, Netlink.ALLOWED: ALL}

# A network namespace of its own with lo up: its interfaces are known, and packet sockets are to be had there without filters.
ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def alone(argv: Sequence[str]) -> list[str]:
    """`argv` in such a namespace: root in a plain one, anybody else inside a user namespace."""
    if not hosts.missing_for_root_tests():
        return [*ALONE, *argv]
    return ["unshare", "--user", "--map-root-user", *ALONE[1:], *argv]


def user_alone(argv: Sequence[str]) -> list[str]:
    """`argv` as the throw-away user, inside a user namespace of its own."""
    return hosts.unprivileged(["unshare", "--user", "--map-root-user", *ALONE[1:], *argv])


@pytest.fixture(scope="session")
def compiled() -> Iterator[str]:
    """The C program, built in a directory that every user may enter."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="oss-netlink-"))
    directory.chmod(0o755)
    if shutil.which("gcc") is None:
        pytest.skip("needs the host program gcc")
    source, program = str(PROGRAMS / "interfaces.c"), str(directory / "interfaces")
    subprocess.run(["gcc", "-O1", "-Wall", "-Werror", "-o", program, source], check=True)
    yield program
    shutil.rmtree(directory)


@pytest.fixture
def program(request: pytest.FixtureRequest) -> list[str]:
    """The command that lists interfaces in the language of the test's parameter."""
    language = request.param
    if language == "c":
        return [request.getfixturevalue("compiled")]
    if language == "python":
        return [sys.executable, "-I", str(PROGRAMS / "interfaces.py")]
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs the client program node")
    return [node, str(PROGRAMS / "interfaces.js")]


def seen(argv: Sequence[str]) -> dict[str, Any]:
    """What the program printed."""
    done = hosts.run(argv)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("wrap", [alone, user_alone])
@pytest.mark.parametrize("netlink", list(Netlink))
@pytest.mark.parametrize("program", LANGUAGES, indirect=True)
def test_interfaces_are_listed_as_far_as_the_option_goes(wrap: Any, netlink: Netlink, program: list[str]) -> None:
    """Denied: no list (EPERM); route and allowed: lo is listed. The protocols follow, and the other families stay closed."""
    answer = seen(wrap(filtered.under(seccomp.workload_filters(FilterOptions(netlink)), program)))
    interfaces = answer.pop("interfaces")
    assert interfaces == errno.EPERM if netlink is Netlink.DENIED else set(interfaces) == {"lo"}
    if answer:  # Node makes no sockets by family
        assert answer == WAYS[netlink] | ALWAYS_REFUSED | ALWAYS_ALLOWED


@pytest.mark.parametrize("wrap", [alone, user_alone])
@pytest.mark.parametrize("program", LANGUAGES, indirect=True)
def test_without_filters_all_of_it_is_there(wrap: Any, program: list[str]) -> None:
    """The control: the same programs list lo and open netlink and packet sockets; no family is refused with EPERM."""
    answer = seen(wrap(program))
    assert set(answer.pop("interfaces")) == {"lo"}
    if answer:
        assert errno.EPERM not in answer.values()
        assert answer.items() >= (ALL | ALWAYS_ALLOWED | {"AF_PACKET": 0}).items()
