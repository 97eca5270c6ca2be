"""The workload's life: go, wait, pass signals on, end it in time, and clear away what it leaves behind.

It has a session of its own (setsid in the launcher), so its session id and process group are its pid. Termination goes
TERM, grace, KILL. Its exit code becomes ours: 128+n for a signal, 124 when `timeout` ended it (contract 1.4).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openshell_supervisor.errors import EXIT_TIMEOUT, LaunchError
from openshell_supervisor.telemetry.plain_log import LateLogger
from openshell_supervisor.workload import guard
from openshell_supervisor.workload.child import Child, interpreter
from openshell_supervisor.workload.guard import Mark
from openshell_supervisor.workload.reaper import Reaper
from openshell_supervisor.workload.terminal import Terminal

# Passed on to the workload's process group as they come.
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# This one asks for an end, so it starts the grace period as well. The others mean what the workload makes of them.
ENDING = signal.SIGTERM
# A killed process is gone in milliseconds unless it is stuck in the kernel; then nothing can be done but to say so.
KILL_PATIENCE = 5.0
# The guard's interpreter starts in 20 ms; a loaded small machine has been seen to need two seconds.
GUARD_PATIENCE = 20.0

log = LateLogger("openshell_supervisor.workload")

SignalAs = Callable[[int, int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the workload ended: our exit code, the signal that ended it (or None), and whether the timeout did."""

    code: int
    signal: int | None
    timed_out: bool


class Workload:
    """One running workload. `signal_as` sends a signal with the workload's identity where the supervisor may not."""

    def __init__(self, child: Child, *, grace: float, timeout: float, signal_as: SignalAs) -> None:
        self._child = child
        self._grace = grace
        self._timeout = timeout
        self._signal_as = signal_as
        self._end_requested = asyncio.Event()
        self._pending: set[asyncio.Task[None]] = set()
        self.timed_out = False

    @property
    def pid(self) -> int:
        """The workload's first process; also its session and process group."""
        return self._child.pid

    def forward_signals(self) -> None:
        """Install the handlers. Called before the workload exists, so that an early signal is never lost."""
        loop = asyncio.get_running_loop()
        for number in FORWARDED:
            loop.add_signal_handler(number, self._forward, number)

    def release_signals(self) -> None:
        """Stop passing signals on. They stay caught: the supervisor is about to end and must finish clearing away."""
        loop = asyncio.get_running_loop()
        for number in FORWARDED:
            loop.add_signal_handler(number, lambda: None)

    def request_end(self) -> None:
        """End the workload as a SIGTERM from outside would."""
        self._forward(signal.SIGTERM)

    def _forward(self, number: signal.Signals) -> None:
        task = asyncio.get_running_loop().create_task(self._send(number))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        if number is ENDING:
            self._end_requested.set()

    async def _send(self, number: int) -> None:
        if self._child.exited.done():
            return
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            # Not yet the leader of a group: it is still the launcher, whose dispositions are the default ones.
            os.kill(self.pid, number)
        except PermissionError:
            await self._signal_as(self.pid, number)  # no CAP_KILL over another user's process (kill(2))

    async def wait(self) -> Outcome:
        """Wait for the end, by itself, on request or by the timeout."""
        ending = asyncio.create_task(self._end_requested.wait())
        try:
            limit = self._timeout or None
            either: set[asyncio.Future[Any]] = {self._child.exited, ending}
            done, _ = await asyncio.wait(either, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                self.timed_out = True
                await self._send(signal.SIGTERM)
            if not self._child.exited.done():
                await self._end_within(self._grace)
        finally:
            ending.cancel()
        status = self._child.exited.result()
        number = -status if status < 0 else None
        code = EXIT_TIMEOUT if self.timed_out else (128 - status if status < 0 else status)
        return Outcome(code, number, self.timed_out)

    async def _end_within(self, grace: float) -> None:
        await asyncio.wait({self._child.exited}, timeout=grace)
        if self._child.exited.done():
            return
        await self._send(signal.SIGKILL)
        await asyncio.wait({self._child.exited}, timeout=KILL_PATIENCE)
        if not self._child.exited.done():
            raise LaunchError(
                "the workload cannot be killed",
                code="workload_stuck",
                step="kill",
                hint=f"look at /proc/{self.pid}/stack",
            )


class Guard:
    """The process that ends the workload when the supervisor dies without a word; see `workload.guard`."""

    def __init__(self, pid: int, link: socket.socket) -> None:
        self._pid = pid
        self._link = link

    @classmethod
    def start(cls, reaper: Reaper, run_dir: Path, status_file: Path | None) -> Guard:
        """Start it. When we die without a word it also removes the run directory and the statement, which is nobody's then."""
        ours, theirs = socket.socketpair()
        argv = [interpreter(), "-I", "-S", "-B", str(Path(guard.__file__)), str(run_dir)]
        argv += [str(status_file.absolute())] if status_file else []
        try:
            pid, _ = reaper.spawn(argv, {}, {3: theirs.fileno()})
        finally:
            theirs.close()
        return cls(pid, ours)

    async def ready(self) -> None:
        """Wait until it runs with all of its code loaded. Raises `LaunchError` when it does not come up."""
        self._link.setblocking(False)
        try:
            async with asyncio.timeout(GUARD_PATIENCE):
                if await asyncio.get_running_loop().sock_recv(self._link, 1):
                    return
        except TimeoutError:
            pass
        raise LaunchError(
            "the guard did not start", code="guard_lost", step="guard", hint="look for what kills processes here"
        )

    def watch(self, mark: Mark) -> None:
        """Tell it whom to end."""
        self._say(f"watch {mark.session} {mark.network} {mark.user}\n")

    @property
    def pid(self) -> int:
        """The guard's own pid, which the sweep must spare."""
        return self._pid

    def dismiss(self) -> None:
        """Tell it that the end was orderly."""
        self._say("done\n")
        self._link.close()

    def _say(self, line: str) -> None:
        try:
            self._link.send(line.encode())
        except OSError as error:
            # Somebody killed it. The workload still ends with us (parent-death signal); its descendants might not.
            log.warning("the guard is gone", error=error.strerror)


async def clear_away(mark: Mark, spare: frozenset[int]) -> list[int]:
    """End every process the workload left behind; answers those that could not be ended. Off the loop: it scans /proc."""
    return await asyncio.to_thread(guard.end_all, mark, os.getpid(), spare)


async def run_attached(child: Child, request: Mapping[str, Any], terminal: Terminal | None) -> None:
    """Tell the launcher to become the workload; with a terminal, give up our end of the slave."""
    await child.execute({**request, "tty": terminal is not None})
    if terminal is not None:
        terminal.started()
