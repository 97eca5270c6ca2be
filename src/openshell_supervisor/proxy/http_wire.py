"""HTTP/1 and HTTP/2 as mitmproxy speaks them, with the holes closed: strict heads, bounded buffers, trailers, 1xx, windows.

mitmproxy's connection layers turn bytes into HTTP events and back. Each class here corrects one of them; `install` puts the
upstream-side ones in mitmproxy's place, because it makes those by name. Written against mitmproxy 12.2.3 (pinned); the
traps are numbered as in proxy.md 9.4 and each has a canary in tests/proxy/test_traps.py. No policy here.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h2.config
import h2.events
import h2.settings
import h11
from mitmproxy import http
from mitmproxy.net.http import http1
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.layers import http as http_layers
from mitmproxy.proxy.layers.http import _http1, _http2
from mitmproxy.proxy.layers.http._base import HttpEvent, ReceiveHttp
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    RequestEndOfMessage,
    RequestHeaders,
    RequestTrailers,
    ResponseEndOfMessage,
    ResponseProtocolError,
    ResponseTrailers,
)
from mitmproxy.proxy.layers.http._http_h2 import BufferedH2Connection

from openshell_supervisor.proxy.denials import Denial, failure
from openshell_supervisor.proxy.head import MAX_HEAD, HeadError, RequestHead, parse_request_head

# Bytes that a client may pipeline while a response is under way; more is a flood, not a pipeline (trap 7).
MAX_PIPELINED = 64 * 1024
# Interim responses before the final one; browsers stop at a handful.
MAX_INTERIM = 16
# HTTP/2 receive windows. mitmproxy announces 2**31-1, which lets a fast sender fill our memory when the other side is slow.
STREAM_WINDOW = 1024 * 1024
CONNECTION_WINDOW = 16 * 1024 * 1024
# What may wait for a slow HTTP/2 peer per stream before its source is held back.
MAX_BACKLOG = 1024 * 1024

_INTERIM = re.compile(rb"HTTP/1\.[01] (1[0-9][0-9])[ \r\n]")
_BARE_LF = re.compile(rb"(?<!\r)\n")
# Never as a trailer: framing, routing, and what a verdict was based on (RFC 9110 6.5.1).
_NO_TRAILERS = frozenset(
    {b"content-length", b"transfer-encoding", b"host", b"connection", b"upgrade", b"te", b"trailer"}
)

type Commands = layer.CommandGenerator[None]


@dataclass
class Interim(HttpEvent):
    """A 1xx response on its way to the client (trap 4: mitmproxy takes it for the final one)."""

    response: http.Response


@dataclass
class StrictRequestHeaders(RequestHeaders):
    """Request headers together with the head as our own parser saw it."""

    head: RequestHead | None = None


class _Http1Body:
    """What both HTTP/1 sides share: reading bodies with trailers (trap 3: the core crashes on them)."""

    buf: Any
    body_reader: Any
    stream_id: Any
    conn: Any

    def _read(self, event: events.Event, done: bool, is_request: bool, fail: Callable[[str], Commands]) -> Commands:
        if done:
            if isinstance(event, events.DataReceived) and self.buf:
                yield commands.CloseConnection(self.conn)
            return
        while True:
            try:
                closed = isinstance(event, events.ConnectionClosed)
                part = self.body_reader.read_eof() if closed else self.body_reader(self.buf)
            except h11.ProtocolError:
                yield from fail("the message body is not framed as its head says")
                return
            if part is None:
                if len(self.buf) > MAX_HEAD:
                    yield from fail("a chunk header or trailer is too long")
                return
            if isinstance(part, h11.Data):
                if part.data:
                    yield ReceiveHttp(self.ReceiveData(self.stream_id, bytes(part.data)))  # type: ignore[attr-defined]
                continue
            if part.headers:
                trailers = http.Headers([(n, v) for n, v in part.headers.raw_items() if n.lower() not in _NO_TRAILERS])
                kind = RequestTrailers if is_request else ResponseTrailers
                yield ReceiveHttp(kind(self.stream_id, trailers))
            end = ReceiveHttp(self.ReceiveEndOfMessage(self.stream_id))  # type: ignore[attr-defined]
            if is_request:
                yield end
                yield from self.mark_done(request=True)  # type: ignore[attr-defined]
            else:
                # First ready for the next request, then the end: without hooks between them, the end of a response starts a
                # pipelined request at once.
                yield from self.mark_done(response=True)  # type: ignore[attr-defined]
                yield end
            return


def _last_chunk(trailers: http.Headers | None) -> bytes:
    return b"0\r\n%s\r\n" % (bytes(trailers) if trailers else b"")


def _chunked(message: http.Message) -> bool:
    return "chunked" in message.headers.get("transfer-encoding", "").lower()


class StrictHttp1Server(_Http1Body, _http1.Http1Server):
    """The client's side: our parser for every head (trap 5), limits in size and time (trap 7)."""

    head_since: float = 0.0
    trailers: http.Headers | None = None

    def read_headers(self, event: events.ConnectionEvent) -> Commands:
        if isinstance(event, events.ConnectionClosed):
            self.head_since = 0.0
            yield commands.CloseConnection(self.conn)
            return
        data = bytes(self.buf)
        while data.startswith(b"\r\n"):  # RFC 9112 2.2: empty lines before a request line are to be ignored
            self.buf.maybe_extract_at_most(2)
            data = data[2:]
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD)
        if end < 0:
            if len(data) >= MAX_HEAD:
                yield from self.reject(
                    failure(431, "head_too_large", f"the request head is longer than {MAX_HEAD} bytes")
                )
            elif _BARE_LF.search(data):
                yield from self.reject(failure(400, "invalid_request", "a line does not end in CRLF"))
            elif data and not self.head_since:
                self.head_since = time.monotonic()
            return
        self.head_since = 0.0
        self.buf.maybe_extract_at_most(end + 4)
        try:
            head = parse_request_head(data[: end + 4])
        except HeadError as error:
            yield from self.reject(failure(400, "invalid_request", str(error)))
            return
        yield from self._begin(head, event)

    def _begin(self, head: RequestHead, event: events.ConnectionEvent) -> Commands:
        self.request = http.Request(
            "",
            0,
            head.method.encode(),
            b"",
            b"",
            head.target.encode("latin-1"),
            b"HTTP/" + head.version.encode(),
            http.Headers(head.headers),
            None,
            None,
            time.time(),
            None,
        )
        self.trailers = None
        yield ReceiveHttp(StrictRequestHeaders(self.stream_id, self.request, head.body == 0, head=head))
        self.body_reader = _http1.make_body_reader(head.body)
        self.state = self.read_body
        yield from self.state(event)

    def reject(self, denial: Denial) -> Commands:
        """Answer without a stream and close."""
        self.head_since = 0.0
        self.context.options.session.head_rejected(denial)
        yield commands.SendData(self.conn, denial.head_and_body())
        yield commands.CloseConnection(self.conn)
        self.state = self.done

    def read_body(self, event: events.Event) -> Commands:
        yield from self._read(event, self.request_done, True, self._body_failed)

    def _body_failed(self, text: str) -> Commands:
        yield commands.CloseConnection(self.conn)
        yield ReceiveHttp(self.ReceiveProtocolError(self.stream_id, text, code=self.ReceiveProtocolError.code))

    def wait(self, event: events.Event) -> Commands:
        if isinstance(event, events.DataReceived) and len(self.buf) > MAX_PIPELINED:
            yield commands.CloseConnection(self.conn)
            return
        yield from super().wait(event)

    def send(self, event: HttpEvent) -> Commands:
        if isinstance(event, Interim):
            if self.request is not None and self.request.http_version == "HTTP/1.1":
                yield commands.SendData(self.conn, http1.assemble_response_head(event.response))  # type: ignore[no-untyped-call]
        elif isinstance(event, ResponseTrailers):
            self.trailers = event.trailers
        elif isinstance(event, ResponseEndOfMessage) and self.trailers and self.response and _chunked(self.response):
            yield commands.SendData(self.conn, _last_chunk(self.trailers))
            yield from self.mark_done(response=True)
        else:
            yield from super().send(event)


class StrictHttp1Client(_Http1Body, _http1.Http1Client):
    """The upstream's side: 1xx passed on (trap 4), bounded heads (trap 7), trailers (trap 3)."""

    trailers: http.Headers | None = None
    interim: int = 0

    def read_headers(self, event: events.ConnectionEvent) -> Commands:
        while isinstance(event, events.DataReceived) and self.request:
            data = bytes(self.buf)
            match = _INTERIM.match(data)
            if match is None or match.group(1) == b"101":
                if len(data) > MAX_HEAD and b"\r\n\r\n" not in data[: MAX_HEAD + 4] and b"\n\n" not in data[:MAX_HEAD]:
                    yield from self._body_failed("the response head is too long")
                    return
                break
            lines = self.buf.maybe_extract_lines()
            self.interim += 1
            if lines is None or self.interim > MAX_INTERIM:
                if len(data) > MAX_HEAD or self.interim > MAX_INTERIM:
                    yield from self._body_failed("too many interim responses")
                return
            yield from self._interim(lines)
        if isinstance(event, events.ConnectionClosed) or self.buf or not self.request:
            yield from super().read_headers(event)

    def _interim(self, lines: list[bytearray]) -> Commands:
        try:
            response = http1.read_response_head([bytes(line) for line in lines])
        except ValueError:
            yield from self._body_failed("an interim response is malformed")
            return
        yield ReceiveHttp(Interim(self.stream_id, response))

    def read_body(self, event: events.Event) -> Commands:
        yield from self._read(event, self.response_done, False, self._body_failed)

    def _body_failed(self, text: str) -> Commands:
        yield commands.CloseConnection(self.conn)
        self.state = self.done
        yield ReceiveHttp(ResponseProtocolError(self.stream_id, text, ErrorCode.GENERIC_SERVER_ERROR))

    def send(self, event: HttpEvent) -> Commands:
        if isinstance(event, RequestHeaders):
            self.trailers, self.interim = None, 0
            yield from super().send(event)
        elif isinstance(event, RequestTrailers):
            self.trailers = event.trailers
        elif isinstance(event, RequestEndOfMessage) and self.trailers and self.request and _chunked(self.request):
            yield commands.SendData(self.conn, _last_chunk(self.trailers))
            yield from self.mark_done(request=True)
        else:
            yield from super().send(event)


class BoundedH2Connection(BufferedH2Connection):
    """Real receive windows, and acknowledgement that can wait until the other side took the bytes (trap 7)."""

    def __init__(self, config: h2.config.H2Configuration) -> None:
        super().__init__(config)
        self.local_settings.initial_window_size = STREAM_WINDOW
        self.local_settings.acknowledge()
        self.held: dict[int, int] = {}
        self.congested: Callable[[int], bool] = lambda stream_id: False

    def initiate_connection(self) -> None:
        super(BufferedH2Connection, self).initiate_connection()
        self.increment_flow_control_window(CONNECTION_WINDOW - self.inbound_flow_control_window)

    def backlog(self, stream_id: int) -> int:
        """Bytes that wait for the peer's window."""
        waiting: deque[Any] | None = self.stream_buffers.get(stream_id)
        return sum(len(part.data) for part in waiting) if waiting else 0

    def acknowledge_received_data(self, acknowledged_size: int, stream_id: int) -> None:
        if stream_id in self.held or self.congested(stream_id):
            self.held[stream_id] = self.held.get(stream_id, 0) + acknowledged_size
            return
        super().acknowledge_received_data(acknowledged_size, stream_id)

    def release(self) -> bytes:
        """Acknowledge what was held back for streams that flow again; gives the bytes to send."""
        for stream_id in [held for held in self.held if not self.congested(held)]:
            super().acknowledge_received_data(self.held.pop(stream_id), stream_id)
        return self.data_to_send()


class BoundedHttp2Server(_http2.Http2Server):
    """The client's side of HTTP/2."""

    h2_conn: BoundedH2Connection

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.h2_conn = BoundedH2Connection(self.h2_conf)

    def _handle_event(self, event: events.Event) -> Commands:
        if isinstance(event, Interim):
            if self.is_open_for_us(event.stream_id):
                status = (b":status", b"%d" % event.response.status_code)
                self.h2_conn.send_headers(event.stream_id, [status])
                yield commands.SendData(self.conn, self.h2_conn.data_to_send())
        else:
            yield from super()._handle_event(event)


class BoundedHttp2Client(_http2.Http2Client):
    """The upstream's side of HTTP/2."""

    h2_conn: BoundedH2Connection

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.h2_conn = BoundedH2Connection(self.h2_conf)
        self.h2_conn.local_settings.enable_push = 0
        self.h2_conn.local_settings.acknowledge()

    def handle_h2_event(self, event: h2.events.Event) -> layer.CommandGenerator[bool]:
        if isinstance(event, h2.events.InformationalResponseReceived):
            status = next((value for name, value in event.headers or [] if name == b":status"), b"0")
            if event.stream_id in self.their_stream_id and status.isdigit() and status != b"101":
                response = http.Response(b"HTTP/1.1", int(status), b"", http.Headers(), None, None, time.time(), None)
                yield ReceiveHttp(Interim(event.stream_id, response))
            return False
        return (yield from super().handle_h2_event(event))


def _fixed_error(status_code: int, message: str = "") -> bytes:
    """In place of mitmproxy's HTML with its name and the peer's bytes in it (trap 14). `message` is dropped on purpose."""
    return failure(status_code, "internal_error", "the proxy could not carry this message").payload()


def _fixed_error_response(status_code: int, message: str = "") -> bytes:
    return failure(status_code, "internal_error", "the proxy could not carry this message").head_and_body()


def install() -> None:
    """Put the classes where mitmproxy looks for them by name. Idempotent; called once at import of the session."""
    for name, replacement in (
        ("Http1Server", StrictHttp1Server),
        ("Http1Client", StrictHttp1Client),
        ("Http2Server", BoundedHttp2Server),
        ("Http2Client", BoundedHttp2Client),
    ):
        if not hasattr(http_layers, name):
            raise ImportError(f"mitmproxy.proxy.layers.http has no {name}: not the pinned version")
        setattr(http_layers, name, replacement)
    # Each message's seven fields are type-checked by reflection: an eighth of the time of a request. The parsers know better.
    http.MessageData.__post_init__ = lambda self: None  # type: ignore[method-assign]
    _http1.make_error_response = _fixed_error_response
    _http2.format_error = _fixed_error  # type: ignore[attr-defined]
