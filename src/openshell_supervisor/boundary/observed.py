"""The lowest rung: the workload shares the supervisor's network namespace, and nothing here keeps it on the way to the proxy.

The statement says so. The rung exists because a workload that must start anyway is better watched than not; as `external` it
is what we do where the operator says that an outer sandbox owns the network.
"""

from __future__ import annotations

import errno
import socket

from openshell_supervisor.boundary.boundary import LISTEN_BACKLOG, Boundary
from openshell_supervisor.boundary.launcher_link import Launcher, entering
from openshell_supervisor.errors import BoundaryError


async def build(label: str, port: int, launcher: Launcher, *, rung: str = "observed") -> Boundary:
    """Listen on 127.0.0.1:`port` of this namespace, or on a free port where that one is taken. Raises `BoundaryError`."""
    listener = _listen(port)
    boundary = Boundary(rung, label, listener, listener.getsockname())
    try:
        with entering(rung):
            await launcher.ask({"op": "enter", "how": "stay"})
    except BoundaryError:
        await boundary.close()
        raise
    return boundary


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            listener.bind(("127.0.0.1", 0))
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        raise BoundaryError(
            f"cannot listen on 127.0.0.1:{port}: {error.strerror}",
            code="listener_unavailable",
            step="listen",
            errno=error.errno,
            hint="the container must allow TCP sockets on loopback",
        ) from error
    return listener
