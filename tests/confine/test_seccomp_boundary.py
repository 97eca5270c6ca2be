"""The boundary's filter: AF_VSOCK and io_uring are closed in a child on the real kernel, their neighbours are open."""

from __future__ import annotations

import errno
import json
import os
import subprocess

import bpf
import filtered
import pytest

from openshell_supervisor.confine import seccomp

GARBAGE = 5 << 32


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers in the child are those of x86_64")
def test_vsock_and_io_uring_are_refused_and_nothing_else() -> None:
    """AF_VSOCK (with garbage in the high word too), io_uring_setup and x32 numbers get EPERM; inet and unix sockets work."""
    refused = [(41, 40, 1, 0), (41, 40 | GARBAGE, 1, 0), (425, 8, 0), (39 | seccomp.X32_BIT,)]
    allowed = [(41, 2, 1, 0), (41, 2, 2, 0), (41, 10, 1, 0), (41, 1, 1, 0), (39,)]
    argv = filtered.under([seccomp.boundary_filter()], filtered.calls())
    done = subprocess.run(argv, input=json.dumps([*refused, *allowed]), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [errno.EPERM] * len(refused) + [0] * len(allowed)


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_every_architecture_by_interpreter(machine: str) -> None:
    """On both machines, native and compatible: socket(AF_VSOCK) and io_uring are refused, other calls pass; strangers never."""
    program = seccomp.boundary_filter(machine)
    denied = bpf.ERRNO | errno.EPERM
    for architecture, socket_number, socketcall_number in seccomp.ARCHITECTURES[machine]:
        assert bpf.run(program, architecture, socket_number, (seccomp.AF_VSOCK,)) == denied
        assert bpf.run(program, architecture, socket_number, (seccomp.AF_VSOCK | GARBAGE,)) == denied
        assert bpf.run(program, architecture, socket_number, (2,)) == bpf.ALLOW
        assert bpf.run(program, architecture, seccomp.IO_URING_SETUP, (8,)) == denied
        assert bpf.run(program, architecture, 3, (seccomp.AF_VSOCK,)) == bpf.ALLOW
        if socketcall_number is not None:
            assert bpf.run(program, architecture, socketcall_number, (1,)) == denied
    assert bpf.run(program, 0xDEADBEEF, 3) == denied
    assert seccomp.boundary_filter("riscv64") == b""
