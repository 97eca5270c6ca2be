"""A real HTTPS server on loopback: one address, HTTP/1.1 and HTTP/2 by ALPN, a certificate of the test's own root.

What it serves lies in `content.py`; this file only carries it: `answer(Request) -> Answer`, on either protocol. It refuses
to know the clients and the product. Bodies are streamed, on HTTP/2 as the peer's flow-control window allows.
"""

from __future__ import annotations

import contextlib
import datetime
import http.server
import ipaddress
import pathlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import h2.config
import h2.connection
import h2.events
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

IDLE_SECONDS = 30.0


@dataclass(frozen=True)
class Request:
    """One request. `headers` have lower-case names; `body` is whole; `version` is "1.1" or "2"."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    version: str


@dataclass(frozen=True)
class Answer:
    """One answer; the body is bytes, or pieces of together `length` bytes."""

    body: bytes | Iterable[bytes] = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None

    def head(self) -> dict[str, str]:
        """The header fields, with the length."""
        length = len(self.body) if isinstance(self.body, bytes) else self.length
        return {"content-type": "application/octet-stream", **self.headers, "content-length": str(length)}

    def pieces(self) -> Iterator[bytes]:
        """The body."""
        return iter([self.body] if isinstance(self.body, bytes) else self.body)


Serve = Callable[[Request], Answer]


@dataclass(frozen=True)
class Identity:
    """The root that signs, and the server's key with its certificate, as PEM files."""

    root: pathlib.Path
    server: pathlib.Path

    @classmethod
    def create(cls, directory: pathlib.Path, *names: str) -> Identity:
        """A root and a certificate for `names`, in `directory`, with what strict verifiers ask for (RFC 5280, 4.2.1)."""
        root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Clients test root")])
        now = datetime.datetime.now(datetime.UTC)

        def sign(subject: x509.Name, public: ec.EllipticCurvePublicKey, own: x509.ExtensionType) -> x509.Certificate:
            builder = x509.CertificateBuilder(
                issuer, subject, public, x509.random_serial_number(), now - DAY, now + DAY
            ).add_extension(own, critical=isinstance(own, x509.BasicConstraints))
            builder = builder.add_extension(_usage(signs=isinstance(own, x509.BasicConstraints)), critical=True)
            builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            from_issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
            return builder.add_extension(from_issuer, critical=False).sign(root_key, hashes.SHA256())

        root = sign(issuer, root_key.public_key(), x509.BasicConstraints(ca=True, path_length=0))
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        leaf = sign(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]), key.public_key(), alternatives)
        pem = serialization.Encoding.PEM
        made = cls(directory / "root.pem", directory / "server.pem")
        made.root.write_bytes(root.public_bytes(pem))
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        made.server.write_bytes(private + leaf.public_bytes(pem))
        made.root.chmod(0o644)
        return made


DAY = datetime.timedelta(days=1)


def _usage(*, signs: bool) -> x509.KeyUsage:
    names = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    never = dict.fromkeys((*names, "decipher_only"), False)
    return x509.KeyUsage(digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, **never)


class Upstream:
    """The server, on threads. `seen` holds a line per request: "VERSION METHOD PATH"."""

    def __init__(self, address: str, port: int, identity: Identity, serve: Serve) -> None:
        ipaddress.IPv4Address(address)
        self.address, self.port, self.seen = address, port, list[str]()
        self._serve = serve
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(identity.server)
        self._context.set_alpn_protocols(["h2", "http/1.1"])
        self._server = _Server((address, port), self)

    def answer(self, request: Request) -> Answer:
        """Note the request and answer it."""
        self.seen.append(f"{request.version} {request.method} {request.path}")
        return self._serve(request)

    def secured(self, raw: socket.socket) -> ssl.SSLSocket:
        """The handshake of one connection."""
        raw.settimeout(IDLE_SECONDS)
        return self._context.wrap_socket(raw, server_side=True)

    def __enter__(self) -> Upstream:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], upstream: Upstream) -> None:
        self.upstream = upstream
        super().__init__(address, _Http1)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """On the connection's own thread: TLS first, then the protocol that it settled."""
        with contextlib.suppress(OSError):
            secured = self.upstream.secured(request)
            if secured.selected_alpn_protocol() == "h2":
                _serve_http2(secured, self.upstream)
            else:
                self.RequestHandlerClass(secured, client_address, self)
            with contextlib.suppress(OSError):
                secured.unwrap()
            secured.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves early is no news here."""


class _Http1(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm = True

    def _any(self) -> None:
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.server.upstream.answer(Request(self.command, path, query, headers, self._body(), "1.1"))
        self.send_response(answer.status)
        for name, value in answer.head().items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for piece in answer.pieces():
                self.wfile.write(piece)

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return bytes(body)

    def log_message(self, format: str, *args: object) -> None:
        """The test says what went wrong."""


def _serve_http2(sock: ssl.SSLSocket, upstream: Upstream) -> None:
    """One HTTP/2 connection to its end; requests are answered in the order in which they were completed."""
    link = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
    link.initiate_connection()
    sock.sendall(link.data_to_send())
    heads: dict[int, dict[str, str]] = {}
    bodies: dict[int, bytearray] = {}
    pending: dict[int, _Outgoing] = {}
    while data := sock.recv(65536):
        for event in link.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                heads[event.stream_id], bodies[event.stream_id] = dict(event.headers), bytearray()
            elif isinstance(event, h2.events.DataReceived):
                bodies[event.stream_id] += event.data
                link.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                head = heads[event.stream_id]
                path, _, query = head[":path"].partition("?")
                request = Request(head[":method"], path, query, head, bytes(bodies[event.stream_id]), "2")
                answer = upstream.answer(request)
                link.send_headers(event.stream_id, [(":status", str(answer.status)), *answer.head().items()])
                pending[event.stream_id] = _Outgoing(answer.pieces())
            elif isinstance(event, h2.events.StreamReset):
                pending.pop(event.stream_id, None)
        for stream, outgoing in list(pending.items()):
            while outgoing.send_some(link, stream):
                sock.sendall(link.data_to_send())
            if outgoing.ended:
                link.end_stream(stream)
                del pending[stream]
        sock.sendall(link.data_to_send())


class _Outgoing:
    """The body of one HTTP/2 answer on its way out."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._left, self.ended = pieces, memoryview(b""), False

    def send_some(self, link: h2.connection.H2Connection, stream: int) -> bool:
        """Send what the window takes of one piece; False when it takes nothing, or there is nothing more."""
        while not self._left and not self.ended:
            piece = next(self._pieces, None)
            self.ended = piece is None
            self._left = memoryview(piece or b"")
        room = min(link.local_flow_control_window(stream), link.max_outbound_frame_size)
        if not self._left or room <= 0:
            return False
        link.send_data(stream, self._left[:room].tobytes())
        self._left = self._left[room:]
        return True
