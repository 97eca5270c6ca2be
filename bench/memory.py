"""Resident memory of the process that carries the traffic: idle, after one request, after a thousand TLS hosts.

The workload's own memory does not count. RSS is what `ps` shows; PSS divides shared pages among their users.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from bench.contenders import Contender
from bench.lab import MANY_HOSTS, Lab
from bench.measure import BenchError
from bench.plan import Plan
from bench.rows import OURS, Row, Target

SETTLE_S = 2.0
"""After the start: by then a proxy that loads itself in the background has done so."""
ANSWER_TIMEOUT_S = 120.0
IDLE = Target("<= 100 MiB", 100.0)
FIELDS = {"Rss": "RSS", "Pss": "PSS"}


def resident(pid: int) -> dict[str, float]:
    """RSS and PSS of one process in MiB, from /proc/PID/smaps_rollup (proc(5)).

    The supervisor hides its memory map from its own user (PR_SET_DUMPABLE): then this needs root, and says so.
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError as error:
        raise BenchError(f"the memory of process {pid} cannot be read: {error.strerror}; run as root") from error
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in FIELDS:
            found[FIELDS[name]] = int(value.split()[0]) / 1024
    return found


def _life(contender: Contender, lab: Lab) -> dict[str, float]:
    """Memory at three moments and the time of one new host, of a freshly started contender."""
    assert contender.pid is not None
    time.sleep(SETTLE_S)
    values = {f"idle {name}": value for name, value in resident(contender.pid).items()}
    order: dict[str, object] = {"do": "hosts", "pattern": MANY_HOSTS, "port": lab.ports["https"]}
    contender.order({**order, "count": 1}, ANSWER_TIMEOUT_S)
    values |= {f"used {name}": value for name, value in resident(contender.pid).items()}
    answer = contender.order({**order, "count": lab.tls_hosts}, ANSWER_TIMEOUT_S)
    values |= {f"loaded {name}": value for name, value in resident(contender.pid).items()}
    return values | {"ms": answer["ms"]}


def measure(lab: Lab, plan: Plan, starts: dict[str, Callable[[], Contender]]) -> list[Row]:
    """Memory rows, and the cost of a TLS connection to a host never seen before."""
    found: dict[str, dict[str, float]] = {}
    failures = []
    for name, start in starts.items():
        try:
            contender = start()
            try:
                found[name] = _life(contender, lab)
            finally:
                contender.stop()
        except BenchError as error:
            failures.append(f"{name}: {error}")
    failure = "; ".join(failures)

    def row(metric: str, key: str, unit: str, *, judged: bool = False) -> Row:
        values = {name: life[key] for name, life in found.items() if key in life}
        worst = max((values[name] for name in OURS if name in values), default=None)
        return Row(metric, unit, values, worst if judged else None, IDLE if judged else None, failure=failure)

    many = f"after {plan.tls_hosts} TLS hosts"
    return [
        row("memory idle, RSS", "idle RSS", "MiB", judged=True),
        row("memory idle, PSS", "idle PSS", "MiB"),
        row("memory after one request, RSS", "used RSS", "MiB"),
        row(f"memory {many}, RSS", "loaded RSS", "MiB"),
        row(f"memory {many}, PSS", "loaded PSS", "MiB"),
        row("new TLS host, CONNECT to response", "ms", "ms"),
    ]
