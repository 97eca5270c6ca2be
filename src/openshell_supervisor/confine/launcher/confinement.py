"""What the launcher does to itself, in the one order that works; it answers what it verified, not what was asked.

Mounts and the directory come first (they need privileges), then the identity, then what holds for good: no_new_privs, the
Landlock ruleset, and the filters last, because the last of them refuses any further one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import stat

from openshell_supervisor.confine.launcher import mounts, privileges, terminals
from openshell_supervisor.confine.launcher.kernel import (
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    SYS_LANDLOCK_RESTRICT_SELF,
    TYPE_CHECKING,
    StepError,
    install_filter,
    prctl,
    step,
    system_call,
)
from openshell_supervisor.confine.launcher.probe import attempt

if TYPE_CHECKING:
    from typing import TextIO

    from openshell_supervisor.confine.launcher.kernel import Answer, Request

STATUS = "/proc/self/status"


def confine(request: Request, descriptors: list[int]) -> Answer:
    """Take the identity for good and give up every privilege, then the file rules and the filters that the request names.

    A privilege that stays raises; file rules and filters answer their errno instead, because whether a sandbox may start
    without them is not decided here.
    """
    shown = privileges.unmapped
    identity = {**request["identity"], **({"uid": shown[0]} if shown else {})}
    protected = mounts.protect(request["read_only"], request["anchors"])
    mounts.cover(request.get("cover", []))
    private, passed = terminals.take(request.get("terminals"), descriptors)
    with step("chdir"):
        mounts.stand_anew(request["cwd"], bool(request["read_only"] or private is not None))
    hand_over_pipes(identity)
    able = privileges.holds_setpcap()
    privileges.take_identity(identity)
    bounded = privileges.drop_capabilities()
    limit_resources(request)
    prctl("no_new_privs", PR_SET_NO_NEW_PRIVS, 1)
    if request.get("die_with_parent"):
        # Cleared by the kernel when credentials change, hence here; checked once, because the parent may be gone by now.
        prctl("parent death signal", PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != request["parent"]:
            raise StepError("parent death signal", 0, "the supervisor is gone")
    with step("verify privileges"):
        status = open(STATUS)  # noqa: SIM115  (read again below, where the file rules may not let it be opened any more)
    with status:
        facts = privileges.verify(identity, bounded, read_status(status))
        if able and not facts["bounding_set_empty"]:
            raise StepError("clear bounding set", errno.EPERM)
        before = filters_held(status)
        # What fails already proves nothing when it fails again under the file rules.
        controls = [attempt(item) for item in request.get("controls", ())]
        ruleset = restrict(request.get("landlock"), descriptors)
        filters = {name: install(programs) for name, programs in request["filters"].items()}
        held = filters_held(status)
    return {
        "privileges": facts,
        "protected": protected,
        "terminals": private,
        "user_namespace": os.stat("/proc/self/ns/user").st_ino,
        "landlock": ruleset,
        "controls": controls,
        "filters": filters,
        "filters_added": None if before is None or held is None else held - before,
    }, passed


def hand_over_pipes(identity: Request) -> None:
    """Pipes among the descriptors 0-2 become the workload's, as container runtimes do: a script's `>/dev/stderr` opens them anew,
    with the rights of its user. Files and terminals stay whose they are."""
    for number in range(3):
        try:
            if stat.S_ISFIFO(os.fstat(number).st_mode):
                os.fchown(number, identity["uid"], -1)
        except OSError:
            pass  # closed, or not ours to give: then the workload's user is ours as well, or the names stay closed


def limit_resources(request: Request) -> None:
    """No core files; and the descriptors that the workload would have had without us (we raised our own limit)."""
    with step("resource limits"):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if request["open_files"] is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["open_files"]))


def restrict(landlock: Request | None, descriptors: list[int]) -> int | None:
    """Enter the passed ruleset's domain (landlock_restrict_self(2)); None where none was asked for, 0, or the errno."""
    if landlock is None:
        return None
    ctypes.set_errno(0)
    return system_call(SYS_LANDLOCK_RESTRICT_SELF, descriptors[0], landlock["flags"])


def install(programs: list[str]) -> int:
    """Install programs (hexadecimal) in this order; 0, or the errno of the first that the host refuses."""
    for program in programs:
        number = install_filter(bytes.fromhex(program))
        if number:
            return number
    return 0


def read_status(status: TextIO) -> dict[str, list[str]]:
    """The fields of /proc/self/status now (proc_pid_status(5)); the file may be read again and again."""
    status.seek(0)
    return {name: value.split() for name, _, value in (line.partition(":") for line in status)}


def filters_held(status: TextIO) -> int | None:
    """How many filters the kernel says we are under; None where it does not tell (gVisor, Linux before 5.10)."""
    fields = read_status(status).get("Seccomp_filters")
    return int(fields[0]) if fields else None
