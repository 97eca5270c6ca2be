"""Who tried to get out past the proxy: the kernel's log of the fence, turned into events.

The fence copies the head of a refused packet to an NFLOG group of the workload's namespace. The socket that hears it is
made in that namespace, by a thread, and read by the event loop. A packet is made by the workload: what is read here is
hostile input, bounded in size and rate, and nothing in it can raise. This module neither refuses packets nor knows the
rules.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openshell_supervisor.boundary.netlink import (
    NETLINK_NETFILTER,
    Message,
    Netlink,
    attribute,
    attributes,
    messages,
)

if TYPE_CHECKING:
    from openshell_supervisor.telemetry.events import Telemetry

# include/uapi/linux/netfilter/nfnetlink_log.h
_PACKET, _CONFIG = 4 << 8 | 0, 4 << 8 | 1
_CFG_CMD, _CFG_MODE, _CFG_QTHRESH = 1, 2, 5
_BIND = 1
_COPY_PACKET = 2
_PAYLOAD, _PREFIX, _UID = 9, 10, 11

# Enough of a packet for the longest IPv4 header (60) or an IPv6 header with two extension headers, and the ports.
SNAPSHOT = 128
# One message is a snapshot and its attributes, under 400 bytes; the kernel packs several into one buffer at most this
# big.
RECEIVE_BUFFER = 16 * 1024
# Bytes the kernel may hold for us: at the fence's 3 × 5 reports a second this is minutes.
SOCKET_BUFFER = 64 * 1024
# Datagrams per wake-up, so that a flood of reports never holds the loop: the rest comes with the next wake-up.
READS_PER_WAKEUP = 16
# As many as the kernel can hold for us: one message takes at least a page of SOCKET_BUFFER.
READS_AT_START = 64
# Attempts reported per second and at once. A storm says nothing more than its first ten packets do; the count is kept.
REPORTS_PER_SECOND = 5.0
REPORTS_AT_ONCE = 10.0

_PROTOCOLS = {
    socket.IPPROTO_TCP: "tcp",
    socket.IPPROTO_UDP: "udp",
    socket.IPPROTO_ICMP: "icmp",
    socket.IPPROTO_ICMPV6: "icmpv6",
    socket.IPPROTO_SCTP: "sctp",
    33: "dccp",
    136: "udplite",
}
_WITH_PORTS = {socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_SCTP, 33, 136}
_IPV6_EXTENSIONS = {0, 43, 60}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One refused packet. Ports are 0 where the protocol has none or the packet is cut; `uid` is the sender's, if
    known."""

    protocol: str
    destination: str
    destination_port: int
    source: str
    source_port: int
    uid: int | None


def open_log(group: int) -> socket.socket:
    """A non-blocking socket that hears NFLOG `group` of the calling thread's network namespace.

    Raises `OSError`: EPERM without CAP_NET_ADMIN, EINVAL or ECONNREFUSED where the kernel has no nfnetlink_log.
    """
    netlink = Netlink(NETLINK_NETFILTER)
    try:
        mode = struct.pack("!IBx", SNAPSHOT, _COPY_PACKET)
        for name, setting in (
            ("bind", attribute(_CFG_CMD, bytes([_BIND]))),
            ("copy mode", attribute(_CFG_MODE, mode)),
            # The kernel waits up to a second to fill a buffer; an attempt is worth a message of its own.
            ("threshold", attribute(_CFG_QTHRESH, struct.pack("!I", 1))),
        ):
            header = struct.pack("!BBH", socket.AF_UNSPEC, 0, group)
            netlink.request(Message(f"NFULNL_MSG_CONFIG {name}", _CONFIG, header + setting))
        log = netlink.detach()
        log.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
    except BaseException:
        netlink.close()
        raise
    return log


def attempts(datagram: bytes, prefix: bytes) -> Iterator[Attempt]:
    """The attempts in one NFLOG datagram whose prefix is ours. Never raises, whatever the bytes are."""
    for kind, _, _, body in messages(datagram):
        if kind != _PACKET:
            continue
        found = dict(attributes(body[4:]))
        if found.get(_PREFIX, b"").rstrip(b"\0") != prefix:
            continue
        uid = found.get(_UID, b"")
        attempt = _attempt(found.get(_PAYLOAD, b""), int.from_bytes(uid) if len(uid) == 4 else None)
        if attempt is not None:
            yield attempt


def _attempt(packet: bytes, uid: int | None) -> Attempt | None:
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20:
        header, number = (packet[0] & 0x0F) * 4, packet[9]
        source, destination = (str(ipaddress.IPv4Address(packet[at : at + 4])) for at in (12, 16))
        if int.from_bytes(packet[6:8]) & 0x1FFF:
            header = len(packet)  # a later fragment carries no ports
    elif version == 6 and len(packet) >= 40:
        header, number = _after_extensions(packet)
        source, destination = (str(ipaddress.IPv6Address(packet[at : at + 16])) for at in (8, 24))
    else:
        return None
    ports = packet[header : header + 4] if number in _WITH_PORTS and header >= 20 else b""
    source_port, destination_port = struct.unpack("!HH", ports) if len(ports) == 4 else (0, 0)
    name = _PROTOCOLS.get(number, f"protocol-{number}")
    return Attempt(name, destination, destination_port, source, source_port, uid)


def _after_extensions(packet: bytes) -> tuple[int, int]:
    """Offset of the transport header and its protocol number, past the extension headers that were captured."""
    offset, number = 40, packet[6]
    while number in _IPV6_EXTENSIONS and offset + 2 <= len(packet):
        number, offset = packet[offset], offset + 8 + packet[offset + 1] * 8
    return offset, number


class BypassMonitor:
    """Reads the log on the event loop and reports each attempt as a network event and a finding.

    Silent until `start`, so that the supervisor's own look at the fence from inside is not taken for the workload's.
    `start` and `stop` are called on the loop's thread; `stop` closes the socket. Both may be called twice.
    """

    def __init__(
        self, log: socket.socket, prefix: str, telemetry: Telemetry, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._prefix = prefix.encode()
        self._telemetry = telemetry
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._allowance = REPORTS_AT_ONCE
        self._refilled = clock()
        self._unreported = 0
        self.overruns = 0

    def start(self) -> None:
        """Forget what was refused until now, and report what is from now on."""
        if self._loop is not None or self._log.fileno() < 0:
            return
        for _ in range(READS_AT_START):
            try:
                self._log.recv(RECEIVE_BUFFER)
            except BlockingIOError:
                break
            except OSError:
                continue  # ENOBUFS, once: what did not fit is forgotten as well
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._log.fileno(), self._readable)

    def stop(self) -> None:
        """Report what is still there, then stop and close the socket."""
        if self._loop is not None:
            self._readable()
        self._detach()
        self._log.close()

    def _detach(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._log.fileno())
            self._loop = None

    def _readable(self) -> None:
        for _ in range(READS_PER_WAKEUP):
            try:
                datagram = self._log.recv(RECEIVE_BUFFER)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    # More came than the kernel would hold: some attempts are lost, the next read works again.
                    self.overruns += 1
                    continue
                self._give_up(error)
                return
            for attempt in attempts(datagram, self._prefix):
                self._take(attempt)

    def _take(self, attempt: Attempt) -> None:
        now = self._clock()
        self._allowance = min(REPORTS_AT_ONCE, self._allowance + (now - self._refilled) * REPORTS_PER_SECOND)
        self._refilled = now
        if self._allowance < 1.0:
            self._unreported += 1
            return
        self._allowance -= 1.0
        unreported, self._unreported = self._unreported, 0
        self._report(attempt, unreported)

    def _report(self, attempt: Attempt, unreported: int) -> None:
        # The socket is gone before its packet can be read here: the kernel tells the user, not the process.
        self._telemetry.bypass(attempt.destination, attempt.destination_port, attempt.protocol, uid=attempt.uid)
        if unreported:
            self._telemetry.network(
                "Other", f"{unreported} more bypass attempts were refused before this one and not reported one by one"
            )

    def _give_up(self, error: OSError) -> None:
        self._detach()
        self._telemetry.config(
            "degraded",
            f"Bypass monitor stopped reading: {error.strerror}; reject rules stay active",
            enabled=False,
            ok=False,
        )
