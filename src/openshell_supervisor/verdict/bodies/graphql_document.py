"""GraphQL documents: which operations there are and which fields of the root each asks for. Nothing else of them is kept.

The whole grammar of executable documents is checked (GraphQL, October 2021, appendix B), since a document that servers may read
otherwise must not get through. A parser of our own: graphql-core, the well-kept library, bounds tokens and not depth, keeps a
tree, and takes four times as long (50 ms for 17,600 tokens). On 200,000 random documents both read the same, but for the empty
selection set that graphql-core takes and the grammar does not have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NoReturn

MAX_TOKENS = 20_000
"""Tokens of a document, upstream's limit (policy.md 2.9)."""
MAX_DEPTH = 128
"""Nesting of selection sets and values, upstream's limit; real queries stay below 20."""

OPERATION_TYPES = ("query", "mutation", "subscription")
# Legal for some servers and illegal or invisible for others: control characters, a byte order mark, half a surrogate pair.
_DISPUTED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ud800-\udfff]")
# A comment ends at a line terminator; one that ends at a lone CR is refused, since not everybody takes that for one.
_TOKEN = re.compile(
    r"""(?P<ignored>[\t\n\r ,]++|\#[^\n\r]*+(?=\r\n|\n|\Z))
      |(?P<name>[_A-Za-z][_0-9A-Za-z]*+)
      |(?P<punctuator>\.\.\.|[!$():=@\[\]{}])
      |(?P<number>-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?(?![_A-Za-z0-9.]))
      |(?P<block>\"\"\"(?:\\\"\"\"|(?!\"\"\")[\s\S])*+\"\"\")
      |(?P<string>\"\"(?!\")|\"(?:[^\"\\\n\r]|\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4}|\\u\{[0-9A-Fa-f]{1,6}\})++\")""",
    re.VERBOSE,
)


class DocumentError(ValueError):
    """The document is none, or not one that every server reads alike. The message says what was expected."""


@dataclass(slots=True)
class Selection:
    """What a selection set asks for at its own level: fields by their real names, and fragments."""

    fields: set[str] = field(default_factory=set)
    spreads: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a document: `kind` is one of `OPERATION_TYPES`, `name` may be empty."""

    kind: str
    name: str
    selection: Selection


class Document:
    """A document's operations and fragments. Raises `DocumentError`, also for two operations or fragments of one name."""

    def __init__(self, text: str) -> None:
        parser = _Parser(text)
        try:
            self.operations = parser.document()
        except RecursionError:
            raise DocumentError("nested too deeply") from None
        self._fragments = parser.fragments

    def root_fields(self, operation: Operation) -> tuple[str, ...]:
        """The sorted names of the fields that an operation asks of the root, also through fragments of whatever type.

        Raises `DocumentError` for a fragment that is not there.
        """
        fields = set(operation.selection.fields)
        waiting, seen = list(operation.selection.spreads), set(operation.selection.spreads)
        while waiting:
            fragment = self._fragments.get(name := waiting.pop())
            if fragment is None:
                raise DocumentError(f"fragment {name[:40]} is not defined")
            fields |= fragment.fields
            waiting.extend(fragment.spreads - seen)
            seen |= fragment.spreads
        return tuple(sorted(fields))


def _tokens(text: str) -> list[tuple[str, str]]:
    """Pairs of kind and text, ended by a pair with the kind "end". Only names and punctuators have a text."""
    if _DISPUTED.search(text):
        raise DocumentError("a control character, a byte order mark or half a character")
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise DocumentError(f"unexpected character at {at}")
        kind = str(match.lastgroup)
        if kind != "ignored":
            if len(tokens) >= MAX_TOKENS:
                raise DocumentError(f"more than {MAX_TOKENS} tokens")
            tokens.append((kind, match[0] if kind in ("name", "punctuator") else ""))
        at = match.end()
    tokens.append(("end", ""))
    return tokens


class _Parser:
    """One pass over the tokens. Methods are named after the grammar's rules."""

    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        self.at = 0
        self.depth = 0
        self.fragments: dict[str, Selection] = {}

    # -- tokens ----------------------------------------------------------------------------------------------------

    def sees(self, text: str) -> bool:
        """True when the next token is this punctuator or keyword."""
        return self.tokens[self.at][1] == text

    def skip(self, text: str) -> bool:
        """Step over the next token if it is this one."""
        if self.tokens[self.at][1] == text:
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        """Step over this token. Raises `DocumentError` where another one stands."""
        if not self.skip(text):
            self.wrong(f"'{text}'")

    def name(self) -> str:
        """The name that stands next."""
        kind, text = self.tokens[self.at]
        if kind != "name":
            self.wrong("a name")
        self.at += 1
        return text

    def wrong(self, expected: str) -> NoReturn:
        """Raise `DocumentError`; the document's own text is not repeated."""
        kind = self.tokens[self.at][0]
        raise DocumentError(f"expected {expected}, found {'the end' if kind == 'end' else f'a {kind}'}")

    def deeper(self) -> None:
        """Count one level of nesting."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise DocumentError(f"nested deeper than {MAX_DEPTH} levels")

    # -- definitions -----------------------------------------------------------------------------------------------

    def document(self) -> list[Operation]:
        """Every operation; fragments go into `fragments`."""
        found: list[Operation] = []
        if self.tokens[0][0] == "end":
            self.wrong("an operation")
        while self.tokens[self.at][0] != "end":
            if self.sees("fragment"):
                self.fragment()
            elif self.sees("{"):
                found.append(Operation("query", "", self.selection_set()))
            else:
                found.append(self.operation())
        names = [operation.name for operation in found if operation.name]
        if len(set(names)) != len(names):
            raise DocumentError("two operations have one name")
        return found

    def operation(self) -> Operation:
        if not any(map(self.sees, OPERATION_TYPES)):
            self.wrong("an operation or a fragment")
        kind = self.name()
        name = self.name() if self.tokens[self.at][0] == "name" else ""
        self.variable_definitions()
        self.directives()
        return Operation(kind, name, self.selection_set())

    def fragment(self) -> None:
        self.expect("fragment")
        if self.sees("on"):
            self.wrong("the name of a fragment")
        name = self.name()
        if name in self.fragments:
            raise DocumentError("two fragments have one name")
        self.expect("on")
        self.name()
        self.directives()
        self.fragments[name] = self.selection_set()

    def variable_definitions(self) -> None:
        if not self.skip("("):
            return
        while True:
            self.expect("$")
            self.name()
            self.expect(":")
            self.type()
            if self.skip("="):
                self.value(const=True)
            self.directives(const=True)
            if self.skip(")"):
                return

    def type(self) -> None:
        opened = 0
        while self.skip("["):
            opened += 1
        self.name()
        self.skip("!")
        for _ in range(opened):
            self.expect("]")
            self.skip("!")

    # -- selections ------------------------------------------------------------------------------------------------

    def selection_set(self) -> Selection:
        """A selection set with at least one selection; inline fragments are part of it."""
        selection = Selection()
        self.expect("{")
        self.deeper()
        while True:
            if self.skip("..."):
                self.spread(selection)
            else:
                self.field(selection)
            if self.skip("}"):
                self.depth -= 1
                return selection

    def field(self, selection: Selection) -> None:
        name = self.name()
        if self.skip(":"):  # the first was an alias
            name = self.name()
        selection.fields.add(name)
        self.arguments()
        self.directives()
        if self.sees("{"):
            self.selection_set()

    def spread(self, selection: Selection) -> None:
        if self.tokens[self.at][0] == "name" and not self.sees("on"):
            selection.spreads.add(self.name())
            self.directives()
            return
        if self.skip("on"):
            self.name()
        self.directives()
        inner = self.selection_set()
        selection.fields |= inner.fields
        selection.spreads |= inner.spreads

    def directives(self, const: bool = False) -> None:
        while self.skip("@"):
            self.name()
            self.arguments(const)

    def arguments(self, const: bool = False) -> None:
        if self.skip("("):
            self.pairs(")", const)

    # -- values ----------------------------------------------------------------------------------------------------

    def pairs(self, end: str, const: bool) -> None:
        """`name: value` at least once, up to `end`; without variables where `const`."""
        while True:
            self.name()
            self.expect(":")
            self.value(const)
            if self.skip(end):
                return

    def value(self, const: bool) -> None:
        if self.tokens[self.at][0] in ("name", "number", "string", "block"):
            self.at += 1
        elif not const and self.skip("$"):
            self.name()
        elif self.skip("["):
            self.deeper()
            while not self.skip("]"):
                self.value(const)
            self.depth -= 1
        elif self.skip("{"):
            self.deeper()
            if not self.skip("}"):
                self.pairs("}", const)
            self.depth -= 1
        else:
            self.wrong("a value")
