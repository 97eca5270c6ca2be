"""Is the boundary tight? Asked from inside, by the process that becomes the workload, against destinations that answer.

A refused connection proves nothing unless the destination would have answered. So canaries are opened in the supervisor's own
namespace (TCP, UDP and an abstract Unix socket), the supervisor convinces itself that each can be reached from there, and then
the launcher tries them from inside. A boundary is tight when no canary was reached and the proxy answered with the nonce.
"""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from openshell_supervisor.boundary.boundary import Boundary
from openshell_supervisor.boundary.launcher_link import Launcher
from openshell_supervisor.enforcement import errno_name

# A way that is neither refused nor opened within this time counts as closed; every closed way of the rungs refuses at once.
WAY_TIMEOUT = 0.25
# How long the proxy may take to answer its probe: it answers before mitmproxy is imported, so this is for a loaded machine.
PROXY_PATIENCE = 10.0
# A family or an address that this host does not have; every other failure to open a canary is one.
ABSENT = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)
# RFC 5737 TEST-NET-2: never a real host. Used to find this host's outward address without sending a packet, and as a way out.
OUTSIDE = ("198.51.100.1", 443)


@dataclass(slots=True)
class Canary:
    """A destination in the supervisor's namespace, with the token that a datagram to it carries."""

    kind: str
    sock: socket.socket
    address: tuple[Any, ...]
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def answers_here(self) -> bool:
        """True when the supervisor itself reaches it: only then does a refusal from inside mean something."""
        family = self.sock.family
        target: Any = "\0" + self.address[0] if self.kind == "unix" else self.address
        kind = socket.SOCK_DGRAM if self.kind == "udp" else socket.SOCK_STREAM
        try:
            with socket.socket(family, kind) as client:
                client.settimeout(WAY_TIMEOUT)
                client.connect(target)
                if self.kind == "udp":
                    client.send(b"control")
                    self.sock.settimeout(WAY_TIMEOUT)
                    return self.sock.recv(64) == b"control"
                return True
        except OSError:
            return False

    def reached(self, errno: int | None) -> bool:
        """Did the attempt from inside arrive? A datagram must have been received: sending one proves nothing."""
        if self.kind != "udp":
            return errno is None
        self.sock.setblocking(False)
        try:
            return self.token.encode() in self.sock.recv(64)
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class Finding:
    """What the probe saw. `leaks` are ways that led out, `gaps` what might lead further out than this machine's namespaces;
    `proxy_answered` says whether the proxy gave the nonce back; `tries` are the answers to the caller's own attempts."""

    leaks: tuple[str, ...]
    proxy_answered: bool
    detail: dict[str, object]
    gaps: tuple[str, ...] = ()
    tries: tuple[Mapping[str, Any], ...] = ()

    @property
    def tight(self) -> bool:
        """No way out but the proxy."""
        return not self.leaks and self.proxy_answered


def outward_address() -> str | None:
    """This namespace's own address towards the world, or None without a route; connect(2) on UDP sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(OUTSIDE)
        except OSError:
            return None
        return str(sock.getsockname()[0])


@contextmanager
def canaries(boundary: Boundary) -> Iterator[list[Canary]]:
    """Open the canaries that this host can have; those that even the supervisor does not reach are left out."""
    hosts = {"127.0.0.1", "::1", boundary.proxy_address[0], outward_address()} - {None}
    with ExitStack() as stack:
        opened: list[Canary] = []
        for host in sorted(str(host) for host in hosts):
            for kind in ("tcp", "udp"):
                canary = _open(kind, host)
                if canary is not None:
                    stack.callback(canary.sock.close)
                    opened.append(canary)
        unix = _open_abstract()
        stack.callback(unix.sock.close)
        yield [canary for canary in [*opened, unix] if canary.answers_here()]


def _open(kind: str, host: str) -> Canary | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    except OSError as error:  # no such family
        if error.errno not in ABSENT:
            raise
        return None
    try:
        sock.bind((host, 0))
        if kind == "tcp":
            sock.listen(8)  # the control's connection and the attempt's
    except OSError as error:  # the host has no such address: no canary, and none is claimed
        sock.close()
        if error.errno not in ABSENT:
            raise
        return None
    return Canary(kind, sock, sock.getsockname()[:2])


def _open_abstract() -> Canary:
    name = f"openshell-canary-{secrets.token_hex(8)}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind("\0" + name)
    sock.listen(8)
    return Canary("unix", sock, (name,))


async def inspect(
    boundary: Boundary, launcher: Launcher, nonce: str, tries: Sequence[Mapping[str, Any]] = ()
) -> Finding:
    """Let the launcher's twin try every way; `nonce` is what the proxy was told to give back. `tries` are attempts that this
    room knows nothing of (launcher, `probe`): their answers are handed back. Raises `LaunchError`."""
    ask = f"GET http://policy.local/v1/probe/{nonce} HTTP/1.1\r\nHost: policy.local\r\nConnection: close\r\n\r\n"
    request: dict[str, Any] = {
        "op": "probe",
        "tries": [dict(one) for one in tries],
        "ways": [],
        "timeout": WAY_TIMEOUT,
        "proxy": list(boundary.proxy_address),
        "ask": ask,
        "patience": PROXY_PATIENCE,
    }
    if not boundary.isolated:
        answer, _ = await launcher.ask(request)
        return _judge([], answer, nonce)
    with canaries(boundary) as opened:
        outside = {"kind": "tcp", "address": list(OUTSIDE), "token": ""}
        vsock = {"kind": "vsock", "address": ["socket"], "token": ""}
        request["ways"] = [
            *({"kind": c.kind, "address": list(c.address), "token": c.token} for c in opened),
            outside,
            vsock,
        ]
        answer, _ = await launcher.ask(request)
        return _judge(opened, answer, nonce)


def _judge(opened: list[Canary], answer: dict[str, Any], nonce: str) -> Finding:
    replied = str(answer["proxy"]["answer"])
    answered = replied.startswith("HTTP/1.1 200") and replied.rstrip().endswith(nonce)
    tried = {_name(way): errno_name(way["errno"]) or "opened" for way in answer["ways"]}
    leaks: list[str] = []
    gaps: list[str] = []
    for canary, way in zip(opened, answer["ways"], strict=False):  # the ways behind the canaries are judged below
        if canary.reached(way["errno"]):
            abstract = "@" if canary.kind == "unix" else ""
            leaks.append(f"{canary.kind} {abstract}{':'.join(str(part) for part in canary.address)}")
        elif canary.kind == "udp" and way["errno"] is None:
            tried[_name(way)] = "sent, not received"
    if tried.get(_name({"kind": "tcp", "address": OUTSIDE})) == "opened":
        leaks.append(f"tcp {OUTSIDE[0]}:{OUTSIDE[1]}")
    if tried.get("vsock socket") == "opened":
        gaps.append("it can have AF_VSOCK sockets, which no network namespace holds (vsock(7))")
    detail: dict[str, object] = {"probed": True, "canaries": len(opened), "tried": tried, "proxy_answered": answered}
    if not answered:
        detail["proxy_errno"] = errno_name(answer["proxy"]["errno"])
    return Finding(tuple(leaks), answered, detail, tuple(gaps), tuple(answer["tries"]))


def _name(way: dict[str, Any]) -> str:
    host = str(way["address"][0])
    return f"{way['kind']} {'abstract socket' if way['kind'] == 'unix' else host}"
