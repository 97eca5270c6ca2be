"""The terminals of the workload's own user: what is typed elsewhere must not be read, nor escape sequences written there.

A world is a host with another terminal on it, a victim's, that belongs to the user whom the product runs as. The thief is the
workload; the same thief is let loose outside first, where it succeeds.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pathlib
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

import arena
import product
import pytest

import hosts
from openshell_supervisor.confine import launcher
from openshell_supervisor.confine.baseline import FileRules, file_rules
from openshell_supervisor.policy.model import FilesystemPolicy, SandboxPolicy
from openshell_supervisor.workload.child import Child
from openshell_supervisor.workload.reaper import Reaper

USER = arena.UID if os.geteuid() == 0 else os.geteuid()
TYPED, WRITTEN = "sudo-password", "escape-sequence"
FILES = (
    "version: 1\nfilesystem_policy:\n  include_workdir: false\n"
    f"  read_only: [{sys.prefix}, {sys.base_prefix}, {sys.exec_prefix}]\n  read_write: [/tmp]\n"
)
# Stays outside: opens a terminal for user argv[1], where an operator has typed something that nobody has read yet; writes its
# name and identity to argv[2]; runs the rest; answers what was stolen from it and written to it.
VICTIM = f"""
import fcntl, json, os, subprocess, sys, termios
user, notes, *command = sys.argv[1:]
master, slave = os.openpty()
name, status = os.ttyname(slave), os.fstat(slave)
if os.geteuid() == 0: os.chown(name, int(user), int(user))
os.write(master, b"{TYPED}\\n")
for extra in os.environ.get("ALSO", "").split():
    subprocess.run(["mount", "--bind", name, extra], check=True)
with open(notes, "w") as file: json.dump([name, status.st_dev, status.st_ino], file)
code = subprocess.run(command).returncode
left = int.from_bytes(fcntl.ioctl(slave, termios.FIONREAD, bytes(4)), sys.byteorder)
os.set_blocking(master, False)
shown = os.read(master, 4096).decode()
print(json.dumps({{"stolen": not left, "written": "{WRITTEN}" in shown}}))
sys.exit(code)
"""
# Tries every name that it can think of; standard library alone, in the sandbox.
THIEF = f"""
import json, os, sys
notes, *places = sys.argv[1:]
name, device, inode = json.load(open(notes))
found = {{}}
def listed(directory):
    try: return [directory + "/" + one for one in os.listdir(directory) if one != "ptmx"]
    except OSError: return []
for path in dict.fromkeys([name, *places, *listed("/dev/pts"), *listed("/tmp/devpts"), *listed(".")]):
    try: handle = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        found[path] = error.strerror
        continue
    status = os.fstat(handle)
    if (status.st_dev, status.st_ino) == (device, inode):
        found[path] = "STOLEN " + os.read(handle, 99).decode().strip()
        os.write(handle, b"{WRITTEN}")
        break
own = os.ttyname(os.openpty()[1]) if os.path.exists("/dev/ptmx") and os.path.isdir("/dev/pts") else ""
print(json.dumps({{"found": found, "own": own}}))
"""
IN_WORLD = ["unshare", "--mount", "--propagation", "private", "sh", "-ec"]
# What a container's runtime makes of /dev: a tmpfs, a devpts of the container's, links for the rest.
CONTAINER = """
mkdir -p /tmp/devpts; mount -t tmpfs none /tmp/devpts; cd /tmp/devpts; mkdir pts shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts pts; ln -s pts/ptmx ptmx; ln -s /proc/self/fd fd
for one in null zero full random urandom tty console; do touch $one; done
for one in null zero full random urandom tty; do mount --bind /dev/$one $one; done
cd /; mount --rbind /tmp/devpts /dev; umount -l /tmp/devpts; exec "$@"
"""
WORLDS = {
    "host": "",
    "container": CONTAINER,
    "container with the terminal as its console": CONTAINER.replace("exec", "export ALSO=/dev/console; exec"),
    "read-only /dev": 'mount --rbind /dev /dev; mount -o remount,bind,ro /dev; exec "$@"',
    "the same devpts elsewhere": 'mkdir -p /tmp/devpts; mount --bind /dev/pts /tmp/devpts; exec "$@"',
    # With -P: `python -m` counts the directory that it stands in as its code, which is made read-only and so entered anew.
    "standing in it": 'cd /dev/pts; export PYTHONSAFEPATH=1; exec "$@"',
}
needs_root = pytest.mark.root


def world(setup: str, argv: list[str]) -> list[str]:
    """`argv` on a host made by the shell's `setup`; "" is this one."""
    return [*IN_WORLD, setup, "sh", *argv] if setup else argv


def beside_a_victim(place: pathlib.Path, argv: list[str], user: int = USER) -> list[str]:
    """`argv` while a terminal of `user` is open outside; its last line of output is the victim's report."""
    return [sys.executable, "-I", "-c", VICTIM, str(user), str(place / "notes"), *argv]


def thief(place: pathlib.Path) -> list[str]:
    """The command that steals."""
    return [sys.executable, "-I", "-c", THIEF, str(place / "notes"), "/dev/console", "/dev/stderr"]


def loot(out: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the thief and the victim say."""
    first, second = out.splitlines()[-2:]
    return json.loads(first), json.loads(second)


def as_user(argv: list[str]) -> list[str]:
    """`argv` as the user whose terminal it is."""
    return hosts.unprivileged(argv, uid=USER)


@pytest.mark.parametrize(
    "setup", [pytest.param(text, id=name, marks=needs_root if text else ()) for name, text in WORLDS.items()]
)
def test_outside_the_thief_succeeds(open_tmp: pathlib.Path, setup: str) -> None:
    """The control: on each of these hosts a process of the terminal's user reads what was typed, and writes to it."""
    done = hosts.run(world(setup, beside_a_victim(open_tmp, as_user(thief(open_tmp)))))
    taken, victim = loot(done.stdout)
    assert f"STOLEN {TYPED}" in taken["found"].values(), done.stderr
    assert victim == {"stolen": True, "written": True}


@pytest.mark.parametrize(
    "policy", [pytest.param(product.DENY_ALL, id="no file rules"), pytest.param(FILES, id="file rules")]
)
@pytest.mark.parametrize(
    "setup", [pytest.param(text, id=name, marks=needs_root if text else ()) for name, text in WORLDS.items()]
)
def test_a_plain_users_terminals_are_out_of_reach(open_tmp: pathlib.Path, setup: str, policy: str) -> None:
    """Under whatever name, with and without file rules; and terminals of its own work all the same."""
    ran = run_thief(open_tmp, policy, lambda argv: world(setup, beside_a_victim(open_tmp, as_user(argv))))
    taken, victim = loot(ran.out)
    assert "STOLEN" not in json.dumps(taken), taken
    assert victim == {"stolen": False, "written": False}
    assert taken["own"] == "/dev/pts/0"
    assert ran.layer("filesystem")["detail"]["terminals"] == "private"
    assert ran.layer("filesystem")["state"] == ("enforced" if policy is FILES else "off")
    assert "terminals of its user" not in ran.err


@needs_root
@pytest.mark.parametrize("lacking", [("setuid", "setgid"), ("setuid", "setgid", "net_admin"), ("all",)], ids=", ".join)
def test_root_that_stays_root(open_tmp: pathlib.Path, lacking: tuple[str, ...]) -> None:
    """A root that can become nobody else, as in a rootless container: its terminals are as close, and are covered up as well."""

    def wrap(argv: list[str]) -> list[str]:
        return beside_a_victim(open_tmp, hosts.without_caps(argv, *lacking), 0)

    ran = run_thief(open_tmp, product.DENY_ALL, wrap)
    taken, victim = loot(ran.out)
    assert "uid 0" in ran.layer("privileges")["reason"]
    assert "STOLEN" not in json.dumps(taken), taken
    assert victim == {"stolen": False, "written": False}
    assert ran.layer("filesystem")["detail"]["terminals"] == "private"


@needs_root
def test_another_users_terminal_is_kept_by_its_mode(open_tmp: pathlib.Path) -> None:
    """Where root's supervisor changes the user, nothing is mounted and nothing said; the owner and mode of the terminal hold."""
    ran = run_thief(open_tmp, arena.POLICY.format(uid=arena.UID), lambda argv: beside_a_victim(open_tmp, argv, 0))
    taken, victim = loot(ran.out)
    assert "Permission denied" in taken["found"].values()
    assert victim == {"stolen": False, "written": False}
    assert "terminals" not in ran.layer("filesystem")["detail"]


@pytest.mark.parametrize(
    "policy", [pytest.param(product.DENY_ALL, id="no file rules"), pytest.param(FILES, id="file rules")]
)
@pytest.mark.parametrize("why", ["nothing to mount with", "mount refused"])
def test_where_none_can_be_had_it_is_said(open_tmp: pathlib.Path, policy: str, why: str) -> None:
    """Without a user namespace, or where an outer filter refuses mount(2): they are in reach, and it is said twice."""
    options = ["--network-mode", "host"] if why == "nothing to mount with" else []

    def wrap(argv: list[str]) -> list[str]:
        return beside_a_victim(open_tmp, as_user(argv if options else hosts.outer_seccomp(argv, "mount")))

    ran = run_thief(open_tmp, policy, wrap, options)
    taken, victim = loot(ran.out)
    assert f"STOLEN {TYPED}" in taken["found"].values(), taken
    assert victim == {"stolen": True, "written": True}
    assert taken["own"].startswith("/dev/pts/")
    assert ran.layer("filesystem")["detail"]["terminals"] == "shared"
    assert [line for line in ran.lines("CONFIG:VALIDATED [MED]") if "terminals of its user" in line], ran.err


@needs_root
def test_a_host_without_a_devpts(open_tmp: pathlib.Path) -> None:
    """Where there is no /dev/pts at all there is nobody's terminal to steal: it starts, and says so."""
    setup = (
        "mount -t tmpfs none /dev/shm; mkdir /dev/shm/d; cd /dev/shm/d; for one in null zero full random urandom tty; do "
        'touch $one; mount --bind /dev/$one $one; done; cd /; mount --rbind /dev/shm/d /dev; exec "$@"'
    )
    ran = product.run(
        ["sh", "-c", "test -e /dev/null && ls -d /dev/*"],
        policy=product.DENY_ALL,
        wrap=lambda argv: world(setup, as_user(argv)),
    )
    assert ran.code == 0, ran.err
    assert "pts" not in ran.out
    assert ran.layer("filesystem")["detail"]["terminals"] == "private"


def run_thief(
    place: pathlib.Path,
    policy: str,
    wrap: Callable[[list[str]], list[str]],
    options: list[str] | None = None,
) -> product.Ran:
    """The product with the thief in it, inside of what `wrap` makes of the host."""
    ran = product.run(thief(place), policy=policy, wrap=wrap, options=options or [])
    assert ran.code == 0, ran.err
    return ran


class Operator:
    """The product on a terminal, with an operator who reads and types."""

    def __init__(self, place: pathlib.Path, script: str, policy: str) -> None:
        self.seen = b""
        place.chmod(0o777)
        line = as_user(product.argv(place, policy, ["sh", "-c", script]))
        pid, self.master = pty.fork()
        if pid == 0:
            os.chdir("/")
            os.execvp(line[0], line)
        self.pid = pid

    def expect(self, text: str, seconds: float = 30.0) -> None:
        """Read until `text` was shown."""
        deadline = time.monotonic() + seconds
        while text.encode() not in self.seen and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 4096)
                except OSError:
                    break
        assert text.encode() in self.seen, self.seen.decode(errors="replace")
        self.seen = self.seen.partition(text.encode())[2]

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self.master, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        """Drag the window's corner."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def end(self) -> int:
        """Wait for the product's end; its exit code."""
        while True:
            try:
                self.seen += os.read(self.master, 4096)
            except OSError:
                break
        os.close(self.master)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


POLICIES = [pytest.param(product.DENY_ALL, id="no file rules"), pytest.param(FILES, id="file rules")]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_workloads_own_terminal_has_a_name(open_tmp: pathlib.Path, policy: str) -> None:
    """It runs on a terminal of its own devpts: ttyname(3), /dev/tty, /dev/stderr and the name all lead there; codes come back."""
    script = "tty; echo one >/dev/tty; echo two >/dev/stderr; echo three >$(tty); test -t 0 && test -t 2 && exit 6"
    operator = Operator(open_tmp, script, policy)
    for text in ("/dev/pts/0", "one", "two", "three"):
        operator.expect(text)
    assert operator.end() == 6


@pytest.mark.parametrize("policy", POLICIES)
def test_size_and_job_control(open_tmp: pathlib.Path, policy: str) -> None:
    """An interactive shell stops and continues its jobs, ends them with ^C, and learns of each change of size."""
    operator = Operator(open_tmp, "PS1='ready> ' exec bash --norc --noediting -i", policy)
    operator.expect("ready> ")
    operator.resize(33, 101)
    time.sleep(0.2)
    operator.type("stty size\n")
    operator.expect("33 101")
    operator.type("sleep 60\n")
    time.sleep(0.5)
    operator.type("\x1a")
    operator.expect("Stopped")
    operator.type("fg\n")
    time.sleep(0.3)
    operator.type("\x03")
    operator.type("echo code=$?\n")
    operator.expect("code=130")
    operator.type("exit 4\n")
    assert operator.end() == 4


def test_what_is_typed_early_is_not_lost(open_tmp: pathlib.Path) -> None:
    """Keys that were pressed before the workload ran, and its terminal was there, are its first input."""
    operator = Operator(open_tmp, "read line; echo got:$line", product.DENY_ALL)
    operator.expect("NET:LISTEN")
    operator.type("early\n")
    operator.expect("got:early")
    assert operator.end() == 0


def test_an_outer_terminal_can_be_reopened_where_one_was_given(open_tmp: pathlib.Path) -> None:
    """With standard error alone on the operator's terminal, file rules let a script write to /dev/stderr, and to no other."""
    master, slave = os.openpty()
    if os.geteuid() == 0:
        os.chown(os.ttyname(slave), USER, USER)
    open_tmp.chmod(0o777)
    line = as_user(product.argv(open_tmp, FILES, ["sh", "-c", "echo warned >/dev/stderr"]))
    done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=slave, cwd="/", timeout=60)
    os.close(slave)
    shown = b""
    while select.select([master], [], [], 0)[0]:
        try:
            shown += os.read(master, 65536)
        except OSError:
            break
    os.close(master)
    assert done.returncode == 0, shown
    assert b"\nwarned" in shown


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        (FilesystemPolicy(), "read_write"),
        (FilesystemPolicy(read_write=("/dev/pts/",)), "read_write"),
        (FilesystemPolicy(read_only=("/dev/pts",)), "read_only"),
        (FilesystemPolicy(read_only=("/dev/pts/7",)), ""),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_the_rule_is_left_to_the_launcher(section: FilesystemPolicy, wanted: str, there: bool) -> None:
    """However /dev/pts is listed, it leaves the lists and only they; where it does not exist, they are as ever."""

    def made(own: bool) -> FileRules:
        return file_rules(
            SandboxPolicy(filesystem=section),
            workdir=None,
            standing_in="/",
            own_terminals=own,
            exists=lambda path: there or not path.startswith("/dev/pts"),
            real=str,
        )

    plain, left = made(False), made(True)
    assert plain.terminals == ""
    assert left.terminals == (wanted if there else "")
    moved = ("/dev/pts",) if there and wanted else ()
    for name in ("read_only", "read_write", "added"):
        assert getattr(left, name) == tuple(path for path in getattr(plain, name) if path not in moved)
    assert left.notes == plain.notes


@needs_root
def test_mounts_stay_inside(open_tmp: pathlib.Path) -> None:
    """A launcher in the machine's own user namespace, with shared mounts as systemd makes them: none of its mounts gets out."""
    place = open_tmp / "code"
    place.mkdir()
    driver = [sys.executable, str(pathlib.Path(__file__)), "launcher", str(place)]
    done = hosts.run(["unshare", "--mount", "--propagation", "shared", *driver])
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["answer"] == {"protected": True, "terminals": True}
    assert seen["inside"] != seen["before"]
    assert seen["after"] == seen["before"]


def _drive_a_launcher(place: str) -> None:
    """In a world of its own: mountinfo before and after a launcher confined itself, and the launcher's."""

    async def drive() -> None:
        reaper = Reaper()
        reaper.install()
        child = Child.start(reaper, pathlib.Path(launcher.ENTRY))
        before = _mounts("self")
        answer, _ = await child.ask(
            {
                "op": "confine",
                "identity": {"uid": 0, "gid": 0, "groups": None},
                "cwd": None,
                "read_only": [place],
                "anchors": [],
                "terminals": {"directory_rights": 0, "file_rights": 0, "own": False},
                "filters": {},
                "open_files": None,
            }
        )
        seen = {name: answer[name] for name in ("protected", "terminals")}
        print(
            json.dumps({"answer": seen, "before": before, "inside": _mounts(str(child.pid)), "after": _mounts("self")})
        )
        child.discard()

    asyncio.run(drive())


def _mounts(pid: str) -> list[str]:
    lines = pathlib.Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [" ".join(line.split()[4:6]) for line in lines]


if __name__ == "__main__":
    _drive_a_launcher(sys.argv[2])
