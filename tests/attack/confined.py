"""The attacker against confinement: it tries to get around file rules, filters and its keepers, and prints each outcome.

`python -I confined.py ORDER` (JSON: {"files": DIRECTORY or null, "victim": PID or null}) prints {attempt: "opened" or errno}. Run
outside by the same user it shows that each attempt would work where nothing confines: the fight is fair. Standard library alone.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import pathlib
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
AT_FDCWD, AT_SYMLINK_FOLLOW, RENAME_EXCHANGE = -100, 0x400, 2
# asm/unistd.h by machine, in this order: renameat2, process_vm_readv, ptrace; from 424 on they are the same everywhere.
OLD_NUMBERS = {"x86_64": (316, 310, 101), "aarch64": (276, 270, 117)}
PIDFD_OPEN, PIDFD_GETFD = 434, 438
PTRACE_SEIZE = 0x4206


def called(result: int) -> None:
    """Raise the errno of a libc call that failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def system_call(number: int, *arguments: Any) -> int:
    """syscall(2); raises OSError."""
    result = libc.syscall(ctypes.c_long(number), *arguments)
    called(result)
    return int(result)


def attempt(work: Callable[[], Any]) -> str:
    """ "opened", or the name of the errno."""
    try:
        work()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return "opened"


def exchange(one: pathlib.Path, other: pathlib.Path) -> None:
    """renameat2(2) with RENAME_EXCHANGE."""
    number = OLD_NUMBERS[os.uname().machine][0]
    system_call(number, AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE)


def follow_link(descriptor: int, target: pathlib.Path) -> None:
    """linkat(2) of an open descriptor by its name in /proc."""
    source = f"/proc/self/fd/{descriptor}".encode()
    called(libc.linkat(AT_FDCWD, source, AT_FDCWD, bytes(target), AT_SYMLINK_FOLLOW))


def around_the_file_rules(base: pathlib.Path) -> dict[str, str]:
    """`base` has hidden/ (no rule), readable/ (read-only) and writable/, each with a file `f` of the attacker's own."""
    hidden, readable, writable = base / "hidden", base / "readable", base / "writable"
    for name in ("x", "y"):
        (writable / name).write_text("mine")
    (writable / "link").symlink_to(hidden / "f")
    (writable / "way").symlink_to(hidden)
    directory, file = os.open(hidden, os.O_PATH), os.open(hidden / "f", os.O_PATH)
    seen = {
        "read a hidden file": attempt(lambda: (hidden / "f").read_bytes()),
        "list a hidden directory": attempt(lambda: os.listdir(hidden)),
        "read by a symbolic link": attempt(lambda: (writable / "link").read_bytes()),
        "create by a symbolic link": attempt(lambda: (writable / "way" / "new1").write_text("x")),
        "read by dot-dot": attempt(lambda: (writable / ".." / "hidden" / "f").read_bytes()),
        "read by /proc/self/root": attempt(lambda: pathlib.Path(f"/proc/self/root{hidden}/f").read_bytes()),
        "read beneath an O_PATH descriptor": attempt(lambda: os.open("f", os.O_RDONLY, dir_fd=directory)),
        "open an O_PATH descriptor anew": attempt(lambda: os.open(f"/proc/self/fd/{file}", os.O_RDONLY)),
        "link a descriptor to a writable place": attempt(lambda: follow_link(file, writable / "l1")),
        "truncate by a descriptor's name": attempt(lambda: os.truncate(f"/proc/self/fd/{file}", 1)),
        "link a hidden file": attempt(lambda: os.link(hidden / "f", writable / "l2")),
        "link a read-only file": attempt(lambda: os.link(readable / "f", writable / "l3")),
        "exchange with a read-only file": attempt(lambda: exchange(writable / "x", readable / "f")),
        "write a read-only file": attempt(lambda: (readable / "f").write_text("x")),
        "truncate a read-only file": attempt(lambda: os.truncate(readable / "f", 1)),
        "create in a read-only place": attempt(lambda: (readable / "new").write_text("x")),
        "move into a read-only place": attempt(lambda: os.rename(writable / "y", readable / "y")),
        "move out of a read-only place": attempt(lambda: os.rename(readable / "moves", writable / "moves")),
        "remove in a read-only place": attempt(lambda: os.unlink(readable / "goes")),
        "rename a writable place": attempt(lambda: os.rename(writable, base / "renamed")),
    }
    os.fchdir(directory)
    return seen | {"read from a hidden working directory": attempt(lambda: os.open("f", os.O_RDONLY))}


def against(victim: int) -> dict[str, str]:
    """What a process can do to another of its user."""
    _, read_memory, ptrace = OLD_NUMBERS[os.uname().machine]
    vector = (ctypes.c_uint64 * 2)(0, 0)

    def take_a_descriptor() -> None:
        system_call(PIDFD_GETFD, system_call(PIDFD_OPEN, victim, 0), 0, 0)

    return {
        "signal": attempt(lambda: os.kill(victim, signal.SIGCONT)),
        "open its memory": attempt(lambda: os.open(f"/proc/{victim}/mem", os.O_RDWR)),
        "read its environment": attempt(lambda: pathlib.Path(f"/proc/{victim}/environ").read_bytes()),
        "read its memory": attempt(lambda: system_call(read_memory, victim, vector, 1, vector, 1, 0)),
        "its working directory": attempt(lambda: os.listdir(f"/proc/{victim}/cwd")),
        "its root": attempt(lambda: os.listdir(f"/proc/{victim}/root/")),
        "take a descriptor": attempt(take_a_descriptor),
        "trace": attempt(lambda: system_call(ptrace, PTRACE_SEIZE, victim, 0, 0)),
        "its limits": attempt(lambda: resource.prlimit(victim, resource.RLIMIT_CPU, (1000, 1000))),
    }


def main() -> None:
    """Try, and print."""
    order = json.loads(sys.argv[1])
    seen = around_the_file_rules(pathlib.Path(order["files"])) if order["files"] else {}
    if order["victim"]:
        seen |= against(order["victim"])
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
