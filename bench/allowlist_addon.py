"""An allow-list for stock mitmdump that asks the same questions as the supervisor's policy: host, port, method, path.

Loaded with `mitmdump -s`; `BENCH_ALLOW` names a JSON file of `{host, port, methods, path}` (host and path are `fnmatch`
patterns). Names under `bench.example` resolve to loopback, as `--resolve` does for the supervisor.
"""

from __future__ import annotations

import functools
import json
import os
import socket
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mitmproxy import http

ZONE = ".bench.example"

_getaddrinfo = socket.getaddrinfo


@functools.wraps(_getaddrinfo)
def _pinned(host: Any, *args: Any, **options: Any) -> Any:
    """`socket.getaddrinfo`, with the zone of the bench pinned to loopback."""
    return _getaddrinfo("127.0.0.1" if isinstance(host, str) and host.endswith(ZONE) else host, *args, **options)


socket.getaddrinfo = _pinned


class AllowList:
    """Refuse what no entry allows, with a 403."""

    def __init__(self) -> None:
        self.entries = json.loads(Path(os.environ["BENCH_ALLOW"]).read_text())

    def _places(self, flow: http.HTTPFlow) -> list[dict[str, Any]]:
        host, port = flow.request.host, flow.request.port
        return [entry for entry in self.entries if entry["port"] == port and fnmatchcase(host, entry["host"])]

    def http_connect(self, flow: http.HTTPFlow) -> None:
        """The question of the tunnel: host and port."""
        if not self._places(flow):
            flow.response = http.Response.make(403, b"denied")

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """The question of the request: method and path as well."""
        request = flow.request
        if not any(
            request.method in entry["methods"] and fnmatchcase(request.path, entry["path"])
            for entry in self._places(flow)
        ):
            flow.response = http.Response.make(403, b"denied")


addons = [AllowList()]
