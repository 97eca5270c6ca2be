"""What follows an accepted head: verdict, address check, dial, and then tunnel, session or refusal.

The order is the contract (proxy.md 2.1): no name is resolved before its verdict, nothing is dialled before its address was
checked, `200` is only said over a connected upstream, and an endpoint that must be inspected never becomes an opaque tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from openshell_supervisor.proxy import client_hello, denials, sockets, tls
from openshell_supervisor.proxy.client_hello import ClientHello, HelloError
from openshell_supervisor.proxy.denials import Denial, failure
from openshell_supervisor.proxy.destinations import Destination, DestinationRefused, Destinations, UpstreamUnreachable
from openshell_supervisor.proxy.gate import Gate, Origin
from openshell_supervisor.proxy.local import LocalHost
from openshell_supervisor.proxy.tls import TlsSuite, failure_text
from openshell_supervisor.proxy.tunnel import Tunnel
from openshell_supervisor.verdict.facts import TargetError, Verdict, canonical_host

if TYPE_CHECKING:
    from mitmproxy.connection import Server

    from openshell_supervisor.proxy.http_session import HttpSession
    from openshell_supervisor.proxy.wire import Wire

ESTABLISHED = b"HTTP/1.1 200 Connection Established\r\n\r\n"
ANSWER_TIMEOUT = 10.0
# The first byte in an inspected tunnel. A client that waits for the server to speak first waits in vain there.
PEEK_TIMEOUT = 30.0
HELLO_TIMEOUT = 10.0
_METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"CONNECT")
_PEEK = 24  # proxy.md 2.4: enough for any method, a TLS record header or the HTTP/2 preface
_METHOD_START = re.compile(rb"[A-Z]{1,8}")
_HINT = "The destination was allowed; the upstream is at fault or away. Retrying later is fine."


class ConnectHandler:
    """Serves one client socket at a time per call; holds what all connections share."""

    def __init__(
        self,
        gate: Gate,
        destinations: Destinations,
        suite: TlsSuite,
        local_host: LocalHost,
        sessions: Callable[[], Awaitable[type[HttpSession]]],
    ) -> None:
        self._gate = gate
        self._destinations = destinations
        self._suite = suite
        self._local = local_host
        self._sessions = sessions
        self._tunnels: set[Tunnel] = set()

    def prepare(self) -> None:
        """Parse the system's roots and our own keys now; takes tens of milliseconds, for a thread."""
        self._suite.prepare()

    def shed(self, older_than: float) -> None:
        """Cut the tunnels whose client ended its direction more than `older_than` seconds ago; for when there is no place left.

        Such a client may only have finished sending, but far more often it is gone.
        """
        limit = asyncio.get_running_loop().time() - older_than
        for tunnel in [t for t in self._tunnels if t.client_ended_at is not None and t.client_ended_at < limit]:
            tunnel.cut("shed")

    async def _relay(self, client: socket.socket, upstream: socket.socket) -> None:
        tunnel = Tunnel(client, upstream)
        self._tunnels.add(tunnel)
        try:
            await tunnel.run()
        finally:
            self._tunnels.discard(tunnel)

    def close(self) -> None:
        """Let the resolver's threads end."""
        self._destinations.close()

    async def serve_plain(self, client: socket.socket, origin: Origin, head: bytes) -> None:
        """Absolute-form HTTP, keep-alive: the session asks anew for each request; `head` is the first one, already read."""
        session_type = await self._sessions()
        session = session_type(origin, self._gate, self._local, self._dial_plain)
        with _ending(session):
            await self._attach_client(session, client, None)
            session.start(head)
            await session.done

    async def serve(self, client: socket.socket, origin: Origin) -> None:
        """A CONNECT, from its verdict to the end of its tunnel."""
        await self._gate.prepare(origin)
        verdict = self._gate.connection(origin)
        if not verdict.allow:
            self._gate.connect_denied(origin, verdict)
            if not self._gate.observe:
                denial = denials.connection_denied("CONNECT", origin.host, origin.port, verdict)
                await sockets.answer_and_linger(client, denial.head_and_body(), ANSWER_TIMEOUT)
                return
        try:
            destination = await self._resolve(origin, verdict, "CONNECT")
            upstream = await self._dial(origin, destination)
        except _Refused as refusal:
            await sockets.answer_and_linger(client, refusal.denial.head_and_body(), ANSWER_TIMEOUT)
            return
        with upstream:
            await sockets.send(client, ESTABLISHED, ANSWER_TIMEOUT)
            inspected = verdict.allow and verdict.inspected and not verdict.tls_skip
            if verdict.allow:
                self._gate.connect_allowed(origin, verdict, inspected=inspected)
            if inspected:
                await self._inspect(client, upstream, origin, verdict, destination)
            else:
                await self._relay(client, upstream)

    # -- reaching the upstream -------------------------------------------------------------------------------------

    async def _resolve(self, origin: Origin, verdict: Verdict, method: str) -> Destination:
        try:
            destination, complaint = await self._destinations.resolve(
                origin.host, origin.port, verdict, enforce=not self._gate.observe
            )
        except DestinationRefused as refusal:
            self._gate.address_denied(origin, method, refusal.kind, refusal.reason, verdict)
            raise _Refused(
                denials.address_denied(
                    method, origin.host, origin.port, refusal.kind, refusal.reason, verdict.generation
                )
            ) from None
        if complaint:
            self._gate.address_denied(origin, method, "internal address", complaint, verdict)
        return destination

    async def _dial(self, origin: Origin, destination: Destination) -> socket.socket:
        try:
            return await self._destinations.dial(destination)
        except UpstreamUnreachable as error:
            word = (
                "FORWARD upstream connect failed"
                if origin.forward
                else "Proxy connection error: upstream connect failed"
            )
            self._gate.failed(f"{word} for {origin.host}:{origin.port}: {error}", origin)
            raise _Refused(failure(502, "upstream_unreachable", str(error), _HINT)) from None

    async def _dial_plain(self, session: HttpSession, connection: Server) -> Wire:
        """The dialler of an absolute-form session: each new host is checked as a CONNECT would be."""
        from openshell_supervisor.proxy.http_session import DialRefused

        assert connection.address is not None
        host, port = connection.address[0], connection.address[1]
        origin = replace(session.origin, host=host, port=port, scheme="http", forward=True)
        try:
            await self._gate.prepare(origin)
            destination = await self._resolve(origin, self._gate.connection(origin), "FORWARD")
            upstream = await self._dial(origin, destination)
            return await self._upstream_wire(session, upstream, origin, None, connection)
        except _Refused as refusal:
            raise DialRefused(refusal.denial) from None

    def _redial(
        self, destination: Destination, offers: tuple[str, ...] | None
    ) -> Callable[[HttpSession, Server], Awaitable[Wire]]:
        """The dialler of a tunnel's session: the same checked addresses, the same protocol, nowhere else."""

        async def dial(session: HttpSession, connection: Server) -> Wire:
            from openshell_supervisor.proxy.http_session import DialRefused

            try:
                if connection.address != (destination.host, destination.port):
                    raise _Refused(denials.authority_mismatch(destination.host, destination.port))
                upstream = await self._dial(session.origin, destination)
                wanted = (session.client.alpn or b"").decode()
                same = None if offers is None else (wanted,) if wanted else ()
                return await self._upstream_wire(session, upstream, session.origin, same, connection)
            except _Refused as refusal:
                raise DialRefused(refusal.denial) from None

        return dial

    async def _upstream_wire(
        self,
        session: HttpSession,
        upstream: socket.socket,
        origin: Origin,
        offers: tuple[str, ...] | None,
        connection: Server | None = None,
    ) -> Wire:
        """Wrap a connected socket; with `offers` (may be empty), through a verified TLS handshake."""
        loop = asyncio.get_running_loop()
        wire = session.upstream_wire(connection, tls=offers is not None)
        try:
            if offers is None:
                await loop.create_connection(lambda: wire, sock=upstream)
            else:
                await loop.create_connection(
                    lambda: wire,
                    sock=upstream,
                    ssl=self._suite.toward_upstream(offers),
                    server_hostname=origin.host,
                    ssl_handshake_timeout=tls.HANDSHAKE_TIMEOUT,
                    ssl_shutdown_timeout=tls.SHUTDOWN_TIMEOUT,
                )
                secured = wire.transport.get_extra_info("ssl_object") if wire.transport else None
                wire.connection.alpn = (secured.selected_alpn_protocol() or "").encode() or None if secured else None
        except (OSError, ValueError) as error:
            upstream.close()
            text = failure_text(error)
            self._gate.failed(f"TLS relay error: {text}", origin)
            raise _Refused(failure(502, "upstream_tls", f"{origin.host}:{origin.port}: {text}", _HINT)) from None
        except BaseException:
            upstream.close()
            raise
        return wire

    # -- looking into a tunnel -------------------------------------------------------------------------------------

    async def _inspect(
        self, client: socket.socket, upstream: socket.socket, origin: Origin, verdict: Verdict, destination: Destination
    ) -> None:
        first = await self._first_bytes(client, upstream)
        if first is None:
            return
        if client_hello.looks_like_tls(first):
            try:
                async with asyncio.timeout(HELLO_TIMEOUT):
                    hello = await sockets.read_hello(client)
            except (HelloError, TimeoutError) as error:
                self._gate.failed(f"TLS relay error: {error or 'the ClientHello did not arrive in time'}", origin)
                return
            await self._inspect_tls(client, upstream, origin, destination, hello)
        elif first.split(b" ")[0] in _METHODS and b" " in first:
            await self._inspect_plain(client, upstream, origin, destination)
        else:
            await self._unsupported(
                client, upstream, origin, verdict, "the bytes in the tunnel are neither TLS nor HTTP/1"
            )

    async def _first_bytes(self, client: socket.socket, upstream: socket.socket) -> bytes | None:
        """Enough of what the client says first to tell what it is; None when it left; b"" when the server spoke first."""
        try:
            async with asyncio.timeout(PEEK_TIMEOUT):
                while True:
                    speaker = await sockets.readable(client, upstream)
                    first = sockets.peek(speaker, _PEEK)
                    if speaker is upstream:
                        return b"" if first else None
                    if first == b"":
                        return None
                    if first is None or (len(first) < 9 and _METHOD_START.fullmatch(first)):
                        await asyncio.sleep(0.005)  # an undecided prefix: 5 ms as upstream polls (proxy.md 2.4)
                        continue
                    return first
        except TimeoutError:
            return b""

    async def _unsupported(
        self, client: socket.socket, upstream: socket.socket, origin: Origin, verdict: Verdict, reason: str
    ) -> None:
        self._gate.tunnel_unsupported(origin, verdict, reason)
        if self._gate.observe:
            await self._relay(client, upstream)
            return
        denial = denials.unsupported_protocol(origin.host, origin.port, reason)
        await sockets.answer_and_linger(client, denial.head_and_body(), ANSWER_TIMEOUT)

    async def _inspect_plain(
        self, client: socket.socket, upstream: socket.socket, origin: Origin, destination: Destination
    ) -> None:
        session_type = await self._sessions()
        plain = replace(origin, scheme="http", forward=False)
        session = session_type(plain, self._gate, self._local, self._redial(destination, None))
        with _ending(session):
            session.adopt_upstream(await self._upstream_wire(session, sockets.handed_over(upstream), plain, None))
            await self._attach_client(session, client, None)
            session.start()
            await session.done

    async def _inspect_tls(
        self,
        client: socket.socket,
        upstream: socket.socket,
        origin: Origin,
        destination: Destination,
        hello: ClientHello,
    ) -> None:
        session_type = await self._sessions()
        offers = tuple(offer for offer in tls.INSPECTABLE if offer in hello.protocols)
        session = session_type(origin, self._gate, self._local, self._redial(destination, offers))
        session.inspection.fronted = not _names(hello, origin.host)
        with _ending(session):
            try:
                wire = await self._upstream_wire(session, sockets.handed_over(upstream), origin, offers)
                protocol = (wire.connection.alpn or b"").decode()
                session.adopt_upstream(wire)
            except _Refused as refusal:
                # The client deserves to read why: finish its handshake and answer each request with the reason.
                session.inspection.fault = refusal.denial
                protocol = offers[-1] if offers else ""
            session.client.alpn = protocol.encode() or None
            try:
                await self._attach_client(session, client, self._suite.toward_client(origin.host, protocol))
            except OSError as error:
                self._gate.failed(f"TLS relay error: client: {failure_text(error)}", origin)
                return
            session.start()
            await session.done

    async def _attach_client(self, session: HttpSession, client: socket.socket, context: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        wire = session.client_wire(tls=context is not None)
        sock = sockets.handed_over(client)
        try:
            if context is None:
                await loop.connect_accepted_socket(lambda: wire, sock)
            else:
                await loop.connect_accepted_socket(
                    lambda: wire,
                    sock,
                    ssl=context,
                    ssl_handshake_timeout=tls.HANDSHAKE_TIMEOUT,
                    ssl_shutdown_timeout=tls.SHUTDOWN_TIMEOUT,
                )
        except BaseException:
            sock.close()
            raise


class _Refused(Exception):
    """There will be no upstream connection; this is what to say."""

    def __init__(self, denial: Denial) -> None:
        super().__init__(denial.reason_id)
        self.denial = denial


def _names(hello: ClientHello, host: str) -> bool:
    """True when the client's SNI, if it sent one, is the tunnel's host (trap 9)."""
    if not hello.server_name:
        return True
    try:
        return canonical_host(hello.server_name) == host
    except TargetError:
        return False


@contextlib.contextmanager
def _ending(session: HttpSession) -> Iterator[None]:
    """However the block ends, no leg of the session outlives it."""
    try:
        yield
    finally:
        session.cut("ended")
