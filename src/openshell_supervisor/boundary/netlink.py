"""A netlink conversation that blocks, on a socket of the thread that opens it.

pyroute2's own sockets run an asyncio loop each and start a child process to reach another namespace; a rung is built on
a throw-away thread that is already where it has to be, so a plain socket says the same in a few lines. The kernel
answers before `send` returns: nothing here waits for the network. This module knows framing, acknowledgements and
dumps; it does not know what a link, a route or a firewall rule is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

# include/uapi/linux/netlink.h
NLM_F_REQUEST = 0x001
NLM_F_ACK = 0x004
NLM_F_DUMP_INTR = 0x010
NLM_F_EXCL = 0x200
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF
NLMSGERR_ATTR_MSG = 1
SOL_NETLINK = 270
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NETLINK_NETFILTER = 12

HEADER = struct.Struct("=IHHII")
# The kernel answers while we send; a longer silence is a kernel that holds the RTNL lock for another's sake.
ANSWER_TIMEOUT = 5.0
# netlink(7) messages of a dump come in buffers of at most 32 KiB (NLMSG_GOODSIZE, raised by the reader's own buffer).
RECEIVE_BUFFER = 64 * 1024
# A dump that changes under our hands is asked for again; a table that never rests is an error, not a hang.
DUMP_ATTEMPTS = 16


class NetlinkError(OSError):
    """The kernel refused a netlink message; `operation` is its name ("RTM_NEWLINK"), `errno` and text are the
    kernel's."""

    def __init__(self, number: int, operation: str, explanation: str = "") -> None:
        text = os.strerror(number)
        super().__init__(number, f"{text} ({explanation})" if explanation else text)
        self.operation = operation


@dataclass(frozen=True, slots=True)
class Message:
    """One request: its name for errors, its type, its flags beside NLM_F_REQUEST, and what follows the header."""

    operation: str
    kind: int
    body: bytes
    flags: int = 0


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute, padded to four bytes (struct nlattr)."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(parts))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in `data` as (type, payload); stops at the first one whose length is a lie. Never raises."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4 or offset + length > len(data):
            return
        yield kind & NLA_TYPE_MASK, data[offset + 4 : offset + length]
        offset += length + 3 & ~3


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The netlink messages in one datagram as (type, flags, sequence, body); stops at the first lie. Never raises."""
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, offset)
        if length < HEADER.size or offset + length > len(data):
            return
        yield kind, flags, sequence, data[offset + HEADER.size : offset + length]
        offset += length + 3 & ~3


class Netlink:
    """One netlink socket in the network namespace of the thread that makes it; usable from any thread afterwards.

    Raises `OSError` where the socket is refused (an outer seccomp profile, for one).
    """

    def __init__(self, protocol: int) -> None:
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.settimeout(ANSWER_TIMEOUT)
            for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
                with contextlib.suppress(OSError):  # kernels before 4.12 explain less; nothing else depends on it
                    self._socket.setsockopt(SOL_NETLINK, option, 1)
            self._socket.bind((0, 0))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; safe to call twice."""
        self._socket.close()

    def detach(self) -> socket.socket:
        """Give the socket away, non-blocking, for an event loop to read; this conversation is over."""
        self._socket.setblocking(False)
        return self._socket

    def request(self, message: Message) -> None:
        """Send one request and wait for its acknowledgement; raises `NetlinkError` with the kernel's answer."""
        sequence = self._send(message, NLM_F_ACK)
        for kind, flags, answered, body in self._receive(message):
            if answered == sequence and kind == NLMSG_ERROR:
                _raise_for(body, flags, message.operation)
                return
        raise NetlinkError(errno.EBADMSG, message.operation, "no acknowledgement")

    def fetch(self, message: Message) -> bytes:
        """Ask for one object and give its body; raises `NetlinkError` (ENODEV for a link that is not there)."""
        sequence = self._send(message, 0)
        for kind, flags, answered, body in self._receive(message):
            if answered == sequence:
                if kind == NLMSG_ERROR:
                    _raise_for(body, flags, message.operation)
                return body
        raise NetlinkError(errno.EBADMSG, message.operation, "no answer")

    def dump(self, message: Message) -> list[bytes]:
        """Every object that the request matches, as bodies; asked again when the kernel says it changed meanwhile."""
        for _ in range(DUMP_ATTEMPTS):
            found, torn = self._dump_once(message)
            if not torn:
                return found
        raise NetlinkError(errno.EINTR, message.operation, "the table changed during each attempt to read it")

    def _dump_once(self, message: Message) -> tuple[list[bytes], bool]:
        sequence = self._send(message, NLM_F_DUMP)
        found: list[bytes] = []
        torn = False
        while True:
            for kind, flags, answered, body in self._receive(message):
                if answered != sequence:
                    continue
                torn = torn or bool(flags & NLM_F_DUMP_INTR)
                if kind == NLMSG_ERROR:
                    _raise_for(body, flags, message.operation)
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    return found, torn
                found.append(body)

    def transaction(self, begin: Message, steps: Sequence[Message], end: Message) -> dict[int, NetlinkError]:
        """Send `steps` as one nfnetlink batch: all of them hold, or none.

        Returns the refusals by index into `steps`, empty when everything holds. Raises `NetlinkError` when the batch as
        a whole was refused (no capability, no nf_tables in this kernel).
        """
        first = self._sequence + 1
        frames = [self._frame(begin, 0), *(self._frame(step, NLM_F_ACK) for step in steps), self._frame(end, 0)]
        self._socket.send(b"".join(frames))
        refused: dict[int, NetlinkError] = {}
        answered: set[int] = set()
        for kind, flags, sequence, body in self._drain():
            if kind != NLMSG_ERROR:
                continue
            index = sequence - first - 1
            if not 0 <= index < len(steps):
                _raise_for(body, flags, begin.operation)
                continue
            answered.add(index)
            try:
                _raise_for(body, flags, steps[index].operation)
            except NetlinkError as error:
                refused[index] = error
        if not refused and len(answered) != len(steps):
            raise NetlinkError(
                errno.EBADMSG, begin.operation, f"{len(steps) - len(answered)} steps were not acknowledged"
            )
        return refused

    def _frame(self, message: Message, flags: int) -> bytes:
        self._sequence += 1
        all_flags = NLM_F_REQUEST | message.flags | flags
        length = HEADER.size + len(message.body)
        return HEADER.pack(length, message.kind, all_flags, self._sequence, 0) + message.body + bytes(-length % 4)

    def _send(self, message: Message, flags: int) -> int:
        self._socket.send(self._frame(message, flags))
        return self._sequence

    def _receive(self, message: Message) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            data = self._socket.recv(RECEIVE_BUFFER)
        except TimeoutError as error:
            raise NetlinkError(errno.ETIMEDOUT, message.operation, f"no answer within {ANSWER_TIMEOUT:g} s") from error
        return messages(data)

    def _drain(self) -> list[tuple[int, int, int, bytes]]:
        """All that the kernel has answered by now; nfnetlink has answered everything when `send` returns."""
        found: list[tuple[int, int, int, bytes]] = []
        self._socket.settimeout(0)
        try:
            while True:
                found.extend(messages(self._socket.recv(RECEIVE_BUFFER)))
        except BlockingIOError:
            return found
        finally:
            self._socket.settimeout(ANSWER_TIMEOUT)


def _raise_for(body: bytes, flags: int, operation: str) -> None:
    """Raise what a NLMSG_ERROR says; its errno 0 is an acknowledgement (struct nlmsgerr)."""
    if len(body) < 4 + HEADER.size:
        raise NetlinkError(errno.EBADMSG, operation, "short acknowledgement")
    (number,) = struct.unpack_from("=i", body)
    if number == 0:
        return
    explanation = ""
    if flags & NLM_F_ACK_TLVS:
        (original,) = struct.unpack_from("=I", body, 4)
        skip = 4 + (HEADER.size if flags & NLM_F_CAPPED else (original + 3 & ~3))
        texts = [payload for kind, payload in attributes(body[skip:]) if kind == NLMSGERR_ATTR_MSG]
        explanation = texts[0].rstrip(b"\0").decode("ascii", "replace") if texts else ""
    raise NetlinkError(-number, operation, explanation)
