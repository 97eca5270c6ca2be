"""The guard: ends every process of the workload when the supervisor is gone, however it went.

A parent-death signal reaches only the workload's first process. The guard holds the other end of a socket to the supervisor;
when that closes without a word, it kills what lives in the workload's network namespace, or in its session where the
namespace is shared, and removes the run directory. It runs as a process of its own (`python -I -S -B guard.py RUN_DIR`,
socket as descriptor 3), on the standard library alone; `end_all` is also what the supervisor calls at an orderly end.
"""

import os
import signal
import sys
import time

# Killing races with forking: repeat until a pass finds nobody. Fifty passes of 10 ms; a process in an uninterruptible sleep
# (state D, proc(5)) cannot be waited out anyway.
MAX_PASSES = 50
PAUSE_SECONDS = 0.01


def members(session: int, inode: int | None, root: int | None) -> list[int]:
    """The pids that belong to the workload: same session, same network namespace (by inode), or descendants of `root`.

    `session` is the first process's pid, which is its session's id. A namespace that may not be read (another user, no
    CAP_SYS_PTRACE) counts as foreign; the other two criteria need no privilege. Zombies are left out.
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
        if int(its_session) == session or (inode is not None and _namespace(name) == inode):
            found.add(pid)
    if root is not None:
        found |= {pid for pid in parents if _descends(pid, root, parents)}
    return sorted(found)


def _namespace(name: str) -> int | None:
    try:
        return os.stat(f"/proc/{name}/ns/net").st_ino
    except OSError:
        return None


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    seen = set()
    while pid in parents and pid not in seen:
        seen.add(pid)
        pid = parents[pid]
        if pid == root:
            return True
    return False


def end_all(session: int, inode: int | None, root: int | None = None, spare: frozenset[int] = frozenset()) -> list[int]:
    """SIGKILL every member until none is left; answers those that could not be ended. Blocks for 0.5 s at the most."""
    left: list[int] = []
    for _ in range(MAX_PASSES):
        left = [pid for pid in members(session, inode, root) if pid not in spare]
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

    Lines on the socket: `watch SESSION INODE` names the workload (the last one counts; inode 0 means a shared namespace),
    `done` says that the end was orderly.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # the group's signals are for the supervisor; the guard goes last
    session, inode, text = 0, 0, b""
    while not text.endswith(b"done\n"):
        data = os.read(3, 4096)
        if not data:
            if session:
                end_all(session, inode or None)
            remove_files(sys.argv[1])
            return
        text += data
        words = [line.split() for line in text.split(b"\n") if line.startswith(b"watch ")]
        if words and len(words[-1]) == 3 and text.endswith(b"\n"):
            session, inode = int(words[-1][1]), int(words[-1][2])


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


if __name__ == "__main__":
    main()
