"""Confinement on hosts that refuse, lie, kill or are small, and in images that bake variables: refused, or stated as it is."""

from __future__ import annotations

import pathlib
import sys
import tempfile
from collections.abc import Iterator

import product
import pytest
from cell import OWN, Wrap, field_of_battle, own, policy, refused_to_start

import hosts

SMALL_UID = 64008  # nobody else's, as arena.UID
KILL = (
    "import os, sys, pyseccomp as s\n"
    "f = s.SyscallFilter(s.ALLOW); f.set_attr(s.Attr.CTL_NNP, int(os.geteuid() != 0))\n"
    "f.add_rule(s.KILL_PROCESS, sys.argv[1]); f.load(); os.execvp(sys.argv[2], sys.argv[2:])"
)


@pytest.fixture
def field() -> Iterator[pathlib.Path]:
    """See `cell.field_of_battle`."""
    with field_of_battle() as path:
        yield path


@pytest.mark.parametrize("call", ["landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"])
@pytest.mark.parametrize("answer", [0, 1, 12, 22, 38])
def test_no_answer_about_landlock_is_believed(call: str, answer: int, field: pathlib.Path) -> None:
    """Refused by any errno, or only said to be done: then it is never called enforced while a hidden file can be read."""
    command = ["sh", "-c", f"cat {field}/hidden/f"]
    wrap: Wrap = lambda argv: hosts.outer_seccomp(own(argv), call, answer=answer)  # noqa: E731
    ran = product.run(command, policy=policy(), wrap=wrap)
    if ran.statement is not None:
        assert (ran.layer("filesystem")["state"] == "enforced") == (ran.out != "secret"), ran.err
    refused_to_start(product.run(["echo", "STARTED"], policy=policy(hard=True), wrap=wrap))


@pytest.mark.root
@pytest.mark.parametrize("where", ["a directory behind 0700", "every canary's place writable"])
def test_a_refusal_that_would_have_come_anyway_is_no_evidence(where: str, open_tmp: pathlib.Path) -> None:
    """Where owners and modes refuse what the self-probe can try, a Landlock that does nothing is not called enforced."""
    victim, options = open_tmp / "open", list[str]()
    victim.mkdir()
    victim.chmod(0o777)
    if where == "a directory behind 0700":
        closed = pathlib.Path(tempfile.mkdtemp(prefix="oss-closed-", dir="/root"))
        options = ["--run-dir", str(closed)]
        text = policy(["/"], ["/dev/shm"]).replace("/dev/shm", "/proc/self/task")
    else:
        closed = None
        text = policy(["/"], ["/tmp", "/run", "/var/tmp", "/dev/shm"])
    wrap: Wrap = lambda argv: hosts.outer_seccomp(argv, "landlock_restrict_self", answer=0)  # noqa: E731
    try:
        ran = product.run(["sh", "-c", f"echo x > {victim}/new"], policy=text, options=options, wrap=wrap)
    finally:
        if closed is not None:
            closed.rmdir()
    assert (victim / "new").exists()
    assert ran.layer("filesystem")["state"] == "degraded", ran.err


@pytest.mark.parametrize("options", [[], ["--no-self-probe"]], ids=["probed", "unprobed"])
@pytest.mark.parametrize("answer", [0, 1, 12, 22, 38])
def test_no_answer_about_filters_is_believed(options: list[str], answer: int) -> None:
    """A host that only says that it installed a filter is no better than one that refuses: nothing starts."""
    wrap: Wrap = lambda argv: hosts.outer_seccomp(own(argv), "prctl=22", answer=answer)  # noqa: E731
    refused_to_start(product.run(["echo", "STARTED"], policy=policy(), options=options, wrap=wrap))


@pytest.mark.parametrize("layers", [15, 16])
def test_nested_landlock_domains_run_out(layers: int) -> None:
    """The kernel nests 16: up to there it is enforced; beyond it is degraded, or fatal where the policy insists."""
    nest = (
        "import ctypes, os, sys\nc = ctypes.CDLL(None); c.prctl(38, 1, 0, 0, 0)\n"
        "for _ in range(int(sys.argv[1])):\n"
        "    fd = c.syscall(444, ctypes.byref(ctypes.c_uint64(1 << 11)), 8, 0); assert c.syscall(446, fd, 0) == 0; os.close(fd)\n"
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    wrap: Wrap = lambda argv: own([sys.executable, "-I", "-c", nest, str(layers), *argv])  # noqa: E731
    ran = product.run(["echo", "STARTED"], policy=policy(), wrap=wrap)
    assert ran.out == "STARTED\n", ran.err
    layer = ran.layer("filesystem")
    assert (layer["state"], layer["errno"]) == (("enforced", None) if layers < 16 else ("degraded", "E2BIG"))
    insisting = product.run(["echo", "STARTED"], policy=policy(hard=True), wrap=wrap)
    assert (insisting.code == 0) == (layers < 16), insisting.err


@pytest.mark.parametrize("call", ["seccomp", "landlock_restrict_self", "landlock_create_ruleset"])
def test_a_profile_that_kills_leaves_nothing_running(call: str) -> None:
    """A call of the start that ends its process ends the start: no workload, no process of it left."""
    wrap: Wrap = lambda argv: own([sys.executable, "-I", "-c", KILL, call, *argv])  # noqa: E731
    ran = product.run(["sh", "-c", "echo STARTED; sleep 4711"], policy=policy(), wrap=wrap)
    assert (ran.code != 0, ran.out, ran.statement) == (True, "", None), ran.err
    assert hosts.run(["pgrep", "-f", "sleep 4711"]).stdout == ""


@pytest.mark.parametrize("limit", ["nproc=0", "nproc=3", "nofile=8", "nofile=16", "data=20000000"])
def test_a_host_that_is_too_small_is_named(limit: str, open_tmp: pathlib.Path) -> None:
    """Too few processes, descriptors or memory for a start: refused in words, nothing started, nothing left to run."""
    open_tmp.chmod(0o777)
    line = product.argv(open_tmp, "version: 1\n", ["echo", "STARTED"], records=False)
    # A user of its own, because the kernel counts processes by user.
    done = hosts.run(hosts.unprivileged(["prlimit", f"--{limit}", *line], uid=SMALL_UID))
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert "Traceback" not in done.stderr
    assert "hint:" in done.stderr, done.stderr


def test_a_deleted_working_directory_grants_nothing(open_tmp: pathlib.Path) -> None:
    """Started where nothing is any more, the workload runs and no place is writable for it."""
    open_tmp.chmod(0o777)
    go = f'mkdir {open_tmp}/gone && cd {open_tmp}/gone && rmdir {open_tmp}/gone && exec "$@"'
    wrap: Wrap = lambda argv: own(["sh", "-c", go, "sh", *argv])  # noqa: E731
    text = policy(OWN).replace("include_workdir: false", "include_workdir: true")
    ran = product.run(["sh", "-c", "echo STARTED; echo x > here"], policy=text, wrap=wrap)
    assert ran.out == "STARTED\n", ran.err
    assert ran.code != 0


@pytest.mark.parametrize("answer", [0, 1, 38])
def test_nothing_is_inherited_where_close_range_fails(answer: int) -> None:
    """Refused or only pretended, close_range(2) leaves no descriptor but 0, 1 and 2 to the workload."""
    wrap: Wrap = lambda argv: hosts.outer_seccomp(own(argv), "close_range", answer=answer)  # noqa: E731
    leak: Wrap = lambda argv: ["sh", "-c", 'exec 7</etc/hostname; exec "$@"', "sh", *wrap(argv)]  # noqa: E731
    code = "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd')))"
    ran = product.run([sys.executable, "-I", "-c", code], policy=policy(), wrap=leak)
    assert ran.out == "[0, 1, 2, 3]\n", ran.err  # 3 is the listing's own


# --- variables that an image bakes ---------------------------------------------------------------------------


@pytest.mark.parametrize("demand", ["--egress enforce", "--require network"])
def test_best_effort_from_the_environment_takes_no_demand_back(demand: str) -> None:
    """Where no boundary can be had, a flag that demands one refuses, whatever variable is set; without the flag it starts.

    `--network-mode isolated` is no such demand: that the variable softens it is the interface (S2-03), said in the statement.
    """
    deny = ("setns", "unshare", "clone:NEWUSER|NEWNET")
    wrap: Wrap = lambda argv: hosts.outer_seccomp(own(argv), *deny)  # noqa: E731
    variable = {"OPENSHELL_BEST_EFFORT_FAILURES": ""}
    refused_to_start(product.run(["echo", "STARTED"], options=demand.split(), wrap=wrap, env=variable))
    assert product.run(["echo", "STARTED"], wrap=wrap, env=variable).out == "STARTED\n"


@pytest.mark.parametrize(
    ("layer", "options", "hard"),
    [
        ("network", ["--egress", "enforce"], False),
        ("network", ["--network-mode", "isolated"], False),
        ("network", ["--require", "network"], False),
        ("filesystem", ["--require", "filesystem"], False),
        ("syscalls", ["--require", "syscalls"], False),
        ("supervisor_syscalls", ["--require", "supervisor_syscalls"], False),
        ("filesystem", [], True),
    ],
)
def test_a_declaration_from_the_environment_takes_no_demand_back(layer: str, options: list[str], hard: bool) -> None:
    """A layer that a flag or the policy demands is not given away by a variable; without the demand it is."""
    variable = {"OPENSHELL_DECLARE_EXTERNAL": layer}
    refused_to_start(
        product.run(["echo", "STARTED"], policy=policy(hard=hard), options=options, env=variable, wrap=own)
    )
    ran = product.run(["echo", "STARTED"], policy=policy(), env=variable, wrap=own)
    assert (ran.out, ran.layer(layer)["state"]) == ("STARTED\n", "external"), ran.err


@pytest.mark.parametrize("layer", ["privileges", "binary_identity", "all", "Syscalls", "*"])
def test_what_cannot_be_declared_is_refused(layer: str) -> None:
    """Neither by flag nor by variable: nobody outside owns the privileges, and no word means everything."""
    refused_to_start(product.run(["echo", "STARTED"], options=["--declare-external", layer], wrap=own))
    refused_to_start(product.run(["echo", "STARTED"], env={"OPENSHELL_DECLARE_EXTERNAL": layer}, wrap=own))


def test_the_directory_of_the_trust_files_is_not_opened_with_them(field: pathlib.Path) -> None:
    """OPENSHELL_PROXY_TLS_DIR, which an image can bake, grants the two files in it and nothing else there."""
    where = {"OPENSHELL_PROXY_TLS_DIR": str(field / "hidden")}
    command = ["sh", "-c", f'head -1 "$SSL_CERT_FILE"; cat {field}/hidden/f; ls {field}/hidden']
    ran = product.run(command, policy=policy(), env=where, wrap=own)
    assert ran.out == "-----BEGIN CERTIFICATE-----\n", ran.err


# --- a workload that keeps uid 0 ------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_mounts_beneath_kernel_settings_are_read_only_too() -> None:
    """binfmt_misc and cgroup v1 are mounts of their own: uid 0 may write them by mode, and that is not called enforced."""
    name = "/proc/sys/fs/register"
    prepare = f'mount -t tmpfs none /proc/sys/fs && touch {name} && exec "$@"'
    caps = ("setuid", "setgid", "sys_admin")
    wrap: Wrap = lambda argv: ["unshare", "-m", "sh", "-c", prepare, "sh", *hosts.without_caps(argv, *caps)]  # noqa: E731
    code = (
        "import os\n"
        f"for name in '/proc/sys/kernel/core_pattern', {name!r}:\n"
        "    try: os.open(name, os.O_WRONLY); print('opened')\n"
        "    except OSError as error: print(error.errno)"
    )
    ran = product.run([sys.executable, "-I", "-c", code], wrap=wrap)
    pattern, beneath = ran.out.split()
    assert pattern != "opened", ran.err
    assert beneath != "opened" or ran.layer("network")["state"] != "enforced", ran.err
