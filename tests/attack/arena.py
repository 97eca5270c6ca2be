"""A world of its own for the attacks: network, PID and mount namespaces in which everything that answers is ours.

`python arena.py ORDER` (JSON) runs inside `unshare --net --pid --mount`; it gives that world addresses of every kind (a public
one, a metadata service, IPv6), opens witnesses on them, convinces itself that each answers there, then starts the product with
an attacker as workload and reports what the attacker says and what the witnesses saw. Pid 1 of the world is this program, so an
attack on "pid 1" hits nothing of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parent / "e2e"))

import hosts  # noqa: E402  (its directory was just added)

UID = 64007  # the attacker; not hosts.THROWAWAY_UID, so that other tests' processes are never in its reach
PUBLIC, METADATA, PUBLIC6 = "203.0.113.7", "169.254.169.254", "2001:db8::7"
IPPROTO_UDPLITE, IPPROTO_MPTCP, IPPROTO_SCTP = 136, 262, 132
AF_VSOCK, CID_ANY = 40, 0xFFFFFFFF
RUNGS = {
    "veth": lambda argv: argv,
    "netns": lambda argv: hosts.outer_seccomp(argv, "setns"),
    "userns": lambda argv: hosts.without_caps(argv, "sys_admin"),
    "userns, own user": lambda argv: hosts.unprivileged(argv, uid=UID),
}
POLICY = "version: 1\nprocess: {{run_as_user: '{uid}', run_as_group: '{uid}'}}\nnetwork_policies: {{}}\n"


def fight(rung: str, *, timeout: float = 90.0) -> dict[str, Any]:
    """Run the world around one rung and return its report (see `main`)."""
    world = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
    done = subprocess.run(
        [*world, sys.executable, str(HERE / "arena.py"), rung],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd="/",
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        raise AssertionError(f"the arena broke: {done.stderr[-3000:]}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


class Witnesses:
    """Everything that answers outside. `seen` collects the tokens that arrived, whoever sent them."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.seen: set[str] = set()
        self.held: list[socket.socket] = []
        self.tcp = self._serve(_bound(socket.AF_INET, socket.SOCK_STREAM, ("0.0.0.0", 0)))
        self.local = self._serve(_bound(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)))
        self.local6 = self._serve(_bound(socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0)))
        self.tcp6 = self._serve(_bound(socket.AF_INET6, socket.SOCK_STREAM, (PUBLIC6, 0)))
        self.metadata = self._serve(_bound(socket.AF_INET, socket.SOCK_STREAM, (METADATA, 80)))
        self.dns_tcp = self._serve(_bound(socket.AF_INET, socket.SOCK_STREAM, ("0.0.0.0", 53)))
        self.dns_udp = self._serve(_bound(socket.AF_INET, socket.SOCK_DGRAM, ("0.0.0.0", 53)))
        self.udp = self._serve(_bound(socket.AF_INET, socket.SOCK_DGRAM, ("0.0.0.0", 0)))
        self.udp6 = self._serve(_bound(socket.AF_INET6, socket.SOCK_DGRAM, (PUBLIC6, 0)))
        self.mptcp = self._maybe(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
        self.sctp = self._maybe(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_SCTP)
        self.udplite = self._maybe(socket.AF_INET, socket.SOCK_DGRAM, IPPROTO_UDPLITE)
        self.abstract = self._serve(_bound(socket.AF_UNIX, socket.SOCK_STREAM, "\0attack-witness"))
        self.abstract_dgram = self._serve(_bound(socket.AF_UNIX, socket.SOCK_DGRAM, "\0attack-witness-dgram"))
        for name, mode in (("private", 0o600), ("open", 0o666)):
            path = directory / f"{name}.sock"
            self._serve(_bound(socket.AF_UNIX, socket.SOCK_STREAM, str(path)))
            path.chmod(mode)
        self.vsock = self._vsock()

    def _maybe(self, family: int, kind: int, protocol: int) -> int:
        with contextlib.suppress(OSError):
            return self._serve(_bound(family, kind, ("0.0.0.0", 0), protocol))
        return 0

    def _vsock(self) -> int:
        with contextlib.suppress(OSError):
            sock = socket.socket(AF_VSOCK, socket.SOCK_STREAM)
            sock.bind((CID_ANY, CID_ANY))  # the port, too: any
            self.held.append(sock)
            return int(sock.getsockname()[1])
        return 0

    def _serve(self, sock: socket.socket) -> int:
        self.held.append(sock)
        target = self._accept if sock.type == socket.SOCK_STREAM else self._receive
        threading.Thread(target=target, args=(sock,), daemon=True).start()
        name = sock.getsockname()
        return int(name[1]) if isinstance(name, tuple) else 0

    def _accept(self, sock: socket.socket) -> None:
        while True:
            client, _ = sock.accept()
            threading.Thread(target=self._hear, args=(client,), daemon=True).start()

    def _hear(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(5)
            client.sendall(b"WITNESS")
            self.seen.add(client.recv(64).decode("latin-1"))

    def _receive(self, sock: socket.socket) -> None:
        while True:
            data, peer = sock.recvfrom(64)
            self.seen.add(data.decode("latin-1"))
            if peer:
                with contextlib.suppress(OSError):
                    sock.sendto(b"WITNESS", peer)


def _bound(family: int, kind: int, address: Any, protocol: int = 0) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    if kind == socket.SOCK_STREAM:
        sock.listen(64)
    return sock


def targets(witnesses: Witnesses) -> dict[str, dict[str, Any]]:
    """Every way that would lead out, by name; `via` PROXY stands for the proxy's own address, known only inside."""
    w = witnesses
    ways: dict[str, dict[str, Any]] = {
        "tcp": {"address": [PUBLIC, w.tcp]},
        "tcp, any address": {"address": ["0.0.0.0", w.tcp]},
        "tcp, loopback": {"address": ["127.0.0.1", w.local]},
        "tcp6, loopback": {"address": ["::1", w.local6], "family": 10},
        "tcp6": {"address": [PUBLIC6, w.tcp6], "family": 10},
        "tcp6, mapped": {"address": [f"::ffff:{PUBLIC}", w.tcp], "family": 10},
        "metadata": {"address": [METADATA, w.metadata]},
        "tcp, proxy host": {"address": ["PROXY", w.tcp]},
        "dns tcp, proxy host": {"address": ["PROXY", 53]},
        "dns udp, proxy host": {"address": ["PROXY", 53], "type": 2},
        "dns tcp": {"address": [PUBLIC, 53]},
        "dns udp": {"address": [PUBLIC, 53], "type": 2},
        "udp": {"address": [PUBLIC, w.udp], "type": 2},
        "udp, proxy host": {"address": ["PROXY", w.udp], "type": 2},
        "udp6": {"address": [PUBLIC6, w.udp6], "type": 2, "family": 10},
        "fast open": {"address": [PUBLIC, w.tcp], "fastopen": True},
        "abstract stream": {"address": "\0attack-witness", "family": 1},
        "abstract datagram": {"address": "\0attack-witness-dgram", "family": 1, "type": 2},
        "path socket 0600": {"address": str(w.directory / "private.sock"), "family": 1},
        "path socket 0666": {"address": str(w.directory / "open.sock"), "family": 1},
    }
    optional = (("mptcp", w.mptcp, 1), ("sctp", w.sctp, 1), ("udplite", w.udplite, 2))
    numbers = {"mptcp": IPPROTO_MPTCP, "sctp": IPPROTO_SCTP, "udplite": IPPROTO_UDPLITE}
    for name, port, kind in optional:
        if port:
            ways[name] = {"address": [PUBLIC, port], "type": kind, "protocol": numbers[name]}
            ways[f"{name}, proxy host"] = {"address": ["PROXY", port], "type": kind, "protocol": numbers[name]}
    for name, way in ways.items():
        way["token"] = f"token of {name}"
    return ways


def _prepare_world() -> None:
    for line in (
        "link set lo up",
        "link add uplink type veth peer name nowhere",
        "link set uplink up",
        "link set nowhere up",
        f"addr add {PUBLIC}/24 dev uplink",
        f"-6 addr add {PUBLIC6}/64 dev uplink nodad",
        f"addr add {METADATA}/32 dev lo",
        "route add default dev uplink",
        "-6 route add default dev uplink",
    ):
        subprocess.run(["ip", *line.split()], check=True)
    pathlib.Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")


def start(rung: str, directory: pathlib.Path, command: Sequence[str], *options: str) -> subprocess.Popen[str]:
    """The product on this rung, its files in `directory`, `command` as workload."""
    import product

    policy = POLICY.format(uid=UID) if not rung.endswith("own user") else product.DENY_ALL
    # The namespaces alone are what is attacked here: file rules and filters would hide what they let through.
    alone = ["--declare-external", "filesystem,syscalls"]
    line = product.argv(directory, policy, command, ["--network-mode", "isolated", *alone, *options])
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(RUNGS[rung](line), text=True, cwd="/", **pipes)


def bystander(port: int) -> tuple[subprocess.Popen[str], int]:
    """A process of the attacker's uid, outside, that holds a connection to a witness; (process, its descriptor)."""
    code = f"import socket,time;s=socket.create_connection(('127.0.0.1',{port}));print(s.fileno(),flush=True);time.sleep(60)"
    argv = hosts.unprivileged([sys.executable, "-I", "-c", code], uid=UID)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def _as_the_attacker_outside(directory: pathlib.Path) -> dict[str, str]:
    """What the same program, as the same user, can do to the bystander where nothing holds it."""
    argv = [sys.executable, "-I", str(HERE / "inside.py"), str(directory / "order.json"), "outside"]
    done = subprocess.run(hosts.unprivileged(argv, uid=UID), capture_output=True, text=True, check=True, cwd="/")
    answers: dict[str, str] = json.loads(done.stdout)
    return answers


def main(rung: str) -> None:
    """Print {"control": {way: opened}, "inside": {…}, "seen": [tokens from inside], "statement", "stderr", "code"}."""
    import inside

    _prepare_world()
    with tempfile.TemporaryDirectory(prefix="oss-arena-") as name:
        directory = pathlib.Path(name)
        directory.chmod(0o777)
        witnesses = Witnesses(directory)
        ways = targets(witnesses)
        ways_here = {k: v | {"token": "control"} for k, v in ways.items()}
        control = {k: inside.try_way(v, PUBLIC) for k, v in ways_here.items()}
        held = socket.create_server(("127.0.0.1", 0))
        neighbour, descriptor = bystander(held.getsockname()[1])
        accepted, _ = held.accept()
        order = {
            "ways": ways,
            "vsock": witnesses.vsock,
            "neighbour": [neighbour.pid, descriptor],
            "outer": {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "user", "mnt")},
        }
        (directory / "order.json").write_text(json.dumps(order))
        (directory / "order.json").chmod(0o644)
        control |= _as_the_attacker_outside(directory)
        accepted.settimeout(5)
        accepted.recv(64)
        witnesses.seen.clear()
        process = start(rung, directory, [sys.executable, "-I", str(HERE / "inside.py"), str(directory / "order.json")])
        out, err = process.communicate(timeout=80)
        time.sleep(0.2)
        accepted.settimeout(0.2)
        with contextlib.suppress(OSError):
            witnesses.seen.add(accepted.recv(64).decode())
        neighbour.kill()
        neighbour.wait()
        status = directory / "status.json"
        report = {
            "control": control,
            "inside": json.loads(out.splitlines()[-1]) if out.strip() else None,
            "seen": sorted(witnesses.seen),
            "statement": json.loads(status.read_text()) if status.exists() else None,
            "stderr": err,
            "code": process.returncode,
        }
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
