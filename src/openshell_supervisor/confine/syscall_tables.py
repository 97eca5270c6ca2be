"""What the system call filters refuse, as tables: the rules, the numbers of the calls, and a harmless way to try each rule.

`seccomp` makes programs of them. Nothing is compiled and nothing is called here.

A condition looks at the low word of an argument, because that is what the kernel uses (`int`) and the high word may hold
anything. A rule's `attempt` is a list of arguments that the kernel refuses by itself, with another errno and without effect,
so that a filter that does not work is seen; None where the kernel answers EPERM to a process without privileges anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

from openshell_supervisor.policy.model import Netlink

WORD = 0xFFFFFFFF  # all of an argument's low word; as an argument, the int -1

# asm/unistd.h of x86_64 and of aarch64 (asm-generic), in this order. From 424 on they are the same everywhere.
NUMBERS: dict[str, tuple[int, int]] = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "clone": (56, 220),
    "clone3": (435, 435),
    "delete_module": (176, 106),
    "execveat": (322, 281),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "seccomp": (317, 277),
    "setns": (308, 268),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
GETPID = 39  # x86_64, for the try of an x32 number

# linux/socket.h
AF_INET, AF_INET6, AF_NETLINK = 2, 10, 16
# The address families that have a name; all but Unix, inet and netlink are refused. Tools of developers do without: what asks
# for AF_ALG (coreutils, OpenSSL's engine) computes by itself, and packet, XDP and CAN sockets need a capability or a device that
# the workload does not have. Most of them load a kernel module when the first socket is made.
OTHER_DOMAINS = {
    "AX25": 3, "IPX": 4, "APPLETALK": 5, "NETROM": 6, "BRIDGE": 7, "ATMPVC": 8, "X25": 9, "ROSE": 11, "DECNET": 12, "NETBEUI": 13,
    "SECURITY": 14, "KEY": 15, "PACKET": 17, "ASH": 18, "ECONET": 19, "ATMSVC": 20, "RDS": 21, "SNA": 22, "IRDA": 23, "PPPOX": 24,
    "WANPIPE": 25, "LLC": 26, "IB": 27, "MPLS": 28, "CAN": 29, "TIPC": 30, "BLUETOOTH": 31, "IUCV": 32, "RXRPC": 33, "ISDN": 34,
    "PHONET": 35, "IEEE802154": 36, "CAIF": 37, "ALG": 38, "NFC": 39, "VSOCK": 40, "KCM": 41, "QIPCRTR": 42, "SMC": 43, "XDP": 44,
    "MCTP": 45,
}  # fmt: skip
FUTURE_DOMAINS = range(46, 64)  # AF_MAX is 46 in Linux 6.18; what comes next is not wanted by default either

SOCK_RAW, SOCK_PACKET = 3, 10  # linux/net.h
SOCK_TYPE_MASK = 0xF  # linux/net.h: above it are SOCK_CLOEXEC, SOCK_NONBLOCK, and bits that the kernel refuses (EINVAL)
NO_SUCH_TYPE = 0x70  # such bits: with them a call that no filter stops makes no socket and loads no module
IPPROTO_SMC = 256  # linux/in.h: AF_SMC by another name, since Linux 6.11

# linux/sched.h
CLONE_NEWTIME = 0x80  # in unshare only: there the low byte is no exit signal
CLONE_NAMESPACES = {
    "NEWNS": 0x00020000,
    "NEWCGROUP": 0x02000000,
    "NEWUTS": 0x04000000,
    "NEWIPC": 0x08000000,
    "NEWUSER": 0x10000000,
    "NEWPID": 0x20000000,
    "NEWNET": 0x40000000,
}
CLONE_THREAD = 0x00010000  # without CLONE_SIGHAND it makes a call to clone invalid
NO_SUCH_UNSHARE = 1  # no flag of unshare(2): it makes a call invalid

AT_EMPTY_PATH = 0x1000  # linux/fcntl.h
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, SECCOMP_SET_MODE_FILTER = 22, 2, 1  # linux/prctl.h, linux/seccomp.h


@dataclass(frozen=True, slots=True)
class Condition:
    """Argument number `argument` has, in the bits of `mask` of its low word, the value `value`."""

    argument: int
    mask: int
    value: int


@dataclass(frozen=True, slots=True)
class Rule:
    """Refuse `call` when all conditions hold; `label` tells rules of one call apart, `attempt` tries it without effect."""

    call: str
    conditions: tuple[Condition, ...] = ()
    attempt: tuple[int, ...] | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """`call`, or `call(label)`."""
        return f"{self.call}({self.label})" if self.label else self.call


# Mounts and everything that reaches into the kernel: what the supervisor itself never needs once its boundary stands.
_MOUNTS = (
    Rule("mount", attempt=(0, 0, 0, 0, 0)),
    Rule("umount2", attempt=(0, WORD)),
    Rule("fsopen"),
    Rule("fsconfig", attempt=(WORD, WORD, 0, 0, 0)),
    Rule("fsmount"),
    Rule("fspick"),
    Rule("move_mount"),
    Rule("open_tree", attempt=(WORD, 0, WORD)),
    Rule("open_tree_attr", attempt=(WORD, 0, WORD, 0, 0)),
    Rule("mount_setattr", attempt=(WORD, 0, WORD, 0, 0)),
    Rule("pivot_root"),
)
_KERNEL = (
    Rule("bpf"),
    Rule("perf_event_open", attempt=(0, 0, WORD, WORD, WORD)),
    Rule("userfaultfd", attempt=(WORD,)),
    Rule("init_module"),
    Rule("finit_module"),
    Rule("delete_module"),
    Rule("kexec_load"),
    Rule("kexec_file_load"),
)
# Upstream's seventeen, and the two newer calls of the mount family. setns, unshare, clone and ptrace stay, for the supervisor.
PRELUDE: tuple[Rule, ...] = (*_MOUNTS, *_KERNEL)

# clone3 passes its flags in memory, where no filter sees them. ENOSYS, because libc then takes clone, whose flags are looked at;
# with EPERM no thread could be started.
CLONE3: tuple[Rule, ...] = (Rule("clone3", attempt=(0, 0)),)

_PROCESSES = (
    # Executing a memfd gets around the file rules of Landlock, and nothing that developers use needs one: what asks for it
    # (the JVM's ZGC, Wayland clients) falls back to a file.
    Rule("memfd_create", attempt=(0, WORD)),
    Rule("memfd_secret", attempt=(WORD,)),
    Rule(
        "execveat", (Condition(4, AT_EMPTY_PATH, AT_EMPTY_PATH),), (WORD, 0, 0, 0, AT_EMPTY_PATH | 1), "AT_EMPTY_PATH"
    ),
    # Other processes' memory, descriptors and identity: what a user namespace and the kernel's ptrace check hold too. A pidfd
    # of one's own child (CLONE_PIDFD, which Go asks for) stays: without these calls there is little but waiting to do with it.
    Rule("ptrace", attempt=(0x7FFFFFFF, 0, 0, 0)),
    Rule("process_vm_readv", attempt=(0, 0, 0, 0, 0, 1)),
    Rule("process_vm_writev", attempt=(0, 0, 0, 0, 0, 1)),
    Rule("process_madvise", attempt=(WORD, 0, 0, 0, WORD)),
    Rule("pidfd_open", attempt=(WORD, 0)),
    Rule("pidfd_getfd", attempt=(WORD, WORD, WORD)),
    Rule("pidfd_send_signal", attempt=(WORD, 0, 0, WORD)),
    Rule("kcmp", attempt=(WORD, WORD, WORD, 0, 0)),
    # io_uring makes sockets and opens files without the system calls that are looked at here.
    Rule("io_uring_setup", attempt=(0, 0)),
    Rule("io_uring_enter", attempt=(WORD, 0, 0, WORD, 0, 0)),
    Rule("io_uring_register", attempt=(WORD, WORD, 0, 0)),
    # Keyrings belong to the user, not to a namespace of ours; libraries that would like one do without.
    Rule("add_key", attempt=(0, 0, 0, 0, 0)),
    Rule("request_key", attempt=(0, 0, 0, 0)),
    Rule("keyctl", attempt=(WORD, 0, 0, 0, 0)),
    Rule("syslog"),  # the kernel's log, where dmesg_restrict does not keep it
    # A file handle is a way to a file past its directories.
    Rule("open_by_handle_at"),
    Rule("setns", attempt=(WORD, 0)),
    # Further filters could answer a call by ENOSYS or hand it to somebody, and the strict mode (prctl's 1) only ends the caller.
    Rule(
        "seccomp", (Condition(0, WORD, SECCOMP_SET_MODE_FILTER),), (SECCOMP_SET_MODE_FILTER, WORD, 0), "SET_MODE_FILTER"
    ),
    Rule(
        "prctl",
        (Condition(0, WORD, PR_SET_SECCOMP), Condition(1, WORD, SECCOMP_MODE_FILTER)),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, 0, 0, 0),
        "PR_SET_SECCOMP",
    ),
)


def workload_rules(netlink: Netlink, *, inet: bool) -> tuple[Rule, ...]:
    """Everything that the workload's main filter answers with EPERM; without `inet`, inet sockets too."""
    return (
        *_MOUNTS,
        *_KERNEL,
        *_PROCESSES,
        *_limit_rules(),
        *_namespace_rules(),
        *_socket_rules(),
        *_netlink_rules(netlink),
        *_inet_rules(inet),
    )


def _limit_rules() -> tuple[Rule, ...]:
    """Limits of other processes, that is of any pid but 0 (libc's own setrlimit): a limit of CPU time ends a supervisor that
    signals do not reach. Bits above pid_max's (2**22, proc_sys_kernel(5)) can be tried: no process has such a number."""
    return tuple(
        Rule(
            "prlimit64",
            (Condition(0, 1 << bit, 1 << bit),),
            (1 << bit, 0, 0, 0) if bit > 22 else None,
            f"pid bit {bit}",
        )
        for bit in range(32)
    )


def _namespace_rules() -> tuple[Rule, ...]:
    """New namespaces. The user namespace is what matters: in one, a process without capabilities has them all again."""
    new = [
        Rule("clone", (Condition(0, flag, flag),), (flag | CLONE_THREAD, 0, 0, 0, 0), name)
        for name, flag in CLONE_NAMESPACES.items()
    ]
    left = [
        Rule("unshare", (Condition(0, flag, flag),), (flag | NO_SUCH_UNSHARE,), name)
        for name, flag in {**CLONE_NAMESPACES, "NEWTIME": CLONE_NEWTIME}.items()
    ]
    return (*new, *left)


def _socket_rules() -> tuple[Rule, ...]:
    """Address families that no tool needs, for a socket and for a pair of them."""
    future = {f"AF {number}": number for number in FUTURE_DOMAINS}
    named = {f"AF_{name}": number for name, number in OTHER_DOMAINS.items()}
    return tuple(
        Rule(call, (Condition(0, WORD, number),), (number, NO_SUCH_TYPE | 1, 0, 0) if name in named else None, name)
        for call in ("socket", "socketpair")
        for name, number in {**named, **future}.items()
    )


def _netlink_rules(netlink: Netlink) -> tuple[Rule, ...]:
    """AF_NETLINK: refused, or refused unless the protocol is NETLINK_ROUTE (0), that is: when any bit of it is set."""
    domain = Condition(0, WORD, AF_NETLINK)
    if netlink is Netlink.ALLOWED:
        return ()
    if netlink is Netlink.DENIED:
        return (Rule("socket", (domain,), (AF_NETLINK, NO_SUCH_TYPE | SOCK_RAW, 0), "AF_NETLINK"),)
    return tuple(
        Rule(
            "socket",
            (domain, Condition(2, 1 << bit, 1 << bit)),
            (AF_NETLINK, NO_SUCH_TYPE | SOCK_RAW, 1 << bit),
            f"AF_NETLINK, protocol bit {bit}",
        )
        for bit in range(32)
    )


def _inet_rules(inet: bool) -> tuple[Rule, ...]:
    """Raw inet sockets and SMC, which carries streams past what is said about TCP; without `inet`, every inet socket."""
    domains = {"AF_INET": AF_INET, "AF_INET6": AF_INET6}
    if not inet:
        return tuple(
            Rule("socket", (Condition(0, WORD, domain),), (domain, NO_SUCH_TYPE | 1, 0), name)
            for name, domain in domains.items()
        )
    raw = [
        Rule(
            "socket",
            (Condition(0, WORD, domain), Condition(1, SOCK_TYPE_MASK, kind)),
            (domain, NO_SUCH_TYPE | kind, 0),
            f"{name}, {what}",
        )
        for name, domain in domains.items()
        for what, kind in (("SOCK_RAW", SOCK_RAW), ("SOCK_PACKET", SOCK_PACKET))
    ]
    smc = [
        Rule(
            "socket",
            (Condition(0, WORD, domain), Condition(2, WORD, IPPROTO_SMC)),
            (domain, NO_SUCH_TYPE | 1, IPPROTO_SMC),
            f"{name}, IPPROTO_SMC",
        )
        for name, domain in domains.items()
    ]
    return (*raw, *smc)
