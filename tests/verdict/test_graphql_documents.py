"""GraphQL documents: what is read of them, what is refused, and what reading costs."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openshell_supervisor.verdict.bodies.graphql import parse_graphql
from openshell_supervisor.verdict.bodies.graphql_document import MAX_DEPTH, MAX_TOKENS, Document, DocumentError


def roots(text: str) -> tuple[str, ...]:
    """The root fields of the one operation of a document."""
    found = Document(text)
    assert len(found.operations) == 1
    return found.root_fields(found.operations[0])


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("{a}", "a"),
        ("query Q($x: [[Int!]!]! = [1, -2.5e3] @d, $y: T) @d(a: $x) { a }", "a"),
        ('subscription { alias: real(x: {k: "}", l: [ENUM, null, $v]}) @skip(if: true) { b } }', "real"),
        ("{ ... { a } ... on Q @i { b ...F } } fragment F on Q { c ...G } fragment G on Q { d ...F }", "a b c d"),
        ('{ a(s: """ } mutation { x } \\""" """) b # } { c\n d }', "a b d"),
        ('{ a(s: "\\" } c { \\u{1F600}") }', "a"),
        ("{ query mutation fragment on: true }", "fragment mutation query true"),
        ("{a(x:[]y:{}z:-0)}", "a"),
        ("{ __typename, viewer,, }", "__typename viewer"),
    ],
)
def test_what_a_document_asks_of_the_root(text: str, fields: str) -> None:
    """Real names, not aliases; through fragments of any type and any directive; text is only text."""
    assert roots(text) == tuple(fields.split())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}",
        "{a}}",
        "{a",
        "query {",
        "{a(b:1}",
        "{a()}",
        "{a(b:)}",
        "{a(b:01)}",
        "{a(b:1a)}",
        "{a(b:.5)}",
        '{a(b:"\n")}',
        '{a(b:"\\x")}',
        '{a(b:""")}',
        '{a(b:"""")}',
        "{a:b:c}",
        "{...}",
        "{...on Q}",
        "{a @}",
        "{a}; {b}",
        "{a} type T {b: C}",
        '"about" query Q {a}',
        "query ($x) {a}",
        "query () {a}",
        "query ($x: T = [$y]) {a}",
        "query Q Q {a}",
        "fragment on on Q {a}",
        "fragment F {a}",
        "{a|b}",
        "{a&b}",
        "extend type Q {a: B}",
        "{a}\ufeff",
        "\ufeff{a}",
        "{a}\x00",
        "{a}\x7f",
        "{\ud83d a}",
        "{ä}",
        "# x\r{a}",
        "{a(b:&)}",
        "{..a}",
        "{ . . . F}",
        "{a}{b}fragment F on Q{a}fragment F on Q{b}",
        "query A{a}query A{b}",
        "{" * 200,
        "{a(b:" + "[" * 200,
    ],
)
def test_what_is_no_document(text: str) -> None:
    """What the grammar does not have, or what only some readers take, is refused."""
    assert roots("{a}") == ("a",)
    with pytest.raises(DocumentError):
        Document(text)


def test_a_fragment_that_is_missing_is_no_way_out() -> None:
    """What an operation asks is known whole or it is refused; a cycle ends."""
    assert roots("{...F} fragment F on Q {...F a}") == ("a",)
    with pytest.raises(DocumentError, match="not defined"):
        roots("{...F a}")


def test_documents_have_bounds() -> None:
    """Nesting and tokens up to the limits, and not one more."""
    assert roots("{a" * MAX_DEPTH + "}" * MAX_DEPTH) == ("a",)
    with pytest.raises(DocumentError, match="deeper"):
        Document("{a" * (MAX_DEPTH + 1) + "}" * (MAX_DEPTH + 1))
    assert roots("{" + "a " * (MAX_TOKENS - 2) + "}") == ("a",)
    with pytest.raises(DocumentError, match="tokens"):
        Document("{" + "a " * (MAX_TOKENS - 1) + "}")


names = st.sampled_from(("a", "viewer", "on", "query", "F", "_x1"))
values = st.recursive(
    st.sampled_from(("1", "-1.5e+3", '"}"', '"""{"""', "$v", "true", "ENUM")),
    lambda inner: st.lists(inner, max_size=2).map(lambda items: f"[{' '.join(items)}]") | inner.map("{{k:{}}}".format),
    max_leaves=4,
)
selections = st.recursive(
    names.map(lambda name: (name, {name})),
    lambda inner: (
        st.tuples(names, values, st.lists(inner, min_size=1, max_size=3)).map(
            lambda got: (f"x:{got[0]}(k:{got[1]})@d{{{' '.join(text for text, _ in got[2])}}}", {got[0]})
        )
        | st.lists(inner, min_size=1, max_size=3).map(
            lambda got: (f"...on Q{{{','.join(text for text, _ in got)}}}", set().union(*(found for _, found in got)))
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(selections, min_size=1, max_size=4), st.sampled_from(("", "query", "mutation M", "query($v:[T!]=1)")))
def test_generated_documents_are_read_as_they_were_made(made: list[tuple[str, set[str]]], head: str) -> None:
    """Whatever the grammar makes is read, with exactly the fields that were put at the root."""
    text = f"{head}{{{chr(10).join(part for part, _ in made)}}}"
    assert set(roots(text)) == set().union(*(found for _, found in made))


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet='{}()[]:$!@"\\#. \n\ra1-,on', max_size=60) | st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    """The parser is total."""
    found = parse_graphql("POST", (), (), json.dumps({"query": text}).encode())
    assert found.error or found.operations


@pytest.mark.parametrize(
    "text",
    [
        "{" * 60_000,
        "{" + "a " * 30_000 + "}",
        "{a(b:" + "[" * 60_000,
        '{a(b:"' + "\\" * 60_000,
        '"' * 60_000,
        "#" * 60_000,
        '"""' * 20_000,
        "{" + "...F " * 9000 + "}",
        "".join(f"fragment F{n} on Q{{...F{n + 1} ...F0}}" for n in range(1200)) + "{...F0}",
        "-" * 60_000,
        "{" + "...{a " * 120 + "}" * 120 + "}",
        "query" + "@d" * 9000 + "{a}",
    ],
    ids=range(12),
)
def test_hostile_documents_cost_little(text: str) -> None:
    """A document of 64 KiB made to be slow is read or refused in 50 ms of processor time; 20,000 tokens take about 20."""
    body = json.dumps({"query": text}).encode()
    best = 1.0
    for _ in range(5):
        start = time.thread_time()
        parse_graphql("POST", (), (), body, 1 << 20)
        best = min(best, time.thread_time() - start)
    assert best < 0.05
