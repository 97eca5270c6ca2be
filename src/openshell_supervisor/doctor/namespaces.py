"""User, network and mount namespaces, and the fence of nftables in them: made for real in a process that is gone by now."""

from __future__ import annotations

from collections.abc import Mapping

from openshell_supervisor.doctor.attempt import Outcome, Step
from openshell_supervisor.doctor.checks import Check, Severity, failed, inconclusive, info, ok, warning
from openshell_supervisor.doctor.files import Files
from openshell_supervisor.doctor.kernel import NOT_TRIED, PROFILE_HINT

# Debian's patch and Ubuntu's AppArmor switch, beside the kernel's own limit of namespaces per user (namespaces(7)).
CLONE_SWITCH = "/proc/sys/kernel/unprivileged_userns_clone"
APPARMOR_SWITCH = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"
USER_LIMIT = "/proc/sys/user/max_user_namespaces"
NETWORK_LIMIT = "/proc/sys/user/max_net_namespaces"
NO_STACK_HINT = (
    "the new namespace has no network at all: gVisor with --network=host; start runsc with its own stack (--network=sandbox, "
    "its default), or say with --declare-external network that an outer sandbox owns the layer"
)
NO_NETFILTER_HINT = "gVisor and small kernels have no netfilter: take a kernel with it"
LABELS = ("/proc/self/attr/apparmor/current", "/proc/self/attr/current")


def checks(files: Files, tries: Mapping[str, Outcome]) -> list[Check]:
    """Everything about namespaces."""
    user, network = tries["user_namespace"], tries["network_namespace"]
    user_alone = user.facts.get("user_alone") is True
    return [
        _user(files, user),
        _limit(files, "userns.limit", USER_LIMIT, reached=_reached(user) and not user_alone, made=_made(user)),
        _network(files, network, user),
        _limit(
            files,
            "netns.limit",
            NETWORK_LIMIT,
            reached=_reached(network) or (_reached(user) and user_alone),
            made=_made(network) or _made(user),
        ),
        _label(files),
        _mount(tries["mount"]),
        _fence(network, user),
        _log(network, user),
    ]


def _made(outcome: Outcome) -> bool:
    """Did it come to a network namespace with lo up?"""
    step = outcome.step("raise lo")
    return step is not None and step.worked


def _user(files: Files, outcome: Outcome) -> Check:
    name = "userns.create"
    if _made(outcome):
        return ok(name, "a user namespace with a network namespace in it can be made, and lo raised in it")
    step = outcome.refused
    if step is None:
        return inconclusive(name, f"a user namespace: {outcome.why()}", NOT_TRIED)
    hint = _why_no_user_namespace(files, step)
    return failed(name, Severity.HIGH, f"no user namespace: {step.brief()}", hint, step=step.name, errno=step.errno)


def _why_no_user_namespace(files: Files, step: Step) -> str:
    """How to mend it, by what the host says about itself."""
    if files.number(USER_LIMIT) == 0 or step.errno == "ENOSPC":
        # The limit of network namespaces answers the same; its own check tells the two apart.
        return "on the node: sysctl -w user.max_user_namespaces=15000 (0 means none; each user has a count of its own)"
    if files.number(CLONE_SWITCH) == 0:
        return "on the node: sysctl -w kernel.unprivileged_userns_clone=1"
    if files.number(APPARMOR_SWITCH) == 1:
        return (
            "on the node: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile with `userns,` "
            "(Podman and Docker: --security-opt apparmor=PROFILE; Kubernetes: securityContext.appArmorProfile)"
        )
    if step.errno in ("EINVAL", "ENOSYS"):
        return "the kernel has no user namespaces (CONFIG_USER_NS): give the container CAP_SYS_ADMIN and CAP_NET_ADMIN"
    if step.errno == "EAFNOSUPPORT":
        return NO_STACK_HINT
    if files.fields("/proc/self/status").get("Seccomp") == "0":
        return (
            "no seccomp filter lies on this process: a security module (see lsm.label) or a chroot refuses (unshare(2))"
        )
    return f"{PROFILE_HINT}; a security module and a chroot refuse as well (unshare(2))"


def _reached(outcome: Outcome) -> bool:
    """Did the kernel say that there are as many as there may be?"""
    return outcome.refused is not None and outcome.refused.errno == "ENOSPC"


def _limit(files: Files, name: str, path: str, *, reached: bool, made: bool) -> Check:
    number, what = files.number(path), path.removeprefix("/proc/sys/").replace("/", ".")
    facts: dict[str, object] = {"limit": number}
    if name == "userns.limit":
        facts |= {path.rpartition("/")[2]: files.number(path) for path in (CLONE_SWITCH, APPARMOR_SWITCH)}
    if number is None:
        if made:
            return info(name, f"{what} cannot be read; namespaces can be made", **facts)
        return inconclusive(name, f"{what} cannot be read", "gVisor and kernels before 4.9 have no such limit", **facts)
    if number == 0:
        return failed(name, Severity.HIGH, f"{what} is 0", f"on the node: sysctl -w {what}=15000", **facts)
    if reached:
        hint = f"on the node: sysctl -w {what}=N with a larger N; of nested namespaces each level has its own"
        return failed(name, Severity.HIGH, f"{what} is {number} and reached", hint, **facts, errno="ENOSPC")
    return info(name, f"{what} is {number}", **facts)


def _network(files: Files, outcome: Outcome, user: Outcome) -> Check:
    name = "netns.create"
    if _made(outcome):
        return ok(name, "a network namespace can be made by capabilities, left, entered and used")
    step = outcome.refused
    if step is None:
        return inconclusive(name, f"a network namespace: {outcome.why()}", NOT_TRIED)
    hint = {
        "ENOSPC": "on the node: raise user.max_net_namespaces",
        "EAFNOSUPPORT": NO_STACK_HINT,
    }.get(
        step.errno or "",
        "--cap-add SYS_ADMIN,NET_ADMIN (Kubernetes: securityContext.capabilities.add) and a seccomp profile with unshare, setns",
    )
    facts: dict[str, object] = {"step": step.name, "errno": step.errno}
    if _made(user):
        summary = f"no network namespace by capabilities ({step.brief()}); a user namespace gives one: no rung veth, but loopback"
        return warning(name, Severity.LOW, summary, hint, **facts)
    return failed(
        name,
        Severity.HIGH,
        f"no network namespace: {step.brief()}",
        hint if hint is NO_STACK_HINT else f"allow user namespaces, or {hint}",
        **facts,
    )


def _label(files: Files) -> Check:
    label = next((word for word in map(files.word, LABELS) if word), None)
    if label is None:
        return info("lsm.label", "no security module has put a label on this process", label=None)
    return info("lsm.label", f"the security module's label: {label}", label=label)


def _mount(outcome: Outcome) -> Check:
    name = "mount.private"
    if outcome.worked:
        return ok(name, "a directory can be made read-only for the workload alone")
    if outcome.refused is None:
        return inconclusive(name, f"a private mount: {outcome.why()}", NOT_TRIED)
    hint = (
        "let root own the supervisor's installation, then nothing needs to be protected; or allow mount in the container's "
        "seccomp and AppArmor profile"
    )
    summary = f"no private mounts ({outcome.refused.brief()}): code that the workload's user may write stays writable"
    return warning(name, Severity.MEDIUM, summary, hint, errno=outcome.refused.errno)


def _first(name: str, outcomes: tuple[Outcome, ...]) -> tuple[Step, Outcome] | None:
    """The step of that name in the first try that came to it."""
    found = ((outcome.step(name), outcome) for outcome in outcomes)
    return next(((step, outcome) for step, outcome in found if step is not None), None)


def _fence(*outcomes: Outcome) -> Check:
    name = "nft.fence"
    found = _first("nft", outcomes)
    if found is None:
        hint = "it needs a network namespace: see netns.create and userns.create"
        return inconclusive(name, "no namespace to try nftables in", hint)
    step, outcome = found
    if not step.worked:
        mend = {"EPERM": PROFILE_HINT, "EACCES": PROFILE_HINT, "EPROTONOSUPPORT": NO_NETFILTER_HINT}.get(
            step.errno or "", "on the node: modprobe nf_tables nft_reject nft_ct nft_limit"
        )
        hint = f"{mend}; the rung veth needs it, loopback does not"
        return failed(name, Severity.MEDIUM, f"the fence is refused: {step.brief()}", hint, errno=step.errno)
    left_out = dict(outcome.facts.get("left_out", {}))
    if left_out:
        summary = f"the fence holds, without {', '.join(f'{rule} [{errno}]' for rule, errno in left_out.items())}"
        hint = "on the node: modprobe nft_log nft_limit nft_ct, to have every attempt to get out reported"
        return warning(name, Severity.LOW, summary, hint, left_out=left_out)
    return ok(name, "the fence can be installed over netlink, and reads back as it was sent", left_out={})


def _log(*outcomes: Outcome) -> Check:
    name = "nft.log"
    found = _first("nflog", outcomes)
    if found is None:
        return inconclusive(name, "no namespace to try NFLOG in", "see netns.create and userns.create")
    step, _ = found
    if step.worked:
        return ok(name, "attempts to get out past the fence can be heard (NFLOG)")
    hint = {"EPERM": PROFILE_HINT, "EACCES": PROFILE_HINT, "EPROTONOSUPPORT": NO_NETFILTER_HINT}.get(
        step.errno or "", "on the node: modprobe nfnetlink_log"
    )
    return warning(name, Severity.LOW, f"attempts are refused but not reported: {step.brief()}", hint, errno=step.errno)
