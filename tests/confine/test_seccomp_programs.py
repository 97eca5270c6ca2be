"""The filters for both machines, run by an interpreter: every rule, its neighbours, and what stands around them.

The expectation is written down here a second time, from the references and not from the product's tables: names, which libseccomp
turns into numbers, and conditions as plain Python.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable

import bpf
import pyseccomp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openshell_supervisor.confine import prelude, seccomp, syscall_tables
from openshell_supervisor.confine.seccomp import FilterOptions
from openshell_supervisor.errors import ConfineError
from openshell_supervisor.policy.model import Netlink

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
FOREIGN = {"i386": 0x40000003, "arm": 0x40000028, "riscv64": 0xC00000F3, "s390x": 0x80000016, "nothing": 0}
OPTIONS = [FilterOptions(netlink, inet) for netlink in Netlink for inet in (True, False)]
EPERM, ENOSYS = bpf.ERRNO | errno.EPERM, bpf.ERRNO | errno.ENOSYS
GARBAGE = 0xDEADBEEF << 32  # what the kernel never looks at in an `int`
X32 = 0x40000000
FULL = (1 << 64) - 1

# isolation.md 3.1 and 3.3, and the superset that its list of gaps asks for.
UPSTREAM_PRELUDE = [
    "mount", "fsopen", "fsconfig", "fsmount", "fspick", "move_mount", "open_tree",
    "pivot_root", "umount2", "bpf", "perf_event_open", "userfaultfd", "init_module", "finit_module",
    "delete_module", "kexec_load", "kexec_file_load",
]  # fmt: skip
OUR_PRELUDE = ["mount_setattr", "open_tree_attr"]
UPSTREAM_DENIED = [
    "memfd_create", "ptrace", "bpf", "process_vm_readv", "process_vm_writev", "pidfd_open", "pidfd_getfd",
    "pidfd_send_signal", "io_uring_setup", "mount", "fsopen", "fsconfig", "fsmount", "fspick",
    "move_mount", "open_tree", "setns", "umount2", "pivot_root", "userfaultfd", "perf_event_open",
]  # fmt: skip
OUR_DENIED = [
    "mount_setattr", "open_tree_attr", "io_uring_enter", "io_uring_register", "add_key", "request_key", "keyctl",
    "kcmp", "process_madvise", "memfd_secret", "init_module", "finit_module", "delete_module", "kexec_load",
    "kexec_file_load", "open_by_handle_at", "syslog",
]  # fmt: skip
CONDITIONAL = {"socket", "socketpair", "clone", "unshare", "execveat", "seccomp", "prctl", "prlimit64"}
NEWER = {"open_tree_attr": 467}  # Linux 6.15; libseccomp 2.5 does not know it


def number(machine: str, name: str) -> int:
    """A call's number, from libseccomp's tables."""
    found = pyseccomp.resolve_syscall(MACHINES[machine], name)
    return found if found >= 0 else NEWER[name]


def expected(options: FilterOptions, name: str, arguments: tuple[int, ...]) -> int:
    """The whole rule book as one plain function: the answer to a native call."""
    word = [argument & 0xFFFFFFFF for argument in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
    if name == "clone3":
        return ENOSYS
    new_namespace = 0x7E020000  # every CLONE_NEW* flag that clone(2) has
    conditions: dict[str, Callable[[], bool]] = {
        "clone": lambda: bool(word[0] & new_namespace),
        "unshare": lambda: bool(word[0] & (new_namespace | 0x80)),
        "execveat": lambda: bool(word[4] & 0x1000),
        "seccomp": lambda: word[0] == 1,
        "prctl": lambda: word[0] == 22 and word[1] == 2,
        "prlimit64": lambda: word[0] != 0,
        "socket": lambda: not socket_allowed(options, *word[:3]),
        "socketpair": lambda: 3 <= word[0] <= 63 and word[0] not in (2, 10, 16),
    }
    denied = name in UPSTREAM_DENIED + OUR_DENIED or (name in conditions and conditions[name]())
    return EPERM if denied else bpf.ALLOW


def socket_allowed(options: FilterOptions, domain: int, kind: int, protocol: int) -> bool:
    """Which sockets a workload may make."""
    if domain == 16:
        return options.netlink is Netlink.ALLOWED or (options.netlink is Netlink.ROUTE and protocol == 0)
    if domain in (2, 10):
        return options.inet and kind & 0xF not in (3, 10) and protocol != 256
    return not 3 <= domain <= 63


def ask(options: FilterOptions, machine: str, name: str, arguments: tuple[int, ...]) -> int:
    """What the product's programs answer to a native call."""
    return bpf.verdict(programs(options, machine), MACHINES[machine], number(machine, name), arguments)


made: dict[tuple[FilterOptions, str], tuple[bytes, ...]] = {}


def programs(options: FilterOptions, machine: str) -> tuple[bytes, ...]:
    """The workload's programs, made once."""
    if (options, machine) not in made:
        made[options, machine] = seccomp.workload_filters(options, machine)
    return made[options, machine]


@pytest.mark.parametrize("machine", MACHINES)
def test_our_numbers_are_those_of_libseccomp(machine: str) -> None:
    """Each number of the table is what libseccomp says for that architecture, where it knows the call."""
    column = list(MACHINES).index(machine)
    ours = {name: numbers[column] for name, numbers in syscall_tables.NUMBERS.items()}
    assert ours == {name: number(machine, name) for name in ours}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_number_that_is_not_named_is_allowed(machine: str, options: FilterOptions) -> None:
    """Of all numbers up to 1000, without arguments, exactly the unconditional ones are refused, whatever the high words hold."""
    denied = {number(machine, name): EPERM for name in UPSTREAM_DENIED + OUR_DENIED} | {
        number(machine, "clone3"): ENOSYS
    }
    for high in (0, GARBAGE):
        arguments = (high,) * 6
        seen = {one: bpf.verdict(programs(options, machine), MACHINES[machine], one, arguments) for one in range(1000)}
        assert {one: answer for one, answer in seen.items() if answer != bpf.ALLOW} == denied


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_socket_by_family_type_and_protocol(machine: str, options: FilterOptions) -> None:
    """Families up to 80 and beyond, every type with and without flags, with protocols around those that matter."""
    domains = [*range(80), 256, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]
    kinds = [1, 2, 3, 5, 9, 10, 11, 0x80003, 0x800 | 10, 0x80802, 0x13, 0xFFFFFFF3]
    protocols = [0, 1, 4, 31, 256, 257, 262, 1 << 31, 0xFFFFFFFF]
    for high in (0, GARBAGE):
        for domain, kind, protocol in itertools.product(domains, kinds, protocols):
            arguments = (domain | high, kind | high, protocol | high)
            assert ask(options, machine, "socket", arguments) == expected(options, "socket", arguments), arguments
    for high, domain in itertools.product((0, GARBAGE), domains):
        arguments = (domain | high, 1, 0)
        assert ask(options, machine, "socketpair", arguments) == expected(options, "socketpair", arguments), arguments


@pytest.mark.parametrize("machine", MACHINES)
def test_every_flag_of_the_conditional_calls(machine: str) -> None:
    """Each single bit of the argument that decides, alone and in company, with garbage in the high word and in the others."""
    deciding = {"clone": 0, "unshare": 0, "execveat": 4, "seccomp": 0, "prctl": 1, "prlimit64": 0}
    company = (0, 1, 2, 0x11, 0x00010F00, 0x01200000)  # what fork, threads and execveat use otherwise
    options = FilterOptions()
    for (name, place), bit, others, high in itertools.product(deciding.items(), range(32), company, (0, GARBAGE)):
        for first in (0, 22, 38) if name == "prctl" else (0,):
            arguments = [first | high, high, high, high, high, high]
            arguments[place] = 1 << bit | others | high
            assert ask(options, machine, name, tuple(arguments)) == expected(options, name, tuple(arguments)), (
                name,
                arguments,
            )


SMALL = st.sampled_from(
    [0, 1, 2, 3, 10, 16, 17, 22, 31, 38, 40, 256, 0x80, 0x1000, 0x11, 0x10000000, 0x20000, 0x40000000]
)
ARGUMENT = st.one_of(SMALL, SMALL.map(lambda word: word | GARBAGE), st.integers(0, FULL))


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(OPTIONS),
    st.sampled_from(list(MACHINES)),
    st.sampled_from(sorted(CONDITIONAL | {"clone3", "memfd_create", "open_tree_attr", "read", "connect", "ioctl"})),
    st.tuples(*[ARGUMENT] * 6),
)
def test_any_call_gets_what_the_rule_book_says(
    options: FilterOptions, machine: str, name: str, arguments: tuple[int, ...]
) -> None:
    """Programs and rule book agree on arbitrary arguments."""
    assert ask(options, machine, name, arguments) == expected(options, name, arguments)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_foreign_architecture_ends_the_process(machine: str) -> None:
    """Whatever the number; the same numbers of the own architecture do not. Each program sees to it alone, the prelude too."""
    others = {name: value for name, value in {**FOREIGN, **MACHINES}.items() if name != machine}
    alone = [*programs(FilterOptions(), machine), prelude.prelude_program(machine)]
    for program in alone:
        for value, one in itertools.product(others.values(), (0, 1, 102, 359, 435, X32, -1)):
            assert bpf.run(program, value, one) == bpf.KILL_PROCESS
        assert bpf.run(program, MACHINES[machine], 0) == bpf.ALLOW


def test_x32_numbers_are_refused_and_minus_one_is_not() -> None:
    """Every number with the x32 bit gets EPERM on x86_64; -1, by which a tracer skips a call, passes (the kernel says ENOSYS)."""
    filters = programs(FilterOptions(), "x86_64")
    for one in (0, 1, 39, 41, 435, 512, 547, 0x3FFFFFFE):
        assert bpf.verdict(filters, MACHINES["x86_64"], X32 | one) == EPERM
        assert bpf.verdict(filters, MACHINES["x86_64"], 0x80000000 | one) == EPERM
    assert bpf.verdict(filters, MACHINES["x86_64"], -1) == bpf.ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_the_netlink_opt_in_drops_exactly_one_rule(machine: str) -> None:
    """S3-03, S3-04, S3-07: between denied and allowed one rule differs; the default has it; PACKET, BLUETOOTH, VSOCK stay."""
    for inet in (True, False):
        denied = set(syscall_tables.workload_rules(Netlink.DENIED, inet=inet))
        allowed = set(syscall_tables.workload_rules(Netlink.ALLOWED, inet=inet))
        assert allowed < denied
        assert [rule.name for rule in denied - allowed] == ["socket(AF_NETLINK)"]
        for netlink, family in itertools.product(Netlink, (17, 31, 40)):
            assert ask(FilterOptions(netlink, inet), machine, "socket", (family, 3, 0)) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_the_prelude_is_upstreams_seventeen_and_two_newer_ones(machine: str) -> None:
    """isolation.md 3.1: refused whatever the arguments; all others, setns, clone, unshare and ptrace among them, are not."""
    denied = {number(machine, name) for name in UPSTREAM_PRELUDE + OUR_PRELUDE}
    program = prelude.prelude_program(machine)
    for arguments in ((0,) * 6, (FULL,) * 6):
        seen = {one: bpf.run(program, MACHINES[machine], one, arguments) for one in range(1000)}
        assert {one for one, answer in seen.items() if answer == EPERM} == denied
        assert set(seen.values()) == {EPERM, bpf.ALLOW}
    assert not denied & {number(machine, name) for name in ("setns", "clone", "unshare", "ptrace", "clone3", "seccomp")}


@pytest.mark.parametrize("machine", MACHINES)
def test_a_libseccomp_that_knows_less_changes_nothing(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a library does not know by name is refused by number: with half of the names forgotten the answers are the same."""
    forgotten = {"memfd_secret", "mount_setattr", "process_madvise", "io_uring_setup", "open_tree", "clone3"}
    known = pyseccomp.resolve_syscall

    def resolve(architecture: int, name: str) -> int:
        return -1 if name in forgotten else int(known(architecture, name))  # __NR_SCMP_ERROR

    # An older libseccomp cannot stand beside this one; its lack of names is all that the product sees of it.
    monkeypatch.setattr(pyseccomp, "resolve_syscall", resolve)
    filters = seccomp.workload_filters(FilterOptions(), machine)
    monkeypatch.undo()
    assert filters != programs(FilterOptions(), machine)
    for one in range(600):
        same = [bpf.verdict(some, MACHINES[machine], one) for some in (filters, programs(FilterOptions(), machine))]
        assert same[0] == same[1], one


@pytest.mark.parametrize("machine", ["riscv64", "i686", "armv7l", "ppc64le", "nonsense"])
def test_an_unknown_machine_is_refused_by_name(machine: str) -> None:
    """No table, no filter: an error with a code and a hint instead of a program that means something else there."""
    for make in (lambda: seccomp.workload_filters(FilterOptions(), machine), lambda: prelude.prelude_program(machine)):
        with pytest.raises(ConfineError) as caught:
            make()
        assert caught.value.code == "seccomp_unsupported_architecture" and machine in caught.value.message
        assert caught.value.hint
    with pytest.raises(ConfineError):
        seccomp.self_probe_tries(FilterOptions(), machine)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_try_of_the_self_probe_meets_its_rule(machine: str, options: FilterOptions) -> None:
    """Under the programs each try is answered with what it expects; and the tries cover the rules but for privileged calls."""
    tries = seccomp.self_probe_tries(options, machine)
    for one in tries:
        answer = bpf.verdict(programs(options, machine), MACHINES[machine], one["number"], one["args"])
        assert answer == bpf.ERRNO | one["expect"], one
        assert all(0 <= argument < 1 << 64 for argument in one["args"]) and one["kind"] == "syscall"
    names = [one["name"] for one in tries]
    assert len(set(names)) == len(names)
    untried = {rule.name for rule in syscall_tables.workload_rules(options.netlink, inet=options.inet)} - set(names)
    privileged = {"fsopen", "fsmount", "fspick", "move_mount", "pivot_root", "bpf", "open_by_handle_at", "syslog"}
    privileged |= {"init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load"}
    privileged |= {f"prlimit64(pid bit {bit})" for bit in range(23)}  # a process may have such a number
    assert {name for name in untried if "(AF " not in name} == privileged
    assert len(tries) < 200


@pytest.mark.parametrize("machine", MACHINES)
def test_programs_fit_the_kernel(machine: str) -> None:
    """Far below 4096 instructions (BPF_MAXINSNS), and every one of them is one that seccomp admits."""
    for options in OPTIONS:
        for program in programs(options, machine):
            assert len(program) % 8 == 0 and len(program) // 8 < 500
