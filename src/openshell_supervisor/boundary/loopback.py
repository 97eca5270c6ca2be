"""The rung that needs no capability: a network namespace with nothing but `lo`, made by the process that stays in it.

No route exists in it, so there is nothing to fence. The launcher makes the namespace (with CAP_SYS_ADMIN plainly, else inside
a user namespace of the workload's own identity), raises lo, opens the proxy's listener there and passes the socket out with
SCM_RIGHTS. No setns, no mount, no veth and no nft are needed, which is why it works in an unmodified rootless container.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from openshell_supervisor.boundary.boundary import LISTEN_BACKLOG, Boundary
from openshell_supervisor.boundary.launcher_link import Launcher, entering
from openshell_supervisor.telemetry.events import Telemetry

RUNG = "loopback"


async def build(
    label: str, port: int, launcher: Launcher, identity: Mapping[str, object], telemetry: Telemetry
) -> Boundary:
    """Have `launcher` make the namespace; `identity` is the workload's {uid, gid, groups}. Raises `BoundaryError`."""
    telemetry.config("creating", "Creating network namespace", ns=label, rung=RUNG)
    request = {
        "op": "enter",
        "how": "make",
        "port": port,
        "backlog": LISTEN_BACKLOG,
        "identity": dict(identity),
        "outside": os.stat("/proc/self/ns/net").st_ino,
    }
    with entering(RUNG):
        answer, (listening, namespace) = await launcher.ask(request)
    method = answer["attempts"][-1][0]
    telemetry.config("created", "Network namespace created", ns=label, rung=RUNG, method=method)
    return Boundary(
        RUNG,
        label,
        socket.socket(fileno=listening),
        ("127.0.0.1", port),
        netns_fd=namespace,
        netns_inode=answer["inode"],
        detail={"method": method},
    )
