"""Upstream's two glob dialects.

The first (`glob_match`) decides: hosts, rule paths, query values, binaries. It is what `glob.match` means upstream, where Rust's
globset is given other delimiters by a rewriting trick (policy.md 2.6). rego-cpp's own `glob.match` differs (`**` inside a
segment crosses a slash, `\\*` is no escape), so patterns are compiled here and the Rego rules look the answers up. The second
(`path_selected`) picks the endpoint whose parser and enforcement count; its `*` does cross slashes.

Matching is done on the bytes of the UTF-8 text, as upstream does: `?` is one byte. Nothing here knows what is matched.
"""

from __future__ import annotations

from functools import lru_cache

from openshell_supervisor.policy.automaton import EVERY, Choice, Matcher, Pattern, Star, TooLarge, one

HOST: tuple[str, ...] = (".",)
PATH: tuple[str, ...] = ("/",)
VALUE: tuple[str, ...] = (".",)
"""Delimiter sets. The rules give values an empty list, which upstream reads as "."."""

MAX_PATTERN = 8192
"""Characters of a pattern; a path has at most 4096. Bounds what is compiled."""
MAX_BRACES = 16
"""Nesting of `{`; people nest one or two, and the compiler recurses once per level."""
CACHED_PATTERNS = 16_384
"""Compiled patterns kept: those of a few generations of a 1000-rule policy."""

_SLASH = one("/")
_ANY = EVERY & ~_SLASH
_STAR, _EVERYTHING = Star(_ANY), Star(EVERY)
_PREFIX = Choice(((), (_SLASH,), (_EVERYTHING, _SLASH)))
_MIDDLE = Choice(((_SLASH,), (_SLASH, _EVERYTHING, _SLASH)))
_Item = int | Star | Choice


class GlobError(ValueError):
    """The pattern is not a glob, or the value cannot be matched; upstream fails the evaluation that reaches it."""


def glob_match(pattern: str, delimiters: tuple[str, ...], value: str) -> bool:
    """True when the whole of `value` matches. Raises `GlobError` for a bad pattern or a NUL in the value."""
    if "\0" in value:
        raise GlobError("the value holds a NUL")
    return compiled(pattern, delimiters).matches(_folded(value, delimiters))


def glob_problem(pattern: str, delimiters: tuple[str, ...]) -> str:
    """Why a pattern is not a glob, or an empty string."""
    try:
        compiled(pattern, delimiters)
    except GlobError as error:
        return str(error)
    return ""


@lru_cache(maxsize=CACHED_PATTERNS)
def compiled(pattern: str, delimiters: tuple[str, ...]) -> Matcher:
    """`pattern` ready to match rewritten values. Raises `GlobError`."""
    if "\0" in pattern:
        raise GlobError("the pattern holds a NUL")
    if len(pattern) > MAX_PATTERN:
        raise GlobError(f"the pattern is longer than {MAX_PATTERN} characters")
    try:
        return Matcher(_Translator(_folded(pattern, delimiters)).pattern())
    except TooLarge as error:
        raise GlobError(str(error)) from None


def _folded(text: str, delimiters: tuple[str, ...]) -> str:
    """The rewriting trick: unless it is a delimiter `/` becomes NUL, and each other delimiter d becomes `/d/`.

    The result has one character per UTF-8 byte.
    """
    if "/" not in delimiters:
        text = text.replace("/", "\0")
    for delimiter in delimiters:
        if delimiter != "/":
            text = text.replace(delimiter, f"/{delimiter}/")
    return _bytes(text)


def _bytes(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("latin-1")


class _Translator:
    """Glob text to a pattern. `branches` holds the open alternatives, the innermost last."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.branches: list[list[_Item]] = [[]]
        self.braces: list[int] = []

    def pattern(self) -> Pattern:
        while self.at < len(self.text):
            char = self.text[self.at]
            self.at += 1
            if char == "*":
                self.star()
            elif char == "[":
                self.push(_character_class(self))
            else:
                self.other(char)
        if self.braces:
            raise GlobError("unclosed '{'")
        items = self.branches[0]
        return (_EVERYTHING,) if items == [_PREFIX] else tuple(items)

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def push(self, item: _Item) -> None:
        branch = self.branches[-1]
        if item != _STAR or not branch or branch[-1] != _STAR:  # a run of stars says no more than one
            branch.append(item)

    def other(self, char: str) -> None:
        if char == "?":
            self.push(_ANY)
        elif char == "{":
            if len(self.braces) >= MAX_BRACES:
                raise GlobError(f"braces are nested deeper than {MAX_BRACES}")
            self.braces.append(len(self.branches))
            self.branches.append([])
        elif char == "}":
            self.close_brace()
        elif char == "," and self.braces:
            self.branches.append([])
        elif char == "\\":
            if not self.peek():
                raise GlobError("trailing backslash")
            self.push(one(self.peek()))
            self.at += 1
        else:
            self.push(one(char))

    def close_brace(self) -> None:
        """Empty alternatives count for nothing: `{,a}` is `{a}`."""
        if not self.braces:
            raise GlobError("unopened '}'")
        start = self.braces.pop()
        alternatives = tuple(tuple(branch) for branch in self.branches[start:] if branch)
        del self.branches[start:]
        if alternatives:
            self.push(Choice(alternatives))

    def star(self) -> None:
        """One star stays within a segment. Two are special only as a whole component, else they are two single ones."""
        before = self.text[self.at - 2] if self.at >= 2 else ""
        if self.peek() != "*":
            self.push(_STAR)
            return
        self.at += 1
        after, nested, branch = self.peek(), len(self.branches) > 1, self.branches[-1]
        if not branch:
            special = after in ("", "/")
            branch.append(_PREFIX if special else _STAR)
            self.at += len(after) if special else 0
            return
        at_start = before == "/" or (nested and before in (",", "{"))
        at_end = after == "" or (nested and after in (",", "}"))
        if not at_start or not (at_end or after == "/"):
            self.push(_STAR)
            return
        if not at_end:
            self.at += 1
        if branch[-1] in (_PREFIX, _EVERYTHING):
            return  # merges with the `**` component before it
        branch.pop()  # the slash before, which the component takes in
        branch.extend((_SLASH, _EVERYTHING) if at_end else (_MIDDLE,))


def _character_class(reader: _Translator) -> int:
    """`[a-z]`, negated by `!` or `^`, as a set. It may hold a slash. A `-` at either end is itself."""
    negated = reader.peek() in ("!", "^") and reader.peek() != ""
    reader.at += negated
    ranges: list[tuple[str, str]] = []
    pending = False
    while True:
        char = reader.peek()
        reader.at += 1
        if not char:
            raise GlobError("unclosed '['")
        if char == "]" and ranges:
            break
        if pending:
            low = ranges[-1][0]
            if char < low:
                raise GlobError(f"invalid range '{low}-{char}'")
            ranges[-1], pending = (low, char), False
        elif char == "-" and ranges:
            pending = True
        else:
            ranges.append((char, char))
    members = one("-") if pending else 0
    for low, high in ranges:
        members |= (one(high) << 1) - one(low)
    return EVERY & ~members if negated else members


def path_specificity(selector: str) -> int:
    """How specific an endpoint's `path` is: its characters other than `*`; the largest wins (policy.md 2.7)."""
    return len(selector.replace("*", ""))


def path_selected(selector: str, path: str) -> bool:
    """True when an endpoint with this `path` is a candidate for a request to `path`. A bad pattern only equals itself."""
    matcher = _selector(selector)
    return path == selector if matcher is None else matcher.matches(_bytes(path))


@lru_cache(maxsize=CACHED_PATTERNS)
def _selector(selector: str) -> Matcher | None:
    items = selector_pattern(selector)
    try:
        return None if items is None else Matcher(items)
    except TooLarge:
        return None


def selector_pattern(selector: str) -> Pattern | None:
    """The selector dialect: `*` and `?` cross slashes, `**` must be a whole component, there are no braces or escapes.

    None for what is no pattern and equals only itself.
    """
    if selector in ("", "**", "/**"):
        return (_EVERYTHING,)
    tail = selector.endswith("/**")
    text = _bytes(selector[:-3] if tail else selector)
    items: list[_Item] = []
    at = 0
    while at < len(text):
        char = text[at]
        if char == "*":
            run = len(text) - at - len(text[at:].lstrip("*"))
            before, after = text[at - 1 : at], text[at + run : at + run + 1]
            if run > 2 or (run == 2 and (before not in ("", "/") or after not in ("", "/"))):
                return None
            directories = run == 2 and after == "/"
            items.append(Choice(((), (_EVERYTHING, _SLASH))) if directories else _EVERYTHING)
            at += run + directories
        elif char == "[":
            close = text.find("]", at + 2 + (text[at + 1 : at + 2] == "!"))
            if close < 0:
                return None
            items.append(_selector_class(text[at + 1 : close]))
            at = close + 1
        else:
            items.append(EVERY if char == "?" else one(char))
            at += 1
    if tail:
        items.append(Choice(((), (_SLASH, _EVERYTHING))))
    return tuple(items)


def host_pattern(host: str) -> Pattern:
    """A host with wildcards for the question whether two can mean one name: `*` is any text without a dot, `**` any text."""
    items: list[_Item] = []
    text, at = _bytes(host), 0
    while at < len(text):
        if text.startswith("**", at):
            items.append(_EVERYTHING)
            at += 2
        else:
            items.append(Star(EVERY & ~one(".")) if text[at] == "*" else one(text[at]))
            at += 1
    return tuple(items)


def literal(text: str) -> Pattern:
    """The pattern that matches just this text."""
    return tuple(one(char) for char in _bytes(text))


def _selector_class(body: str) -> int:
    negated = body.startswith("!")
    body = body[1:] if negated else body
    members, at = 0, 0
    while at < len(body):
        if body[at + 1 : at + 2] == "-" and at + 2 < len(body):
            if body[at] <= body[at + 2]:
                members |= (one(body[at + 2]) << 1) - one(body[at])
            at += 3
        else:
            members |= one(body[at])
            at += 1
    return EVERY & ~members if negated else members
