"""The doctor's manners: options, exit codes, time, a terminal that stays as it was, nothing left behind, no secret told."""

from __future__ import annotations

import os
import pathlib
import pty
import signal
import subprocess
import termios
import time

import asking
import product
import pytest

import hosts

# The issue asks for 1.5 s; a loaded machine of CI gets twice that. Without load it takes 0.2 to 0.5.
SECONDS = 3.0


def test_it_is_quick() -> None:
    """The better of two runs, from the first line of the doctor to the last."""
    assert min(asking.ask().body["seconds"] for _ in range(2)) < SECONDS


def test_the_table_says_what_the_json_says() -> None:
    """Every check, rung and layer has its line; nothing is coloured where nobody looks at a terminal."""
    answer, table = asking.ask(), asking.say()
    assert table.returncode == 0
    for item in answer.body["checks"]:
        assert f"{item['state']:<7}  {item['id']} " in table.stdout, item
    for rung in answer.body["rungs"]:
        assert f"  {rung['rung']} " in table.stdout
    for layer in answer.body["layers"]:
        assert f"{layer['state']:<8}  {layer['layer']} " in table.stdout
    assert f"network mode auto would take the rung {answer.body['auto']['rung']}" in table.stdout
    assert "\x1b" not in table.stdout
    assert table.stderr == ""


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (("--require", "nonsense"), 2, "unknown layer"),
        (("--network-mode", "host", "--require", "network"), 2, "contradicts"),
        (("--policy", "/nowhere/policy.yaml"), 2, "cannot read"),
        (("--jsn",), 2, "unrecognized"),
    ],
)
def test_unusable_input_is_refused_as_run_refuses_it(options: tuple[str, ...], code: int, text: str) -> None:
    """Exit code 2 and one line on standard error; nothing is tried."""
    done = asking.say(*options)
    assert (done.returncode, done.stdout) == (code, "")
    assert text in done.stderr


def test_help_and_a_whole_command_line_of_run() -> None:
    """`--help` explains; a command after `--` is taken and not run, even when it looks like an option of ours."""
    assert "--require" in asking.say("--help").stdout
    done = asking.say("--timeout", "5", "--", "echo", "--json")
    assert done.returncode == 0
    assert done.stdout.startswith("STATE")


def test_demands_of_flag_and_environment_add_up() -> None:
    """OPENSHELL_REQUIRE counts as in a start. binary_identity is off without binaries: that demand is not met."""
    answer = asking.ask("--require", "privileges", env={"OPENSHELL_REQUIRE": "binary_identity"})
    assert answer.body["require"]["layers"] == ["privileges", "binary_identity"]
    assert "binary_identity" in [item["layer"] for item in answer.body["require"]["unmet"]]
    assert answer.code == 1
    assert asking.say("--require", "binary_identity").returncode == 1


def test_a_policy_says_which_layers_it_asks_for(open_tmp: pathlib.Path) -> None:
    """File rules and binaries are asked for by their sections, and only by them; the built-in default has file rules."""
    bare = open_tmp / "bare.yaml"
    bare.write_text(product.DENY_ALL)
    asks = asking.ask("--policy", str(bare)).check("policy.layers")["facts"]["asks"]
    assert asks == ["network", "syscalls", "privileges", "supervisor_syscalls"]
    full = open_tmp / "full.yaml"
    full.write_text(
        "version: 1\nfilesystem_policy: {read_only: [/usr]}\nlandlock: {compatibility: hard_requirement}\n"
        "network_policies:\n  a:\n    endpoints: [{host: a.test, port: 443}]\n    binaries: [{path: /usr/bin/curl}]\n"
    )
    check = asking.ask("--policy", str(full)).check("policy.layers")
    assert check["facts"] == {
        "asks": ["network", "filesystem", "syscalls", "privileges", "supervisor_syscalls", "binary_identity"],
        "hard_requirement": True,
    }


def test_a_policy_that_cannot_be_used_is_a_failed_check(open_tmp: pathlib.Path) -> None:
    """The doctor still looks at the host; no start is rehearsed, none would succeed, and no demand is met."""
    broken = open_tmp / "broken.yaml"
    broken.write_text("version: 1\nnetwork_policies: [1]\n")
    answer = asking.ask("--policy", str(broken))
    assert answer.state("policy.file") == answer.state("rehearsal") == "failed"
    assert "check" in answer.check("policy.file")["hint"]
    assert answer.body["rungs"] == []
    assert answer.check("kernel.release")["state"] == "info"
    assert answer.code == 1
    assert asking.ask("--policy", str(broken), "--require", "network").code == 1


def test_a_gateway_is_not_asked_and_no_reason_to_refuse() -> None:
    """Inside a driver's container OPENSHELL_ENDPOINT is set, and there is no policy file."""
    answer = asking.ask(env={"OPENSHELL_ENDPOINT": "https://gateway.test:8080"})
    assert answer.check("policy.gateway")["state"] == "info"
    assert "gateway.test" not in str(answer.body)


def test_no_pids_limit_where_one_is_demanded_is_a_failure() -> None:
    """Exactly where a start is refused; the rest of the host is tried all the same. Without the demand it is no failure."""
    demand = {"OPENSHELL_REQUIRE_RUNTIME_PID_LIMIT": "1"}
    refused = product.run(["true"], env=demand).code == 1
    answer = asking.ask(env=demand)
    assert (answer.state("cgroup.pids") == "failed") == refused
    assert ("--pids-limit" in answer.check("cgroup.pids")["hint"]) == refused
    assert answer.body["mode"]["starts"] != refused
    assert answer.check("kernel.release")["state"] == "info"
    assert asking.ask().state("cgroup.pids") != "failed"


def test_no_secret_is_told() -> None:
    """Values of variables and the kernel's command line are looked at and not repeated."""
    secrets = {
        "GITHUB_TOKEN": "ghp_SECRETSECRET",
        "KUBERNETES_SERVICE_HOST": "10.96.0.99",
        "OPENSHELL_SANDBOX_TOKEN": "token-SECRETSECRET",
    }
    done = asking.say("--json", env=secrets)
    assert "KUBERNETES_SERVICE_HOST is set" in done.stdout
    for value in secrets.values():
        assert value not in done.stdout + done.stderr
    for word in pathlib.Path("/proc/cmdline").read_text().split():
        assert len(word) < 20 or word not in done.stdout


def in_session(session: int) -> list[str]:
    """The command lines of the living processes of a session."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if entry.name.isdigit() and int(fields[3]) == session and fields[0] != "Z":
                found.append((entry / "cmdline").read_text())
        except (OSError, IndexError):
            continue
    return found


def test_nothing_is_left_behind(open_tmp: pathlib.Path) -> None:
    """No process, no link, no mount, no directory: not even the run directory's own, where there was none."""
    run_dir = open_tmp / "run"
    mounts, temporary = pathlib.Path("/proc/self/mountinfo").read_text(), set(os.listdir("/tmp"))
    process = subprocess.Popen(
        asking.command("--json", "--run-dir", str(run_dir)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    text, _ = process.communicate(timeout=asking.TIMEOUT)
    assert process.returncode == 0
    deadline = time.monotonic() + 2.0  # a killed launcher may still be ending
    while in_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert in_session(process.pid) == []
    assert not run_dir.exists()
    assert pathlib.Path("/proc/self/mountinfo").read_text() == mounts
    assert not {name for name in set(os.listdir("/tmp")) - temporary if "openshell" in name or "self-probe" in name}
    links = [word for word in text.replace('"', " ").split() if word.startswith("veth-h-")]
    assert links or not hosts.effective_caps() >> hosts.CAP_SYS_ADMIN & 1, "the veth rung names its link"
    assert not [link for link in links if pathlib.Path("/sys/class/net", link).exists()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_in_the_middle_leaves_nothing_behind(number: signal.Signals, open_tmp: pathlib.Path) -> None:
    """Ended once its run directory exists: directory and processes are gone, and with them every namespace."""
    for attempt in range(5):  # it may be over before the signal is sent
        run_dir = open_tmp / f"run{attempt}"
        # A shell's background job, as a test run may be, ignores SIGINT, and so does what it starts (signal(7)).
        line = ["env", "--default-signal=INT,TERM,HUP", *asking.command("--run-dir", str(run_dir))]
        process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while process.poll() is None and not run_dir.exists():
            time.sleep(0.001)
        process.send_signal(number)
        if process.wait(asking.TIMEOUT) != 0:
            break
    assert process.returncode == 128 + number
    deadline = time.monotonic() + 2.0
    while in_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert in_session(process.pid) == []
    assert not run_dir.exists()


def test_a_run_directory_that_was_there_stays(open_tmp: pathlib.Path) -> None:
    """Only what the rehearsal made is taken away."""
    run_dir = open_tmp / "run"
    run_dir.mkdir()
    (run_dir / "kept").touch()
    assert asking.ask("--run-dir", str(run_dir)).code == 0
    assert os.listdir(run_dir) == ["kept"]


def test_on_a_terminal_it_is_coloured_and_the_terminal_stays_as_it_was() -> None:
    """What somebody types meanwhile is left for the shell, and the terminal's settings are not touched."""
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    os.write(master, b"typed meanwhile\n")
    process = subprocess.Popen(asking.command(), stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    out = b""
    while b"checks:" not in out or not out.endswith(b" s\r\n"):  # its last line
        out += os.read(master, 65536)
    assert process.wait(asking.TIMEOUT) == 0
    assert b"\x1b[32mok" in out
    assert termios.tcgetattr(slave) == before
    assert os.read(slave, 100) == b"typed meanwhile\n"
    os.close(master)
    os.close(slave)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`doctor --json | head -c 1`: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        asking.command("--json"),
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=asking.TIMEOUT,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
