"""The identification itself: connection to socket to holders to programs, and a second look that nothing changed meanwhile.

`Callers` is the asynchronous front, on a bounded pool of threads of its own; `Identifier` does the work and blocks.

What it cannot see, and nobody can from /proc: who wrote the bytes (a program may connect and then execute another one, which
inherits the socket), a descriptor that is on its way through a Unix socket or in a thread's own table, and code that was
injected into a program (LD_PRELOAD, ptrace). A program that is allowed can be used by whoever may start it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from openshell_supervisor.callers.caller import Caller, CallerError
from openshell_supervisor.callers.processes import Holders, Process
from openshell_supervisor.callers.programs import Programs
from openshell_supervisor.callers.tables import Address, Table

# From asking to answer, waiting for a thread included. Reading 200 processes takes 3 ms; the first hash of a program of 100 MiB a
# third of a second.
LOOKUP_TIMEOUT = 10.0
# Threads. The work is mostly the interpreter's own, which runs one at a time; the second keeps a long hash from stopping others.
LOOKUP_THREADS = 2
# Looks at a connection whose processes change under our hands (a shell that just executes its command, for one).
ATTEMPTS = 3
MAX_ANCESTORS = 64  # isolation.md 5.6
# Processes that share a socket. Each takes a third of a millisecond; a server that forks its workers has some dozens.
MAX_HOLDERS = 128
# Of the arguments that are paths; `decide` takes 256 texts, and people read fewer.
MAX_CMDLINE = 64
MAX_PATH = 4096  # PATH_MAX, linux/limits.h


@dataclass(frozen=True, slots=True)
class _Seen:
    """A process as it was at the first look."""

    process: Process
    target: str
    binary: str
    sha256: str


class Identifier:
    """Tells whose a connection is; blocks, and is used by several threads. `root` is the pid of the workload's first process."""

    def __init__(self, table: Table, root: int) -> None:
        self._table = table
        self._root = root
        self._supervisor = os.getpid()
        self._holders = Holders(root, self._supervisor)
        self._programs = Programs(root)

    def identify(self, peer: Address, local: Address, *, twin: bool = False) -> Caller:
        """The caller at `peer`, connected to our `local`. Never raises: what cannot be told is a `Caller` with a problem.

        `twin`: it is the launcher's twin, before the workload starts, and the launcher itself is closed to us.
        """
        for attempt in range(ATTEMPTS):
            try:
                return self._look(peer, local, twin)
            except CallerError as error:
                if error.unsettled and attempt + 1 < ATTEMPTS:
                    continue
                return Caller(problem=str(error), problem_id=error.code)
            except OSError as error:
                text = f"failed to resolve peer binary: {error.strerror or error}"
                return Caller(problem=text, problem_id="caller_unknown")
        raise AssertionError("an attempt answers or is the last")

    def _look(self, peer: Address, local: Address, twin: bool) -> Caller:
        inode = self._table.inode(peer, local)
        pids = self._holders.of(inode, spare_root=twin)
        if not pids:
            text = f"failed to resolve peer binary: no process holds the socket {inode}"
            raise CallerError("caller_unknown", text, unsettled=True)
        if len(pids) > MAX_HOLDERS:
            text = f"ambiguous shared socket ownership: inode {inode} is held by {len(pids)} processes"
            raise CallerError("caller_ambiguous", text)
        callers = [self._holder(pid, inode) for pid in pids]
        if self._table.inode(peer, local) != inode:
            raise CallerError("caller_unknown", "the connection has another socket now", unsettled=True)
        return _agreed(inode, callers)

    def _holder(self, pid: int, inode: int) -> Caller:
        """One holder and its ancestors, looked at twice; at most `MAX_ANCESTORS` and some descriptors are open at a time."""
        with ExitStack() as open_ones:
            seen = [*self._line(pid, open_ones)]
            if not seen[0].process.holds(inode):
                raise CallerError("caller_unknown", f"process {pid} gave the socket {inode} away", unsettled=True)
            caller = self._caller(seen)
            _unchanged(seen)
            return caller

    def _line(self, pid: int, open_ones: ExitStack) -> Iterator[_Seen]:
        """The holder and its ancestors, up to the workload's first process; ancestors that may not be looked at are left out,
        which takes from the caller and gives it nothing."""
        process = open_ones.enter_context(Process(pid))
        yield self._seen(process)
        for _ in range(MAX_ANCESTORS):
            if process.pid == self._root or process.parent in (0, 1, self._supervisor):
                return
            parent = open_ones.enter_context(Process(process.parent))
            if parent.started > process.started or process.stat()[0] != parent.pid:
                raise CallerError("caller_unknown", f"the parent of process {process.pid} ended", unsettled=True)
            process = parent
            try:
                yield self._seen(process)
            except CallerError as error:
                if error.code != "caller_unreadable":
                    raise

    def _seen(self, process: Process) -> _Seen:
        target = process.program()
        descriptor = process.open_program()
        try:
            binary = self._programs.path(process, target, os.fstat(descriptor))
            return _Seen(process, target, binary, self._programs.verified(binary, descriptor))
        finally:
            os.close(descriptor)

    def _caller(self, seen: list[_Seen]) -> Caller:
        first = seen[0]
        programs = {one.binary for one in seen}
        paths = dict.fromkeys(
            argument
            for one in seen
            for argument in one.process.arguments()
            if argument.startswith("/") and len(argument) <= MAX_PATH and argument.isprintable()
        )
        return Caller(
            binary=first.binary,
            ancestors=tuple(one.binary for one in seen[1:]),
            cmdline=tuple(path for path in paths if path not in programs)[:MAX_CMDLINE],
            sha256=first.sha256,
            pid=first.process.pid,
        )


def _unchanged(seen: list[_Seen]) -> None:
    """Each is still the process that it was, executes what it did, and has the parent it had."""
    for one in seen:
        if one.process.program() != one.target or one.process.stat() != (one.process.parent, one.process.started):
            raise CallerError("caller_unknown", f"process {one.process.pid} changed meanwhile", unsettled=True)


def _agreed(inode: int, callers: list[Caller]) -> Caller:
    """The one caller that all holders are. They must run the same program; of their ancestors, which can only allow more, those
    count that all have. Raises `CallerError` (caller_ambiguous)."""
    first = callers[0]
    if len({(caller.binary, caller.sha256) for caller in callers}) != 1:
        pids = ", ".join(str(caller.pid) for caller in callers)
        raise CallerError(
            "caller_ambiguous",
            f"ambiguous shared socket ownership: inode {inode} is held by PIDs [{pids}] with different policy identities",
        )
    common = set(first.ancestors).intersection(*(caller.ancestors for caller in callers))
    return replace(first, ancestors=tuple(path for path in first.ancestors if path in common))


class Callers:
    """Tells whose connections are, beside the event loop. `close` at the end."""

    def __init__(self, table: Table, root: int) -> None:
        self._identifier = Identifier(table, root)
        self._table = table
        self._pool = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="callers")

    @property
    def table(self) -> str:
        """What it asks for sockets: "sock_diag", or "/proc/net/tcp"."""
        return self._table.name

    async def of(self, peer: Address, local: Address, *, twin: bool = False) -> Caller:
        """The caller of the connection that was accepted from `peer` on `local`; within `LOOKUP_TIMEOUT`, and it never raises
        but for cancellation. `twin` as in `Identifier.identify`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT):
                return await loop.run_in_executor(
                    self._pool, partial(self._identifier.identify, peer, local, twin=twin)
                )
        except TimeoutError:
            text = f"failed to resolve peer binary: it took more than {LOOKUP_TIMEOUT:g} s"
        except RuntimeError:  # closed: the supervisor is ending
            text = "failed to resolve peer binary: the supervisor is ending"
        return Caller(problem=text, problem_id="caller_unknown")

    def close(self) -> None:
        """Give up what waits; a lookup that runs ends by itself. Safe to call twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._table.close()
