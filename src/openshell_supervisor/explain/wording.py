"""What `explain` prints: an answer and a replay, for a person and as JSON. It decides nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openshell_supervisor.explain.jsonl import shown
from openshell_supervisor.explain.nearest import Difference, Nearest, nearest
from openshell_supervisor.explain.question import ALLOWED, AUDITED, REJECTED, Answer, Question
from openshell_supervisor.verdict.bodies.json_rpc import RpcBody
from openshell_supervisor.verdict.decide import Generation
from openshell_supervisor.verdict.facts import Facts
from openshell_supervisor.verdict.reasons import printable

if TYPE_CHECKING:
    from openshell_supervisor.explain.replay import Change, Replay

__all__ = ["Told", "printable", "replay_as_json", "replay_lines", "shown"]

MAX_CANDIDATES = 100
"""Candidates that are listed; a host with more endpoints than that is no place to read them one by one."""
PROXY = {
    ALLOWED: "lets it pass",
    AUDITED: "lets it pass and logs that the rules do not allow it (enforcement: audit)",
    REJECTED: "answers 400 and asks no rule",
}
_STAGE = {"connection": "the connection", "address": "the address", "request": "the request"}


@dataclass(frozen=True, slots=True)
class Told:
    """An answer with what surrounds it. `candidates` are (policy, endpoint, place, whether it matches the connection)."""

    question: Question
    answer: Answer
    candidates: tuple[tuple[str, int, str, bool], ...]
    nearest: Nearest | None
    notes: tuple[str, ...]

    @classmethod
    def of(cls, question: Question, answer: Answer, generation: Generation, notes: tuple[str, ...]) -> Told:
        """Look up what surrounds an answer."""
        facts = answer.facts
        matched = {(item.policy, item.index) for item in answer.verdict.endpoints}
        candidates = tuple(
            (item.policy, item.index, item.endpoint.place(), (item.policy, item.index) in matched)
            for item in generation.index.narrow(facts.host, facts.port)[:MAX_CANDIDATES]
        )
        denied = answer.stage in ("connection", "request") and not answer.allow
        near = nearest(facts, answer.verdict, generation) if denied else None
        return cls(question, answer, candidates, near, notes)

    def proxy(self) -> str:
        """What the proxy does with it."""
        return PROXY.get(self.answer.outcome, f"answers 403 ({self.answer.reason_id})")

    def text(self) -> str:
        """For a person; a line per fact."""
        answer, verdict = self.answer, self.answer.verdict
        lines = [f"{answer.outcome}: {_asked(self.question)}", f"  reason     {printable(answer.reason)}"]
        lines.append(f"  reason_id  {answer.reason_id}")
        lines.append(f"  proxy      {self.proxy()}")
        if answer.path and answer.path != self.question.target.partition("?")[0]:
            lines.append(f"  path       {answer.path}")
        if verdict.policy:
            lines.append(f"  decided by {printable(verdict.policy)}{f', {verdict.rule}' if verdict.rule else ''}")
        for policy, index, place, matches in self.candidates:
            mark = "" if matches else " (does not match)"
            lines.append(f"  candidate  {printable(f'{policy}, endpoints[{index}]: {place}')}{mark}")
        if not self.candidates:
            lines.append("  candidate  none: no endpoint of the policy could match this host and port")
        lines += [f"  {line}" for line in self._nearest_lines()]
        if answer.hint and answer.stage != "address":
            lines.append(f"  hint       {printable(answer.hint)}")
        lines += [f"  note       {note}" for note in self.notes]
        return "\n".join(lines)

    def _nearest_lines(self) -> Iterator[str]:
        near = self.nearest
        if near is None:
            return
        yield f"nearest    {printable(f'{near.policy}, {near.rule}: {near.place}')}"
        for item in near.differs:
            yield f"  {item.field}: asked {item.asked}, the rule has {item.allowed}"
        if near.example is not None:
            yield f"  it would allow {printable(_facts_line(near.example))}"

    def as_json(self) -> str:
        """For a program: one object."""
        answer, verdict = self.answer, self.answer.verdict
        told: dict[str, Any] = {
            "allow": answer.allow,
            "outcome": answer.outcome,
            "stage": answer.stage,
            "reason_id": answer.reason_id,
            "reason": answer.reason,
            "hint": answer.hint,
            "proxy": self.proxy(),
            "matched_policy": verdict.policy,
            "matched_rule": verdict.rule,
            "enforcement": verdict.enforcement,
            "inspected": verdict.inspected,
            "protocol": answer.protocol,
            "canonical_path": answer.path,
            "candidates": [
                {"policy": policy, "endpoint": index, "place": place, "matches": matches}
                for policy, index, place, matches in self.candidates
            ],
            "nearest": _nearest_json(self.nearest),
            "notes": list(self.notes),
        }
        return json.dumps(told, ensure_ascii=True)


def _asked(question: Question) -> str:
    request = f"{question.method} {question.target.partition('?')[0]} on " if question.method else ""
    binary = f" by {question.binary}" if question.binary else ""
    return printable(f"{request}{question.host}:{question.port}{binary}")


def _facts_line(facts: Facts) -> str:
    request, query = "", ""
    if facts.request is not None:
        query = "&".join(f"{key}={value}" for key, value in facts.request.query)
        calls = facts.request.body.calls if isinstance(facts.request.body, RpcBody) else ()
        named = ", ".join(f"{call.method}{f' of {call.tool}' if call.tool else ''}" for call in calls)
        request = f"{facts.request.method} {facts.request.path}{f'?{query}' if query else ''} on "
        request = f"{named} by {request}" if named else request
    binary = f" by {facts.binary}" if facts.binary else ""
    return f"{request}{facts.host}:{facts.port}{binary}"


def _nearest_json(near: Nearest | None) -> dict[str, Any] | None:
    if near is None:
        return None
    return {
        "policy": near.policy,
        "rule": near.rule,
        "place": near.place,
        "differs": [_difference_json(item) for item in near.differs],
        "would_allow": _facts_line(near.example) if near.example is not None else None,
    }


def _difference_json(item: Difference) -> dict[str, str]:
    return {"field": item.field, "asked": item.asked, "allowed": item.allowed}


def replay_lines(outcome: Replay) -> Iterator[str]:
    """Counts first, then a line for each change."""
    yield f"{outcome.events} events, {outcome.decided} decided again"
    for why, count in sorted(outcome.left_out.items()):
        yield f"  {count} left out: {why}"
    if outcome.unsure:
        yield f"  {outcome.unsure} hang on a query or on a program's ancestors, which the recording does not hold"
    if not outcome.changes:
        yield "nothing would change"
    for kind, count in outcome.counts().items():
        yield f"  {count} {kind.replace('->', ' -> ')}"
    for change in outcome.changes:
        yield _change_line(change)


def _change_line(change: Change) -> str:
    kind = change.kind.replace("->", " -> ")
    note = " (hangs on what is not recorded)" if change.unsure else ""
    asked = _asked(change.recorded.question)
    return printable(f"{kind}: {asked} ({change.times} times): {change.answer.reason}{note}")


def replay_as_json(outcome: Replay) -> dict[str, Any]:
    """The same as one object."""
    return {
        "events": outcome.events,
        "decided": outcome.decided,
        "left_out": dict(outcome.left_out),
        "unsure": outcome.unsure,
        "counts": outcome.counts(),
        "changes": [
            {
                "from": change.recorded.outcome,
                "to": change.answer.outcome,
                "observed": change.recorded.observed,
                "times": change.times,
                "host": change.recorded.question.host,
                "port": change.recorded.question.port,
                "method": change.recorded.question.method,
                "path": change.recorded.question.target,
                "reason_id": change.answer.reason_id,
                "reason": change.answer.reason,
                "matched_policy": change.answer.verdict.policy,
                "unsure": change.unsure,
            }
            for change in outcome.changes
        ],
    }
