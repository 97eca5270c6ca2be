"""YAML text to a tree with positions, within bounds.

Built from the parser's event stream and not from `yaml.load` or `compose`: no constructor ever runs, the depth and
the number of nodes are bounded before anything recurses, and every value keeps its line and column. It knows YAML and
nothing of policies. Scalars are typed as YAML 1.2 does (as upstream's reader): `yes`, `on` and `0443` are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from openshell_supervisor.errors import PolicyError, Problem

MAX_DOCUMENT_BYTES = 1024 * 1024
"""Upstream stores at most 262,144 bytes of protobuf; YAML says the same in up to four times as many."""
MAX_DEPTH = 24
"""The deepest legal document (`params` nested under a rule) has 12 levels; a middleware's `config` may go deeper."""
MAX_NODES = 200_000
"""Values counted with aliases expanded: a megabyte of YAML holds fewer, a billion-laughs document holds more."""

_NULLS = frozenset(("", "~", "null", "Null", "NULL"))
_TRUE = frozenset(("true", "True", "TRUE"))
_FALSE = frozenset(("false", "False", "FALSE"))
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,18}|0x[0-9a-fA-F]{1,16}|0o[0-7]{1,21})\Z")
_BIG_INTEGER = re.compile(r"[-+]?[0-9]{20,}\Z")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z"
)
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(slots=True)
class Scalar:
    """A single value as written. `plain` is True without quotes; only then has it a type other than text."""

    text: str
    plain: bool
    line: int
    column: int
    size: int = 1
    height: int = 0

    def value(self) -> str | int | float | bool | None:
        """The value with its YAML 1.2 core type; an integer too long to matter stays an int that no range accepts."""
        if not self.plain:
            return self.text
        if self.text in _NULLS:
            return None
        if self.text in _TRUE or self.text in _FALSE:
            return self.text in _TRUE
        if _INTEGER.match(self.text):
            return int(self.text, 0)
        if _BIG_INTEGER.match(self.text):
            return -(2**64) if self.text.startswith("-") else 2**64
        if _FLOAT.match(self.text):
            return (
                float(self.text.replace(".inf", "inf").replace(".nan", "nan")) if "." in self.text else float(self.text)
            )
        return self.text


@dataclass(slots=True)
class Listing:
    """A YAML sequence."""

    line: int
    column: int
    items: list[Node] = field(default_factory=list)
    size: int = 1
    height: int = 1


@dataclass(slots=True)
class Table:
    """A YAML mapping with scalar keys, in the order written; keys may repeat (the reader refuses that)."""

    line: int
    column: int
    pairs: list[tuple[Scalar, Node]] = field(default_factory=list)
    size: int = 1
    height: int = 1


type Node = Scalar | Listing | Table


def compose(text: str, source: str = "") -> Node:
    """The one document of `text`. Raises `PolicyError` with a single problem when it is not usable YAML."""
    try:
        encoded = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        refuse(
            source,
            "yaml_encoding",
            f"the document is not valid UTF-8 (character {error.start})",
            hint="save it as UTF-8",
        )
    if encoded > MAX_DOCUMENT_BYTES:
        refuse(
            source,
            "policy_too_large",
            f"the document has {encoded} bytes; at most {MAX_DOCUMENT_BYTES} are read",
            hint="a policy of this size is not a policy; is this the right file?",
        )
    try:
        return _Composer(source).document(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        refuse(source, "yaml_syntax", what or "not valid YAML", mark, hint=_syntax_hint(what, _character(text, mark)))
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())[:160]
        refuse(source, "yaml_syntax", f"not readable as YAML text: {what}", hint="is this a text file?")


def refuse(source: str, code: str, message: str, mark: Any = None, *, hint: str = "") -> NoReturn:
    """Raise `PolicyError` with this one problem; `mark` is a YAML mark (counted from 0) or None."""
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (0, 0)
    raise PolicyError((Problem(code, message, "", line, column, hint),), source=source)


def _character(text: str, mark: Any) -> str:
    """The character that a mark points at, or an empty string."""
    lines = text.splitlines()
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    return line[mark.column : mark.column + 1] if line else ""


def _syntax_hint(what: str, character: str) -> str:
    if character == "\t":
        return "indent with spaces, not with tabs"
    if "alias" in what:
        return 'a value that begins with * is an alias in YAML; put it in quotes, as in host: "*.example.com"'
    if "mapping values are not allowed" in what:
        return "a value with `: ` in it needs quotes, or the indentation of this line is off"
    if "cannot start any token" in what:
        return "values that begin with @, ` or % need quotes"
    if "block" in what and "did not find expected" in what:
        return "the indentation of this line fits no line above it"
    if "flow" in what:
        return "a bracket or brace is not closed, or a comma is missing"
    if "quoted scalar" in what:
        return "a quotation mark is not closed"
    return "quote values that begin with * & ! @ % { [ or contain `: `"


class _Composer:
    """Turns events into nodes with an explicit stack: the depth of a document never becomes the depth of our calls."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.nodes = 0
        self.stack: list[Listing | Table] = []
        self.keys: list[Scalar | None] = []
        self.anchors: dict[str, Node] = {}
        self.open_anchors: list[str | None] = []
        self.root: Node | None = None

    def document(self, events: Iterator[Any]) -> Node:
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.refuse(
                        "yaml_documents", "the file has more than one YAML document", event, "keep one policy per file"
                    )
            elif isinstance(event, yaml.NodeEvent):
                self.node(event)
            elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
                self.close()
        if self.root is None:
            refuse(
                self.source,
                "policy_empty",
                "the policy is empty: missing field `version`",
                hint="the smallest policy is `version: 1`; it allows no network at all",
            )
        return self.root

    def refuse(self, code: str, message: str, event: Any, hint: str) -> NoReturn:
        refuse(self.source, code, message, event.start_mark, hint=hint)

    def node(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent):
            self.add(self.resolve(event), event)
            return
        if event.tag is not None:
            self.refuse(
                "yaml_tag", f"YAML tags such as {event.tag!r} are refused", event, "quote the value if it begins with !"
            )
        line, column = event.start_mark.line + 1, event.start_mark.column + 1
        self.count(1, event)
        if isinstance(event, yaml.ScalarEvent):
            scalar = Scalar(event.value, bool(event.implicit[0]), line, column)
            if event.anchor:
                self.anchors[event.anchor] = scalar
            self.add(scalar, event)
            return
        container: Listing | Table = (
            Listing(line, column) if isinstance(event, yaml.SequenceStartEvent) else Table(line, column)
        )
        if len(self.stack) >= MAX_DEPTH:
            self.too_deep(event)
        self.add(container, event)
        self.stack.append(container)
        self.keys.append(None)
        self.open_anchors.append(event.anchor)

    def resolve(self, event: Any) -> Node:
        found = self.anchors.get(event.anchor)
        if found is None:
            self.refuse(
                "yaml_alias",
                f"the alias *{event.anchor} refers to nothing",
                event,
                'a value that begins with * is an alias in YAML; put it in quotes, as in host: "*.example.com"',
            )
        self.count(found.size, event)
        if len(self.stack) + found.height > MAX_DEPTH:
            self.too_deep(event)
        return found

    def too_deep(self, event: Any) -> NoReturn:
        self.refuse(
            "yaml_depth", f"the document is nested deeper than {MAX_DEPTH} levels", event, "no policy key is that deep"
        )

    def count(self, size: int, event: Any) -> None:
        self.nodes += size
        if self.nodes > MAX_NODES:
            self.refuse(
                "yaml_nodes", f"the document has more than {MAX_NODES} values", event, "aliases count each time"
            )

    def add(self, node: Node, event: Any) -> None:
        if not self.stack:
            self.root = node
            return
        parent = self.stack[-1]
        if isinstance(parent, Listing):
            parent.items.append(node)
            return
        key = self.keys[-1]
        if key is None:
            if not isinstance(node, Scalar):
                self.refuse(
                    "yaml_key", "a key of a mapping must be a single value", event, "quote keys that begin with { or ["
                )
            self.keys[-1] = node
            return
        parent.pairs.append((key, node))
        self.keys[-1] = None

    def close(self) -> None:
        done = self.stack.pop()
        self.keys.pop()
        children = done.items if isinstance(done, Listing) else [node for _, node in done.pairs]
        done.size = 1 + sum(child.size for child in children)
        done.height = 1 + max((child.height for child in children), default=0)
        anchor = self.open_anchors.pop()
        if anchor:
            self.anchors[anchor] = done
