"""Every right of every ABI up to this kernel's, by a child that restricts itself and tries, as root and as a plain user.

Each right is tried in three places with the same files: one that is writable, one that is readable and one that no rule names.
A right that the ABI has is refused where it was not granted; one that it lacks is not refused anywhere, which shows that the
refusals come from Landlock.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable

import pytest

import hosts
from openshell_supervisor.confine import landlock, landlock_abi

ABI = landlock.support().abi
pytestmark = pytest.mark.skipif(ABI == 0, reason="needs Landlock in the kernel")
ABIS = range(1, min(ABI, landlock_abi.KNOWN_ABI) + 1)
ZONES = ("ro", "rw", "out")
RIGHTS = {name.lower(): since for since, names in landlock_abi.FILE_RIGHTS.items() for name in names}
IN_TREES = [name for name in RIGHTS if name != "ioctl_dev"]
READ_ONLY = {name.lower() for name in landlock_abi.READ_ONLY}

# As whom the child runs: as we are, or from root as a user without any privilege.
USERS = [
    pytest.param(None, id="same-user"),
    pytest.param(hosts.THROWAWAY_UID, id="plain-user", marks=pytest.mark.root),
]


def expected(right: str, zone: str, abi: int, capable: bool) -> str:
    """What the kernel answers: EACCES for Landlock, EPERM for a plain user's device, EXDEV for ABI 1's fixed rule."""
    if right == "refer" and abi < RIGHTS["refer"]:
        return "EXDEV" if zone == "rw" else "EACCES"
    if RIGHTS[right] <= abi and zone != "rw" and not (zone == "ro" and right in READ_ONLY):
        return "EACCES"
    return "EPERM" if right == "make_block" and not capable else "ok"


@pytest.mark.parametrize("uid", USERS)
@pytest.mark.parametrize("abi", ABIS)
def test_every_right_of_an_abi_in_every_place(
    abi: int, uid: int | None, landlock_try: Callable, landlock_zones: Callable, landlock_rules: Callable
) -> None:
    """A right is refused exactly where the ABI has it and no rule grants it."""
    root = landlock_zones(uid)
    tries = [(right, zone) for zone in ZONES for right in IN_TREES]
    with landlock.build(landlock_rules(root), limit_abi=abi) as ruleset:
        assert ruleset.abi == abi
        seen = landlock_try(ruleset, *((right, str(root / zone)) for right, zone in tries), uid=uid)
    capable = uid is None and os.geteuid() == 0
    wrong = {
        (right, zone): (answer, expected(right, zone, abi, capable))
        for (right, zone), answer in zip(tries, seen, strict=True)
        if answer != expected(right, zone, abi, capable)
    }
    assert not wrong, f"(seen, expected) {wrong}"


def test_without_a_ruleset_all_of_it_works(landlock_try: Callable, landlock_zones: Callable) -> None:
    """The same tries in the same places succeed in a child that restricts nothing; only the rules make the difference."""
    root = landlock_zones()
    seen = landlock_try(None, *((right, str(root / zone)) for zone in ZONES for right in IN_TREES))
    assert set(seen) <= {"ok"} | ({"EPERM"} if os.geteuid() else set())


@pytest.mark.parametrize("abi", ABIS)
def test_a_rename_within_a_directory_needs_no_refer(
    abi: int, landlock_try: Callable, landlock_zones: Callable, landlock_rules: Callable
) -> None:
    """With any ABI, a file in a writable directory may change its name, and one in a read-only directory may not."""
    root = landlock_zones()
    with landlock.build(landlock_rules(root), limit_abi=abi) as ruleset:
        assert landlock_try(ruleset, ("rename", str(root / "rw")), ("rename", str(root / "ro"))) == ["ok", "EACCES"]


@pytest.mark.parametrize("uid", USERS)
@pytest.mark.parametrize("abi", ABIS)
def test_device_ioctls(
    abi: int, uid: int | None, landlock_try: Callable, landlock_zones: Callable, landlock_rules: Callable
) -> None:
    """From ABI 5 an ioctl works on a device that is writable and not on one that may only be read."""
    rules = landlock_rules(landlock_zones())
    rules = landlock.Rules((*rules.read_only, "/dev/urandom"), (*rules.read_write, "/dev/random"))
    with landlock.build(rules, limit_abi=abi) as ruleset:
        seen = landlock_try(ruleset, ("ioctl_dev", "/dev/random"), ("ioctl_dev", "/dev/urandom"), uid=uid)
    assert seen == ["ok", "EACCES" if abi >= RIGHTS["ioctl_dev"] else "ok"]


@pytest.mark.parametrize("abi", ABIS)
def test_tcp_ports(abi: int, landlock_try: Callable, landlock_zones: Callable, landlock_rules: Callable) -> None:
    """From ABI 4 connect and bind reach the ports that were named; before it the ruleset says that they are not mediated."""
    with socket.create_server(("127.0.0.1", 0)) as named, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [end.getsockname()[1] for end in (named, other)]
        free = [_free_port(), _free_port()]
        rules = landlock_rules(landlock_zones(), connect_ports=(ports[0],), bind_ports=(free[0],))
        with landlock.build(rules, limit_abi=abi) as ruleset:
            tries = [*(("connect", port) for port in ports), *(("bind", port) for port in free), ("bind", 0)]
            seen = landlock_try(ruleset, *tries)
            missing = {"bind_tcp", "connect_tcp"} & set(ruleset.missing_rights)
    if abi < landlock_abi.NET_ABI:
        assert (seen, missing) == (["ok"] * 5, {"bind_tcp", "connect_tcp"})
    else:
        assert (seen, missing) == (["ok", "EACCES", "ok", "EACCES", "EACCES"], set())


@pytest.mark.skipif(landlock_abi.NET_ABI > ABI, reason="needs Landlock ABI 4 in the kernel")
def test_ports_that_are_none_and_ports_that_are_not_asked_for(
    landlock_try: Callable, landlock_zones: Callable, landlock_rules: Callable
) -> None:
    """An empty tuple allows no port; None leaves that side of the network alone, and nothing is missing then."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        tries = (("connect", server.getsockname()[1]), ("bind", 0))
        for fields, answers in (
            ({"connect_ports": ()}, ["EACCES", "ok"]),
            ({"bind_ports": ()}, ["ok", "EACCES"]),
            ({"bind_ports": (0,)}, ["ok", "ok"]),
            ({}, ["ok", "ok"]),
        ):
            with landlock.build(landlock_rules(landlock_zones(), **fields)) as ruleset:
                assert landlock_try(ruleset, *tries) == answers, fields
                assert ruleset.missing_rights == ()


@pytest.mark.parametrize("uid", USERS)
@pytest.mark.parametrize("abi", ABIS)
def test_scopes(
    abi: int, uid: int | None, landlock_try: Callable, landlock_zones: Callable, landlock_rules: Callable
) -> None:
    """From ABI 6 signals and abstract sockets outside are out of reach, those inside are not; a named socket is no scope's."""
    root = landlock_zones(uid)
    name, path = f"oss-landlock-{os.getpid()}-{abi}", str(root / "out" / "socket")
    target = subprocess.Popen(["sleep", "30"], user=uid)
    try:
        with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as named:
            abstract.bind("\0" + name)
            abstract.listen()
            named.bind(path)
            named.listen()
            os.chmod(path, 0o666)
            with landlock.build(landlock_rules(root), limit_abi=abi) as ruleset:
                tries = [
                    ("abstract", name),
                    ("signal", target.pid),
                    ("abstract_inside",),
                    ("signal_inside",),
                    ("pathname", path),
                ]
                seen = landlock_try(ruleset, *tries, uid=uid)
                missing = ruleset.missing_rights
    finally:
        target.kill()
        target.wait()
    scoped = abi >= landlock_abi.SCOPE_ABI
    assert seen == [*(["EPERM" if scoped else "ok"] * 2), "ok", "ok", "ok"]
    assert ({"abstract_unix_socket", "signal"} <= set(missing)) is not scoped


def test_scopes_can_be_left_off(landlock_try: Callable, landlock_zones: Callable, landlock_rules: Callable) -> None:
    """With `scopes` off a process outside can be signalled, and nothing is reported as missing."""
    with landlock.build(landlock_rules(landlock_zones(), scopes=False)) as ruleset:
        assert landlock_try(ruleset, ("signal", os.getpid())) == ["ok"]
        assert ruleset.scopes == 0
        assert not {"signal", "abstract_unix_socket"} & set(ruleset.missing_rights)


def _free_port() -> int:
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return int(end.getsockname()[1])
