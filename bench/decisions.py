"""Decisions per second: `verdict.decide` in this process, cached and uncached, at 1 to 5000 policies, on the embedded engine.

The suite that imports the product. Every tenth policy is a wildcard, the others are exact hosts, all with a REST
rule. An uncached decision is about a name under some wildcard and a path that were never asked before, so that both
questions, the connection's and the request's, are evaluated at every size; a cached one repeats. Counted is the processor time of
the thread: a decision waits for nothing, and what else runs on the machine is not its cost.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bench import policy_load
from bench.measure import BenchError, Sample, interleave, median, ratio, spread
from bench.plan import Plan
from bench.rows import Row, Target

if TYPE_CHECKING:
    from openshell_supervisor.verdict.decide import Generation
    from openshell_supervisor.verdict.facts import Facts

SIZES = (1, 10, 100, 1000, 5000)
CACHED_FACTOR = 20
DISTINCT = 32
WILDCARD_EVERY = 10
CACHED = Target("<= 20 us", 20.0)
UNCACHED = Target("<= 2000 us", 2000.0)
FLAT_FROM, FLAT_TO = "10", "5000"
FLAT = Target("<= 1.5 x", 1.5)
KEY = "us"


def policy_text(size: int) -> str:
    """A policy with `size` rules, as YAML."""
    rules = []
    for number in range(size):
        host = f"*.zone{number}.bench.example" if number % WILDCARD_EVERY == 0 else f"host{number}.bench.example"
        rules.append(
            f'  rule{number}:\n    endpoints: [{{host: "{host}", port: 443, protocol: rest, enforcement: enforce, '
            f'rules: [{{allow: {{method: GET, path: "/v1/**"}}}}]}}]\n    binaries: [{{path: "/**"}}]\n'
        )
    return "version: 1\nnetwork_policies:\n" + "".join(rules)


def asked_host(number: int, size: int) -> str:
    """A name that was not asked before, under one of the wildcards of a policy with `size` rules."""
    wildcards = -(-size // WILDCARD_EVERY)
    return f"n{number}.zone{number % wildcards * WILDCARD_EVERY}.bench.example"


class Decider:
    """One policy generation and an endless supply of questions for it. A generation on another engine may be given."""

    def __init__(self, size: int, generation: Generation | None = None) -> None:
        from openshell_supervisor.policy import yaml_file
        from openshell_supervisor.verdict.decide import build_generation, decide
        from openshell_supervisor.verdict.facts import Facts, Request

        self._decide, self._facts, self._request = decide, Facts, Request
        self._generation = generation or build_generation(yaml_file.parse(policy_text(size), "bench").policy, 1)
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
        begin = time.thread_time()
        for question in questions:
            self._ask(question)
        return {KEY: (time.thread_time() - begin) / calls * 1e6}

    def cached(self, calls: int) -> Sample:
        """Microseconds of one decision out of 32 that were all asked before, in equal words but not the same objects."""
        first = self._asked + 1
        for _ in range(DISTINCT):
            self._ask(self._question())
        questions = [self._facts_of(first + number % DISTINCT) for number in range(calls)]
        begin = time.thread_time()
        for question in questions:
            self._ask(question)
        return {KEY: (time.thread_time() - begin) / calls * 1e6}

    def mixed(self, calls: int, new_every: int) -> None:
        """`calls` decisions, one in `new_every` about facts never asked, the others about the same few."""
        usual = [self._question() for _ in range(DISTINCT)]
        for number in range(calls):
            self._ask(usual[number % DISTINCT] if number % new_every else self._question())


def _rows(kind: str, deciders: dict[str, Decider], rounds: int, calls: int) -> list[Row]:
    """A row per size; for uncached decisions one more that says how flat they are."""

    def sample(name: str) -> Sample:
        decider = deciders[name]
        return decider.cached(calls) if kind == "cached" else decider.uncached(calls)

    samples, _ = interleave(list(deciders), sample, rounds)
    rows = []
    for name in deciders:
        cost, bounds = median(samples[name], KEY), {"host": spread(samples, KEY)[name]}
        target = CACHED if kind == "cached" else UNCACHED
        note = f"{1e6 / cost:,.0f} decisions/s"
        rows.append(Row(f"decision {kind}, {name} policies", KEY, {"host": cost}, cost, target, note, spread=bounds))
    if kind == "uncached":
        times = ratio(samples, FLAT_TO, FLAT_FROM, KEY)
        values = {} if times is None else {"host": times}
        rows.append(Row(f"decision uncached, {FLAT_TO} against {FLAT_FROM} policies", "x", values, times, FLAT))
    return rows


def measure(plan: Plan) -> list[Row]:
    """A row per size, cached and uncached; then loading and memory."""
    deciders = {str(size): Decider(size) for size in SIZES}
    cached = _rows("cached", deciders, plan.decision_rounds, plan.decision_calls * CACHED_FACTOR)
    uncached = _rows("uncached", deciders, plan.decision_rounds, plan.decision_calls)
    return cached + uncached + policy_load.measure(plan)
