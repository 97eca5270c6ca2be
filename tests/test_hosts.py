"""The poorer hosts of hosts.py are real: the kernel refuses there what it grants without them."""

from __future__ import annotations

import errno
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

import hosts

# Prints the errno name ("OK" for none) of one call made through libc.
CALL = """
import ctypes, errno, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    ctypes.set_errno(0)
    print("OK" if getattr(libc, name)(*args) >= 0 else errno.errorcode[ctypes.get_errno()])
"""
NEWNET, NEWUSER_NEWNET = "call('unshare', 0x40000000)", "call('unshare', 0x50000000)"


def probe(code: str) -> list[str]:
    return [sys.executable, "-I", "-c", CALL + code]


def answer(argv: list[str]) -> str:
    done = hosts.run(argv)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_throwaway_user_has_no_identity_of_ours(
    unprivileged: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """An unprivileged command runs without root's uid, groups or capabilities, in a home that it may write to."""
    done = unprivileged(["sh", "-c", "id -u; id -G; grep CapEff /proc/self/status; touch $HOME/x && pwd && echo $HOME"])
    uid, groups, caps, cwd, home = done.stdout.splitlines()
    assert uid != "0" and "0" not in groups.split()
    assert int(caps.split()[1], 16) == 0
    assert cwd == home


def test_an_unprivileged_user_may_not_unshare_but_may_in_a_user_namespace() -> None:
    """The kernel refuses a bare CLONE_NEWNET to the throw-away user and grants it inside a user namespace."""
    assert answer(hosts.unprivileged(probe(NEWNET))) == "EPERM"
    assert answer(hosts.unprivileged(probe(NEWUSER_NEWNET))) == "OK"


@pytest.mark.root
def test_root_may_unshare_without_a_wrapper() -> None:
    """The control: what the wrappers below take away is there before."""
    assert answer(probe(NEWNET)) == "OK"
    assert answer(probe("call('unshare', 0x20000)")) == "OK"


@pytest.mark.root
@pytest.mark.parametrize(("caps", "newnet"), [(("sys_admin",), "EPERM"), (("all",), "EPERM"), (("net_admin",), "OK")])
def test_a_dropped_capability_is_gone(caps: tuple[str, ...], newnet: str) -> None:
    """Root without CAP_SYS_ADMIN may not unshare; CAP_NET_ADMIN alone makes no difference to that."""
    assert answer(hosts.without_caps(probe(NEWNET), *caps)) == newnet


@pytest.mark.root
def test_all_capabilities_dropped_leaves_none_and_they_do_not_come_back() -> None:
    """Uid 0 with an empty bounding set has no capability, also after another exec."""
    done = hosts.run(hosts.without_caps(["sh", "-c", "id -u; exec grep -E 'Cap(Eff|Prm|Bnd)' /proc/self/status"]))
    uid, *masks = done.stdout.splitlines()
    assert uid == "0"
    assert [int(mask.split()[1], 16) for mask in masks] == [0, 0, 0]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ENOSYS])
def test_outer_seccomp_answers_with_the_errno_that_was_asked(number: int) -> None:
    """The filter decides the errno, and only for the call that it names."""
    command = probe("call('unshare', 0x50000000); call('getpid')")
    assert answer(hosts.outer_seccomp(command, "unshare", answer=number)).split() == [errno.errorcode[number], "OK"]


def test_outer_seccomp_can_refuse_single_flags() -> None:
    """With NEWUSER refused, other flags of the same call still reach the kernel."""
    command = probe("call('unshare', 0x10000000); call('unshare', 0x50000000); call('unshare', 0x400)")
    assert answer(hosts.outer_seccomp(command, "unshare:NEWUSER", answer=errno.EACCES)).split() == [
        "EACCES",
        "EACCES",
        "OK",
    ]


def test_outer_seccomp_can_refuse_a_socket_family() -> None:
    """A rule on the first argument's value: AF_NETLINK (16) is refused, AF_UNIX (1) is not."""
    command = probe("call('socket', 16, 3, 0); call('socket', 1, 1, 0)")
    assert answer(hosts.outer_seccomp(command, "socket=16")).split() == ["EPERM", "OK"]


@pytest.mark.root
def test_outer_seccomp_and_a_change_of_user_nest() -> None:
    """The filter stays across the change of user, and for root it leaves no_new_privs off."""
    command = ["sh", "-c", "unshare --user --net true; grep NoNewPrivs /proc/self/status"]
    done = hosts.run(hosts.outer_seccomp(hosts.unprivileged(command), "unshare"))
    assert "Operation not permitted" in done.stderr
    assert done.stdout.split() == ["NoNewPrivs:", "0"]


@pytest.mark.root
def test_mounts_and_setns_can_be_refused() -> None:
    """With MOUNT_CALLS and setns refused, what root could do a moment ago answers EPERM."""
    attempts = probe(
        "call('mount', b't', b'/mnt', b'tmpfs', 0, None); call('setns', os.open('/proc/self/ns/net', 0), 0)"
    )
    assert answer(["unshare", "--mount", *attempts]).split() == ["OK", "OK"]
    refused = hosts.outer_seccomp(attempts, "setns", *hosts.MOUNT_CALLS)
    assert answer(["unshare", "--mount", *refused]).split() == ["EPERM", "EPERM"]


def test_userns_off_is_refused_by_the_kernel_and_leaves_the_machine_alone() -> None:
    """No user or network namespace is to be had and no capability is left; the machine's own limit stays."""
    limit = pathlib.Path("/proc/sys/user/max_user_namespaces")
    before = limit.read_text()
    assert answer(hosts.userns_off(probe(f"{NEWUSER_NEWNET}; {NEWNET}"))).split() == ["ENOSPC", "EPERM"]
    assert limit.read_text() == before
    done = hosts.run(hosts.userns_off(["sh", "-c", "id -u; grep CapEff /proc/self/status"]))
    assert done.stdout.split() == [str(hosts.THROWAWAY_UID if os.geteuid() == 0 else os.getuid()), "CapEff:", "0" * 16]
