"""Decisions per second: `verdict.decide` in this process, cached and uncached, at 1 to 5000 policies, on both engines.

The suite that imports the product. An uncached decision is about a name under some wildcard and a path that were never asked
before, so that both questions, the connection's and the request's, are evaluated at every size; a cached one repeats. Counted
is the processor time of the thread: a decision waits for nothing, and what else runs on the machine is not its cost. Only an
uncached one of the OPA server waits, for the server, and is taken on the clock.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from bench import opa, policy_load
from bench.measure import BenchError, Sample, interleave, median, ratio, spread
from bench.plan import Plan
from bench.questions import DISTINCT, Questions, allowed, policy_of
from bench.rows import Row, Target

if TYPE_CHECKING:
    from openshell_supervisor.verdict.decide import Generation
    from openshell_supervisor.verdict.facts import Facts

SIZES = (1, 10, 100, 1000, 5000)
CACHED_FACTOR = 20
CACHED = Target("<= 20 us", 20.0)
UNCACHED = Target("<= 2000 us", 2000.0)
FLAT_FROM, FLAT_TO = 10, 5000
FLAT = Target("<= 1.5 x", 1.5)
KEY = "us"
EMBEDDED, OPA = "", ", OPA"
"""The two engines, as they end the name of a contender and of its row."""
NO_OPA = "not measured: no OPA"


class Decider:
    """One policy generation on the embedded engine, and questions for it. The generation may be given."""

    def __init__(self, size: int, generation: Generation | None = None) -> None:
        from openshell_supervisor.verdict.decide import build_generation, decide

        self._decide = decide
        self._generation = generation or build_generation(policy_of(size), 1)
        self._questions = Questions(size)
        self._ask(self._questions.new())  # compiles the engine

    def _ask(self, question: Facts) -> None:
        allowed(self._decide(question, self._generation))

    def _timed(self, questions: list[Facts]) -> Sample:
        begin = time.thread_time()
        for question in questions:
            self._ask(question)
        return {KEY: (time.thread_time() - begin) / len(questions) * 1e6}

    def uncached(self, calls: int) -> Sample:
        """Microseconds of one decision, each asked for the first time."""
        return self._timed([self._questions.new() for _ in range(calls)])

    def cached(self, calls: int) -> Sample:
        """Microseconds of one decision out of 32 that were all asked before, in equal words but not the same objects."""
        for _ in range(DISTINCT):
            self._ask(self._questions.new())
        return self._timed(self._questions.again(calls))

    def mixed(self, calls: int, new_every: int) -> None:
        """`calls` decisions, one in `new_every` about facts never asked, the others about the same few."""
        usual = [self._questions.new() for _ in range(DISTINCT)]
        for number in range(calls):
            self._ask(usual[number % DISTINCT] if number % new_every else self._questions.new())


def _name(size: int, engine: str) -> str:
    return f"{size} policies{engine}"


def _row(kind: str, name: str, samples: dict[str, list[Sample]], target: Target | None) -> Row:
    """One size on one engine, from what was measured of it."""
    cost, bounds = median(samples[name], KEY), {"host": spread(samples, KEY)[name]}
    note = f"{1e6 / cost:,.0f} decisions/s"
    if "here" in samples[name][0]:
        note += f", {median(samples[name], 'here'):,.0f} us of each in this process"
    return Row(f"decision {kind}, {name}", KEY, {"host": cost}, cost if target else None, target, note, spread=bounds)


def _flat(samples: dict[str, list[Sample]], engine: str, note: str) -> Row:
    """How many times what it costs at 10 policies an uncached decision costs at 5000."""
    times = ratio(samples, _name(FLAT_TO, engine), _name(FLAT_FROM, engine), KEY)
    label = f"decision uncached, {FLAT_TO} against {FLAT_FROM} policies{engine}"
    values = {} if times is None else {"host": times}
    return Row(label, "x", values, times if engine == EMBEDDED else None, FLAT if engine == EMBEDDED else None, note)


def _rows(kind: str, deciders: dict[str, Decider | opa.OpaDecider], rounds: int, calls: int, no_opa: str) -> list[Row]:
    """A row per size and engine, all interleaved; for uncached decisions one more per engine that says how flat they are.

    `no_opa` is why a server that is there was not measured; with an empty text there is none, which is no failure.
    """

    def sample(name: str) -> Sample:
        decider = deciders[name]
        return decider.cached(calls) if kind == "cached" else decider.uncached(calls)

    samples, failures = interleave(list(deciders), sample, rounds)
    rows = []
    for engine in (EMBEDDED, OPA):
        target = CACHED if kind == "cached" else UNCACHED if engine == EMBEDDED else None
        note = ""
        for name in (_name(size, engine) for size in SIZES):
            if name in samples:
                rows.append(_row(kind, name, samples, target))
                continue
            failure = next((f"{kind}, {text}" for text in failures if text.startswith(f"{name}: ")), no_opa)
            note = "" if failure else NO_OPA
            rows.append(Row(f"decision {kind}, {name}", KEY, {}, None, target, note, failure))
        if kind == "uncached":
            rows.append(_flat(samples, engine, note))
    return rows


def measure(plan: Plan) -> list[Row]:
    """A row per size and engine, cached and uncached; then loading and memory."""
    deciders: dict[str, Decider | opa.OpaDecider] = {_name(size, EMBEDDED): Decider(size) for size in SIZES}
    no_opa = ""
    with ExitStack() as stack:
        executable = opa.program()
        if executable is not None:
            runner = stack.enter_context(asyncio.Runner())
            try:
                url = stack.enter_context(opa.server(executable))
            except BenchError as error:
                no_opa = str(error)
            else:
                deciders |= {_name(size, OPA): opa.OpaDecider(size, url, runner) for size in SIZES}
        rounds, calls = plan.decision_rounds, plan.decision_calls
        cached = _rows("cached", deciders, rounds, calls * CACHED_FACTOR, no_opa)
        uncached = _rows("uncached", deciders, rounds, calls, no_opa)
    return cached + uncached + policy_load.measure(plan)
