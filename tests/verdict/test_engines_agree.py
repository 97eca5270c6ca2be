"""The embedded engine and a real Open Policy Agent give the same verdicts: on random policies and facts, and on the corpus.

Each pair is decided with the embedded engine, which is listened to; what it was asked is then put to OPA, in bulk; and the pair
is decided again with OPA's answers alone. What is compared is the verdict, with its reason, its rule and its hint.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import test_corpus
from opa_process import Opa
from random_worlds import World

import openshell_supervisor.verdict.decide as decide_module
from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.verdict.bodies.read import read_body
from openshell_supervisor.verdict.bodies.wire import BodyError
from openshell_supervisor.verdict.decide import build_generation, decide
from openshell_supervisor.verdict.engines.embedded import EmbeddedEngine, EngineError, shipped_rules
from openshell_supervisor.verdict.engines.opa_client import OpaClient, opa_address
from openshell_supervisor.verdict.engines.opa_server import shipped
from openshell_supervisor.verdict.facts import Facts, Verdict

POLICIES = int(os.environ.get("OSS_AGREE_POLICIES", "2000"))
FACTS = 10
"""Pairs of policy and facts: 20,000, unless the environment asks for more."""
SEED = int(os.environ.get("OSS_AGREE_SEED", "20260905"))
BULK = 500
"""Inputs in one question to OPA; about 1 MB."""
BULK_TIMEOUT = 60.0

BULK_RULE = """package bulk.{rule}

answers := [x |
	some i in input.inputs
	x := data.{package}.{rule} with input as i
]
"""

MODULE = shipped_rules()

Question = tuple[str, str]


class Listening:
    """The embedded engine; it keeps the questions."""

    def __init__(self) -> None:
        self.engine = EmbeddedEngine(MODULE)
        self.heard: dict[Question, Any] = {}

    def ask(self, rule: str, document: str) -> Any:
        known = self.heard.get((rule, document))
        if known is None:
            known = self.heard[rule, document] = self.engine.ask(rule, document)
        return known


class Answers:
    """An engine that knows what OPA said, and nothing else."""

    def __init__(self, known: dict[Question, Any]) -> None:
        self.known = known

    def ask(self, rule: str, document: str) -> Any:
        if (rule, document) not in self.known:
            raise EngineError("OPA was never asked this")
        return self.known[rule, document]


@pytest.fixture(scope="module")
def server(opa_program: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opa]:
    """A running OPA on a Unix socket."""
    opa = Opa(opa_program, f"unix:{tmp_path_factory.mktemp('opa')}/opa.sock")
    opa.start()
    yield opa
    opa.stop()


def asked(server: Opa, questions: list[Question]) -> dict[Question, Any]:
    """OPA's answers to all of them, by a rule beside ours that evaluates it on many inputs."""
    rules = shipped(MODULE)
    package = rules.package.replace("/", ".")

    async def ask() -> dict[Question, Any]:
        found: dict[Question, Any] = {}
        async with OpaClient(opa_address(server.url), BULK_TIMEOUT) as client:
            await client.push(rules.module, rules.name)
            for rule in sorted({rule for rule, _ in questions}):
                await client.push(BULK_RULE.format(rule=rule, package=package), f"bulk-{rule}")
                texts = [text for name, text in questions if name == rule]
                for start in range(0, len(texts), BULK):
                    part = texts[start : start + BULK]
                    answer = await client.answer(f"bulk/{rule}", "answers", f'{{"inputs":[{",".join(part)}]}}')
                    assert len(answer["result"]) == len(part), "an input without an answer"
                    found.update({(rule, text): value for text, value in zip(part, answer["result"], strict=True)})
        return found

    return asyncio.run(ask())


def with_body(facts: Facts, connection: Verdict, body: bytes) -> Facts:
    """The facts with the request's body as the connection's endpoint reads it; without where it is refused before the rules."""
    endpoint = connection.reads(facts.request.path) if facts.request is not None else None
    if endpoint is None or facts.request is None:
        return facts
    try:
        return replace(
            facts, request=read_body(facts.request, endpoint.endpoint, [("content-type", "application/json")], body)
        )
    except BodyError:
        return facts


@pytest.mark.timeout(300)  # 25 s of processor time, on a machine that others use, too
def test_they_agree_on_random_worlds(server: Opa, capsys: pytest.CaptureFixture[str]) -> None:
    """20,000 pairs and more: not one verdict differs in any of its fields. All outcomes that the rules know occur."""
    heard, first = Listening(), []
    pairs: list[tuple[SandboxPolicy, bool, Facts]] = []
    for policy, identity, questions in World(SEED).pairs(POLICIES, FACTS):
        generation = build_generation(policy, 1, identity, heard)
        for facts, body in questions:
            connection = decide(replace(facts, request=None), generation)
            facts = with_body(facts, connection, body)
            pairs.append((policy, identity, facts))
            first.append(decide(facts, generation))
    opa = Answers(asked(server, list(heard.heard)))
    generation, of = build_generation(SandboxPolicy(), 1), None
    for at, ((policy, identity, facts), verdict) in enumerate(zip(pairs, first, strict=True)):
        if of is not policy:
            generation, of = build_generation(policy, 1, identity, opa), policy
        assert decide(facts, generation) == verdict, f"seed {SEED}, pair {at}: {facts} on {policy}"
    outcomes = {verdict.reason_id: 0 for verdict in first}
    for verdict in first:
        outcomes[verdict.reason_id] += 1
    with capsys.disabled():
        print(f"\nembedded = OPA on {len(pairs)} pairs, {len(heard.heard)} evaluations; {json.dumps(outcomes)}")
    assert len(pairs) >= 20_000 or "OSS_AGREE_POLICIES" in os.environ
    assert outcomes.keys() >= {"allowed", "endpoint_not_allowed", "binary_not_allowed", "no_policies", "rule_not_matched",
                               "deny_rule", "no_endpoint_path", "engine_error", "invalid_request_target"}  # fmt: skip


def test_the_corpus_on_opa(server: Opa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case of the corpus that is decided by the rules passes with OPA's answers, too: the same assertions, once more."""
    if not test_corpus.RUN:
        pytest.skip("../shared/reference/policy_cases.jsonl is missing")
    decided = [(test_corpus.test_connections if case["kind"] == "l4" else test_corpus.test_requests, case)
               for case in test_corpus.RUN if case["kind"] in ("l4", "l7")]  # fmt: skip
    heard = Listening()
    monkeypatch.setattr(decide_module, "shared_engine", lambda: heard)
    for check, case in decided:
        check(case)
    opa = Answers(asked(server, list(heard.heard)))
    monkeypatch.setattr(decide_module, "shared_engine", lambda: opa)
    for check, case in decided:
        check(case)
    assert len(decided) >= 200 and len(heard.heard) >= 150


def test_a_disagreement_is_seen(server: Opa) -> None:
    """The comparison can fail: with one answer changed, the verdict is another."""
    heard = Listening()
    policy, identity, facts = next(
        (policy, identity, facts)
        for policy, identity, questions in World(1).pairs(200, 5)
        for facts, _ in questions
        if decide(facts, build_generation(policy, 1, identity)).allow
    )
    verdict = decide(facts, build_generation(policy, 1, identity, heard))
    known = asked(server, list(heard.heard))
    assert decide(facts, build_generation(policy, 1, identity, Answers(known))) == verdict
    question = next(iter(known))
    known[question] = known[question] | {"action": "deny", "reason_id": "endpoint_not_allowed"}
    assert decide(facts, build_generation(policy, 1, identity, Answers(known))) != verdict
