"""Whom the launcher becomes, and the proof that it cannot go back: identity, capabilities, and what /proc says afterwards."""

from __future__ import annotations

import ctypes
import os
import struct

from openshell_supervisor.confine.launcher.kernel import (
    CAP_SETPCAP,
    LAST_POSSIBLE_CAP,
    LINUX_CAPABILITY_VERSION_3,
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAPBSET_DROP,
    PR_CAPBSET_READ,
    PR_SET_SECUREBITS,
    SECUREBITS,
    TYPE_CHECKING,
    StepError,
    call,
    libc,
    prctl,
    step,
)

if TYPE_CHECKING:
    from openshell_supervisor.confine.launcher.kernel import Request

unmapped: list[int] = []  # the overflow uid that the kernel shows once uid 0 lives unmapped in a user namespace
# What the kernel shows of groups that were taken before a user namespace which does not map them: the overflow gid, once each.
shown_groups: list[list[int]] = []


def take_identity(identity: Request) -> None:
    """Become `identity` {uid, gid, groups}; what already fits is not set again, because gVisor and plain users refuse that.

    Order and reason: groups before the user, because a user without CAP_SETGID cannot change them (credentials(7)).
    """
    uid, gid, groups = identity["uid"], identity["gid"], identity["groups"]
    if groups is not None and not fits(os.getgroups(), groups):
        with step("setgroups"):
            os.setgroups(groups)
    if os.getresgid() != (gid,) * 3:
        with step("setresgid"):
            os.setresgid(gid, gid, gid)
    if os.getresuid() != (uid,) * 3:
        if uid != 0:
            give_up_for_good()
        with step("setresuid"):
            os.setresuid(uid, uid, uid)


def fits(held: list[int], groups: list[int]) -> bool:
    """Are these the promised groups, as far as this user namespace shows them?"""
    return sorted(held) == sorted(shown_groups[0] if shown_groups else groups)


def remember_groups(groups: list[int] | None, held: list[int]) -> None:
    """For a namespace just entered that does not map them: `held` was verified before, what is shown now stands for it."""
    if groups is not None:
        if sorted(held) != sorted(groups):
            raise StepError("verify groups", 0, f"groups are {held}, promised {groups}")
        shown_groups.append(os.getgroups())


def holds_setpcap() -> bool:
    """Is CAP_SETPCAP effective? With it, the bounding set can be emptied, and must be."""
    with open("/proc/self/status") as status:
        effective = next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)
    return bool(effective >> CAP_SETPCAP & 1)


def give_up_for_good() -> bool:
    """What needs CAP_SETPCAP, so before the last capability goes: the bounding set, and the rules by which uid 0 regains."""
    libc.prctl(
        PR_SET_SECUREBITS, ctypes.c_ulong(SECUREBITS), 0, 0, 0
    )  # a host that refuses is made up for by no_new_privs
    return clear_bounding_set()


def clear_bounding_set() -> bool:
    """Drop every capability from the bounding set; answers False where CAP_SETPCAP is missing and something stays."""
    for capability in range(LAST_POSSIBLE_CAP + 1):
        held = libc.prctl(PR_CAPBSET_READ, ctypes.c_ulong(capability), 0, 0, 0) == 1
        if held and libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            return False
    return True


def drop_capabilities() -> bool:
    """Empty the bounding, ambient, effective, permitted and inheritable sets; answers whether the bounding set is empty."""
    bounded = give_up_for_good()
    prctl("clear ambient set", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0)
    call("capset", libc.capset, ctypes.create_string_buffer(header), ctypes.create_string_buffer(24))
    return bounded


def verify(identity: Request, bounded: bool, facts: dict[str, list[str]]) -> dict[str, object]:
    """What `facts`, the fields of /proc/self/status, say after the drop; the calls' own answers may be faked by an outer filter.

    Raises StepError where one of them is not what was promised.
    """
    uid, gid = str(identity["uid"]), str(identity["gid"])
    if facts["Uid"] != [uid] * 4 or facts["Gid"] != [gid] * 4:
        raise StepError("verify identity", 0, f"running as {facts['Uid']}:{facts['Gid']}, promised {uid}:{gid}")
    wanted = identity["groups"]
    if wanted is not None and not fits([int(group) for group in facts["Groups"]], wanted):
        raise StepError("verify groups", 0, f"groups are {facts['Groups']}, promised {wanted}")
    if any(int(facts[name][0], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")):
        raise StepError("verify capabilities", 0, "a capability set is not empty")
    if facts["NoNewPrivs"] != ["1"]:
        raise StepError("verify no_new_privs", 0, "the flag is not set although prctl said so")
    if uid != "0":
        try:
            os.setuid(0)
        except OSError:
            pass
        else:
            if os.geteuid() == 0:
                raise StepError("verify identity", 0, "uid 0 can be taken again")
    return {
        "uid": int(uid),
        "gid": int(gid),
        "groups": [int(group) for group in facts["Groups"]] if wanted is None else sorted(wanted),
        "capabilities": 0,
        "bounding_set_empty": bounded and int(facts["CapBnd"][0], 16) == 0,
        "no_new_privs": True,
    }
