"""Mutated policies and settings through the real command line: nothing crashes, and nothing starts on what was not understood."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest

from openshell_supervisor import cli, settings
from openshell_supervisor.errors import SupervisorError
from openshell_supervisor.policy import yaml_file

pytestmark = pytest.mark.root
BASE = """version: 1
process:
  run_as_user: "64007"
  run_as_group: "64007"
landlock:
  compatibility: best_effort
network_policies:
  one:
    name: one
    endpoints:
    - host: api.example.com
      port: 443
      protocol: rest
      tls: terminate
      enforcement: enforce
      rules:
      - allow:
          method: GET
          path: "/v1/**"
    - host: "*.example.org"
      ports: [80, 443]
      access: read-only
    binaries:
    - path: /usr/bin/curl
"""
HOSTILE = [
    *("", "~", "null", "true", "-1", "0", "65536", "99999999999999999999", "1e400", ".nan", "[]", "{}", "[[[]]]", "''"),
    *(
        '"\\0"',
        "*",
        "**",
        "host",
        "0x1F",
        "0o17",
        "2026-01-01",
        "!!python/object/apply:os.system [id]",
        "!!binary AA==",
        "&a [*a]",
    ),
    *(
        "{a: 1, a: 2}",
        "<<: {x: 1}",
        "|",
        ">",
        "%",
        "@",
        "`",
        "\t",
        "\u202e",
        "\ud800",
        "\x07",
        "é" * 50,
        "a" * 5000,
        "? x",
        "- x",
    ),
]


def mutated(chance: random.Random) -> str:
    """The base policy with one to four faults of a machine's or a person's making."""
    lines = BASE.splitlines()
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(lines))
        what = chance.randrange(8)
        if what == 0:
            del lines[at]
        elif what == 1:
            lines.insert(at, lines[chance.randrange(len(lines))])
        elif what == 2:
            lines[at] = lines[at][:: chance.choice((1, -1))][chance.randrange(3) :]
        elif what == 3:
            lines[at] = "  " * chance.randrange(4) + lines[at]
        elif what == 4 and ":" in lines[at]:
            lines[at] = lines[at].partition(":")[0] + ": " + chance.choice(HOSTILE)
        elif what == 5:
            place = chance.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + chance.choice(HOSTILE) + lines[at][place:]
        elif what == 6:
            lines[at] = lines[at].replace(":", chance.choice((" :", ":", "=", "::", ": :")), 1)
        else:
            lines = lines[: at + 1]
        if not lines:
            lines = ["x"]
    return "\n".join(lines) + chance.choice(("\n", "", "\r\n", "\0", "\n---\nversion: 1\n"))


@pytest.fixture
def place(open_tmp: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory every user can use."""
    open_tmp.chmod(0o777)
    yield open_tmp


def usable(path: pathlib.Path) -> bool:
    """Does the loader itself take this file? Any other error than a refusal comes through."""
    try:
        yaml_file.load(path)
    except SupervisorError:
        return False
    return True


def test_five_hundred_mutations_are_refused_or_understood(place: pathlib.Path) -> None:
    """In this process, by way of settings and loader: a clear refusal with a place in the file, or a policy; never a crash."""
    chance, refused = random.Random(20261122), 0
    path = place / "policy.yaml"
    for _ in range(500):
        path.write_bytes(mutated(chance).encode("utf-8", "surrogatepass"))
        read = settings.read(["--policy", str(path), "--", "true"], {})
        try:
            yaml_file.load(read.policy or path)
        except SupervisorError as error:
            refused += 1
            assert error.exit_code == 2
            assert error.screen()
    assert 250 < refused < 500, "mutations that are all refused, or all understood, show nothing"


def test_forty_mutations_start_nothing(place: pathlib.Path) -> None:
    """As real processes: exit 2 without a traceback and without the workload, exactly where the loader refuses."""
    chance, path, started = random.Random(4711), place / "policy.yaml", 0
    for number in range(40):
        path.write_bytes(mutated(chance).encode("utf-8", "surrogatepass"))
        mark = place / f"started-{number}"
        argv = [sys.executable, "-m", "openshell_supervisor", "run", "--policy", str(path), "--", "touch", str(mark)]
        done = subprocess.run(argv, cwd="/", capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        assert "Traceback" not in done.stderr, done.stderr
        if usable(path) and done.returncode == 0:
            started += 1
            assert mark.exists()
        else:
            assert not mark.exists()
            assert done.returncode in (1, 2), done.stderr
            assert "openshell-supervisor:" in done.stderr
    assert 0 < started < 40


FLAGS = [
    "--network-mode",
    "--egress",
    "--require",
    "--resolve",
    "--timeout",
    "--grace",
    "--log-level",
    "--status-file",
    "--workdir",
]
FLAGS += [
    "--ocsf-file",
    "--upstream-ca",
    "--run-dir",
    "--sandbox-id",
    "--sandbox",
    "--host-network",
    "--interactive",
    "--mode",
]
FLAGS += ["--policy", "--policy-rules", "--health-check", "-t", "-w", "-i", "--nonsense", "--netw", "--", "-", ""]
WORDS = [
    "auto",
    "host",
    "isolated",
    "AUTO",
    "observe",
    "enforce",
    "network",
    "network,",
    ",",
    "syscalls",
    "-1",
    "nan",
    "inf",
    "1e9",
]
WORDS += [
    "/dev/null",
    "/",
    ".",
    "a=1.2.3.4",
    "a=b",
    "=1.2.3.4",
    "\udc80",
    "--",
    "",
]


def test_five_hundred_odd_command_lines() -> None:
    """Flags, values and variables in random order: a `SettingsError`, help, or settings; no other exception, nothing started."""
    chance, errors = random.Random(99), 0
    variables = [
        f"OPENSHELL_{name}"
        for name in ("NETWORK_MODE", "EGRESS", "REQUIRE", "GRACE", "MAIN_PROCESS_SPEC", "POLICY", "RUN_DIR")
    ]
    for _ in range(500):
        line = [chance.choice(FLAGS if chance.random() < 0.6 else WORDS) for _ in range(chance.randint(0, 6))]
        environment = {
            chance.choice(variables): chance.choice(WORDS).replace("\0", "") for _ in range(chance.randint(0, 2))
        }
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                read = settings.read(line, environment)
        except SupervisorError:
            errors += 1
        except SystemExit as end:
            assert end.code == 0, "only --help and --version may end it"
        else:
            assert read.network_mode in settings.NETWORK_MODES
            assert not (read.egress == "enforce" and read.network_mode == "host")
    assert 100 < errors < 500


@pytest.mark.parametrize(
    "kind",
    ["directory", "fifo", "device", "unreadable", "empty", "huge", "binary", "loop", "bomb"],
)
def test_policies_that_are_no_policies(place: pathlib.Path, kind: str) -> None:
    """Strange files end at once, with exit 2 and a word; an empty one or an alias bomb starts nothing that was not meant."""
    path = place / "policy.yaml"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/full")
    elif kind == "unreadable":
        path.symlink_to("/proc/self/mem")
    elif kind == "empty":
        path.write_text("")
    elif kind == "huge":
        path.write_text("version: 1\nnetwork_policies: {}\n#" + "x" * (64 * 1024 * 1024))
    elif kind == "binary":
        path.write_bytes(os.urandom(4096))
    elif kind == "loop":
        path.symlink_to(path)
    else:
        rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
        path.write_text("version: 1\n" + "\n".join(rows) + "\n")
    mark = place / "started"
    argv = [sys.executable, "-m", "openshell_supervisor", "run", "--policy", str(path), "--", "touch", str(mark)]
    limited = ["prlimit", "--as=2000000000", *argv]
    done = subprocess.run(limited, cwd="/", capture_output=True, text=True, timeout=8, stdin=subprocess.DEVNULL)
    assert done.returncode == 2, done.stderr[-500:]
    assert "Traceback" not in done.stderr
    assert not mark.exists()


def test_the_check_command_agrees_with_the_start(place: pathlib.Path) -> None:
    """`check` calls unusable what a start refuses, for 100 mutations."""
    chance, path = random.Random(5), place / "policy.yaml"
    for _ in range(100):
        path.write_bytes(mutated(chance).encode("utf-8", "surrogatepass"))
        with contextlib.redirect_stdout(io.StringIO()):
            assert (cli.main(["check", str(path)]) == 0) == usable(path)


@pytest.mark.parametrize("flag", ["--status-file", "--ocsf-file", "--workdir"])
def test_a_name_that_no_file_can_have(flag: str) -> None:
    """300 characters: refused by name like any file that cannot be written."""
    with pytest.raises(SupervisorError):
        settings.read([flag, "x" * 300, "--", "true"], {})
