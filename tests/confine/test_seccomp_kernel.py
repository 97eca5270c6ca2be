"""The workload's filters on the real kernel: a child makes the call and sees the errno, with and without them."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

import filtered
import pytest

import hosts
from openshell_supervisor.confine import seccomp
from openshell_supervisor.confine.seccomp import FilterOptions
from openshell_supervisor.confine.syscall_tables import CLONE3, NUMBERS, PRELUDE
from openshell_supervisor.policy.model import Netlink

WORD = 0xFFFFFFFF
GARBAGE = 0xDEADBEEF << 32
WORKLOAD = seccomp.workload_filters(FilterOptions())
X86 = os.uname().machine == "x86_64"

Wrap = Callable[[Sequence[str]], list[str]]
# As root with all capabilities, whom the kernel itself refuses least, and as a user with none.
AS = pytest.mark.parametrize(
    "wrap", [pytest.param(list, id="root", marks=pytest.mark.root), pytest.param(hosts.unprivileged, id="user")]
)


def make_calls(argv: Sequence[str], calls: Sequence[Sequence[int]]) -> list[int]:
    """Make system calls in a child; 0 or the errno for each."""
    done = hosts.run(argv, stdin=None, input=json.dumps(calls))
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout)
    return found


def number(call: str) -> int:
    """The call's number on this machine."""
    return NUMBERS[call][seccomp.column()]


@AS
@pytest.mark.parametrize("options", [FilterOptions(n, i) for n in Netlink for i in (True, False)], ids=str)
def test_every_rule_is_felt(wrap: Wrap, options: FilterOptions) -> None:
    """Each call of the self-probe gets the expected errno, and without the filters another one, never success."""
    tries = seccomp.self_probe_tries(options)
    calls = [[one["number"], *one["args"]] for one in tries]
    free = make_calls(wrap(filtered.calls()), calls)
    held = make_calls(wrap(filtered.under(seccomp.workload_filters(options), filtered.calls())), calls)
    assert [(one["name"], seen) for one, seen in zip(tries, held, strict=True)] == [
        (one["name"], one["expect"]) for one in tries
    ]
    assert [one["name"] for one, seen in zip(tries, free, strict=True) if seen in (0, one["expect"])] == []


# Calls that only a privileged process gets beyond the first check of: arguments that the kernel then refuses by itself.
PRIVILEGED = {
    "fsopen": (0, WORD),
    "fsmount": (WORD, WORD, WORD),
    "fspick": (WORD, 0, WORD),
    "move_mount": (WORD, 0, WORD, 0, WORD),
    "pivot_root": (0, 0),
    "bpf": (WORD, 0, 0),
    "init_module": (0, 0, 0),
    "finit_module": (WORD, 0, WORD),
    "delete_module": (0, 0),
    "kexec_load": (0, 0, 0, WORD),
    "kexec_file_load": (WORD, WORD, 0, 0, WORD),
    "open_by_handle_at": (WORD, 0, 0),
}


@pytest.mark.root
def test_calls_that_need_privileges_are_refused_to_root() -> None:
    """With every capability still there, what the kernel alone would refuse with another errno answers EPERM."""
    calls = [[number(call), *arguments] for call, arguments in PRIVILEGED.items()]
    free = dict(zip(PRIVILEGED, make_calls(filtered.calls(), calls), strict=True))
    assert [call for call, seen in free.items() if seen in (0, errno.EPERM)] == []
    assert set(make_calls(filtered.under(WORKLOAD, filtered.calls()), calls)) == {errno.EPERM}


@AS
def test_the_high_word_of_an_argument_opens_nothing(wrap: Wrap) -> None:
    """socket, socketpair, seccomp and prctl take an int: garbage above it neither gets around a rule nor makes one apply."""
    tries = [
        one
        for one in seccomp.self_probe_tries(FilterOptions(Netlink.ROUTE))
        if one["name"].startswith(("so", "se", "pr"))
    ]
    refused = [
        [one["number"], *(argument | GARBAGE for argument in one["args"])]
        for one in tries
        if "process" not in one["name"]
    ]
    allowed = [
        [number("socket"), family | GARBAGE, kind | GARBAGE, GARBAGE]
        for family, kind in ((1, 1), (2, 1), (10, 2), (16, 3))
    ]
    programs = seccomp.workload_filters(FilterOptions(Netlink.ROUTE))
    assert make_calls(wrap(filtered.calls()), allowed) == [0] * len(allowed)
    assert len(refused) > 100
    seen = make_calls(wrap(filtered.under(programs, filtered.calls())), [*refused, *allowed])
    assert seen == [errno.EPERM] * len(refused) + [0] * len(allowed)


# Prints what ordinary programs get; the same under the filters as without them.
ORDINARY = """
import asyncio, ctypes, multiprocessing, os, socket, subprocess, tempfile, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, arguments))
    return (result, ctypes.get_errno()) if result < 0 else 0
def attempt(make):
    try:
        make()
        return "ok"
    except OSError as error:
        return error.errno
N = %(numbers)r
seen = []
threading.Thread(target=lambda: seen.append("thread")).start()
print(subprocess.run(["sh", "-c", "echo child; exec true"], capture_output=True).stdout)
async def child():
    process = await asyncio.create_subprocess_exec("echo", "async", stdout=-1)
    return await process.communicate()
print(asyncio.run(child()))
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(abs, [-1, 2]))
for family in range(64):
    for kind in (1, 2, 3, 5):
        if family in (0, 1, 2, 10) and (family, kind) not in ((2, 3), (10, 3)):
            print(family, kind, attempt(lambda: socket.socket(family, kind).close()))
print(attempt(lambda: socket.socketpair()), attempt(lambda: socket.socketpair(socket.AF_INET)))
print(call(N["unshare"], 0x200), call(N["unshare"], 0x400), call(N["unshare"], 0), call(N["unshare"], 1))
path = ctypes.create_string_buffer(b"/nonexistent")
print(call(N["execveat"], 2**64 - 100, ctypes.addressof(path), 0, 0, 0))
allow = ctypes.c_uint32(0x7FFF0000)
print(call(N["seccomp"], 2, 0, ctypes.addressof(allow)), call(N["seccomp"], 9, 0, 0))
print(call(N["prctl"], 15, ctypes.addressof(path)), call(N["prctl"], 22, 7), call(N["prctl"], 39))
print(call(N["clone"], 0x10000, 0, 0, 0, 0), os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)[1])
print(os.sched_getaffinity(0) != set(), os.getrandom(1) != b"", os.eventfd(0) > 0, os.pipe2(0) != ())
print(attempt(lambda: tempfile.TemporaryFile().close()), seen)
"""


@AS
def test_ordinary_programs_notice_nothing(wrap: Wrap) -> None:
    """Threads, children, pools, sockets of the allowed families, and the conditional calls with neighbouring arguments."""
    argv = [sys.executable, "-I", "-c", ORDINARY % {"numbers": {name: number(name) for name in NUMBERS}}]
    free, held = hosts.run(wrap(argv)), hosts.run(wrap(filtered.under(WORKLOAD, argv)))
    assert free.returncode == 0 and "thread" in free.stdout and "async" in free.stdout, free.stderr
    assert held.stdout.splitlines() == free.stdout.splitlines(), held.stderr


THREAD = "import threading; t = threading.Thread(target=print, args=('started',)); t.start(); t.join()"


def test_threads_start_because_clone3_does_not_exist() -> None:
    """With ENOSYS libc falls back to clone and a thread starts; the same filter with EPERM is the control: none starts."""
    argv = [sys.executable, "-I", "-c", THREAD]
    assert hosts.run(filtered.under([seccomp.export(CLONE3, errno.ENOSYS)], argv)).stdout == "started\n"
    assert hosts.run(filtered.under(WORKLOAD, argv)).stdout == "started\n"
    refused = hosts.run(filtered.under([seccomp.export(CLONE3, errno.EPERM)], argv))
    if "musl" not in (libc := hosts.run(["ldd", "--version"]).stdout.lower()) and libc:
        assert "can't start new thread" in refused.stderr


THIRD = """
import sys; sys.path.insert(0, %r)
import ctypes, filtered, struct
program = struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000)
buffer = ctypes.create_string_buffer(program)
header = ctypes.create_string_buffer(struct.pack("=H6xQ", 1, ctypes.addressof(buffer)))
print(filtered.install(program), filtered.raw(%d, 1, 0, ctypes.addressof(header)))
"""


@AS
def test_the_last_filter_refuses_another_one(wrap: Wrap) -> None:
    """Under both programs neither prctl nor seccomp installs a filter (EPERM); under the first alone both do."""
    argv = [sys.executable, "-I", "-c", THIRD % (str(pathlib.Path(filtered.__file__).parent), number("seccomp"))]
    assert hosts.run(wrap(filtered.under(WORKLOAD[:1], argv))).stdout == "0 0\n"
    assert hosts.run(wrap(filtered.under(WORKLOAD, argv))).stdout == f"{errno.EPERM} {errno.EPERM}\n"


def test_the_wrong_order_is_noticed() -> None:
    """Main filter first: the second installation is refused, so an order that is turned round cannot pass unseen."""
    done = hosts.run(filtered.under(reversed(WORKLOAD), ["true"]))
    assert (done.returncode, done.stderr) == (filtered.REFUSED, "EPERM\n")


@pytest.mark.parametrize("program", [*WORKLOAD, seccomp.boundary_filter()], ids=["clone3", "main", "boundary"])
def test_a_user_needs_no_new_privs_first(program: bytes) -> None:
    """Without the flag the kernel takes no filter from an unprivileged process (EACCES); with it, it does."""
    without = hosts.run(hosts.unprivileged(filtered.under([program], ["true"], no_new_privs=False)))
    assert (without.returncode, without.stderr) == (filtered.REFUSED, "EACCES\n")
    assert hosts.run(hosts.unprivileged(filtered.under([program], ["true"]))).returncode == 0


def test_the_kernel_counts_the_filters() -> None:
    """Seccomp_filters is 2 under the workload's, 3 with the prelude before them, and children inherit all."""
    argv = ["sh", "-c", "true; grep -E '^(Seccomp|Seccomp_filters|NoNewPrivs):' /proc/self/status"]
    prelude = seccomp.export(PRELUDE, errno.EPERM)
    base = int(next(line.split()[1] for line in hosts.run(argv).stdout.splitlines() if "filters" in line))
    for programs in (WORKLOAD, (prelude, *WORKLOAD)):
        seen = hosts.run(filtered.under(programs, argv)).stdout.split()
        assert seen == ["NoNewPrivs:", "1", "Seccomp:", "2", "Seccomp_filters:", str(base + len(programs))]


# Enters the kernel through int 0x80: push rbx (the caller's); mov eax, ebx, ecx and edx, immediate; int 0x80; pop rbx; ret.
INT80 = """
import ctypes, mmap, struct, sys
number, *arguments = map(int, sys.argv[1:])
words = zip((0xB8, 0xBB, 0xB9, 0xBA), (number, *arguments))
code = b"\\x53" + b"".join(struct.pack("=BI", *word) for word in words) + b"\\xcd\\x80\\x5b\\xc3"
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(code)
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))() > 0 or "refused")
"""


def int80(*words: int, programs: Sequence[bytes] = ()) -> subprocess.CompletedProcess[str]:
    """One 32-bit system call, in a child; prints True when its result is above 0."""
    argv = [sys.executable, "-I", "-c", INT80, *map(str, words)]
    return hosts.run(filtered.under(programs, argv) if programs else argv)


@pytest.mark.skipif(not X86, reason="needs x86_64 for int 0x80")
def test_the_i386_entry_ends_the_process() -> None:
    """getpid by int 0x80 answers without filters (the control) and ends in SIGSYS under each of them, the prelude's too."""
    free = int80(20, 0, 0, 0)
    if free.stdout != "True\n":
        pytest.skip("needs the host program int 0x80 in the kernel (CONFIG_IA32_EMULATION)")
    for programs in (WORKLOAD, WORKLOAD[:1], WORKLOAD[1:], [seccomp.export(PRELUDE, errno.EPERM)]):
        assert int80(20, 0, 0, 0, programs=programs).returncode == -signal.SIGSYS


@pytest.mark.skipif(not X86, reason="needs x86_64 for int 0x80")
def test_the_boundary_holds_through_the_i386_entry() -> None:
    """The boundary's filter lets 32-bit programs live: getpid and AF_UNIX work, AF_VSOCK and socketcall do not."""
    if int80(20, 0, 0, 0).stdout != "True\n":
        pytest.skip("needs the host program int 0x80 in the kernel (CONFIG_IA32_EMULATION)")
    boundary = [seccomp.boundary_filter()]
    seen = [
        int80(*words, programs=boundary).stdout
        for words in ((20, 0, 0, 0), (359, 1, 1, 0), (359, 40, 1, 0), (102, 1, 0, 0))
    ]
    assert seen == ["True\n", "True\n", "refused\n", "refused\n"]


@pytest.mark.skipif(not X86, reason="needs x86_64 for the x32 entry")
@AS
def test_the_x32_entry_is_refused(wrap: Wrap) -> None:
    """getpid, socket and clone3 with the x32 bit answer EPERM; without filters, the kernel's own answer (ENOSYS or success)."""
    calls = [[seccomp.X32_BIT | one, 1, 1, 0] for one in (39, 41, 435, 512)]
    assert errno.EPERM not in make_calls(wrap(filtered.calls()), calls)
    assert make_calls(wrap(filtered.under(WORKLOAD, filtered.calls())), calls) == [errno.EPERM] * 4
    assert make_calls(wrap(filtered.under(WORKLOAD, filtered.calls())), [[39]]) == [0]


MAKE = """
import ctypes.util, sys
from openshell_supervisor.confine import seccomp
from openshell_supervisor.errors import ConfineError
search = ctypes.util.find_library
assert "pyseccomp" not in sys.modules
try:
    print(len(seccomp.workload_filters(seccomp.FilterOptions())))
except ConfineError as error:
    print(error.code, error.step, bool(error.hint))
assert ctypes.util.find_library is search
"""


@pytest.mark.root
def test_without_libseccomp_the_error_says_so_and_no_program_of_the_image_runs(open_tmp: pathlib.Path) -> None:
    """The library hidden in a mount namespace: a code and a hint; and no compiler found in PATH is asked where it is."""
    marker = open_tmp / "ran"
    for name in ("gcc", "cc", "ld", "ldconfig"):
        (open_tmp / name).write_text(f"#!/bin/sh\ntouch {marker}\n")
        (open_tmp / name).chmod(0o755)
    found = next(
        path
        for line in hosts.run(["/sbin/ldconfig", "-p"]).stdout.splitlines()
        if seccomp.LIBRARY in line
        for path in [line.split()[-1]]
    )
    hide = f'mount --bind /dev/null "{os.path.realpath(found)}" && exec "$@"'
    argv = ["env", f"PATH={open_tmp}:{os.environ['PATH']}", sys.executable, "-c", MAKE]
    assert hosts.run(argv).stdout == "2\n"
    done = hosts.run(["unshare", "--mount", "sh", "-c", hide, "sh", *argv])
    assert done.stdout == "libseccomp_missing seccomp rules True\n", done.stderr
    assert not marker.exists()
