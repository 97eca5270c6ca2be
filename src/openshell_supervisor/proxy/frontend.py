"""The front door: accept, read one head strictly and in time, and send each connection where its verdict says.

A CONNECT that no rule looks into becomes a splice tunnel; one that a rule looks into, and plain HTTP, become HTTP sessions;
all else is refused in JSON. mitmproxy is imported by `warm`, not by this module: until then the proxy already listens, answers
the probe and tunnels. Nothing here decides; the gate does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from openshell_supervisor.proxy import denials, local, sockets
from openshell_supervisor.proxy.authority import CertificateAuthority
from openshell_supervisor.proxy.denials import Denial, failure
from openshell_supervisor.proxy.head import (
    MAX_FIRST_HEAD,
    HeadError,
    RequestHead,
    parse_request_head,
    split_absolute,
    split_authority,
)
from openshell_supervisor.proxy.local import LocalHost, plain_answer
from openshell_supervisor.telemetry.events import Endpoint, Severity, Telemetry
from openshell_supervisor.telemetry.plain_log import LateLogger
from openshell_supervisor.verdict.facts import TargetError, canonical_host

if TYPE_CHECKING:
    from openshell_supervisor.callers.caller import Caller
    from openshell_supervisor.callers.lookup import Callers
    from openshell_supervisor.proxy.connect import ConnectHandler
    from openshell_supervisor.proxy.gate import Gate, Origin
    from openshell_supervisor.proxy.http_session import HttpSession
    from openshell_supervisor.verdict.decide import Generation

log = LateLogger("openshell_supervisor.proxy")

# The first head, from accept to blank line. curl and browsers send it at once.
FIRST_HEAD_TIMEOUT = 30.0
# How long an answer of ours may take to leave.
ANSWER_TIMEOUT = 10.0
# Client connections at a time; beyond it clients wait in the kernel's backlog. A tunnel costs up to six descriptors (two sockets,
# a pipe per direction), so the process's own limit may set a lower number; RESERVED_FILES stay for everything else.
MAX_CONNECTIONS = 512
FILES_PER_CONNECTION = 6
RESERVED_FILES = 128
# With every place taken, tunnels whose client ended its direction this long ago make room; looked for once a pause.
SHED_AGE = 0.5
SHED_PAUSE = 0.1
# Accept errors (proxy.md 1.1): resources exhausted back off exponentially, a client that vanished costs one pause.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_FATAL = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})
ACCEPT_PAUSE = 0.1
ACCEPT_PAUSE_MAX = 5.0
MAX_UNKNOWN_ACCEPT_ERRORS = 5
# Key logging would write every session's secrets where the variable says; mitmproxy switches it on at import.
_KEY_LOG_VARIABLES = ("SSLKEYLOGFILE", "MITMPROXY_SSLKEYLOGFILE")


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """`egress` is "enforce" or "observe"; `pins` maps a host to the addresses the operator gave it; `upstream_ca` adds roots."""

    egress: str = "enforce"
    pins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    upstream_ca: Path | None = None

    def __post_init__(self) -> None:
        if self.egress not in ("enforce", "observe"):
            raise ValueError(f"egress is {self.egress!r}, not enforce or observe")


class Proxy:
    """One proxy on one listening socket."""

    def __init__(
        self,
        options: ProxyOptions,
        *,
        generation: Callable[[], Generation],
        telemetry: Telemetry,
        authority: CertificateAuthority,
    ) -> None:
        self._telemetry = telemetry
        self._options = options
        self._generation = generation
        self._authority = authority
        self._local = LocalHost()
        self._callers: Callers | None = None
        self.twin: Caller | None = None
        self._live: dict[asyncio.Task[None], int | None] = {}  # to the generation of its first verdict
        self._slots = asyncio.Semaphore(_connection_limit())
        self._accepting: asyncio.Task[None] | None = None
        self._draining = False
        self._warming: asyncio.Future[None] | None = None

    # Made by the first request that needs a verdict, or by `warm`: what they import would delay the workload's start.

    @cached_property
    def _gate(self) -> Gate:
        from openshell_supervisor.proxy.gate import Gate

        return Gate(generation=self._generation, telemetry=self._telemetry, observe=self._options.egress == "observe")

    @cached_property
    def _connect(self) -> ConnectHandler:
        from openshell_supervisor.proxy.connect import ConnectHandler
        from openshell_supervisor.proxy.destinations import Destinations
        from openshell_supervisor.proxy.tls import TlsSuite

        suite = TlsSuite(self._authority, self._options.upstream_ca)
        return ConnectHandler(self._gate, Destinations(self._options.pins), suite, self._local, self._sessions)

    # -- life ------------------------------------------------------------------------------------------------------

    async def serve(self, listener: socket.socket) -> None:
        """Accept on a bound, listening socket until cancelled or drained; the caller closes the socket.

        Returns after `drain`; raises `OSError` when the socket is not usable. Connections already accepted go on until `drain`.
        """
        listener.setblocking(False)
        self._announce(listener)
        self._accepting = asyncio.current_task()
        try:
            await self._accept_loop(listener)
        except asyncio.CancelledError:
            if not self._draining:
                raise
        finally:
            self._accepting = None

    async def drain(self, grace: float) -> None:
        """Stop accepting, let live connections finish for up to `grace` seconds, then cut what is left."""
        self._draining = True
        if self._accepting is not None:
            self._accepting.cancel()
        if self._live and grace > 0:
            await asyncio.wait(list(self._live), timeout=grace)
        for task in list(self._live):
            task.cancel()
        if self._live:
            await asyncio.wait(list(self._live), timeout=ANSWER_TIMEOUT)
        if "_connect" in self.__dict__:
            self._connect.close()

    def cut_stale(self) -> int:
        """End every connection that was opened under an older policy generation; returns how many."""
        current = self._generation().number
        stale = [task for task, number in self._live.items() if number is not None and number < current]
        for task in stale:
            task.cancel("policy generation changed")
        return len(stale)

    async def warm(self) -> None:
        """Import mitmproxy and make the upstream trust store, beside the loop. Idempotent; sessions wait for it by themselves."""
        if self._warming is None:
            for name in _KEY_LOG_VARIABLES:
                os.environ.pop(name, None)
            self._warming = asyncio.ensure_future(self._warm_up())
        await asyncio.shield(self._warming)

    async def _warm_up(self) -> None:
        await asyncio.to_thread(_import_inspection)
        await asyncio.to_thread(self._connect.prepare)

    def answer_probe(self, nonce: str) -> None:
        """From now on `GET http://policy.local/v1/probe/<nonce>` is answered 200 with the nonce as body."""
        self._local.answer_probe(nonce)

    def identify_with(self, callers: Callers) -> None:
        """From now on ask `callers` who is on the other end, where the policy wants to know; a probe's answer is in `twin`."""
        self._callers = callers

    async def _sessions(self) -> type[HttpSession]:
        await self.warm()
        from openshell_supervisor.proxy.http_session import HttpSession

        return HttpSession

    # -- accepting -------------------------------------------------------------------------------------------------

    async def _accept_loop(self, listener: socket.socket) -> None:
        pause, unknown = ACCEPT_PAUSE, 0
        while True:
            try:
                await self._accept_one(listener)
            except OSError as error:
                pressed = error.errno in _EXHAUSTED
                unknown = 0 if pressed or error.errno == errno.ECONNABORTED else unknown + 1
                terminal = error.errno in _FATAL or unknown >= MAX_UNKNOWN_ACCEPT_ERRORS
                self._accept_failed(error, terminal)
                if terminal:
                    raise
                await asyncio.sleep(pause)
                pause = min(pause * 2, ACCEPT_PAUSE_MAX) if pressed else ACCEPT_PAUSE
            else:
                pause, unknown = ACCEPT_PAUSE, 0

    async def _accept_one(self, listener: socket.socket) -> None:
        """Wait for a free slot and a client; the client's task gives the slot back."""
        loop = asyncio.get_running_loop()
        await self._place()
        try:
            client, peer = await loop.sock_accept(listener)
        except BaseException:
            self._slots.release()
            raise
        task = loop.create_task(self._serve_client(client, peer))
        self._live[task] = self._gate.generation().number
        task.add_done_callback(self._forget)

    async def _place(self) -> None:
        """Wait for a place for one more client; under pressure, tunnels that a client has long ended make room."""
        while self._slots.locked():
            if "_connect" in self.__dict__:
                self._connect.shed(SHED_AGE)
            try:
                async with asyncio.timeout(SHED_PAUSE):
                    await self._slots.acquire()
                    return
            except TimeoutError:
                continue
        await self._slots.acquire()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._live.pop(task, None)
        self._slots.release()

    async def _serve_client(self, client: socket.socket, peer: object) -> None:
        source = (
            Endpoint(ip=str(peer[0]), port=int(peer[1])) if isinstance(peer, tuple) and len(peer) >= 2 else Endpoint()
        )
        try:
            with contextlib.suppress(OSError):  # a Unix socket has no Nagle
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await self._first_request(client, source)
        except (ConnectionError, TimeoutError):
            return  # the client went away, or never took its answer
        except OSError as error:
            self._telemetry.network(
                "Fail",
                f"Proxy connection error: {errno.errorcode.get(error.errno or 0, 'OSError')}",
                severity=Severity.LOW,
                ok=False,
            )
        except Exception as error:  # one connection's boundary: its failure is an event, not the end of the proxy
            text = f"Proxy connection error: {type(error).__name__}, a fault of the supervisor"
            self._telemetry.network("Fail", text, severity=Severity.HIGH, ok=False, src=source)
            log.debug("a connection ended by a fault of ours", exc_info=True)
        finally:
            client.close()

    # -- the first request -----------------------------------------------------------------------------------------

    async def _first_request(self, client: socket.socket, source: Endpoint) -> None:
        try:
            async with asyncio.timeout(FIRST_HEAD_TIMEOUT):
                raw = await sockets.read_head(client, MAX_FIRST_HEAD)
        except TimeoutError:
            await self._refuse(client, source, failure(408, "head_timeout", "the request head did not arrive in time"))
            return
        except sockets.HeadTooLarge:
            text = f"the request head is longer than {MAX_FIRST_HEAD} bytes"
            await self._refuse(client, source, failure(431, "head_too_large", text))
            return
        if not raw:
            return
        try:
            head = parse_request_head(raw)
            if head.method == "CONNECT":
                await self._connect_request(client, source, head)
            else:
                await self._absolute_request(client, source, head, raw)
        except (HeadError, TargetError) as error:
            await self._refuse(client, source, failure(400, "invalid_request", str(error)))

    async def _connect_request(self, client: socket.socket, source: Endpoint, head: RequestHead) -> None:
        if head.body != 0:
            raise HeadError("CONNECT does not have a body")
        name, port = split_authority(head.target, None)
        host = canonical_host(name)
        caller = await self._caller(client)
        await self._connect.serve(client, self._origin(source, host, port, "https", forward=False, caller=caller))

    async def _absolute_request(self, client: socket.socket, source: Endpoint, head: RequestHead, raw: bytes) -> None:
        absolute = split_absolute(head.target)
        if absolute is None:
            raise HeadError("a request to a proxy needs an absolute http:// target, or CONNECT")
        scheme, authority, path = absolute
        if scheme != "http":
            text = "Use CONNECT for HTTPS URLs" if scheme == "https" else "unsupported scheme"
            await self._refuse(client, source, failure(400, "unsupported_proxy_scheme", text))
            return
        name, port = split_authority(authority, 80)
        host = canonical_host(name)
        if host == local.HOST and port == local.PORT:
            answer = self._local.respond(head.method, path)
            if isinstance(answer, bytes):  # nobody but the twin knows the nonce
                self.twin = await self._caller(client, twin=True)
            await sockets.send(
                client, plain_answer(answer) if isinstance(answer, bytes) else answer.head_and_body(), ANSWER_TIMEOUT
            )
            return
        caller = await self._caller(client)
        await self._connect.serve_plain(
            client, self._origin(source, host, port, "http", forward=True, caller=caller), raw
        )

    async def _caller(self, client: socket.socket, *, twin: bool = False) -> Caller | None:
        """Who is on the other end, or None where nobody has to know."""
        if self._callers is None or not (twin or self._generation().require_binary_identity):
            return None
        peer, local_end = client.getpeername(), client.getsockname()
        return await self._callers.of(peer[:2], local_end[:2], twin=twin)

    def _origin(
        self,
        source: Endpoint,
        host: str,
        port: int,
        scheme: str,
        *,
        forward: bool,
        caller: Caller | None = None,
    ) -> Origin:
        """Who asks and for what; from here on the connection belongs to the current generation."""
        from openshell_supervisor.proxy.gate import Origin

        task = asyncio.current_task()
        if task in self._live:
            self._live[task] = self._generation().number
        return Origin(source, host, port, scheme, forward, caller)

    async def _refuse(self, client: socket.socket, source: Endpoint, denial: Denial) -> None:
        origin = self._origin(source, "-", 0, "http", forward=True)
        self._gate.request_rejected(origin, "-", "/", str(denial.body["detail"]))
        await sockets.answer_and_linger(client, denial.head_and_body(), ANSWER_TIMEOUT)

    # -- events ----------------------------------------------------------------------------------------------------

    def _announce(self, listener: socket.socket) -> None:
        name = listener.getsockname()
        if isinstance(name, tuple):
            self._telemetry.proxy_listening(str(name[0]), int(name[1]))

    def _accept_failed(self, error: OSError, terminal: bool) -> None:
        pressed = error.errno in _EXHAUSTED
        severity = Severity.HIGH if terminal else Severity.MEDIUM if pressed else Severity.LOW
        kind = "terminal" if terminal else "resource pressure" if pressed else "transient"
        name = errno.errorcode.get(error.errno or 0, "unknown")
        self._telemetry.network("Fail", f"Proxy accept error ({kind}): {name}", severity=severity, ok=False)


def _connection_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(16, min(MAX_CONNECTIONS, (soft - RESERVED_FILES) // FILES_PER_CONNECTION))


def _import_inspection() -> None:
    """Runs in a thread: half a second of imports that must not hold up the loop."""
    logging.getLogger("mitmproxy").setLevel(logging.WARNING)
    import openshell_supervisor.proxy.connect
    import openshell_supervisor.proxy.http_session  # noqa: F401


__all__ = ["CertificateAuthority", "Proxy", "ProxyOptions", "denials"]
