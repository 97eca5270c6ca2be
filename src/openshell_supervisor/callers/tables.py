"""From the two ends of a TCP connection to the socket of the workload's end: the kernel's own table, of one network namespace.

Two readers with one method. `SocketDiagnostics` asks for exactly one connection over a netlink socket that was made in the
workload's namespace (sock_diag(7); no capability is needed, and the cost does not grow with the number of connections).
`ProcTable` reads `/proc/<pid>/net/tcp` as a fallback where the kernel or an outer filter has no such netlink family.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import threading
from typing import Protocol

from openshell_supervisor.callers.caller import CallerError

NETLINK_SOCK_DIAG = 4  # include/uapi/linux/netlink.h
_SOCK_DIAG_BY_FAMILY = 20  # include/uapi/linux/sock_diag.h
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_NO_COOKIE = 0xFFFFFFFF  # INET_DIAG_NOCOOKIE, include/uapi/linux/inet_diag.h
_HEADER = struct.Struct("=IHHII")
# struct inet_diag_req_v2 behind its sockid: family, protocol, extensions, padding, states.
_ASK = struct.Struct("=BBBBI")
# struct inet_diag_sockid: ports in network order, two addresses of 16 bytes, interface, cookie.
_SOCKET = struct.Struct("!HH16s16s4x8s")
# struct inet_diag_msg: family, state, timer, retransmissions, sockid, then expires, rqueue, wqueue, uid, inode.
_ANSWER = struct.Struct("=BBBB48sIIIII")
# The kernel answers while we send; a longer silence is a fault.
ANSWER_TIMEOUT = 1.0
# States (include/net/tcp_states.h) in which the workload's end still has a socket to hold: ESTABLISHED, the two of a client that
# has finished sending, and CLOSE_WAIT.
LIVE = frozenset((1, 4, 5, 8))
# Of /proc/net/tcp; a table of this size holds some 100,000 connections.
MAX_TABLE_BYTES = 16 * 1024 * 1024

type Address = tuple[str, int]


class Table(Protocol):
    """What tells the workload's end of a connection."""

    name: str

    def inode(self, peer: Address, local: Address) -> int:
        """The inode of the socket that is bound to `peer` and connected to `local` (ours). Raises `CallerError`."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


def _unknown(peer: Address, why: str, *, unsettled: bool = False) -> CallerError:
    return CallerError(
        "caller_unknown", f"failed to resolve peer binary: {peer[0]}:{peer[1]}: {why}", unsettled=unsettled
    )


class SocketDiagnostics:
    """Over a NETLINK_SOCK_DIAG socket; its namespace is the one in which it was made. Usable from several threads."""

    name = "sock_diag"

    def __init__(self, netlink: socket.socket) -> None:
        self._netlink = netlink
        self._netlink.settimeout(ANSWER_TIMEOUT)
        self._sequence = 0
        self._one_at_a_time = threading.Lock()

    def inode(self, peer: Address, local: Address) -> int:
        """As `Table.inode`."""
        ends = _packed(peer[0]), _packed(local[0])
        family = socket.AF_INET6 if len(ends[0]) == 16 else socket.AF_INET
        sockid = _SOCKET.pack(peer[1], local[1], *(end.ljust(16, b"\0") for end in ends), struct.pack("=Q", 2**64 - 1))
        body = _ASK.pack(family, socket.IPPROTO_TCP, 0, 0, _NO_COOKIE) + sockid
        try:
            with self._one_at_a_time:
                answer = self._exchange(body)
        except OSError as error:
            raise _unknown(peer, f"the kernel does not say whose the connection is: {error.strerror}") from error
        if len(answer) < _ANSWER.size:
            raise _unknown(peer, "the kernel's answer is short")
        _, state, _, _, found, _, _, _, _, inode = _ANSWER.unpack_from(answer)
        source, destination, from_, to, _ = _SOCKET.unpack(found)
        # Without a connection the kernel falls back to a listener; that one has not called anybody.
        same = (source, destination) == (peer[1], local[1]) and (_plain(from_), _plain(to)) == tuple(map(_plain, ends))
        if not same or state not in LIVE or not inode:
            raise _unknown(peer, "the connection has no socket any more", unsettled=True)
        return int(inode)

    def _exchange(self, body: bytes) -> bytes:
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, self._sequence, 0)
        self._netlink.send(header + body)
        while True:
            data = self._netlink.recv(4096)
            length, kind, _, sequence, _ = _HEADER.unpack_from(data)
            if sequence != self._sequence:
                continue  # of a question that was given up
            if kind == _NLMSG_ERROR:
                (number,) = struct.unpack_from("=i", data, _HEADER.size)
                raise OSError(-number, os.strerror(-number))
            return data[_HEADER.size : length]

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()


class ProcTable:
    """`/proc/<pid>/net/tcp` and `tcp6`, held open: they stay those of the namespace that `pid` was in.

    Raises `OSError` where neither can be opened.
    """

    name = "/proc/net/tcp"

    def __init__(self, pid: int) -> None:
        self._files = [os.open(f"/proc/{pid}/net/tcp", os.O_RDONLY | os.O_CLOEXEC)]
        try:
            self._files.append(os.open(f"/proc/{pid}/net/tcp6", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            pass  # a kernel without IPv6 has no such table, and nothing that it could hold
        self._one_at_a_time = threading.Lock()

    def inode(self, peer: Address, local: Address) -> int:
        """As `Table.inode`."""
        wanted = (_words(peer, 4) + b" " + _words(local, 4), _words(peer, 16) + b" " + _words(local, 16))
        try:
            with self._one_at_a_time:
                tables = [_whole(file) for file in self._files]
        except OSError as error:
            raise _unknown(peer, f"the table of connections cannot be read: {error.strerror}") from error
        for text in tables:
            for line in text.split(b"\n")[1:]:
                if not any(ends in line for ends in wanted if ends):
                    continue
                fields = line.split()
                if b" ".join(fields[1:3]) in wanted and int(fields[3], 16) in LIVE and fields[9] != b"0":
                    return int(fields[9])
        raise _unknown(peer, "the connection has no socket any more", unsettled=True)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            os.close(file)
        self._files = []


def _whole(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    pieces, size = [], 0
    while piece := os.read(file, 256 * 1024):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_TABLE_BYTES:
            raise OSError(0, f"it has more than {MAX_TABLE_BYTES} bytes")
    return b"".join(pieces)


def _packed(host: str) -> bytes:
    """The address's bytes; an IPv4 one has four, also where a dual-stack listener calls it ::ffff:a.b.c.d."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).packed


def _plain(address: bytes) -> bytes:
    """An address without what says IPv4 in another way: the kernel names a dual-stack socket's as ::ffff:a.b.c.d."""
    if len(address) == 16 and address[:12] == bytes(10) + b"\xff\xff":
        return address[12:]
    if len(address) == 16 and not any(address[4:]):
        return address[:4]
    return address


def _words(address: Address, size: int) -> bytes:
    """An end as the kernel prints it: hexadecimal words in the machine's order, and the port; empty where it has no such form."""
    packed = _packed(address[0])
    if size == 16 and len(packed) == 4:
        packed = bytes(10) + b"\xff\xff" + packed
    if len(packed) != size:
        return b""
    words = struct.unpack(f"={size // 4}I", packed)
    return ("".join(f"{word:08X}" for word in words) + f":{address[1]:04X}").encode()
