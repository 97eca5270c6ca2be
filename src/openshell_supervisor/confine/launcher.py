"""The launcher: a single-threaded process that confines itself, step by step, and then becomes the workload.

It is started with an EMPTY environment as `python -I -S -B launcher.py`, with a Unix stream socket to the supervisor as
descriptor 3. It answers one JSON line per request and knows nothing beyond them: no policy, no proxy, no secret but the
workload's own environment. Only the standard library is imported, and all of it before the first restriction, because a late
import can fail once the identity is dropped. Nothing is logged here; every failure goes back by the name of its step.

Requests, in the order of a life (`op` names them):
  enter    where packets can go: "stay", "join" (setns to a passed descriptor) or "make" (a namespace of its own)
  separate a user namespace of its own, whose maps the supervisor then writes
  confine  identity, capabilities, no_new_privs, resource limits; answers what it verified
  probe    try the ways out, and the proxy, as the workload would; answers one errno (or none) per way
  signal   send a signal with the identity of the workload (the supervisor may lack CAP_KILL)
  exec     become the workload; answers only when that failed, because success closes the socket

Answers: {"ok": true, …} or {"ok": false, "step": NAME, "errno": NUMBER, "error": TEXT}.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import termios
import time
import warnings  # noqa: F401  (os.execvpe imports it when called, which is too late)

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, without importing typing: every millisecond here delays the workload
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    Request = dict[str, Any]
    Answer = tuple[dict[str, object], list[int]]

CONTROL_FD = 3
# One request line at most: the kernel's limit for argv + environment is 6 MiB with the default 8 MiB stack (execve(2)), and
# JSON escaping can double it.
MAX_REQUEST_BYTES = 16 * 1024 * 1024

# Kernel constants, each with its header.
CLONE_NEWNS = 0x00020000  # linux/sched.h
CLONE_NEWUSER = 0x10000000  # linux/sched.h
CLONE_NEWNET = 0x40000000  # linux/sched.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h, this one and the next seven
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
LINUX_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
LAST_POSSIBLE_CAP = 63  # two 32-bit words in capset(2)
SECCOMP_MODE_FILTER = 2  # linux/seccomp.h
CLOSE_RANGE_CLOEXEC = 1 << 2  # linux/close_range.h
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC = 1, 32, 4096, 16384  # linux/mount.h
# statvfs(3) flags that a remount in a user namespace must repeat, because they are locked there, with their mount(2) twins.
LOCKED_FLAGS = ((2, 2), (4, 4), (8, 8), (1024, 1024), (2048, 2048), (4096, 1 << 21))
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1  # linux/sockios.h, linux/if.h
IFREQ_FLAGS = "16sh22x"  # struct ifreq is 40 bytes on every 64-bit ABI
NSIG = signal.NSIG

libc = ctypes.CDLL(None, use_errno=True)
unmapped: list[int] = []  # the overflow uid that the kernel shows once uid 0 lives unmapped in a user namespace


class StepError(OSError):
    """A step failed; carries its name, so that the supervisor can say which."""

    def __init__(self, step: str, number: int, text: str = "") -> None:
        super().__init__(number, text or os.strerror(number))
        self.step = step


class step:
    """Context manager that turns an OSError inside it into a StepError of this name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> step:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, StepError):
            raise StepError(self.name, error.errno or 0, error.strerror or str(error)) from None


def call(name: str, function: Callable[..., int], *arguments: object) -> int:
    """One libc call; a result below zero raises StepError(name, errno)."""
    result = function(*arguments)
    if result < 0:
        raise StepError(name, ctypes.get_errno())
    return result


def prctl(name: str, option: int, *arguments: int) -> int:
    """prctl(2) with four unsigned long arguments, as the kernel demands for the options used here."""
    padded = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    return call(name, libc.prctl, option, *padded)


def netns_inode() -> int:
    """The inode of this process's network namespace: its identity (namespaces(7))."""
    return os.stat("/proc/self/ns/net").st_ino


# --- enter -----------------------------------------------------------------------------------------------------------------


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
    take_identity(identity)
    uid, gid = os.geteuid(), os.getegid()
    # setresuid made the process non-dumpable, which gives its /proc files to root: the maps could not be written (proc(5)).
    prctl("dumpable", PR_SET_DUMPABLE, 1)
    call("unshare(CLONE_NEWUSER|CLONE_NEWNET)", libc.unshare, CLONE_NEWUSER | CLONE_NEWNET)
    outcome: list[object] = ["userns", None, None]
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        try:
            write_file(f"/proc/self/{name}", text)
        except OSError as error:
            if name != "uid_map" or uid != 0:
                raise StepError(f"write {name}", error.errno or 0) from None
            unmapped.append(os.geteuid())
            outcome = ["userns", "write uid_map", error.errno]
    return [outcome]


def write_file(path: str, text: str) -> None:
    """One write(2) of the whole text, as the files of /proc want it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def raise_loopback() -> None:
    """Set lo up; the kernel then gives it 127.0.0.1/8 and ::1 (netdevice(7))."""
    with step("raise lo"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        name = b"lo"
        flags = struct.unpack(IFREQ_FLAGS, fcntl.ioctl(handle, SIOCGIFFLAGS, struct.pack(IFREQ_FLAGS, name, 0)))[1]
        fcntl.ioctl(handle, SIOCSIFFLAGS, struct.pack(IFREQ_FLAGS, name, flags | IFF_UP))


def listen(port: int, backlog: int) -> int:
    """The proxy's listener on 127.0.0.1 of this namespace; the protocol is named because asyncio sets TCP_NODELAY only then."""
    with step("listen"):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(backlog)
        return listener.detach()


def separate(request: Request, descriptors: list[int]) -> Answer:
    """A user namespace: without one, a process may take descriptors out of any other of its user (pidfd_getfd(2))."""
    call("unshare(CLONE_NEWUSER)", libc.unshare, CLONE_NEWUSER)
    return {}, []


# --- confine ---------------------------------------------------------------------------------------------------------------


def take_identity(identity: Request) -> None:
    """Become `identity` {uid, gid, groups}; what already fits is not set again, because gVisor and plain users refuse that.

    Order and reason: groups before the user, because a user without CAP_SETGID cannot change them (credentials(7)).
    """
    uid, gid, groups = identity["uid"], identity["gid"], identity["groups"]
    if groups is not None and sorted(os.getgroups()) != sorted(groups):
        with step("setgroups"):
            os.setgroups(groups)
    if os.getresgid() != (gid,) * 3:
        with step("setresgid"):
            os.setresgid(gid, gid, gid)
    if os.getresuid() != (uid,) * 3:
        if uid != 0:
            clear_bounding_set()
        with step("setresuid"):
            os.setresuid(uid, uid, uid)


def clear_bounding_set() -> bool:
    """Drop every capability from the bounding set; answers False where CAP_SETPCAP is missing and something stays."""
    for capability in range(LAST_POSSIBLE_CAP + 1):
        held = libc.prctl(PR_CAPBSET_READ, ctypes.c_ulong(capability), 0, 0, 0) == 1
        if held and libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            return False
    return True


def drop_capabilities() -> bool:
    """Empty the bounding, ambient, effective, permitted and inheritable sets; answers whether the bounding set is empty."""
    bounded = clear_bounding_set()
    prctl("clear ambient set", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0)
    call("capset", libc.capset, ctypes.create_string_buffer(header), ctypes.create_string_buffer(24))
    return bounded


def confine(request: Request, descriptors: list[int]) -> Answer:
    """Take the identity for good and give up every privilege; answers what was verified afterwards, not what was asked."""
    identity = {**request["identity"], **({"uid": unmapped[0]} if unmapped else {})}
    protected = protect(request["read_only"], request["anchors"])
    with step("chdir"):
        stand_anew(request["cwd"], bool(request["read_only"]))
    take_identity(identity)
    bounded = drop_capabilities()
    with step("resource limits"):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if request["open_files"] is not None:  # the supervisor raised its own; the workload gets what it would have had
            resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["open_files"]))
    prctl("no_new_privs", PR_SET_NO_NEW_PRIVS, 1)
    if request.get("die_with_parent"):
        # Cleared by the kernel when credentials change, hence here; checked once, because the parent may be gone by now.
        prctl("parent death signal", PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != request["parent"]:
            raise StepError("parent death signal", 0, "the supervisor is gone")
    facts = verify_privileges(identity, bounded)
    for program in request["filters"]:
        install_filter(bytes.fromhex(program))
    user_namespace = os.stat("/proc/self/ns/user").st_ino
    return {"privileges": facts, "protected": protected, "user_namespace": user_namespace}, []


def install_filter(program: bytes) -> None:
    """Install one BPF program (struct sock_fprog, linux/filter.h). A host that has no filters is found out by the probe."""
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(instructions))
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header), 0, 0)


def stand_anew(wanted: str | None, mounted: bool) -> None:
    """Go to the wanted directory. Without one, and with mounts made, enter the present one again: a mount does not cover the
    directory that a process already stands in. Where it may not be entered, "/" is safe."""
    if wanted:
        os.chdir(wanted)
    elif mounted:
        try:
            os.chdir(os.getcwd())
        except OSError:
            os.chdir("/")


def protect(paths: list[str], anchors: list[str]) -> bool:
    """Make directories read-only in a mount namespace of our own, best effort; True when every one of them is.

    `anchors`, the directories above them, become mount points too: a mount point cannot be renamed away (rename(2), EBUSY).
    """
    paths = [path for path in paths if not os.statvfs(path).f_flag & MS_RDONLY]
    if not paths:
        return True
    if libc.unshare(CLONE_NEWNS) < 0:
        return False
    for path in (*anchors, *paths):
        name = os.fsencode(path)
        if libc.mount(name, name, None, ctypes.c_ulong(MS_BIND | MS_REC), None) < 0:
            return False
    for path in paths:
        flags = sum(twin for flag, twin in LOCKED_FLAGS if os.statvfs(path).f_flag & flag)
        remount = ctypes.c_ulong(MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
        if libc.mount(None, os.fsencode(path), None, remount, None) < 0 or not os.statvfs(path).f_flag & MS_RDONLY:
            return False
    return True


def verify_privileges(identity: Request, bounded: bool) -> dict[str, object]:
    """Facts about this process after the drop, read from /proc and not from the calls, which an outer filter may fake.

    Raises StepError where one of them is not what was promised.
    """
    with step("verify privileges"), open("/proc/self/status") as status:
        facts = {name: value.split() for name, _, value in (line.partition(":") for line in status)}
    uid, gid = str(identity["uid"]), str(identity["gid"])
    if facts["Uid"] != [uid] * 4 or facts["Gid"] != [gid] * 4:
        raise StepError("verify identity", 0, f"running as {facts['Uid']}:{facts['Gid']}, promised {uid}:{gid}")
    wanted = identity["groups"]
    if wanted is not None and sorted(map(int, facts["Groups"])) != sorted(wanted):
        raise StepError("verify groups", 0, f"groups are {facts['Groups']}, promised {wanted}")
    if any(int(facts[name][0], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")):
        raise StepError("verify capabilities", 0, "a capability set is not empty")
    if facts["NoNewPrivs"] != ["1"]:
        raise StepError("verify no_new_privs", 0, "the flag is not set although prctl said so")
    if uid != "0":
        try:
            os.setuid(0)
        except OSError:
            pass
        else:
            if os.geteuid() == 0:
                raise StepError("verify identity", 0, "uid 0 can be taken again")
    return {
        "uid": int(uid),
        "gid": int(gid),
        "groups": [int(group) for group in facts["Groups"]],
        "capabilities": 0,
        "bounding_set_empty": bounded and int(facts["CapBnd"][0], 16) == 0,
        "no_new_privs": True,
    }


# --- probe -----------------------------------------------------------------------------------------------------------------


def probe(request: Request, descriptors: list[int]) -> Answer:
    """Try each way out and the proxy; a way that opened has errno null. Nothing is kept open."""
    return {
        "ways": [{**way, "errno": attempt(way, request["timeout"])} for way in request["ways"]],
        "proxy": ask_proxy(request["proxy"], request["ask"].encode(), request["patience"]),
    }, []


def attempt(way: Request, timeout: float) -> int | None:
    """Try one way {kind: tcp|udp|unix|vsock, address}; None when it opened, else the errno (ETIMEDOUT after `timeout` s).

    For vsock, opening is being able to have such a socket at all: nobody outside is talked to.
    """
    if way["kind"] == "vsock":
        try:
            socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
        except OSError as error:
            return error.errno
        return None
    family = {"unix": socket.AF_UNIX}.get(way["kind"]) or (
        socket.AF_INET6 if ":" in way["address"][0] else socket.AF_INET
    )
    kind = socket.SOCK_DGRAM if way["kind"] == "udp" else socket.SOCK_STREAM
    address = "\0" + way["address"][0] if way["kind"] == "unix" else tuple(way["address"])
    try:
        with socket.socket(family, kind) as client:
            client.settimeout(timeout)
            client.connect(address)
            client.send(way["token"].encode())
            return None
    except TimeoutError:
        return 110  # ETIMEDOUT, errno.h
    except OSError as error:
        return error.errno


def ask_proxy(address: list[object], ask: bytes, patience: float) -> dict[str, object]:
    """Send `ask` to the proxy and return its whole answer as text, or {"errno"}; `patience` in seconds covers its start."""
    try:
        with socket.socket(
            socket.AF_INET, socket.SOCK_STREAM
        ) as client:  # numeric address: no resolver, no late import
            client.settimeout(patience)
            client.connect(tuple(address))
            client.sendall(ask)
            answer = b""
            deadline = time.monotonic() + patience
            while len(answer) < 4096 and time.monotonic() < deadline:  # a probe's answer is a few hundred bytes
                piece = client.recv(4096)
                if not piece:
                    break
                answer += piece
            return {"answer": answer.decode("latin-1"), "errno": None}
    except TimeoutError:
        return {"answer": "", "errno": 110}
    except OSError as error:
        return {"answer": "", "errno": error.errno}


# --- signal and exec -------------------------------------------------------------------------------------------------------


def send_signal(request: Request, descriptors: list[int]) -> Answer:
    """kill(2) to a process group, as the identity taken by an earlier `confine`."""
    with step("kill"):
        os.killpg(request["group"], request["signal"])
    return {}, []


def become(request: Request, descriptors: list[int]) -> Answer:
    """Execute the workload: own session, terminal where asked, default signals, given environment. Returns only by raising."""
    argv, environment = request["argv"], request["env"]
    with step("setsid"):
        if os.getsid(0) != os.getpid():
            os.setsid()
    if request.get("tty"):
        with step("terminal"):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in range(1, NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):  # 32 and 33 belong to libc (signal(7))
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    with step("exec"):
        os.execvpe(argv[0], argv, environment)


OPERATIONS = {
    "enter": enter,
    "separate": separate,
    "confine": confine,
    "probe": probe,
    "signal": send_signal,
    "exec": become,
}


def serve(control: socket.socket) -> NoReturn:
    """Answer requests until the supervisor closes the socket; never returns after a successful `exec`."""
    received, descriptors = b"", list[int]()
    while True:
        while b"\n" not in received:
            data, passed, _, _ = socket.recv_fds(control, 65536, 4, socket.MSG_CMSG_CLOEXEC)  # at most one is sent
            descriptors += passed
            if not data or len(received) > MAX_REQUEST_BYTES:
                os._exit(0)
            received += data
        line, _, received = received.partition(b"\n")
        answer, passed = answer_one(json.loads(line), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        descriptors = []
        socket.send_fds(control, [json.dumps(answer).encode() + b"\n"], passed)
        for descriptor in passed:
            os.close(descriptor)


def answer_one(request: Request, descriptors: list[int]) -> Answer:
    """Run one request; whatever fails becomes an answer with the step's name."""
    try:
        answer, passed = OPERATIONS[request["op"]](request, descriptors)
        return {"ok": True, **answer}, passed
    except StepError as error:
        return {"ok": False, "step": error.step, "errno": error.errno, "error": error.strerror}, []
    except Exception as error:  # noqa: BLE001  (the process's boundary: an unanswered failure would look like a successful exec)
        number = error.errno if isinstance(error, OSError) else 0
        return {"ok": False, "step": request.get("op", "?"), "errno": number or 0, "error": repr(error)}, []


def main() -> NoReturn:
    """Close everything that was not meant for us, then serve."""
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a signal meant for the workload ends the launcher without a traceback
    if libc.close_range(CONTROL_FD, ctypes.c_uint(0xFFFFFFFF), CLOSE_RANGE_CLOEXEC) < 0:
        for name in os.listdir("/proc/self/fd"):
            if int(name) >= CONTROL_FD:
                try:
                    os.set_inheritable(int(name), False)
                except OSError:
                    pass
    serve(socket.socket(fileno=CONTROL_FD))


if __name__ == "__main__":
    main()
