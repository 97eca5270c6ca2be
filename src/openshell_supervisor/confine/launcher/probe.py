"""A twin of the confined launcher tries what must not work, and what must; nothing that it does can stay behind.

The twin is a fork: identity, namespaces, file rules and filters are the very ones that the workload will have. If one of them
failed, what the twin gains (uid 0, for one) dies with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import time

from openshell_supervisor.confine.launcher.kernel import (
    EACCES,
    ENOTSOCK,
    ETIMEDOUT,
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    TYPE_CHECKING,
    StepError,
    prctl,
    step,
    system_call,
)

if TYPE_CHECKING:
    from typing import NoReturn

    from openshell_supervisor.confine.launcher.kernel import Answer, Request


def probe(request: Request, descriptors: list[int]) -> Answer:
    """Let a twin try each forbidden thing, each way out, and the proxy; an attempt that succeeded has errno null.

    An outer profile may kill for a call instead of refusing it (a container runtime's does, for foreign numbers): then the
    attempt is answered as killed, and another twin goes on behind it.
    """
    answers: list[object] = []
    while True:
        lines, status = run_twin(request, len(answers))
        rest = json.loads(lines.pop()) if status == 0 else None
        answers += map(json.loads, lines)
        if rest is not None:
            return {"tries": answers, **rest}, []
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGSYS or len(answers) >= len(request["tries"]):
            raise StepError("twin", 0, f"the twin ended without an answer, wait status {status}")
        answers.append({"errno": None, "killed": True})


def run_twin(request: Request, start: int) -> tuple[list[bytes], int]:
    """Fork a twin that begins at attempt `start`; answers the lines that it wrote and its wait status."""
    with step("twin"):
        reading, writing = os.pipe()
        twin = os.fork()
    if twin == 0:
        answer_as_twin(request, start, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        lines = pipe.read().splitlines()
    return lines, os.waitpid(twin, 0)[1]


def answer_as_twin(request: Request, start: int, writing: int) -> NoReturn:
    """In the twin: a line per attempt, written at once, then one for the rest. Never returns into the launcher's loop."""
    try:
        prctl("parent death signal", PR_SET_PDEATHSIG, signal.SIGKILL)
        for item in request["tries"][start:]:
            write_line(writing, {"errno": attempt(item)})
        ways = [{**way, "errno": attempt_way(way, request["timeout"])} for way in request["ways"]]
        # The workload is as readable as its program's file; the launcher, whose fork this is, closed itself to everybody.
        prctl("dumpable", PR_SET_DUMPABLE, 1)
        proxy = ask_proxy(request["proxy"], request["ask"].encode(), request["patience"])
        write_line(writing, {"ways": ways, "proxy": proxy})
    except BaseException:  # noqa: BLE001  the process's boundary: two launchers on one control socket must never be
        os._exit(1)
    os._exit(0)


def write_line(writing: int, answer: dict[str, object]) -> None:
    """One answer as a line of JSON, whole."""
    line = json.dumps(answer).encode() + b"\n"
    while line:
        line = line[os.write(writing, line) :]


def attempt(item: Request) -> int | None:
    """Try one thing {kind: syscall|open|signal|socket|root, …}; None when it succeeded, else the errno. Nothing is kept open.

    For a socket's path, success is that it could be connected to: connecting would wake whoever listens (unix(7): search
    permission on the way, write permission on the socket).
    """
    if item["kind"] == "syscall":
        return system_call(item["number"], *item["args"]) or None
    try:
        if item["kind"] == "open":
            os.close(os.open(item["path"], item["flags"] | os.O_CLOEXEC))
        elif item["kind"] == "signal":
            os.kill(item["pid"], 0)
        elif item["kind"] == "socket":
            if not stat.S_ISSOCK(os.stat(item["path"]).st_mode):
                return ENOTSOCK
            return None if os.access(item["path"], os.W_OK) else EACCES
        else:
            os.setresuid(0, 0, 0)
    except OSError as error:
        return error.errno
    return None


def attempt_way(way: Request, timeout: float) -> int | None:
    """Try one way {kind: tcp|udp|unix|vsock, address}; None when it opened, else the errno (ETIMEDOUT after `timeout` s).

    For vsock, opening is being able to have such a socket at all: nobody outside is talked to.
    """
    if way["kind"] == "vsock":
        try:
            socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
        except OSError as error:
            return error.errno
        return None
    inet = socket.AF_INET6 if ":" in way["address"][0] else socket.AF_INET
    family = {"unix": socket.AF_UNIX}.get(way["kind"]) or inet
    kind = socket.SOCK_DGRAM if way["kind"] == "udp" else socket.SOCK_STREAM
    address = "\0" + way["address"][0] if way["kind"] == "unix" else tuple(way["address"])
    try:
        with socket.socket(family, kind) as client:
            client.settimeout(timeout)
            client.connect(address)
            client.send(way["token"].encode())
            return None
    except TimeoutError:
        return ETIMEDOUT
    except OSError as error:
        return error.errno


def ask_proxy(address: list[object], ask: bytes, patience: float) -> dict[str, object]:
    """Send `ask` to the proxy and return its whole answer as text, or {"errno"}; `patience` in seconds covers its start."""
    try:
        # A numeric address: no resolver, no late import.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(patience)
            client.connect(tuple(address))
            client.sendall(ask)
            answer = b""
            deadline = time.monotonic() + patience
            while len(answer) < 4096 and time.monotonic() < deadline:  # a probe's answer is a few hundred bytes
                piece = client.recv(4096)
                if not piece:
                    break
                answer += piece
            return {"answer": answer.decode("latin-1"), "errno": None}
    except TimeoutError:
        return {"answer": "", "errno": ETIMEDOUT}
    except OSError as error:
        return {"answer": "", "errno": error.errno}
