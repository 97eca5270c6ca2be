"""Mutate policies and facts, and look for a crash, a hang, or an answer that breaks a rule of the house.

    python tests/verdict/fuzz.py [--seconds 600] [--seed 1] [--keep NEW.jsonl]

Starts from tests/verdict/corpus/*.jsonl and keeps what reaches lines that nothing reached before (`sys.monitoring`). An entry is
`{"policy": YAML text, "facts": [{host, port, binary, ancestors, request: {method, target, headers, body, message}}]}`; with
`message` the body is a text message after that handshake. Exit status 1 with findings.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType
from typing import Any

import yaml

from openshell_supervisor.errors import PolicyError
from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.policy.normalise import normalise
from openshell_supervisor.policy.proto import load_message, to_proto
from openshell_supervisor.policy.yaml_file import parse
from openshell_supervisor.verdict.bodies.read import read_body, read_message
from openshell_supervisor.verdict.bodies.wire import BodyError
from openshell_supervisor.verdict.decide import ENGINE_HINT, Generation, build_generation, decide, decide_fully
from openshell_supervisor.verdict.facts import (
    Facts,
    Request,
    TargetError,
    canonical_host,
    canonical_target,
    parse_query,
)

CORPUS = Path(__file__).parent / "corpus"
SLOWEST_S = 0.05
"""The issue's bound on one decision, in processor time of this thread; a slow one is asked again twice, and the best counts."""
MAX_TEXT = 6000
"""Characters of a mutated policy: larger ones are slow to read and find nothing new."""
NASTY = (
    *(
        "",
        "*",
        "**",
        "/",
        "//",
        "..",
        "%2e",
        "%2F",
        "\\",
        "[",
        "{",
        "{a,b}",
        "[!a]",
        "a" * 300,
        "*" * 40,
        "{" * 30,
        "\0",
        "\n",
    ),
    *(
        "é",
        "\u212a",
        "\ud800",
        "😀",
        "~",
        "null",
        "true",
        "0",
        "-1",
        "65536",
        "4294967296",
        "1e400",
        ".inf",
        "&a",
        "*a",
        "<<",
    ),
    *("::1", "[::ffff:10.0.0.1]", "0x7f.1", "fe80::1%lo", "10.0.0.0/8", "a.example.com.", ".", "*.com", "_provider_x"),
)

Entry = dict[str, Any]


@dataclass
class Watch:
    """Which lines of policy/ and verdict/ were ever run; costs next to nothing, because a line reports only once."""

    lines: set[tuple[str, int]] = field(default_factory=set)
    fresh: int = 0

    def start(self) -> None:
        """Watch from now on."""
        tool = sys.monitoring.COVERAGE_ID
        sys.monitoring.use_tool_id(tool, "fuzz")
        sys.monitoring.register_callback(tool, sys.monitoring.events.LINE, self._line)
        sys.monitoring.set_events(tool, sys.monitoring.events.LINE)

    def stop(self) -> None:
        """Watch no more."""
        sys.monitoring.set_events(sys.monitoring.COVERAGE_ID, 0)
        sys.monitoring.free_tool_id(sys.monitoring.COVERAGE_ID)

    def _line(self, code: CodeType, line: int) -> object:
        if "openshell_supervisor/policy/" in code.co_filename or "openshell_supervisor/verdict/" in code.co_filename:
            self.lines.add((code.co_filename, line))
            self.fresh += 1
        return sys.monitoring.DISABLE

    def news(self) -> bool:
        """Whether a line was run for the first time since this was asked last."""
        fresh, self.fresh = self.fresh, 0
        return fresh > 0


class Finding(Exception):
    """A rule of the house that an entry breaks."""


def seeds() -> list[Entry]:
    """The entries of the corpus."""
    return [
        json.loads(line) for path in sorted(CORPUS.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()
    ]


def facts_of(raw: dict[str, Any]) -> Facts:
    """Facts as the proxy would make them; what it would refuse goes in as it is, because `decide` is total."""
    request = raw.get("request")
    asked = None
    if request is not None:
        try:
            path, query = canonical_target(request["target"], allow_encoded_slash=bool(request.get("slash")))
            asked = Request(request["method"], path, parse_query(query))
            if canonical_target(path, allow_encoded_slash=True) != (path, ""):
                raise Finding(f"a canonical path changes when it is made canonical again: {path!r}")
        except TargetError:
            asked = Request(request["method"], request["target"])
    try:
        host = canonical_host(raw["host"])
        if canonical_host(host) != host:
            raise Finding(f"a canonical host changes when it is made canonical again: {host!r}")
    except TargetError:
        host = raw["host"]
    return Facts(host, raw["port"], raw.get("binary", ""), tuple(raw.get("ancestors", ())), request=asked)


def with_body(facts: Facts, generation: Generation, raw: dict[str, Any]) -> Facts:
    """The facts with the request's body read as its endpoint says; what is refused there is asked about unread."""
    request = facts.request
    if request is None or not request.path.startswith("/"):
        return facts
    item = decide(replace(facts, request=None), generation).reads(request.path)
    if item is None:
        return facts
    asked = raw["request"]
    headers = [(str(name).lower(), str(value)) for name, value in asked.get("headers", {}).items()]
    try:
        body = asked.get("body", "").encode("utf-8", "surrogatepass")
        if asked.get("message") and item.endpoint.protocol == "websocket":
            read = read_message(request, item.endpoint, body)
        else:
            read = read_body(request, item.endpoint, headers, body)
    except BodyError as error:
        if not error.message or not error.reason_id:
            raise Finding("a body is refused without a reason") from error
        return facts
    return replace(facts, request=read)


def examine(entry: Entry) -> tuple[int, float]:
    """Load, send, decide. Gives the number of decisions and the longest one in seconds. Raises `Finding`, or what crashed."""
    try:
        policy = parse(entry["policy"]).policy
    except PolicyError as error:
        if not error.problems:
            raise Finding("a policy is refused without a problem") from error
        return 0, 0.0
    try:
        if load_message(to_proto(policy), "fuzz").policy != policy:
            raise Finding("the policy is another one after a way over protobuf")
    except PolicyError as error:
        if [problem.code for problem in error.problems] != ["not_representable"]:
            raise Finding(f"a loaded policy is refused as a message: {error.problems}") from error
    if normalise(policy) != policy:
        raise Finding("a normalised policy changes when it is normalised again")
    slowest = 0.0
    for raw in entry["facts"]:
        facts = facts_of(raw)
        slowest = max(slowest, *(_judge(policy, facts, identity, raw) for identity in (False, True)))
    return 2 * len(entry["facts"]), slowest


def _judge(policy: SandboxPolicy, plain: Facts, identity: bool, raw: dict[str, Any]) -> float:
    generation = build_generation(policy, 1, identity)
    spent = 1.0
    for _ in range(3):
        generation.forget()
        begin = time.thread_time()
        facts = with_body(plain, generation, raw)
        verdict = decide(facts, generation)
        spent = min(spent, time.thread_time() - begin)
        if spent <= SLOWEST_S:
            break
    else:
        raise Finding(f"a decision takes {spent * 1000:.0f} ms: {facts}")
    if verdict.reason_id == "engine_error" and verdict.hint == ENGINE_HINT:
        raise Finding(f"the engine failed: {verdict.reason} for {facts}")
    if verdict.allow is not (verdict.reason_id == "allowed") or not verdict.reason:
        raise Finding(f"an inconsistent verdict: {verdict}")
    full = decide_fully(facts, generation)
    # A host pattern that is no glob fails the full evaluation for every host, and the narrowed one for those that could meet it.
    broken = full.reason_id == "engine_error" and "invalid glob" in full.reason and not verdict.allow
    if verdict != full and not broken:
        raise Finding(f"narrowed and full evaluation differ: {facts}")
    if (
        facts.host.isascii()
        and verdict.allow is not decide(replace(facts, host=facts.host.swapcase()), generation).allow
    ):
        raise Finding(f"the case of the host matters: {facts}")
    return spent


class Mutator:
    """Makes new entries of old ones."""

    def __init__(self, source: random.Random, entries: list[Entry]) -> None:
        self.source = source
        self.words: list[Any] = [*NASTY]
        for entry in entries:
            self.learn(entry)

    def learn(self, entry: Entry) -> None:
        """Take the words of an entry into the dictionary."""
        known = set(map(repr, self.words))
        for value in (*_leaves(_tree(entry["policy"])), *_leaves(entry["facts"])):
            if repr(value) not in known and len(str(value)) < 60:
                known.add(repr(value))
                self.words.append(value)

    def mutate(self, entry: Entry, other: Entry) -> Entry:
        """One entry with one to four changes; `other` lends lines."""
        new: Entry = json.loads(json.dumps(entry))
        for _ in range(self.source.choice((1, 1, 2, 4))):
            how = self.source.random()
            if how < 0.4:
                new["facts"] = self._changed(new["facts"]) or other["facts"]
            elif how < 0.75 and (tree := _tree(new["policy"])) is not None:
                new["policy"] = json.dumps(self._changed(tree), ensure_ascii=False)[:MAX_TEXT]
            else:
                new["policy"] = self._text(new["policy"], other["policy"])[:MAX_TEXT]
        return new if _is_entry(new) else {**new, "facts": entry["facts"]}

    def _changed(self, tree: Any) -> Any:
        """The tree with one node replaced, removed, copied or renamed."""
        nodes = list(_nodes(tree))
        if not nodes:
            return tree
        holder, key = self.source.choice(nodes)
        how = self.source.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[str(self.source.choice(self.words))] = holder.pop(key)
        elif how == 2:
            there, at = self.source.choice(nodes)
            holder[key] = json.loads(json.dumps(there.get(at) if isinstance(there, dict) else (*there, None)[at]))
        elif how == 3 and isinstance(holder, list):
            holder.insert(key, holder[key])
        elif how == 4 and isinstance(holder[key], str):
            holder[key] = self._string(holder[key])
        else:
            holder[key] = self.source.choice(self.words)
        return tree

    def _string(self, text: str) -> str:
        at = self.source.randrange(len(text) + 1)
        extra = (
            str(self.source.choice(self.words)) if self.source.random() < 0.6 else chr(self.source.randrange(1, 0x250))
        )
        return text[:at] + extra + text[at + self.source.randrange(3) :]

    def _text(self, text: str, other: str) -> str:
        lines, lent = text.splitlines() or [""], other.splitlines() or [""]
        at = self.source.randrange(len(lines))
        how = self.source.randrange(5)
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(at, self.source.choice(lines))
        elif how == 2:
            lines[at:at] = lent[self.source.randrange(len(lent)) :][:4]
        elif how == 3:
            lines[at] = lines[at].replace(" ", "", 1) if self.source.random() < 0.5 else f" {lines[at]}"
        else:
            lines[at] = self._string(lines[at])
        return "\n".join(lines)


def _tree(text: str) -> Any:
    try:
        return json.loads(json.dumps(yaml.safe_load(text)))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return None


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _nodes(tree[key])


def _leaves(tree: Any) -> Iterator[Any]:
    for holder, key in _nodes(tree):
        if isinstance(holder, dict):
            yield key
        if isinstance(holder[key], str | int):
            yield holder[key]


def _is_entry(entry: Entry) -> bool:
    """Whether the facts still have the types that the proxy gives; other types are tested by tests of their own."""
    facts = entry["facts"]
    return isinstance(facts, list) and 0 < len(facts) <= 8 and all(map(_are_facts, facts))


def _are_facts(raw: Any) -> bool:
    if not isinstance(raw, dict) or not isinstance(raw.get("host"), str) or not isinstance(raw.get("port"), int):
        return False
    request = raw.get("request")
    texts = [raw.get("binary", ""), *(raw.get("ancestors", []) if isinstance(raw.get("ancestors", []), list) else [0])]
    if request is not None:
        if not isinstance(request, dict):
            return False
        texts += [request.get("method"), request.get("target"), request.get("body", "")]
        if not isinstance(request.get("headers", {}), dict):
            return False
    return all(isinstance(text, str) for text in texts)


@dataclass
class Campaign:
    """A run: what was tried, what was found, and the entries that reached something new."""

    seed: int = 1
    pool: list[Entry] = field(default_factory=seeds)
    kept: list[Entry] = field(default_factory=list)
    findings: dict[str, Entry] = field(default_factory=dict)
    entries: int = 0
    decisions: int = 0
    slowest: float = 0.0
    slowest_entry: float = 0.0

    def run(self, seconds: float, most: int = sys.maxsize, watch: Watch | None = None) -> None:
        """Try entries until `seconds` are over or `most` were tried. The corpus itself goes first."""
        source, end = random.Random(self.seed), time.monotonic() + seconds
        build_generation(SandboxPolicy(), 1).warm()  # loading the engine is nobody's decision
        mutator = Mutator(source, self.pool)
        usable = [entry for entry in self.pool if self.attempt(entry)]
        if watch:
            watch.news()
        while time.monotonic() < end and self.entries < most:
            # Most start from a policy that loads: otherwise the pool fills with refusals, and nothing is decided.
            start = source.choice(usable if usable and source.random() < 0.8 else self.pool)
            entry = mutator.mutate(start, source.choice(self.pool))
            decided = self.attempt(entry)
            if watch and watch.news():
                usable += [entry] if decided else []
                self.pool.append(entry)
                self.kept.append(entry)
                mutator.learn(entry)

    def attempt(self, entry: Entry) -> bool:
        """Try one entry; what goes wrong is a finding, one for each kind. True when its policy loaded and was asked."""
        self.entries += 1
        begin = time.thread_time()
        try:
            decisions, slowest = examine(entry)
        except Exception as error:  # whatever it is, finding it is the purpose
            self.findings.setdefault(f"{type(error).__name__}: {str(error)[:300]}", entry)
            return False
        self.decisions += decisions
        self.slowest = max(self.slowest, slowest)
        self.slowest_entry = max(self.slowest_entry, time.thread_time() - begin)
        return decisions > 0


def main() -> int:
    """Run, print a summary, write what is worth keeping."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--keep", type=Path, help="write entries that reached something new, and findings, to this file"
    )
    arguments = parser.parse_args()
    campaign, watch = Campaign(arguments.seed), Watch()
    watch.start()
    campaign.run(arguments.seconds, watch=watch)
    watch.stop()
    print(
        f"{campaign.entries} entries, {campaign.decisions} decisions in {arguments.seconds:.0f} s, {len(watch.lines)} lines; "
        f"slowest decision {campaign.slowest * 1000:.1f} ms, slowest entry {campaign.slowest_entry * 1000:.0f} ms; "
        f"{len(campaign.kept)} entries reached something new; {len(campaign.findings)} findings"
    )
    for what, entry in campaign.findings.items():
        print(f"FINDING {what}\n  {json.dumps(entry)}")
    if arguments.keep:
        arguments.keep.write_text("".join(f"{json.dumps(e)}\n" for e in (*campaign.kept, *campaign.findings.values())))
    return 1 if campaign.findings else 0


if __name__ == "__main__":
    sys.exit(main())
