"""Canonical targets: what is judged is what is sent, and nothing smuggles a segment past a rule."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from openshell_supervisor.verdict.facts import TargetError, canonical_host, canonical_target, parse_query

PIECES = (
    *("/", "//", "a", "b", ".", "..", "%2e", "%2E%2e", "%2f", "%2F", ";", ";x=1", "%3b", "%25", "%252e", "?", "&", "="),
    *("\\", "%5c", "%20", "+", "~", "%7E", "%c3%a9", "#", "%00", "%", "%zz", "\r", "é", "http://h"),
)
pieces = st.sampled_from(PIECES)


def canonical(target: str, allow: bool = False) -> str:
    """The path alone."""
    return canonical_target(target, allow_encoded_slash=allow)[0]


@settings(max_examples=800, deadline=None)
@given(st.lists(pieces, max_size=10).map("".join), st.booleans())
def test_canonical_paths_are_canonical(target: str, allow: bool) -> None:
    """Whatever is accepted is absolute, ASCII, without dot segments, inner empty segments or parameters, and a fixed point."""
    try:
        path, _ = canonical_target(target, allow_encoded_slash=allow)
    except TargetError as error:
        assert error.reason_id == "invalid_request_target" and error.message
        return
    assert re.fullmatch(r"/(?:[A-Za-z0-9._~!$&'()*+,=:@/-]|%[0-9A-F]{2})*", path)
    segments = path[1:].split("/")
    assert all(segments[:-1]) and not {".", ".."} & set(segments)
    assert allow or "%2F" not in path
    assert canonical(path, allow) == path
    decoded = [part for segment in segments for part in unquote_to_bytes(segment).split(b"/")]
    assert not {b".", b".."} & set(decoded)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_target_or_a_target_error(text: str) -> None:
    """Total: no other exception."""
    for call in (lambda: canonical(text), lambda: parse_query(text), lambda: canonical_host(text)):
        try:
            call()
        except TargetError as error:
            assert error.message


@settings(max_examples=200, deadline=None)
@given(st.lists(pieces, max_size=6).map("".join))
def test_the_query_is_kept_byte_for_byte(query: str) -> None:
    """The path is rewritten, the query never."""
    assume(query.isascii() and not any(c in query for c in "#\r"))
    assert canonical_target(f"/x/../y?{query}", allow_encoded_slash=False) == ("/y", query)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/public/../secret", "/secret"),
        ("/public/%2E%2E/secret", "/secret"),
        ("/public/..;/secret", "/secret"),
        ("/public/..%3B/secret", "/secret"),
        ("/public;a=1/x;b", "/public/x"),
        ("/a//b/", "/a/b/"),
        ("/a/..", "/"),
        ("/a/b/.", "/a/b/"),
        ("http://host/x", "/x"),
        ("http://host", "/"),
        ("http://host?q", "/"),
        ("", "/"),
        ("/%7Ea%40%c3%a9%20", "/~a@%C3%A9%20"),
        ("/%252e%252e/x", "/%252e%252e/x"),
        ("/;x/..", None),
        ("/..", None),
        ("*", None),
        ("x", None),
        ("/a%2fb", None),
        ("/a%00", None),
        ("/a%0d%0a", None),
        ("/a%", None),
        ("/a%4", None),
        ("/a#b", None),
        ("/a b\n", None),
        ("/" + "a" * 4096, None),
        ("/" + "é", None),
    ],
)
def test_known_targets(target: str, path: str | None) -> None:
    """Upstream's rules one by one; None is a refusal."""
    if path is None:
        with pytest.raises(TargetError):
            canonical(target)
    else:
        assert canonical(target) == path


def test_encoded_slashes_are_one_opaque_character() -> None:
    """Allowed, `%2F` stays within its segment and cannot carry dots past the rules."""
    assert canonical("/a%2fb/c", True) == "/a%2Fb/c"
    assert canonical("/a%2f%2fb", True) == "/a%2F%2Fb"
    for target in ("/x/..%2fsecret", "/x/%2e%2e%2fsecret", "/x/a%2f..", "/x/a%2f.%2fb"):
        with pytest.raises(TargetError):
            canonical(target, True)


@pytest.mark.parametrize(
    ("raw", "pairs"),
    [
        ("", ()),
        ("a", (("a", ""),)),
        ("a=1&a=2&&b==", (("a", "1"), ("a", "2"), ("b", "="))),
        ("a+b=%20c%26", (("a b", " c&"),)),
        ("%E9", None),
        ("a=%zz", None),
        ("a=%", None),
        ("&".join(["a"] * 1025), None),
    ],
)
def test_queries(raw: str, pairs: tuple[tuple[str, str], ...] | None) -> None:
    """Decoded once, in order, strictly; None is a refusal."""
    if pairs is None:
        with pytest.raises(TargetError):
            parse_query(raw)
    else:
        assert parse_query(raw) == pairs


@pytest.mark.parametrize(
    ("host", "form"),
    [
        ("API.Example.com", "api.example.com"),
        ("api.example.com.", "api.example.com."),
        ("my_host", "my_host"),
        ("10.0.0.1", "10.0.0.1"),
        ("[FD00:0:0::1]", "fd00::1"),
        ("fd00::1", "fd00::1"),
        ("", None),
        (".", None),
        (".example.com", None),
        ("a..b", None),
        ("*.example.com", None),
        ("a b", None),
        ("a%2eb", None),
        ("[fe80::1%eth0]", None),
        ("[10.0.0.1]", None),
        ("[]", None),
        ("a:80", None),
        ("é.com", None),
        ("\u212a.com", None),
        ("a\0b", None),
        ("a\n", None),
        ("a" * 256, None),
    ],
)
def test_hosts(host: str, form: str | None) -> None:
    """A name in lower case or an address in its shortest form; anything else is refused."""
    if form is None:
        with pytest.raises(TargetError) as caught:
            canonical_host(host)
        assert caught.value.reason_id == "invalid_request"
    else:
        assert canonical_host(host) == form
