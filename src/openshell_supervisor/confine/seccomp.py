"""System call filters, as BPF programs that the launcher installs. So far one: what a network namespace does not hold.

AF_VSOCK sockets are not bound to a network namespace (vsock(7)), so in a virtual machine they lead to its host; io_uring makes
sockets without socket(2), so it is closed with them. The whole workload filter comes with its own issue. This module builds
programs (struct sock_filter, linux/filter.h) and installs none.
"""

from __future__ import annotations

import errno
import os
import struct

AF_VSOCK = 40  # linux/socket.h
# linux/audit.h: the architecture as seccomp_data names it, with the number of socket(2) in it (asm/unistd.h of each), and that
# of socketcall(2) where it exists: its arguments lie in memory, so it can only be refused whole.
ARCHITECTURES = {
    "x86_64": ((0xC000003E, 41, None), (0x40000003, 359, 102)),  # native; i386
    "aarch64": ((0xC00000B7, 198, None), (0x40000028, 281, None)),  # native; 32-bit ARM
}
IO_URING_SETUP = 425  # asm-generic/unistd.h: the same on every architecture
X32_BIT = 0x40000000  # asm/unistd.h: system calls of the x32 ABI carry it on x86_64

# linux/seccomp.h and linux/bpf_common.h
RET_ALLOW, RET_ERRNO = 0x7FFF0000, 0x00050000
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
OFFSET_NUMBER, OFFSET_ARCHITECTURE, OFFSET_FIRST_ARGUMENT = 0, 4, 16  # the low word of args[0]; both are little-endian


def vsock_filter(machine: str | None = None) -> bytes:
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
    code = JUMP_EQUAL if item[0] == "equal" else JUMP_AT_LEAST
    return struct.pack("=HBBI", code, places[item[2]] - index - 1, 0, item[1])
