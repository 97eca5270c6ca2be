"""The supervisor's own filter: installed on all its threads once its boundary stands, inherited by everything it starts later.

It takes away what reaches into mounts and into the kernel, so that a supervisor that was taken over cannot undo the sandbox.
What it keeps, because it needs it: setns, clone, unshare, ptrace. Installing answers what was verified, not what was asked.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from openshell_supervisor.confine import seccomp
from openshell_supervisor.confine.syscall_tables import NUMBERS, PRELUDE
from openshell_supervisor.enforcement import errno_name
from openshell_supervisor.errors import ConfineError

STEP = "supervisor-seccomp"
PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC = 1, 1  # linux/seccomp.h
THREADS = Path("/proc/self/task")


@dataclass(frozen=True, slots=True)
class PreludeFacts:
    """What held after the installation: threads looked at, the filters of the least filtered thread before and after (0 where
    the kernel does not count: gVisor, Linux before 5.9), and each call that was tried with the errno it gave."""

    threads: int
    filters_before: int
    filters_after: int
    tried: dict[str, str]


def prelude_program(machine: str | None = None) -> bytes:
    """The filter for `machine` (default: this one), EPERM for everything in it. Raises `ConfineError`."""
    return seccomp.export(PRELUDE, errno.EPERM, machine)


def install(program: bytes) -> PreludeFacts:
    """Install `program` on every thread of this process, for good, and verify it. Sets no_new_privs.

    Raises `ConfineError` (prelude_failed): then either nothing was installed, or what was installed does not hold.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    before = _filters(_statuses())
    if libc.prctl(PR_SET_NO_NEW_PRIVS, *(ctypes.c_ulong(word) for word in (1, 0, 0, 0))) < 0:
        raise _failure("no_new_privs cannot be set", ctypes.get_errno())
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog, linux/filter.h; both buffers must live until the call is over.
    header = ctypes.create_string_buffer(struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(instructions)))
    arguments = (SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, ctypes.addressof(header))
    result = _call(libc, _number("seccomp"), *arguments)
    if result < 0:
        raise _failure("the kernel refuses the supervisor's filter", -result)
    if result > 0:
        # seccomp(2), TSYNC: the thread that could not be synchronised, because it has filters of its own.
        raise _failure(f"thread {result} of the supervisor has a filter of its own, so none was installed", None)
    return _verify(libc, before)


def _verify(libc: ctypes.CDLL, before: int) -> PreludeFacts:
    statuses = _statuses()
    after = _filters(statuses)
    free = [thread for thread, status in statuses.items() if status.get("Seccomp", "2") != "2"]
    if free or (after and after <= before):
        raise _failure(f"the kernel took the filter, and threads {free or sorted(statuses)} are without it", None)
    tried = {rule.call: _call(libc, _number(rule.call), *rule.attempt) for rule in PRELUDE if rule.attempt is not None}
    passed = [call for call, result in tried.items() if result != -errno.EPERM]
    if passed:
        raise _failure(f"the kernel took the filter, and still lets {', '.join(passed)} through", None)
    return PreludeFacts(
        len(statuses), before, after, {call: errno_name(-result) or "" for call, result in tried.items()}
    )


def _call(libc: ctypes.CDLL, number: int, *arguments: int) -> int:
    """syscall(2) with unsigned long arguments; the result, or an errno below zero."""
    result = int(libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(argument) for argument in arguments)))
    return -ctypes.get_errno() if result < 0 else result


def _number(call: str) -> int:
    """The number of a call on this machine. Raises `ConfineError` on a machine that no table is for."""
    return NUMBERS[call][seccomp.column()]


def _statuses() -> dict[int, dict[str, str]]:
    """The fields of every thread's status file (proc_pid_status(5)); a thread that ends meanwhile is left out."""
    found = {}
    for entry in THREADS.iterdir():
        try:
            text = (entry / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[int(entry.name)] = {
            name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())
        }
    return found


def _filters(statuses: dict[int, dict[str, str]]) -> int:
    return min((int(status.get("Seccomp_filters", "0")) for status in statuses.values()), default=0)


def _failure(message: str, number: int | None) -> ConfineError:
    return ConfineError(
        message if number is None else f"{message}: {os.strerror(number)}",
        code="prelude_failed",
        step=STEP,
        errno=number,
        hint="run where seccomp filters are allowed; or, where an outer sandbox confines the supervisor, say so with "
        "--declare-external supervisor_syscalls, or set OPENSHELL_BEST_EFFORT_FAILURES to start without",
    )
