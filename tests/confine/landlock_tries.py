"""A process that restricts itself and tries things: `python -I -S landlock_tries.py` with one JSON request on stdin.

{"fd": ruleset or -1, "flags": for restrict_self, "uid": to become first or null, "nnp": set it, "tries": [[name, …], …]}
It answers one JSON list: per try "ok" or the name of the errno; a failing restriction is one try, the only one.
Standard library only, and all of it imported before the restriction: it may run where nothing can be read any more.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from typing import Any

SYS_RESTRICT_SELF = 446
PR_SET_NO_NEW_PRIVS = 38
RNDGETENTCNT = 0x80045200  # linux/random.h: any user may ask
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL

libc = ctypes.CDLL(None, use_errno=True)


def opened(path: str, flags: int = os.O_RDONLY) -> None:
    os.close(os.open(path, flags))


def execute(path: str) -> None:
    pid = os.posix_spawn(path, [path], {})
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def node(path: str, kind: int, device: int = 0) -> None:
    os.mknod(path, kind | 0o600, device)


def ioctl(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, RNDGETENTCNT, bytes(4))
    finally:
        os.close(descriptor)


def connect(family: int, address: Any) -> None:
    with socket.socket(family) as end:
        end.settimeout(5)
        end.connect(address)


def bind(port: int) -> None:
    with socket.socket() as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end.bind(("127.0.0.1", port))


def abstract_inside() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(b"\0oss-landlock-inside-%d" % os.getpid())
        server.listen()
        connect(socket.AF_UNIX, server.getsockname())


def signal_inside() -> None:
    child = subprocess.Popen(["/bin/sleep", "10"])
    try:
        os.kill(child.pid, 0)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


TRIES: dict[str, Callable[..., None]] = {
    "execute": lambda zone: execute(f"{zone}/run"),
    "write_file": lambda zone: opened(f"{zone}/file", os.O_WRONLY),
    "read_file": lambda zone: opened(f"{zone}/file"),
    "read_dir": lambda zone: opened(f"{zone}/full", os.O_RDONLY | os.O_DIRECTORY),
    "remove_dir": lambda zone: os.rmdir(f"{zone}/empty"),
    "remove_file": lambda zone: os.unlink(f"{zone}/victim"),
    "make_char": lambda zone: node(f"{zone}/char", stat.S_IFCHR),  # 0,0 is a whiteout, which any user may make
    "make_dir": lambda zone: os.mkdir(f"{zone}/directory"),
    "make_reg": lambda zone: node(f"{zone}/regular", stat.S_IFREG),
    "make_sock": lambda zone: node(f"{zone}/socket", stat.S_IFSOCK),
    "make_fifo": lambda zone: os.mkfifo(f"{zone}/fifo"),
    "make_block": lambda zone: node(f"{zone}/block", stat.S_IFBLK, os.makedev(7, 0)),
    "make_sym": lambda zone: os.symlink("file", f"{zone}/link"),
    "refer": lambda zone: os.rename(f"{zone}/full/moved", f"{zone}/other/moved"),
    "rename": lambda zone: os.rename(f"{zone}/full/renamed", f"{zone}/full/renamed2"),
    "truncate": lambda zone: os.truncate(f"{zone}/file", 0),
    "ioctl_dev": ioctl,
    "bind": bind,
    "connect": lambda port: connect(socket.AF_INET, ("127.0.0.1", port)),
    "abstract": lambda name: connect(socket.AF_UNIX, b"\0" + name.encode()),
    "abstract_inside": abstract_inside,
    "pathname": lambda path: connect(socket.AF_UNIX, path),
    "signal": lambda pid: os.kill(pid, 0),
    "signal_inside": signal_inside,
    "read": opened,
    "write": lambda path: opened(path, os.O_WRONLY),
    "make": lambda path: opened(path, NEW),
    "list": lambda path: opened(path, os.O_RDONLY | os.O_DIRECTORY),
    "run": execute,
    "link": os.link,
    "move": os.rename,
    "chdir": os.chdir,
    "stat": lambda path: os.stat(path) and None,
}


def attempt(action: Callable[..., None], *arguments: Any) -> str:
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "ok"


def restrict(request: dict[str, Any]) -> None:
    if request["uid"] is not None:
        os.setgroups([])
        os.setresgid(*[request["uid"]] * 3)
        os.setresuid(*[request["uid"]] * 3)
    if request["nnp"]:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if request["fd"] >= 0 and libc.syscall(SYS_RESTRICT_SELF, request["fd"], request["flags"]) < 0:
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")


def main() -> None:
    request = json.load(sys.stdin)
    seen = attempt(restrict, request)
    answers = [attempt(TRIES[name], *arguments) for name, *arguments in request["tries"]] if seen == "ok" else [seen]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
