"""A launcher process before it becomes the workload: started, asked, told to go.

This module speaks the launcher's line protocol (one JSON object a line, descriptors beside it) and knows nothing of what the
requests mean. Every answer is awaited with a deadline; a launcher that dies or stays silent is a `LaunchError`.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openshell_supervisor.errors import LaunchError
from openshell_supervisor.workload.reaper import Reaper

# The launcher starts in 20–45 ms; a loaded small machine has been seen to need two seconds.
ANSWER_TIMEOUT = 20.0
# What refuses a process as such, whatever its program.
UNSTARTABLE = {
    errno.EPERM: "a seccomp profile that answers EPERM to clone3 (a container runtime of before 2021) lets nothing be started: "
    "update it, or use one that answers ENOSYS",
    errno.EAGAIN: "this user or container may have no more processes (ulimit -u, --pids-limit)",
    errno.EMFILE: "the limit on open files is too low (ulimit -n)",
}
EXIT_PATIENCE = 1.0  # between the end of a launcher's socket and its exit status lie milliseconds
# An answer is a few hundred bytes; the probe's is the largest with about 6 KiB.
MAX_ANSWER_BYTES = 256 * 1024
MAX_PASSED_DESCRIPTORS = 4  # the launcher passes two at most


def interpreter() -> str:
    """The Python that runs the launcher: the one below a virtual environment, because `-I -S` needs no site-packages."""
    return getattr(sys, "_base_executable", None) or sys.executable


class Child:
    """One launcher process. `exited` resolves to its exit status (see `Reaper.spawn`), also after it became the workload."""

    def __init__(self, pid: int, exited: asyncio.Future[int], control: socket.socket) -> None:
        self.pid = pid
        self.exited = exited
        self._control = control
        self._received = b""

    @classmethod
    def start(cls, reaper: Reaper, launcher: Path, stdio: Mapping[int, int] | None = None) -> Child:
        """Start the launcher with an empty environment; `stdio` replaces descriptors 0–2 (child number -> ours)."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        argv = [interpreter(), "-I", "-S", "-B", str(launcher)]
        try:
            pid, exited = reaper.spawn(argv, {}, {**(stdio or {}), 3: theirs.fileno()})
        except OSError as error:
            ours.close()
            raise LaunchError(
                f"cannot start the launcher {argv[0]}: {error.strerror}",
                code="launcher_unavailable",
                step="spawn",
                errno=error.errno,
                hint=UNSTARTABLE.get(
                    error.errno or 0, "the interpreter that runs the supervisor must be executable by it"
                ),
            ) from error
        finally:
            theirs.close()
        return cls(pid, exited, ours)

    async def ask(
        self, request: Mapping[str, Any], descriptors: Sequence[int] = ()
    ) -> tuple[dict[str, Any], list[int]]:
        """Send one request, return (answer, passed descriptors). Raises `LaunchError` with the step that failed."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await self._send(json.dumps(request).encode() + b"\n", descriptors)
                line, passed = await self._receive()
        except TimeoutError:
            raise await self._lost(str(request["op"]), f"no answer within {ANSWER_TIMEOUT:.0f} s") from None
        if line is None:
            raise await self._lost(str(request["op"]), "it ended before it answered")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            _close_all(passed)
            raise LaunchError(
                f"launcher step '{answer['step']}' failed: {answer['error']}",
                code="launch_step_failed",
                step=answer["step"],
                errno=answer["errno"] or None,
                hint="the host refuses this step: look at the container's capabilities, seccomp profile and limits "
                "(`openshell-supervisor doctor` tries them)",
            )
        return answer, passed

    async def execute(self, request: Mapping[str, Any]) -> None:
        """Tell the launcher to become the workload; returns when it has. Raises `LaunchError` when it could not."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await self._send(json.dumps(request).encode() + b"\n", ())
                line, _ = await self._receive()
        except TimeoutError:
            raise await self._lost("exec", f"no answer within {ANSWER_TIMEOUT:.0f} s") from None
        self._control.close()
        if line is not None:
            answer = json.loads(line)
            raise LaunchError(
                f"cannot run {request['argv'][0]!r}: {answer['error']}",
                code="workload_not_started",
                step=answer["step"],
                errno=answer["errno"] or None,
                hint="looked up in PATH as the workload's user: not found, in a directory that this user may not enter, or with "
                "an interpreter that it may not run (file rules count too)",
            )

    def discard(self) -> None:
        """Kill the launcher and forget it; the reaper collects what is left."""
        self._control.close()
        if not self.exited.done():
            try:
                os.kill(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # gone already, or of another identity: it ends by itself, because its control socket is closed

    async def _lost(self, step: str, why: str) -> LaunchError:
        await asyncio.wait({self.exited}, timeout=EXIT_PATIENCE)
        status = self.exited.result() if self.exited.done() else None
        killed = status == -signal.SIGSYS
        return LaunchError(
            f"the launcher failed in step '{step}': {why}" + (f", exit status {status}" if status is not None else ""),
            code="launcher_lost",
            step=step,
            hint="a seccomp profile around the container kills for a call of this step, where it should refuse it"
            if killed
            else "look for what ends processes here: limits, a seccomp profile, the kernel's log",
        )

    async def _send(self, data: bytes, descriptors: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()
        try:
            if descriptors:
                sent = socket.send_fds(self._control, [data], list(descriptors))
                data = data[sent:]
            await loop.sock_sendall(self._control, data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the launcher is gone; reading its end says so with the exit status

    async def _receive(self) -> tuple[bytes | None, list[int]]:
        passed: list[int] = []
        while b"\n" not in self._received:
            await _readable(self._control)
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    self._control, 65536, MAX_PASSED_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            except ConnectionResetError:
                data, descriptors = b"", []
            passed += descriptors
            self._received += data
            if not data or len(self._received) > MAX_ANSWER_BYTES:
                _close_all(passed)
                return None, []
        line, _, self._received = self._received.partition(b"\n")
        return line, passed


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


async def _readable(sock: socket.socket) -> None:
    """Wait until `sock` can be read; asyncio has no recvmsg of its own."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        loop.remove_reader(sock)
