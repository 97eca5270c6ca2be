"""`python -m bench [--quick] [--only SUITE…]`: measure, print one table, write bench/results/<date>.json.

Exit status 0 when everything could be measured, whatever the targets say; 1 when something could not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench import callers, contenders, decisions, machine, memory, startup, throughput, tunnel
from bench.contenders import Contender
from bench.lab import Lab
from bench.measure import BenchError
from bench.plan import FULL, QUICK, Plan
from bench.rows import Row, table

RESULTS = Path(__file__).parent / "results"
SUITES = ("startup", "decisions", "callers", "throughput", "tunnel", "memory")


class Run:
    """One run: the lab, the contenders that are up, what they achieved, and what went wrong."""

    def __init__(self, lab: Lab, plan: Plan, stack: ExitStack) -> None:
        self.lab, self.plan, self._stack = lab, plan, stack
        self.rungs: dict[str, str] = {}
        self.problems: list[str] = []
        self._live: dict[str, Contender] = {}

    def _supervisor(self, mode: str, *, many: bool = False) -> Contender:
        contender, self.rungs[mode] = contenders.supervisor(self.lab, mode, many=many)
        return contender

    def _live_contenders(self, names: tuple[str, ...]) -> dict[str, Contender]:
        """The named ones, started at most once per run; one that does not start is a problem, not an end."""
        starts: dict[str, Callable[[], Contender]] = {
            "auto": lambda: self._supervisor("auto"),
            "host": lambda: self._supervisor("host"),
            "mitmdump": lambda: contenders.mitmdump(self.lab),
            "mitmdump -q": lambda: contenders.mitmdump(self.lab, quiet=True),
            "streams": lambda: contenders.streams(self.lab),
            "direct": lambda: contenders.direct(self.lab),
        }
        for name in names:
            if name not in self._live:
                try:
                    self._live[name] = starts[name]()
                except BenchError as error:
                    self.problems.append(f"{name} did not start: {error}")
                else:
                    self._stack.callback(self._live[name].stop)
        return {name: self._live[name] for name in names if name in self._live}

    def suite(self, name: str) -> list[Row]:
        """The rows of one suite."""
        if name == "startup":
            return startup.measure(self.lab, self.plan)
        if name == "decisions":
            return decisions.measure(self.plan)
        if name == "callers":
            return callers.measure(self.plan)
        if name == "throughput":
            live = self._live_contenders(("auto", "host", "mitmdump", "mitmdump -q", "direct"))
            return throughput.measure(self.lab, self.plan, live)
        if name == "tunnel":
            live = self._live_contenders(("auto", "host", "mitmdump", "streams", "direct"))
            return tunnel.measure(self.lab, self.plan, live)
        starts: dict[str, Callable[[], Contender]] = {
            "host": lambda: self._supervisor("host", many=True),
            "mitmdump": lambda: contenders.mitmdump(self.lab),
        }
        return memory.measure(self.lab, self.plan, starts)


def _run(plan: Plan, suites: list[str]) -> tuple[list[Row], Run]:
    begin = time.monotonic()
    rows: list[Row] = []
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(plan.tls_hosts))
        run = Run(lab, plan, stack)
        for name in suites:
            spent = time.monotonic() - begin
            if spent > plan.budget_s:
                run.problems.append(f"suite {name} left out: {spent:.0f} s of {plan.budget_s:.0f} s are spent")
                continue
            print(f"bench: {name} …", file=sys.stderr, flush=True)
            try:
                rows += run.suite(name)
            except BenchError as error:
                run.problems.append(f"suite {name}: {error}")
    return rows, run


def main() -> int:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="CI size: under a minute, medians of two rounds")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES), help="these suites only")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    facts, begin = machine.facts(), time.monotonic()
    rows, run = _run(plan, arguments.only)
    problems = run.problems + [row.failure for row in rows if row.failure]
    now = datetime.datetime.now(datetime.UTC)
    report = {
        "date": now.isoformat(timespec="seconds"),
        "plan": plan.name,
        "seconds": round(time.monotonic() - begin, 1),
        "machine": facts,
        "rungs": run.rungs,
        "rows": [row.as_json() for row in rows],
        "problems": problems,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%dT%H%M%SZ}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(table(rows))
    print(f"\nrungs: {run.rungs}; {report['seconds']} s; written to bench/results/{path.name}")
    for problem in dict.fromkeys(problems):
        print(f"problem: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
