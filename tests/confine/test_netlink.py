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

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "e2e"))  # so that `import product` works

import product

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


# S3-01: what each value of the variable means.
VALUES = {None: REFUSED, "": REFUSED, "0": REFUSED, "no": REFUSED, "on": REFUSED, "routes": REFUSED, "2": REFUSED}
VALUES |= {"1": ALL, "true": ALL, "yes": ALL, "TRUE": ALL, "Yes": ALL, "route": ROUTE_ONLY, "ROUTE": ROUTE_ONLY}
VARIABLE = "OPENSHELL_ALLOW_NETLINK_ENUMERATE"


def inside(argv: Sequence[str], value: str | None, policy: str = product.DENY_ALL, wrap: Any = None) -> dict[str, Any]:
    """What the program printed as the product's workload; the layer must be enforced, which the self-probe decides."""
    ran = product.run(argv, policy=policy, env={} if value is None else {VARIABLE: value}, wrap=wrap)
    assert ran.code == 0, ran.err
    assert ran.layer("syscalls")["state"] == "enforced"
    found: dict[str, Any] = json.loads(ran.out)
    return found


def assert_follows(answer: dict[str, Any], way: dict[str, int]) -> None:
    """The list of interfaces and the protocols are those of this way, and the other families stay closed."""
    interfaces = answer.pop("interfaces")
    assert interfaces == errno.EPERM if way is REFUSED else "lo" in interfaces
    if answer:
        assert answer == way | ALWAYS_REFUSED | ALWAYS_ALLOWED


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("program", ["c"], indirect=True)
def test_the_variable_decides_end_to_end(program: list[str], value: str | None) -> None:
    """S3-01 to S3-04: off by default and for every other value; 1, true and yes in any case drop the rule; route is finer."""
    assert_follows(inside(program, value), VALUES[value])


@pytest.mark.parametrize("value", [None, "1", "route"])
@pytest.mark.parametrize("program", ["python", "node"], indirect=True)
def test_languages_end_to_end(program: list[str], value: str | None) -> None:
    """S3-05: os.networkInterfaces() and socket.if_nameindex() work opted in, and say EPERM otherwise."""
    assert_follows(inside(program, value), VALUES[value])


@pytest.mark.parametrize("value", [None, "route"])
@pytest.mark.parametrize("program", ["c"], indirect=True)
def test_an_unprivileged_supervisor_end_to_end(program: list[str], value: str | None) -> None:
    """The same where the supervisor is a plain user without capabilities."""
    assert_follows(inside(program, value, wrap=hosts.unprivileged), VALUES[value])


@pytest.mark.parametrize(
    ("field", "value", "way"),
    [
        ("true", None, ALL),
        ("route", None, ROUTE_ONLY),
        ("false", None, REFUSED),
        ("true", "", ALL),
        ("true", "0", REFUSED),
        ("false", "route", ROUTE_ONLY),
        ("route", "1", ALL),
    ],
)
@pytest.mark.parametrize("program", ["c"], indirect=True)
def test_the_policy_may_say_it_and_the_variable_is_stronger(
    program: list[str], field: str, value: str | None, way: dict[str, int]
) -> None:
    """S3-08: `network.allow_netlink`; the variable, when it is set and not empty, decides over it in both directions."""
    policy = f"{product.DENY_ALL}network: {{allow_netlink: {field}}}\n"
    assert_follows(inside(program, value, policy), way)
