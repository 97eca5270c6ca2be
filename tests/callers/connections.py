"""Real connections for the tests of this room: a listener, programs that call it, and what the lookup says of them."""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from openshell_supervisor.callers.caller import Caller
from openshell_supervisor.callers.lookup import Identifier
from openshell_supervisor.callers.tables import NETLINK_SOCK_DIAG, ProcTable, SocketDiagnostics, Table

TIMEOUT = 20.0
# A caller: connects, says `hello`, and waits for its standard input's end.
CALL = "import socket,sys\ns=socket.create_connection((sys.argv[1],int(sys.argv[2])))\ns.sendall(b'hello')\n"
WAIT = "sys.stdin.read()\n"


def python(directory: pathlib.Path, name: str) -> str:
    """A program of its own that is this interpreter: a copy of it, so that it has a path and an inode of its own."""
    real = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    there = directory / name
    shutil.copy(real, there)
    there.chmod(0o755)
    return str(there)


def table() -> Table:
    """The kernel's table of this namespace."""
    return SocketDiagnostics(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG))


@dataclass
class World:
    """A listener and what was started against it; `identifier` takes this test's process for the supervisor."""

    listener: socket.socket
    identifier: Identifier
    accepted: list[socket.socket] = field(default_factory=list)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        """Where the listener is."""
        host, port = self.listener.getsockname()[:2]
        return str(host), int(port)

    def start(self, argv: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """A program with the listener's host and port behind its arguments; its standard input is a pipe of ours."""
        line = [*argv, self.address[0], str(self.address[1])]
        # A copy of the interpreter finds neither its library nor its modules by itself.
        home = {"PYTHONHOME": sys.base_prefix, "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib"}
        environment = {**os.environ, **home, "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(line, stdin=subprocess.PIPE, env=environment, **options)  # type: ignore[call-overload]
        self.started.append(process)
        return process  # type: ignore[no-any-return]

    def accept(self) -> socket.socket:
        """The next connection, once its `hello` is here."""
        connection, _ = self.listener.accept()
        connection.settimeout(TIMEOUT)
        self.accepted.append(connection)
        assert connection.recv(5) == b"hello"
        return connection

    def who(self, connection: socket.socket) -> Caller:
        """Whose the connection is."""
        return self.identifier.identify(connection.getpeername()[:2], connection.getsockname()[:2])

    def call(self, *argv: str, **options: object) -> Caller:
        """Start a program that calls, and say who it is."""
        self.start(argv, **options)
        return self.who(self.accept())


@contextmanager
def world(family: int = socket.AF_INET, *, proc: bool = False, dual: bool = False) -> Iterator[World]:
    """A listener on a loopback address; with `proc` the table of /proc is asked, with `dual` the listener is IPv6 for both."""
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.settimeout(TIMEOUT)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not dual))
        listener.bind(("127.0.0.1" if family == socket.AF_INET else "::" if dual else "::1", 0))
        listener.listen(64)
        asked: Table = ProcTable(os.getpid()) if proc else table()
        here = World(listener, Identifier(asked, os.getpid()))
        try:
            yield here
        finally:
            for connection in here.accepted:
                connection.close()
            for process in here.started:
                process.kill()
                process.communicate()
            asked.close()
