"""The kernel, its Landlock, and system call filters: ours, and those that somebody has put on us already."""

from __future__ import annotations

from collections.abc import Mapping

from openshell_supervisor.confine.landlock_abi import Support, support
from openshell_supervisor.doctor.attempt import Outcome, Step
from openshell_supervisor.doctor.checks import Check, Severity, failed, inconclusive, info, ok, warning
from openshell_supervisor.doctor.files import Files
from openshell_supervisor.enforcement import errno_name

# What is lost with a call that a profile refuses (the names are those of `tries.HARMLESS`), and what that costs.
NEEDED_FOR = {
    "unshare": ("the rungs veth and loopback", Severity.HIGH),
    "setns": ("the rung veth", Severity.MEDIUM),
    "mount": ("making the supervisor's code read-only for the workload", Severity.MEDIUM),
    "clone3": ("threads and processes of the C library, which falls back only from ENOSYS", Severity.MEDIUM),
    "seccomp": ("the supervisor's own filter (supervisor_syscalls)", Severity.HIGH),
    "prctl": ("the workload's filter (syscalls)", Severity.HIGH),
    "setresuid": ("taking the workload's identity (privileges)", Severity.HIGH),
    "close_range": ("the launcher, which closes what is not the workload's", Severity.HIGH),
    "memfd_create": ("the proxy's TLS keys, which never touch a disk", Severity.HIGH),
    "splice": ("tunnels through the kernel", Severity.MEDIUM),
    "socket(AF_NETLINK)": ("the rung veth", Severity.MEDIUM),
}
PROFILE_HINT = (
    "the container's seccomp profile answers instead of the kernel: Podman and Docker take one that allows the call with "
    "--security-opt seccomp=PROFILE.json, Kubernetes with securityContext.seccompProfile (type Localhost)"
)
NOT_TRIED = "run it again on a machine that is less busy; `python -I -m openshell_supervisor.doctor.tries` shows the tries alone"


def checks(files: Files, tries: Mapping[str, Outcome], landlock: Support | None = None) -> list[Check]:
    """Everything about the kernel. `landlock` is what it says of itself (asked here where it is None)."""
    return [
        _release(files),
        _landlock(landlock or support(), tries["landlock"]),
        _filters_on_us(files),
        _calls(tries["calls"]),
        _filter("seccomp.filter", "the workload's filters", tries["filter"]),
        _filter("seccomp.all_threads", "a filter for all threads of the supervisor", tries["filter_for_all_threads"]),
        _no_new_privs(files, tries["filter"]),
    ]


def _release(files: Files) -> Check:
    release = files.word("/proc/sys/kernel/osrelease")
    if release is None:
        hint = "mount /proc; nothing of the supervisor works without it"
        return inconclusive("kernel.release", "/proc/sys/kernel/osrelease cannot be read", hint)
    version = files.word("/proc/sys/kernel/version") or ""
    return info("kernel.release", f"Linux {release}", release=release, version=version)


def _landlock(found: Support, outcome: Outcome) -> Check:
    name = "kernel.landlock"
    if not found.abi:
        errno = errno_name(found.errno)
        return failed(name, Severity.HIGH, f"no Landlock: {found.reason} [{errno}]", found.hint, abi=0, errno=errno)
    facts: dict[str, object] = {"abi": found.abi, "errata": found.errata}
    if outcome.refused is not None:
        hint = "allow landlock_create_ruleset, landlock_add_rule and landlock_restrict_self. " + PROFILE_HINT
        summary = f"Landlock ABI {found.abi}, but a ruleset is refused: {outcome.refused.brief()}"
        return failed(name, Severity.HIGH, summary, hint, **facts, errno=outcome.refused.errno)
    if not outcome.worked:
        return inconclusive(name, f"Landlock ABI {found.abi}, not tried: {outcome.why()}", NOT_TRIED, **facts)
    lacks = [what for abi, what in ((3, "truncate"), (5, "ioctl on devices"), (6, "scopes")) if found.abi < abi]
    if lacks:
        summary = f"Landlock ABI {found.abi} holds; it cannot restrict {', '.join(lacks)}"
        return warning(name, Severity.LOW, summary, "a newer kernel (6.12 has all of it)", **facts, lacks=lacks)
    return ok(name, f"Landlock ABI {found.abi} holds: a directory outside the rules could not be read", **facts)


def _filters_on_us(files: Files) -> Check:
    """What a runtime has put on us: Seccomp is 0, or 2 with filters; Linux 5.9 and newer count them (proc_pid_status(5))."""
    fields = files.fields("/proc/self/status")
    mode, count = fields.get("Seccomp"), fields.get("Seccomp_filters")
    name = "seccomp.outer"
    if mode is None:
        hint = "no seccomp in this kernel, or a runtime that does not show it: see seccomp.filter"
        return inconclusive(name, "/proc/self/status has no line Seccomp", hint)
    if mode == "0":
        return info(name, "no filter lies on this process", mode=0, filters=0)
    many = f"{count} filter{'s' * (count != '1')}" if count else "a filter"
    source = "the container runtime's profile, or an outer sandbox's"
    return info(name, f"{many} on this process: {source}", mode=int(mode), filters=int(count) if count else None)


def _calls(outcome: Outcome) -> Check:
    """Who answers the calls that we need. One of them refused by design is no refusal: ENOSYS for clone3 makes libc fall back."""
    name = "seccomp.calls"
    refused = {
        step.name: step.errno or step.text
        for step in outcome.steps
        if not step.worked and (step.name, step.errno) != ("clone3", "ENOSYS")
    }
    if outcome.lost:
        summary = f"trying the calls ended early: {outcome.lost}"
        if "SIGSYS" in outcome.lost:
            return failed(name, Severity.HIGH, summary, PROFILE_HINT, refused=refused)
        return inconclusive(name, summary, NOT_TRIED, refused=refused)
    if refused:
        worst = next(s for s in (Severity.HIGH, Severity.MEDIUM) if any(NEEDED_FOR[call][1] is s for call in refused))
        losses = "; ".join(f"{call} {errno}, needed for {NEEDED_FOR[call][0]}" for call, errno in refused.items())
        return failed(name, worst, f"refused before the kernel saw it: {losses}", PROFILE_HINT, refused=refused)
    if len(outcome.steps) < len(NEEDED_FOR):
        hint = "the supervisor runs on x86_64 and aarch64"
        return inconclusive(name, "the numbers of the calls are not known for this machine", hint)
    return ok(name, f"the kernel itself answers all {len(outcome.steps)} calls that were tried", refused={})


def _filter(name: str, what: str, outcome: Outcome) -> Check:
    if outcome.worked:
        return ok(name, f"{what} can be installed, and answered a call")
    if outcome.refused is not None:
        step = outcome.refused
        hint = (
            "the kernel has no seccomp filters (gVisor may have none): OPENSHELL_BEST_EFFORT_FAILURES tolerates that, "
            "--declare-external syscalls,supervisor_syscalls says that an outer sandbox does it"
            if step.errno in ("EINVAL", "ENOSYS")
            else PROFILE_HINT
        )
        return failed(name, Severity.HIGH, f"{what}: {step.brief()}", hint, errno=step.errno)
    return inconclusive(name, f"{what}: {outcome.why()}", NOT_TRIED)


def _no_new_privs(files: Files, outcome: Outcome) -> Check:
    name = "privileges.no_new_privs"
    already = files.fields("/proc/self/status").get("NoNewPrivs") == "1"
    step: Step | None = outcome.step("no_new_privs")
    if step is None:
        return inconclusive(name, f"no_new_privs: {outcome.why()}", NOT_TRIED)
    if not step.worked:
        return failed(name, Severity.HIGH, f"no_new_privs is refused: {step.brief()}", PROFILE_HINT, errno=step.errno)
    return ok(name, "no_new_privs " + ("is set already" if already else "can be set"), already=already)
