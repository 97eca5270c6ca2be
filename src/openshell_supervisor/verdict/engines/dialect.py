"""A custom module, brought from the dialect of upstream's evaluator (regorus) to one that both of our engines take.

Upstream's own module compiles in neither as it is. OPA refuses `some x` before `x := …` ("declared above"), which regorus
wants, and takes `object.get(data, …)` for a recursion, since the rules are in `data` as well. rego-cpp does not parse `some
k, v in …` inside a comprehension, and its `sprintf` keeps the quotes of what `concat` made, and a call is not tried with
each `list[i]`. Each has a form that means the same (every section of the data document is always there, so no default is
needed). Rules that no question reaches are left out, since they may use what an engine lacks. Lines stay where they are, so
that a fault's place is the author's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

_DECLARED = re.compile(r"^\s*some\s+(\w+)\s*$")
_ASSIGNED = re.compile(r"^\s*(\w+)\s*:=")
_PAIR = re.compile(r"^(\s*)some\s+(\w+)\s*,\s*(\w+)\s+in\s+([\w.\[\]\"]+)\s*$")
_WHOLE_DATA = re.compile(r'object\.get\(\s*data\s*,\s*"(\w+)"\s*,[^()]*\)')
_CONCAT = re.compile(r"(?<![\w.])concat\([^()]*\)")
_INDEXED = re.compile(r"[A-Za-z_][\w.]*\[[A-Za-z_]\w*\]")
_PLAIN_STATEMENT = re.compile(
    r"^(?!\s*(?:not|some|every|else|default)\b)(\s+)(?!.*(?:\bwith\b|[{|`#]|\[[^\]]*:=))(.*\(.*)$"
)
_HEAD = re.compile(r"^(?:default\s+)?([A-Za-z_]\w*)")
_WORD = re.compile(r"[A-Za-z_]\w*")
_STRING = re.compile(r'"(?:\\.|[^"\\])*"|`[^`]*`|#.*')


def rule_names(module: str) -> set[str]:
    """The names of the rules and functions that a module defines (their heads begin a line)."""
    return {name for name, _ in _blocks(module.splitlines()) if name}


def adapted(module: str, asked: Iterable[str]) -> str:
    """The module with only what the rules `asked` can reach, in the form that both engines take."""
    lines = module.splitlines()
    blocks = _blocks(lines)
    uses: dict[str, set[str]] = {}
    for name, span in blocks:
        text = "\n".join(_STRING.sub("", line) for line in lines[span.start : span.stop])
        uses.setdefault(name, set()).update(_WORD.findall(text))
    reached, open_names = set(), [name for name in asked if name in uses]
    while open_names:
        name = open_names.pop()
        if name not in reached:
            reached.add(name)
            open_names.extend(uses[name] & uses.keys())
    for name, span in blocks:
        if name and name not in reached:
            for at in span:
                lines[at] = ""
    return "\n".join(_rewritten(lines)) + "\n"


def _blocks(lines: list[str]) -> list[tuple[str, range]]:
    """Top-level statements: a name ("" for package and imports) and their lines, up to the next one."""
    starts = [at for at, line in enumerate(lines) if _HEAD.match(line)]
    found = []
    for start, end in itertools.pairwise([*starts, len(lines)]):
        match = _HEAD.match(lines[start])
        name = match.group(1) if match else ""
        found.append(("" if name in ("package", "import") else name, range(start, end)))
    return found


def _rewritten(lines: list[str]) -> list[str]:
    out = [_CONCAT.sub(r"substring(\g<0>, 0, -1)", _WHOLE_DATA.sub(r"data.\1", line)) for line in lines]
    for at, line in enumerate(lines):
        pair = _PAIR.match(line)
        if pair:
            indent, key, value, collection = pair.groups()
            out[at] = f"{indent}some {key}; {value} := {collection}[{key}]"
            continue
        declared = _DECLARED.match(line)
        following = _ASSIGNED.match(lines[at + 1]) if declared and at + 1 < len(lines) else None
        if declared and following and declared.group(1) == following.group(1):
            out[at] = ""
            continue
        out[at] = _lifted(out[at], at)
    return out


def _lifted(line: str, at: int) -> str:
    """`f(list[i])` as `x := list[i]; f(x)`: rego-cpp does not try every `i` inside of a call's arguments."""
    statement = _PLAIN_STATEMENT.match(line)
    if statement is None:
        return line
    indent, text = statement.groups()
    head, bracket, rest = text.partition("(")
    found = list(dict.fromkeys(_INDEXED.findall(_STRING.sub("", rest))))
    names = {reference: f"lifted_{at}_{number}" for number, reference in enumerate(found)}
    for reference, name in names.items():
        rest = rest.replace(reference, name)
    before = "".join(f"{name} := {reference}; " for reference, name in names.items())
    return f"{indent}{before}{head}{bracket}{rest}"


def unsure(module: str) -> list[int]:
    """Lines (from 1) of an adapted module in which a call's arguments still hold `list[i]`: rego-cpp may answer them wrongly."""
    return [
        number
        for number, line in enumerate(module.splitlines(), 1)
        if _INDEXED.search(_STRING.sub("", line).partition("(")[2]) and not line.lstrip().startswith("not ")
    ]
