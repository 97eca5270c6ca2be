"""The first lines of an HTTP/1 request, read strictly.

One parser for both doors: the front end's first head and every later head of a keep-alive connection. What it does not accept
it does not repair (request smuggling lives on repairs). It knows bytes; it knows neither policy nor sockets nor mitmproxy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# What upstream reads before it gives up (proxy.md 1.3). nginx and Apache allow 8 KiB for one header line.
MAX_FIRST_HEAD = 8 * 1024
# A head inside a tunnel (proxy.md 3.2); h11's default is the same order of magnitude.
MAX_HEAD = 16 * 1024

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
# RFC 9112 2-5 without its leniencies: CRLF only, single spaces, no obs-fold, no space before the colon, no control bytes.
_HEAD = re.compile(
    rb"("
    + _TOKEN
    + rb") ([\x21-\x7e\x80-\xff]++) HTTP/(1\.[01])\r\n((?:"
    + _TOKEN
    + rb":[\t\x20-\x7e\x80-\xff]*+\r\n)*+)\r\n"
)
_TOKEN_ONLY = re.compile(_TOKEN)
# No leading zeros, and 18 digits stay below 2**63, whatever reads the number next.
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")
_SAFE_FIELD = re.compile(_TOKEN + rb"\x00[\t\x20-\x7e\x80-\xff]*+")
_PROTECTED_OPTIONS = frozenset({b"host", b"content-length", b"transfer-encoding"})


class HeadError(ValueError):
    """The head is not one that we would forward. The text names the rule, never the input."""


@dataclass(slots=True)
class RequestHead:
    """A request head that passed. `body` counts octets, None means chunked; `options` are the lower-case Connection tokens."""

    method: str
    target: str
    version: str
    headers: list[tuple[bytes, bytes]]
    host: str | None
    body: int | None
    options: frozenset[bytes]


def parse_request_head(raw: bytes) -> RequestHead:
    """Parse a complete head, blank line included. Raises `HeadError`."""
    match = _HEAD.fullmatch(raw)
    if match is None:
        raise HeadError(_complaint(raw))
    if not raw.isascii():
        _require_utf8(raw)
    method, target, version, block = match.groups()
    headers = _fields(block)
    hosts: list[bytes] = []
    lengths: list[bytes] = []
    codings: list[bytes] = []
    options: frozenset[bytes] = frozenset()
    for name, value in headers:
        lowered = name.lower()
        if lowered == b"host":
            hosts.append(value)
        elif lowered == b"content-length":
            lengths.append(value)
        elif lowered == b"transfer-encoding":
            codings.append(value)
        elif lowered == b"connection":
            options |= connection_options(value)
    if len(hosts) > 1 or (not hosts and version == b"1.1"):
        raise HeadError("an HTTP/1.1 request needs exactly one Host header")
    return RequestHead(
        method.decode("ascii"),
        target.decode("latin-1"),
        version.decode("ascii"),
        headers,
        hosts[0].decode("utf-8") if hosts else None,
        body_length(lengths, codings, version),
        options,
    )


def body_length(lengths: list[bytes], codings: list[bytes], version: bytes) -> int | None:
    """The framing of a request body: octets, or None for chunked. Raises `HeadError` for anything ambiguous (RFC 9112 6.3)."""
    if codings:
        if lengths:
            raise HeadError("Content-Length together with Transfer-Encoding")
        if version != b"1.1" or len(codings) != 1 or codings[0].lower() != b"chunked":
            raise HeadError("Transfer-Encoding is not exactly `chunked` on HTTP/1.1")
        return None
    if not lengths:
        return 0
    if len(lengths) != 1 or not _LENGTH.fullmatch(lengths[0]):
        raise HeadError("Content-Length is repeated or not a number")
    return int(lengths[0])


def connection_options(value: bytes) -> frozenset[bytes]:
    """The lower-case tokens of one Connection header. Raises `HeadError` when it nominates a header that frames or routes."""
    options = frozenset(part.strip(b" \t").lower() for part in value.split(b",")) - {b""}
    if options & _PROTECTED_OPTIONS or not all(_TOKEN_ONLY.fullmatch(option) for option in options):
        raise HeadError("Connection nominates a header that may not be removed, or is not a list of tokens")
    return options


def _fields(block: bytes) -> list[tuple[bytes, bytes]]:
    fields = []
    for line in block.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        fields.append((name, value.strip(b" \t")))
    return fields


def _require_utf8(raw: bytes) -> None:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        raise HeadError("the head is not UTF-8") from None


def _complaint(raw: bytes) -> str:
    """Name the first rule that is broken, for a person who has to mend the client."""
    line, _, rest = raw.partition(b"\r\n")
    if re.fullmatch(rb"[^ ]+ [^ ]+ HTTP/1\.[01]", line) is None:
        return "the request line is not `METHOD target HTTP/1.x` with single spaces"
    if re.search(rb"(?<!\r)\n|\r(?!\n)", raw):
        return "a line does not end in CRLF"
    if re.search(rb"\r\n[ \t]", rest) or rest[:1] in (b" ", b"\t"):
        return "a header is folded over two lines"
    return "a header name is not a token, or a value holds a control byte"


def is_token(text: str) -> bool:
    """True for a token of RFC 9110 5.6.2, which every method is."""
    return text.isascii() and _TOKEN_ONLY.fullmatch(text.encode()) is not None


def safe_fields(fields: Iterable[tuple[bytes, bytes]]) -> bool:
    """True when no name or value could break out of an HTTP/1 head; HTTP/2 carries any byte."""
    return all(_SAFE_FIELD.fullmatch(name + b"\x00" + value) for name, value in fields)


def split_absolute(target: str) -> tuple[str, str, str] | None:
    """`scheme://authority/path?query` as (lower-case scheme, authority, path with query), or None for another form."""
    scheme, separator, rest = target.partition("://")
    if not separator or not scheme.isalnum():
        return None
    end = min((index for index in (rest.find("/"), rest.find("?"), rest.find("#")) if index >= 0), default=len(rest))
    path = rest[end:]
    return scheme.lower(), rest[:end], path if path.startswith("/") else f"/{path}"


def split_authority(authority: str, default_port: int | None) -> tuple[str, int]:
    """`host[:port]` with IPv6 in brackets, as (host without brackets, port). Raises `HeadError` (user-info is refused)."""
    if "@" in authority:
        raise HeadError("the authority holds user information")
    if authority.startswith("["):
        host, closed, tail = authority[1:].partition("]")
        if not closed or ":" not in host:
            raise HeadError("the authority is not host:port")
        port_text = tail[1:] if tail.startswith(":") else tail and "x"
        absent = not tail
    else:
        host, separator, port_text = authority.partition(":")
        absent = not separator
    if absent:
        if default_port is None:
            raise HeadError("the authority has no port")
        port = default_port
    elif port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 and 0 < int(port_text) < 65536:
        port = int(port_text)
    else:
        raise HeadError("the port is not a number from 1 to 65535")
    if not host:
        raise HeadError("the authority has no host")
    return host, port


def authority_of(host: str, port: int, default_port: int) -> str:
    """The Host header for a destination: IPv6 bracketed, the scheme's default port left out."""
    name = f"[{host}]" if ":" in host else host
    return name if port == default_port else f"{name}:{port}"
