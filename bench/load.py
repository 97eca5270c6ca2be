"""The load generator: one process, one file, the standard library alone, so that it runs as a sandbox's workload.

It reads one JSON order per line from standard input and answers each with one line `@bench {…}` on standard output.
Connections are opened with blocking calls and then driven by one epoll loop, a request in flight per connection:
closed-loop load, whose latencies are what a client sees. Arguments: `direct ADDRESS CA`, `proxy HOST:PORT CA`, or
`env`, which takes proxy and trust from the variables that the supervisor gave its workload.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import socket
import ssl
import sys
import time
from typing import Any
from urllib.parse import urlsplit

CONNECT_TIMEOUT_S = 20.0
STALL_TIMEOUT_S = 20.0
RECEIVE = 1 << 16
MAX_HEAD = 1 << 14
BULK_BUFFER = 1 << 20

Order = dict[str, Any]
Answer = dict[str, Any]


class LoadError(Exception):
    """The other side did not do what was asked; its words are in the message."""


class Route:
    """How to reach an upstream: straight at an address, or through a proxy."""

    def __init__(self, proxy: tuple[str, int] | None, address: str, ca: str) -> None:
        self.proxy = proxy
        self.address = address
        self.tls = ssl.create_default_context(cafile=ca) if ca else ssl.create_default_context()

    @classmethod
    def of(cls, arguments: list[str]) -> Route:
        """From the command line, see the module's docstring."""
        if arguments[0] == "env":
            url = urlsplit(os.environ["HTTP_PROXY"])
            return cls((url.hostname or "", url.port or 0), "", os.environ.get("SSL_CERT_FILE", ""))
        if arguments[0] == "proxy":
            host, _, port = arguments[1].rpartition(":")
            return cls((host, int(port)), "", arguments[2])
        return cls(None, arguments[1], arguments[2])

    def dial(self, port: int) -> socket.socket:
        """A connected blocking socket to the proxy, or to `port` of the direct address."""
        sock = socket.create_connection(self.proxy or (self.address, port), CONNECT_TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def tunnel(self, host: str, port: int) -> socket.socket:
        """A socket on which bytes reach `host:port`: after CONNECT and its 200 when there is a proxy."""
        sock = self.dial(port)
        if self.proxy:
            sock.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
            head = read_head(sock)
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                raise LoadError(f"CONNECT {host}:{port} answered {head[:200]!r}")
        return sock

    def open(self, scheme: str, host: str, port: int) -> tuple[socket.socket, bytes]:
        """A connection that takes requests for `host`, and the request to send on it, with a `%d` in its path."""
        if scheme == "https":
            return self.tls.wrap_socket(self.tunnel(host, port), server_hostname=host), request(
                "/v1/items/%d", host, port
            )
        target = f"http://{host}:{port}/v1/items/%d" if self.proxy else "/v1/items/%d"
        return self.dial(port), request(target, host, port)


def request(target: str, host: str, port: int) -> bytes:
    """A GET as a small client sends it."""
    return (
        f"GET {target} HTTP/1.1\r\nHost: {host}:{port}\r\nUser-Agent: bench/1\r\nAccept: application/json\r\n\r\n"
    ).encode()


def read_head(sock: socket.socket) -> bytes:
    """Read byte-exactly up to the empty line, so that nothing behind it is swallowed."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        if not byte or len(head) > MAX_HEAD:
            raise LoadError(f"no complete head: {head[:200]!r}")
        head += byte
    return head


def response_length(buffer: bytearray) -> int | None:
    """Length of the first response in `buffer`, None while its head is incomplete; anything but 200 is an error."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = buffer[:end].lower()
    if not head.startswith(b"http/1.1 200 "):
        raise LoadError(f"answered {bytes(buffer[:300])!r}")
    start = head.find(b"\r\ncontent-length:")
    if start < 0:
        raise LoadError("answered without Content-Length")
    return end + 4 + int(bytes(head[start + 17 :]).split(b"\r\n", 1)[0])


class Connection:
    """One keep-alive connection with at most one request in flight."""

    numbers = itertools.count(1)

    def __init__(self, route: Route, scheme: str, host: str, port: int, *, fresh_paths: bool = False) -> None:
        self.sock, self.request = route.open(scheme, host, port)
        self.fresh_paths = fresh_paths
        self.sock.setblocking(False)
        self.buffer = bytearray()
        self.started = 0.0

    def send(self) -> None:
        """Start a request. It is smaller than any socket buffer, so it leaves in one call."""
        self.started = time.perf_counter()
        data = self.request % (next(self.numbers) if self.fresh_paths else 0)
        if self.sock.send(data) != len(data):
            raise LoadError("a request did not fit into the socket buffer")

    def receive(self) -> float | None:
        """Take what has arrived; the latency in seconds when the response is complete, else None."""
        while True:
            try:
                data = self.sock.recv(RECEIVE)
            except (BlockingIOError, ssl.SSLWantReadError):
                return None
            if not data:
                raise LoadError("the connection was closed instead of kept alive")
            self.buffer += data
            length = response_length(self.buffer)
            if length is not None and len(self.buffer) >= length:
                del self.buffer[:length]
                return time.perf_counter() - self.started


def requests(route: Route, order: Order) -> Answer:
    """Closed-loop keep-alive requests for `seconds` over `connections`, all for one path or (`fresh_paths`) each for a
    path never asked before; rate and latencies in milliseconds."""
    place = (order["scheme"], order["host"], order["port"])
    fresh = bool(order["fresh_paths"])
    live = [Connection(route, *place, fresh_paths=fresh) for _ in range(order["connections"])]
    poller = select.epoll()
    by_fd = {connection.sock.fileno(): connection for connection in live}
    for descriptor in by_fd:
        poller.register(descriptor, select.EPOLLIN)
    latencies: list[float] = []
    cpu, begin = time.process_time(), time.perf_counter()
    for connection in live:
        connection.send()
    end = begin + order["seconds"]
    while time.perf_counter() < end:
        ready = poller.poll(STALL_TIMEOUT_S)
        if not ready:
            raise LoadError(f"no answer within {STALL_TIMEOUT_S} s")
        for descriptor, _ in ready:
            latency = by_fd[descriptor].receive()
            if latency is not None:
                latencies.append(latency)
                by_fd[descriptor].send()
    took, cpu = time.perf_counter() - begin, time.process_time() - cpu
    for connection in live:
        connection.sock.close()
    latencies.sort()
    return {
        "rate": len(latencies) / took,
        "p50_ms": latencies[len(latencies) // 2] * 1e3,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
        "generator_cpu": cpu / took,
    }


def bulk(route: Route, order: Order) -> Answer:
    """Fetch `bytes` through a tunnel; gigabytes (10^9) per second, counted from the order to the last byte."""
    wanted = order["bytes"]
    with route.tunnel(order["host"], order["port"]) as sock:
        sock.settimeout(STALL_TIMEOUT_S)
        buffer = bytearray(BULK_BUFFER)
        begin, got = time.perf_counter(), 0
        sock.sendall(b"%d\n" % wanted)
        while size := sock.recv_into(buffer):
            got += size
        took = time.perf_counter() - begin
    if got != wanted:
        raise LoadError(f"{got} of {wanted} bytes arrived")
    return {"gb_s": got / took / 1e9}


def hosts(route: Route, order: Order) -> Answer:
    """One new TLS connection and one request to each of `count` host names; milliseconds for one."""
    begin = time.perf_counter()
    for number in range(order["count"]):
        connection = Connection(route, "https", order["pattern"].format(number), order["port"])
        connection.sock.settimeout(STALL_TIMEOUT_S)
        connection.send()
        if connection.receive() is None:
            raise LoadError("a response was incomplete")
        connection.sock.close()
    return {"ms": (time.perf_counter() - begin) * 1e3 / order["count"]}


ORDERS = {"requests": requests, "bulk": bulk, "hosts": hosts}


def main() -> None:
    """Serve orders until standard input ends."""
    route = Route.of(sys.argv[1:])
    print("@bench {}", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = ORDERS[order["do"]](route, order)
        except (LoadError, OSError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print("@bench " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
