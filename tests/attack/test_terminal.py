"""An outer terminal in the workload's hands: characters pushed into it would be typed by the operator's shell."""

from __future__ import annotations

import fcntl
import os
import pathlib
import pty
import subprocess
import sys
import termios
import threading

import arena
import product
import pytest

pytestmark = pytest.mark.root
# Writes to the file what each attempt came to. TIOCSTI needs the terminal as one's controlling one (ioctl_tty(2)).
ATTACKER = """
import fcntl, os, sys, termios
out = open(sys.argv[1], "w")
def tries(name, work):
    try: work(); print(name, "opened", file=out)
    except OSError as error: print(name, error.errno, file=out)
def outer(number):
    # By inode: among terminals of its own the workload finds no name for this one.
    status = os.fstat(number)
    return os.isatty(number) and f"{status.st_dev}:{status.st_ino}" == sys.argv[3]
print("which", [outer(n) for n in range(3)], file=out)
for number in range(3):
    if outer(number):
        tries("steal", lambda: fcntl.ioctl(number, termios.TIOCSCTTY, 1))
        tries("take", lambda: fcntl.ioctl(number, termios.TIOCSCTTY, 0))
        tries("push", lambda: fcntl.ioctl(number, termios.TIOCSTI, b"X"))
def by_name():
    handle = os.open(sys.argv[2], os.O_RDWR)
    try: fcntl.ioctl(handle, termios.TIOCSTI, b"X")
    finally: os.close(handle)
tries("by name", by_name)
def ctty():
    handle = os.open("/dev/tty", os.O_RDWR)
    if outer(0): fcntl.ioctl(handle, termios.TIOCSTI, b"X")
    os.close(handle)
tries("tty", ctty) if not os.isatty(0) or outer(0) else None
"""


def test_the_trick_works_where_nothing_holds_it() -> None:
    """The control: on this kernel a process can push a character into its own controlling terminal."""
    master, slave = pty.openpty()
    code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); fcntl.ioctl(0, termios.TIOCSTI, b'X')"
    done = subprocess.run([sys.executable, "-c", code], stdin=slave, start_new_session=True, capture_output=True)
    os.close(master)
    os.close(slave)
    if b"Input/output error" in done.stderr:
        pytest.skip("this kernel has dev.tty.legacy_tiocsti=0: the trick does not exist here")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "piped", [(), (1,), (0,), (1, 2)], ids=["all", "stdout piped", "stdin piped", "stdout, stderr piped"]
)
@pytest.mark.parametrize("rung", ["veth", "userns, own user"])
def test_nothing_is_pushed_into_the_outer_terminal(open_tmp: pathlib.Path, rung: str, piped: tuple[int, ...]) -> None:
    """Whichever of the three descriptors are the terminal: the workload cannot make it its own, and nothing is typed in it."""
    open_tmp.chmod(0o777)
    (open_tmp / "attacker.py").write_text(ATTACKER)
    master, slave = pty.openpty()
    name = os.ttyname(slave)
    os.chmod(name, 0o666)
    command = [sys.executable, "-I", str(open_tmp / "attacker.py"), str(open_tmp / "said"), name]
    status = os.fstat(slave)
    command.append(f"{status.st_dev}:{status.st_ino}")
    line = product.argv(open_tmp, arena.POLICY.format(uid=arena.UID) if rung == "veth" else product.DENY_ALL, command)
    streams = {number: subprocess.PIPE if number in piped else slave for number in range(3)}
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE, *arena.RUNGS[rung](line)],
        stdin=streams[0],
        stdout=streams[1],
        stderr=streams[2],
        start_new_session=True,
        pass_fds=(slave,),
        env={**os.environ, "TERMINAL": str(slave)},
        cwd="/",
    )
    threading.Thread(target=_drain, args=(master,), daemon=True).start()
    process.communicate(timeout=60)
    said = (open_tmp / "said").read_text()
    os.set_blocking(slave, False)
    raw = termios.tcgetattr(slave)
    raw[3] &= ~termios.ICANON
    termios.tcsetattr(slave, termios.TCSANOW, raw)
    typed = fcntl.ioctl(slave, termios.FIONREAD, b"\0\0\0\0")
    os.close(slave)
    assert process.returncode == 0
    assert "opened" not in said.replace("tty opened", ""), said
    assert typed == b"\0\0\0\0"


# Makes the terminal the controlling one of a session, as a login shell has it, and becomes the product in it.
TAKE = (
    "import fcntl, os, sys, termios; t = int(os.environ.pop('TERMINAL')); fcntl.ioctl(t, termios.TIOCSCTTY, 0); "
    "os.close(t); os.execvp(sys.argv[1], sys.argv[1:])"
)


def _drain(master: int) -> None:
    try:
        while os.read(master, 65536):
            pass
    except OSError:
        return
