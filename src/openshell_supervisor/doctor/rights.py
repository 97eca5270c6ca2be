"""What this process may do: capabilities, the way down to the workload's identity, and resource limits."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping

from openshell_supervisor.doctor.attempt import Outcome
from openshell_supervisor.doctor.checks import Check, Severity, failed, inconclusive, info, ok, warning
from openshell_supervisor.doctor.files import Files
from openshell_supervisor.doctor.kernel import NOT_TRIED

# linux/capability.h, in order of their numbers; a newer kernel's are shown as numbers.
CAPABILITIES = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap", "linux_immutable",
    "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner", "sys_module", "sys_rawio",
    "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice", "sys_resource", "sys_time",
    "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap", "mac_override", "mac_admin", "syslog",
    "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf", "checkpoint_restore",
)  # fmt: skip
# Each connection through the proxy holds two descriptors, and up to four more in a pipe; a few hundred connections are usual.
OPEN_FILES = 4096

type Limits = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def limits() -> Limits:
    """(soft, hard) of open files, of the address space and of core files, as they are now (getrlimit(2))."""
    return (
        resource.getrlimit(resource.RLIMIT_NOFILE),
        resource.getrlimit(resource.RLIMIT_AS),
        resource.getrlimit(resource.RLIMIT_CORE),
    )


def checks(files: Files, tries: Mapping[str, Outcome], limits: Limits) -> list[Check]:
    """Everything about this process's own rights; `limits` as they were before anything of ours changed them."""
    return [_capabilities(files), _identity(tries["identity"]), *_limits(limits)]


def names(mask: str) -> list[str]:
    """The capabilities in a bit mask of /proc/self/status, as `podman --cap-add` and setpriv(1) name them."""
    value = int(mask or "0", 16)
    bits = (number for number in range(value.bit_length()) if value >> number & 1)
    return [CAPABILITIES[number] if number < len(CAPABILITIES) else f"cap_{number}" for number in bits]


def _capabilities(files: Files) -> Check:
    fields = files.fields("/proc/self/status")
    if "CapEff" not in fields:
        return inconclusive("privileges.capabilities", "/proc/self/status shows no capabilities", "mount /proc")
    effective, bounding = names(fields["CapEff"]), names(fields.get("CapBnd", ""))
    user = f"uid {os.geteuid()}, "
    if not effective:
        what = "no capability"
    elif len(effective) >= len(CAPABILITIES) - 2:
        what = f"{len(effective)} capabilities, nearly all there are"
    else:
        what = ", ".join(effective)
    return info("privileges.capabilities", user + what, uid=os.geteuid(), effective=effective, bounding=bounding)


def _identity(outcome: Outcome) -> Check:
    name = "privileges.identity"
    if os.geteuid() != 0:
        return ok(name, f"uid {os.geteuid()} is no root: the workload runs as the same user", uid=os.geteuid())
    if outcome.refused is not None:
        hint = "start it as a plain user (--user 1000; Kubernetes: runAsUser), or add the capabilities SETUID, SETGID and SETPCAP"
        summary = f"root cannot become another user: {outcome.refused.brief()}"
        return failed(name, Severity.HIGH, summary, hint, step=outcome.refused.name, errno=outcome.refused.errno)
    if not outcome.worked:
        return inconclusive(name, f"becoming another user: {outcome.why()}", NOT_TRIED)
    if outcome.facts.get("bounding_set_empty") is not True:
        summary = "root can become another user for good; the bounding set stays (no_new_privs makes up for it)"
        return warning(name, Severity.LOW, summary, "add the capability SETPCAP", bounding_set_empty=False)
    return ok(
        name, "root can become another user, give up every capability, and not come back", bounding_set_empty=True
    )


def _limits(limits: Limits) -> list[Check]:
    (_, files), (space, _), (soft, hard) = limits
    enough = files == resource.RLIM_INFINITY or files >= OPEN_FILES
    found = [
        ok("limits.open_files", f"up to {_size(files)} open files", limit=_number(files))
        if enough
        else warning(
            "limits.open_files",
            Severity.LOW,
            f"at most {files} open files: about {files // 6} connections at a time",
            "--ulimit nofile=65536:65536, or LimitNOFILE of the service",
            limit=files,
        ),
        info(
            "limits.core",
            f"core files of {_size(soft)} bytes" if soft else "no core files",
            soft=_number(soft),
            hard=_number(hard),
        ),
    ]
    if space != resource.RLIM_INFINITY:
        hint = "raise it (ulimit -v unlimited) and limit memory by the cgroup: --memory"
        summary = f"the address space is limited to {space >> 20} MiB: the policy engine reserves far more than it uses"
        found.append(warning("limits.address_space", Severity.MEDIUM, summary, hint, limit=space))
    else:
        found.append(ok("limits.address_space", "the address space is not limited", limit=None))
    return found


def _number(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _size(limit: int) -> str:
    return "any number of" if limit == resource.RLIM_INFINITY else str(limit)
