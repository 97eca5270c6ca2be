"""One client connection's HTTP: mitmproxy's sans-io layers driven by our wires, each request asked about, nothing assumed.

The session takes the place of mitmproxy's connection handler: no Master, no addons, no task per event. An event goes in, commands
come out, and a command that is not understood ends the session (fail closed; trap 1). A crash of the core ends it as well
(trap 23), instead of leaving a dead, open connection. This is the only driver of mitmproxy; import it late (`Proxy.warm`).
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from mitmproxy import http
from mitmproxy.connection import Client, Connection, ConnectionState, Server
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.mode_specs import ProxyMode

from openshell_supervisor.proxy import http_wire
from openshell_supervisor.proxy.denials import Denial, failure
from openshell_supervisor.proxy.gate import Gate, Origin
from openshell_supervisor.proxy.http_stream import PolicyLayer, Prepare, PrepareCompleted
from openshell_supervisor.proxy.inspection import Inspection
from openshell_supervisor.proxy.local import LocalHost
from openshell_supervisor.proxy.wire import Wire

http_wire.install()

# The whole of a request head must be there this long after its first byte (slowloris; nginx waits 60 s per read).
HEAD_TIMEOUT = 30.0
# A kept-alive connection without a request. Longer than the 60-120 s that clients keep theirs.
KEEPALIVE_TIMEOUT = 300.0
# An exchange in which neither side says anything: event streams and long polls are quiet for minutes.
EXCHANGE_TIMEOUT = 3600.0
# After a refusal the client has this long to read it and go.
LINGER_TIMEOUT = 10.0
TICK = 5.0
# Upstream connections that one client connection may hold open (absolute-form requests to many hosts).
MAX_UPSTREAMS = 32

_MODE = ProxyMode.parse("regular")

type Dial = Callable[[HttpSession, Server], Awaitable[Wire]]


class DialRefused(Exception):
    """The dialler's answer when there will be no connection: what to tell the client."""

    def __init__(self, denial: Denial) -> None:
        super().__init__(denial.reason_id)
        self.denial = denial


class SessionOptions:
    """What mitmproxy's layers read from `context.options`; a plain object, because the real one takes 2 µs per read."""

    validate_inbound_headers = True
    normalize_outbound_headers = True
    http2_ping_keepalive = 0
    proxy_debug = False
    store_streamed_bodies = False
    body_size_limit = None
    stream_large_bodies = None

    def __init__(self, session: HttpSession) -> None:
        self.session = session


class HttpSession:
    """The exchanges of one client connection. `dial(session, connection)` gives a connected wire or raises `DialRefused`."""

    def __init__(self, origin: Origin, gate: Gate, local_host: LocalHost, dial: Dial, *, protocol: str = "") -> None:
        self.origin = origin
        self.inspection = Inspection(origin, gate, local_host)
        self._gate = gate
        self._dial = dial
        self._loop = asyncio.get_running_loop()
        source = (origin.source.ip or "", origin.source.port or 0)
        self.client = Client(
            peername=source, sockname=("", 0), timestamp_start=time.time(), proxy_mode=_MODE, state=ConnectionState.OPEN
        )
        self.client.alpn = protocol.encode() or None
        self._context = Context(self.client, SessionOptions(self))  # type: ignore[arg-type]
        self._layer: PolicyLayer | None = None
        self._wires: dict[Connection, Wire] = {}
        self._queue: collections.deque[events.Event] = collections.deque()
        self._dirty: list[Wire] = []
        self._busy = False
        self._dials: set[asyncio.Task[None]] = set()
        self._preparing: set[asyncio.Task[None]] = set()
        self._failures: dict[tuple[str, int], Denial] = {}
        self._last = self._loop.time()
        self._linger_until = 0.0
        self._timer = self._loop.call_later(TICK, self._tick)
        self.done: asyncio.Future[str] = self._loop.create_future()

    # -- wires -----------------------------------------------------------------------------------------------------

    def client_wire(self, *, tls: bool) -> Wire:
        """The leg to the client; give it to the loop as a protocol."""
        return self._add_wire(self.client, tls)

    def upstream_wire(self, connection: Server | None, *, tls: bool) -> Wire:
        """A leg to an upstream that is about to be connected: for the layers' own connection, or for a new one."""
        return Wire(self, connection or Server(address=(self.origin.host, self.origin.port)), tls=tls)

    def adopt_upstream(self, wire: Wire) -> None:
        """Make a leg that was connected before the start the one that requests take, unless it is gone already."""
        if wire.transport is None or wire.transport.is_closing():
            return
        self._register(wire)
        self._context.server = wire.connection

    def _register(self, wire: Wire) -> None:
        wire.connection.state = ConnectionState.OPEN
        wire.connection.timestamp_start = time.time()
        self._wires[wire.connection] = wire

    def _add_wire(self, connection: Connection, tls: bool) -> Wire:
        wire = self._wires[connection] = Wire(self, connection, tls=tls)
        return wire

    def start(self, first: bytes = b"") -> None:
        """Begin. `first` was read from the client before the session had it."""
        self._layer = PolicyLayer(self._context)
        self._queue.appendleft(events.Start())
        if first:
            self._queue.insert(1, events.DataReceived(self.client, first))
        self._run()

    def cut(self, reason: str) -> None:
        """End the session at once, whatever is under way."""
        for wire in list(self._wires.values()):
            wire.abort()
        self._finish(reason)

    def expect_close(self) -> None:
        """A refusal was sent; the client gets a moment to read it."""
        self._linger_until = self._loop.time() + LINGER_TIMEOUT

    # -- events from wires -----------------------------------------------------------------------------------------

    def received(self, wire: Wire, data: bytes) -> None:
        """Bytes came in."""
        self._last = self._loop.time()
        self._queue.append(events.DataReceived(wire.connection, data))
        self._run()

    def ended(self, wire: Wire) -> None:
        """The peer sent its last byte (plain TCP only)."""
        if wire.connection.state & ConnectionState.CAN_READ:
            wire.connection.state &= ~ConnectionState.CAN_READ
            self._queue.append(events.ConnectionClosed(wire.connection))
            self._run()
            if wire.connection.state is ConnectionState.CLOSED:
                wire.close()

    def lost(self, wire: Wire) -> None:
        """The connection is gone."""
        connection = wire.connection
        heard = connection.state & ConnectionState.CAN_READ or connection is self.client
        connection.state = ConnectionState.CLOSED
        if self._wires.pop(connection, None) is None:
            return
        if heard:
            self._queue.append(events.ConnectionClosed(connection))
            self._run()
        if connection is self.client:
            for other in list(self._wires.values()):
                other.close()
            self._finish("closed")
        elif self._layer is not None and not self._layer.streams:
            self._layer.connections.pop(connection, None)
        self.write_pressure(wire)

    def write_pressure(self, wire: Wire) -> None:
        """Whoever feeds a peer that does not keep up is left waiting in the kernel."""
        client = self._wires.get(self.client)
        if client is None:
            return
        upstream_full = False
        for connection, other in self._wires.items():
            if other is not client:
                upstream_full = upstream_full or other.full
                behind = (
                    self.client.alpn == b"h2"
                    and self._layer is not None
                    and self._layer.client_is_behind_for(connection)
                )
                other.allow_reading(not client.full and not behind)
        client.allow_reading(not upstream_full and not self._dials and not self._preparing)

    # -- the engine ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._busy or self._layer is None:
            return
        self._busy = True
        try:
            while self._queue:
                for command in self._layer.handle_event(self._queue.popleft()):
                    self._execute(command)
        except Exception as error:  # noqa: BLE001 - the core's boundary: a crash ends the connection, not the program (trap 23)
            self._gate.failed(f"HTTP relay error: internal error ({type(error).__name__})", self.origin)
            self.crashed(error)
            self.cut("crashed")
        finally:
            self._busy = False
        for wire in self._dirty:
            wire.flush()
        self._dirty.clear()
        client = self._wires.get(self.client)
        if client is not None and self.client.alpn == b"h2":
            self.write_pressure(client)

    def crashed(self, error: Exception) -> None:
        """Called with the exception that ended the session; tests look here, production needs no more than the event."""

    def _execute(self, command: commands.Command) -> None:
        if isinstance(command, commands.SendData):
            wire = self._wires.get(command.connection)
            if wire is not None and wire.write(command.data):
                self._dirty.append(wire)
        elif isinstance(command, commands.Log):
            return  # trap 15: mitmproxy's texts quote the peer
        elif isinstance(command, commands.OpenConnection):
            self._open(command)
        elif isinstance(command, commands.CloseConnection):
            self._close(command)
        elif isinstance(command, Prepare):
            self._start_preparing(command)
        elif isinstance(command, commands.RequestWakeup):
            self._loop.call_later(command.delay, self._wake, command)
        else:
            raise RuntimeError(f"unexpected command {type(command).__name__}")

    def _start_preparing(self, command: Prepare) -> None:
        task = self._loop.create_task(self._prepare(command))
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)
        client = self._wires.get(self.client)
        if client is not None:
            client.allow_reading(False)

    async def _prepare(self, command: Prepare) -> None:
        try:
            await command.awaited
        except Exception as failed:  # noqa: BLE001 - a task boundary: the question stays unanswered, so it is denied
            self._gate.failed(f"HTTP relay error: no verdict ({type(failed).__name__})", self.origin)
        self._preparing.discard(asyncio.current_task())
        if self.done.done():
            return
        self._queue.append(PrepareCompleted(command))
        self._run()
        client = self._wires.get(self.client)
        if client is not None:
            self.write_pressure(client)

    def _wake(self, command: commands.RequestWakeup) -> None:
        if not self.done.done():
            self._queue.append(events.Wakeup(command))
            self._run()

    def _close(self, command: commands.CloseConnection) -> None:
        connection = command.connection
        half = isinstance(command, commands.CloseTcpConnection) and command.half_close
        wire = self._wires.get(connection)
        if wire is None:
            return
        if half:
            connection.state &= ~ConnectionState.CAN_WRITE
        if not half or connection.state is ConnectionState.CLOSED:
            connection.state = ConnectionState.CLOSED
            wire.close()
        else:
            wire.close(half=True)

    def _open(self, command: commands.OpenConnection) -> None:
        task = self._loop.create_task(self._connect(command))
        self._dials.add(task)
        task.add_done_callback(self._dials.discard)
        client = self._wires.get(self.client)
        if client is not None:
            client.allow_reading(False)

    async def _connect(self, command: commands.OpenConnection) -> None:
        server = command.connection
        assert isinstance(server, Server) and server.address is not None
        host, port = server.address[0], server.address[1]
        error: str | None = "refused"
        try:
            if len(self._wires) > MAX_UPSTREAMS:
                raise DialRefused(failure(503, "too_many_connections", "too many upstreams on one client connection"))
            wire = await self._dial(self, server)
        except DialRefused as refusal:
            self._failures[host, port] = refusal.denial
        except Exception as failed:  # noqa: BLE001 - a task boundary: a broken dialler must not leave the request waiting
            self._gate.failed(f"HTTP relay error: no upstream ({type(failed).__name__})", self.origin)
        else:
            error = None
            self._register(wire)
        if self._dials:
            self._dials.discard(asyncio.current_task())
        if self.done.done():
            if error is None:
                wire.abort()
            return
        self._queue.append(events.OpenConnectionCompleted(command, error))
        self._run()
        if error is None and wire.transport is not None and wire.transport.is_closing():
            self.lost(wire)
        client = self._wires.get(self.client)
        if client is not None:
            self.write_pressure(client)

    def _tick(self) -> None:
        now = self._loop.time()
        layer, client = self._layer, self._wires.get(self.client)
        server = layer.connections.get(self.client) if layer is not None else None
        head_since = getattr(server, "head_since", 0.0)
        quiet = now - self._last
        if head_since and time.monotonic() - head_since > HEAD_TIMEOUT and client is not None:
            denial = failure(408, "head_timeout", f"the request head did not arrive within {HEAD_TIMEOUT:g} s")
            self.head_rejected(denial)
            client.write(denial.head_and_body())
            client.close()
        elif quiet > EXCHANGE_TIMEOUT or (quiet > KEEPALIVE_TIMEOUT and not (layer and layer.mid_exchange())):
            self.cut("idle")
            return
        elif self._linger_until and now > self._linger_until and self.client.alpn != b"h2":
            self.cut("lingered")
            return
        self._timer = self._loop.call_later(TICK, self._tick)

    def _finish(self, reason: str) -> None:
        self._timer.cancel()
        for task in [*self._dials, *self._preparing]:
            task.cancel()
        if not self.done.done():
            self.done.set_result(reason)

    # -- what the layers ask ---------------------------------------------------------------------------------------

    def head_rejected(self, denial: Denial) -> None:
        """A head was refused before there was a request."""
        self._gate.request_rejected(self.origin, "-", "/", str(denial.body["detail"]))

    def upstream_failed(self, request: http.Request, text: str) -> None:
        """An upstream broke the protocol. `text` is ours."""
        word = "FORWARD" if self.origin.forward else "L7"
        self._gate.failed(f"{word} relay error: {text}", self._origin_of(request.host, request.port))

    def dial_failure(self, address: tuple[str, int], error: str) -> Denial:
        """Why there is no upstream connection."""
        return self._failures.pop(address, None) or failure(
            502, "upstream_unreachable", "the upstream cannot be reached"
        )

    def _origin_of(self, host: str, port: int) -> Origin:
        if not self.origin.forward or not host:
            return self.origin
        return replace(self.origin, host=host, port=port, scheme="http", forward=True)
