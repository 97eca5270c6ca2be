"""Sockets that programs outside have bound to a path: a way out that neither a network namespace nor Landlock holds.

connect(2) to such a socket asks for its file's mode alone (unix(7); Landlock has no right for it up to ABI 7). A workload of the
same user as a session bus, a tmux server or an agent for keys could let it act. So each that this host shows is covered up in
the workload's own mounts, and the launcher's twin then looks which of them it could still reach. What stays unseen: a socket
whose program lives in another network namespace than ours, and one that is bound later.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

LISTING = Path("/proc/net/unix")
PATH_FIELD = 7  # proc_pid_net(5): Num RefCount Protocol Flags Type St Inode Path
# A desktop has some hundred. Each costs a mount (10 us) and a look; a list that somebody made longer is not taken on in part.
MAX_SOCKETS = 4096


def bound(spared: Iterable[str] = ()) -> list[str]:
    """The absolute paths that sockets of this network namespace are bound to, without those `spared`: the policy names them.

    Raises OSError when the kernel's list cannot be read, or is longer than `MAX_SOCKETS`.
    """
    found = set()
    with LISTING.open(errors="surrogateescape") as listing:
        next(listing, None)  # the head line
        for line in listing:
            fields = line.rstrip("\n").split(None, PATH_FIELD)
            if len(fields) > PATH_FIELD and fields[PATH_FIELD].startswith("/"):
                found.add(fields[PATH_FIELD])
    if len(found) > MAX_SOCKETS:
        raise OSError(0, f"more than {MAX_SOCKETS} sockets are bound to paths")
    return sorted(found - set(spared))
