"""The front door: heads, refusals, tunnels, the probe."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys

import pytest
import support
from support import Upstream, answering, echo_head, json_of, ok, policy_for, running, status_of

PINS = {"api.test": ("127.0.0.1",), "plain.test": ("127.0.0.1",)}


def rest(port: int, *, host: str = "api.test", path: str = "/ok/**", enforcement: str = "enforce") -> str:
    """An inspected endpoint that allows GET and POST below `path`."""
    rules = ", ".join(f"{{allow: {{method: {m}, path: '{path}'}}}}" for m in ("GET", "POST"))
    return f"host: {host}, port: {port}, protocol: rest, enforcement: {enforcement}, rules: [{rules}]"


async def test_import_stays_light() -> None:
    """Importing the front end imports none of the heavy libraries; start-up to the workload's first instruction depends on it."""
    code = (
        "import sys, openshell_supervisor.proxy.frontend;"
        "print([m for m in ('mitmproxy','cryptography','regopy','OpenSSL','h2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


async def test_probe_is_answered_without_mitmproxy() -> None:
    """The boundary's probe gets its nonce back, an unknown one gets 404, and neither is an event."""
    async with running(policy_for("host: x.test, port: 1")) as proxy:
        proxy.proxy.answer_probe("abc")
        answer = await proxy.raw(b"GET http://policy.local/v1/probe/abc HTTP/1.1\r\nHost: policy.local\r\n\r\n")
        assert status_of(answer) == 200 and answer.endswith(b"\r\n\r\nabc")
        answer = await proxy.raw(b"GET http://policy.local/v1/probe/abd HTTP/1.1\r\nHost: policy.local\r\n\r\n")
        assert status_of(answer) == 404
        assert [event["activity_name"] for event in proxy.log.events] == ["Listen"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET ftp://a.test/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET https://a.test/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://a.test/ HTTP/2.0\r\nHost: a\r\n\r\n",
        b"GET  http://a.test/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET\thttp://a.test/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://a.test/ HTTP/1.1\nHost: a\n\n",
        b"GET http://a.test/ HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
        b"GET http://a.test/ HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET http://a.test/ HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
        b"GET http://a.test/ HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
        b"GET http://a.test/ HTTP/1.1\r\nHost: a\r\nX: \xff\xfe\r\n\r\n",
        b"GET http://a.test/ HTTP/1.1\r\n\r\n",
        b"GET http://a.test/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET http://u:p@a.test/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST http://a.test/ HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"POST http://a.test/ HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\nx",
        b"POST http://a.test/ HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nx",
        b"POST http://a.test/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\nx",
        b"POST http://a.test/ HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx",
        b"GET http://a.test/ HTTP/1.1\r\nHost: a\r\nConnection: host\r\n\r\n",
        b"CONNECT a.test HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a.test:0 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a.test:70000 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a.test:443 HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nGET ",
        b"CONNECT [::1:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
async def test_malformed_heads_are_refused(head: bytes) -> None:
    """A head that is not exactly what the grammar says gets a JSON 400 and one event; nothing is decided on it."""
    async with running(policy_for("host: a.test, port: 80")) as proxy:
        answer = await proxy.raw(head)
        assert status_of(answer) == 400, answer
        assert b"Connection: close" in answer and b"Content-Type: application/json" in answer
        body = json_of(answer)
        assert body["reason_id"] in ("invalid_request", "unsupported_proxy_scheme")
        assert len(proxy.log.decisions()) == 1


async def test_head_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 8 KiB of head is a 431, a head that does not come is a 408."""
    monkeypatch.setattr("openshell_supervisor.proxy.frontend.FIRST_HEAD_TIMEOUT", 0.3)
    async with running(policy_for("host: a.test, port: 80")) as proxy:
        assert (
            status_of(await proxy.raw(b"GET http://a.test/ HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 9000 + b"\r\n\r\n"))
            == 431
        )
        assert status_of(await proxy.raw(b"GET http://a.test/ HTTP/1.1\r\n")) == 408


async def test_denied_connect_says_why_and_dials_nothing() -> None:
    """A CONNECT that no policy allows: 403 with upstream's keys and ours, one Denied event, and no name is looked up."""
    async with running(policy_for("host: a.test, port: 80")) as proxy:
        answer = await proxy.raw(b"CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test\r\n\r\n")
        assert status_of(answer) == 403
        body = json_of(answer)
        assert body["error"] == "policy_denied" and body["detail"] == "CONNECT evil.test:443 not permitted by policy"
        assert body["reason_id"] == "endpoint_not_allowed" and b"X-Deny-Reason: endpoint_not_allowed\r\n" in answer
        assert body["reason"] and body["rule"] and body["hint"] and body["generation"] == 1
        (event,) = proxy.log.decisions()
        assert event["action"] == "Denied" and event["message"] == "CONNECT denied evil.test:443"


async def test_opaque_tunnel_keeps_half_close_and_counts_one_event() -> None:
    """An endpoint without rules is a raw tunnel: server-first works, the client's FIN travels alone, one Allowed event."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hello\r\n")
        data = await reader.read()
        writer.write(b"%d bytes" % len(data))
        await writer.drain()

    upstream = await Upstream(script).start()
    async with running(policy_for(f"host: plain.test, port: {upstream.port}"), pins=PINS) as proxy:
        reader, writer = await proxy.connect("plain.test", upstream.port)
        assert await reader.readline() == b"220 hello\r\n"
        writer.write(b"x" * 300_000)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 5) == b"300000 bytes"
        writer.close()
        (event,) = proxy.log.decisions()
        assert event["action"] == "Allowed" and event["message"].startswith("CONNECT allowed plain.test:")
    await upstream.stop()


async def test_bytes_after_the_connect_head_are_kept() -> None:
    """A client that pipelines its first bytes behind the CONNECT head does not lose them."""
    upstream = await Upstream(answering(echo_head)).start()
    async with running(policy_for(f"host: plain.test, port: {upstream.port}"), pins=PINS) as proxy:
        port = upstream.port
        answer = await proxy.raw(
            b"CONNECT plain.test:%d HTTP/1.1\r\nHost: x\r\n\r\nGET /early HTTP/1.1\r\nHost: x\r\n\r\n" % port, wait=1
        )
        assert b"GET /early HTTP/1.1|" in answer
    await upstream.stop()


async def test_unreachable_upstream_is_a_502_before_the_200() -> None:
    """Nothing listens: the client reads 502 in JSON instead of an established tunnel."""
    async with running(policy_for("host: plain.test, port: 9"), pins=PINS) as proxy:
        answer = await proxy.raw(b"CONNECT plain.test:9 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status_of(answer) == 502 and json_of(answer)["reason_id"] == "upstream_unreachable"
        assert proxy.log.matching("Proxy connection error")


async def test_plain_http_is_decided_per_request_on_one_connection() -> None:
    """Keep-alive absolute-form: two allowed requests share a connection, the denied third never reaches the origin."""
    upstream = await Upstream(answering(echo_head)).start()
    port = upstream.port
    async with running(policy_for(rest(port)), pins=PINS) as proxy:
        one = (
            b"GET http://api.test:%d/ok/1?q=a%%20b HTTP/1.1\r\nHost: wrong.test\r\nProxy-Connection: keep-alive\r\n\r\n"
            % port
        )
        two = b"GET http://api.test:%d/ok/2 HTTP/1.1\r\nHost: api.test\r\n\r\n" % port
        bad = b"GET http://api.test:%d/secret HTTP/1.1\r\nHost: api.test\r\n\r\n" % port
        answer = await proxy.raw(one + two + bad)
        assert answer.count(b"HTTP/1.1 200") == 2 and answer.count(b"HTTP/1.1 403") == 1, answer
        assert b"GET /ok/1?q=a%20b HTTP/1.1" in upstream.bytes_seen and b"/secret" not in upstream.bytes_seen
        assert b"Host: api.test:%d\r\n" % port in upstream.bytes_seen and b"wrong.test" not in upstream.bytes_seen
        assert b"Proxy-Connection" not in upstream.bytes_seen and upstream.connections == 1
        assert [event["action"] for event in proxy.log.decisions()] == ["Allowed", "Allowed", "Denied"]
        assert not any("q=" in line for line in proxy.log.lines)
    await upstream.stop()


async def test_l4_only_plain_http_still_needs_its_verdict_per_request() -> None:
    """On one kept connection a request to another host is decided on its own, and refused."""
    upstream = await Upstream(answering(echo_head)).start()
    port = upstream.port
    async with running(policy_for(f"host: plain.test, port: {port}"), pins=PINS) as proxy:
        one = b"GET http://plain.test:%d/a HTTP/1.1\r\nHost: x\r\n\r\n" % port
        two = b"GET http://other.test:%d/a HTTP/1.1\r\nHost: x\r\n\r\n" % port
        answer = await proxy.raw(one + two)
        assert (
            answer.count(b"HTTP/1.1 200") == 1
            and json_of(answer[answer.index(b"HTTP/1.1 403") :])["host"] == "other.test"
        )
        messages = [event["message"] for event in proxy.log.decisions()]
        assert messages[0].startswith("FORWARD allowed GET plain.test") and messages[1].startswith(
            "FORWARD denied GET other.test"
        )
    await upstream.stop()


async def test_tls_is_terminated_decided_and_verified(root: support.TestAuthority) -> None:
    """An inspected HTTPS endpoint: the leaf is for the CONNECT host, paths are decided, the canonical path goes upstream."""
    upstream = await Upstream(answering(echo_head)).start(root.server_context("api.test"))
    port = upstream.port
    async with running(policy_for(rest(port)), pins=PINS, upstream_ca=root.file) as proxy:
        reader, writer = await proxy.connect_tls("api.test", port)
        for path, wanted in (("/ok/a?x=1&x=2", 200), ("/ok/../ok/%7Eb", 200), ("/secret?token=hunter2", 403)):
            writer.write(f"GET {path} HTTP/1.1\r\nHost: api.test:{port}\r\n\r\n".encode())
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert status_of(head) == wanted, head
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
        assert b"GET /ok/a?x=1&x=2 HTTP/1.1" in upstream.bytes_seen and b"GET /ok/~b HTTP/1.1" in upstream.bytes_seen
        assert b"secret" not in upstream.bytes_seen and b"hunter2" not in body and not proxy.log.matching("hunter2")
        keys = list(support.json.loads(body))
        assert keys[:14] == (
            [
                "error",
                "policy",
                "rule",
                "detail",
                "layer",
                "protocol",
                "method",
                "path",
                "host",
                "port",
                "binary",
                "rule_missing",
                "next_steps",
                "agent_guidance",
            ]
        )
        writer.close()
        assert [event["action"] for event in proxy.log.decisions()] == ["Allowed"] * 3 + ["Denied"]
        assert proxy.log.events[1]["message"].startswith("CONNECT_L7 allowed api.test:")
    await upstream.stop()


async def test_audit_lets_through_and_says_so(root: support.TestAuthority) -> None:
    """`enforcement: audit` (upstream's default) forwards a request that no rule allows and logs it as observed."""
    upstream = await Upstream(answering(echo_head)).start()
    port = upstream.port
    async with running(policy_for(rest(port, enforcement="audit")), pins=PINS) as proxy:
        answer = await proxy.raw(
            b"GET http://api.test:%d/secret HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % port
        )
        assert status_of(answer) == 200
        (event,) = proxy.log.decisions()
        assert event["action"] == "Observed" and event["message"].startswith("FORWARD_L7 audit GET")
    await upstream.stop()


async def test_observe_passes_everything_and_writes_the_same_verdicts(root: support.TestAuthority) -> None:
    """With `egress: observe` denied connections and requests pass and are logged as would-be denials with their reason."""
    upstream = await Upstream(answering(echo_head)).start()
    port = upstream.port
    async with running(policy_for(rest(port)), pins={**PINS, "other.test": ("127.0.0.1",)}, egress="observe") as proxy:
        answer = await proxy.raw(
            b"GET http://api.test:%d/secret HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % port
        )
        assert status_of(answer) == 200
        reader, writer = await proxy.connect("other.test", port)
        writer.write(b"GET /tunnel HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await asyncio.wait_for(reader.read(100), 5)
        writer.close()
        assert [event["action"] for event in proxy.log.decisions()] == ["Observed", "Observed"]
        assert all(
            "reason:" in line
            for event, line in zip(proxy.log.events, proxy.log.lines, strict=True)
            if event.get("action")
        )
    await upstream.stop()


async def test_not_http_on_an_inspected_endpoint_is_refused() -> None:
    """Bytes that nobody can inspect do not pass an endpoint that must be inspected; the upstream gets none of them."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)

    upstream = await Upstream(script).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:
        for first in (
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x00\x01binary",
            b"SSH-2.0-x\r\n",
            b"PROPFIND / HTTP/1.1\r\n\r\n",
        ):
            reader, writer = await proxy.connect("api.test", upstream.port)
            writer.write(first)
            answer = await asyncio.wait_for(reader.read(), 5)
            assert status_of(answer) == 403 and json_of(answer)["reason_id"] == "unsupported_protocol"
            writer.close()
        assert upstream.bytes_seen == b""
    await upstream.stop()


async def test_tls_skip_is_left_alone(root: support.TestAuthority) -> None:
    """`tls: skip`: the client sees the origin's own certificate."""
    upstream = await Upstream(answering(echo_head)).start(root.server_context("plain.test"))
    async with running(policy_for(f"host: plain.test, port: {upstream.port}, tls: skip"), pins=PINS) as proxy:
        _, writer = await proxy.connect("plain.test", upstream.port)
        context = support.ssl.SSLContext(support.ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(root.file)
        await asyncio.wait_for(writer.start_tls(context, server_hostname="plain.test"), 5)
        writer.close()
    await upstream.stop()


async def test_upstream_certificate_must_match(root: support.TestAuthority) -> None:
    """An upstream with another name's certificate gets no request; the client reads why."""
    upstream = await Upstream(answering(echo_head)).start(root.server_context("evil.test"))
    async with running(policy_for(rest(upstream.port)), pins=PINS, upstream_ca=root.file) as proxy:
        reader, writer = await proxy.connect_tls("api.test", upstream.port)
        writer.write(b"GET /ok/1 HTTP/1.1\r\nHost: api.test:%d\r\n\r\n" % upstream.port)
        answer = await asyncio.wait_for(reader.read(), 5)
        assert status_of(answer) == 502 and json_of(answer)["reason_id"] == "upstream_tls"
        assert upstream.bytes_seen == b""
        writer.close()
    await upstream.stop()


async def test_generation_change_cuts_tunnels() -> None:
    """`cut_stale` ends what an older policy opened, and only that."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    upstream = await Upstream(script).start()
    policy = policy_for(f"host: plain.test, port: {upstream.port}")
    async with running(policy, pins=PINS) as proxy:
        reader, writer = await proxy.connect("plain.test", upstream.port)
        assert proxy.proxy.cut_stale() == 0
        proxy.reload(policy)
        assert proxy.proxy.cut_stale() == 1
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
    await upstream.stop()


async def test_drain_lets_exchanges_finish() -> None:
    """`drain` refuses new connections and waits for the running one."""
    started, release = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        started.set()
        await release.wait()
        writer.write(b"done")
        await writer.drain()

    upstream = await Upstream(script).start()
    async with running(policy_for(f"host: plain.test, port: {upstream.port}"), pins=PINS) as proxy:
        reader, writer = await proxy.connect("plain.test", upstream.port)
        writer.write(b"go")
        await started.wait()
        draining = asyncio.create_task(proxy.proxy.drain(5))
        await asyncio.sleep(0.05)
        release.set()
        assert await asyncio.wait_for(reader.read(), 5) == b"done"
        writer.close()
        await asyncio.wait_for(draining, 5)
    await upstream.stop()


async def test_no_descriptor_is_left_after_200_connections(root: support.TestAuthority) -> None:
    """200 connections of all kinds, a third of them dropped in the middle, leave as many descriptors as before."""
    secure = await Upstream(answering(echo_head)).start(root.server_context("api.test"))
    plain = await Upstream(answering(lambda head, body: ok())).start()
    policy = policy_for(rest(secure.port), f"host: plain.test, port: {plain.port}")
    async with running(policy, pins=PINS, upstream_ca=root.file) as proxy:
        await proxy.proxy.warm()

        async def one(number: int) -> None:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, support.ssl.SSLError):
                if number % 3 == 0:
                    reader, writer = await proxy.connect("plain.test", plain.port)
                    writer.write(b"GET / HTTP/1.1\r\n\r\n")
                elif number % 3 == 1:
                    reader, writer = await proxy.connect_tls("api.test", secure.port)
                    writer.write(b"GET /ok/1 HTTP/1.1\r\nHost: api.test:%d\r\n\r\n" % secure.port)
                else:
                    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
                    writer.write(b"GET http://plain.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % plain.port)
                if number % 2:
                    await asyncio.wait_for(reader.read(50), 5)
                    writer.close()
                else:
                    writer.transport.abort()

        await asyncio.gather(*(one(number) for number in range(6)))
        await asyncio.sleep(0.3)
        before = len(os.listdir("/proc/self/fd"))
        for start in range(0, 200, 20):
            await asyncio.gather(*(one(number) for number in range(start, start + 20)))
        for _ in range(60):
            if len(os.listdir("/proc/self/fd")) <= before:
                break
            await asyncio.sleep(0.1)
        assert len(os.listdir("/proc/self/fd")) <= before
    await secure.stop()
    await plain.stop()
