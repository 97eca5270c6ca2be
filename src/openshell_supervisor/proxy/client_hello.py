"""What a TLS client says first: the server name and the application protocols it offers (RFC 8446 4.1.2, RFC 6066, RFC 7301).

Pure: bytes in, `ClientHello` out. Nothing is decrypted and nothing is answered; the handshake itself is OpenSSL's.
"""

from __future__ import annotations

from dataclasses import dataclass

# A ClientHello with post-quantum key shares and a big ticket stays below 4 KiB; one record holds 16 KiB.
MAX_HELLO = 16 * 1024 + 5
RECORD_HEADER = 5
_HANDSHAKE = 22
_CLIENT_HELLO = 1
_SERVER_NAME = 0
_ALPN = 16


class HelloError(ValueError):
    """The bytes are not a ClientHello that we would pass on."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """`server_name` is lower-case ASCII or ""; `protocols` are the ALPN offers in the client's order."""

    server_name: str
    protocols: tuple[str, ...]


def looks_like_tls(first: bytes) -> bool:
    """True when the bytes could begin a TLS handshake record (one byte is enough to say so, three to be sure)."""
    return (
        first[:1] == b"\x16"
        and first[1:2] in (b"", b"\x03")
        and first[2:3] in (b"", b"\x00", b"\x01", b"\x02", b"\x03", b"\x04")
    )


def missing_bytes(peeked: bytes) -> int:
    """How many bytes must be there before `parse` can answer: 0 when all are. Raises `HelloError` when it can never be enough."""
    position = 0
    hello = bytearray()
    while True:
        if len(peeked) < position + RECORD_HEADER:
            return position + RECORD_HEADER
        if peeked[position] != _HANDSHAKE:
            raise HelloError("a record that is not a handshake came before the ClientHello was complete")
        end = position + RECORD_HEADER + int.from_bytes(peeked[position + 3 : position + 5])
        if end > MAX_HELLO or end == position + RECORD_HEADER:
            raise HelloError("the ClientHello is too long, or a record is empty")
        if len(peeked) < end:
            return end
        hello += peeked[position + RECORD_HEADER : end]
        if len(hello) >= 4 and len(hello) >= 4 + int.from_bytes(hello[1:4]):
            return 0
        position = end


def parse(peeked: bytes) -> ClientHello:
    """Parse the records that `missing_bytes` found complete. Raises `HelloError`."""
    hello = bytearray()
    position = 0
    while position + RECORD_HEADER <= len(peeked) and peeked[position] == _HANDSHAKE:
        end = position + RECORD_HEADER + int.from_bytes(peeked[position + 3 : position + 5])
        hello += peeked[position + RECORD_HEADER : end]
        position = end
    reader = _Reader(bytes(hello))
    if reader.number(1) != _CLIENT_HELLO:
        raise HelloError("the first handshake message is not a ClientHello")
    body = _Reader(reader.vector(3))
    body.take(2 + 32)  # legacy_version, random
    body.vector(1)  # legacy_session_id
    body.vector(2)  # cipher_suites
    body.vector(1)  # legacy_compression_methods
    name = ""
    protocols: tuple[str, ...] = ()
    extensions = _Reader(body.vector(2) if body.left else b"")
    seen: set[int] = set()
    while extensions.left:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind in seen:
            raise HelloError("an extension is repeated")
        seen.add(kind)
        if kind == _SERVER_NAME:
            name = _server_name(content)
        elif kind == _ALPN:
            protocols = _protocols(content)
    return ClientHello(name, protocols)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise HelloError("the ClientHello is cut short")
        part = self._data[self._at : self._at + count]
        self._at += count
        return part

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width))

    def vector(self, width: int) -> bytes:
        return self.take(self.number(width))


def _server_name(content: bytes) -> str:
    names = _Reader(_Reader(content).vector(2))
    found = ""
    while names.left:
        kind, name = names.number(1), names.vector(2)
        if kind != 0 or found:
            raise HelloError("the server name list holds something else than one host name")
        if not name.isascii() or not name or any(byte <= 0x20 or byte == 0x7F for byte in name):
            raise HelloError("the server name is not a host name")
        found = name.decode("ascii").lower()
    return found


def _protocols(content: bytes) -> tuple[str, ...]:
    offers = _Reader(_Reader(content).vector(2))
    found: list[str] = []
    while offers.left:
        found.append(offers.vector(1).decode("latin-1"))
    return tuple(found)
