"""Typed reading of a document tree: every fault is noted with its place, and reading goes on.

A `Reading` collects problems and remembers where each dotted path was written, so that later checks (which see only the
model) can be given a line and a column. It knows the shapes of values, not what a policy is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from openshell_supervisor.errors import Problem
from openshell_supervisor.policy.document import Listing, Node, Scalar, Table

MAX_SHOWN = 80
"""Characters of a value repeated in a message: enough to find it, not enough to drown the message."""
MAX_PROBLEMS = 200
"""Nobody reads more; a document of garbage would otherwise produce one problem per line."""

MAX_LISTED = 12
"""Known keys named in a message; an endpoint has 24, the common ones first."""

Place = tuple[int, int]

_UNCLEAN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def shown(text: str) -> str:
    """`text` fit for a message: control characters escaped (a policy may not drive a terminal), long values cut."""
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: MAX_SHOWN + 1])
    return clean if len(text) <= MAX_SHOWN else f"{clean[: MAX_SHOWN - 3]}..."


def child(path: str, key: str) -> str:
    """The dotted path of a key below `path`; a key with other characters than a name has is put in brackets."""
    if key and len(key) <= MAX_SHOWN and all(c.isalnum() or c in "_-/" for c in key):
        return f"{path}.{key}" if path else key
    return f"{path}[{shown(key)!r}]"


def nearest(word: str, known: Collection[str]) -> str:
    """The known word that was probably meant, or an empty string."""
    folded = {name.lower().replace("-", "_"): name for name in known}
    close = difflib.get_close_matches(word[:MAX_SHOWN].lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else ""


def describe(node: Node) -> str:
    """What a node is, in the words of a person: "an integer `5`", "a list"."""
    if isinstance(node, Listing):
        return "a list"
    if isinstance(node, Table):
        return "a mapping"
    value = node.value()
    if value is None:
        return "nothing (null)"
    kind = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}[type(value)]
    return f"{kind} `{shown(node.text)}`"


class Reading:
    """Collects problems and places while a document is read."""

    def __init__(self, *, files: bool = False) -> None:
        """With `files` the document is read as upstream's file loader does it (policy.md 5.1), else as a gateway does."""
        self.files = files
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.places: dict[str, Place] = {}

    def problem(self, code: str, path: str, node: Node, message: str, hint: str = "") -> None:
        """Note a fault at a node."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(code, message, path, node.line, node.column, hint))

    def warn(self, code: str, path: str, node: Node, message: str, hint: str = "") -> None:
        """Note something that is legal and probably not meant."""
        if len(self.warnings) < MAX_PROBLEMS:
            self.warnings.append(Problem(code, message, path, node.line, node.column, hint))

    def wrong_type(self, path: str, node: Node, expected: str, hint: str = "") -> None:
        """Note that a value has the wrong shape, in upstream's words."""
        self.problem("wrong_type", path, node, f"invalid type: {describe(node)}, expected {expected}", hint)

    def mark(self, path: str, node: Node) -> None:
        """Remember where `path` was written."""
        self.places[path] = (node.line, node.column)

    def locate(self, problem: Problem) -> Problem:
        """The problem with the line and column of its path, or of the nearest enclosing one that was written."""
        path = problem.path
        while problem.line == 0 and path:
            place = self.places.get(path)
            if place:
                return replace(problem, line=place[0], column=place[1])
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return problem

    def entries(self, node: Node, path: str) -> list[tuple[str, Scalar, Node]]:
        """The pairs of a mapping with text keys. Repeated and merge keys are problems and left out."""
        if not isinstance(node, Table):
            self.wrong_type(path, node, "a mapping")
            return []
        seen: dict[str, Scalar] = {}
        result: list[tuple[str, Scalar, Node]] = []
        for key, value in node.pairs:
            if self._usable_key(key, path, seen):
                seen[key.text] = key
                self.mark(child(path, key.text), key)
                result.append((key.text, key, value))
        return result

    def _usable_key(self, key: Scalar, path: str, seen: dict[str, Scalar]) -> bool:
        where = child(path, key.text)
        if key.plain and key.text == "<<":
            self.problem("merge_key", path, key, "YAML merge keys (`<<`) are not supported", "write the keys out")
            return False
        if not clean(key.text) or not key.text:
            self.problem(
                "bad_key", path, key, f"a key may not be empty or hold control characters: '{shown(key.text)}'"
            )
            return False
        if key.text in seen:
            first = seen[key.text]
            self.problem(
                "duplicate_key",
                where,
                key,
                f"duplicate key `{shown(key.text)}`, first written in line {first.line}",
                "a later key would silently replace the earlier one; merge them or rename one",
            )
            return False
        return True

    def fields(
        self, node: Node, path: str, known: Iterable[str], moved: dict[str, str] | None = None
    ) -> dict[str, Node]:
        """The pairs of a mapping that may only have the `known` keys; `moved` gives hints for keys people write here."""
        names = tuple(known)
        result: dict[str, Node] = {}
        for key, written, value in self.entries(node, path):
            if key in names:
                result[key] = value
                continue
            guess = nearest(key, names)
            meant = (moved or {}).get(key) or (f"did you mean `{guess}`?" if guess else "")
            message = f"unknown field `{shown(key)}`, expected {_one_of(names)}"
            self.problem("unknown_field", child(path, key), written, message, meant)
        return result

    def text(self, node: Node, path: str, hint: str = "") -> str:
        """A string; a number, boolean or null written without quotes is a problem, as are control characters."""
        value = node.value() if isinstance(node, Scalar) else None
        if isinstance(node, Scalar) and isinstance(value, str):
            if clean(value):
                return value
            self.problem(
                "control_character", path, node, f"the value holds a control character: '{shown(value)}'", "remove it"
            )
            return ""
        quote = f'put it in quotes: "{shown(node.text)}"' if isinstance(node, Scalar) and value is not None else ""
        self.wrong_type(path, node, "a string", hint or quote)
        return ""

    def boolean(self, node: Node, path: str) -> bool:
        """`true` or `false`; the words that older YAML took for booleans get a hint."""
        value = node.value() if isinstance(node, Scalar) else None
        if isinstance(value, bool):
            return value
        word = str(value).lower()
        hint = {"yes": "write `true`", "on": "write `true`", "no": "write `false`", "off": "write `false`"}.get(
            word, ""
        )
        self.wrong_type(path, node, "a boolean", hint or "write `true` or `false`, without quotes")
        return False

    def integer(self, node: Node, path: str, low: int, high: int, kind: str, instead: str = "") -> int:
        """An integer within bounds; `kind` is the type's name in the message ("u16")."""
        value = node.value() if isinstance(node, Scalar) else None
        if isinstance(value, int) and not isinstance(value, bool):
            if low <= value <= high:
                return value
            written = shown(node.text) if isinstance(node, Scalar) else ""
            self.problem(
                "out_of_range",
                path,
                node,
                f"invalid value: integer `{written}`, expected {kind}",
                f"use {low} to {high}",
            )
            return 0
        hint = (
            "write the number without quotes"
            if isinstance(value, str) and value.isdigit()
            else f"write a number, {low} to {high}"
        )
        self.wrong_type(path, node, kind, instead or hint)
        return 0

    def items[T](self, node: Node, path: str, read: Callable[[Node, str], T], hint: str = "") -> tuple[T, ...]:
        """A list, each item read by `read(node, path)`."""
        if not isinstance(node, Listing):
            empty = isinstance(node, Scalar) and node.value() is None
            usual = "write `[]` or remove the key" if empty else "write each entry on its own line, beginning with `- `"
            self.wrong_type(path, node, "a list", usual if empty else hint or usual)
            return ()
        result = []
        for number, item in enumerate(node.items):
            where = f"{path}[{number}]"
            self.mark(where, item)
            result.append(read(item, where))
        return tuple(result)

    def texts(self, node: Node, path: str) -> tuple[str, ...]:
        """A list of strings."""
        return self.items(node, path, self.text)


def _one_of(names: tuple[str, ...]) -> str:
    """The known keys for a message, cut where the list would bury the message."""
    listed = ", ".join(f"`{name}`" for name in names[:MAX_LISTED])
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{'one of ' if len(names) > 1 else ''}{listed}{more}"


def clean(text: str) -> bool:
    """True when `text` has no control character and no lone surrogate; such text has no meaning in any policy field."""
    return _UNCLEAN.search(text) is None
