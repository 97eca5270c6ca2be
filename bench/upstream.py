"""The upstream that everybody is measured against, in its own process: HTTP, HTTPS and a bulk sender on loopback.

Standard library only. It prints its ports as one JSON line and ends when its standard input does, so a bench that dies
leaves nothing behind. It answers every request with the same kilobyte, prebuilt: it must never be the bottleneck.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import sys
import threading

BODY = b'{"ok":true,"pad":"' + b"x" * 1004 + b'"}'
RESPONSE = (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY)) + BODY
CHUNK = bytes(1 << 20)
BACKLOG = 512
ORDER_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 60.0


class Http(asyncio.Protocol):
    """One response per request head; the requests of the bench have no body."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        """Answer as many heads as are complete."""
        *heads, self.rest = (self.rest + data).split(b"\r\n\r\n")
        if heads:
            self.transport.write(RESPONSE * len(heads))


def _send_bulk(peer: socket.socket) -> None:
    """Read `<bytes>\\n`, send that many, close."""
    with peer:
        peer.settimeout(ORDER_TIMEOUT_S)
        try:
            left = int(peer.makefile("rb").readline(32))
            peer.settimeout(SEND_TIMEOUT_S)
            while left > 0:
                left -= peer.send(CHUNK[: min(left, len(CHUNK))])
            peer.shutdown(socket.SHUT_WR)
        except (OSError, ValueError):
            return


def _serve_bulk(listener: socket.socket) -> None:
    while True:
        peer, _ = listener.accept()
        threading.Thread(target=_send_bulk, args=(peer,), daemon=True).start()


def _watch_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


async def _main(certificate: str, key: str) -> None:
    loop = asyncio.get_running_loop()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    plain_server = await loop.create_server(Http, "127.0.0.1", 0, backlog=BACKLOG)
    tls_server = await loop.create_server(Http, "127.0.0.1", 0, ssl=tls, backlog=BACKLOG)
    bulk = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    threading.Thread(target=_serve_bulk, args=(bulk,), daemon=True).start()
    threading.Thread(target=_watch_stdin, daemon=True).start()
    ports = {
        "http": plain_server.sockets[0].getsockname()[1],
        "https": tls_server.sockets[0].getsockname()[1],
        "bulk": bulk.getsockname()[1],
    }
    print(json.dumps(ports), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:3]))
