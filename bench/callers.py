"""What it costs to know who asks: one lookup of a new connection, among 200 processes, in this process.

The lookup is the product's whole one (socket, every process's descriptors, program, hash from memory, ancestors, the second
look). Each connection is looked up once, as the proxy does; the programs' hashes are known after the first. It never waits, so
the processor time of its thread is what it takes on an idle machine, and what is measured: other work here does not count.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from contextlib import ExitStack

from bench.measure import BenchError, Sample, interleave, median, spread
from bench.plan import Plan
from bench.rows import Row, Target

PROCESSES = 200
CONNECTIONS = 16
"""Of one caller in a sample; each is looked up once."""
TARGET = Target("<= 3 ms", 3.0)
KEY = "ms"
NETLINK_SOCK_DIAG = 4  # include/uapi/linux/netlink.h


def _crowd(stack: ExitStack) -> None:
    """Processes that have nothing to do with it, as many as a busy sandbox has."""
    for _ in range(PROCESSES):
        process = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)


def measure(plan: Plan) -> list[Row]:
    """One row per table that can be asked."""
    from openshell_supervisor.callers.lookup import Identifier
    from openshell_supervisor.callers.tables import ProcTable, SocketDiagnostics, Table

    with ExitStack() as stack:
        _crowd(stack)
        tables: dict[str, Table] = {"proc": ProcTable(os.getpid())}
        try:
            netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
            tables["sock_diag"] = SocketDiagnostics(netlink)
        except OSError:
            pass  # then the row says that it was not measured
        for table in tables.values():
            stack.callback(table.close)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS))
        code = "import socket,sys\nkept=[]\nfor line in sys.stdin: kept.append(socket.create_connection(('127.0.0.1',int(line))))"
        caller = subprocess.Popen(["python3", "-I", "-S", "-c", code], stdin=subprocess.PIPE)
        stack.callback(caller.wait)
        stack.callback(caller.kill)
        identifiers = {name: Identifier(table, os.getpid()) for name, table in tables.items()}

        def sample(name: str) -> Sample:
            assert caller.stdin is not None
            port = listener.getsockname()[1]
            caller.stdin.write(f"{port}\n".encode() * CONNECTIONS)
            caller.stdin.flush()
            spent = []
            for _ in range(CONNECTIONS):
                connection, peer = listener.accept()
                with connection:
                    begin = time.thread_time()
                    found = identifiers[name].identify(peer, connection.getsockname())
                    spent.append((time.thread_time() - begin) * 1e3)
                if found.problem or found.pid != caller.pid:
                    raise BenchError(f"the caller was not told: {found}")
            return {KEY: sorted(spent)[CONNECTIONS // 2]}

        samples, _ = interleave(list(tables), sample, plan.decision_rounds + 1)
    rows = []
    for name in ("sock_diag", "proc"):
        label = f"who asks, new connection, {PROCESSES} processes ({name})"
        if name not in samples:
            rows.append(Row(label, KEY, {}, target=TARGET, failure=f"{label}: no such socket here"))
            continue
        cost = median(samples[name], KEY)
        bounds = {"host": spread(samples, KEY)[name]}
        if name == "proc":  # what is asked where there is no sock_diag; the kernel walks its whole table for it
            rows.append(Row(label, KEY, {"host": cost}, note="fallback", spread=bounds))
        else:
            rows.append(Row(label, KEY, {"host": cost}, cost, TARGET, spread=bounds))
    return rows
