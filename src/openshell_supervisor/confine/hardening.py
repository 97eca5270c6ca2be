"""What the supervisor does to itself before anything else runs: no memory of ours for same-uid processes, no core files, and
no secret in the environment block that /proc shows.

The block is what execve(2) put on the stack; `os.environ` is a copy of it, so taking a name out of that changes nothing in
/proc/PID/environ (proc_pid_environ(5)).
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterable
from pathlib import Path

PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4  # linux/prctl.h
# proc_pid_stat(5), fields 50 and 51, env_start and env_end; counted from the field after the command's closing parenthesis.
ENV_START, ENV_END = 50 - 3, 51 - 3


def harden() -> bool:
    """Make this process undumpable (its files in /proc become root's, ptrace(2) and pidfd_getfd(2) are refused to its own
    user) and forbid it core files, for good. False where the host refuses the first, or only says that it did it."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return bool(libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 0)


def scrub_environment(names: Iterable[str]) -> int:
    """Overwrite the values of these variables in this process's environment block; answers how many were found.

    Nothing of ours reads the block again: `os.environ` keeps its copy, in memory that nobody else can read.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[ENV_START]), int(fields[ENV_END])
    if not 0 < start < end:
        return 0  # a kernel that does not tell; the block is then as private as the process
    block = ctypes.string_at(start, end - start)
    wanted = tuple(name.encode() + b"=" for name in names)
    found, place = 0, 0
    for entry in block.split(b"\0"):
        prefix = next((one for one in wanted if entry.startswith(one)), None)
        if prefix is not None:
            ctypes.memset(start + place + len(prefix), 0, len(entry) - len(prefix))
            found += 1
        place += len(entry) + 1
    return found
