"""The first filter: AF_VSOCK and io_uring are closed in a child on the real kernel, their neighbours are open."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys

import pytest

from openshell_supervisor.confine import seccomp

CHILD = """
import ctypes, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
program = bytes.fromhex(sys.argv[1])
buffer = ctypes.create_string_buffer(program, len(program))
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(buffer)), 0, 0) == 0
def attempt(family, kind=1):
    try:
        socket.socket(family, kind).close()
    except OSError as error:
        return error.errno
    return 0
def raw(number, *arguments):
    return 0 if libc.syscall(number, *arguments) >= 0 else ctypes.get_errno()
high = ctypes.c_ulong(40 | 0x5 << 32)
print(attempt(40), attempt(2), attempt(2, 2), attempt(10), attempt(1), raw(425, 8, 0), raw(41, high, 1, 0), raw(39 | 0x40000000))
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers in the child are those of x86_64")
def test_vsock_and_io_uring_are_refused_and_nothing_else() -> None:
    """AF_VSOCK (with garbage in the high word too), io_uring_setup and x32 numbers get EPERM; inet and unix sockets work."""
    argv = [sys.executable, "-c", CHILD, seccomp.vsock_filter().hex()]
    seen = [int(word) for word in subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()]
    assert seen == [errno.EPERM, 0, 0, 0, 0, errno.EPERM, errno.EPERM, errno.EPERM]


def run_bpf(program: bytes, architecture: int, number: int, argument: int) -> int:
    """Interpret a program on one seccomp_data; enough of BPF for ours."""
    data = struct.pack("=iIQQ", number, architecture, 0, argument).ljust(64, b"\0")
    accumulator, index = 0, 0
    while True:
        code, on_true, on_false, value = struct.unpack_from("=HBBI", program, index * 8)
        index += 1
        if code == seccomp.LOAD:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif code == seccomp.RETURN:
            return int(value)
        else:
            holds = accumulator == value if code == seccomp.JUMP_EQUAL else accumulator >= value
            index += on_true if holds else on_false


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_every_architecture_by_interpreter(machine: str) -> None:
    """On both machines, native and compatible: socket(AF_VSOCK) and io_uring are refused, other calls pass; strangers never."""
    program = seccomp.vsock_filter(machine)
    denied = seccomp.RET_ERRNO | errno.EPERM
    for architecture, socket_number, socketcall_number in seccomp.ARCHITECTURES[machine]:
        assert run_bpf(program, architecture, socket_number, seccomp.AF_VSOCK) == denied
        assert run_bpf(program, architecture, socket_number, seccomp.AF_VSOCK | 1 << 40) == denied
        assert run_bpf(program, architecture, socket_number, 2) == seccomp.RET_ALLOW
        assert run_bpf(program, architecture, seccomp.IO_URING_SETUP, 8) == denied
        assert run_bpf(program, architecture, 3, seccomp.AF_VSOCK) == seccomp.RET_ALLOW
        if socketcall_number is not None:
            assert run_bpf(program, architecture, socketcall_number, 1) == denied
    assert run_bpf(program, 0xDEADBEEF, 3, 0) == denied
    assert seccomp.vsock_filter("riscv64") == b""
