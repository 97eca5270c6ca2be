"""Is this request what it says, and may it leave? The last look before a request goes upstream, HTTP/1 and HTTP/2 alike.

It compares every name in the request with the tunnel's, asks the gate, and leaves in the request only what belongs to the next
hop. It edits mitmproxy's request object in place and touches nothing else of mitmproxy's; it sends nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Awaitable
from dataclasses import replace

from mitmproxy import http

from openshell_supervisor.proxy import denials, local
from openshell_supervisor.proxy.denials import Denial, failure
from openshell_supervisor.proxy.gate import Gate, Origin
from openshell_supervisor.proxy.head import (
    HeadError,
    RequestHead,
    authority_of,
    is_token,
    safe_fields,
    split_absolute,
    split_authority,
)
from openshell_supervisor.proxy.local import LocalHost
from openshell_supervisor.verdict.facts import TargetError, canonical_host

# Distinct authorities that are remembered per client connection; a cache only.
MAX_AUTHORITIES = 32
_WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3
_DROPPED = frozenset(
    {
        b"proxy-connection",
        b"proxy-authorization",
        b"proxy-authenticate",
        b"keep-alive",
        b"connection",
        b"upgrade",
        b"http2-settings",
    }
)
_VIA = (b"Via", b"1.1 openshell-sandbox")


class Inspection:
    """The questions of one client connection. `fault` answers every request that policy allows (a broken upstream);
    `fronted` says that the client's SNI named another host than its CONNECT."""

    def __init__(self, origin: Origin, gate: Gate, local_host: LocalHost) -> None:
        self.origin = origin
        self.fault: Denial | None = None
        self.fronted = False
        self._gate = gate
        self._local = local_host
        self._known_authority = ""
        self._origins: dict[str, Origin] = {}

    def preparation(self, request: http.Request, head: RequestHead | None) -> Awaitable[None] | None:
        """What to await before `ask`, where the engine answers from afar; None where there is nothing to wait for.

        It looks at the same head as `ask` and refuses nothing; what cannot be read is refused there.
        """
        origin, method, target = self.origin, request.method, request.path
        if head is not None:
            method, target = head.method, head.target
            absolute = split_absolute(target)
            if absolute is not None:
                target = absolute[2]
                if origin.forward:
                    try:
                        name, port = split_authority(absolute[1], 80)
                        origin = replace(origin, host=canonical_host(name), port=port, scheme="http", forward=True)
                    except (HeadError, TargetError):
                        return None
        return self._gate.preparation(origin, method, target) if target.startswith("/") else None

    def ask(self, request: http.Request, head: RequestHead | None) -> Denial | bytes | bool:
        """Decide a request and make it ready to leave. A `Denial` (or the bytes of a local 200) is the answer; a bool means
        forward it, True when a protocol upgrade was asked for and allowed. An exception is a 503 (trap 1)."""
        try:
            if head is not None:
                return self._ask_http1(request, head)
            return self._ask_http2(request)
        except Exception as error:  # noqa: BLE001 - fail closed: an undecided request does not leave (trap 1)
            self._gate.failed(f"HTTP relay error: no verdict ({type(error).__name__})", self.origin)
            return failure(503, "internal_error", "the request could not be decided", denials.STAY)

    def _ask_http1(self, request: http.Request, head: RequestHead) -> Denial | bytes | bool:
        if head.method == "CONNECT":
            return self._reject(head.method, "CONNECT is not possible here; open a new connection to the proxy")
        absolute = split_absolute(head.target)
        if self.origin.forward:
            return self._ask_forward(request, head, absolute)
        target = head.target
        if absolute is not None:
            scheme, authority, target = absolute
            if (scheme != self.origin.scheme or not self._agrees(authority)) and self._mismatch(head.method, target):
                return denials.authority_mismatch(self.origin.host, self.origin.port)
        if head.host is not None and not self._agrees(head.host) and self._mismatch(head.method, target):
            return denials.authority_mismatch(self.origin.host, self.origin.port)
        if not target.startswith("/"):
            return self._reject(head.method, "the request target is not a path")
        return self._decide(request, head, self.origin, target)

    def _ask_forward(
        self, request: http.Request, head: RequestHead, absolute: tuple[str, str, str] | None
    ) -> Denial | bytes | bool:
        if absolute is None:
            return self._reject(head.method, "a request to a proxy needs an absolute http:// target, or CONNECT")
        scheme, authority, target = absolute
        if scheme != "http":
            text = "Use CONNECT for HTTPS URLs" if scheme == "https" else "unsupported scheme"
            return failure(400, "unsupported_proxy_scheme", text)
        origin = self._origins.get(authority)
        if origin is None:
            try:
                name, port = split_authority(authority, 80)
                host = canonical_host(name)
                origin = replace(self.origin, host=host, port=port, scheme="http", forward=True)
            except (HeadError, TargetError) as error:
                return self._reject(head.method, str(error))
            if len(self._origins) < MAX_AUTHORITIES:
                self._origins[authority] = origin
        if origin.host == local.HOST and origin.port == local.PORT:
            return self._local.respond(head.method, target)
        return self._decide(request, head, origin, target)

    def _decide(self, request: http.Request, head: RequestHead, origin: Origin, target: str) -> Denial | bool:
        upgrade = b"upgrade" in head.options and _websocket_upgrade(request, head)
        ruling = self._gate.request(origin, head.method, target, upgrade=upgrade)
        if ruling.denial is not None or self.fault is not None:
            return ruling.denial or self.fault  # type: ignore[return-value]
        data = request.data
        data.host, data.port, data.scheme, data.authority = origin.host, origin.port, origin.scheme.encode(), b""
        data.path = ruling.target.encode("latin-1")
        fields = _forwardable(head, upgrade)
        if origin.forward:
            host = authority_of(origin.host, origin.port, 80).encode()
            fields = [(b"Host", host), *(field for field in fields if field[0].lower() != b"host")]
            if not any(name.lower() == b"via" for name, _ in fields):
                fields.append(_VIA)
        data.headers = http.Headers(fields)
        return upgrade

    def _ask_http2(self, request: http.Request) -> Denial | bool:
        data = request.data
        method, target = data.method.decode("latin-1"), data.path.decode("latin-1")
        if (
            method == "CONNECT"
            or not is_token(method)
            or not target.startswith("/")
            or not safe_fields(request.headers.fields)
        ):
            return self._reject("-", "the HTTP/2 request has pseudo headers or fields that cannot be forwarded")
        authority = data.authority.decode("latin-1")
        named = request.headers.get("host", authority)
        agrees = data.scheme.decode("latin-1") == self.origin.scheme and self._agrees(authority or named)
        if not (agrees and self._agrees(named)) and self._mismatch(method, target):
            return denials.authority_mismatch(self.origin.host, self.origin.port)
        ruling = self._gate.request(self.origin, method, target)
        if ruling.denial is not None or self.fault is not None:
            return ruling.denial or self.fault  # type: ignore[return-value]
        data.host, data.port = self.origin.host, self.origin.port
        data.path = ruling.target.encode("latin-1")
        return False

    def _agrees(self, authority: str) -> bool:
        """True when an authority names the tunnel's own destination (and the client's SNI did)."""
        if self.fronted:
            return False
        if authority == self._known_authority:
            return True
        try:
            host, port = split_authority(authority, 443 if self.origin.scheme == "https" else 80)
            agrees = canonical_host(host).removesuffix(".") == self.origin.host.removesuffix(".")
            agrees = agrees and port == self.origin.port
        except (HeadError, TargetError):
            return False
        if agrees:
            self._known_authority = authority
        return agrees

    def _mismatch(self, method: str, target: str) -> bool:
        """Write the mismatch down; True when it is to be refused."""
        self._gate.authority_mismatch(self.origin, method, target.partition("?")[0])
        return not self._gate.observe

    def _reject(self, method: str, text: str) -> Denial:
        self._gate.request_rejected(self.origin, method, "/", text)
        return failure(400, "invalid_request", text)


def valid_upgrade(request: http.Request, response: http.Response) -> bool:
    """True when a 101 is the answer to the WebSocket key that was sent (RFC 6455 4.1; trap 10)."""
    key = request.headers.get("sec-websocket-key", "").encode()
    digest = hashlib.sha1(key + _WEBSOCKET_GUID, usedforsecurity=False).digest()
    return (
        response.headers.get("upgrade", "").lower() == "websocket"
        and "upgrade" in response.headers.get("connection", "").lower()
        and response.headers.get("sec-websocket-accept", "") == base64.b64encode(digest).decode()
    )


def _websocket_upgrade(request: http.Request, head: RequestHead) -> bool:
    headers = request.headers
    try:
        key = base64.b64decode(headers.get("sec-websocket-key", ""), validate=True)
    except (binascii.Error, ValueError):
        return False
    return (
        head.method == "GET"
        and head.version == "1.1"
        and head.body == 0
        and len(key) == 16
        and headers.get("upgrade", "").lower() == "websocket"
        and headers.get("sec-websocket-version") == "13"
    )


def _forwardable(head: RequestHead, upgrade: bool) -> list[tuple[bytes, bytes]]:
    """The request's fields without what belongs to this hop; the client's wish to close or keep is kept for its own leg."""
    options = head.options
    nominated = options - {b"close", b"keep-alive", b"upgrade"}
    fields: list[tuple[bytes, bytes]] = []
    for field in head.headers:
        name = field[0].lower()
        if name in _DROPPED or name in nominated or name == b"te":
            continue
        if name.startswith(b"sec-websocket-") and not upgrade:
            continue
        fields.append(field)
    if upgrade:
        fields += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
    elif b"close" in options:
        fields.append((b"Connection", b"close"))
    elif head.version == "1.0" and b"keep-alive" in options:
        fields.append((b"Connection", b"keep-alive"))
    return fields
