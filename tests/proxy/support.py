"""Real parts for the proxy's tests: a CA of the test's own, scripted upstreams, raw clients, curl, and a proxy on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import pathlib
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "telemetry"))

from openshell_supervisor.policy.yaml_file import parse
from openshell_supervisor.proxy.authority import CertificateAuthority
from openshell_supervisor.proxy.frontend import Proxy, ProxyOptions
from openshell_supervisor.telemetry.events import Context, Telemetry
from openshell_supervisor.verdict.decide import build_generation

WAIT = 10.0


class EventLog:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.lines: list[str] = []

    def write(self, event: dict[str, Any], line: str) -> None:
        self.events.append(event)
        self.lines.append(line)

    def close(self) -> None: ...

    def matching(self, text: str) -> list[str]:
        """Lines or messages that hold `text`."""
        pairs = zip(self.events, self.lines, strict=True)
        return [line for event, line in pairs if text in line or text in event.get("message", "")]

    def decisions(self) -> list[dict[str, Any]]:
        """Events that say Allowed, Denied or Observed about traffic, findings left out."""
        return [e for e in self.events if e.get("action") and e["class_uid"] in (4001, 4002)]


class TestAuthority:
    """The root of the test's upstreams, written to a file for --upstream-ca."""

    __test__ = False

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test root")])
        self.cert = self._builder(self.name, self.key, None).sign(self.key, hashes.SHA256())
        self.file = directory / "test-root.pem"
        self.file.write_bytes(self.cert.public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: Any, names: list[str] | None) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
        )
        for name in names or ():
            try:
                alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
            except ValueError:
                alternative = x509.DNSName(name)
            builder = builder.add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        return builder

    def server_context(self, name: str, protocols: tuple[str, ...] = ()) -> ssl.SSLContext:
        """A server that calls itself `name`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert = self._builder(subject, key, [name]).sign(self.key, hashes.SHA256())
        file = self.directory / f"{name}-{len(list(self.directory.iterdir()))}.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + cert.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context


type Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Upstream:
    """A scripted server; `seen` holds everything that reached it, per connection."""

    script: Script
    port: int = 0
    seen: list[bytearray] = field(default_factory=list)
    server: asyncio.Server | None = None
    keep: bool = True  # False for bulk tests: `seen` then only counts connections

    @property
    def connections(self) -> int:
        return len(self.seen)

    @property
    def bytes_seen(self) -> bytes:
        return b"".join(bytes(part) for part in self.seen)

    async def start(self, context: ssl.SSLContext | None = None) -> Upstream:
        self.server = await asyncio.start_server(self._on, "127.0.0.1", 0, ssl=context)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def _on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        log = bytearray()
        self.seen.append(log)
        feed = reader.read

        async def read(count: int = -1) -> bytes:
            data = await feed(count)
            if self.keep:
                log.extend(data)
            return data

        reader.read = read  # type: ignore[method-assign]
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError):
            await self.script(reader, writer)
        with contextlib.suppress(OSError, ssl.SSLError):
            writer.close()

    async def stop(self) -> None:
        if self.server is not None:
            self.server.close()


def answering(reply: Callable[[bytes, bytes], bytes | None]) -> Script:
    """A keep-alive HTTP/1 script: `reply(head, body)` gives the whole answer, or None to close. Bodies by Content-Length only."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        buffer = b""
        while True:
            while b"\r\n\r\n" not in buffer:
                data = await reader.read(65536)
                if not data:
                    return
                buffer += data
            head, _, buffer = buffer.partition(b"\r\n\r\n")
            length = next(
                (
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                ),
                0,
            )
            while len(buffer) < length:
                data = await reader.read(65536)
                if not data:
                    return
                buffer += data
            body, buffer = buffer[:length], buffer[length:]
            answer = reply(head, body)
            if answer is None:
                return
            writer.write(answer)
            await writer.drain()

    return script


def ok(body: bytes = b"ok", *fields: bytes) -> bytes:
    """A 200 with a length."""
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *fields, b"", body])


def echo_head(head: bytes, body: bytes) -> bytes:
    """Answer with the request's first line, so that a test sees what the origin saw."""
    return ok(head.split(b"\r\n")[0] + b"|" + body)


class ProxyUnderTest:
    """A proxy on 127.0.0.1 with its log."""

    expect_crash = False  # a test that breaks the core on purpose says so

    def __init__(self, policy: str, **options: Any) -> None:
        self.log = EventLog()
        self.generation = build_generation(parse(policy, "test").policy, 1)
        self.authority = CertificateAuthority.create()
        self.options = ProxyOptions(**options)
        self.proxy = Proxy(
            self.options,
            generation=lambda: self.generation,
            telemetry=Telemetry(Context(), [self.log]),
            authority=self.authority,
        )
        self.listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(256)
        self.port: int = self.listener.getsockname()[1]
        self.loop_errors: list[dict[str, Any]] = []

    def reload(self, policy: str) -> None:
        self.generation = build_generation(parse(policy, "test").policy, self.generation.number + 1)

    def ca_context(self, *protocols: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.authority.ca_pem.decode())
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context

    async def raw(self, data: bytes, *, wait: float = WAIT) -> bytes:
        """Send, then read to the end (or until `wait` seconds passed; then the text ends in <TIMEOUT>)."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        out = b""
        try:
            async with asyncio.timeout(wait):
                while part := await reader.read(65536):
                    out += part
        except TimeoutError:
            out += b"<TIMEOUT>"
        except ConnectionError:
            out += b"<RESET>"
        writer.close()
        return out

    async def connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """An open CONNECT tunnel; fails unless it was answered 200."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT)
        assert head == b"HTTP/1.1 200 Connection Established\r\n\r\n", head
        return reader, writer

    async def connect_tls(
        self, host: str, port: int, *protocols: str, sni: str | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A tunnel with TLS inside, verified against the sandbox's CA."""
        reader, writer = await self.connect(host, port)
        context = self.ca_context(*protocols)
        if sni is not None:
            context.check_hostname = False
        await asyncio.wait_for(writer.start_tls(context, server_hostname=sni or host), WAIT)
        return reader, writer

    async def curl(self, *arguments: str) -> tuple[int, str, str]:
        """curl through the proxy: exit code, output, errors."""
        with_ca = self.options.upstream_ca.parent / "sandbox-ca.pem" if self.options.upstream_ca else None
        trust: list[str] = []
        if with_ca is not None:
            with_ca.write_bytes(self.authority.ca_pem)
            trust = ["--cacert", str(with_ca)]
        process = await asyncio.create_subprocess_exec(
            *("curl", "-sS", "-q", "--max-time", "20", "-x", f"http://127.0.0.1:{self.port}", *trust, *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()


@contextlib.asynccontextmanager
async def running(policy: str, **options: Any) -> AsyncIterator[ProxyUnderTest]:
    """A proxy that serves until the block ends; then every event must be valid OCSF, and no error may be left in the loop."""
    import schema

    loop = asyncio.get_running_loop()
    under_test = ProxyUnderTest(policy, **options)
    loop.set_exception_handler(lambda _, context: under_test.loop_errors.append(context))
    crashes: list[Exception] = []
    await under_test.proxy.warm()
    from openshell_supervisor.proxy.http_session import HttpSession

    HttpSession.crashed = lambda _, error: crashes.append(error)  # type: ignore[method-assign]
    serving = asyncio.create_task(under_test.proxy.serve(under_test.listener))
    try:
        yield under_test
    finally:
        await under_test.proxy.drain(0)
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        under_test.listener.close()
        await asyncio.sleep(0)
        loop.set_exception_handler(None)
    assert not under_test.loop_errors, under_test.loop_errors
    assert ProxyUnderTest.expect_crash or not [e for e in crashes if not isinstance(e, ZeroDivisionError)], crashes
    for event in under_test.log.events:
        schema.assert_valid(event)


def status_of(answer: bytes) -> int:
    """The status code of an HTTP/1 answer."""
    return int(answer.split(b" ", 2)[1])


def json_of(answer: bytes) -> dict[str, Any]:
    """The JSON body of an HTTP/1 answer."""
    result: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return result


def policy_for(*endpoints: str) -> str:
    """A policy with one network rule; each endpoint is YAML flow text without its braces."""
    lines = "\n".join(f"      - {{{endpoint}}}" for endpoint in endpoints)
    head = "version: 1\nnetwork_policies:\n  test:\n    name: test\n    endpoints:\n"
    return f"{head}{lines}\n    binaries:\n      - {{path: '/**'}}\n"


def gc_objects(kind: type) -> list[Any]:
    """Every living object of a type."""
    import gc

    return [item for item in gc.get_objects() if type(item) is kind]
