"""OPENSHELL_BEST_EFFORT_FAILURES: what three subsystems may come to where the operator opted in, and that nothing else softens.

The failures are real: an outer seccomp profile, as a container's runtime loads one, answers EPERM or (as gVisor's older kernels
do) EINVAL to the call that the subsystem needs. Requirements S2-01 to S2-11 of the reference.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

import product
import pytest

import hosts

VARIABLE = "OPENSHELL_BEST_EFFORT_FAILURES"
ISOLATED = ("--network-mode", "isolated")
# The workload: that it ran, which proxy it was told of, and what the proxy answers for a host that no policy allows.
WORKLOAD = [
    "sh",
    "-c",
    "echo STARTED; echo $HTTP_PROXY; curl -s -m 9 -o /dev/null -w '%{http_code}' http://denied.test/",
]
FILES = """version: 1
filesystem_policy: {{read_only: [/usr, /etc, /bin, /lib, /lib64], read_write: [/tmp]}}
landlock: {{compatibility: {compatibility}}}
network_policies: {{}}
"""


@dataclass(frozen=True)
class Subsystem:
    """One that may be tolerated: its layer, the calls that it cannot do without, and the options that make it needed."""

    name: str
    layer: str
    denied: tuple[str, ...]
    options: tuple[str, ...] = ()

    def fail(self, answer: int) -> product.Wrap:
        """A host that answers `answer` to the calls of this subsystem, and to no other."""
        return lambda argv: hosts.outer_seccomp(argv, *self.denied, answer=answer)


NETWORK = Subsystem("network-namespace", "network", ("unshare", "clone:NEWUSER|NEWNET"), ISOLATED)
SUPERVISOR = Subsystem("supervisor-seccomp", "supervisor_syscalls", ("seccomp",))  # seccomp(2), for its flag TSYNC
WORKLOADS = Subsystem("workload-seccomp", "syscalls", ("prctl=22",))  # PR_SET_SECCOMP, linux/prctl.h
SUBSYSTEMS = [NETWORK, SUPERVISOR, WORKLOADS]
USERS: dict[str, Callable[[list[str]], list[str]]] = {"root": lambda argv: argv, "user": hosts.unprivileged}
each_subsystem = pytest.mark.parametrize("subsystem", SUBSYSTEMS, ids=[one.name for one in SUBSYSTEMS])
each_answer = pytest.mark.parametrize("answer", [errno.EPERM, errno.EINVAL], ids=["EPERM", "EINVAL"])
# A plain user who runs this suite gets both as that user: each holds without privileges.
each_user = pytest.mark.parametrize("user", USERS)


def states(ran: product.Ran) -> dict[str, str]:
    """Layer to state, as the statement has them."""
    assert ran.statement is not None, ran.err
    return {item["layer"]: item["state"] for item in ran.statement["layers"]}


def refused(ran: product.Ran) -> None:
    """The start ended before any workload: exit code 1, one message with its hint, no statement."""
    assert ran.code == 1, ran.err
    assert "STARTED" not in ran.out
    assert ran.statement is None
    assert "hint:" in ran.err
    assert "Traceback" not in ran.err
    assert not ran.lines("PROC:LAUNCH")


@each_subsystem
@each_answer
@each_user
def test_unset_a_failure_is_fatal(subsystem: Subsystem, answer: int, user: str) -> None:
    """Without the variable each of the three ends the start, and says why in the system's words or by its name."""
    wrap = subsystem.fail(answer)
    ran = product.run(WORKLOAD, options=subsystem.options, wrap=lambda argv: USERS[user](wrap(argv)))
    refused(ran)
    said = ran.err.split("openshell-supervisor: ", 1)[1]
    assert (
        errno.errorcode[answer] in said
        or {errno.EPERM: "not permitted", errno.EINVAL: "Invalid argument"}[answer] in said
    )
    assert "tolerated" not in ran.err


@each_subsystem
@each_answer
@each_user
def test_set_to_nothing_at_all_a_failure_is_tolerated(subsystem: Subsystem, answer: int, user: str) -> None:
    """Presence counts, the empty string too: the workload runs, the proxy decides, the layer reads `tolerated` with subsystem,
    errno and text in the statement, and a warning and CONFIG:DEGRADED say it."""
    wrap = subsystem.fail(answer)
    ran = product.run(
        WORKLOAD, options=subsystem.options, env={VARIABLE: ""}, wrap=lambda argv: USERS[user](wrap(argv))
    )
    assert ran.code == 0, ran.err
    started, proxy, answered = ran.out.splitlines()
    assert (started, answered) == ("STARTED", "403")
    assert proxy.startswith("http://")
    layer = ran.layer(subsystem.layer)
    assert (layer["state"], layer["errno"]) == ("tolerated", errno.errorcode[answer])
    assert layer["detail"]["subsystem"] == subsystem.name
    assert layer["detail"]["error"]
    assert VARIABLE in layer["reason"]
    (warning,) = [line for line in ran.err.splitlines() if VARIABLE in line and "WARN" in line]
    assert f"subsystem={subsystem.name}" in warning
    assert " error=" in warning
    degraded = [line for line in ran.lines("CONFIG:DEGRADED [MED]") if f"subsystem:{subsystem.name}" in line]
    assert len(degraded) == 1
    assert errno.errorcode[answer] in degraded[0]
    assert [name for name, state in states(ran).items() if state == "tolerated"] == [subsystem.layer]


@pytest.mark.parametrize("value", ["0", "false", "no", "1"])
def test_its_value_does_not_matter(value: str) -> None:
    """Any value enables, also one that reads like a no: it is upstream's contract."""
    ran = product.run(["true"], env={VARIABLE: value}, wrap=SUPERVISOR.fail(errno.EPERM))
    assert ran.code == 0, ran.err
    assert ran.layer("supervisor_syscalls")["state"] == "tolerated"


@each_user
def test_where_nothing_fails_it_changes_nothing(user: str) -> None:
    """On a host that gives everything the statement is the same with and without, and nothing is tolerated in advance."""
    without = product.run(["true"], wrap=USERS[user])
    opted_in = product.run(["true"], wrap=USERS[user], env={VARIABLE: "1"})
    assert states(opted_in) == states(without)
    assert opted_in.rung == without.rung
    assert "tolerated" not in states(opted_in).values()
    assert states(opted_in)["network"] == states(opted_in)["syscalls"] == "enforced"


@each_user
def test_all_three_at_once(user: str) -> None:
    """The host of the pull request: EPERM for a namespace, EINVAL for every filter. It starts, the workload is told of the proxy,
    the proxy denies, and the statement leaves nothing standing that does not hold."""

    def wrap(argv: list[str]) -> list[str]:
        filters = hosts.outer_seccomp(argv, *SUPERVISOR.denied, *WORKLOADS.denied, answer=errno.EINVAL)
        return USERS[user](hosts.outer_seccomp(filters, *NETWORK.denied))

    ran = product.run(WORKLOAD, options=ISOLATED, env={VARIABLE: ""}, wrap=wrap)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines() == ["STARTED", "http://127.0.0.1:3128", "403"]
    assert ran.rung == "observed"
    assert {name for name, state in states(ran).items() if state == "tolerated"} == {one.layer for one in SUBSYSTEMS}
    assert {one.layer: ran.layer(one.layer)["errno"] for one in SUBSYSTEMS} == {
        "network": "EPERM",
        "supervisor_syscalls": "EINVAL",
        "syscalls": "EINVAL",
    }
    assert states(ran)["privileges"] == "enforced"


def test_what_is_required_is_not_tolerated() -> None:
    """`--require` beats the opt-in: a required layer that would be tolerated ends the start."""
    wrap = SUPERVISOR.fail(errno.EPERM)
    ran = product.run(WORKLOAD, env={VARIABLE: "1"}, options=["--require", "supervisor_syscalls"], wrap=wrap)
    assert ran.code == 1, ran.err
    assert "STARTED" not in ran.out
    held = product.run(WORKLOAD, env={VARIABLE: "1"}, options=["--require", "syscalls"], wrap=wrap)
    assert held.code == 0, held.err


@each_user
def test_file_rules_keep_their_own_word(user: str) -> None:
    """Without Landlock the policy decides, never the variable: a hard requirement is fatal, best effort is `degraded`."""

    def wrap(argv: list[str]) -> list[str]:
        return USERS[user](hosts.outer_seccomp(argv, "landlock_create_ruleset", answer=errno.ENOSYS))

    env = {VARIABLE: "1"}
    hard, soft = (FILES.format(compatibility=word) for word in ("hard_requirement", "best_effort"))
    refused(product.run(WORKLOAD, policy=hard, env=env, wrap=wrap))
    ran = product.run(WORKLOAD, policy=soft, env=env, wrap=wrap)
    assert ran.code == 0, ran.err
    assert (ran.layer("filesystem")["state"], ran.layer("filesystem")["errno"]) == ("degraded", "ENOSYS")
    assert ran.lines('FINDING:CREATE [HIGH] "Landlock Filesystem Sandbox Unavailable"')
    allowed = product.run(WORKLOAD, policy=hard, env=env, wrap=USERS[user])
    assert allowed.layer("filesystem")["state"] == "enforced", "the neighbour: the same policy where Landlock is"


@pytest.mark.root
@pytest.mark.parametrize("call", ["setresuid", "setresgid", "setgroups", "prctl=24", "prctl=38"])
def test_privileges_are_never_tolerated(call: str) -> None:
    """Identity, groups, bounding set (24: PR_CAPBSET_DROP) or no_new_privs (38): where the host refuses one, the start ends.

    The supervisor has a group that the workload must lose: a change that changes nothing is not asked for (S2-07).
    """

    def grouped(argv: list[str]) -> list[str]:
        return ["setpriv", "--groups=64123", *argv]

    ran = product.run(WORKLOAD, env={VARIABLE: "1"}, wrap=lambda argv: grouped(hosts.outer_seccomp(argv, call)))
    assert ran.code == 1, ran.err
    assert "STARTED" not in ran.out
    assert "not permitted" in ran.err
    assert "hint:" in ran.err
    assert "Traceback" not in ran.err
    assert product.run(WORKLOAD, env={VARIABLE: "1"}, wrap=grouped).out.startswith("STARTED")


@pytest.mark.parametrize("how", ["flag", "variable"])
@pytest.mark.parametrize("subsystem", [SUPERVISOR, WORKLOADS], ids=["supervisor-seccomp", "workload-seccomp"])
def test_its_better_sibling_says_who_owns_the_layer(subsystem: Subsystem, how: str) -> None:
    """A layer that was declared external is not attempted, so its failure cannot end the start: it reads `external`, nothing is
    tolerated, and another layer's failure stays fatal."""
    given = {"OPENSHELL_DECLARE_EXTERNAL": subsystem.layer} if how == "variable" else {}
    options = ["--declare-external", subsystem.layer] if how == "flag" else []
    ran = product.run(WORKLOAD, options=options, env=given, wrap=subsystem.fail(errno.EPERM))
    assert ran.code == 0, ran.err
    assert states(ran)[subsystem.layer] == "external"
    assert "tolerated" not in states(ran).values()
    (other,) = {SUPERVISOR, WORKLOADS} - {subsystem}
    refused(product.run(WORKLOAD, options=options, env=given, wrap=other.fail(errno.EPERM)))


def test_a_network_that_is_external_is_not_attempted() -> None:
    """No namespace is tried, on a host that would give one: the same start without the declaration makes it."""
    ran = product.run(WORKLOAD, options=["--declare-external", "network"])
    assert ran.out.splitlines()[-1] == "403", ran.err
    assert states(ran)["network"] == "external"
    assert not ran.lines("CONFIG:CREATING")
    assert product.run(WORKLOAD).lines("CONFIG:CREATING")
