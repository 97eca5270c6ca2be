"""Decisions per second: `verdict.decide` in this process, cached and uncached, at 1 to 1000 policies.

The one suite that imports the product. Every tenth policy is a wildcard, the others are exact hosts, all with a REST
rule. An uncached decision is about a name under some wildcard and a path that were never asked before, so that both
questions, the connection's and the request's, are evaluated at every size; a cached one repeats.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bench.measure import BenchError, Sample, interleave, median, ratio, spread
from bench.plan import Plan
from bench.rows import Row, Target

if TYPE_CHECKING:
    from openshell_supervisor.verdict.facts import Facts

SIZES = (1, 10, 100, 1000)
CACHED_FACTOR = 20
DISTINCT = 32
WILDCARD_EVERY = 10
CACHED = Target("<= 20 us", 20.0)
UNCACHED = Target("<= 1.5 x at 10", 1.5)
KEY = "us"


def policy_text(size: int) -> str:
    """A policy with `size` rules, as YAML."""
    rules = []
    for number in range(size):
        host = f"*.zone{number}.bench.example" if number % WILDCARD_EVERY == 0 else f"host{number}.bench.example"
        rules.append(
            f"  rule{number}:\n    name: rule{number}\n    endpoints:\n"
            f'      - {{host: "{host}", port: 443, protocol: rest, enforcement: enforce,\n'
            f'         rules: [{{allow: {{method: GET, path: "/v1/**"}}}}]}}\n'
            f'    binaries: [{{path: "/**"}}]\n'
        )
    return "version: 1\nnetwork_policies:\n" + "".join(rules)


def asked_host(number: int, size: int) -> str:
    """A name that was not asked before, under one of the wildcards of a policy with `size` rules."""
    wildcards = -(-size // WILDCARD_EVERY)
    return f"n{number}.zone{number % wildcards * WILDCARD_EVERY}.bench.example"


class Decider:
    """One policy generation and an endless supply of questions for it."""

    def __init__(self, size: int) -> None:
        from openshell_supervisor.policy import yaml_file
        from openshell_supervisor.verdict.decide import build_generation, decide
        from openshell_supervisor.verdict.facts import Facts, Request

        self._decide, self._facts, self._request = decide, Facts, Request
        self._generation = build_generation(yaml_file.parse(policy_text(size), "bench").policy, 1)
        self._size = size
        self._asked = 0
        self._ask(self._question())  # compiles the engine

    def _question(self) -> Facts:
        self._asked += 1
        return self._facts_of(self._asked)

    def _facts_of(self, number: int) -> Facts:
        request = self._request(method="GET", path=f"/v1/items/{number}")
        host = asked_host(number, self._size)
        return self._facts(host=host, port=443, binary="/usr/bin/curl", request=request)

    def _ask(self, question: Facts) -> None:
        verdict = self._decide(question, self._generation)
        if not verdict.allow:
            raise BenchError(f"a decision that must allow was {verdict.reason_id}: {verdict.reason}")

    def uncached(self, calls: int) -> Sample:
        """Microseconds of one decision, each asked for the first time."""
        questions = [self._question() for _ in range(calls)]
        begin = time.perf_counter()
        for question in questions:
            self._ask(question)
        return {KEY: (time.perf_counter() - begin) / calls * 1e6}

    def cached(self, calls: int) -> Sample:
        """Microseconds of one decision out of 32 that were all asked before, in equal words but not the same objects."""
        first = self._asked + 1
        for _ in range(DISTINCT):
            self._ask(self._question())
        questions = [self._facts_of(first + number % DISTINCT) for number in range(calls)]
        begin = time.perf_counter()
        for question in questions:
            self._ask(question)
        return {KEY: (time.perf_counter() - begin) / calls * 1e6}


def _rows(kind: str, deciders: dict[str, Decider], rounds: int, calls: int) -> list[Row]:
    """A row per size; every cached row is judged, of the uncached ones the largest."""

    def sample(name: str) -> Sample:
        decider = deciders[name]
        return decider.cached(calls) if kind == "cached" else decider.uncached(calls)

    samples, _ = interleave(list(deciders), sample, rounds)
    rows = []
    for name in deciders:
        cost, bounds = median(samples[name], KEY), {"host": spread(samples, KEY)[name]}
        judged, target = (cost, CACHED) if kind == "cached" else (None, None)
        if kind == "uncached" and name == str(SIZES[-1]):
            judged, target = ratio(samples, name, "10", KEY), UNCACHED
        note = f"{1e6 / cost:,.0f} decisions/s"
        rows.append(Row(f"decision {kind}, {name} policies", KEY, {"host": cost}, judged, target, note, spread=bounds))
    return rows


def measure(plan: Plan) -> list[Row]:
    """A row per size, cached and uncached."""
    deciders = {str(size): Decider(size) for size in SIZES}
    cached = _rows("cached", deciders, plan.decision_rounds, plan.decision_calls * CACHED_FACTOR)
    return cached + _rows("uncached", deciders, plan.decision_rounds, plan.decision_calls)
