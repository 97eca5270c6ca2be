"""What the kernel offers of Landlock, and its three system calls as far as the supervisor makes them.

The PyPI package `landlock` stops at file rights: its ruleset has no ports and no scopes, it takes paths but no descriptors, and
it tells failure from a possibly stale errno. So its rights and its rule structure are used, and the calls are made here. This
module knows numbers (linux/landlock.h, landlock(7)) and no policy. Nothing here restricts anybody; the launcher does that.
"""

from __future__ import annotations

import errno as errno_module
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The same numbers on every architecture but alpha (asm-generic/unistd.h); landlock_restrict_self (446) is the launcher's.
SYS_CREATE_RULESET, SYS_ADD_RULE = 444, 445
CREATE_RULESET_VERSION, CREATE_RULESET_ERRATA = 1, 2
RULE_PATH_BENEATH, RULE_NET_PORT = 1, 2
RESTRICT_LOG_NEW_EXEC_ON = 2  # ABI 7: the audit log also shows what is refused after the execve

KNOWN_ABI = 7  # Linux 6.15; of a newer one, what is known here is used
# The file rights by the ABI that brought them, under the names of `landlock.FSAccess`, which has their values.
FILE_RIGHTS: Mapping[int, tuple[str, ...]] = {
    1: (
        "EXECUTE",
        "WRITE_FILE",
        "READ_FILE",
        "READ_DIR",
        "REMOVE_DIR",
        "REMOVE_FILE",
        "MAKE_CHAR",
        "MAKE_DIR",
        "MAKE_REG",
        "MAKE_SOCK",
        "MAKE_FIFO",
        "MAKE_BLOCK",
        "MAKE_SYM",
    ),
    2: ("REFER",),
    3: ("TRUNCATE",),
    5: ("IOCTL_DEV",),
}
READ_ONLY = ("EXECUTE", "READ_FILE", "READ_DIR")
NOT_A_DIRECTORY = ("EXECUTE", "WRITE_FILE", "READ_FILE", "TRUNCATE", "IOCTL_DEV")  # any other right on a file is EINVAL
NET_ABI, BIND_TCP, CONNECT_TCP = 4, 1, 2
SCOPE_ABI, SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL = 6, 1, 2
LOG_ABI = 7

REASONS = {
    errno_module.ENOSYS: "the kernel has no Landlock, or an outer sandbox hides it",
    errno_module.EOPNOTSUPP: "the kernel was built with Landlock and started without it",
    errno_module.EPERM: "an outer seccomp profile forbids it",
}
HINTS = {
    errno_module.ENOSYS: "Landlock needs Linux 5.13 with CONFIG_SECURITY_LANDLOCK=y; gVisor has none",
    errno_module.EOPNOTSUPP: "add landlock to the kernel's lsm= parameter",
    errno_module.EPERM: "allow landlock_create_ruleset, landlock_add_rule and landlock_restrict_self in the container's profile",
}


@dataclass(frozen=True, slots=True)
class Support:
    """What the kernel answered. `abi` 0 means not available, then `errno` is a number and `reason` says why; `errata` is the
    bit mask of fixed issues (0 where the kernel does not tell)."""

    abi: int
    errno: int | None
    reason: str
    errata: int

    @property
    def hint(self) -> str:
        """What to do where it is not available."""
        return HINTS.get(self.errno or 0, "see the kernel's log") if not self.abi else ""


def support() -> Support:
    """Ask the kernel; two system calls, nothing is remembered."""
    try:
        abi = _syscall("landlock_create_ruleset", SYS_CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    except OSError as error:
        number = error.errno or 0
        return Support(0, number, REASONS.get(number, os.strerror(number)), 0)
    if abi < 1:
        return Support(0, None, f"the kernel answers ABI {abi}", 0)
    try:
        errata = _syscall("landlock_create_ruleset", SYS_CREATE_RULESET, None, 0, CREATE_RULESET_ERRATA)
    except OSError:
        errata = 0  # EINVAL: a kernel that does not know the question
    return Support(abi, None, "", errata)


def create_ruleset(files: int, net: int, scopes: int) -> int:
    """An empty ruleset that handles these rights (bit masks), as a close-on-exec descriptor. Raises OSError.

    An older kernel takes the longer structure as long as what it does not know is zero.
    """
    import ctypes

    attributes = (ctypes.c_uint64 * 3)(files, net, scopes)  # struct landlock_ruleset_attr
    size = ctypes.sizeof(attributes)
    return _syscall("landlock_create_ruleset", SYS_CREATE_RULESET, ctypes.byref(attributes), size, 0)


def add_path(ruleset: int, path: int, rights: int) -> None:
    """Allow `rights` on and beneath the object that the descriptor `path` is open on. Raises OSError."""
    import ctypes

    from landlock.plumbing import PathBeneathAttr

    rule = PathBeneathAttr(rights, path)
    _syscall("landlock_add_rule", SYS_ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0)


def add_port(ruleset: int, port: int, rights: int) -> None:
    """Allow `rights` (BIND_TCP, CONNECT_TCP) on one TCP port; 0 is bind's "any free one". Raises OSError."""
    import ctypes

    rule = (ctypes.c_uint64 * 2)(rights, port)  # struct landlock_net_port_attr, host byte order
    _syscall("landlock_add_rule", SYS_ADD_RULE, ruleset, RULE_NET_PORT, ctypes.byref(rule), 0)


@functools.cache
def _function() -> tuple[Any, Any]:
    """syscall(2) and what reads its errno; ctypes is imported late to keep this module cheap."""
    import ctypes

    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return function, ctypes.get_errno


def _syscall(name: str, number: int, *arguments: object) -> int:
    function, get_errno = _function()
    result = int(function(number, *arguments))
    if result < 0:
        code = get_errno()
        raise OSError(code, os.strerror(code), name)
    return result
