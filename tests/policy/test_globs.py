"""The glob dialect of policy.md 2.6: an independent oracle agrees on random triples, and no input makes matching slow."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openshell_supervisor.policy.automaton import Matcher, intersects
from openshell_supervisor.policy.globs import (
    HOST,
    PATH,
    VALUE,
    GlobError,
    glob_match,
    glob_problem,
    host_pattern,
    path_selected,
)

TABLE = [
    ("/repos/*", PATH, "/repos/a/b", False),
    ("/repos/*", PATH, "/repos/", True),
    ("/repos/**", PATH, "/repos", False),
    ("/repos/**", PATH, "/repos/", True),
    ("/a/**/b", PATH, "/a/b", True),
    ("/a/**/b", PATH, "/a/x/y/b", True),
    ("/a/**/**/b", PATH, "/a/b", True),
    ("/foo**", PATH, "/foo/bar", False),
    ("/foo**", PATH, "/foobar", True),
    ("**", PATH, "", True),
    ("**/", PATH, "anything", True),
    ("**/a", PATH, "a", True),
    ("**/a", PATH, "/x/a", True),
    ("/v[0-9]", PATH, "/v5", True),
    ("/v[!0-9]", PATH, "/v5", False),
    ("/v[^0-9]", PATH, "/vx", True),
    ("/a[/]b", PATH, "/a/b", True),
    ("/a?b", PATH, "/a/b", False),
    ("/[]]", PATH, "/]", True),
    ("/[a-]", PATH, "/-", True),
    ("/{a,b}", PATH, "/b", True),
    ("/{a,}", PATH, "/", False),
    ("/{a,{b,c}}", PATH, "/c", True),
    ("/a\\*b", PATH, "/a*b", True),
    ("/a\\*b", PATH, "/axb", False),
    ("/a,b", PATH, "/a,b", True),
    ("/x", PATH, "/x\n", False),
    ("/x*", PATH, "/x\ny", True),
    ("*.example.com", HOST, ".example.com", True),
    ("*.example.com", HOST, "a.b.example.com", False),
    ("**.example.com", HOST, "a.b.example.com", True),
    ("**.example.com", HOST, "example.com", False),
    ("*-x.example.com", HOST, "-x.example.com", True),
    ("v1.*", VALUE, "v1.2", True),
    ("v1.*", VALUE, "v1.2.3", False),
    ("v1.**", VALUE, "v1.2.3", True),
    ("NVIDIA/*", VALUE, "NVIDIA/a/b", True),
    ("caf?", VALUE, "café", False),
    ("caf??", VALUE, "café", True),
]


@pytest.mark.parametrize(("pattern", "delimiters", "value", "matches"), TABLE)
def test_the_corners(pattern: str, delimiters: tuple[str, ...], value: str, matches: bool) -> None:
    """Each corner that policy.md 2.6 names, and those of globset that it rests on."""
    assert glob_match(pattern, delimiters, value) is matches


@pytest.mark.parametrize("pattern", ["/[", "/[a", "/{a", "/a}", "/a\\", "/[z-a]", "/[!", "{" * 40 + "}" * 40])
def test_what_is_no_glob(pattern: str) -> None:
    """Unbalanced brackets and braces, a backslash at the end and backward ranges are errors, never a match."""
    assert glob_problem(pattern, PATH)
    with pytest.raises(GlobError):
        glob_match(pattern, PATH, "/a")


@pytest.mark.parametrize("pattern", ["/\0", "/*"])
def test_nul_is_an_error(pattern: str) -> None:
    """A NUL on either side fails the evaluation: it is what the rewriting of delimiters uses."""
    with pytest.raises(GlobError):
        glob_match(pattern, PATH, "/\0")


def oracle(pattern: str, value: str) -> bool:
    """The dialect by recursion, from the text of policy.md alone, for `/` as delimiter and without classes and braces."""
    if pattern in ("**", "**/"):
        return True
    if pattern.startswith("**/"):
        rest = pattern
        while rest.startswith("**/"):
            rest = rest[3:]
        if rest == "**":
            return True
        starts = [0, *([1] if value.startswith("/") else []), *(m.end() for m in re.finditer("/", value))]
        return any(walk(rest, value[start:]) for start in starts)
    return walk(pattern, value)


def walk(pattern: str, value: str) -> bool:
    """One step of the oracle."""
    if not pattern:
        return not value
    if pattern.startswith("/**") and pattern[3:4] in ("", "/"):
        rest = pattern[3:]
        while rest.startswith("/**") and rest[3:4] in ("", "/"):
            rest = rest[3:]
        if not rest:
            return value.startswith("/")
        if not value.startswith("/"):
            return False
        return any(walk(rest[1:], value[at + 1 :]) for at, char in enumerate(value) if char == "/")
    if pattern[0] == "*":
        return any(walk(pattern[1:], value[at:]) for at in range(len(value.split("/")[0]) + 1))
    if pattern[0] == "?":
        return value[:1] not in ("", "/") and walk(pattern[1:], value[1:])
    return value[:1] == pattern[0] and walk(pattern[1:], value[1:])


@settings(max_examples=600, deadline=None)
@given(st.text("ab/*?", max_size=10), st.text("ab/", max_size=10))
def test_the_oracle_agrees(pattern: str, value: str) -> None:
    """A second implementation, by recursion from the written rules, gives the same answer."""
    assert glob_match(pattern, PATH, value) is oracle(pattern, value)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30), st.sampled_from([HOST, PATH, VALUE]), st.text(max_size=30))
def test_total(pattern: str, delimiters: tuple[str, ...], value: str) -> None:
    """Any pattern on any value matches, does not match, or is a GlobError."""
    try:
        assert glob_match(pattern, delimiters, value) in (True, False)
    except GlobError as error:
        assert str(error)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="*?[]{}\\,\0", exclude_categories=("Cs",)), max_size=20))
def test_plain_text_matches_itself(text: str) -> None:
    """Without glob characters a pattern is the text."""
    assert glob_match(text, PATH, text)
    assert not glob_match(text, PATH, f"{text}x")


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        ("/" + "*a" * 40 + "b", "/" + "a" * 4000),
        ("/" + "?*" * 40 + "b", "/" + "a" * 4000),
        ("/**/*a/**/*a/**/x*y*z", "/a" * 2000),
        ("/{*a,*b}*{*a,*b}c", "/" + "ab" * 2000),
        ("/{a*,a*,a*}{a*,a*}z", "/" + "a" * 4000),
        ("**/" * 60 + "b", "a/" * 2000),
        ("/" + "*[ab]" * 30 + "c", "/" + "ab" * 2000),
    ],
)
def test_matching_is_linear(pattern: str, value: str) -> None:
    """The workload picks the value: no legal pattern may take longer on a path of the greatest length than a moment."""
    begun = time.process_time()
    assert glob_match(pattern, PATH, value) is False
    assert time.process_time() - begun < 0.5
    begun = time.process_time()
    assert path_selected(pattern, value) is False or "{" in pattern
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize(
    ("selector", "path", "selected"),
    [
        ("", "/x", True),
        ("**", "/x", True),
        ("/**", "/", True),
        ("/v1/**", "/v1", True),
        ("/v1/**", "/v1/a/b", True),
        ("/v1/**", "/v10", False),
        ("/v1/*", "/v1/a/b", True),
        ("/v?", "/v/", True),
        ("/v[12]", "/v2", True),
        ("/v[!12]", "/v2", False),
        ("/a/**/b", "/a/b", True),
        ("/a/**/b", "/a/x/y/b", True),
        ("/[", "/[", True),
        ("/[", "/a", False),
        ("/a***", "/ab", False),
    ],
)
def test_selectors(selector: str, path: str, selected: bool) -> None:
    """The other dialect, of endpoint paths: `*` crosses slashes, `X/**` takes X itself, a bad pattern equals only itself."""
    assert path_selected(selector, path) is selected


hosts = st.text("ab.*", min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(hosts, hosts, st.text("ab.", max_size=6))
def test_a_common_name_means_that_patterns_meet(left: str, right: str, name: str) -> None:
    """If any name matches both patterns, they intersect; intersection is symmetric and a pattern meets itself."""
    a, b = host_pattern(left), host_pattern(right)
    if Matcher(a).matches(name) and Matcher(b).matches(name):
        assert intersects(a, b)
    assert intersects(a, b) is intersects(b, a)
    assert intersects(a, a)


@pytest.mark.parametrize(
    ("left", "right", "meet"),
    [
        ("*.example.com", "api.example.com", True),
        ("*.example.com", "a.b.example.com", False),
        ("**.example.com", "a.*.example.com", True),
        ("api-*.example.com", "*-eu.example.com", True),
        ("api-*.example.com", "www-*.example.com", False),
    ],
)
def test_patterns_meet_exactly(left: str, right: str, meet: bool) -> None:
    """Overlap is neither guessed nor approximated."""
    assert intersects(host_pattern(left), host_pattern(right)) is meet
