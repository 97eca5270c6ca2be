"""A classic BPF machine as seccomp runs it, so that programs for any architecture can be tried on this one.

Written from the kernel's text (Documentation/networking/filter.rst, net/core/filter.c, kernel/seccomp.c), not from the product:
it knows every instruction that seccomp_check_filter admits, and refuses a program that the kernel would refuse.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence

ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000  # linux/seccomp.h
ACTION = 0xFFFF0000
WORD = 0xFFFFFFFF
DATA_BYTES = 64  # struct seccomp_data: nr, arch, instruction_pointer, args[6]

# linux/bpf_common.h
LD, LDX, ST, STX, ALU, JMP, RET, MISC = range(8)
IMM, ABS, MEM, LEN = 0x00, 0x20, 0x60, 0x80
X_SOURCE = 0x08
OPERATIONS = {
    0x00: lambda a, b: a + b,
    0x10: lambda a, b: a - b,
    0x20: lambda a, b: a * b,
    0x30: lambda a, b: a // b,
    0x40: lambda a, b: a | b,
    0x50: lambda a, b: a & b,
    0x60: lambda a, b: a << b,
    0x70: lambda a, b: a >> b,
    0xA0: lambda a, b: a ^ b,
}
JUMPS = {
    0x10: lambda a, b: a == b,
    0x20: lambda a, b: a > b,
    0x30: lambda a, b: a >= b,
    0x40: lambda a, b: bool(a & b),
}


@functools.cache
def _parsed(program: bytes) -> list[tuple[int, int, int, int]]:
    """struct sock_filter, linux/filter.h: code, jt, jf, k."""
    return list(struct.iter_unpack("=HBBI", program))


def run(program: bytes, architecture: int, number: int, arguments: Sequence[int] = ()) -> int:
    """What one program answers to one system call; `number` may be negative, arguments are 64 bits wide.

    Raises ValueError for an instruction that seccomp does not admit, IndexError for a jump out of the program.
    """
    padded = [argument & (WORD << 32 | WORD) for argument in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.pack("=IIQ6Q", number & WORD, architecture, 0, *padded)
    instructions = _parsed(program)
    accumulator, index, memory, position = 0, 0, [0] * 16, 0
    while True:
        code, on_true, on_false, value = instructions[position]
        position += 1
        kind, operand = code & 7, index if code & X_SOURCE else value
        if kind == LD and code == LD | ABS:
            if value % 4 or value >= DATA_BYTES:
                raise ValueError(f"load from {value}")
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif kind in (LD, LDX):
            loaded = {IMM: value, MEM: memory[value % 16], LEN: DATA_BYTES}[code & 0xE0]
            accumulator, index = (loaded, index) if kind == LD else (accumulator, loaded)
        elif kind in (ST, STX):
            memory[value] = accumulator if kind == ST else index
        elif kind == ALU:
            accumulator = -accumulator & WORD if code == 0x84 else OPERATIONS[code & 0xF0](accumulator, operand) & WORD
        elif kind == JMP:
            position += value if code == JMP else on_true if JUMPS[code & 0xF0](accumulator, operand) else on_false
        elif kind == RET:
            return accumulator if code & 0x18 == 0x10 else value
        else:
            accumulator, index = (index, index) if code & 0x80 else (accumulator, accumulator)


def _severity(answer: int) -> int:
    """Actions as the kernel orders them: signed, the lowest wins (kernel/seccomp.c, seccomp_run_filters)."""
    action = answer & ACTION
    return action - (1 << 32) if action & 0x80000000 else action


def verdict(programs: Iterable[bytes], architecture: int, number: int, arguments: Sequence[int] = ()) -> int:
    """What the kernel does with a call under several filters, given in the order of their installation.

    The newest is asked first, and an older one's answer counts only if it is stricter.
    """
    answer = ALLOW
    for program in reversed(list(programs)):
        one = run(program, architecture, number, arguments)
        if _severity(one) < _severity(answer):
            answer = one
    return answer
