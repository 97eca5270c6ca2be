"""The launcher's loop: one request, one answer, until it becomes the workload or the supervisor is gone."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import termios
import warnings  # noqa: F401  (os.execvpe imports it when called, which is too late)

from openshell_supervisor.confine.launcher.confinement import confine
from openshell_supervisor.confine.launcher.kernel import (
    CLOSE_RANGE_CLOEXEC,
    NSIG,
    TYPE_CHECKING,
    StepError,
    libc,
    step,
)
from openshell_supervisor.confine.launcher.place import diagnostics, enter, separate
from openshell_supervisor.confine.launcher.probe import probe

if TYPE_CHECKING:
    from typing import NoReturn

    from openshell_supervisor.confine.launcher.kernel import Answer, Request

CONTROL_FD = 3
# One request line at most: the kernel's limit for argv + environment is 6 MiB with the default 8 MiB stack (execve(2)), and
# JSON escaping can double it.
MAX_REQUEST_BYTES = 16 * 1024 * 1024
MAX_PASSED_DESCRIPTORS = 4  # one is the most that a request carries


def send_signal(request: Request, descriptors: list[int]) -> Answer:
    """kill(2) to a process group, as the identity taken by an earlier `confine`."""
    with step("kill"):
        os.killpg(request["group"], request["signal"])
    return {}, []


def become(request: Request, descriptors: list[int]) -> Answer:
    """Execute the workload: own session, terminal where asked, default signals, given environment. Returns only by raising."""
    argv, environment = request["argv"], request["env"]
    with step("setsid"):
        if os.getsid(0) != os.getpid():
            os.setsid()
    if request.get("tty"):
        with step("terminal"):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in range(1, NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):  # 32 and 33 belong to libc (signal(7))
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    with step("exec"):
        os.execvpe(argv[0], argv, environment)


OPERATIONS = {
    "enter": enter,
    "separate": separate,
    "diagnostics": diagnostics,
    "confine": confine,
    "probe": probe,
    "signal": send_signal,
    "exec": become,
}


def serve(control: socket.socket) -> NoReturn:
    """Answer requests until the supervisor closes the socket; never returns after a successful `exec`."""
    received, descriptors = b"", list[int]()
    while True:
        while b"\n" not in received:
            data, passed, _, _ = socket.recv_fds(control, 65536, MAX_PASSED_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
            descriptors += passed
            if not data or len(received) > MAX_REQUEST_BYTES:
                os._exit(0)
            received += data
        line, _, received = received.partition(b"\n")
        answer, passed = answer_one(json.loads(line), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        descriptors = []
        socket.send_fds(control, [json.dumps(answer).encode() + b"\n"], passed)
        for descriptor in passed:
            os.close(descriptor)


def answer_one(request: Request, descriptors: list[int]) -> Answer:
    """Run one request; whatever fails becomes an answer with the step's name."""
    try:
        answer, passed = OPERATIONS[request["op"]](request, descriptors)
        return {"ok": True, **answer}, passed
    except StepError as error:
        return {"ok": False, "step": error.step, "errno": error.errno, "error": error.strerror}, []
    except Exception as error:  # noqa: BLE001  (the process's boundary: an unanswered failure would look like a successful exec)
        number = error.errno if isinstance(error, OSError) else 0
        return {"ok": False, "step": request.get("op", "?"), "errno": number or 0, "error": repr(error)}, []


def main() -> NoReturn:
    """Close everything that was not meant for us, then serve."""
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a signal meant for the workload ends the launcher without a traceback
    libc.close_range(CONTROL_FD, ctypes.c_uint(0xFFFFFFFF), CLOSE_RANGE_CLOEXEC)
    for name in os.listdir(
        "/proc/self/fd"
    ):  # where the call is missing, or a filter around us only says that it worked
        if int(name) >= CONTROL_FD:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                pass  # it was this listing's own
    serve(socket.socket(fileno=CONTROL_FD))
