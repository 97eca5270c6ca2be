"""How long until the workload runs, and until its first proxied response. Both sides from the spawn on, per round."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from bench.contenders import free_port, spawn_mitmdump, spawn_supervisor, until_accepting
from bench.lab import PLAIN_HOST, START_TIMEOUT_S, Lab
from bench.measure import Sample, Samples, difference, interleave, medians, ratio, spread
from bench.plan import Plan
from bench.processes import Child
from bench.rows import OURS, Row, Target

KEY = "ms"
INSTRUCTION = Target("<= 0.3 x mitmdump accepting", 0.3)
RESPONSE = Target("<= 0.9 x mitmdump", 0.9)
SELF_PROBE = Target("<= 60 ms", 60.0)


def _first_line(child: Child) -> Sample:
    """Milliseconds from the spawn to the first line on the child's standard output."""
    try:
        child.line(START_TIMEOUT_S)
        return {KEY: (time.monotonic() - child.spawned) * 1e3}
    finally:
        child.stop()


def _accepting(lab: Lab) -> Sample:
    port = free_port()
    child = spawn_mitmdump(lab, port)
    try:
        return {KEY: until_accepting(child, port) * 1e3}
    finally:
        child.stop()


def _url(lab: Lab) -> str:
    return f"http://{PLAIN_HOST}:{lab.ports['http']}/v1/items"


def _client(lab: Lab, proxy: str) -> list[str]:
    """The same client for all: a bare interpreter and one socket."""
    return [sys.executable, "-I", "-S", lab.file("first.py"), proxy, _url(lab)]


def _mitmdump_response(lab: Lab) -> Sample:
    """mitmdump and its client are spawned together; the client retries until it is accepted."""
    port = free_port()
    proxy = spawn_mitmdump(lab, port)
    try:
        client = Child(_client(lab, f"127.0.0.1:{port}"), log=lab.log("first"))
        client.spawned = proxy.spawned
        return _first_line(client)
    finally:
        proxy.stop()


def _instructions(lab: Lab, plan: Plan) -> tuple[Samples, list[str]]:
    command = ["/bin/echo", "first"]
    starts: dict[str, Callable[[], Sample]] = {
        "mitmdump": lambda: _accepting(lab),
        "auto": lambda: _first_line(spawn_supervisor(lab, "auto", command)),
        "host": lambda: _first_line(spawn_supervisor(lab, "host", command)),
        "direct": lambda: _first_line(Child(command, log=lab.log("echo"))),
    }
    return interleave(list(starts), lambda name: starts[name](), plan.startup_rounds)


def _responses(lab: Lab, plan: Plan) -> tuple[Samples, list[str]]:
    starts: dict[str, Callable[[], Sample]] = {
        "mitmdump": lambda: _mitmdump_response(lab),
        "auto": lambda: _first_line(spawn_supervisor(lab, "auto", _client(lab, "env"))),
        "host": lambda: _first_line(spawn_supervisor(lab, "host", _client(lab, "env"))),
    }
    return interleave(list(starts), lambda name: starts[name](), plan.startup_rounds)


def _ends(lab: Lab, plan: Plan) -> Row:
    """From the spawn until everything is gone again, for a workload that does nothing."""

    def sample(name: str) -> Sample:
        child = Child(["/bin/true"], log=lab.log("true")) if name == "direct" else spawn_supervisor(lab, name, ["true"])
        return {KEY: child.ended(START_TIMEOUT_S) * 1e3}

    samples, failures = interleave([*OURS, "direct"], sample, plan.startup_rounds)
    failure = "; ".join(failures)
    return Row("start to end of `true`", KEY, medians(samples, KEY), failure=failure, spread=spread(samples, KEY))


def _confinement(lab: Lab, plan: Plan) -> list[Row]:
    """What the layers beside the network add to the first instruction, and what trying them from inside does (in `auto`)."""
    policy = ("--policy", str(lab.confining))
    options = {
        "all layers": policy,
        "unprobed": (*policy, "--no-self-probe"),
        "network alone": (*policy, "--no-self-probe", "--declare-external", "filesystem,syscalls,supervisor_syscalls"),
    }
    command = ["/bin/echo", "first"]

    def start(name: str) -> Sample:
        return _first_line(spawn_supervisor(lab, "auto", command, more=options[name]))

    samples, failures = interleave(list(options), start, plan.startup_rounds)
    failure = "; ".join(failures)
    rows = []
    for metric, name, without, target in (
        ("start: cost of the self-probe", "all layers", "unprobed", SELF_PROBE),
        ("start: cost of all layers but the network", "all layers", "network alone", None),
    ):
        cost = difference(samples, name, without, KEY)
        rows.append(Row(metric, KEY, {} if cost is None else {"auto": cost}, cost, target, failure=failure))
    return rows


def measure(lab: Lab, plan: Plan) -> list[Row]:
    """Two metrics with a row per mode of ours, the length of the shortest run, and what confinement costs."""
    # Once unmeasured, for everybody: byte code is compiled, the page cache filled, and mitmdump's CA made.
    _accepting(lab)
    for mode in OURS:
        spawn_supervisor(lab, mode, ["/bin/echo", "first"]).ended(START_TIMEOUT_S)
    rows = []
    for name, (samples, failures), target in (
        ("start to first instruction", _instructions(lab, plan), INSTRUCTION),
        ("start to first proxied response", _responses(lab, plan), RESPONSE),
    ):
        failure = "; ".join(failures)
        for mode in OURS:
            values = {key: value for key, value in medians(samples, KEY).items() if key == mode or key not in OURS}
            judged = ratio(samples, mode, "mitmdump", KEY)
            rows.append(
                Row(f"{name} ({mode})", KEY, values, judged, target, failure=failure, spread=spread(samples, KEY))
            )
    return [*rows, _ends(lab, plan), *_confinement(lab, plan)]
