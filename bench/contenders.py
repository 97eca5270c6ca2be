"""Who is compared: no proxy, an asyncio-streams relay, stock mitmdump, and this supervisor.

Each starts itself with a load generator behind it and offers `order`. The supervisor is started through its console
script and the generator is its workload; mitmdump and the generator stand side by side on 127.0.0.1.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from pathlib import Path

from bench.lab import START_TIMEOUT_S, TUNNEL_HOST, Lab
from bench.measure import BenchError
from bench.processes import Child

BIN = Path(sys.executable).parent
POLL_S = 0.002


class Contender:
    """A load generator and what stands before it. `pid` is the process whose memory counts (None: nothing does)."""

    pid: int | None = None

    def __init__(self, generator: Child, *others: Child) -> None:
        self.generator = generator
        self._children = (generator, *others)

    def order(self, order: dict[str, object], timeout: float) -> dict[str, float]:
        """Let the generator do something; see bench/load.py."""
        return self.generator.order(order, timeout)

    def stop(self) -> None:
        """End all of it."""
        for child in self._children:
            child.stop()


def _generator(lab: Lab, name: str, *route: str) -> Child:
    child = Child((sys.executable, "-I", lab.file("load.py"), *route), log=lab.log(name))
    child.answer(START_TIMEOUT_S)
    return child


def direct(lab: Lab) -> Contender:
    """Straight at the upstream."""
    return Contender(_generator(lab, "direct-load", "direct", "127.0.0.1", str(lab.ca)))


def streams(lab: Lab) -> Contender:
    """Through the asyncio-streams relay (tunnels only)."""
    relay = Child((sys.executable, str(Path(__file__).parent / "streams_relay.py")), log=lab.log("streams"))
    port = relay.line(START_TIMEOUT_S)
    return Contender(_generator(lab, "streams-load", "proxy", f"127.0.0.1:{port}", str(lab.ca)), relay)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def spawn_mitmdump(lab: Lab, port: int, *, quiet: bool = False) -> Child:
    """Stock mitmdump with the allow-list; its CA is kept in the lab, so only the very first start makes one."""
    argv = [str(BIN / "mitmdump"), "--listen-host", "127.0.0.1", "--listen-port", str(port)]
    argv += ["-s", str(Path(__file__).parent / "allowlist_addon.py"), "--ignore-hosts", f"^{re.escape(TUNNEL_HOST)}:"]
    argv += ["--set", f"confdir={lab.file('mitmproxy')}", "--set", f"ssl_verify_upstream_trusted_ca={lab.ca}"]
    env = {"BENCH_ALLOW": str(lab.allow)}
    return Child(argv + ["-q"] * quiet, log=lab.log("mitmdump"), env=env, talks=False)


def until_accepting(child: Child, port: int) -> float:
    """Seconds from the spawn of `child` until 127.0.0.1:`port` accepts a connection."""
    end = child.spawned + START_TIMEOUT_S
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            time.sleep(POLL_S)
        else:
            return time.monotonic() - child.spawned
    raise BenchError(f"nothing accepts on port {port}; {child.last_words()}")


def mitmdump(lab: Lab, *, quiet: bool = False) -> Contender:
    """Through mitmdump: with its usual one line per request, or `quiet`."""
    port = free_port()
    child = spawn_mitmdump(lab, port, quiet=quiet)
    until_accepting(child, port)
    certificate = lab.file("mitmproxy/mitmproxy-ca-cert.pem")
    contender = Contender(_generator(lab, "mitmdump-load", "proxy", f"127.0.0.1:{port}", certificate), child)
    contender.pid = child.pid
    return contender


def spawn_supervisor(
    lab: Lab, mode: str, command: list[str], *, many: bool = False, status: str = "", more: tuple[str, ...] = ()
) -> Child:
    """`openshell-supervisor run … -- command`, as a user types it; `more` are further options (the last --policy counts)."""
    argv = [str(BIN / "openshell-supervisor"), "run", "--policy", str(lab.policy), "--network-mode", mode]
    argv += ["--upstream-ca", str(lab.ca), *lab.resolves(many=many)]
    argv += ["--status-file", status] if status else []
    argv += more
    return Child([*argv, "--", *command], log=lab.log(f"supervisor-{mode}"))


def supervisor(lab: Lab, mode: str, *, many: bool = False) -> tuple[Contender, str]:
    """The generator as workload; returns it with the rung that the status file names."""
    status = lab.file(f"status-{mode}.json")
    workload = [sys.executable, "-I", lab.file("load.py"), "env"]
    child = spawn_supervisor(lab, mode, workload, many=many, status=status)
    try:
        child.answer(START_TIMEOUT_S)
    except BenchError:
        child.stop()
        raise
    contender = Contender(child)
    contender.pid = child.pid
    return contender, str(json.loads(Path(status).read_text())["network_mode"]["rung"])
