"""What a built rung looks like: where the proxy listens, and what the workload must do to enter.

A `Boundary` owns the proxy's listening socket and, where there is one, a descriptor of the network namespace. Sockets keep
the namespace they were made in, so the proxy serves from the supervisor's own namespace whatever the rung. This module does
not know how a rung is built.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

# Connections wait here while mitmproxy is imported (about a second); the kernel caps it at net.core.somaxconn, 4096 since 5.4.
LISTEN_BACKLOG = 1024


@dataclass(slots=True)
class Boundary:
    """One built rung.

    `proxy_address` is the listener as the workload sees it. `netns_fd` is None where the launcher is already inside (loopback)
    or shares the supervisor's namespace (observed); `netns_inode` is the inode the launcher must find itself in before it
    executes the workload, None where the namespace is shared on purpose. `watch` is to be called once the boundary has been
    probed: from then on refused packets are reported (the probe's own would be, too). `release` undoes whatever closing the
    descriptors does not.
    """

    rung: str
    label: str
    listener: socket.socket
    proxy_address: tuple[str, int]
    netns_fd: int | None = None
    netns_inode: int | None = None
    detail: dict[str, object] = field(default_factory=dict)
    watch: Callable[[], None] | None = None
    release: Callable[[], Awaitable[None]] | None = None

    @property
    def isolated(self) -> bool:
        """True when the workload lives in a network namespace of its own."""
        return self.netns_inode is not None

    @property
    def proxy_url(self) -> str:
        """The proxy's address as the workload's HTTP_PROXY wants it."""
        host, port = self.proxy_address
        return f"http://{host}:{port}"

    async def close(self) -> None:
        """Close the listener and the namespace descriptor, then run `release`; safe to call twice."""
        self.listener.close()
        if self.netns_fd is not None:
            os.close(self.netns_fd)
            self.netns_fd = None
        release, self.release = self.release, None
        if release is not None:
            await release()
