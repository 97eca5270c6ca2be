"""Keep-alive requests per second and their latencies, plain and TLS-terminated, at 1 and 16 connections."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench.contenders import Contender
from bench.lab import PLAIN_HOST, TLS_HOST, Lab
from bench.measure import Sample, Samples, interleave, medians, ratio, spread
from bench.plan import Plan
from bench.rows import OURS, Row, Target

CONNECTIONS = (1, 16)
ANSWER_TIMEOUT_S = 40.0
WARM_S = 0.2
RATE = Target(">= 2 x mitmdump", 2.0, at_least=True)
PEER = "mitmdump"


def _order(lab: Lab, scheme: str, connections: int, seconds: float, *, fresh: bool = False) -> dict[str, object]:
    host = TLS_HOST if scheme == "https" else PLAIN_HOST
    return {
        "do": "requests",
        "scheme": scheme,
        "host": host,
        "port": lab.ports[scheme],
        "connections": connections,
        "seconds": seconds,
        "fresh_paths": fresh,
    }


def _rows(label: str, samples: Samples, failures: list[str]) -> list[Row]:
    """The rate, judged per mode of ours, the latencies, and how busy the generator was."""
    failure = "; ".join(failures)
    rows = []
    for mode in OURS:
        values = {key: value for key, value in medians(samples, "rate").items() if key == mode or key not in OURS}
        judged = ratio(samples, mode, PEER, "rate")
        rows.append(
            Row(f"{label} ({mode})", "req/s", values, judged, RATE, failure=failure, spread=spread(samples, "rate"))
        )
    for key in ("p50_ms", "p99_ms"):
        rows.append(Row(f"{label} {key[:3]}", "ms", medians(samples, key), spread=spread(samples, key)))
    rows.append(Row(f"{label} generator", "cpu", medians(samples, "generator_cpu")))
    return rows


def _uncached(lab: Lab, plan: Plan, contenders: dict[str, Contender], sample: Callable[..., Sample]) -> Row:
    """Every request for a path never asked before, so that no verdict comes from a cache. No target: said for truth."""
    order = _order(lab, "http", CONNECTIONS[-1], plan.load_s, fresh=True)
    samples, failures = interleave(list(contenders), partial(sample, order=order), plan.load_rounds)
    name = f"plain, {CONNECTIONS[-1]} conn., every path new"
    return Row(name, "req/s", medians(samples, "rate"), failure="; ".join(failures), spread=spread(samples, "rate"))


def measure(lab: Lab, plan: Plan, contenders: dict[str, Contender]) -> list[Row]:
    """Every scheme at every number of connections, each after a short unmeasured warm-up."""

    def sample(name: str, order: dict[str, object]) -> Sample:
        return contenders[name].order(order, ANSWER_TIMEOUT_S)

    rows = []
    for scheme in ("http", "https"):
        for connections in CONNECTIONS:
            warm = _order(lab, scheme, connections, WARM_S)
            interleave(list(contenders), partial(sample, order=warm), 1)
            order = _order(lab, scheme, connections, plan.load_s)
            samples, failures = interleave(list(contenders), partial(sample, order=order), plan.load_rounds)
            rows += _rows(f"{'plain' if scheme == 'http' else 'TLS'}, {connections} conn.", samples, failures)
    return [*rows, _uncached(lab, plan, contenders, sample)]
