"""Gigabytes per second through an opaque tunnel: what `splice` is worth beside an asyncio-streams relay."""

from __future__ import annotations

from bench.contenders import Contender
from bench.lab import TUNNEL_HOST, Lab
from bench.measure import interleave, medians, ratio, spread
from bench.plan import MIB, Plan
from bench.rows import OURS, Row, Target

ANSWER_TIMEOUT_S = 60.0
TARGET = Target(">= 2 x asyncio streams", 2.0, at_least=True)
KEY = "gb_s"
SLOW_SHARE = 8
"""mitmdump moves a tenth of what the others do: it gets an eighth of the bytes, so that the run stays short."""


def measure(lab: Lab, plan: Plan, contenders: dict[str, Contender]) -> list[Row]:
    """One row per mode of ours."""

    def fetch(name: str) -> dict[str, float]:
        size = plan.tunnel_bytes // (SLOW_SHARE if name.startswith("mitmdump") else 1)
        order = {"do": "bulk", "host": TUNNEL_HOST, "port": lab.ports["bulk"], "bytes": max(size, MIB)}
        return contenders[name].order(order, ANSWER_TIMEOUT_S)

    samples, failures = interleave(list(contenders), fetch, plan.tunnel_rounds)
    rows = []
    for mode in OURS:
        values = {key: value for key, value in medians(samples, KEY).items() if key == mode or key not in OURS}
        judged = ratio(samples, mode, "streams", KEY)
        failure = "; ".join(failures)
        rows.append(
            Row(f"opaque tunnel ({mode})", "GB/s", values, judged, TARGET, failure=failure, spread=spread(samples, KEY))
        )
    return rows
