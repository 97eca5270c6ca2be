"""HTTP/2 on both legs, streaming, and what misbehaving peers do to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct

import h2.config
import h2.connection
import h2.events
import pytest
import support
from support import Upstream, answering, echo_head, policy_for, running, status_of
from test_frontend import PINS, rest


async def h2_upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each stream: the path as body; /ok/big sends 8 MB; grpc content gets trailers; /ok/sink counts the upload."""
    conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
    conn.initiate_connection()
    writer.write(conn.data_to_send())
    paths: dict[int, dict[str, str]] = {}
    counts: dict[int, int] = {}
    waiting: dict[int, bytes] = {}

    def push() -> None:
        for stream in list(waiting):
            while waiting[stream] and (
                room := min(conn.local_flow_control_window(stream), conn.max_outbound_frame_size)
            ):
                part, waiting[stream] = waiting[stream][:room], waiting[stream][room:]
                conn.send_data(stream, part)
            if not waiting[stream]:
                del waiting[stream]
                if "grpc" in paths[stream].get("content-type", ""):
                    conn.send_headers(stream, [("grpc-status", "0"), ("x-sum", "1")], end_stream=True)
                else:
                    conn.end_stream(stream)

    while data := await reader.read(65536):
        for event in conn.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                paths[event.stream_id] = dict(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                counts[event.stream_id] = counts.get(event.stream_id, 0) + len(event.data)
                conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                path = paths[event.stream_id][":path"]
                conn.send_headers(event.stream_id, [(":status", "200"), ("content-type", "text/plain")])
                body = bytes(8_000_000) if path == "/ok/big" else path.encode()
                waiting[event.stream_id] = str(counts[event.stream_id]).encode() if path == "/ok/sink" else body
        push()
        writer.write(conn.data_to_send())
        await writer.drain()


async def test_curl_http2_end_to_end(root: support.TestAuthority) -> None:
    """curl speaks HTTP/2 to us, we speak it upstream; each stream has its own verdict on one connection."""
    upstream = await Upstream(h2_upstream).start(root.server_context("api.test", ("h2", "http/1.1")))
    base = f"https://api.test:{upstream.port}"
    async with running(policy_for(rest(upstream.port)), pins=PINS, upstream_ca=root.file) as proxy:
        resolve = ["--http2", "-w", "|%{http_version} %{http_code}|"]
        urls = [f"{base}/ok/1", f"{base}/secret", f"{base}/ok/2?x=%20y"]
        code, out, err = await proxy.curl(*resolve, *urls)
        assert code == 0, err
        assert "/ok/1|2 200|" in out and "|2 403|" in out and "/ok/2?x=%20y|2 200|" in out
        assert '"reason_id"' in out and upstream.connections == 1
        assert [event["action"] for event in proxy.log.decisions()] == ["Allowed", "Allowed", "Denied", "Allowed"]
    await upstream.stop()


async def test_http2_large_transfers(root: support.TestAuthority) -> None:
    """8 MB down and 8 MB up over HTTP/2, through windows of 1 MiB, arrive whole."""
    upstream = await Upstream(h2_upstream).start(root.server_context("api.test", ("h2",)))
    base = f"https://api.test:{upstream.port}"
    async with running(policy_for(rest(upstream.port)), pins=PINS, upstream_ca=root.file) as proxy:
        code, out, err = await proxy.curl("--http2", "-o", "/dev/null", "-w", "%{size_download}", f"{base}/ok/big")
        assert (code, out) == (0, "8000000"), err
        blob = root.directory / "blob"
        blob.write_bytes(bytes(8_000_000))
        code, out, err = await proxy.curl("--http2", "--data-binary", f"@{blob}", f"{base}/ok/sink")
        assert (code, out) == (0, "8000000"), err
    await upstream.stop()


async def test_http1_client_of_an_http2_upstream_gets_http1(root: support.TestAuthority) -> None:
    """A client that offers only HTTP/1.1 makes us offer only that upstream."""
    upstream = await Upstream(answering(echo_head)).start(root.server_context("api.test", ("h2", "http/1.1")))
    async with running(policy_for(rest(upstream.port)), pins=PINS, upstream_ca=root.file) as proxy:
        code, out, err = await proxy.curl(
            "--http1.1", "-w", "|%{http_version}", f"https://api.test:{upstream.port}/ok/1"
        )
        assert code == 0 and out == "GET /ok/1 HTTP/1.1||1.1", err
    await upstream.stop()


class H2Client:
    """A small HTTP/2 client that shows every frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.conn = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, header_encoding="utf-8", validate_outbound_headers=False)
        )
        self.conn.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.conn.data_to_send())

    async def events(self, wanted: type, wait: float = 5) -> list[h2.events.Event]:
        """Everything up to the first event of a type."""
        seen: list[h2.events.Event] = []
        async with asyncio.timeout(wait):
            while not any(isinstance(event, wanted) for event in seen):
                data = await self.reader.read(65536)
                if not data:
                    raise ConnectionError("closed")
                for event in self.conn.receive_data(data):
                    seen.append(event)
                    if isinstance(event, h2.events.DataReceived):
                        self.conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self.flush()
        return seen

    def ask(self, path: str, authority: str, *fields: tuple[str, str], method: str = "GET", end: bool = True) -> int:
        """Open a stream."""
        stream: int = self.conn.get_next_available_stream_id()
        pseudo = [(":method", method), (":scheme", "https"), (":authority", authority), (":path", path)]
        self.conn.send_headers(stream, [*pseudo, *fields], end_stream=end)
        self.flush()
        return stream


@contextlib.asynccontextmanager
async def h2_client(root: support.TestAuthority):  # type: ignore[no-untyped-def]
    """A client in an inspected HTTP/2 tunnel to `h2_upstream`: (client, authority, proxy, upstream)."""
    upstream = await Upstream(h2_upstream).start(root.server_context("api.test", ("h2",)))
    async with running(policy_for(rest(upstream.port)), pins=PINS, upstream_ca=root.file) as proxy:
        reader, writer = await proxy.connect_tls("api.test", upstream.port, "h2")
        yield H2Client(reader, writer), f"api.test:{upstream.port}", proxy, upstream
        writer.close()
    await upstream.stop()


async def test_grpc_gets_a_grpc_answer(root: support.TestAuthority) -> None:
    """Trailers pass for an allowed call; a denied one is HTTP 200 with grpc-status 7, at once, before any message."""
    async with h2_client(root) as (client, authority, _, upstream):
        grpc = (("content-type", "application/grpc"), ("te", "trailers"))
        stream = client.ask("/ok/call", authority, *grpc, method="POST", end=False)
        client.conn.send_data(stream, b"\0\0\0\0\1x", end_stream=True)
        client.flush()
        seen = await client.events(h2.events.StreamEnded)
        trailers = next(e for e in seen if isinstance(e, h2.events.TrailersReceived))
        assert ("grpc-status", "0") in trailers.headers and ("x-sum", "1") in trailers.headers
        before = len(upstream.bytes_seen)
        client.ask("/svc/Secret", authority, *grpc, method="POST", end=False)
        seen = await client.events(h2.events.StreamEnded)
        headers = dict(next(e for e in seen if isinstance(e, h2.events.ResponseReceived)).headers)
        assert headers[":status"] == "200" and headers["grpc-status"] == "7" and "not" in headers["grpc-message"]
        assert len(upstream.bytes_seen) - before < 100  # window updates at most


async def test_authority_must_agree_over_http2(root: support.TestAuthority) -> None:
    """:authority or Host of another host in an HTTP/2 tunnel is refused; the connection lives on."""
    async with h2_client(root) as (client, authority, proxy, _):
        for other, fields in (("evil.test", ()), (authority, (("host", "evil.test"),))):
            client.ask("/ok/1", other, *fields)
            try:
                seen = await client.events(h2.events.StreamEnded)
            except ConnectionError:
                continue  # the h2 library itself refuses a Host that differs
            assert dict(next(e for e in seen if isinstance(e, h2.events.ResponseReceived)).headers)[":status"] == "403"
        assert proxy.log.matching("request authority refused") or proxy.log.matching("mismatch")


async def test_control_bytes_in_http2_fields_are_refused(root: support.TestAuthority) -> None:
    """CR, LF or NUL in a field value would split a head further on."""
    async with h2_client(root) as (client, authority, _, upstream):
        for value in ("a\r\nX: y", "a\0b", "a\nb"):
            before = len(upstream.bytes_seen)
            client.ask("/ok/1", authority, ("x-a", value))
            try:
                seen = await client.events(h2.events.StreamEnded)
            except ConnectionError:
                return
            assert dict(next(e for e in seen if isinstance(e, h2.events.ResponseReceived)).headers)[":status"] == "400"
            assert len(upstream.bytes_seen) - before < 100


async def test_a_client_that_opens_no_window_does_not_fill_memory(root: support.TestAuthority) -> None:
    """A client that asks for 8 MB and grants no window holds the upstream back instead of our memory, and another stream of
    the same connection still works."""
    async with h2_client(root) as (client, authority, _, _upstream):
        client.conn.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        client.flush()
        client.ask("/ok/big", authority)
        await client.events(h2.events.ResponseReceived)
        await asyncio.sleep(0.5)
        from openshell_supervisor.proxy import http_wire

        held = [o for o in support.gc_objects(http_wire.BoundedH2Connection) if o.stream_buffers]
        assert held and all(sum(o.backlog(s) for s in o.stream_buffers) < 4 * http_wire.MAX_BACKLOG for o in held)
        stream = client.ask("/ok/2", authority)
        client.conn.increment_flow_control_window(1000, stream)
        client.flush()
        seen = await client.events(h2.events.DataReceived)
        assert any(isinstance(e, h2.events.DataReceived) and e.data == b"/ok/2" for e in seen)


async def test_server_sent_events_are_not_held_back(root: support.TestAuthority) -> None:
    """Each event of a stream arrives when it was sent, over TLS and HTTP/1."""
    go = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(3):
            writer.write(b"9\r\ndata: %d\n\n\r\n" % number)
            await writer.drain()
            await go.wait()
            go.clear()
        writer.write(b"0\r\n\r\n")

    upstream = await Upstream(script).start(root.server_context("api.test"))
    async with running(policy_for(rest(upstream.port)), pins=PINS, upstream_ca=root.file) as proxy:
        reader, writer = await proxy.connect_tls("api.test", upstream.port)
        writer.write(b"GET /ok/events HTTP/1.1\r\nHost: api.test:%d\r\n\r\n" % upstream.port)
        for number in range(3):
            async with asyncio.timeout(2):
                await reader.readuntil(b"data: %d\n\n" % number)
            go.set()
        writer.close()
    await upstream.stop()


async def test_a_response_that_breaks_off_looks_broken() -> None:
    """A truncated body must not end like a complete one."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await writer.drain()
        writer.transport.abort()

    upstream = await Upstream(script).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        code, out, _ = await proxy.curl(f"http://api.test:{upstream.port}/ok/1")
        assert code != 0 and out == "hello"
    await upstream.stop()


@pytest.mark.parametrize("mischief", ["reset", "garbage", "silence", "half hello", "abort upload"])
async def test_peers_that_misbehave_cost_one_connection(
    mischief: str, root: support.TestAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resets, garbage, silence and half handshakes end in an answer or a close; the proxy serves the next client."""
    monkeypatch.setattr("openshell_supervisor.proxy.connect.HELLO_TIMEOUT", 0.3)
    monkeypatch.setattr("openshell_supervisor.proxy.connect.PEEK_TIMEOUT", 0.3)
    broken = True

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not broken:
            await answering(echo_head)(reader, writer)
        elif mischief == "garbage":
            await reader.read(10)
            writer.write(b"\x00\xff\r\n\r\n" * 10)
        else:
            await reader.read(10)
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    upstream = await Upstream(script).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS, upstream_ca=root.file) as proxy:
        url = b"http://api.test:%d/ok/1" % upstream.port
        if mischief in ("reset", "garbage"):
            assert status_of(await proxy.raw(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % url)) == 502
        elif mischief in ("silence", "half hello"):
            broken = False
            reader, writer = await proxy.connect("api.test", upstream.port)
            writer.write(b"" if mischief == "silence" else b"\x16\x03\x01\x02\x00\x01\x00")
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 5)
            writer.close()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" % url + bytes(100_000))
            await asyncio.sleep(0.1)
            writer.transport.abort()
        broken = False
        answer = await proxy.raw(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % url)
        assert status_of(answer) == 200
    await upstream.stop()


async def test_events_hold_no_query_and_are_json(root: support.TestAuthority) -> None:
    """Whatever the request, no event or line carries its query string."""
    upstream = await Upstream(answering(echo_head)).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        for path in (
            b"/ok/1?token=hunter2",
            b"/secret?token=hunter2",
            b"/ok/%zz?token=hunter2",
            b"/../..?token=hunter2",
        ):
            await proxy.raw(b"GET http://api.test:%d%s HTTP/1.1\r\nHost: x\r\n\r\n" % (upstream.port, path), wait=0.3)
        assert "hunter2" not in json.dumps(proxy.log.events) and not proxy.log.matching("hunter2")
        assert len(proxy.log.decisions()) == 4
    await upstream.stop()


FRAMINGS = {
    b"/ok/length": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    b"/ok/chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n",
    b"/ok/204": b"HTTP/1.1 204 No Content\r\n\r\n",
    b"/ok/304": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n",
    b"/ok/zero": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
}


async def test_every_framing_keeps_the_connection_in_step() -> None:
    """Length, chunks, no body at all, HEAD: one kept connection stays in step through all of them; the end of stream last."""

    def reply(head: bytes, body: bytes) -> bytes:
        path = head.split(b" ")[1]
        answer = FRAMINGS[path]
        return answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if head.startswith(b"HEAD") else answer

    upstream = await Upstream(answering(reply)).start()
    policy = policy_for(f"host: api.test, port: {upstream.port}, protocol: rest, enforcement: enforce, access: full")
    async with running(policy, pins=PINS) as proxy:
        reader, writer = await proxy.connect("api.test", upstream.port)
        for _ in range(2):
            for path, answer in FRAMINGS.items():
                for method in (b"GET", b"HEAD"):
                    writer.write(method + b" " + path + b" HTTP/1.1\r\nHost: api.test:%d\r\n\r\n" % upstream.port)
                    head, _, body = answer.partition(b"\r\n\r\n")
                    got = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                    assert got.split(b"\r\n")[0] == head.split(b"\r\n")[0]
                    if method == b"GET":
                        assert await asyncio.wait_for(reader.readexactly(len(body)), 5) == body
        assert upstream.connections == 1
        writer.close()
    await upstream.stop()


async def test_until_close_and_early_answers() -> None:
    """A response without framing ends with the connection; an early 413 reaches a client that is still sending."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
        else:
            writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
            await writer.drain()
            await reader.read(1000)
            await asyncio.sleep(0.3)

    upstream = await Upstream(script).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        url = b"http://api.test:%d/ok/1" % upstream.port
        answer = await proxy.raw(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % url)
        assert answer.endswith(b"\r\n\r\nuntil the end")
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" % url + bytes(1000))
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"big")).startswith(b"HTTP/1.1 413")
        writer.close()
    await upstream.stop()


async def test_a_tls_upstream_that_closed_is_dialled_again(root: support.TestAuthority) -> None:
    """After the upstream closed a kept TLS connection the next request of the same tunnel makes a new, verified one."""
    upstream = await Upstream(answering(echo_head)).start(root.server_context("api.test"))
    async with running(policy_for(rest(upstream.port)), pins=PINS, upstream_ca=root.file) as proxy:
        reader, writer = await proxy.connect_tls("api.test", upstream.port)
        for number in (1, 2):
            writer.write(b"GET /ok/%d HTTP/1.1\r\nHost: api.test:%d\r\n\r\n" % (number, upstream.port))
            await asyncio.wait_for(reader.readuntil(b"|"), 5)
            assert upstream.server is not None and upstream.connections == number
            upstream.server.close_clients()
            await asyncio.sleep(0.2)
        writer.close()
    await upstream.stop()


async def test_random_frames_cannot_crash_the_core(root: support.TestAuthority) -> None:
    """150 HTTP/2 connections with damaged frames: refused or reset, never a crash; a good client is served afterwards."""
    chance = random.Random(20261122)
    upstream = await Upstream(h2_upstream).start(root.server_context("api.test", ("h2",)))
    authority = f"api.test:{upstream.port}"
    async with running(policy_for(rest(upstream.port)), pins=PINS, upstream_ca=root.file) as proxy:

        async def one() -> None:
            reader, writer = await proxy.connect_tls("api.test", upstream.port, "h2")
            client = H2Client(reader, writer)
            for _ in range(chance.randint(1, 4)):
                end = chance.random() < 0.5
                stream = client.ask(chance.choice(["/ok/1", "/secret", "/ok/big", "x"]), authority, end=end)
                if not end:
                    client.conn.send_data(stream, b"x" * chance.randint(0, 100), end_stream=chance.random() < 0.5)
                if chance.random() < 0.3:
                    client.conn.reset_stream(stream)
                data = bytearray(client.conn.data_to_send())
                for _ in range(chance.randint(0, 3)):
                    if data:
                        data[chance.randrange(len(data))] = chance.randrange(256)
                writer.write(bytes(data))
            with contextlib.suppress(ConnectionError, TimeoutError, support.ssl.SSLError):
                await asyncio.wait_for(reader.read(1 << 20), 0.2)
            writer.transport.abort()

        for _ in range(10):
            await asyncio.gather(*(one() for _ in range(15)))
        reader, writer = await proxy.connect_tls("api.test", upstream.port, "h2")
        good = H2Client(reader, writer)
        good.ask("/ok/1", authority)
        await good.events(h2.events.StreamEnded)
        writer.close()
    await upstream.stop()
