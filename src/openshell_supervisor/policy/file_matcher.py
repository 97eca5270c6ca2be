"""Matchers as upstream's file loader takes them: a glob, or a mapping with exactly one of `glob` and `any` (policy.md 1.7 C).

The gateway's form has no `glob` mapping. An empty pattern is refused although upstream takes it: it matches only an empty value,
and was meant as "any".
"""

from __future__ import annotations

from openshell_supervisor.policy.document import Listing, Node, Scalar, Table
from openshell_supervisor.policy.model import QueryMatcher
from openshell_supervisor.policy.reading import Reading, child

_HINT = 'write the value as a string in quotes, or `{any: ["a", "b*"]}`'


def read_file_matcher(reading: Reading, node: Node, path: str) -> QueryMatcher:
    """The matcher that a node says; faults are in `reading`, in upstream's words. Never raises."""
    fault = ""
    if not isinstance(node, Table):
        if _is_text(node):
            return QueryMatcher(glob=_glob(reading, node, path))
        fault = "expected string glob or matcher object"
    else:
        got = {name: value for name, _, value in reading.entries(node, path)}
        if not got or got.keys() - {"glob", "any"}:
            fault = "unknown matcher keys; only `glob` or `any` are supported"
        elif len(got) == 2:
            fault = "matcher cannot specify both `glob` and `any`"
        elif "any" in got:
            return QueryMatcher(any=_any(reading, got["any"], child(path, "any")))
        elif _is_text(got["glob"]):
            return QueryMatcher(glob=_glob(reading, got["glob"], child(path, "glob")))
        else:
            fault = ".glob: expected glob string"
    reading.problem("bad_matcher", path, node, fault, _HINT)
    return QueryMatcher()


def _any(reading: Reading, node: Node, path: str) -> tuple[str, ...]:
    if not isinstance(node, Listing):
        reading.problem("bad_matcher", path, node, ".any: expected array of glob strings", _HINT)
        return ()
    if not node.items:
        reading.problem("empty_matcher", path, node, ".any: list must not be empty", 'to match any value write "*"')
    for index, item in enumerate(node.items):
        if not _is_text(item):
            reading.problem("bad_matcher", f"{path}[{index}]", item, ".any: all values must be strings", _HINT)
    return tuple(_glob(reading, item, f"{path}[{index}]") for index, item in enumerate(node.items) if _is_text(item))


def _glob(reading: Reading, node: Node, path: str) -> str:
    if isinstance(node, Scalar) and not node.text:
        reading.problem("empty_matcher", path, node, "a pattern may not be empty", 'to match any value write "*"')
        return ""
    return reading.text(node, path)


def _is_text(node: Node) -> bool:
    return isinstance(node, Scalar) and isinstance(node.value(), str)
