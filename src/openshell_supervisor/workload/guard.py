"""The guard: ends every process of the workload when the supervisor is gone, however it went.

A parent-death signal reaches only the workload's first process. The guard holds the other end of a socket to the supervisor;
when that closes without a word, it kills what lives in the workload's namespaces or in its session, and removes the run
directory. It runs as a process of its own (`python -I -S -B guard.py RUN_DIR [STATUS_FILE]`,
socket as descriptor 3), on the standard library alone; `end_all` is also what the supervisor calls at an orderly end.
"""

import ctypes
import fcntl
import os
import signal
import sys
import time

# Killing races with forking: repeat until a pass finds nobody. Fifty passes of 10 ms; a process in an uninterruptible sleep
# (state D, proc(5)) cannot be waited out anyway.
MAX_PASSES = 50
PAUSE_SECONDS = 0.01
NS_GET_PARENT = 0xB702  # linux/nsfs.h
PR_SET_DUMPABLE = 4  # linux/prctl.h


class Mark:
    """How the workload's processes are known: session of the first one, and its namespaces by inode (0: shared with us)."""

    def __init__(self, session: int, network: int, user: int) -> None:
        self.session = session
        self.network = network
        self.user = user


def members(mark: Mark, root: int | None) -> list[int]:
    """The pids that belong to the workload: its session, its network namespace, its user namespace or one below that, or
    descendants of `root`.

    A namespace that may not be looked at (another user, no CAP_SYS_PTRACE) counts as foreign; session and descent need no
    privilege. Zombies are left out. Raises OSError when /proc cannot be listed.
    """
    parents: dict[int, int] = {}
    found: set[int] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        pid = int(name)
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, parent, _, its_session = file.read().rpartition(b") ")[2].split()[:4]
        except OSError:
            continue
        if state in (b"Z", b"X"):
            continue
        parents[pid] = int(parent)
        if int(its_session) == mark.session or _in_namespaces(name, mark):
            found.add(pid)
    if root is not None:
        found |= {pid for pid in parents if _descends(pid, root, parents)}
    return sorted(found)


def _in_namespaces(name: str, mark: Mark) -> bool:
    try:
        if mark.network and os.stat(f"/proc/{name}/ns/net").st_ino == mark.network:
            return True
        return bool(mark.user) and _below(f"/proc/{name}/ns/user", mark.user)
    except OSError:
        return False


def _below(path: str, ancestor: int) -> bool:
    """Is the user namespace at `path` the one with inode `ancestor`, or below it? (ioctl_ns(2), NS_GET_PARENT)"""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while os.fstat(descriptor).st_ino != ancestor:
            parent = fcntl.ioctl(descriptor, NS_GET_PARENT)  # EPERM at our own namespace: there is no way further up
            os.close(descriptor)
            descriptor = parent
        return True
    finally:
        os.close(descriptor)


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    seen = set()
    while pid in parents and pid not in seen:
        seen.add(pid)
        pid = parents[pid]
        if pid == root:
            return True
    return False


def end_all(mark: Mark, root: int | None = None, spare: frozenset[int] = frozenset()) -> list[int]:
    """SIGKILL every member until none is left; answers those that could not be ended. Blocks for 0.5 s at the most."""
    left: list[int] = []
    for _ in range(MAX_PASSES):
        try:
            left = [pid for pid in members(mark, root) if pid not in spare]
        except OSError:  # out of descriptors, which the workload's end gives back: the next pass will see
            time.sleep(PAUSE_SECONDS)
            continue
        if not left:
            return []
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            except PermissionError:
                continue  # reported through the return value
        time.sleep(PAUSE_SECONDS)
    return left


def main() -> None:
    """Wait for the supervisor's word or its end; only the latter makes the guard act.

    Lines on the socket: `watch SESSION NETWORK USER` names the workload (the last one counts), `done` says that the end was
    orderly.
    """
    # A workload of our user must not write its code into us: we are under none of its filters.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # the group's signals are for the supervisor; the guard goes last
    try:
        os.write(3, b"r")  # ready: everything of ours is loaded
    except OSError:
        pass  # the supervisor is gone already; what it said is still in the socket
    text = b""
    while not text.endswith(b"done\n"):
        try:
            data = os.read(3, 4096)
        except ConnectionResetError:
            data = b""  # it died without having read that we are ready (unix(7)); an end like any other
        if not data:
            watched = [line.split()[1:] for line in text.split(b"\n")[:-1] if line.startswith(b"watch ")]
            if watched:
                end_all(Mark(*(int(number) for number in watched[-1])))
            remove_files(sys.argv[1])
            for statement in sys.argv[2:]:
                forget(statement)
            return
        text += data


def remove_files(path: str) -> None:
    """Remove a run directory and the files in it, never through a symbolic link; what is gone already is no fault."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # removed by the supervisor's own last step
    try:
        for name in os.listdir(directory):
            os.unlink(name, dir_fd=directory)
        os.rmdir(path)
    except OSError:
        pass
    finally:
        os.close(directory)


def forget(statement: str) -> None:
    """Remove the status file of a supervisor that is gone: what it says holds no longer."""
    try:
        os.unlink(statement)
    except OSError:
        pass  # never written, or not ours to remove any more


if __name__ == "__main__":
    main()
