"""What a thousand policies cost to load and to keep, and whether deciding leaves anything behind.

Measured in a process of its own, so that neither the bench nor another policy is in the numbers: `python -m bench.policy_load
POLICIES DECISIONS` prints them as one line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.measure import BenchError
from bench.memory import resident
from bench.plan import Plan
from bench.rows import Row, Target

POLICIES = 1000
DECISIONS_PER_CALL = 5000
"""The full plan's 200 calls come to a million decisions, the quick one's 50 to a quarter of that."""
NEW_EVERY = 100
"""One decision in so many is about facts never seen: enough to turn the whole memory of verdicts over more than once."""
TIMEOUT_S = 240.0
LOAD = Target("<= 1 s", 1.0)
MEMORY = Target("<= 30 MiB", 30.0)
GROWTH = Target("<= 2 MiB", 2.0)
"""None is wanted; the kernel counts in pages and the allocator keeps some that are free."""


def measure(plan: Plan) -> list[Row]:
    """Rows for loading, memory and growth; the median of the plan's rounds for the time, one process for each."""
    decisions = plan.decision_calls * DECISIONS_PER_CALL
    found = [_child(POLICIES, 0) for _ in range(plan.decision_rounds - 1)] + [_child(POLICIES, decisions)]

    def row(metric: str, key: str, unit: str, target: Target | None, note: str = "") -> Row:
        values = sorted(one[key] for one in found if key in one)
        middle = values[len(values) // 2]
        judged = middle if target else None
        return Row(metric, unit, {"host": middle}, judged, target, note, spread={"host": (values[0], values[-1])})

    return [
        row(f"load {POLICIES} policies from YAML", "yaml_s", "s", LOAD, f"{found[0]['yaml_bytes'] / 1024:,.0f} KiB"),
        row(
            f"load {POLICIES} policies from protobuf",
            "proto_s",
            "s",
            LOAD,
            f"{found[0]['proto_bytes'] / 1024:,.0f} KiB",
        ),
        row(f"memory of {POLICIES} policies", "memory_mib", "MiB", MEMORY, "after loading, beside one policy"),
        row(f"growth over {decisions:,} decisions", "growth_mib", "MiB", GROWTH, f"1 in {NEW_EVERY} new"),
    ]


def _child(policies: int, decisions: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.policy_load", str(policies), str(decisions)]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        return {str(key): float(value) for key, value in json.loads(done.stdout).items()}
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise BenchError(f"loading policies was not measured: {detail.strip().splitlines()[-1]}") from error


def _here(policies: int, decisions: int) -> dict[str, float]:
    """The numbers, in this process."""
    from bench.decisions import Decider
    from bench.questions import policy_text
    from openshell_supervisor.policy import yaml_file
    from openshell_supervisor.policy._generated import sandbox_pb2
    from openshell_supervisor.policy.proto import load_message, to_proto
    from openshell_supervisor.verdict.decide import VERDICTS_KEPT, build_generation

    Decider(1).uncached(10)  # the engine and every module are there before the first number
    text = policy_text(policies)
    found: dict[str, float] = {"yaml_bytes": len(text)}
    gc.collect()
    before = resident(os.getpid())["RSS"]
    begin = time.perf_counter()
    policy = yaml_file.parse(text, "bench").policy
    generation = build_generation(policy, 1)
    found["yaml_s"] = time.perf_counter() - begin
    gc.collect()
    found["memory_mib"] = resident(os.getpid())["RSS"] - before
    message = to_proto(policy).SerializeToString()
    found["proto_bytes"] = len(message)
    begin = time.perf_counter()
    build_generation(load_message(sandbox_pb2.SandboxPolicy.FromString(message), "bench").policy, 2)
    found["proto_s"] = time.perf_counter() - begin
    if decisions:
        decider = Decider(policies, generation)
        decider.mixed(VERDICTS_KEPT * 2, 2)  # every question that is kept takes two places: the memory is full now
        gc.collect()
        full = resident(os.getpid())["RSS"]
        decider.mixed(decisions, NEW_EVERY)
        gc.collect()
        found["growth_mib"] = resident(os.getpid())["RSS"] - full
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_here(int(sys.argv[1]), int(sys.argv[2]))) + "\n")
