"""A command under BPF programs, and system calls made raw: the two things that tests of filters do in child processes.

`under(programs, argv)` gives a longer command, as the wrappers of hosts.py do, and nests with them. This file is also the program
behind both (`python -I filtered.py NNP HEX,HEX -- CMD`, `python -I filtered.py calls`). Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import struct
import sys
from collections.abc import Iterable, Sequence

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2  # linux/prctl.h, linux/seccomp.h
REFUSED = 99  # our exit code when the kernel does not take a program; its errno is on standard error


def under(programs: Iterable[bytes], argv: Sequence[str], *, no_new_privs: bool = True) -> list[str]:
    """`argv` under these programs, installed in this order."""
    text = ",".join(program.hex() for program in programs)
    return [sys.executable, "-I", os.path.realpath(__file__), str(int(no_new_privs)), text, "--", *argv]


def calls() -> list[str]:
    """A command that makes the system calls on its standard input ([[number, *arguments], …]) and prints their errnos."""
    return [sys.executable, "-I", os.path.realpath(__file__), "calls"]


def raw(number: int, *arguments: int) -> int:
    """syscall(2) with 64-bit arguments; 0 or the errno. What it opened stays open."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    words = [ctypes.c_ulong(argument & (2**64 - 1)) for argument in arguments]
    return ctypes.get_errno() if libc.syscall(ctypes.c_long(number), *words) < 0 else 0


def install(program: bytes) -> int:
    """Install one program on the calling thread (prctl(2)); 0 or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(buffer)))
    return ctypes.get_errno() if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) < 0 else 0


def _main(argv: list[str]) -> None:
    if argv == ["calls"]:
        print(json.dumps([raw(*one) for one in json.load(sys.stdin)]))
        return
    no_new_privs, text, _, *command = argv
    if no_new_privs == "1":
        ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, *(ctypes.c_ulong(word) for word in (1, 0, 0, 0)))
    for program in text.split(","):
        number = install(bytes.fromhex(program))
        if number:
            print(errno.errorcode[number], file=sys.stderr)
            raise SystemExit(REFUSED)
    os.execvp(command[0], command)


if __name__ == "__main__":
    _main(sys.argv[1:])
