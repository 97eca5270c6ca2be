"""The doctor on real and on poorer hosts: what the kernel refuses turns up in the right check, with errno and hint."""

from __future__ import annotations

import errno
import os
import pathlib

import asking
import product
import pytest

import hosts

root_only = pytest.mark.root
needs_userns = pytest.mark.skipif(not hosts.userns_allowed(), reason="needs a kernel that allows user namespaces")


def test_the_answer_has_every_check_once_in_a_stable_order() -> None:
    """The ids are an interface: scripts of operators read them."""
    answer = asking.ask()
    assert tuple(check["id"] for check in answer.body["checks"]) == asking.CHECK_IDS
    assert [rung["rung"] for rung in answer.body["rungs"]] == ["veth", "loopback", "observed"]
    assert answer.code == 0


def test_what_is_wrong_has_a_severity_and_a_hint_and_nothing_else_has_a_severity() -> None:
    """On a host that lacks much: every warning and failure says how to mend it."""
    answer = asking.ask(wrap=lambda line: hosts.outer_seccomp(hosts.unprivileged(line), "unshare", "prctl=22"))
    wrong = [check for check in answer.body["checks"] if check["state"] in ("warning", "failed")]
    assert len(wrong) > 3
    for check in answer.body["checks"]:
        assert (check["severity"] != "none") == (check in wrong), check
        assert check["hint"] or check not in wrong, check


@root_only
def test_root_with_everything_gets_the_strongest_rung() -> None:
    """veth is built, and everything below it too; nothing that was tried failed."""
    answer = asking.ask("--require", "network,privileges")
    assert answer.body["auto"]["rung"] == "veth"
    assert all(rung["works"] for rung in answer.body["rungs"])
    assert [check["id"] for check in answer.body["checks"] if check["state"] == "failed"] == []
    for name in ("userns.create", "netns.create", "nft.fence", "nft.log", "privileges.identity", "seccomp.calls"):
        assert answer.state(name) == "ok", answer.check(name)
    assert answer.body["require"] == {"layers": ["network", "privileges"], "met": True, "unmet": []}
    assert answer.code == 0


@needs_userns
def test_a_plain_user_gets_the_rung_below_and_hears_why() -> None:
    """EPERM for a network namespace by capabilities is a warning, because a user namespace gives one."""
    answer = asking.ask(wrap=hosts.unprivileged)
    assert answer.body["auto"]["rung"] == "loopback"
    assert [rung["rung"] for rung in answer.body["auto"]["passed_over"]] == ["veth"]
    assert (answer.rung("veth")["works"], answer.rung("veth")["errno"]) == (False, "EPERM")
    lesser = answer.check("netns.create")
    assert (lesser["state"], lesser["facts"]["errno"]) == ("warning", "EPERM")
    assert "--cap-add" in lesser["hint"]
    assert answer.state("userns.create") == "ok"
    # nftables were tried all the same, in the namespace that a user namespace gives.
    assert answer.state("nft.fence") == "ok"
    assert answer.check("privileges.capabilities")["facts"]["effective"] == []


@root_only
def test_root_without_capabilities_keeps_uid_0_and_that_is_said() -> None:
    """The identity cannot be given up: the check names the call, the layer is degraded, and a demand for it is not met."""
    answer = asking.ask("--require", "privileges", wrap=hosts.without_caps)
    refused = answer.check("privileges.identity")
    assert (refused["state"], refused["severity"], refused["facts"]["errno"]) == ("failed", "high", "EPERM")
    assert "--user" in refused["hint"]
    assert answer.layers()["privileges"][0] == "degraded"
    assert (answer.code, answer.body["require"]["met"]) == (1, False)
    assert [item["layer"] for item in answer.body["require"]["unmet"]] == ["privileges"]
    # The neighbour: the same demand on the same host, with the capabilities.
    assert asking.ask("--require", "privileges").code == 0


@needs_userns
def test_without_user_namespaces_nothing_is_enforced_and_the_limit_is_named() -> None:
    """ENOSPC is the kernel's answer; the sysctl that is 0 is named, and that of network namespaces is not blamed."""
    answer = asking.ask("--require", "network", wrap=hosts.userns_off)
    refused = answer.check("userns.create")
    assert (refused["state"], refused["facts"]["errno"]) == ("failed", "ENOSPC")
    assert "user.max_user_namespaces" in refused["hint"]
    limit = answer.check("userns.limit")
    assert (limit["state"], limit["facts"]["limit"]) == ("failed", 0)
    assert answer.state("netns.limit") == "info"
    assert answer.body["auto"]["rung"] == "observed"
    assert answer.layers()["network"] == ("degraded", "ENOSPC")
    assert answer.code == 1


# What a profile refuses -> the checks that must say so, and what they must name.
REFUSED = {
    ("unshare",): {"seccomp.calls": "unshare", "userns.create": "EPERM", "netns.create": "EPERM"},
    ("setns",): {"seccomp.calls": "setns", "netns.create": "setns"},
    ("mount",): {"seccomp.calls": "mount", "mount.private": "EPERM"},
    ("seccomp",): {"seccomp.calls": "seccomp", "seccomp.all_threads": "EPERM"},
    ("prctl=22",): {"seccomp.calls": "prctl", "seccomp.filter": "EPERM"},
    ("landlock_create_ruleset",): {"kernel.landlock": "EPERM"},
    ("landlock_restrict_self",): {"kernel.landlock": "landlock_restrict_self"},
    ("socket=16",): {"seccomp.calls": "socket(AF_NETLINK)", "nft.fence": "EPERM", "nft.log": "EPERM"},
    ("setresuid",): {"seccomp.calls": "setresuid", "privileges.identity": "setresuid"},
    ("prctl=38",): {"privileges.no_new_privs": "EPERM"},
}


@root_only
@pytest.mark.parametrize("denied", REFUSED, ids=",".join)
def test_a_call_that_a_profile_refuses_turns_up_where_it_is_needed(denied: tuple[str, ...]) -> None:
    """A real filter answers EPERM. The checks that need the call say so with a hint; those beside them stay as they are."""
    answer = asking.ask(wrap=lambda line: hosts.outer_seccomp(line, *denied))
    for name, text in REFUSED[denied].items():
        check = answer.check(name)
        assert check["state"] in ("failed", "warning"), check
        assert text in check["summary"], check
        assert check["hint"], check
    assert answer.check("seccomp.outer")["facts"]["filters"] == 1
    others = {name for checks in REFUSED.values() for name in checks} - set(REFUSED[denied])
    fine = {name for name in others if answer.state(name) == "ok"}
    # A refused namespace takes nftables with it, and a refused no_new_privs what needs it; no refusal takes everything.
    assert len(fine) >= len(others) - 6, fine


@root_only
def test_an_errno_of_the_profile_is_reported_as_it_is() -> None:
    """gVisor answers EINVAL to filters that it does not model: the check names that, and what to do about it."""
    answer = asking.ask(wrap=lambda line: hosts.outer_seccomp(line, "seccomp", answer=errno.EINVAL))
    # seccomp(2) with a nonsensical operation is EINVAL anyway: only the real installation can tell.
    refused = answer.check("seccomp.all_threads")
    assert (refused["state"], refused["facts"]["errno"]) == ("failed", "EINVAL")
    assert "OPENSHELL_BEST_EFFORT_FAILURES" in refused["hint"]


KILLING = """
import os, sys
import pyseccomp
rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
rules.set_attr(pyseccomp.Attr.CTL_NNP, int(os.geteuid() != 0))
rules.add_rule(pyseccomp.KILL_PROCESS, "splice")
rules.load()
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_profile_that_kills_is_an_answer_too() -> None:
    """The twin that makes the call dies of SIGSYS; the doctor lives, and names the call."""
    answer = asking.ask(wrap=lambda line: [line[0], "-c", KILLING, *line])
    killed = answer.check("seccomp.calls")
    assert killed["state"] == "failed"
    assert "SIGSYS in splice" in killed["summary"]
    assert answer.state("seccomp.filter") == "ok"


# Host -> (wrapper, options, environment). The doctor must state what a start states.
HOSTS: dict[str, tuple[asking.Wrap | None, tuple[str, ...], dict[str, str]]] = {
    "as it is": (None, (), {}),
    "plain user": (hosts.unprivileged, (), {}),
    "no capabilities": (hosts.without_caps, (), {}),
    "no user namespaces": (hosts.userns_off, (), {}),
    "no landlock": (lambda line: hosts.outer_seccomp(line, "landlock_create_ruleset"), (), {}),
    "observe": (None, ("--egress", "observe"), {}),
    "host mode": (None, ("--network-mode", "host"), {}),
    "network external": (None, ("--declare-external", "network"), {}),
    "filters tolerated": (
        lambda line: hosts.outer_seccomp(line, "seccomp", "prctl=22"),
        (),
        {"OPENSHELL_BEST_EFFORT_FAILURES": ""},
    ),
    "network tolerated": (
        hosts.userns_off,
        ("--network-mode", "isolated"),
        {"OPENSHELL_BEST_EFFORT_FAILURES": "1"},
    ),
    "no probe": (None, ("--no-self-probe",), {}),
}


@pytest.mark.parametrize("host", HOSTS)
def test_it_says_what_a_start_says(host: str, open_tmp: pathlib.Path) -> None:
    """Rung, egress, and state and errno of every layer are those of a real start with the same options on the same host."""
    wrap, options, env = HOSTS[host]
    if os.geteuid() != 0 and wrap is hosts.without_caps:
        pytest.skip("needs root: setpriv takes capabilities away from nobody else")
    policy = open_tmp / "policy.yaml"
    policy.write_text(product.DENY_ALL + "filesystem_policy: {read_write: [/tmp]}\n")
    answer = asking.ask("--policy", str(policy), *options, wrap=wrap, env=env)
    ran = product.run(["true"], policy=policy.read_text(), options=options, wrap=wrap, env=env)
    assert ran.statement is not None, ran.err
    assert answer.body["mode"]["rung"] == ran.rung
    assert answer.body["mode"]["egress"] == ran.statement["egress"]
    stated = {item["layer"]: (item["state"], item["errno"]) for item in ran.statement["layers"]}
    assert answer.layers() == stated
    reasons = {item["layer"]: item["reason"] for item in ran.statement["layers"]}
    if "tolerated" not in host:  # there the start's words for the failure are around the same step and errno
        mine = {item["layer"]: item["reason"] for item in answer.body["layers"]}
        assert mine["network"] == reasons["network"]


@pytest.mark.parametrize(
    ("denied", "options", "policy"),
    [
        (("prctl=22",), (), product.DENY_ALL),
        (("seccomp",), (), product.DENY_ALL),
        (("unshare",), ("--network-mode", "isolated"), product.DENY_ALL),
        (("unshare",), ("--egress", "enforce"), product.DENY_ALL),
        (
            ("landlock_create_ruleset",),
            (),
            product.DENY_ALL + "filesystem_policy: {read_write: [/tmp]}\nlandlock: {compatibility: hard_requirement}\n",
        ),
    ],
    ids=["workload filters", "own filter", "isolated", "enforce", "hard requirement"],
)
def test_it_says_when_a_start_would_be_refused(
    denied: tuple[str, ...], options: tuple[str, ...], policy: str, open_tmp: pathlib.Path
) -> None:
    """Where a start ends with exit code 1, the doctor says so and ends with 1 too, whatever is demanded."""
    path = open_tmp / "policy.yaml"
    path.write_text(policy)
    wrap: asking.Wrap = lambda line: hosts.outer_seccomp(line, *denied)  # noqa: E731
    assert product.run(["true"], policy=policy, options=options, wrap=wrap).code == 1
    answer = asking.ask("--policy", str(path), *options, wrap=wrap)
    assert answer.body["mode"]["starts"] is False
    assert answer.body["mode"]["refusal"]
    assert answer.code == 1
    assert asking.ask("--policy", str(path), *options, "--require", "privileges", wrap=wrap).code == 1
