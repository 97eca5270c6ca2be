"""The kernel as the launcher sees it: constants, one wrapper per kind of call, and the error that carries a step's name."""

from __future__ import annotations

import ctypes
import os
import signal
import struct

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, without importing typing: every millisecond here delays the workload
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Request = dict[str, Any]
    Answer = tuple[dict[str, object], list[int]]

# Each constant with its header.
CLONE_NEWNS = 0x00020000  # linux/sched.h
CLONE_NEWIPC = 0x08000000  # linux/sched.h
CLONE_NEWUSER = 0x10000000  # linux/sched.h
CLONE_NEWNET = 0x40000000  # linux/sched.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h, this one and the next eight
PR_SET_DUMPABLE = 4
NETLINK_SOCK_DIAG = 4  # linux/netlink.h
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
LINUX_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
CAP_SETPCAP = 8  # linux/capability.h
LAST_POSSIBLE_CAP = 63  # two 32-bit words in capset(2)
# linux/securebits.h: NOROOT and its lock (uid 0 gains nothing from execve), KEEP_CAPS_LOCKED, NO_CAP_AMBIENT_RAISE and its lock.
SECUREBITS = 1 | 2 | 32 | 64 | 128
SECCOMP_MODE_FILTER = 2  # linux/seccomp.h
SYS_LANDLOCK_RESTRICT_SELF = 446  # asm-generic/unistd.h: the same on every architecture
CLOSE_RANGE_CLOEXEC = 1 << 2  # linux/close_range.h
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC = 1, 32, 4096, 16384  # linux/mount.h
# statvfs(3) flags that a remount in a user namespace must repeat, because they are locked there, with their mount(2) twins.
LOCKED_FLAGS = ((2, 2), (4, 4), (8, 8), (1024, 1024), (2048, 2048), (4096, 1 << 21))
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1  # linux/sockios.h, linux/if.h
IFREQ_FLAGS = "16sh22x"  # struct ifreq is 40 bytes on every 64-bit ABI
NSIG = signal.NSIG
EACCES, ENOTSOCK, ETIMEDOUT = 13, 88, 110  # errno.h

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class StepError(OSError):
    """A step failed; carries its name, so that the supervisor can say which."""

    def __init__(self, step: str, number: int, text: str = "") -> None:
        super().__init__(number, text or os.strerror(number))
        self.step = step


class step:
    """Context manager that turns an OSError inside it into a StepError of this name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> step:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, StepError):
            raise StepError(self.name, error.errno or 0, error.strerror or str(error)) from None


def call(name: str, function: Callable[..., int], *arguments: object) -> int:
    """One libc call; a result below zero raises StepError(name, errno)."""
    result = function(*arguments)
    if result < 0:
        raise StepError(name, ctypes.get_errno())
    return result


def prctl(name: str, option: int, *arguments: int) -> int:
    """prctl(2) with four unsigned long arguments, as the kernel demands for the options used here."""
    padded = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    return call(name, libc.prctl, option, *padded)


def system_call(number: int, *arguments: int) -> int:
    """syscall(2) with unsigned long arguments; 0 when it succeeded, else the errno."""
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_ulong(argument) for argument in arguments])
    return ctypes.get_errno() if result < 0 else 0


def write_file(path: str, text: str) -> None:
    """One write(2) of the whole text, as the files of /proc want it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def install_filter(program: bytes) -> int:
    """Install one BPF program (struct sock_fprog, linux/filter.h); 0, or the errno of a host that refuses it."""
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(instructions))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header), 0, 0) < 0:
        return ctypes.get_errno()
    return 0
