"""The parts that can be tested alone: heads, hellos, addresses, the authority, the relay."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import pathlib
import socket
import ssl

import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Upstream, json_of, ok, policy_for, running, status_of

from openshell_supervisor.errors import ProxyError
from openshell_supervisor.proxy import client_hello
from openshell_supervisor.proxy.authority import CertificateAuthority
from openshell_supervisor.proxy.client_hello import HelloError
from openshell_supervisor.proxy.destinations import (
    Destination,
    DestinationRefused,
    Destinations,
    UpstreamUnreachable,
    always_blocked,
    check,
    internal,
)
from openshell_supervisor.proxy.head import HeadError, parse_request_head, split_authority
from openshell_supervisor.proxy.tunnel import Tunnel
from openshell_supervisor.verdict.facts import Verdict

# -- heads -----------------------------------------------------------------------------------------------------------

_TOKENS = [
    b"GET",
    b" ",
    b"/",
    b"http://a/",
    b"HTTP/1.1",
    b"\r\n",
    b"\n",
    b"\r",
    b"Host",
    b":",
    b"a",
    b"\t",
    b"\x00",
    b"\xff",
]
_LINES = [b"Content-Length: 1", b"Transfer-Encoding: chunked", b"Connection: host", b"\r\n\r\n"]
_PIECES = st.sampled_from(_TOKENS + _LINES)


@given(st.lists(_PIECES, max_size=16))
@settings(max_examples=500, deadline=None)
def test_whatever_parses_is_safe_to_send_on(pieces: list[bytes]) -> None:
    """Either `HeadError`, or a head whose parts hold no byte that could split it again, framed in one way only."""
    try:
        head = parse_request_head(b"".join(pieces))
    except HeadError:
        return
    assert not set(head.target) & set("\r\n \t\0")
    names = [name.lower() for name, _ in head.headers]
    assert names.count(b"host") <= 1 and not (b"content-length" in names and b"transfer-encoding" in names)
    assert all(not set(value) & {0, 10, 13} for _, value in head.headers)


@given(st.text(alphabet="a.:[]@019 ", max_size=12))
@settings(deadline=None)
def test_an_authority_is_a_host_and_a_port_or_refused(text: str) -> None:
    """No authority yields user-info, an empty host, or a port out of range."""
    with contextlib.suppress(HeadError):
        host, port = split_authority(text, 80)
        assert host and "@" not in host and 0 < port < 65536


# -- hellos ----------------------------------------------------------------------------------------------------------


def hello_of(name: str | None, protocols: list[str]) -> bytes:
    """What OpenSSL really sends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if protocols:
        context.set_alpn_protocols(protocols)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def test_a_real_hello_is_understood() -> None:
    """Name and protocols as OpenSSL wrote them; every shorter prefix asks for more."""
    data = hello_of("API.example", ["h2", "http/1.1"])
    assert client_hello.missing_bytes(data) == 0
    hello = client_hello.parse(data)
    assert (hello.server_name, hello.protocols) == ("api.example", ("h2", "http/1.1"))
    assert all(client_hello.missing_bytes(data[:count]) > count for count in range(len(data)))
    assert client_hello.parse(hello_of(None, [])) == client_hello.ClientHello("", ())


@given(st.binary(max_size=200), st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_a_mangled_hello_is_refused_or_parsed_never_more(noise: bytes, at: int) -> None:
    """Any bytes in any place: `HelloError` or a result, no other exception."""
    data = hello_of("api.example", ["h2"])
    mangled = data[:at] + noise + data[at + len(noise) :]
    with contextlib.suppress(HelloError):
        if client_hello.missing_bytes(mangled) == 0:
            client_hello.parse(mangled)


# -- addresses -------------------------------------------------------------------------------------------------------

ALWAYS = ["127.0.0.1", "127.9.9.9", "169.254.169.254", "0.0.0.0", "0.1.2.3", "224.0.0.1", "255.255.255.255"]
ALWAYS += ["::1", "::", "fe80::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "fd00:ec2::254"]
ALWAYS += ["64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::"]
PRIVATE = [
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "192.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
]
PRIVATE += ["203.0.113.1", "240.0.0.1", "fc00::1", "fd12::1", "64:ff9b::a00:1", "2002:a00:1::", "2001:db8::1"]
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808"]


@pytest.mark.parametrize("text", ALWAYS)
def test_addresses_that_nobody_may_allow(text: str) -> None:
    """Loopback, link-local, metadata, unspecified, multicast and IPv4 in disguise, in every mode."""
    address = ipaddress.ip_address(text)
    assert always_blocked(address) and internal(address)
    for verdict in (
        Verdict(True, "allowed", "", exact_host=True),
        Verdict(True, "allowed", ""),
    ):
        with pytest.raises(DestinationRefused):
            check("a.test", 443, (ipaddress.ip_address("8.8.8.8"), address), verdict)


def test_private_addresses_need_a_declared_host() -> None:
    """A wildcard endpoint reaches public addresses only; a declared host may be private, but no control plane."""
    declared, wildcard = Verdict(True, "allowed", "", exact_host=True), Verdict(True, "allowed", "")
    for text in PRIVATE:
        address = ipaddress.ip_address(text)
        check("a.test", 443, (address,), declared)
        with pytest.raises(DestinationRefused, match="internal address"):
            check("a.test", 443, (address,), wildcard)
    for text in PUBLIC:
        check("a.test", 443, (ipaddress.ip_address(text),), wildcard)
    with pytest.raises(DestinationRefused, match="control-plane"):
        check("a.test", 6443, (ipaddress.ip_address("8.8.8.8"),), declared)


async def test_a_name_for_loopback_is_refused_and_never_dialled() -> None:
    """An allowed name that resolves to this machine: 403 ssrf_denied, one event, and the server behind it hears nothing."""
    upstream = await Upstream(lambda reader, writer: asyncio.sleep(0)).start()
    async with running(policy_for(f"host: localhost, port: {upstream.port}")) as proxy:
        answer = await proxy.raw(b"CONNECT localhost:%d HTTP/1.1\r\nHost: x\r\n\r\n" % upstream.port)
        assert status_of(answer) == 403 and json_of(answer)["error"] == "ssrf_denied"
        answer = await proxy.raw(b"GET http://localhost:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % upstream.port)
        assert status_of(answer) == 403 and json_of(answer)["reason_id"] == "ssrf_denied"
        assert upstream.connections == 0
        assert [e["firewall_rule"]["type"] for e in proxy.log.decisions() if e["action"] == "Denied"] == [
            "ssrf",
            "ssrf",
        ]
    await upstream.stop()


@pytest.mark.parametrize("name", ["127.1", "0x7f000001", "2130706433", "0177.0.0.1", "localhost"])
async def test_other_spellings_of_loopback_do_not_pass(name: str) -> None:
    """What the resolver makes of a name is checked, not how the name looks."""
    destinations = Destinations({})
    with pytest.raises(DestinationRefused):
        await destinations.resolve(name, 443, Verdict(True, "allowed", "", exact_host=True))
    destinations.close()


async def test_pins_are_for_exactly_their_host() -> None:
    """A pinned name skips DNS and checks; its neighbours do not."""
    destinations = Destinations({"api.test": ("127.0.0.1",)})
    verdict = Verdict(True, "allowed", "", exact_host=True)
    pinned, complaint = await destinations.resolve("api.test", 80, verdict)
    assert pinned.addresses == ("127.0.0.1",) and complaint == ""
    with pytest.raises(DestinationRefused):
        await destinations.resolve("127.0.0.1", 80, verdict)
    destinations.close()


async def test_dialling_tries_the_next_address() -> None:
    """A dead first address costs a moment, not the connection; only dead ones are an error."""
    upstream = await Upstream(lambda reader, writer: asyncio.sleep(0)).start()
    destinations = Destinations({})
    sock = await destinations.dial(Destination("a.test", upstream.port, ("127.0.0.9", "::1", "127.0.0.1")))
    assert sock.getpeername() in (("127.0.0.1", upstream.port), ("127.0.0.9", upstream.port))
    sock.close()
    with pytest.raises(UpstreamUnreachable):
        await destinations.dial(Destination("a.test", 9, ("127.0.0.1", "::1")))
    destinations.close()
    await upstream.stop()


# -- the authority ---------------------------------------------------------------------------------------------------


def test_authority_files(tmp_path: pathlib.Path, root: support.TestAuthority) -> None:
    """Both files are 0644, the bundle holds the CA and the operator's roots, no key is written, links are not followed."""
    authority = CertificateAuthority.create()
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    run = tmp_path / "run"
    run.mkdir()
    (run / "openshell-ca.pem").symlink_to(victim)
    files = authority.write(run, root.file)
    assert victim.read_text() == "untouched" and not files.ca.is_symlink()
    assert files.ca.read_bytes() == authority.ca_pem + root.file.read_bytes()
    bundle = files.bundle.read_bytes()
    assert authority.ca_pem in bundle and root.file.read_bytes() in bundle and b"PRIVATE" not in bundle
    assert {oct(path.stat().st_mode & 0o777) for path in run.iterdir()} == {"0o644"} and len(list(run.iterdir())) == 2
    link = tmp_path / "link"
    link.symlink_to(run)
    with pytest.raises(ProxyError):
        authority.write(link)


def test_leaves() -> None:
    """A leaf is for one name, for at most 199 days, on a key that is not the CA's; the cache is bounded."""
    from cryptography import x509

    authority = CertificateAuthority.create()
    ca = x509.load_pem_x509_certificate(authority.ca_pem)
    assert [a.value for a in ca.subject] == ["OpenShell Sandbox CA", "OpenShell"]
    for host in ("api.test", "192.0.2.1", "a" * 60 + ".example.test"):
        leaf = x509.load_pem_x509_certificates(authority.leaf_pem(host))[0]
        leaf.verify_directly_issued_by(ca)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [str(name.value) for name in names] == [host]
        assert (leaf.not_valid_after_utc - leaf.not_valid_before_utc).days <= 199
        assert leaf.public_key() != ca.public_key()
    for number in range(300):
        authority.leaf_pem(f"h{number}.test")
    assert len(authority._leaves) <= 256


# -- the relay -------------------------------------------------------------------------------------------------------


async def relay_of(idle: float = 60) -> tuple[Tunnel, asyncio.Task[str], socket.socket, socket.socket]:
    """A tunnel over two loopback connections: (tunnel, its run, the client's end, the upstream's end)."""
    loop = asyncio.get_running_loop()
    ends = []
    for _ in range(2):
        listener = socket.create_server(("127.0.0.1", 0))
        outer = socket.create_connection(listener.getsockname())
        inner, _ = listener.accept()
        listener.close()
        outer.setblocking(False)
        inner.setblocking(False)
        ends.append((outer, inner))
    tunnel = Tunnel(ends[0][1], ends[1][1])

    async def run() -> str:
        try:
            return await tunnel.run(idle)
        finally:
            ends[0][1].close()
            ends[1][1].close()

    return tunnel, loop.create_task(run()), ends[0][0], ends[1][0]


@pytest.mark.parametrize("spliced", [True, False])
async def test_relay_carries_everything_both_ways(spliced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MB each way at once with slow readers, half-close kept, counted; by splice and by the fallback copy."""
    if not spliced:

        def refuse(*_: object, **__: object) -> int:
            raise OSError(22, "Invalid argument")

        monkeypatch.setattr(os, "splice", refuse)
    tunnel, task, client, upstream = await relay_of()
    loop = asyncio.get_running_loop()
    size = 16 * 1024 * 1024
    blob = os.urandom(1024) * (size // 1024)

    async def read_all(sock: socket.socket) -> bytes:
        await asyncio.sleep(0.1)
        got = bytearray()
        while part := await loop.sock_recv(sock, 65536):
            got += part
        return bytes(got)

    async def write_all(sock: socket.socket) -> None:
        await loop.sock_sendall(sock, blob)
        sock.shutdown(socket.SHUT_WR)

    results = await asyncio.gather(read_all(client), read_all(upstream), write_all(client), write_all(upstream))
    assert results[0] == blob and results[1] == blob
    assert await asyncio.wait_for(task, 5) == "closed"
    assert tunnel.bytes_up == tunnel.bytes_down == size
    client.close()
    upstream.close()


async def test_relay_ends_when_idle_cut_or_reset() -> None:
    """An idle tunnel ends, a cut ends it at once, a reset ends both sides, and no descriptor stays."""
    before = len(os.listdir("/proc/self/fd"))
    _, task, client, upstream = await relay_of(idle=0.1)
    assert await asyncio.wait_for(task, 5) == "idle"
    client.close()
    upstream.close()
    tunnel, task, client, upstream = await relay_of()
    await asyncio.sleep(0)
    tunnel.cut("policy generation changed")
    assert await asyncio.wait_for(task, 5) == "policy generation changed"
    client.close()
    upstream.close()
    _, task, client, upstream = await relay_of()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    assert await asyncio.wait_for(task, 5) == "reset"
    upstream.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert ok()
