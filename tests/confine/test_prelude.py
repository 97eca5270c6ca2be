"""The supervisor's own filter: on every thread or on none, verified, and leaving the supervisor what it needs."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Sequence

import filtered
import pytest

import hosts
from openshell_supervisor.confine import seccomp
from openshell_supervisor.confine.syscall_tables import NUMBERS, PRELUDE

WORD = 0xFFFFFFFF
STAYING = {"setns": (WORD, 0), "clone": (0x10000, 0, 0, 0, 0), "unshare": (1,), "ptrace": (0x7FFFFFFF, 0, 0, 0)}
Wrap = Callable[[Sequence[str]], list[str]]
AS = pytest.mark.parametrize(
    "wrap", [pytest.param(list, id="root", marks=pytest.mark.root), pytest.param(hosts.unprivileged, id="user")]
)

# Installs the prelude in a process with three more threads and prints what each thread then gets for the calls on standard input,
# the facts, and the status of every thread; `BEFORE` runs in the first of them while there is no prelude yet.
PROGRAM = """
import ctypes, dataclasses, json, pathlib, struct, sys, threading
sys.path.insert(0, %(tests)r)
import filtered
from openshell_supervisor.confine import prelude
from openshell_supervisor.errors import ConfineError
calls, go, ready, answers = json.load(sys.stdin), threading.Event(), threading.Barrier(4), []
def filter_itself():
    # An unprivileged thread needs no_new_privs for a filter; one that root installs does not mind it.
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
    filtered.install(struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000))
def live(first):
    if first:
        %(before)s
    ready.wait()
    go.wait()
    answers.append([filtered.raw(*call) for call in calls])
threads = [threading.Thread(target=live, args=(number == 0,)) for number in range(3)]
for thread in threads:
    thread.start()
ready.wait()
tids = [thread.native_id for thread in threads]
outcome = {"tids": tids}
try:
    outcome["facts"] = dataclasses.asdict(prelude.install(prelude.prelude_program()))
except ConfineError as error:
    outcome |= {"code": error.code, "step": error.step, "errno": error.errno, "message": error.message, "hint": error.hint}
def field(path, name):
    return next((int(l.split()[1]) for l in path.read_text().splitlines() if l.startswith(name + ":")), None)
fields = ("Seccomp", "Seccomp_filters", "NoNewPrivs")
outcome["modes"] = [[field(t / "status", n) for n in fields] for t in pathlib.Path("/proc/self/task").iterdir()]
go.set()
for thread in threads:
    thread.join()
late = threading.Thread(target=lambda: answers.append([filtered.raw(*call) for call in calls]))
late.start()
late.join()
print(json.dumps({**outcome, "answers": answers}))
"""
OWN_FILTER = "filter_itself()"


def run(wrap: Wrap, calls: Sequence[Sequence[int]] = (), before: str = "pass") -> dict[str, object]:
    """Run the program above; what it printed."""
    directory = filtered.__file__.rpartition("/")[0]
    text = PROGRAM % {"tests": directory, "before": before}
    done = hosts.run(wrap([sys.executable, "-c", text]), stdin=None, input=json.dumps(calls))
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def number(call: str) -> int:
    return NUMBERS[call][seccomp.column()]


@AS
def test_every_thread_is_filtered_and_what_the_supervisor_needs_stays(wrap: Wrap) -> None:
    """Running threads, a later one and the first have the filter and no_new_privs; setns, clone, unshare, ptrace stay."""
    denied = [[number(rule.call), *rule.attempt] for rule in PRELUDE if rule.attempt is not None]
    kept = [[number(call), *arguments] for call, arguments in STAYING.items()]
    free = hosts.run(wrap(filtered.calls()), stdin=None, input=json.dumps([*denied, *kept]))
    unfiltered = json.loads(free.stdout)
    assert not {0, errno.EPERM} & set(unfiltered)
    seen = run(wrap, [*denied, *kept])
    assert seen["facts"] == {
        "threads": 4,
        "filters_before": 0,
        "filters_after": 1,
        "tried": {rule.call: "EPERM" for rule in PRELUDE if rule.attempt is not None},
    }
    assert seen["modes"] == [[2, 1, 1]] * 4
    assert seen["answers"] == [[errno.EPERM] * len(denied) + unfiltered[len(denied) :]] * 4


@pytest.mark.root
def test_root_loses_every_call_of_the_prelude() -> None:
    """As root with capabilities, who may mount and load: all nineteen answer EPERM, in every thread."""
    calls = [[number(rule.call), *(rule.attempt or (WORD, 0, WORD, 0, WORD))] for rule in PRELUDE]
    free = json.loads(hosts.run(filtered.calls(), stdin=None, input=json.dumps(calls)).stdout)
    assert not {0, errno.EPERM} & set(free), dict(zip([rule.call for rule in PRELUDE], free, strict=True))
    assert run(list, calls)["answers"] == [[errno.EPERM] * len(PRELUDE)] * 4


@pytest.mark.root
def test_mounting_worked_before() -> None:
    """The control for the real thing: a tmpfs can be mounted in a namespace of its own, and under the prelude it cannot."""
    argv = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    assert hosts.run(argv).returncode == 0
    done = hosts.run(["unshare", "--mount", *filtered.under([seccomp.export(PRELUDE, errno.EPERM)], argv[2:])])
    assert done.returncode != 0 and "permission denied" in done.stderr.lower()


@AS
def test_a_thread_with_a_filter_of_its_own_is_fatal_and_leaves_nothing_installed(wrap: Wrap) -> None:
    """The kernel answers the diverging thread's id: an error that names it, and no thread has the prelude, which is looked at."""
    seen = run(wrap, [[number("umount2"), 0, WORD]], before=OWN_FILTER)
    assert (seen["code"], seen["step"], seen["errno"]) == ("prelude_failed", "supervisor-seccomp", None)
    tids, message = seen["tids"], seen["message"]
    assert isinstance(tids, list) and isinstance(message, str) and f"thread {tids[0]} " in message and seen["hint"]
    modes = seen["modes"]
    assert isinstance(modes, list) and sorted(mode[1] for mode in modes) == [0, 0, 0, 1]
    assert seen["answers"] == [[errno.EINVAL]] * 4


@pytest.mark.parametrize("answer", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
@pytest.mark.parametrize("call", ["seccomp", "prctl=38"])
def test_a_host_that_refuses_is_told_with_its_errno(call: str, answer: int) -> None:
    """An outer profile that refuses seccomp(2), as gVisor does (EINVAL), or no_new_privs: the step, the errno and a hint."""
    seen = run(lambda argv: hosts.outer_seccomp(hosts.unprivileged(argv), call, answer=answer))
    assert (seen["code"], seen["step"], seen["errno"]) == ("prelude_failed", "supervisor-seccomp", answer)
    assert "--declare-external" in str(seen["hint"])


@AS
def test_a_filter_that_does_not_filter_is_found_out(wrap: Wrap) -> None:
    """A program that allows everything is taken by the kernel, and the tries afterwards say which calls still pass."""
    text = (
        "import struct\nfrom openshell_supervisor.confine import prelude\nfrom openshell_supervisor.errors import ConfineError\n"
        "try:\n    prelude.install(struct.pack('=HBBI', 6, 0, 0, 0x7FFF0000))\n"
        "except ConfineError as error:\n    print(error.code, error.message)"
    )
    done = hosts.run(wrap([sys.executable, "-c", text]))
    assert done.stdout.startswith("prelude_failed ") and "lets mount, umount2" in done.stdout, done.stderr


@pytest.mark.root
def test_it_comes_on_top_of_an_outer_filter() -> None:
    """Under a runtime's profile the filters are counted from there: one before, two after."""
    facts = run(lambda argv: hosts.outer_seccomp(argv, "acct"))["facts"]
    assert isinstance(facts, dict) and (facts["filters_before"], facts["filters_after"]) == (1, 2)
