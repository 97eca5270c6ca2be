"""Canaries: one test per trap of reference/proxy.md 9.4. Each docstring says what stock mitmproxy 12.2.3 does.

A new mitmproxy that moves an internal breaks one of these before it breaks a sandbox.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import support
from support import ProxyUnderTest, Upstream, answering, echo_head, json_of, ok, policy_for, running, status_of
from test_frontend import PINS, rest

KEY = base64.b64encode(b"0123456789abcdef")
ACCEPT = base64.b64encode(hashlib.sha1(KEY + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
UPGRADE = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + KEY + b"\r\n"
)


def request(port: int, path: bytes = b"/ok/1", *fields: bytes, method: bytes = b"GET", body: bytes = b"") -> bytes:
    """An absolute-form request that ends its connection."""
    head = b"%s http://api.test:%d%s HTTP/1.1\r\nHost: api.test:%d\r\n" % (method, port, path, port)
    return head + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body


async def until(reader: asyncio.StreamReader, text: bytes, wait: float = 5) -> bytes:
    """Read until `text` was seen."""
    seen = b""
    async with asyncio.timeout(wait):
        while text not in seen:
            part = await reader.read(65536)
            if not part:
                break
            seen += part
    return seen


async def test_01_a_failing_decision_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 1: an exception in an addon is logged and the request goes on. Here it is a 503 and nothing leaves, also for a
    request whose body never arrives."""
    upstream = await Upstream(answering(echo_head)).start()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("engine gone")

    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        monkeypatch.setattr("openshell_supervisor.proxy.gate.Gate.request", broken)
        assert status_of(await proxy.raw(request(upstream.port))) == 503
        post = request(upstream.port, b"/ok/1", b"Content-Length: 100", method=b"POST")
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(post)
        assert status_of(await until(reader, b"\r\n\r\n")) == 503
        writer.close()
        assert upstream.connections == 0
    await upstream.stop()


async def test_02_a_denial_does_not_wait_for_the_body() -> None:
    """Trap 2: a response set in `requestheaders` is sent after the whole body was read, and after a `100 Continue`."""
    upstream = await Upstream(answering(echo_head)).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        fields = (b"Content-Length: 1000000", b"Expect: 100-continue")
        writer.write(request(upstream.port, b"/secret", *fields, method=b"POST"))
        answer = await until(reader, b'"generation"')
        assert status_of(answer) == 403 and b"100 Continue" not in answer
        writer.close()
        assert upstream.connections == 0
    await upstream.stop()


async def test_02b_the_denial_survives_a_client_that_keeps_sending() -> None:
    """Trap 2, the other half: closing over unread bytes would reset the connection and destroy the answer."""
    upstream = await Upstream(answering(echo_head)).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        code, out, err = await proxy.curl(
            *("-X", "POST", "--data-binary", "@/proc/self/exe", "-H", "Expect:", "-w", "%{http_code}"),
            f"http://api.test:{upstream.port}/secret",
        )
        assert code == 0 and out.endswith("403") and '"policy_denied"' in out, (code, out, err)
    await upstream.stop()


async def test_03_trailers_pass_both_ways() -> None:
    """Trap 3: an HTTP/1 trailer raises NotImplementedError in the core and the connection hangs."""
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n"

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = b""
        while b"x-req: 7" not in seen.lower():
            seen += await reader.read(65536)
        writer.write(answer)
        await reader.read(1)

    upstream = await Upstream(script).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        body = b"3\r\nabc\r\n0\r\nX-Req: 7\r\nContent-Length: 9\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(request(upstream.port, b"/ok/1", b"Transfer-Encoding: chunked", method=b"POST", body=body))
        got = await until(reader, b"0\r\nX-Sum: 1\r\n\r\n")
        assert got.lower().endswith(b"2\r\nok\r\n0\r\nx-sum: 1\r\n\r\n"), got
        sent = upstream.bytes_seen
        assert sent.lower().endswith(b"3\r\nabc\r\n0\r\nx-req: 7\r\n\r\n"), sent  # framing headers are no trailers
        writer.close()
    await upstream.stop()


async def test_04_interim_responses_are_not_the_answer() -> None:
    """Trap 4: a 1xx from upstream is taken for the final response and the real one is dropped as unexpected data."""
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    upstream = await Upstream(answering(lambda head, body: hints + b"HTTP/1.1 100 Continue\r\n\r\n" + ok())).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        answer = await proxy.raw(request(upstream.port) + request(upstream.port, b"/ok/2", b"Connection: close"))
        assert answer.count(b"HTTP/1.1 200 OK") == 2 and answer.count(b"HTTP/1.1 103 ") == 2, answer
    await upstream.stop()


async def test_04b_expect_is_answered_by_the_upstream() -> None:
    """`Expect: 100-continue` goes to the upstream and its 100 comes back; the proxy does not promise in its name."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await until(reader, b"\r\n\r\n")
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await reader.readexactly(3) or True
        writer.write(ok(b"thanks", b"Connection: close"))
        await writer.drain()

    upstream = await Upstream(script).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        fields = (b"Content-Length: 3", b"Expect: 100-continue")
        writer.write(request(upstream.port, b"/ok/1", *fields, method=b"POST"))
        assert await until(reader, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"abc")
        assert b"thanks" in await until(reader, b"thanks")
        writer.close()
    await upstream.stop()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /ok/1 HTTP/1.1\r\nHost: api.test:%d\r\nX: a\r\n folded\r\n\r\n",
        b"GET /ok/1 HTTP/1.1\r\nHost: api.test:%d\r\nX: a\rb\r\n\r\n",
        b"GET /ok/1 HTTP/1.1\r\nHost: api.test:%d\r\nX: a\x00b\r\n\r\n",
        b"GET /ok/1 HTTP/1.1\nHost: api.test:%d\n\n",
        b"GET\t/ok/1 HTTP/1.1\r\nHost: api.test:%d\r\n\r\n",
        b"GET /ok/1 HTTP/1.9\r\nHost: api.test:%d\r\n\r\n",
        b"GET /ok/1 HTTP/1.1\r\nHost: api.test:%d\r\nHost: api.test\r\n\r\n",
        b"POST /ok/1 HTTP/1.1\r\nHost: api.test:%d\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /ok/1 HTTP/1.1\r\nHost: api.test:%d\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /ok/1#fragment HTTP/1.1\r\nHost: api.test:%d\r\n\r\n",
        b"CONNECT api.test:1 HTTP/1.1\r\nHost: api.test:%d\r\n\r\n",
        b"GET ok HTTP/1.1\r\nHost: api.test:%d\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: api.test:%d\r\n\r\n",
    ],
)
async def test_05_heads_inside_a_tunnel_are_strict(head: bytes) -> None:
    """Trap 5: obs-fold, bare CR, NUL, bare LF, tabs, any version, odd codings and fragments are forwarded to the origin."""
    upstream = await Upstream(answering(echo_head)).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        reader, writer = await proxy.connect("api.test", upstream.port)
        writer.write(b"GET /ok/0 HTTP/1.1\r\nHost: api.test:%d\r\n\r\n" % upstream.port)
        await until(reader, b"/ok/0")
        writer.write(head % upstream.port)
        answer = await asyncio.wait_for(reader.read(), 5)
        assert status_of(answer[answer.index(b"HTTP/1.1 4") :]) == 400, answer
        assert upstream.bytes_seen.count(b"HTTP/1.") == 1
        writer.close()
    await upstream.stop()


async def test_05b_a_request_for_another_host_in_a_tunnel_is_refused() -> None:
    """Trap 5: absolute-form and Host may name any host inside a tunnel. Here every name must be the tunnel's, and a
    difference is a finding."""
    upstream = await Upstream(answering(echo_head)).start()
    port = upstream.port
    async with running(policy_for(rest(port)), pins=PINS) as proxy:
        for head in (
            b"GET /ok/1 HTTP/1.1\r\nHost: evil.test\r\n\r\n",
            b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n",
            b"GET http://evil.test/ok/1 HTTP/1.1\r\nHost: api.test:%d\r\n\r\n" % port,
            b"GET https://api.test:%d/ok/1 HTTP/1.1\r\nHost: api.test:%d\r\n\r\n" % (port, port),
        ):
            reader, writer = await proxy.connect("api.test", port)
            writer.write(head)
            answer = await asyncio.wait_for(reader.read(), 5)
            assert status_of(answer) == 403 and json_of(answer)["reason_id"] == "host_mismatch"
            writer.close()
        assert upstream.bytes_seen == b""
        assert len([e for e in proxy.log.events if e["class_uid"] == 2004]) == 4
        reader, writer = await proxy.connect("api.test", port)
        writer.write(b"GET http://API.test.:%d/ok/1 HTTP/1.1\r\nHost: api.TEST:%d\r\n\r\n" % (port, port))
        assert b"GET /ok/1 HTTP/1.1|" in await until(reader, b"|")
        writer.close()
    await upstream.stop()


async def test_06_bodies_stream_and_are_not_kept(tmp_path: pathlib.Path) -> None:
    """Trap 6: bodies are buffered whole unless every hook remembers to stream. Here 200 MB each way leave memory flat."""
    total = 200 * 1024 * 1024

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await until(reader, b"\r\n\r\n")
        if head.startswith(b"POST"):
            got = len(head.partition(b"\r\n\r\n")[2])
            while got < total:
                got += len(await reader.read(1 << 20))
            writer.write(ok(b"%d" % got, b"Connection: close"))
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % total)
            chunk = bytes(1 << 20)
            for _ in range(200):
                writer.write(chunk)
                await writer.drain()
        await writer.drain()

    upstream = await Upstream(script, keep=False).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        url = f"http://api.test:{upstream.port}/ok/x"
        blob = tmp_path / "blob"
        with blob.open("wb") as file:
            file.truncate(total)
        before = resident()
        code, out, err = await proxy.curl("-o", "/dev/null", "-w", "%{size_download}", url)
        assert (code, out) == (0, str(total)), err
        code, out, err = await proxy.curl("-T", str(blob), "-X", "POST", url)
        assert (code, out) == (0, str(total)), err
        assert resident() - before < 64 * 1024 * 1024
    await upstream.stop()


def resident() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


async def test_07_heads_are_bounded_in_a_tunnel() -> None:
    """Trap 7: two megabytes of headers are accepted, from either side."""
    huge = b"X-A: " + b"a" * 20000 + b"\r\n"
    upstream = await Upstream(answering(lambda head, body: b"HTTP/1.1 200 OK\r\n" + huge * 4)).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        reader, writer = await proxy.connect("api.test", upstream.port)
        writer.write(b"GET /ok/1 HTTP/1.1\r\nHost: api.test:%d\r\n" % upstream.port + huge)
        assert status_of(await asyncio.wait_for(reader.read(), 5)) == 431
        writer.close()
        answer = await proxy.raw(request(upstream.port))
        assert status_of(answer) == 502 and json_of(answer)["reason_id"] == "upstream_unreachable"
    await upstream.stop()


async def test_07b_a_pipeline_is_not_a_flood() -> None:
    """Trap 7: while a response is under way, what the client sends is buffered without limit."""
    gate = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gate.wait()

    upstream = await Upstream(script).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        one = request(upstream.port)
        writer.write(one)
        await asyncio.sleep(0.1)
        writer.write(one * 4000)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            if await asyncio.wait_for(reader.read(), 5) == b"":
                raise ConnectionResetError
        gate.set()
        writer.close()
    await upstream.stop()


async def test_07c_a_slow_second_head_is_timed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 7: no time limit for a request head (slowloris). The second head of a kept connection has one, too."""
    await asyncio.to_thread(__import__, "openshell_supervisor.proxy.http_session")
    monkeypatch.setattr("openshell_supervisor.proxy.http_session.HEAD_TIMEOUT", 0.2)
    monkeypatch.setattr("openshell_supervisor.proxy.http_session.TICK", 0.1)
    upstream = await Upstream(answering(echo_head)).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(request(upstream.port) + b"GET http://api.test")
        answer = await asyncio.wait_for(reader.read(), 5)
        assert b"HTTP/1.1 408 " in answer, answer
        writer.close()
    await upstream.stop()


async def test_08_an_upstream_that_went_away_is_dialled_again_at_the_checked_address() -> None:
    """Trap 8: pinning by rewriting the server address breaks connection reuse and the names derived from it. Here the name
    stays, the connection is reused, and a new one goes to the address that was checked."""
    upstream = await Upstream(answering(echo_head)).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        reader, writer = await proxy.connect("api.test", upstream.port)
        line = b"GET /ok/%d HTTP/1.1\r\nHost: api.test:" + b"%d\r\n\r\n" % upstream.port
        for number in range(3):
            writer.write(line % number)
            await until(reader, b"|")
        assert upstream.connections == 1
        assert upstream.server is not None
        upstream.server.close_clients()
        await asyncio.sleep(0.1)
        writer.write(line % 9)
        assert b"/ok/9" in await until(reader, b"|")
        assert upstream.connections == 2
        writer.close()
    await upstream.stop()


async def test_09_sni_does_not_choose_the_upstream(root: support.TestAuthority) -> None:
    """Trap 9: upstream SNI and certificate check follow the client's SNI, so CONNECT a + SNI b + Host b reaches b."""
    names: list[str | None] = []
    context = root.server_context("api.test")
    context.sni_callback = lambda _, name, __: names.append(name)
    upstream = await Upstream(answering(echo_head)).start(context)
    async with running(policy_for(rest(upstream.port)), pins=PINS, upstream_ca=root.file) as proxy:
        reader, writer = await proxy.connect_tls("api.test", upstream.port, sni="evil.test")
        peer = writer.get_extra_info("ssl_object").getpeercert()
        assert ("DNS", "api.test") in peer["subjectAltName"] and ("DNS", "evil.test") not in peer["subjectAltName"]
        writer.write(b"GET /ok/1 HTTP/1.1\r\nHost: api.test:%d\r\n\r\n" % upstream.port)
        answer = await asyncio.wait_for(reader.read(), 5)
        assert status_of(answer) == 403 and json_of(answer)["reason_id"] == "host_mismatch"
        assert names == ["api.test"] and upstream.bytes_seen == b""
        writer.close()
    await upstream.stop()


async def test_10_an_unsolicited_101_opens_nothing() -> None:
    """Trap 10: any 101 turns the connection into a raw tunnel that no hook sees."""
    switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    upstream = await Upstream(answering(lambda head, body: switch)).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        answer = await proxy.raw(request(upstream.port) + request(upstream.port, b"/secret"))
        assert status_of(answer) == 502 and b" 101 " not in answer
        answer = await proxy.raw(request(upstream.port, b"/ok/1", UPGRADE.rstrip(b"\r\n")))
        assert status_of(answer) == 502, "a 101 without the right Sec-WebSocket-Accept"
        assert b"/secret" not in upstream.bytes_seen
    await upstream.stop()


async def test_10b_a_validated_websocket_is_relayed() -> None:
    """A WebSocket upgrade that the rules allow and the upstream answers rightly carries bytes both ways."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await until(reader, b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + ACCEPT + b"\r\n\r\nhello"
        )
        while data := await reader.read(1000):
            writer.write(data.upper())

    upstream = await Upstream(script).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(request(upstream.port, b"/ok/ws", UPGRADE.rstrip(b"\r\n")))
        assert (await until(reader, b"hello")).startswith(b"HTTP/1.1 101 ")
        writer.write(b"GET http://api.test/secret HTTP/1.1\r\n\r\n")
        assert b"/SECRET" in await until(reader, b"\r\n\r\n")
        writer.close()
        assert proxy.log.matching("FORWARD_L7 allow")
    await upstream.stop()


async def test_10c_h2c_is_not_negotiated() -> None:
    """Trap 10, the other way in: an `Upgrade: h2c` is taken out of the request, which stays HTTP/1."""
    upstream = await Upstream(answering(echo_head)).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        code, out, err = await proxy.curl("--http2", f"http://api.test:{upstream.port}/ok/1")
        assert code == 0 and out == "GET /ok/1 HTTP/1.1|", err
        assert b"pgrade" not in upstream.bytes_seen and b"HTTP2-Settings" not in upstream.bytes_seen
    await upstream.stop()


async def test_12_no_delay_on_both_legs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 12: asyncio sets TCP_NODELAY only on sockets made with IPPROTO_TCP; a handed-over listener was not, and each
    answer took 44 ms."""
    seen: list[int] = []
    real = asyncio.selector_events._SelectorSocketTransport.__init__  # type: ignore[attr-defined]

    def spy(self: object, loop: object, sock: socket.socket, *rest_: object, **named: object) -> None:
        real(self, loop, sock, *rest_, **named)
        if sock.getsockname()[1] != upstream.port:
            seen.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    upstream = await Upstream(answering(echo_head)).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        monkeypatch.setattr("asyncio.selector_events._SelectorSocketTransport.__init__", spy)
        await proxy.raw(request(upstream.port, b"/ok/1", b"Connection: close"))
        assert len(seen) >= 2 and all(seen), seen
    await upstream.stop()


async def test_14_errors_are_ours() -> None:
    """Trap 14: errors are HTML, say `Server: mitmproxy` and echo the peer's bytes."""
    upstream = await Upstream(answering(lambda head, body: b"<marker> is not HTTP\r\n\r\n")).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        answer = await proxy.raw(request(upstream.port))
        assert status_of(answer) == 502 and json_of(answer)["error"] == "upstream_unreachable"
        for text in (b"mitmproxy", b"<html", b"marker", b"Server:"):
            assert text not in answer
    await upstream.stop()


async def test_15_logs_do_not_quote(caplog: pytest.LogCaptureFixture) -> None:
    """Trap 15: incomplete heads and unexpected upstream bytes are logged verbatim."""
    upstream = await Upstream(answering(lambda head, body: ok() + b"upstream-secret")).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        with caplog.at_level(logging.DEBUG):
            await proxy.raw(
                request(upstream.port) + b"GET http://x/ HTTP/1.1\r\nAuthorization: client-secret", wait=0.5
            )
        assert "secret" not in caplog.text and not proxy.log.matching("secret")
    await upstream.stop()


async def test_17_there_is_no_magic_path() -> None:
    """Trap 17: any path that ends in `/mitmproxy-<serial>.crl` is answered by mitmproxy itself."""
    upstream = await Upstream(answering(echo_head)).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        answer = await proxy.raw(request(upstream.port, b"/ok/mitmproxy-1.crl", b"Connection: close"))
        assert b"GET /ok/mitmproxy-1.crl HTTP/1.1|" in answer
    await upstream.stop()


async def test_18_many_upstreams_on_one_connection_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 18: upstream connections per client are limited per destination only. Here there is one bound for all."""
    await asyncio.to_thread(__import__, "openshell_supervisor.proxy.http_session")
    monkeypatch.setattr("openshell_supervisor.proxy.http_session.MAX_UPSTREAMS", 2)
    upstream = await Upstream(answering(echo_head)).start()
    hosts = [f"h{number}.test" for number in range(3)]
    policy = policy_for(*(f"host: {host}, port: {upstream.port}" for host in hosts))
    async with running(policy, pins=dict.fromkeys(hosts, ("127.0.0.1",))) as proxy:
        requests = b"".join(
            b"GET http://%s:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % (h.encode(), upstream.port) for h in hosts
        )
        answer = await proxy.raw(requests)
        assert answer.count(b" 200 OK") == 2 and answer.count(b" 503 ") == 1
    await upstream.stop()


async def test_23_a_core_crash_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 23: after an exception in the core the client is left with a dead, open connection."""
    await asyncio.to_thread(__import__, "openshell_supervisor.proxy.http_session")
    upstream = await Upstream(answering(echo_head)).start()

    def crash(*_: object) -> None:
        raise ZeroDivisionError

    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        monkeypatch.setattr(ProxyUnderTest, "expect_crash", True)
        monkeypatch.setattr(
            "openshell_supervisor.proxy.http_stream.PolicyStream.state_wait_for_response_headers", crash
        )
        answer = await proxy.raw(request(upstream.port), wait=3)
        assert b"<TIMEOUT>" not in answer
        assert proxy.log.matching("internal error")
        monkeypatch.undo()
        assert status_of(await proxy.raw(request(upstream.port, b"/ok/1", b"Connection: close"))) == 200
    await upstream.stop()


def test_key_logging_is_off() -> None:
    """mitmproxy writes all session keys to $SSLKEYLOGFILE if it is set at import; `warm` removes it first."""
    code = (
        "import asyncio, os;"
        "from openshell_supervisor.proxy.frontend import Proxy, ProxyOptions;"
        "from openshell_supervisor.proxy.authority import CertificateAuthority as C;"
        "p = Proxy(ProxyOptions(), generation=lambda: None, telemetry=None, authority=C.create());"
        "asyncio.run(p.warm());"
        "import mitmproxy.net.tls as t; print(t.log_master_secret, 'SSLKEYLOGFILE' in os.environ)"
    )
    environment = {**os.environ, "SSLKEYLOGFILE": "/nonexistent/keys", "MITMPROXY_SSLKEYLOGFILE": "/nonexistent/keys"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert out.stdout.strip() == "None False", out.stderr


def test_addons_are_not_imported() -> None:
    """`mitmproxy.addons` alone costs half a second and pulls in a web server; nothing of it, no Master, no options."""
    code = (
        "import sys, openshell_supervisor.proxy.http_session;"
        "print([m for m in sys.modules if m.startswith(('mitmproxy.addons', 'mitmproxy.master', 'flask', 'tornado'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
