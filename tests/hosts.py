"""Poorer hosts, made by the kernel: wrappers that take a privilege away from a command before it starts.

Each function takes a command and returns a longer command, so they nest: `outer_seccomp(unprivileged(argv), "setns")`.
Nothing here imitates a refusal; the kernel itself answers EPERM or ENOSPC (tests/test_hosts.py holds that, one by one).
The outermost wrapper acts first: take capabilities away outside of a change of user, never inside it.

This file is also the program behind `outer_seccomp` and `userns_off` (`python -I hosts.py WHAT … -- CMD`),
so it imports only the standard library, and pyseccomp where it is needed. It refuses to know the product.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

# A uid without a passwd entry, outside of what useradd hands out (login.defs: 1000-60000) and of systemd's ranges.
THROWAWAY_UID = 64001

# Flags of clone(2)/unshare(2), include/uapi/linux/sched.h.
CLONE_NEWNS = 0x0002_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWNET = 0x4000_0000
PR_SET_DUMPABLE = 4

# Every way into a mount: the old call and those of the new mount API.
MOUNT_CALLS = ("mount", "umount2", "fsopen", "fsmount", "open_tree", "move_mount", "mount_setattr", "pivot_root")
# Capability numbers, include/uapi/linux/capability.h.
CAP_NET_ADMIN = 12
CAP_SYS_ADMIN = 21


def unprivileged(
    argv: Sequence[str], *, uid: int = THROWAWAY_UID, home: str | os.PathLike[str] | None = None
) -> list[str]:
    """`argv` as a user without groups, capabilities or passwd entry; from a user that is not root, `argv` as it is.

    `home` becomes HOME; the fixture `unprivileged_home` makes one that the user owns.
    """
    environment = ["env", f"HOME={os.fspath(home)}"] if home is not None else []
    if os.geteuid() != 0:
        return [*environment, *argv]
    ids = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--ambient-caps=-all"]
    return ["setpriv", *ids, *environment, *argv]


def without_caps(argv: Sequence[str], *caps: str) -> list[str]:
    """`argv` without the capabilities named as in setpriv ("net_admin"; none means all), for good. Needs SETPCAP."""
    dropped = ",".join(f"-{cap}" for cap in caps or ("all",))
    return ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}", "--ambient-caps=-all", *argv]


def outer_seccomp(argv: Sequence[str], *deny: str, answer: int = errno.EPERM) -> list[str]:
    """`argv` under a filter, as a container runtime would set one, that answers `answer` to each call in `deny`.

    An item is a call's name ("unshare"), or a name and flags of its first argument, any of which is refused
    ("unshare:NEWNET|NEWUSER"; "clone:NEWUSER"), or a name and the value of its first argument ("socket=16"). clone3
    passes its flags in memory, so a flag rule on clone also answers ENOSYS to clone3, as Docker and Podman do. As root,
    no_new_privs stays off (as under a runtime with CAP_SYS_ADMIN); from another user the kernel wants it on.
    """
    return [sys.executable, "-I", str(pathlib.Path(__file__).resolve()), "seccomp", str(answer), *deny, "--", *argv]


def userns_off(argv: Sequence[str], *, uid: int = THROWAWAY_UID) -> list[str]:
    """`argv` as an unprivileged user to whom the kernel gives no user namespace (ENOSPC); the machine's limit stays.

    Done by entering one user namespace, as that user and mapped to itself, whose `user.max_user_namespaces` is 0. The
    exec leaves no capability. A user that is not root stays who it is. Needs a kernel that allows this one namespace.
    """
    return [sys.executable, "-I", str(pathlib.Path(__file__).resolve()), "userns-off", str(uid), "--", *argv]


def with_accounts(argv: Sequence[str], passwd: str, group: str, place: pathlib.Path) -> list[str]:
    """`argv` where /etc/passwd and /etc/group have this content, kept in `place` (a mount namespace of its own; needs root)."""
    (place / "passwd").write_text(passwd)
    (place / "group").write_text(group)
    script = 'mount --bind "$1" /etc/passwd && mount --bind "$2" /etc/group && shift 2 && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh", str(place / "passwd"), str(place / "group"), *argv]


def run(argv: Sequence[str], *, timeout: float = 30.0, **options: object) -> subprocess.CompletedProcess[str]:
    """Run to the end, output captured as text, nothing on stdin, from a directory that every user may enter."""
    settings: dict[str, object] = {
        "cwd": "/",
        "stdin": subprocess.DEVNULL,
        "capture_output": True,
        "text": True,
    } | options
    return subprocess.run(list(argv), timeout=timeout, check=False, **settings)  # type: ignore[call-overload,no-any-return]


def effective_caps() -> int:
    """This process's effective capabilities as the kernel's bit mask."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("CapEff:")), 16)


def missing_for_root_tests() -> str:
    """What this process lacks for tests marked `root`, or an empty string."""
    if os.geteuid() != 0:
        return f"needs root: this is uid {os.geteuid()}"
    caps = effective_caps()
    lacking = [
        name
        for name, bit in (("CAP_SYS_ADMIN", CAP_SYS_ADMIN), ("CAP_NET_ADMIN", CAP_NET_ADMIN))
        if not caps >> bit & 1
    ]
    return f"needs {' and '.join(lacking)}" if lacking else ""


def userns_allowed() -> bool:
    """True when the kernel lets an unprivileged user make a user namespace with a network namespace in it."""
    return run(unprivileged(["unshare", "--user", "--net", "true"])).returncode == 0


def _flags(text: str) -> int:
    names = {"NEWNS": CLONE_NEWNS, "NEWUSER": CLONE_NEWUSER, "NEWNET": CLONE_NEWNET}
    return sum(names[name] for name in text.split("|"))


def _install_filter(answer: int, deny: Sequence[str]) -> None:
    import pyseccomp as sc

    rules = sc.SyscallFilter(sc.ALLOW)
    rules.set_attr(sc.Attr.CTL_NNP, int(os.geteuid() != 0))
    for item in deny:
        if ":" in item:
            call, _, wanted = item.partition(":")
            mask = _flags(wanted)
            for bit in (1 << n for n in range(mask.bit_length()) if mask >> n & 1):
                rules.add_rule(sc.ERRNO(answer), call, sc.Arg(0, sc.MASKED_EQ, bit, bit))
            if call == "clone":
                rules.add_rule(sc.ERRNO(errno.ENOSYS), "clone3")
        elif "=" in item:
            call, _, value = item.partition("=")
            rules.add_rule(sc.ERRNO(answer), call, sc.Arg(0, sc.EQ, int(value)))
        else:
            rules.add_rule(sc.ERRNO(answer), item)
    rules.load()


def _forbid_user_namespaces(uid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    uid, gid = os.getuid(), os.getgid()
    # A change of uid makes the process undumpable, and its files in /proc root's: the maps could not be written.
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    if libc.unshare(CLONE_NEWUSER) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"unshare(CLONE_NEWUSER): {os.strerror(number)}")
    pathlib.Path("/proc/self/setgroups").write_text("deny")
    pathlib.Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    pathlib.Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    pathlib.Path("/proc/sys/user/max_user_namespaces").write_text("0")


def _main(argv: list[str]) -> None:
    split = argv.index("--")
    (what, first, *rest), command = argv[:split], argv[split + 1 :]
    if what == "seccomp":
        _install_filter(int(first), rest)
    elif what == "userns-off":
        _forbid_user_namespaces(int(first))
    else:
        raise SystemExit(f"hosts.py: unknown wrapper {what!r}")
    os.execvp(command[0], command)


if __name__ == "__main__":
    _main(sys.argv[1:])
