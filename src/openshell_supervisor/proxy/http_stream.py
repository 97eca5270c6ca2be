"""One HTTP exchange inside mitmproxy's core: asked before the first byte leaves, streamed both ways, refused without waiting.

`PolicyStream` replaces mitmproxy's stream. It has no hooks and no addons: the session's answer is a function call inside the
header state, so there is no moment in which an undecided request could pass, and an exception there is a refusal (trap 1). A
refusal is sent at once, not after the body (trap 2). Bodies are never kept (trap 6). The verdicts are not made here.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mitmproxy import http
from mitmproxy.connection import Server
from mitmproxy.flow import Error
from mitmproxy.net.http.status_codes import RESPONSES
from mitmproxy.net.http.validate import validate_headers
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.layers import tcp
from mitmproxy.proxy.layers.http import (
    DropStream,
    GetHttpConnection,
    HttpLayer,
    HTTPMode,
    HttpStream,
    SendHttp,
)
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    RequestData,
    RequestEndOfMessage,
    RequestHeaders,
    RequestProtocolError,
    RequestTrailers,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
    ResponseTrailers,
)

from openshell_supervisor.proxy.denials import Denial, failure
from openshell_supervisor.proxy.http_wire import (
    MAX_BACKLOG,
    BoundedHttp2Client,
    BoundedHttp2Server,
    Commands,
    Interim,
    StrictRequestHeaders,
)
from openshell_supervisor.proxy.inspection import valid_upgrade

if TYPE_CHECKING:
    from mitmproxy.connection import Connection
    from mitmproxy.proxy.context import Context

    from openshell_supervisor.proxy.http_session import HttpSession

# Bytes of a refused body that are swallowed so that the client gets to read the answer before a reset would destroy it.
MAX_DISCARDED = 4 * 1024 * 1024

_UNREACHABLE_HINT = "The request was allowed; the upstream is at fault or away. Retrying later is fine."


class Prepare(commands.Command):
    """Wait for what the verdict needs; the stream stands still, the others go on."""

    blocking = True

    def __init__(self, awaited: Awaitable[None]) -> None:
        self.awaited = awaited


@dataclass(repr=False)
class PrepareCompleted(events.CommandCompleted):  # type: ignore[no-untyped-call]  # mitmproxy registers it
    """The wait is over."""

    command: Prepare
    reply: None = None


class PolicyStream(HttpStream):
    """A request and its response. `self.context.options.session` decides."""

    discarded = 0
    upgrading = False

    @property
    def session(self) -> HttpSession:
        """The session that owns this stream's connection."""
        session: HttpSession = self.context.options.session
        return session

    def _handle_event(self, event: events.Event) -> Commands:
        if isinstance(event, Interim):
            if self.server_state == self.state_wait_for_response_headers:
                yield SendHttp(event, self.context.client)
            return
        yield from super()._handle_event(event)

    # -- the request -----------------------------------------------------------------------------------------------

    def state_wait_for_request_headers(self, event: RequestHeaders) -> Commands:
        request = event.request
        self.flow = http.HTTPFlow(self.context.client, self.context.server)
        self.flow.request = request
        self.flow.live = True
        head = event.head if isinstance(event, StrictRequestHeaders) else None
        preparation = self.session.inspection.preparation(request, head)
        if preparation is not None:
            yield Prepare(preparation)
        answer = self.session.inspection.ask(request, head)
        if not isinstance(answer, bool):
            yield from self.refuse(answer, event.end_stream)
            return
        self.upgrading = answer
        self.server_state = self.state_wait_for_response_headers
        if not (yield from self.make_server_connection()):
            return
        self.client_state = self.state_stream_request_body
        yield SendHttp(RequestHeaders(self.stream_id, request, event.end_stream), self.context.server)

    def make_server_connection(self) -> layer.CommandGenerator[bool]:
        # TLS, where there is any, lies below the session's wires: to mitmproxy every connection is plain.
        address = (self.flow.request.host, self.flow.request.port)
        connection, error = yield GetHttpConnection(address, False, None, "tcp")
        if error:
            self.client_state = self.state_errored
            yield from self.refuse(self.session.dial_failure(address, error), end_stream=False)
            return False
        self.context.server = self.flow.server_conn = connection
        return True

    def state_stream_request_body(self, event: events.Event) -> Commands:
        if isinstance(event, RequestEndOfMessage):
            self.client_state = self.state_done
            yield SendHttp(event, self.context.server)
            if self.server_state == self.state_done:
                yield from self.flow_done()
        elif isinstance(event, RequestData | RequestTrailers):
            yield SendHttp(event, self.context.server)

    # -- refusing --------------------------------------------------------------------------------------------------

    def refuse(self, denial: Denial | bytes, end_stream: bool) -> Commands:
        """Answer now. What is left of an HTTP/1 body is swallowed within limits, then the connection ends."""
        request = self.flow.request
        if isinstance(denial, bytes):
            payload, status = denial, 200
            fields = [(b"Content-Type", b"text/plain"), (b"Content-Length", b"%d" % len(payload))]
        elif request.is_http2 and request.headers.get("content-type", "").startswith("application/grpc"):
            payload, status, fields = b"", 200, denial.grpc_fields()
        else:
            payload = denial.payload()
            status, fields = denial.status, denial.fields(payload)
        if not request.is_http2:
            fields.append((b"Connection", b"close"))
            self.session.expect_close()
        version = b"HTTP/2.0" if request.is_http2 else b"HTTP/1.1"
        reason = RESPONSES.get(status, "").encode()
        response = http.Response(version, status, reason, http.Headers(fields), None, None, time.time(), None)
        self.flow.response = response
        self.flow.live = False
        self.client_state = self.state_discard
        self.server_state = self.state_errored
        bodiless = not payload or request.method == "HEAD"
        yield SendHttp(ResponseHeaders(self.stream_id, response, bodiless), self.context.client)
        if not bodiless:
            yield SendHttp(ResponseData(self.stream_id, payload), self.context.client)
        yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)
        if end_stream or request.is_http2:
            yield DropStream(self.stream_id)

    def state_discard(self, event: events.Event) -> Commands:
        """The answer is out; the rest of the request is of no interest."""
        if isinstance(event, RequestData):
            self.discarded += len(event.data)
            if self.discarded > MAX_DISCARDED:
                yield commands.CloseConnection(self.context.client)
        elif isinstance(event, RequestEndOfMessage):
            yield DropStream(self.stream_id)

    # -- the response ----------------------------------------------------------------------------------------------

    def state_wait_for_response_headers(self, event: ResponseHeaders) -> Commands:
        response = event.response
        self.flow.response = response
        complaint = self._unacceptable(response)
        if complaint:
            yield from self._upstream_fault(complaint)
            return
        self.server_state = self.state_stream_response_body
        yield SendHttp(ResponseHeaders(self.stream_id, response, event.end_stream), self.context.client)

    def _unacceptable(self, response: http.Response) -> str:
        if response.status_code == 101:
            return (
                ""
                if self.upgrading and valid_upgrade(self.flow.request, response)
                else ("the upstream switched protocols without being asked to, or wrongly")
            )
        try:
            validate_headers(response)
        except ValueError:
            return "the upstream's response head is malformed or ambiguous"
        return ""

    def _upstream_fault(self, text: str) -> Commands:
        """The upstream broke the protocol before the client saw anything: cut it off, tell the client."""
        self.session.upstream_failed(self.flow.request, text)
        if isinstance(self.flow.server_conn, Server) and self.context.client.alpn != b"h2":
            yield commands.CloseConnection(self.flow.server_conn)
        else:
            code = ErrorCode.CANCEL
            yield SendHttp(RequestProtocolError(self.stream_id, "cancelled", code), self.flow.server_conn)
        done = self.client_state == self.state_done
        yield from self.refuse(failure(502, "upstream_unreachable", text, _UNREACHABLE_HINT), end_stream=done)

    def state_stream_response_body(self, event: events.Event) -> Commands:
        if isinstance(event, ResponseEndOfMessage):
            self.server_state = self.state_done
            if self.client_state == self.state_done:
                yield from self.flow_done()
        elif isinstance(event, ResponseData | ResponseTrailers):
            yield SendHttp(event, self.context.client)

    def flow_done(self) -> Commands:
        self.flow.live = False
        if self.flow.response is not None and self.flow.response.status_code == 101:
            # `ignore` keeps no messages (trap 7); the verdict was given on the upgrade request (trap 10).
            self.child_layer = tcp.TCPLayer(self.context, ignore=True)
            self._handle_event = self.passthrough  # type: ignore[method-assign]
            yield from self.child_layer.handle_event(events.Start())
        else:
            yield DropStream(self.stream_id)
        yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)

    # -- trouble ---------------------------------------------------------------------------------------------------

    def handle_protocol_error(self, event: RequestProtocolError | ResponseProtocolError) -> Commands:
        if isinstance(event, ResponseProtocolError):
            waiting = self.server_state == self.state_wait_for_response_headers
            if waiting and event.code is not ErrorCode.HTTP_1_1_REQUIRED:
                text = "the upstream closed the connection or answered with something that is not HTTP"
                self.session.upstream_failed(self.flow.request, text)
                done = self.client_state == self.state_done
                yield from self.refuse(failure(502, "upstream_unreachable", text, _UNREACHABLE_HINT), end_stream=done)
                return
            if self.client_state != self.state_errored and self.client_state != self.state_discard:
                # A response that breaks off must not look complete: the client's connection or stream is broken off too.
                yield SendHttp(event, self.context.client)
            self.client_state = self.server_state = self.state_errored
        else:
            if self.server_state not in (self.state_errored, self.state_uninitialized):
                yield SendHttp(event, self.context.server)
            self.client_state = self.server_state = self.state_errored
        if hasattr(self, "flow"):
            self.flow.error = Error("the exchange was broken off")
            self.flow.live = False
        yield DropStream(self.stream_id)


def _http2_layer(child: object) -> BoundedHttp2Client | BoundedHttp2Server | None:
    """The HTTP/2 side behind an entry of `HttpLayer.connections`: mitmproxy wraps an upstream's in an `HttpClient`."""
    inner = getattr(child, "child_layer", child)
    return inner if isinstance(inner, BoundedHttp2Client | BoundedHttp2Server) else None


class PolicyLayer(HttpLayer):
    """The HTTP layer of one client connection, with our streams and with HTTP/2 windows tied to the other side (trap 7)."""

    def __init__(self, context: Context) -> None:
        super().__init__(context, HTTPMode.transparent)

    def make_stream(self, stream_id: int) -> Commands:
        self.streams[stream_id] = stream = PolicyStream(self.context.fork(), stream_id)
        stream.client_state = stream.state_wait_for_request_headers
        yield from ()

    def event_to_child(self, child: layer.Layer | HttpStream, event: events.Event) -> Commands:
        upstream = _http2_layer(child)
        if isinstance(event, RequestHeaders) and isinstance(upstream, BoundedHttp2Client):
            ours = upstream.their_stream_id
            upstream.h2_conn.congested = lambda stream_id: self._client_is_behind(ours.get(stream_id, -1))
        return super().event_to_child(child, event)

    def _handle_event(self, event: events.Event) -> Commands:
        yield from super()._handle_event(event)
        if isinstance(event, events.Start):
            server = self.connections[self.context.client]
            if isinstance(server, BoundedHttp2Server):
                server.h2_conn.congested = self._upstream_is_behind
        elif self.context.client.alpn == b"h2" and isinstance(event, events.DataReceived):
            for connection, child in list(self.connections.items()):
                peer = _http2_layer(child)
                if peer is not None and peer.h2_conn.held:
                    acknowledgement = peer.h2_conn.release()
                    if acknowledgement:
                        yield commands.SendData(connection, acknowledgement)

    def _client_is_behind(self, stream_id: int) -> bool:
        server = self.connections.get(self.context.client)
        return isinstance(server, BoundedHttp2Server) and server.h2_conn.backlog(stream_id) > MAX_BACKLOG

    def _upstream_is_behind(self, stream_id: int) -> bool:
        stream = self.streams.get(stream_id)
        upstream = _http2_layer(self.connections.get(stream.context.server)) if stream else None
        if not isinstance(upstream, BoundedHttp2Client):
            return False
        return upstream.h2_conn.backlog(upstream.our_stream_id.get(stream_id, -1)) > MAX_BACKLOG

    def client_is_behind_for(self, connection: Connection) -> bool:
        """True when an HTTP/1 upstream connection should not be read because its HTTP/2 client does not take more."""
        if connection.alpn == b"h2":
            return False  # has windows of its own, per stream
        return any(
            stream.context.server is connection and self._client_is_behind(stream_id)
            for stream_id, stream in self.streams.items()
        )

    def mid_exchange(self) -> bool:
        """True while a request is under way."""
        return bool(self.streams)
