"""`explain --replay`: recorded traffic, decided again under another policy. What would change?

Reads OCSF events as `--ocsf-file` writes them. Only what the policy decided is asked again: connections that were opened or
refused, and requests. Refused addresses, malformed heads and failures say nothing of the policy; they are counted. An event holds
no query, so a verdict that hangs on one is marked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from openshell_supervisor.errors import SettingsError
from openshell_supervisor.explain.jsonl import objects
from openshell_supervisor.explain.question import AUDITED, BLOCKED, CONNECT, FORWARD, Answer, Question, ask
from openshell_supervisor.verdict.decide import Generation
from openshell_supervisor.verdict.facts import TargetError, canonical_host

NETWORK, HTTP = 4001, 4002  # OCSF class_uid: Network Activity, HTTP Activity
DECIDED_BY_POLICY = ("opa", "l7")
"""How `firewall_rule.type` says that the verdict is the policy's; the others are checks of addresses, heads, TLS, the fence.
`l7-mcp` and the like are upstream's."""
_AUDIT = re.compile(r"^\w+ audit |\bdecision=audit\b")  # the decision word of a request that audit let pass
_OF_RULES = re.compile(r"endpoint |network connections not |binary '")
"""How the reasons of a connection begin that rules denied; the others are of callers that could not be told, and the like."""
HEAD_ONLY = ("", "rest", "tcp")
"""Protocols that are judged by a request's head; of the others a recording lacks what decides."""
MAX_DISTINCT = 200_000
"""Different questions of a recording; each is remembered with its answer, some 2 KiB."""
MAX_CALLERS = 65
"""A program and its ancestors; an event holds 64 of these at most."""
_OUTCOMES = {"Allowed": "allowed", "Denied": BLOCKED, "Observed": AUDITED}


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was asked and what became of it then. `observed`: the whole sandbox only watched, and `outcome` is the policy's."""

    question: Question
    outcome: str
    observed: bool


@dataclass(frozen=True, slots=True)
class Change:
    """One question whose outcome would be another, how often it was asked, and what would be said now.

    `unsure` says that a query or ancestors, which the recording does not hold, could change the new verdict.
    """

    recorded: Recorded
    answer: Answer
    times: int
    unsure: bool

    @property
    def kind(self) -> str:
        """`allowed->blocked` and the like."""
        return f"{self.recorded.outcome}->{self.answer.outcome}"


@dataclass(frozen=True, slots=True)
class Replay:
    """The outcome: how many events there were, how many were decided again, what was left out and why, what would change."""

    events: int
    decided: int
    left_out: Counter[str]
    changes: tuple[Change, ...]
    unsure: int

    def counts(self) -> dict[str, int]:
        """Events by kind of change, the most frequent first."""
        found: Counter[str] = Counter()
        for change in self.changes:
            found[change.kind] += change.times
        return dict(found.most_common())


def replay(path: Path, generation: Generation, with_callers: Generation | None = None) -> Replay:
    """Decide a recording again. Raises `SettingsError` for a file that is no recording, or holds too much.

    `with_callers` is the same policy with binary identity, for events that name the calling program.
    """
    asked: Counter[Recorded] = Counter()
    left_out: Counter[str] = Counter()
    events = 0
    for number, event in objects(path):
        events += 1
        found = _recorded(event)
        if isinstance(found, str):
            left_out[found] += 1
            continue
        asked[found] += 1
        if len(asked) > MAX_DISTINCT:
            raise SettingsError(
                f"{path}:{number}: more than {MAX_DISTINCT} different requests",
                code="invalid_file",
                hint="replay the file in parts",
            )
    answers = []
    for item, times in asked.items():
        answer = ask(item.question, (with_callers or generation) if item.question.binary else generation)
        if answer.protocol in HEAD_ONLY:
            answers.append((item, times, answer))
        else:
            left_out[f"{answer.protocol}: decided by the body or message, which a recording does not hold"] += times
    unsure = sum(times for item, times, answer in answers if _unsure(item, answer))
    return Replay(events, sum(times for _, times, _ in answers), left_out, tuple(_changes(answers)), unsure)


def _changes(answers: Iterable[tuple[Recorded, int, Answer]]) -> Iterator[Change]:
    for recorded, times, answer in answers:
        if answer.outcome != recorded.outcome:
            yield Change(recorded, answer, times, _unsure(recorded, answer))


def _recorded(event: dict[str, Any]) -> Recorded | str:
    """The question of an event and what became of it; or why there is none."""
    kind = event.get("class_uid")
    if kind not in (NETWORK, HTTP):
        return "not traffic"
    outcome = _OUTCOMES.get(str(event.get("action")))
    if outcome is None:
        return "no decision"
    engine = str(_member(event, "firewall_rule").get("type"))
    if not _by_policy(engine):
        return "not decided by the policy"
    if outcome != "allowed" and engine == "opa" and not _OF_RULES.match(str(event.get("status_detail") or "endpoint ")):
        return "decided before any rule"
    question = _connection(event) if kind == NETWORK else _request(event)
    if question is None:
        return "incomplete"
    # A refusal in a sandbox that only watches is `Observed` too. Upstream writes what audit lets pass down as allowed.
    audit = kind == HTTP and _AUDIT.search(str(event.get("message", ""))) is not None
    observed = outcome == AUDITED and not audit
    return Recorded(question, AUDITED if audit else BLOCKED if observed else outcome, observed)


def _by_policy(engine: str) -> bool:
    return engine in DECIDED_BY_POLICY or engine.startswith("l7-")


def _connection(event: dict[str, Any]) -> Question | None:
    end = _member(event, "dst_endpoint")
    return _question(event, end.get("domain") or end.get("ip"), end.get("port"), "", "", CONNECT)


def _request(event: dict[str, Any]) -> Question | None:
    request = _member(event, "http_request")
    url = _member(request, "url")
    method = request.get("http_method") or _member(event, "unmapped").get("http_method")
    path = url.get("path")
    if not isinstance(method, str) or not isinstance(path, str):
        return None
    way = FORWARD if str(event.get("message", "")).startswith("FORWARD") else CONNECT
    return _question(event, url.get("hostname"), url.get("port"), method, path, way)


def _question(event: dict[str, Any], host: object, port: object, method: str, path: str, way: str) -> Question | None:
    if not isinstance(host, str) or isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
        return None
    try:
        host = canonical_host(host)
    except TargetError:
        return None  # a name that no request of ours could have had: cut for being too long, for example
    callers = list(islice(_callers(_member(event, "actor").get("process")), MAX_CALLERS))
    return Question(host, port, method, path, way, callers[0] if callers else "", tuple(callers[1:]))


def _callers(process: object) -> Iterator[str]:
    """The program and its ancestors, where the event names them."""
    while isinstance(process, dict) and isinstance(process.get("name"), str):
        if process["name"] != "-":
            yield process["name"]
        process = process.get("parent_process")


def _member(event: dict[str, Any], name: str) -> dict[str, Any]:
    found = event.get(name)
    return found if isinstance(found, dict) else {}


def _unsure(recorded: Recorded, answer: Answer) -> bool:
    """True where what a recording lacks could change the verdict: a query that rules look at, ancestors that a rule may list."""
    if answer.reason_id == "binary_not_allowed" and not recorded.question.ancestors:
        return True
    return answer.stage == "request" and any(
        match.query for item in answer.verdict.endpoints for match in (*item.endpoint.rules, *item.endpoint.deny_rules)
    )
