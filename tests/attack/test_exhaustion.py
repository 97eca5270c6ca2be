"""A workload that uses everything up: connections, descriptors, processes, patience. Boundary and exit code survive."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import arena
import product
import pytest

pytestmark = pytest.mark.root
PRELUDE = """
import os, resource, socket, sys, time
host, _, port = os.environ["HTTP_PROXY"].removeprefix("http://").partition(":")
address = (host, int(port))
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
def opened(count):
    held = []
    for _ in range(count):
        sock = socket.socket()
        sock.setblocking(False)
        try: sock.connect(address)
        except BlockingIOError: pass
        held.append(sock)
    return held
def verdict():
    with socket.create_connection(address, 10) as sock:
        sock.settimeout(15)
        sock.sendall(b"GET http://denied.test/ HTTP/1.1" + b"\\r\\nHost: denied.test\\r\\n\\r\\n")
        return sock.recv(12)
"""


@pytest.fixture
def sink() -> Iterator[int]:
    """The port of an upstream on loopback that accepts and stays silent."""
    import socket

    held = []
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)

    def serve() -> None:
        while True:
            try:
                held.append(listener.accept()[0])
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.close()
    for sock in held:
        sock.close()


def run(code: str, *options: str, policy: str = "", nofile: str = "1024:4096") -> product.Ran:
    """The product with a Python workload under a limit on descriptors."""
    return product.run(
        [sys.executable, "-I", "-c", PRELUDE + code],
        policy=policy or arena.POLICY.format(uid=arena.UID),
        options=options,
        wrap=lambda argv: ["prlimit", f"--nofile={nofile}", *argv],
        timeout=90,
    )


def test_three_thousand_connections() -> None:
    """3,000 idle connections: the proxy serves again once they are gone, and the exit code is the workload's."""
    ran = run("held = opened(3000); time.sleep(0.5)\nfor s in held: s.close()\nprint(verdict().decode()); sys.exit(7)")
    assert "HTTP/1.1 403" in ran.out, ran.err[-2000:]
    assert ran.code == 7
    assert "Traceback" not in ran.err


def test_slow_clients_do_not_stop_the_others() -> None:
    """200 clients that send a byte now and then hold no one else up."""
    code = (
        "held = opened(200); time.sleep(0.2)\n"
        "for part in (b'G', b'E', b'T', b' '):\n"
        "    for s in held: s.send(part)\n"
        "    time.sleep(0.05)\n"
        "start = time.monotonic(); print(verdict().decode(), time.monotonic() - start < 5)"
    )
    ran = run(code)
    assert "HTTP/1.1 403 True" in ran.out, ran.err[-2000:]


def test_descriptors_used_up_by_tunnels(sink: int) -> None:
    """600 tunnels that move bytes, under a limit that does not allow them: some fail, none leaks, the proxy recovers, and what
    holds them after the first process ended changes neither its code nor the clearing away."""
    policy = (
        arena.POLICY.format(uid=arena.UID).replace("network_policies: {}", "")
        + f"network_policies:\n  a:\n    name: a\n    endpoints:\n    - {{host: allowed.test, port: {sink}}}\n"
        + "    binaries: [{path: /**}]\n"
    )
    code = (
        "held = opened(600); time.sleep(0.5)\n"
        "for s in held:\n"
        "    s.setblocking(True); s.settimeout(5)\n"
        f"    s.sendall(b'CONNECT allowed.test:{sink} HTTP/1.1' + b'\\r\\nHost: a\\r\\n\\r\\n')\n"
        "time.sleep(2)\n"
        "for s in held:\n"
        "    try: s.sendall(b'x' * 100)\n"
        "    except OSError: pass\n"
        "time.sleep(0.5)\n"
        "for s in held[:560]: s.close()\n"
        "print(verdict().decode(), flush=True)\n"
        "if os.fork() == 0:\n"
        "    os.setsid(); time.sleep(30); os._exit(0)\n"
        "sys.exit(5)"
    )
    ran = run(code, "--resolve", "allowed.test=127.0.0.1", policy=policy, nofile="700:700")
    assert "HTTP/1.1 403" in ran.out, ran.err[-2000:]
    assert ran.code == 5
    assert "Traceback" not in ran.err


def test_no_descriptor_left_at_the_end() -> None:
    """Idle connections up to the supervisor's limit, held by children that outlive the first process."""
    code = (
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid(); held = opened(250); time.sleep(30); os._exit(0)\n"
        "time.sleep(1); sys.exit(6)"
    )
    ran = run(code, nofile="300:300")
    assert ran.code == 6, ran.err[-2000:]
    assert "Traceback" not in ran.err


def test_a_bounded_fork_bomb_is_cleared_away() -> None:
    """200 processes in 200 sessions, all ignoring SIGTERM, are gone with the first one."""
    marker = "fork bomb of tests/attack"
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"marker = {marker!r}\n"
        "for _ in range(200):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid(); time.sleep(30); os._exit(0)\n"
        "sys.exit(4)"
    )
    ran = run(code)
    assert ran.code == 4, ran.err[-2000:]
    import pathlib

    left = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"marker = {marker!r}".encode() in (entry / "cmdline").read_bytes():
                left.append(entry.name)
        except OSError:
            continue
    assert left == []


def test_a_full_process_table_does_not_lose_the_exit_code() -> None:
    """Without room for one more thread or process of the supervisor's user, the end is still orderly."""
    code = "sys.exit(3)"
    ran = product.run(
        [
            sys.executable,
            "-I",
            "-c",
            PRELUDE + "\nfor _ in range(150):\n    try:\n        if os.fork() == 0: time.sleep(20); os._exit(0)\n"
            "    except OSError: break\ntime.sleep(0.5)\n" + code,
        ],
        wrap=lambda argv: arena.hosts.unprivileged(["prlimit", "--nproc=60:60", *argv], uid=arena.UID),
        options=["--network-mode", "isolated"],
        timeout=60,
    )
    assert ran.code == 3, ran.err[-2000:]
    assert "Traceback" not in ran.err
