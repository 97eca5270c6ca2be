"""Whatever a client sends, the origin sees only requests that were decided, one for one."""

from __future__ import annotations

import asyncio
import random

from support import Upstream, answering, echo_head, policy_for, running
from test_frontend import PINS, rest

from openshell_supervisor.proxy.head import parse_request_head

PIECES = [
    b"GET /ok/1 HTTP/1.1\r\n",
    b"POST /ok/2 HTTP/1.1\r\n",
    b"GET /secret HTTP/1.1\r\n",
    b"GET /ok/../secret HTTP/1.1\r\n",
    b"GET /ok/%2e%2e/secret HTTP/1.1\r\n",
    b"GET /ok/..%2fsecret HTTP/1.1\r\n",
    b"GET //secret HTTP/1.1\r\n",
    b"GET /ok;/../secret HTTP/1.1\r\n",
    b"Host: @\r\n",
    b"Host: evil.test\r\n",
    b"Content-Length: 0\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 05\r\n",
    b"Content-Length: 5, 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: xchunked\r\n",
    b"Transfer-Encoding : chunked\r\n",
    b"Transfer-Encoding:\x0bchunked\r\n",
    b"Connection: keep-alive\r\n",
    b"Connection: close, content-length\r\n",
    b"Upgrade: h2c\r\nConnection: upgrade\r\n",
    b"Expect: 100-continue\r\n",
    b"X: y\r\n",
    b"X: y\n",
    b"\r\n",
    b"\r\n",
    b"\r\n",
    b"\n",
    b"0\r\n\r\n",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"5;x=y\r\nhello\r\n0\r\n\r\n",
    b"00000000000000000005\r\nhello\r\n0\r\n\r\n",
    b"-1\r\n",
    b"hello",
]
FIELDS = [piece for piece in PIECES if b": " in piece and b"Host" not in piece]


def requests_in(stream: bytes) -> list[str]:
    """The targets of the requests in what an origin received, read as strictly as we read; anything else fails."""
    targets = []
    while stream:
        head, separator, rest_ = stream.partition(b"\r\n\r\n")
        if not separator:
            break  # cut off with the connection
        parsed = parse_request_head(head + separator)
        targets.append(parsed.target)
        if parsed.body is None:
            while rest_:
                size, _, rest_ = rest_.partition(b"\r\n")
                count = int(size or b"0", 16)
                rest_ = rest_[count + 2 :]
                if count == 0:
                    break
        else:
            rest_ = rest_[parsed.body :]
        stream = rest_
    return targets


async def test_random_streams_cannot_smuggle() -> None:
    """300 random streams of pieces that have fooled proxies: each request that reaches the origin parses strictly, lies below
    /ok/, and there are never more of them than allowed decisions."""
    chance = random.Random(20261122)
    upstream = await Upstream(answering(echo_head)).start()
    port = upstream.port
    async with running(policy_for(rest(port)), pins=PINS) as proxy:

        async def one(stream: bytes) -> None:
            reader, writer = await proxy.connect("api.test", port)
            writer.write(stream.replace(b"@", b"api.test:%d" % port))
            try:
                await asyncio.wait_for(reader.read(), 0.3)
            except (ConnectionError, TimeoutError):
                pass
            finally:
                writer.close()

        for _ in range(15):
            streams = []
            for _ in range(20):
                start = b""
                if chance.random() < 0.8:
                    fields = chance.choices(FIELDS, k=chance.randint(0, 1))
                    start = b"".join([chance.choice(PIECES[:2]), b"Host: @\r\n", *fields, b"\r\n"])
                streams.append(start + b"".join(chance.choices(PIECES, k=chance.randint(1, 10))))
            await asyncio.gather(*(one(stream) for stream in streams))
        seen = [target for log in upstream.seen for target in requests_in(bytes(log))]
        assert len(seen) > 100, "the streams hardly got anything through: the test proves nothing"
        assert all(target.startswith("/ok/") and ".." not in target for target in seen), set(seen)
        allowed = [event for event in proxy.log.decisions() if "L7_REQUEST allow" in event["message"]]
        assert len(seen) <= len(allowed)
    await upstream.stop()


ANSWERS = [
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 204 No Content\r\n",
    b"HTTP/1.1 304 Not Modified\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 103 Hints\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n",
    b"HTTP/1.0 200\r\n",
    b"HTTP/1.1 999 ?\r\n",
    b"HTTP/1.1 \xff OK\r\n",
    b"HTTP/2 200 OK\r\n",
    b"ICY 200 OK\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: -5\r\n",
    b"Content-Length: 05\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip\r\n",
    b"Connection: close\r\n",
    b"X: \x00\r\n",
    b": empty\r\n",
    b" folded\r\n",
    b"\r\n",
    b"\r\n",
    b"\n\n",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"5\r\nhello\r\n0\r\nTrailer: 1\r\n\r\n",
    b"zz\r\n",
    b"hello",
]


async def test_random_answers_cannot_crash_the_core() -> None:
    """300 random answers: the client gets an answer or a close, the core never throws, and the next client is served."""
    chance = random.Random(20261122)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            first = chance.choice(ANSWERS[:6]) if chance.random() < 0.7 else b""
            writer.write(first + b"".join(chance.choices(ANSWERS, k=chance.randint(0, 8))))
            await writer.drain()
            if chance.random() < 0.5:
                return

    upstream = await Upstream(script).start()
    async with running(policy_for(rest(upstream.port)), pins=PINS) as proxy:

        async def one() -> None:
            line = b"GET http://api.test:%d/ok/1 HTTP/1.1\r\nHost: x\r\n\r\n" % upstream.port
            await proxy.raw(line * chance.randint(1, 3), wait=0.3)

        for _ in range(10):
            await asyncio.gather(*(one() for _ in range(30)))
    await upstream.stop()
