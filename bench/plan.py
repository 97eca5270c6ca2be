"""How much to measure. Two sizes: the full run that fills docs/benchmarks.md, and the quick one for CI.

Every loop of the bench is bounded by a number from here, and the whole run by `budget_s`: a suite whose turn comes
after the budget is spent is left out and said so.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """Rounds, seconds and sizes. A *round* measures every contender once; medians are taken over rounds."""

    name: str
    startup_rounds: int
    load_rounds: int
    load_s: float
    """Seconds of one throughput sample."""
    tunnel_rounds: int
    tunnel_bytes: int
    decision_rounds: int
    decision_calls: int
    """Uncached decisions of one sample; cached ones are cheap, twenty times as many are made."""
    tls_hosts: int
    budget_s: float


FULL = Plan(
    name="full",
    startup_rounds=7,
    load_rounds=5,
    load_s=1.2,
    tunnel_rounds=5,
    tunnel_bytes=1024 * MIB,
    decision_rounds=5,
    decision_calls=200,
    tls_hosts=1000,
    budget_s=330.0,
)
QUICK = Plan(
    name="quick",
    startup_rounds=2,
    load_rounds=2,
    load_s=0.4,
    tunnel_rounds=2,
    tunnel_bytes=128 * MIB,
    decision_rounds=2,
    decision_calls=50,
    tls_hosts=60,
    budget_s=50.0,
)
