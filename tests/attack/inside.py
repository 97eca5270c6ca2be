"""The attacker: a workload that tries every way out it can think of and prints, as JSON, what each attempt came to.

Standard library alone, because it runs with the interpreter's `-I` inside the sandbox. An attempt answers "opened" when it
got what it wanted, else the errno's name. It touches only what its order names, its own supervisor, that supervisor's guard
and pid 1 of its world.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import struct
import sys
import termios
from collections.abc import Callable
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
PTRACE_ATTACH, PTRACE_SEIZE, PTRACE_DETACH = 16, 0x4206, 17
SYS_PIDFD_OPEN, SYS_PIDFD_GETFD = 434, 438
AF_VSOCK, CID_ANY = 40, 0xFFFFFFFF
OPENED = "opened"


def name_of(error: OSError) -> str:
    """ "EPERM" for an OSError; a timeout counts as ETIMEDOUT."""
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


def attempt(work: Callable[[], Any]) -> str:
    """OPENED when `work` returns, else the errno's name."""
    try:
        work()
    except OSError as error:
        return name_of(error)
    return OPENED


def call(function: Any, *arguments: Any) -> int:
    """A libc call that raises OSError."""
    result = int(function(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def in_child(work: Callable[[], str], seconds: int = 10) -> str:
    """`work`'s answer from a forked child, so that what it does to itself ends with it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)
        try:
            answer = work()
        except OSError as error:
            answer = name_of(error)
        except BaseException as error:
            answer = repr(error)
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return answer or "died"


def try_way(way: dict[str, Any], proxy: str) -> str:
    """Connect (or send a datagram) and read the witness's greeting: OPENED only when the witness itself answered."""
    family, kind = way.get("family", socket.AF_INET), way.get("type", socket.SOCK_STREAM)
    address = way["address"]
    if isinstance(address, list):
        address = (proxy if address[0] == "PROXY" else address[0], address[1])
    token = way["token"].encode()
    try:
        with socket.socket(family, kind, way.get("protocol", 0)) as sock:
            sock.settimeout(0.6)
            if way.get("fastopen"):
                sock.setblocking(True)  # a non-blocking one answers EINPROGRESS, which says nothing
                for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", 0, 600_000))
                sock.sendto(token, socket.MSG_FASTOPEN, address)
            elif kind == socket.SOCK_DGRAM:
                sock.sendto(token, address)
                if family == socket.AF_UNIX:
                    return OPENED
            else:
                sock.connect(address)
                sock.sendall(token)
            return OPENED if sock.recv(64) == b"WITNESS" else "silence"
    except TimeoutError:
        return "ETIMEDOUT"
    except OSError as error:
        return name_of(error)


def sockets_of_power(proxy: str) -> dict[str, str]:
    """Sockets that would be a way round the stack: raw, packet, ping, netlink with changes, vsock's own table apart."""

    def ping() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as sock:
            sock.settimeout(0.6)
            sock.sendto(struct.pack("!BBHHH", 8, 0, 0, 1, 1) + b"x" * 8, ("203.0.113.7", 0))
            sock.recv(64)

    def ping_proxy() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as sock:
            sock.settimeout(0.6)
            sock.sendto(struct.pack("!BBHHH", 8, 0, 0, 1, 1) + b"x" * 8, (proxy, 0))
            if proxy != "127.0.0.1":
                sock.recv(64)
            else:
                raise OSError(errno.EHOSTUNREACH, "its own loopback")

    def route() -> None:
        # RTM_NEWROUTE default via lo: refused before it is parsed, for want of CAP_NET_ADMIN.
        body = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 254, 3, 0, 1, 0) + struct.pack("=HHi", 8, 4, 1)
        _netlink(24, 0x405, body)

    def link() -> None:
        _netlink(16, 0x405, struct.pack("=BxHiII", 0, 0, 1, 0, 1))  # RTM_NEWLINK on index 1

    return {
        "raw icmp": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)),
        "raw ip": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)),
        "raw6": attempt(lambda: socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58)),
        "packet": attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)),
        "xdp": attempt(lambda: socket.socket(44, socket.SOCK_RAW, 0)),
        "ping": attempt(ping),
        "ping, proxy host": attempt(ping_proxy),
        "netlink route": attempt(route),
        "netlink link": attempt(link),
        "nftables": attempt(lambda: _netlink((10 << 8) | 2, 0x5, struct.pack("!BBH", 1, 0, 0), 12)),
    }


def _netlink(kind: int, flags: int, body: bytes, protocol: int = socket.NETLINK_ROUTE) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as sock:
        sock.settimeout(1)
        sock.sendto(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body, (0, 0))
        answer = sock.recv(4096)
        number = -struct.unpack_from("=i", answer, 16)[0]
        if number:
            raise OSError(number, os.strerror(number))


def vsock(port: int) -> str:
    """Bind the port that a socket outside holds: EADDRINUSE would mean one table for both, that is, no boundary."""
    try:
        with socket.socket(AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.bind((CID_ANY, port))
    except OSError as error:
        return OPENED if error.errno == errno.EADDRINUSE else name_of(error)
    return "own table"


def processes(order: dict[str, Any]) -> dict[str, str]:
    """Every reach into the processes outside: supervisor, guard, pid 1, and a bystander of the same uid."""
    answers: dict[str, str] = {}
    supervisor = os.getppid()
    guard = next((pid for pid in _pids() if "guard.py" in _cmdline(pid) and _parent(pid) == supervisor), 0)
    if not guard:
        answers["guard: found"] = "no"
    victims = {"supervisor": supervisor, "guard": guard, "pid 1": 1, "neighbour": order["neighbour"][0]}
    for who, pid in victims.items():
        answers |= reaches(who, {**order, "pid": pid})
    return answers


def reaches(who: str, order: dict[str, Any]) -> dict[str, str]:
    """Every way into one process. What /proc/PID/fd lists is left out: numbers alone, to its own uid."""
    pid = order.get("pid", order["neighbour"][0])
    answers: dict[str, str] = {}
    for file in ("environ", "mem", "maps", "fd/0", "root/etc/passwd", "cwd", "exe", "ns/net"):
        path = f"/proc/{pid}/{file}"
        opener: Callable[[str], Any] = os.readlink if file in ("cwd", "exe") else _open
        answers[f"{who}: /proc {file}"] = attempt(lambda opener=opener, path=path: opener(path))  # type: ignore[misc]
    answers[f"{who}: ptrace attach"] = in_child(lambda: _ptrace(pid, PTRACE_ATTACH))
    answers[f"{who}: ptrace seize"] = in_child(lambda: _ptrace(pid, PTRACE_SEIZE))
    answers[f"{who}: process_vm_readv"] = attempt(lambda: _peek(pid))
    answers[f"{who}: pidfd_getfd"] = attempt(lambda: _steal(pid, 0))
    for kind in ("net", "user", "mnt", "pid"):
        answers[f"{who}: setns {kind}"] = in_child(lambda kind=kind: _setns(pid, kind))  # type: ignore[misc]
    answers[f"{who}: setns pidfd"] = in_child(lambda: _setns_pidfd(pid))
    if who == "neighbour":
        answers["neighbour: its connection"] = attempt(lambda: _take(*order["neighbour"]))
    return answers


def _take(pid: int, descriptor: int) -> None:
    """Pull a connected socket out of a process and say so over it."""
    with socket.socket(fileno=_steal(pid, descriptor)) as stolen:
        stolen.sendall(b"token of stolen socket")


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _cmdline(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    except OSError:
        return 0


def _open(path: str) -> None:
    with open(path, "rb") as file:
        if not path.endswith(("mem", "ns/net")):
            file.read(1)


def _ptrace(pid: int, option: int) -> str:
    call(libc.ptrace, option, pid, None, None)
    os.waitpid(pid, 0) if option == PTRACE_ATTACH else None
    libc.ptrace(PTRACE_DETACH, pid, None, None)
    return OPENED


def _peek(pid: int) -> None:
    """Read 8 bytes at an address of ours: EFAULT would mean that access was granted."""
    here = ctypes.create_string_buffer(8)
    local = (ctypes.c_size_t * 2)(ctypes.addressof(here), 8)
    remote = (ctypes.c_size_t * 2)(ctypes.addressof(here), 8)
    try:
        call(libc.process_vm_readv, pid, local, 1, remote, 1, 0)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise


def _steal(pid: int, descriptor: int) -> int:
    pidfd = call(libc.syscall, SYS_PIDFD_OPEN, pid, 0)
    return call(libc.syscall, SYS_PIDFD_GETFD, pidfd, descriptor, 0)


def _setns(pid: int, kind: str) -> str:
    before = os.stat(f"/proc/self/ns/{kind}").st_ino
    descriptor = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
    if os.fstat(descriptor).st_ino == before and kind in ("mnt", "pid", "user"):
        return "the same"  # nothing to win: these are shared by design
    call(libc.setns, descriptor, 0)
    return OPENED


def _setns_pidfd(pid: int) -> str:
    call(libc.setns, call(libc.syscall, SYS_PIDFD_OPEN, pid, 0), CLONE_NEWNET)
    return OPENED


def nested(order: dict[str, Any], proxy: str) -> dict[str, str]:
    """Root in a user namespace of one's own: what can that do to the network namespaces around it?"""
    ways = order["ways"]

    def become(flags: int) -> None:
        uid, gid = os.getuid(), os.getgid()
        call(libc.unshare, CLONE_NEWUSER | flags)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            pathlib.Path(f"/proc/self/{name}").write_text(text)

    def as_root_here() -> str:
        """Still in the sandbox's network namespace, with all capabilities in a namespace below its owner."""
        become(0)
        return attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3))

    def reroute() -> str:
        become(0)
        return sockets_of_power(proxy)["netlink route"]

    def unfence() -> str:
        become(0)
        return sockets_of_power(proxy)["nftables"]

    def fresh() -> str:
        become(CLONE_NEWNET)
        opened = [name for name, way in ways.items() if way.get("family") != socket.AF_UNIX and _leads_out(way, proxy)]
        return OPENED if opened else "nothing"

    def back() -> str:
        """From the fresh namespace, back into the supervisor's."""
        parent = os.getppid()
        become(CLONE_NEWNET)
        return _setns(_parent(parent), "net")

    def veth_to_parent() -> str:
        """A veth pair whose other end would live in the namespace of another process: needs rights over both."""
        outside = os.open("/proc/self/ns/net", os.O_RDONLY)
        become(CLONE_NEWNET)
        peer = _attribute(3, b"vout0\0") + _attribute(28, struct.pack("=i", outside))
        info = _attribute(2, _attribute(1, struct.pack("=BxHiII", 0, 0, 0, 0, 0) + peer))
        body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _attribute(3, b"vin0\0")
        body += _attribute(18, _attribute(1, b"veth\0") + info)
        _netlink(16, 0x605, body)
        return OPENED

    def move_link() -> str:
        """Take the sandbox's own veth end (index 2) into a namespace that we rule."""
        child = os.fork()
        if child == 0:
            become(CLONE_NEWNET)
            signal.pause()
        become(0)
        try:
            _netlink(19, 0x5, struct.pack("=BxHiII", 0, 0, 2, 0, 0) + _attribute(19, struct.pack("=I", child)))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return OPENED

    def remount() -> str:
        """A mount namespace below: /proc mounted anew would need a pid namespace; sysfs one's own network namespace."""
        become(CLONE_NEWNS)
        call(libc.mount, b"none", b"/proc", b"proc", 0, None)
        return OPENED

    names: dict[str, Callable[[], str]] = {
        "packet socket": as_root_here,
        "route": reroute,
        "fence": unfence,
        "fresh namespace": fresh,
        "back to the supervisor": back,
        "veth to the sandbox": veth_to_parent,
        "take the veth": move_link,
        "mount proc": remount,
    }
    return {f"nested: {name}": in_child(work) for name, work in names.items()}


def _attribute(kind: int, payload: bytes) -> bytes:
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + bytes(-length % 4)


def _leads_out(way: dict[str, Any], proxy: str) -> bool:
    return try_way(way, proxy) == OPENED


def privileges(outer: dict[str, int]) -> dict[str, str]:
    """What is left of power: set-uid programs, the old user, capabilities, and where this process is."""

    def setuid_program() -> str:
        for path in ("/usr/bin/su", "/bin/su", "/usr/bin/mount", "/bin/mount", "/usr/bin/passwd"):
            if os.path.exists(path) and os.stat(path).st_mode & 0o4000:
                break
        else:
            return "no set-uid program here"
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open("/dev/null", os.O_RDWR), 0)
            os.execv(path, [path, "--help"])
        os.waitpid(pid, 0)
        # no_new_privs is what makes it harmless; the kernel's own word for that:
        return "harmless" if "NoNewPrivs:\t1" in _status() else OPENED

    sets = [line.split()[1] for line in _status().splitlines() if line.startswith("Cap")]
    return {
        "namespace": OPENED if os.stat("/proc/self/ns/net").st_ino == outer["net"] else "own",
        "setuid(0)": attempt(lambda: os.setuid(0)),
        "setgid(0)": attempt(lambda: os.setgid(0)),
        "setgroups": attempt(lambda: os.setgroups([0])),
        "capabilities": OPENED if any(int(word, 16) for word in sets) else "none",
        "set-uid program": setuid_program(),
        "core size": OPENED if _hard_core() else "none",
        "sysctl core_pattern": OPENED if os.access("/proc/sys/kernel/core_pattern", os.W_OK) else "EACCES",
        "sysctl ip_forward": OPENED if os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK) else "EACCES",
        "tiocsti": attempt(lambda: fcntl.ioctl(0, termios.TIOCSTI, b"x")),
    }


def _status() -> str:
    return pathlib.Path("/proc/self/status").read_text()


def _hard_core() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_CORE)[1]


def possessions() -> dict[str, Any]:
    """What this process was given: descriptors beyond 0-2, secrets in the environment, its supervisor's command line."""
    mine = os.open("/dev/null", os.O_RDONLY)
    held = sorted(int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}"))
    os.close(mine)
    return {
        "descriptors": [number for number in held if number not in (0, 1, 2, mine)],
        "environment": dict(os.environ),
    }


def main(path: str) -> None:
    """Do it all, print one JSON line."""
    possession = possessions()  # first: before anything of ours is open
    order = json.loads(pathlib.Path(path).read_text())
    host, _, port = os.environ["HTTP_PROXY"].removeprefix("http://").partition(":")
    answers: dict[str, str] = {name: try_way(way, host) for name, way in order["ways"].items()}
    answers |= sockets_of_power(host)
    if order["vsock"]:
        answers["vsock"] = vsock(order["vsock"])
    answers |= processes(order) | nested(order, host) | privileges(order["outer"])
    with socket.create_connection((host, int(port)), 5) as sock:
        sock.sendall(b"GET http://denied.test/ HTTP/1.1\r\nHost: denied.test\r\n\r\n")
        verdict = sock.recv(64).decode("latin-1")
    sys.stdout.write(json.dumps({"answers": answers, "possessions": possession, "proxy": verdict}) + "\n")


if __name__ == "__main__":
    if sys.argv[2:] == ["outside"]:
        sys.stdout.write(json.dumps(reaches("neighbour", json.loads(pathlib.Path(sys.argv[1]).read_text()))))
    else:
        main(sys.argv[1])
