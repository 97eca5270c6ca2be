"""Matching of small byte patterns in time linear in the text, whatever the pattern.

The values come from the workload, which would gladly send the path on which a backtracking engine takes minutes. A
pattern with at most one real choice goes to `re`; every other one runs as a lazily built automaton. Upstream's engine is
linear by construction; this module makes ours so. It knows byte sets, repetition and alternatives, not globs.

A pattern is a tuple of items: an int is a set of bytes (bit n = byte n) to be matched once, `Star(set)` any number of times,
`Choice(patterns)` one of several patterns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

EVERY = (1 << 256) - 1
MAX_STATES = 20_000
"""States of one automaton: a pattern of the greatest length needs about two per character."""
MAX_STEPS = 4096
"""Remembered transitions of one automaton (each some hundred bytes); beyond them it forgets and starts again."""


@dataclass(frozen=True, slots=True)
class Star:
    """Any number of bytes out of a set."""

    bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Any one of several patterns."""

    patterns: tuple[Pattern, ...]


type Pattern = tuple[int | Star | Choice, ...]


def one(char: str) -> int:
    """The set that holds just this byte (a character below U+0100)."""
    return 1 << ord(char)


class TooLarge(ValueError):
    """The pattern has more states than `MAX_STATES`."""


class Matcher:
    """A compiled pattern. `matches` is total and linear in the length of its text."""

    def __init__(self, pattern: Pattern) -> None:
        self._automaton = None if _simple(pattern) else _Automaton(pattern)
        self._fullmatch = None if self._automaton else re.compile(_regex(pattern), re.DOTALL).fullmatch

    def matches(self, text: str) -> bool:
        """True when the whole text matches; the text has one character per byte."""
        if self._automaton is not None:
            return self._automaton.matches(text)
        assert self._fullmatch is not None
        return self._fullmatch(text) is not None


def _simple(pattern: Pattern) -> bool:
    """True when `re` cannot backtrack more than once over the text: at most one item leaves a choice of extent.

    A star leaves none when it is last, or when the item after it cannot match what the star matches.
    """
    choices = 0
    for index, item in enumerate(pattern):
        if isinstance(item, Choice):
            choices += 2 if any(not _fixed(branch) for branch in item.patterns) and not _directories(item) else 1
        elif isinstance(item, Star) and not _settled(pattern, index):
            choices += 1
    return choices <= 1


def _settled(pattern: Pattern, index: int) -> bool:
    item = pattern[index]
    if index + 1 == len(pattern):
        return True
    after = pattern[index + 1]
    return isinstance(item, Star) and isinstance(after, int) and item.bytes & after == 0


def _fixed(pattern: Pattern) -> bool:
    return all(isinstance(item, int) for item in pattern)


def _directories(choice: Choice) -> bool:
    """True for a choice with one star in it, in its last alternative: one unbounded extent, not several."""
    stars = [sum(not isinstance(item, int) for item in branch) for branch in choice.patterns]
    return sum(stars) == 1 and stars[-1] == 1


def _regex(pattern: Pattern) -> str:
    out = []
    for index, item in enumerate(pattern):
        if isinstance(item, Choice):
            out.append(f"(?:{'|'.join(_regex(branch) for branch in item.patterns)})")
        elif isinstance(item, Star):
            out.append(f"{_set_regex(item.bytes)}*{'+' if _settled(pattern, index) else ''}")
        else:
            out.append(_set_regex(item))
    return "".join(out)


def _set_regex(members: int) -> str:
    if members == EVERY:
        return "."
    if members.bit_count() == 1:
        return f"\\x{members.bit_length() - 1:02x}"
    negated = members.bit_count() > 128
    runs: list[list[int]] = []
    for byte in range(256):
        if bool(members >> byte & 1) != negated:
            if runs and runs[-1][1] == byte - 1:
                runs[-1][1] = byte
            else:
                runs.append([byte, byte])
    body = "".join(f"\\x{low:02x}-\\x{high:02x}" for low, high in runs)
    return f"[{'^' if negated else ''}{body}]"


class _Automaton:
    """States are bits of an int. A state consumes a byte of its set and goes to the states of its `after`."""

    def __init__(self, pattern: Pattern) -> None:
        self.consumes: list[int] = []
        self.after: list[int] = []
        accept = self.state(0, 0)
        self.start = self.compile(pattern, accept)
        self.accept = accept
        self.steps: dict[tuple[int, str], int] = {}

    def state(self, consumes: int, after: int) -> int:
        if len(self.consumes) >= MAX_STATES:
            raise TooLarge("the pattern is too large")
        self.consumes.append(consumes)
        self.after.append(after)
        return 1 << (len(self.consumes) - 1)

    def compile(self, pattern: Pattern, after: int) -> int:
        """The states from which `pattern` and then `after` can be matched; built from the end to the start."""
        for item in reversed(pattern):
            if isinstance(item, Choice):
                after = _union(self.compile(branch, after) for branch in item.patterns)
            elif isinstance(item, Star):
                loop = self.state(item.bytes, 0)
                after |= loop
                self.after[-1] = after
            else:
                after = self.state(item, after)
        return after

    def matches(self, text: str) -> bool:
        states, steps = self.start, self.steps
        for char in text:
            following = steps.get((states, char))
            if following is None:
                following = self.step(states, char)
            if not following:
                return False
            states = following
        return bool(states & self.accept)

    def step(self, states: int, char: str) -> int:
        following, rest, byte = 0, states, ord(char)
        while rest:
            low = rest & -rest
            rest ^= low
            number = low.bit_length() - 1
            if self.consumes[number] >> byte & 1:
                following |= self.after[number]
        if len(self.steps) >= MAX_STEPS:
            self.steps.clear()
        self.steps[(states, char)] = following
        return following


def _union(sets: Iterable[int]) -> int:
    result = 0
    for item in sets:
        result |= item
    return result


def intersects(left: Pattern, right: Pattern) -> bool:
    """True when some text matches both patterns. Exact; at worst the product of their sizes in steps."""
    a, b = _Automaton(left), _Automaton(right)
    queue = [(x, y) for x in _bits(a.start) for y in _bits(b.start)]
    seen = set(queue)
    goal = (a.accept.bit_length() - 1, b.accept.bit_length() - 1)
    while queue:
        pair = queue.pop()
        if pair == goal:
            return True
        if a.consumes[pair[0]] & b.consumes[pair[1]]:
            for following in ((x, y) for x in _bits(a.after[pair[0]]) for y in _bits(b.after[pair[1]])):
                if following not in seen:
                    seen.add(following)
                    queue.append(following)
    return False


def _bits(states: int) -> list[int]:
    found = []
    while states:
        low = states & -states
        states ^= low
        found.append(low.bit_length() - 1)
    return found
