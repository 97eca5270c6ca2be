"""Inside gVisor the product starts in every mode that does not demand what is not there, and its statement is true of gVisor.

gVisor's kernel (runsc) has seccomp and namespaces of users, and no Landlock. With `--network=host` a new network namespace can be
made, but has no network stack at all (EAFNOSUPPORT), so no inner boundary can stand; with gVisor's own stack `loopback` can.
"""

from __future__ import annotations

import pathlib
import tempfile

import product
import pytest
import runsc

VARIABLE = "OPENSHELL_BEST_EFFORT_FAILURES"
ALL_LAYERS = "network,filesystem,syscalls,supervisor_syscalls"
FILES = """
filesystem_policy: {{read_only: [/usr, /etc, /bin, /lib, /lib64], read_write: [/tmp]}}
landlock: {{compatibility: {compatibility}}}
"""
POLICY = f"""version: 1
{FILES.format(compatibility="best_effort")}
network_policies:
  upstream:
    binaries: [{{path: "/**"}}]
    endpoints: [{{host: {runsc.UPSTREAM}, port: {runsc.PORT}}}]
"""
HARD = POLICY.replace("best_effort", "hard_requirement")
# One line each: through the proxy to what is allowed, to what is not, and past the proxy.
ASK = f"""
URL=http://{runsc.UPSTREAM}:{runsc.PORT}/hello
echo "uid $(id -u)"
echo "allowed $(curl -s -m 9 -w ' %{{http_code}}' $URL)"
echo "denied $(curl -s -m 9 -o /dev/null -w '%{{http_code}}' http://{runsc.ELSEWHERE}:{runsc.PORT}/hello)"
echo "direct $(curl -s -m 3 --noproxy '*' -o /dev/null -w '%{{http_code}}' $URL)"
"""
# What the workload's filters refuse, and gVisor allows to everybody: a user namespace, and a netlink socket.
FORBIDDEN = """
import ctypes, errno, socket
libc = ctypes.CDLL(None, use_errno=True)
def outcome(call):
    try:
        return call() or "ok"
    except OSError as error:
        return errno.errorcode[error.errno]
print("netlink", outcome(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()))
print("user namespace", "ok" if libc.unshare(0x10000000) == 0 else errno.errorcode[ctypes.get_errno()])
"""
pytestmark = pytest.mark.root


def answers(ran: product.Ran) -> dict[str, str]:
    """What the workload saw, by the word that each line begins with."""
    return dict(line.split(" ", 1) for line in ran.out.splitlines() if " " in line)


def states(ran: product.Ran) -> dict[str, str]:
    """Layer to state, as the statement has them."""
    assert ran.statement is not None, ran.err
    return {item["layer"]: item["state"] for item in ran.statement["layers"]}


@pytest.mark.parametrize(
    ("user", "refused", "uid", "privileges"),
    [
        (runsc.DRIVER, "ENOTSUP", 65534, "enforced"),
        (runsc.ROOT_WITHOUT, "EPERM", 0, "degraded"),
        (runsc.PRE_DROPPED, "EPERM", runsc.PRE_DROPPED.uid, "enforced"),
    ],
    ids=["the driver's capabilities", "root without capabilities", "a user dropped before"],
)
def test_it_starts_on_gvisors_host_network_and_says_what_holds(
    gvisor: runsc.Gvisor, user: runsc.User, refused: str, uid: int, privileges: str
) -> None:
    """Without any opt-in: no boundary and no file rules, and both say why; filters and privileges hold and were probed.

    "degraded" is no excess of caution: what the policy denies is observed and goes through, and the way past the proxy is open.
    """
    ran = gvisor.run(["sh", "-c", ASK], user=user, policy=POLICY)
    assert ran.code == 0, ran.err
    assert answers(ran) == {"uid": str(uid), "allowed": f"{runsc.GREETING} 200", "denied": "200", "direct": "200"}
    assert ran.rung == "observed"
    assert (ran.statement or {})["egress"] == "observe"
    assert states(ran) == {
        "network": "degraded",
        "filesystem": "degraded",
        "syscalls": "enforced",
        "privileges": privileges,
        "supervisor_syscalls": "enforced",
        "binary_identity": "degraded",
    }
    failed = {rung["rung"]: rung["errno"] for rung in ran.layer("network")["detail"]["failed_rungs"]}
    assert failed == {"veth": refused, "loopback": "EAFNOSUPPORT"}
    assert ran.layer("network")["errno"] == "EAFNOSUPPORT"
    assert ran.layer("filesystem")["errno"] == "ENOSYS"
    for layer in ("syscalls", "supervisor_syscalls"):
        assert ran.layer(layer)["detail"]["probed"] is True
    assert ran.lines("CONFIG:DEGRADED [MED] Network isolation degraded")
    assert ran.lines('FINDING:LOGGED [HIGH] "Egress Enforcement Unavailable"')
    assert ran.lines('FINDING:CREATE [HIGH] "Landlock Filesystem Sandbox Unavailable"')
    assert any("endpoint" in line for line in ran.lines("HTTP:GET [MED] OBSERVED"))


def test_it_starts_where_an_unprivileged_user_runs_gvisor(gvisor: runsc.Gvisor) -> None:
    """The same without root anywhere: `runsc --rootless`, and the same statement."""
    ran = gvisor.run(["sh", "-c", ASK], user=runsc.PRE_DROPPED, policy=POLICY, rootless=True)
    assert ran.code == 0, ran.err
    assert ran.rung == "observed"
    assert ran.lines("HTTP:GET [MED] OBSERVED")
    assert states(ran)["syscalls"] == states(ran)["privileges"] == "enforced"


@pytest.mark.parametrize("user", [runsc.DRIVER, runsc.PRE_DROPPED], ids=["root", "a user dropped before"])
def test_gvisors_own_network_stack_carries_a_boundary(gvisor: runsc.Gvisor, user: runsc.User) -> None:
    """There `loopback` stands, is probed and enforced: the proxy answers, and nothing else can be reached."""
    ran = gvisor.run(["sh", "-c", ASK], user=user, network="none", policy=POLICY)
    assert ran.rung == "loopback", ran.err
    assert ran.layer("network")["state"] == "enforced"
    assert ran.layer("network")["detail"]["canaries"] >= 4
    assert answers(ran)["allowed"].endswith(" 502"), "allowed, but this sandbox has no way to the upstream"
    assert answers(ran)["denied"] == "403"
    assert answers(ran)["direct"] == "000"


def test_the_filters_that_it_states_refuse_in_gvisor(gvisor: runsc.Gvisor) -> None:
    """A netlink socket and a user namespace: gVisor gives them to anybody, the workload gets EPERM."""
    ran = gvisor.run(["python3", "-c", FORBIDDEN], user=runsc.PRE_DROPPED)
    assert ran.out.splitlines() == ["netlink EPERM", "user namespace EPERM"], ran.err
    with tempfile.TemporaryDirectory(prefix="oss-gvisor-") as name:
        pathlib.Path(name).chmod(0o755)
        without = gvisor.sandbox(pathlib.Path(name), ["python3", "-c", FORBIDDEN], user=runsc.PRE_DROPPED)
    assert without.stdout.splitlines() == ["netlink ok", "user namespace ok"], without.stderr


def test_isolated_is_fatal_there_without_the_opt_in(gvisor: runsc.Gvisor) -> None:
    """A boundary that is demanded and cannot be had ends the start: exit code 1, errno and hint, no workload."""
    ran = gvisor.run(["echo", "STARTED"], options=["--network-mode", "isolated"])
    assert ran.code == 1
    assert "STARTED" not in ran.out
    assert "EAFNOSUPPORT" in ran.err
    assert "hint:" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("value", ["", "1"])
def test_isolated_is_tolerated_there_with_the_opt_in(gvisor: runsc.Gvisor, value: str) -> None:
    """With the variable set, whatever its value, the same start goes on, and the network reads `tolerated` with the errno.

    What does not fail there is not tolerated but enforced.
    """
    ran = gvisor.run(["sh", "-c", ASK], options=["--network-mode", "isolated"], env={VARIABLE: value}, policy=POLICY)
    assert ran.code == 0, ran.err
    assert answers(ran)["denied"] == "403"
    network = ran.layer("network")
    assert (network["state"], network["errno"]) == ("tolerated", "EAFNOSUPPORT")
    assert network["detail"]["subsystem"] == "network-namespace"
    assert states(ran)["syscalls"] == states(ran)["supervisor_syscalls"] == "enforced"
    assert states(ran)["filesystem"] == "degraded"


def test_no_opt_in_softens_a_hard_requirement(gvisor: runsc.Gvisor) -> None:
    """File rules that the policy makes a hard requirement end the start in gVisor, also with the variable set."""
    ran = gvisor.run(["echo", "STARTED"], policy=HARD, env={VARIABLE: "1"})
    assert ran.code == 1
    assert "STARTED" not in ran.out
    assert "hard_requirement" in ran.err


def test_what_gvisor_is_declared_to_own_reads_external(gvisor: runsc.Gvisor) -> None:
    """The operator gives four layers to gVisor: nothing is tried, nothing is called enforced or degraded, the proxy enforces for
    whoever uses it, and privileges are still the product's."""
    ran = gvisor.run(["sh", "-c", ASK], options=["--declare-external", ALL_LAYERS], policy=HARD)
    assert ran.code == 0, ran.err
    assert {layer: state for layer, state in states(ran).items() if state == "external"}.keys() == set(
        ALL_LAYERS.split(",")
    )
    assert states(ran)["privileges"] == "enforced"
    assert answers(ran)["allowed"] == f"{runsc.GREETING} 200"
    assert answers(ran)["denied"] == "403"
    assert ran.lines("HTTP:GET [MED] DENIED")
    assert not ran.lines("CONFIG:DEGRADED")
