"""Where the workload's packets can go, and whose processes it can see: the launcher enters its namespaces."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from openshell_supervisor.confine.launcher import privileges
from openshell_supervisor.confine.launcher.kernel import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWUSER,
    IFF_UP,
    IFREQ_FLAGS,
    NETLINK_SOCK_DIAG,
    PR_SET_DUMPABLE,
    SIOCGIFFLAGS,
    SIOCSIFFLAGS,
    TYPE_CHECKING,
    StepError,
    call,
    libc,
    prctl,
    step,
    write_file,
)

if TYPE_CHECKING:
    from openshell_supervisor.confine.launcher.kernel import Answer, Request


def netns_inode() -> int:
    """The inode of this process's network namespace: its identity (namespaces(7))."""
    return os.stat("/proc/self/ns/net").st_ino


def enter(request: Request, descriptors: list[int]) -> Answer:
    """Take the place that was promised; answers the namespace's inode, and for "make" the listener and a descriptor of it."""
    how = request["how"]
    if how == "join":
        with step("setns"):
            call("setns", libc.setns, descriptors[0], CLONE_NEWNET)
    answer: dict[str, object] = {}
    passed: list[int] = []
    if how == "make":
        answer["attempts"] = make_namespace(request)
        passed = [listen(request["port"], request["backlog"]), os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)]
    inode = netns_inode()
    expected = request.get("inode")
    if expected is not None and inode != expected:
        raise StepError("verify namespace", 0, f"in namespace {inode}, promised {expected}")
    if how == "make" and inode == request["outside"]:
        raise StepError("verify namespace", 0, "the new namespace is the supervisor's own")
    return {**answer, "inode": inode}, passed


def make_namespace(request: Request) -> list[list[object]]:
    """Make a network namespace with lo up: plainly where the capabilities allow, else inside a user namespace.

    Answers the attempts as [method, step or null, errno or null]. A container may have CAP_SYS_ADMIN without CAP_NET_ADMIN: then
    the namespace is made but lo cannot be raised, and the second way is taken from there.
    """
    try:
        call("unshare(CLONE_NEWNET)", libc.unshare, CLONE_NEWNET)
        raise_loopback()
        return [["netns", None, None]]
    except StepError as error:
        attempts: list[list[object]] = [["netns", error.step, error.errno]]
    attempts += make_user_namespace(request["identity"])
    raise_loopback()
    return attempts


def make_user_namespace(identity: Request) -> list[list[object]]:
    """A user namespace with a network namespace in it, owned by the workload's own identity, and mapping only that.

    The identity is dropped first, so no privileged helper has to write the maps (user_namespaces(7)). Mapping uid 0 needs
    CAP_SETFCAP at the time of unshare (kernel/user_namespace.c, verify_root_map); without it uid 0 stays unmapped, which
    shows it as the overflow uid and takes nothing from the boundary.
    """
    privileges.take_identity(identity)
    uid, gid = os.geteuid(), os.getegid()
    # setresuid made the process non-dumpable, which gives its /proc files to root: the maps could not be written (proc(5)).
    prctl("dumpable", PR_SET_DUMPABLE, 1)
    held = os.getgroups()
    call("unshare(CLONE_NEWUSER|CLONE_NEWNET)", libc.unshare, CLONE_NEWUSER | CLONE_NEWNET)
    libc.unshare(CLONE_NEWIPC)  # as in `separate`
    outcome: list[object] = ["userns", None, None]
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        try:
            write_file(f"/proc/self/{name}", text)
        except OSError as error:
            if name != "uid_map" or uid != 0:
                raise StepError(f"write {name}", error.errno or 0) from None
            privileges.unmapped.append(os.geteuid())
            outcome = ["userns", "write uid_map", error.errno]
    privileges.remember_groups(identity["groups"], held)
    return [outcome]


def raise_loopback() -> None:
    """Set lo up; the kernel then gives it 127.0.0.1/8 and ::1 (netdevice(7)). gVisor's is up, and cannot be set."""
    with step("raise lo"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        name = b"lo"
        flags = struct.unpack(IFREQ_FLAGS, fcntl.ioctl(handle, SIOCGIFFLAGS, struct.pack(IFREQ_FLAGS, name, 0)))[1]
        if not flags & IFF_UP:
            fcntl.ioctl(handle, SIOCSIFFLAGS, struct.pack(IFREQ_FLAGS, name, flags | IFF_UP))


def listen(port: int, backlog: int) -> int:
    """The proxy's listener on 127.0.0.1 of this namespace; the protocol is named because asyncio sets TCP_NODELAY only then."""
    with step("listen"):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(backlog)
        return listener.detach()


def diagnostics(request: Request, descriptors: list[int]) -> Answer:
    """A NETLINK_SOCK_DIAG socket of this namespace, for the supervisor: it tells whose a connection is (sock_diag(7)).

    It is a socket of the place, as the proxy's listener is, so it must be made here; the workload never has it.
    """
    with step("sock_diag"):
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
    return {}, [netlink.detach()]


def separate(request: Request, descriptors: list[int]) -> Answer:
    """A user namespace: without one, a process may take descriptors out of any other of its user (pidfd_getfd(2))."""
    call("unshare(CLONE_NEWUSER)", libc.unshare, CLONE_NEWUSER)
    libc.unshare(CLONE_NEWIPC)  # System V and POSIX queues and segments of its own, where that can be had
    return {}, []
