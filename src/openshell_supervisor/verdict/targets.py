"""Request targets, queries and hosts in their one canonical form (policy.md 2.8).

A rule is compared with what is written here and nothing else, and the canonical path is what goes on the wire: what was
judged is what is sent. Every function is pure and either returns the canonical form or raises `TargetError`.
"""

from __future__ import annotations

import ipaddress
import re

MAX_TARGET = 4096
"""Bytes of a path, upstream's limit; servers commonly stop at 8 KiB for the whole request line."""
MAX_QUERY_PAIRS = 1024
"""Parameters of one query; twice what PHP (1000 variables) or Django accept is beyond any real client's need."""
MAX_HOST = 255
"""RFC 1035: a name has at most 253 characters as text; the rest allows for a root dot."""

_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_AUTHORITY = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
_HOST = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?\Z")
_LITERAL = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,;=:@")
_OPAQUE_SLASH = 0x100  # stands for an encoded slash while a path is a list of numbers; no byte has this value


class TargetError(ValueError):
    """A target, query or host that is refused before any rule is asked; `reason_id` is stable."""

    def __init__(self, reason_id: str, message: str) -> None:
        super().__init__(message)
        self.reason_id = reason_id
        self.message = message


def canonical_target(target: str, *, allow_encoded_slash: bool) -> tuple[str, str]:
    """The canonical path and the raw query of a request target in origin or absolute form.

    The path begins with `/`, holds only ASCII, has no dot segments, no empty segments but perhaps the last, no
    `;parameters`. Raises `TargetError("invalid_request_target", ...)`.
    """
    _refuse_bytes(target)
    path, _, query = target.partition("?")
    prefix = _AUTHORITY.match(path)
    if prefix:
        path = path[prefix.end() :]
    path = path or "/"
    if not path.startswith("/"):
        raise _bad("request-target is not a valid origin-form path")
    if len(path) > MAX_TARGET:
        raise _bad(f"request-target exceeds the configured maximum length of {MAX_TARGET} bytes")
    segments = _resolved(_decoded(path, allow_encoded_slash))
    canonical = "/" + "/".join(_encoded(segment) for segment in segments)
    if len(canonical) > MAX_TARGET:
        raise _bad(f"request-target exceeds the configured maximum length of {MAX_TARGET} bytes")
    return canonical, query


def _bad(message: str) -> TargetError:
    return TargetError("invalid_request_target", message)


def _refuse_bytes(target: str) -> None:
    if _CONTROL.search(target):
        raise _bad("request-target contains a null or control byte")
    if not target.isascii():
        raise _bad("request-target contains raw non-ASCII bytes, which must be percent-encoded")
    if "#" in target:
        raise _bad("request-target contains a fragment")


def _decoded(path: str, allow_encoded_slash: bool) -> list[int]:
    """The path as byte values, each escape decoded once, an encoded slash as `_OPAQUE_SLASH`."""
    out: list[int] = []
    raw = path.encode("ascii")
    at = 0
    while at < len(raw):
        if raw[at] != 0x25:
            out.append(raw[at])
            at += 1
            continue
        digits = _ESCAPE.match(raw, at)
        if digits is None or digits[1] is None:
            raise _bad("request-target contains an invalid percent-encoded sequence")
        byte = int(digits[1], 16)
        if byte < 0x20 or byte == 0x7F:
            raise _bad("request-target contains a null or control byte")
        if byte == 0x2F and not allow_encoded_slash:
            raise _bad("request-target contains an encoded '/' (%2F) which is not allowed on this endpoint")
        out.append(_OPAQUE_SLASH if byte == 0x2F else byte)
        at += 3
    return out


def _resolved(path: list[int]) -> list[list[int]]:
    """The segments after cutting parameters and resolving dots; the last one is empty for a trailing slash."""
    segments = [_without_parameters(segment) for segment in _split(path, 0x2F)[1:]]
    kept: list[list[int]] = []
    for number, segment in enumerate(segments):
        last = number == len(segments) - 1
        if segment == [0x2E]:
            trailing = True
        elif segment == [0x2E, 0x2E]:
            if not kept:
                raise _bad("request-target would escape the path root")
            kept.pop()
            trailing = True
        elif segment:
            kept.append(segment)
            trailing = False
        else:
            trailing = True
        if last and trailing:
            kept.append([])
    for segment in kept:
        if any(part in ([0x2E], [0x2E, 0x2E]) for part in _split(segment, _OPAQUE_SLASH)):
            raise _bad("request-target still contains a `.`/`..` segment after canonicalization")
    return kept


def _without_parameters(segment: list[int]) -> list[int]:
    return segment[: segment.index(0x3B)] if 0x3B in segment else segment


def _split(values: list[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for value in values:
        if value == separator:
            parts.append([])
        else:
            parts[-1].append(value)
    return parts


def _encoded(segment: list[int]) -> str:
    out = []
    for value in segment:
        if value == _OPAQUE_SLASH:
            out.append("%2F")
        else:
            out.append(chr(value) if value in _LITERAL else f"%{value:02X}")
    return "".join(out)


def parse_query(raw: str) -> tuple[tuple[str, str], ...]:
    """The decoded pairs of a raw query, in order; a key without `=` has the value "".

    Raises `TargetError("invalid_request_target", ...)` for a bad escape, for what is not UTF-8, and for control characters.
    """
    if not raw:
        return ()
    parts = raw.split("&")
    if len(parts) > MAX_QUERY_PAIRS:
        raise _bad(f"query has more than {MAX_QUERY_PAIRS} parameters")
    pairs = []
    for part in parts:
        if part:
            key, _, value = part.partition("=")
            pairs.append((_query_text(key), _query_text(value)))
    return tuple(pairs)


def _query_text(text: str) -> str:
    if "%" not in text and "+" not in text and text.isascii():
        return text
    raw = text.replace("+", " ").encode("utf-8", "surrogatepass")

    def byte(match: re.Match[bytes]) -> bytes:
        if match[1] is None:
            raise _bad("Invalid percent-encoding in query component")
        return bytes((int(match[1], 16),))

    try:
        return _ESCAPE.sub(byte, raw).decode("utf-8")
    except UnicodeDecodeError:
        raise _bad("query component is not valid UTF-8") from None


def canonical_host(host: str) -> str:
    """A host as rules see it: lower case, an IPv6 address without brackets and in its shortest form.

    A trailing dot stays, as upstream has it (such a host matches no rule). Raises `TargetError("invalid_request", ...)`
    for what is neither a DNS name nor an address: empty, too long, white space, `%`, wildcards, empty labels.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if len(host) > MAX_HOST:
        raise TargetError("invalid_request", f"host is longer than {MAX_HOST} characters")
    if ":" in bare or bare != host:
        try:
            if "%" in bare:
                raise ValueError
            return str(ipaddress.IPv6Address(bare))
        except ValueError:
            raise TargetError("invalid_request", "host is not a DNS name and not an IP address") from None
    if not _HOST.match(bare):
        raise TargetError("invalid_request", "host is not a DNS name and not an IP address")
    return bare.lower()
