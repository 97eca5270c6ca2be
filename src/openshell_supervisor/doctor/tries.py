"""The doctor's hands: a short-lived process that really tries what the supervisor will need, each thing in a twin of its own.

Run as `python -I -m openshell_supervisor.doctor.tries`; prints one JSON object, {name of the try: outcome}. Every try changes
only the twin that makes it (its namespaces, its filters, its identity), and the twin is gone before the next begins. A twin
that a runtime's profile kills is an outcome like another. Nothing is judged here; what the answers mean is for the checks.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator

from openshell_supervisor.confine.launcher import mounts, place, privileges
from openshell_supervisor.confine.launcher.kernel import (
    CLONE_NEWNET,
    CLONE_NEWUSER,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    StepError,
    call,
    install_filter,
    libc,
    prctl,
)

# A twin needs a few milliseconds; taking a network namespace down can hold the kernel's lock for tens of them.
TWIN_SECONDS = 2.0
NOBODY = 65534  # kernel/sys.c, overflowuid: a user that every host has

# asm/unistd.h of x86_64 and asm-generic/unistd.h, which aarch64 uses.
NUMBERS = {
    "x86_64": {
        "splice": 275, "mount": 165, "setresuid": 117, "prctl": 157, "unshare": 272, "setns": 308, "seccomp": 317,
        "memfd_create": 319, "clone3": 435, "close_range": 436,
    },
    "aarch64": {
        "splice": 76, "mount": 40, "setresuid": 147, "prctl": 167, "unshare": 97, "setns": 268, "seccomp": 277,
        "memfd_create": 279, "clone3": 435, "close_range": 436,
    },
}  # fmt: skip
LANDLOCK_CREATE, LANDLOCK_RESTRICT = 444, 446  # the same on every architecture
LANDLOCK_VERSION, LANDLOCK_READ_DIR = 1, 8  # linux/landlock.h
_NONE = 2**64 - 1  # -1, as the kernel reads an unsigned long
# Arguments with which a call that reaches the kernel fails, or does nothing: name, arguments, what the kernel then answers (0 for
# success). Any other answer comes from somebody in between.
HARMLESS: tuple[tuple[str, tuple[int, ...], int], ...] = (
    ("unshare", (0,), 0),
    ("setns", (_NONE, 0), errno.EBADF),
    ("mount", (0, 0, 0, 0, 0), errno.EFAULT),
    ("clone3", (0, 0), errno.EINVAL),
    ("seccomp", (0xFFFF, 0, 0), errno.EINVAL),
    ("prctl", (22, 2, 0, 0, 0), errno.EFAULT),  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER, no program
    ("setresuid", (_NONE, _NONE, _NONE), 0),
    ("close_range", (5, 4, 0), errno.EINVAL),
    ("memfd_create", (0, 0xFFFF_FFFF), errno.EINVAL),
    ("splice", (_NONE, 0, _NONE, 0, 1, 0), errno.EBADF),
)
# seccomp(2): a number that no architecture uses, and an errno that it would never answer by itself.
UNUSED_NUMBER = 1023
SET_MODE_FILTER, FLAG_TSYNC = 1, 1  # linux/seccomp.h
KERNEL_LOG_BYTES = 8192


class Diary:
    """What a twin writes down, line by line, so that it is known where it was killed: before each step its name, then how it
    ended (errno or None, and a text that is empty for a step that worked), and facts."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, kind: str, *values: object) -> None:
        """One line: "begin" and a step's name; "step", name, errno, text; "fact", name, value; "lost" and why."""
        os.write(self._descriptor, json.dumps([kind, *values]).encode() + b"\n")

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Write down how the block begins and ends; a refusal ends the try by going on as it came."""
        self.write("begin", name)
        try:
            yield
        except OSError as error:
            exact = error.step if isinstance(error, StepError) else name
            self.write("step", exact, error.errno or None, error.strerror or str(error))
            raise
        self.write("step", name, None, "")


def try_user_namespace(diary: Diary) -> None:
    """A user namespace with a network namespace in it, as the loopback rung makes it; then the fence and a private mount."""
    try:
        with diary.step("unshare(CLONE_NEWUSER|CLONE_NEWNET)"):
            place.make_user_namespace({"uid": os.geteuid(), "gid": os.getegid(), "groups": None})
    except OSError:
        # Which of the two was it? Each has a limit of its own, and both answer ENOSPC.
        diary.write("fact", "user_alone", libc.unshare(CLONE_NEWUSER) == 0)
        raise
    with diary.step("raise lo"):
        place.raise_loopback()
    _fence(diary)


def try_network_namespace(diary: Diary) -> None:
    """A network namespace by our own capabilities, left and entered again as the veth rung's launcher does."""
    with diary.step("unshare(CLONE_NEWNET)"):
        call("unshare(CLONE_NEWNET)", libc.unshare, CLONE_NEWNET)
    with diary.step("setns(CLONE_NEWNET)"):
        namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        call("setns(CLONE_NEWNET)", libc.setns, namespace, CLONE_NEWNET)
    with diary.step("raise lo"):
        place.raise_loopback()
    _fence(diary)


def _fence(diary: Diary) -> None:
    """The fence's rules and the log of refused packets, in the scratch namespace that we are in."""
    import ipaddress

    from openshell_supervisor.boundary import bypass, nft
    from openshell_supervisor.boundary.netlink import NETLINK_NETFILTER, Netlink

    with contextlib.suppress(OSError), diary.step("nft"), Netlink(NETLINK_NETFILTER) as netfilter:
        fence = nft.install(netfilter, nft.ruleset(ipaddress.IPv4Address("10.200.0.1"), 3128, "doctor"))
        diary.write("fact", "left_out", {name: errno.errorcode.get(number) for name, number in fence.left_out.items()})
    with contextlib.suppress(OSError), diary.step("nflog"):
        bypass.open_log(nft.LOG_GROUP).close()


def try_mount(diary: Diary) -> None:
    """A directory made read-only in a mount namespace of our own; inside a user namespace where we lack the capability."""
    if not _effective(21):  # CAP_SYS_ADMIN, linux/capability.h
        with diary.step("unshare(CLONE_NEWUSER)"):
            place.make_user_namespace({"uid": os.geteuid(), "gid": os.getegid(), "groups": None})
    with diary.step("read-only bind mount"):
        writable = [path for path in ("/dev", "/proc", "/tmp", "/") if not os.statvfs(path).f_flag & os.ST_RDONLY]
        if not mounts.protect(writable[:1], []):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def try_filter(diary: Diary) -> None:
    """A filter of our own, installed as the launcher does it, and a system call that it answers."""
    with diary.step("no_new_privs"):
        prctl("no_new_privs", PR_SET_NO_NEW_PRIVS, 1)
    with diary.step("prctl(PR_SET_SECCOMP)"):
        _raise(install_filter(_program()))
    _verify_filter(diary)


def try_filter_for_all_threads(diary: Diary) -> None:
    """The same through seccomp(2) with SECCOMP_FILTER_FLAG_TSYNC, as the supervisor confines itself."""
    number = NUMBERS.get(os.uname().machine, {}).get("seccomp")
    if number is None:
        return
    with diary.step("no_new_privs"):
        prctl("no_new_privs", PR_SET_NO_NEW_PRIVS, 1)
    with diary.step("seccomp(2) with TSYNC"):
        program = _program()
        instructions = ctypes.create_string_buffer(program, len(program))
        header = ctypes.create_string_buffer(struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(instructions)))
        _raise(_syscall(number, SET_MODE_FILTER, FLAG_TSYNC, ctypes.addressof(header)))
    _verify_filter(diary)


def _verify_filter(diary: Diary) -> None:
    with diary.step("the filter answers"):
        answer = _syscall(UNUSED_NUMBER)
        if answer != errno.EUCLEAN:
            raise OSError(answer, "the filter was installed and does nothing")


def _program() -> bytes:
    """load the number; is it the unused one? then EUCLEAN; else allow (struct sock_filter, linux/bpf_common.h)."""
    lines = (
        (0x20, 0, 0, 0),
        (0x15, 0, 1, UNUSED_NUMBER),
        (0x06, 0, 0, 0x00050000 | errno.EUCLEAN),
        (0x06, 0, 0, 0x7FFF0000),
    )
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def try_landlock(diary: Diary) -> None:
    """A ruleset that allows no directory to be listed, and a directory that then cannot be."""
    with diary.step("landlock_create_ruleset"):
        attribute = ctypes.create_string_buffer(struct.pack("=Q", LANDLOCK_READ_DIR))
        ruleset = libc.syscall(LANDLOCK_CREATE, ctypes.byref(attribute), ctypes.c_size_t(8), 0)
        if ruleset < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with diary.step("no_new_privs"):
        prctl("no_new_privs", PR_SET_NO_NEW_PRIVS, 1)
    os.listdir("/")
    with diary.step("landlock_restrict_self"):
        _raise(_syscall(LANDLOCK_RESTRICT, ruleset, 0))
    with diary.step("the ruleset answers"):
        try:
            os.listdir("/")
        except PermissionError:
            return
        raise OSError(0, "the ruleset was enforced and refuses nothing")


def try_identity(diary: Diary) -> None:
    """The fall from our user to nobody, and that there is no way back. For uid 0 only."""
    if os.geteuid() != 0:
        return
    with diary.step("become nobody"):
        privileges.take_identity({"uid": NOBODY, "gid": NOBODY, "groups": []})
    with diary.step("drop capabilities"):
        prctl("no_new_privs", PR_SET_NO_NEW_PRIVS, 1)
        diary.write("fact", "bounding_set_empty", privileges.drop_capabilities())
    with diary.step("no way back"):
        try:
            os.setuid(0)
        except OSError:
            return
        raise OSError(0, "uid 0 could be taken again")


def try_calls(diary: Diary) -> None:
    """Each call that the supervisor needs, with arguments that do nothing: who answers, the kernel or somebody in between?"""
    numbers = NUMBERS.get(os.uname().machine, {})
    for name, arguments, expected in HARMLESS:
        if name in numbers:
            diary.write("begin", name)
            answer = _syscall(numbers[name], *arguments)
            text = "" if answer == expected else os.strerror(answer) if answer else "it succeeded with nonsense"
            diary.write("step", name, answer if text else None, text)
    with contextlib.suppress(OSError), diary.step("socket(AF_NETLINK)"):
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE).close()


def try_kernel_log(diary: Diary) -> None:
    """Does the kernel call itself gVisor in its log? (syslog(2), SYSLOG_ACTION_READ_ALL; the text itself is not kept.)"""
    buffer = ctypes.create_string_buffer(KERNEL_LOG_BYTES)
    with diary.step("syslog(SYSLOG_ACTION_READ_ALL)"):
        length = call("syslog", libc.klogctl, 3, buffer, KERNEL_LOG_BYTES)
    diary.write("fact", "gvisor", b"gvisor" in buffer.raw[:length].lower())


TRIES: dict[str, Callable[[Diary], None]] = {
    "calls": try_calls,
    "user_namespace": try_user_namespace,
    "network_namespace": try_network_namespace,
    "mount": try_mount,
    "filter": try_filter,
    "filter_for_all_threads": try_filter_for_all_threads,
    "landlock": try_landlock,
    "identity": try_identity,
    "kernel_log": try_kernel_log,
}


def _syscall(number: int, *arguments: int) -> int:
    """syscall(2); 0 or the errno."""
    padded = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
    return ctypes.get_errno() if libc.syscall(ctypes.c_long(number), *padded) < 0 else 0


def _raise(number: int) -> None:
    if number:
        raise OSError(number, os.strerror(number))


def _effective(capability: int) -> bool:
    with open("/proc/self/status") as status:
        mask = next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)
    return bool(mask >> capability & 1)


def in_a_twin(attempt: Callable[[Diary], None]) -> dict[str, object]:
    """Run one try in a process of its own: its steps and facts, and how the twin was lost, if it was."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        _live(attempt, writing)
    os.close(writing)
    text, ended = _until_the_end(reading)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    lines = [json.loads(line) for line in text.splitlines()]
    steps = [line[1:] for line in lines if line[0] == "step"]
    lost = next((line[1] for line in lines if line[0] == "lost"), None)
    begun = next((line[1] for line in reversed(lines) if line[0] == "begin"), "the start")
    if not ended:
        lost = f"no end of {begun} within {TWIN_SECONDS:g} s"
    elif os.WIFSIGNALED(status):
        lost = f"killed by {signal.Signals(os.WTERMSIG(status)).name} in {begun}"
    return {"steps": steps, "facts": dict(line[1:] for line in lines if line[0] == "fact"), "lost": lost}


def _until_the_end(reading: int) -> tuple[bytes, bool]:
    """What the twin wrote, and whether it ended in time."""
    deadline = time.monotonic() + TWIN_SECONDS
    text = b""
    with os.fdopen(reading, "rb", 0) as pipe:
        while (left := deadline - time.monotonic()) > 0:
            if select.select([pipe], [], [], left)[0]:
                data = pipe.read(65536)
                if not data:
                    return text, True
                text += data
    return text, False


def _live(attempt: Callable[[Diary], None], writing: int) -> None:
    """The twin: try, and end without unwinding into the parent's code."""
    diary = Diary(writing)
    try:
        with contextlib.suppress(OSError):  # it is in the diary
            attempt(diary)
    except Exception as error:  # noqa: BLE001  a twin's boundary: whatever it was, it is an outcome
        diary.write("lost", repr(error))
    finally:
        os._exit(0)


def main() -> int:
    """Try everything, one after the other, and print what came of it."""
    libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    sys.stdout.write(json.dumps({name: in_a_twin(attempt) for name, attempt in TRIES.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
