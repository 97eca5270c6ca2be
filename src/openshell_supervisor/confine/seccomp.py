"""System call filters, as BPF programs that the launcher installs. This module builds programs and installs none.

Two kinds. The boundary's filter is assembled here by hand, because the network boundary leans on it and must not depend on a
library: it closes what a network namespace does not hold (AF_VSOCK, vsock(7), and io_uring, which makes sockets without
socket(2)). The workload's filters and the supervisor's own come from the tables through libseccomp (pyseccomp).

A call of a foreign architecture (int 0x80 on x86_64) ends the process; a number of the x32 ABI, and every call that a rule
names, is answered with an errno. What each rule is for stands in `syscall_tables`.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from openshell_supervisor.confine import syscall_tables as tables
from openshell_supervisor.confine.syscall_tables import Rule
from openshell_supervisor.errors import ConfineError
from openshell_supervisor.policy.model import Netlink

AF_VSOCK = 40  # linux/socket.h
# linux/audit.h: the architecture as seccomp_data names it, with the number of socket(2) in it (asm/unistd.h of each), and that
# of socketcall(2) where it exists: its arguments lie in memory, so it can only be refused whole. The native one comes first.
ARCHITECTURES = {
    "x86_64": ((0xC000003E, 41, None), (0x40000003, 359, 102)),  # native; i386
    "aarch64": ((0xC00000B7, 198, None), (0x40000028, 281, None)),  # native; 32-bit ARM
}
COLUMN = {"x86_64": 0, "aarch64": 1}  # of syscall_tables.NUMBERS
IO_URING_SETUP = 425  # asm-generic/unistd.h: the same on every architecture
X32_BIT = 0x40000000  # asm/unistd.h: system calls of the x32 ABI carry it on x86_64
LIBRARY = "libseccomp.so.2"

# linux/seccomp.h and linux/bpf_common.h
RET_ALLOW, RET_ERRNO, RET_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
OFFSET_NUMBER, OFFSET_ARCHITECTURE, OFFSET_FIRST_ARGUMENT = 0, 4, 16  # the low word of args[0]; both are little-endian


@dataclass(frozen=True, slots=True)
class FilterOptions:
    """What differs between workloads: how much of AF_NETLINK they may open, and whether they may have inet sockets at all."""

    netlink: Netlink = Netlink.DENIED
    inet: bool = True


def workload_filters(options: FilterOptions, machine: str | None = None) -> tuple[bytes, ...]:
    """The workload's programs in the order of their installation; the last one refuses any further filter.

    Two, because one filter has one errno for what it refuses: clone3 gets ENOSYS, everything else EPERM.
    Raises `ConfineError` (seccomp_unsupported_architecture, libseccomp_missing, seccomp_rules). Takes 2 ms.
    """
    rules = tables.workload_rules(options.netlink, inet=options.inet)
    return export(tables.CLONE3, errno.ENOSYS, machine), export(rules, errno.EPERM, machine)


def self_probe_tries(options: FilterOptions, machine: str | None = None) -> list[dict[str, object]]:
    """Harmless calls for the self-probe: {kind, name, number, args, expect}, `expect` being the errno under the filters.

    Without a filter each of them fails with another errno, and none has an effect.
    """
    place = column(machine)
    rules = tables.workload_rules(options.netlink, inet=options.inet)
    answers = [*((rule, errno.ENOSYS) for rule in tables.CLONE3), *((rule, errno.EPERM) for rule in rules)]
    tries = [
        _try(rule.name, tables.NUMBERS[rule.call][place], rule.attempt, answer)
        for rule, answer in answers
        if rule.attempt is not None
    ]
    if _known(machine) == "x86_64":
        tries.append(_try("x32 getpid", X32_BIT | tables.GETPID, (), errno.EPERM))
    return tries


def _try(name: str, number: int, arguments: tuple[int, ...], expect: int) -> dict[str, object]:
    return {"kind": "syscall", "name": name, "number": number, "args": list(arguments), "expect": expect}


def export(rules: Iterable[Rule], answer: int, machine: str | None = None) -> bytes:
    """One program for `machine` (default: this one) that answers `answer`, an errno, to what a rule names. Raises `ConfineError`.

    libseccomp treats a foreign architecture and an x32 number alike. Here its answer for both is EPERM, and a prefix of our
    own ends a process of a foreign architecture before. The prefix also refuses what this libseccomp does not know by name.
    """
    known = _known(machine)
    library = _pyseccomp()
    native = ARCHITECTURES[known][0][0]
    prefix: list[tuple[object, ...]] = [("load", OFFSET_ARCHITECTURE), ("equal", native, "native", None)]
    prefix += [("ret", RET_KILL_PROCESS), ("label", "native"), ("load", OFFSET_NUMBER)]
    try:
        program = library.SyscallFilter(library.ALLOW)
        if native != library.system_arch():
            program.add_arch(native)
            program.remove_arch(library.system_arch())
        program.set_attr(library.Attr.ACT_BADARCH, library.ERRNO(errno.EPERM))
        for number, rule in enumerate(rules):
            if library.resolve_syscall(native, rule.call) >= 0:
                conditions = [library.Arg(c.argument, library.MASKED_EQ, c.mask, c.value) for c in rule.conditions]
                program.add_rule(library.ERRNO(answer), rule.call, *conditions)
            elif rule.conditions:
                raise OSError(errno.EOPNOTSUPP, f"libseccomp does not know {rule.call}")
            else:
                after = f"after {number}"
                prefix += [("unequal", tables.NUMBERS[rule.call][COLUMN[known]], after), ("ret", RET_ERRNO | answer)]
                prefix.append(("label", after))
        return _assemble(prefix) + _taken_out(program)
    except OSError as error:
        raise ConfineError(
            f"libseccomp cannot make the filters: {error.strerror}",
            code="seccomp_rules",
            step="seccomp rules",
            errno=error.errno,
            hint="libseccomp 2.5 or newer is needed",
        ) from error


def column(machine: str | None = None) -> int:
    """Where the numbers of `machine` (default: this one) stand in a row of `syscall_tables.NUMBERS`. Raises `ConfineError`."""
    return COLUMN[_known(machine)]


def _known(machine: str | None) -> str:
    """The machine's name (uname -m), this one by default. Raises `ConfineError` for one that no table is for."""
    name = machine or os.uname().machine
    if name not in ARCHITECTURES:
        raise ConfineError(
            f"unsupported architecture for seccomp: {name}",
            code="seccomp_unsupported_architecture",
            step="seccomp rules",
            hint=f"system call filters exist for {' and '.join(ARCHITECTURES)}",
        )
    return name


def _pyseccomp() -> Any:
    """pyseccomp, imported when it is first needed. Raises `ConfineError` where libseccomp is missing."""
    try:
        with _libraries_by_name():
            import pyseccomp
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfineError(
            f"{LIBRARY} cannot be loaded: {error}",
            code="libseccomp_missing",
            step="seccomp rules",
            hint="install libseccomp2 (Debian, Ubuntu) or libseccomp (Fedora, Alpine)",
        ) from error
    return pyseccomp


@contextlib.contextmanager
def _libraries_by_name() -> Iterator[None]:
    """While pyseccomp is imported, it loads its two libraries by their names and does not search for them.

    The search (ctypes.util.find_library) runs ldconfig and then whatever compiler is in PATH, as root, out of the image.
    """
    search = ctypes.util.find_library
    known = {"seccomp": LIBRARY, "c": None}  # None: the program itself, in which every libc is already loaded
    ctypes.util.find_library = lambda name: known[name] if name in known else search(name)
    try:
        yield
    finally:
        ctypes.util.find_library = search


def _taken_out(program: Any) -> bytes:
    """The program of a libseccomp filter; at most 32 KiB (BPF_MAXINSNS), so a pipe (64 KiB) takes it whole. Raises OSError."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source:
        with os.fdopen(writing, "wb") as sink:
            program.export_bpf(sink)
        return source.read()


def boundary_filter(machine: str | None = None) -> bytes:
    """A program that answers EPERM to AF_VSOCK sockets and io_uring, for `machine` (default: this one), empty if unknown.

    Another architecture than the two known ones of a machine is refused whole: its numbers mean something else.
    """
    known = ARCHITECTURES.get(machine or os.uname().machine)
    if known is None:
        return b""
    deny, allow = ("ret", RET_ERRNO | errno.EPERM), ("ret", RET_ALLOW)
    program: list[tuple[object, ...]] = [("load", OFFSET_ARCHITECTURE)]
    program += [("equal", architecture, f"arch{index}", None) for index, (architecture, _, _) in enumerate(known)]
    program.append(deny)
    for index, (_, socket_number, socketcall_number) in enumerate(known):
        program += [("label", f"arch{index}"), ("load", OFFSET_NUMBER)]
        program.append(("at_least", X32_BIT, "deny", None))
        program.append(("equal", IO_URING_SETUP, "deny", None))
        if socketcall_number is not None:
            program.append(("equal", socketcall_number, "deny", None))
        program += [("equal", socket_number, "socket", None), allow]
    program += [("label", "socket"), ("load", OFFSET_FIRST_ARGUMENT), ("equal", AF_VSOCK, "deny", None), allow]
    program += [("label", "deny"), deny]
    return _assemble(program)


def _assemble(program: list[tuple[object, ...]]) -> bytes:
    """Resolve labels to jump offsets (counted from the next instruction, forward only, at most 255) and encode."""
    places: dict[object, int] = {}
    instructions: list[tuple[object, ...]] = []
    for item in program:
        if item[0] == "label":
            places[item[1]] = len(instructions)
        else:
            instructions.append(item)
    return b"".join(_encode(item, index, places) for index, item in enumerate(instructions))


def _encode(item: tuple[object, ...], index: int, places: dict[object, int]) -> bytes:
    if item[0] == "load":
        return struct.pack("=HBBI", LOAD, 0, 0, item[1])
    if item[0] == "ret":
        return struct.pack("=HBBI", RETURN, 0, 0, item[1])
    distance = places[item[2]] - index - 1
    if item[0] == "unequal":
        return struct.pack("=HBBI", JUMP_EQUAL, 0, distance, item[1])
    return struct.pack("=HBBI", JUMP_EQUAL if item[0] == "equal" else JUMP_AT_LEAST, distance, 0, item[1])
