"""What the workload is, holds and can read, on the real product: order and outcome of P34-P39 (isolation 7.4).

`privileges_inside.py` is the workload of nearly all of them; the wrappers of hosts.py make the hosts. Beside each refusal
stands what the same program may do without the product.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

import hosts

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "e2e"))  # so that `import product` works

import product

INSIDE = pathlib.Path(__file__).with_name("privileges_inside.py")
UID = 64021  # nobody else's: processes of other tests are never in its reach
ROOTS_GROUPS = [4, 27, 64050, 64051]
POLICY = f"version: 1\nprocess: {{run_as_user: '{UID}', run_as_group: '{UID}'}}\nnetwork_policies: {{}}\n"
SANDBOXED = "version: 1\nprocess: {run_as_user: sandbox}\nnetwork_policies: {}\n"
NUMBERS = {"OPENSHELL_SANDBOX_UID": str(UID), "OPENSHELL_SANDBOX_GID": str(UID)}
PASSWD = "root:x:0:0::/root:/bin/sh\nsandbox:x:64022:64023::/home/box:/bin/sh\napp:x:64024:64025::/home/app:/bin/sh\n"
GROUP = "root:x:0:\nsandbox:x:64023:\nstaff:x:64060:app,sandbox\nvideo:x:64061:app\n"
Wrap = Callable[[list[str]], list[str]]


def plain(argv: Sequence[str]) -> list[str]:
    """The host as it is."""
    return list(argv)


def with_groups(argv: Sequence[str]) -> list[str]:
    """Root with supplementary groups, as Docker's `--group-add` and login shells leave it."""
    return ["setpriv", f"--groups={','.join(map(str, ROOTS_GROUPS))}", *argv]


def with_raised_capabilities(argv: Sequence[str]) -> list[str]:
    """Root whose capabilities survive a change of user: inheritable and ambient ones."""
    return ["setpriv", "--inh-caps=+net_raw,+sys_chroot", "--ambient-caps=+net_raw,+sys_chroot", *argv]


def user_with_capabilities(argv: Sequence[str]) -> list[str]:
    """A user that is not root and holds a capability, as a runtime's `--cap-add` with a USER makes it."""
    ids = [f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
    return ["setpriv", *ids, "--inh-caps=+net_raw", "--ambient-caps=+net_raw", *argv]


def userns(argv: Sequence[str]) -> list[str]:
    """Root without CAP_SYS_ADMIN: the launcher takes its identity before it makes namespaces."""
    return hosts.without_caps(argv, "sys_admin")


def same_user(argv: Sequence[str]) -> list[str]:
    """The supervisor itself is a plain user, and so is its workload."""
    return hosts.unprivileged(argv, uid=UID)


def same_user_without_namespaces(argv: Sequence[str]) -> list[str]:
    """The same where the kernel gives no namespace: nothing but dumpable keeps one process from the other."""
    return hosts.userns_off(argv, uid=UID)


def accounts(place: pathlib.Path) -> Wrap:
    """A host with the accounts above."""
    return lambda argv: hosts.with_accounts(argv, PASSWD, GROUP, place)


def inside(*canaries: str) -> list[str]:
    """The workload that tells."""
    return [sys.executable, "-I", "-S", str(INSIDE), *(one[::-1] for one in canaries)]


def told(ran: product.Ran) -> dict[str, Any]:
    """What the workload told."""
    assert ran.code == 0, ran.err
    answer: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    return answer


def bare(wrap: Wrap) -> dict[str, Any]:
    """What the same program tells without the product: the control."""
    done = hosts.run(wrap(inside()))
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def image(declaration: str) -> dict[str, str]:
    """The variable by which a driver passes on an image's USER."""
    return {"OPENSHELL_OCI_IMAGE_USER": declaration}


def fields(pid: int) -> dict[str, list[str]]:
    """/proc/PID/status, seen from here."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


@dataclass(frozen=True)
class Running:
    """Two pids of a run that is under way."""

    supervisor: int
    workload: int


@contextlib.contextmanager
def running(directory: pathlib.Path, wrap: Wrap, policy: str, environment: dict[str, str]) -> Iterator[Running]:
    """The product, its files in `directory`, with a workload that waits until the block ends."""
    directory.chmod(0o777)
    process = subprocess.Popen(
        wrap(product.argv(directory, policy, ["sh", "-c", "echo $$; exec cat"])),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    if not first:
        raise AssertionError(process.communicate(timeout=30)[1])
    try:
        yield Running(process.pid, int(first))
    finally:
        process.communicate(timeout=30)


# --- groups


@pytest.mark.root
@pytest.mark.parametrize("host", [plain, userns])
@pytest.mark.parametrize(
    ("policy", "variables", "uid", "gid", "groups"),
    [
        pytest.param(POLICY, {}, UID, UID, [], id="policy number"),
        pytest.param(product.DENY_ALL, NUMBERS, UID, UID, [], id="driver numbers"),
        pytest.param(SANDBOXED, {}, 64022, 64023, [64023, 64060], id="policy name"),
        pytest.param(product.DENY_ALL, {}, 64022, 64023, [64023, 64060], id="nobody said"),
        pytest.param(product.DENY_ALL, image("app"), 64024, 64025, [64025, 64060, 64061], id="USER name"),
        pytest.param(product.DENY_ALL, image("app:64070"), 64024, 64070, [64060, 64061, 64070], id="USER name:gid"),
        pytest.param(product.DENY_ALL, image("64024"), 64024, 64025, [], id="USER uid"),
        pytest.param(product.DENY_ALL, image(f"{UID}:{UID}"), UID, UID, [], id="USER uid:gid"),
    ],
)
def test_groups_are_exactly_the_promised_ones(
    open_tmp: pathlib.Path, host: Wrap, policy: str, variables: dict[str, str], uid: int, gid: int, groups: list[int]
) -> None:
    """Root's own supplementary groups never reach the workload: it has those of its name, and none with a number. Looked at
    from outside, because a user namespace shows unmapped groups as nobody's."""
    here = accounts(open_tmp)
    wrap: Wrap = lambda argv: here(with_groups(host(argv)))  # noqa: E731
    assert bare(wrap)["groups"] == ROOTS_GROUPS
    with running(open_tmp, wrap, policy, variables) as run:
        status = fields(run.workload)
        layers = json.loads((open_tmp / "status.json").read_text())["layers"]
    assert (status["Uid"], status["Gid"]) == ([str(uid)] * 4, [str(gid)] * 4)
    assert sorted(map(int, status["Groups"])) == groups
    (privileges,) = [layer for layer in layers if layer["layer"] == "privileges"]
    assert privileges["state"] == "enforced" and sorted(privileges["detail"]["groups"]) == groups


@pytest.mark.root
def test_a_file_of_roots_group_stays_closed(open_tmp: pathlib.Path) -> None:
    """What a group left behind would open: root's extra group may read a file, the workload may not, its own group's it may."""
    for name, group in (("theirs", ROOTS_GROUPS[-1]), ("ours", UID)):
        (open_tmp / name).write_text(name)
        (open_tmp / name).chmod(0o640)
        os.chown(open_tmp / name, 0, group)
    command = ["sh", "-c", f"cat {open_tmp}/ours; cat {open_tmp}/theirs"]
    ran = product.run(command, policy=POLICY, wrap=with_groups)
    assert ran.out == "ours" and "ermission denied" in ran.err
    left = ["setpriv", f"--reuid={UID}", f"--regid={UID}", f"--groups={ROOTS_GROUPS[-1]}", *command]
    assert hosts.run(left).stdout == "ourstheirs"


# --- capabilities, no_new_privs, limits


@pytest.mark.parametrize(
    "host",
    [
        pytest.param(plain, marks=pytest.mark.root),
        pytest.param(with_raised_capabilities, marks=pytest.mark.root),
        pytest.param(lambda argv: with_raised_capabilities(userns(argv)), marks=pytest.mark.root),
        pytest.param(user_with_capabilities, marks=pytest.mark.root),
        pytest.param(lambda argv: hosts.without_caps(argv, "setpcap"), marks=pytest.mark.root),
        same_user,
        same_user_without_namespaces,
    ],
    ids=[
        "root",
        "ambient",
        "ambient userns",
        "user with a capability",
        "no setpcap",
        "user",
        "user without namespaces",
    ],
)
def test_every_set_is_empty(host: Wrap) -> None:
    """Effective, permitted, inheritable and ambient are empty, no_new_privs is on and core files are off, on every host; the
    bounding set is empty, or the statement says that it is not."""
    before = bare(host)
    ran = product.run(inside(), policy=POLICY if before["uid"][0] == 0 else product.DENY_ALL, wrap=host)
    found = told(ran)
    assert before["no_new_privs"] is False or host is same_user_without_namespaces
    assert found["uid"][0] != 0 and found["uid"] == [found["uid"][0]] * 4
    assert {name: found["sets"][name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == dict.fromkeys(
        ("CapInh", "CapPrm", "CapEff", "CapAmb"), 0
    )
    assert found["no_new_privs"] is True and found["core"] == [0, 0]
    layer = ran.layer("privileges")
    assert layer["state"] == "enforced" and layer["detail"]["no_new_privs"] is True
    assert layer["detail"]["bounding_set_empty"] is (found["sets"]["CapBnd"] == 0)


@pytest.mark.root
def test_roots_bounding_set_is_empty() -> None:
    """From root with CAP_SETPCAP the bounding set is cleared too; before, it was full, and so were the raised sets."""
    before = bare(with_raised_capabilities)
    assert before["sets"]["CapBnd"] and before["sets"]["CapAmb"] and before["sets"]["CapInh"]
    found = told(product.run(inside(), policy=POLICY, wrap=with_raised_capabilities))
    assert found["sets"] == dict.fromkeys(before["sets"], 0)


@pytest.mark.root
def test_a_set_uid_program_gives_nothing(open_tmp: pathlib.Path) -> None:
    """A set-uid root program stays the workload's user; for the same user without the product it is root."""
    program = open_tmp / "id"
    program.write_bytes(pathlib.Path("/usr/bin/id").read_bytes())
    program.chmod(0o4755)
    left = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", str(program), "-u"]
    assert hosts.run(left).stdout.strip() == "0", "needs a directory for temporary files that is not mounted nosuid"
    assert product.run([str(program), "-u"], policy=POLICY).out.strip() == str(UID)


# --- the idempotent drop, and the drop that is refused

CALLS = ("setgroups", "setresuid", "setresgid", "setuid", "setgid", "setreuid", "setregid")


@pytest.mark.parametrize("answer", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
@pytest.mark.parametrize(
    "said", [{}, NUMBERS, {"OPENSHELL_OCI_IMAGE_USER": f"{UID}:{UID}"}], ids=["nobody", "numbers", "USER"]
)
def test_who_already_is_the_user_changes_nothing(said: dict[str, str], answer: int) -> None:
    """Where every identity call is refused, as gVisor does for a container that is its user already, the run starts, verified."""
    wrap: Wrap = lambda argv: same_user(hosts.outer_seccomp(argv, *CALLS, answer=answer))  # noqa: E731
    if os.geteuid() != 0 and said:
        said = {name: value.replace(str(UID), str(os.geteuid())) for name, value in said.items()}
    ran = product.run(inside(), wrap=wrap, env=said)
    uid = os.geteuid() or UID
    assert told(ran)["uid"] == [uid] * 4
    assert ran.layer("privileges")["state"] == "enforced"


@pytest.mark.root
@pytest.mark.parametrize(
    ("host", "refused"),
    [(plain, "setgroups"), (plain, "setresgid"), (plain, "setresuid"), (userns, "setgroups"), (userns, "setresuid")],
)
@pytest.mark.parametrize("best_effort", [False, True], ids=["strict", "best effort"])
def test_a_drop_that_is_refused_is_fatal(host: Wrap, refused: str, best_effort: bool, tmp_path: pathlib.Path) -> None:
    """Root that may not become the workload's user starts nothing, by the name of the step; best effort does not soften it.
    The same host with another call refused starts."""
    variables = {"OPENSHELL_BEST_EFFORT_FAILURES": "1"} if best_effort else {}
    command = ["sh", "-c", "echo STARTED; id -u"]

    def under(call: str) -> product.Ran:
        return product.run(
            command, policy=POLICY, wrap=lambda argv: with_groups(hosts.outer_seccomp(host(argv), call)), env=variables
        )

    ran = under(refused)
    assert ran.code == 1 and "STARTED" not in ran.out
    assert refused in ran.err and "Traceback" not in ran.err
    fine = under("swapon")
    assert (fine.code, fine.out.split()) == (0, ["STARTED", str(UID)]), fine.err


@pytest.mark.root
@pytest.mark.parametrize("call", ["setgroups", "setresgid", "setresuid"])
def test_a_drop_that_only_pretends_is_fatal(call: str) -> None:
    """A call that answers success and does nothing is found out by what /proc says, and nothing starts."""
    ran = product.run(
        ["echo", "STARTED"], policy=POLICY, wrap=lambda argv: with_groups(hosts.outer_seccomp(argv, call, answer=0))
    )
    assert ran.code == 1 and "STARTED" not in ran.out
    assert "verify" in ran.err


# --- secrets and what of the supervisor can be read

CANARY, HARMLESS = "canary-must-not-leak", "harmless-and-inherited"
WITHHELD = (
    "OPENSHELL_SANDBOX_TOKEN",
    "OPENSHELL_SANDBOX_TOKEN_FILE",
    "OPENSHELL_K8S_SA_TOKEN_FILE",
    "OPENSHELL_TLS_CA",
    "OPENSHELL_TLS_CERT",
    "OPENSHELL_TLS_KEY",
)
SECRETS = {
    **{name: f"{CANARY}-{name}" for name in WITHHELD},
    "OPENSHELL_NETWORK_RUNTIME_CAPABILITIES": CANARY,
    "OPENSHELL_USER_ENVIRONMENT": json.dumps({"GIVEN": f"{CANARY}-given"}),
    "HARMLESS": HARMLESS,
}


@pytest.mark.parametrize(
    "host",
    [
        pytest.param(plain, marks=pytest.mark.root),
        pytest.param(userns, marks=pytest.mark.root),
        same_user,
        same_user_without_namespaces,
    ],
)
def test_no_secret_in_anything_the_workload_can_read(host: Wrap) -> None:
    """No environment block and no command line that the workload can read holds a credential: not its own, not the
    supervisor's, its guard's or a launcher's. What is inherited on purpose is in its own."""
    root = bare(host)["uid"][0] == 0
    ran = product.run(inside(CANARY, HARMLESS), policy=POLICY if root else product.DENY_ALL, wrap=host, env=SECRETS)
    found = told(ran)
    assert found["found"][CANARY] == []
    assert found["own"] == {"HARMLESS": HARMLESS}


@pytest.mark.parametrize("host", [same_user, same_user_without_namespaces])
def test_the_supervisor_cannot_be_read_by_its_own_user(host: Wrap) -> None:
    """Environment, memory and descriptors of the supervisor are closed to a workload of the same user."""
    found = told(product.run(inside(), wrap=host))
    assert set(found["supervisor"].values()) <= {"EACCES", "EPERM"}, found["supervisor"]


def descendants(root: int) -> list[int]:
    """`root` and every process below it."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                stat = pathlib.Path(f"/proc/{name}/stat").read_text()
                parents[int(name)] = int(stat.rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


@pytest.mark.root
@pytest.mark.parametrize("host", [plain, userns, same_user, same_user_without_namespaces])
def test_no_block_of_ours_holds_a_secret(open_tmp: pathlib.Path, host: Wrap) -> None:
    """Seen by root of the host: the supervisor's own block has its credentials wiped, and no helper ever had them. What is
    no credential is still in the block, so it was the right one that was read."""
    root = bare(host)["uid"][0] == 0
    with running(open_tmp, host, POLICY if root else product.DENY_ALL, SECRETS) as run:
        blocks = {}
        for pid in descendants(run.supervisor):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # a helper that has ended since
                blocks[pid] = pathlib.Path(f"/proc/{pid}/environ").read_bytes()
    assert len(blocks) >= 3, "supervisor, guard and workload"
    harmless = f"HARMLESS={HARMLESS}".encode()
    assert harmless in blocks[run.supervisor].split(b"\0") and harmless in blocks[run.workload].split(b"\0")
    assert [pid for pid, block in blocks.items() if CANARY.encode() in block] == []


PEEKING = """
import errno, json, os, sys
def outcome(act):
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"
answers = []
for pid in sys.argv[1:]:
    base = f"/proc/{pid}"
    answers.append([
        outcome(lambda: open(f"{base}/environ", "rb").read()),
        outcome(lambda: os.close(os.open(f"{base}/mem", os.O_RDONLY))),
        outcome(lambda: os.readlink(f"{base}/fd/0")),
    ])
print(json.dumps(answers))
"""


@pytest.mark.root
@pytest.mark.parametrize(
    "host", [lambda argv: hosts.without_caps(argv), same_user], ids=["root without capabilities", "user"]
)
def test_dumpable_closes_the_supervisor_to_its_own_user(open_tmp: pathlib.Path, host: Wrap) -> None:
    """A process outside, of the very user of the supervisor, reads nothing of it; of its own other process it reads all."""
    decoy = subprocess.Popen(host(["sleep", "60"]))
    try:
        deadline = time.monotonic() + 10
        while pathlib.Path(f"/proc/{decoy.pid}/comm").read_text().strip() != "sleep" and time.monotonic() < deadline:
            time.sleep(0.01)
        with running(open_tmp, host, product.DENY_ALL, {}) as run:
            done = hosts.run(host([sys.executable, "-c", PEEKING, str(run.supervisor), str(decoy.pid)]))
            of_supervisor, of_decoy = json.loads(done.stdout)
            core = pathlib.Path(f"/proc/{run.supervisor}/limits").read_text().split("Max core file size")[1].split()[:2]
    finally:
        decoy.kill()
        decoy.wait()
    assert set(of_supervisor) <= {"EACCES", "EPERM"}, of_supervisor
    assert of_decoy == ["ok", "ok", "ok"]
    assert core == ["0", "0"]
