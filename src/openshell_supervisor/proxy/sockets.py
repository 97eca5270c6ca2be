"""Reading and answering on a raw socket before anybody knows what it carries.

Bytes that are not part of the head stay in the kernel (MSG_PEEK first, then exactly the head), so that whoever takes the socket
next, a splice relay or a TLS handshake, finds them there.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from openshell_supervisor.proxy import client_hello
from openshell_supervisor.proxy.client_hello import ClientHello, HelloError

_END = b"\r\n\r\n"
# After a refusal, how long and how much of what the client still sends is swallowed: closing a socket with unread bytes makes the
# kernel send a reset, which can destroy the answer before the client reads it (RFC 9112 9.6).
LINGER_TIME = 2.0
LINGER_BYTES = 1024 * 1024


class HeadTooLarge(Exception):
    """No blank line within the limit."""


async def readable(*socks: socket.socket) -> socket.socket:
    """Wait until one of the sockets has bytes, an end or an error; gives the first such in the order given."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[socket.socket] = loop.create_future()

    def wake(sock: socket.socket) -> None:
        if not ready.done():
            ready.set_result(sock)

    for sock in socks:
        loop.add_reader(sock.fileno(), wake, sock)
    try:
        return await ready
    finally:
        for sock in socks:
            loop.remove_reader(sock.fileno())


def peek(sock: socket.socket, count: int) -> bytes | None:
    """Bytes that are there, not taken: None when there are none yet, b"" at the end of the stream."""
    try:
        return sock.recv(count, socket.MSG_PEEK)
    except BlockingIOError:
        return None


async def read_head(sock: socket.socket, limit: int) -> bytes:
    """Everything up to and including the first blank line, and not one byte more. b"" when the client left.

    Raises `HeadTooLarge`; the caller sets the deadline.
    """
    head = b""
    while True:
        part = peek(sock, limit + 1 - len(head))
        if part is None:
            await readable(sock)
            continue
        if part == b"":
            return b""
        end = (head + part).find(_END)
        if 0 <= end <= limit - len(_END):
            return head + sock.recv(end + len(_END) - len(head))
        head += sock.recv(len(part))
        if len(head) > limit:
            raise HeadTooLarge
        if head[:1] == b"\n" or b"\n\n" in head:
            return head  # bare line feeds: the parser will name the fault


async def read_hello(sock: socket.socket) -> ClientHello:
    """The client's TLS hello, left in the kernel for the handshake. Raises `HelloError`; the caller sets the deadline."""
    wanted = client_hello.RECORD_HEADER
    try:
        while True:
            peeked = peek(sock, client_hello.MAX_HELLO)
            if peeked == b"":
                raise HelloError("the client left before its ClientHello was complete")
            missing = client_hello.missing_bytes(peeked or b"")
            if missing == 0:
                return client_hello.parse(peeked or b"")
            if peeked is not None and missing == wanted and len(peeked) < missing and _ended(sock):
                raise HelloError("the client left before its ClientHello was complete")
            wanted = missing
            # Bytes that we do not take keep the socket readable; this makes the kernel wake us only when enough are there.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
            await readable(sock)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def _ended(sock: socket.socket) -> bool:
    """True when the peer sent its FIN, although bytes before it are still unread (TCP_INFO, tcpi_state; linux/tcp.h)."""
    established = 1
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != established


def handed_over(sock: socket.socket) -> socket.socket:
    """The same descriptor in a new object, for a transport that will close it; the old object is empty from then on."""
    taken = socket.socket(fileno=sock.detach())
    taken.setblocking(False)
    return taken


async def send(sock: socket.socket, data: bytes, timeout: float) -> None:
    """Send all of it. Raises `TimeoutError` or `OSError`."""
    async with asyncio.timeout(timeout):
        await asyncio.get_running_loop().sock_sendall(sock, data)


async def answer_and_linger(sock: socket.socket, data: bytes, timeout: float) -> None:
    """Send a last answer, end our direction and swallow what still comes, within limits."""
    await send(sock, data, timeout)
    with contextlib.suppress(OSError, TimeoutError):
        sock.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(LINGER_TIME):
            swallowed = 0
            while swallowed < LINGER_BYTES:
                part = await asyncio.get_running_loop().sock_recv(sock, 65536)
                if not part:
                    return
                swallowed += len(part)
