"""Every child of the supervisor, and every orphan that falls to it, is reaped here and nowhere else.

The supervisor is either PID 1 of its container or a child subreaper (prctl(2), PR_SET_CHILD_SUBREAPER), so processes that
lost their parent become its children. One SIGCHLD handler waits for all of them: a known child's status goes to its future,
an orphan's is thrown away. No other code in this process may wait for a child (asyncio's watcher would lose the race).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from collections.abc import Mapping, Sequence

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def become_subreaper() -> None:
    """Ask the kernel to hand us orphaned descendants; PID 1 gets them anyway. Failure is harmless and ignored by design:
    the call fails only on kernels older than 3.4."""
    if os.getpid() != 1:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Reaper:
    """Spawns children and waits for them. Lives on one event loop; `install` before the first spawn."""

    def __init__(self) -> None:
        self._exits: dict[int, asyncio.Future[int]] = {}

    def install(self) -> None:
        """Take over SIGCHLD on the running loop."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    def uninstall(self) -> None:
        """Give SIGCHLD back."""
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)

    def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], descriptors: Mapping[int, int]
    ) -> tuple[int, asyncio.Future[int]]:
        """Start a process with the given descriptors (child number -> ours); answers (pid, future of its exit status).

        posix_spawn(3) runs no Python between fork and exec, and every descriptor not named here is close-on-exec (PEP 446).
        The status is as `os.waitstatus_to_exitcode` gives it: the exit code, or minus the signal. Raises OSError.
        """
        actions = [(os.POSIX_SPAWN_DUP2, ours, number) for number, ours in descriptors.items()]
        ignored_by_python = [signal.SIGPIPE, signal.SIGXFSZ]
        pid = os.posix_spawn(
            argv[0], list(argv), dict(env), file_actions=actions, setsigdef=ignored_by_python, setsigmask=[]
        )
        # Registered in the same step of the loop as the spawn: SIGCHLD is handled on this loop, so it cannot come between.
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._exits[pid] = future
        return pid, future

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            future = self._exits.pop(pid, None)
            if future is not None and not future.done():
                future.set_result(os.waitstatus_to_exitcode(status))
