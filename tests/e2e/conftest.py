"""Fixtures of the end-to-end tests: the rootless Podman host and the image built there, once per session, and an upstream."""

from __future__ import annotations

import http.server
import pathlib
import sys
import threading
from collections.abc import Iterator

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "podman"))  # so that `import rootless` works

import rootless

IMAGE = "localhost/openshell-supervisor:e2e"


@pytest.fixture(scope="session")
def podman_host() -> Iterator[rootless.RootlessHost]:
    """Rootless Podman in namespaces of its own; skipped where the machine lacks a program or root, naming it."""
    missing = rootless.missing()
    if missing:
        pytest.skip(missing)
    with rootless.RootlessHost() as host:
        yield host


@pytest.fixture(scope="session")
def image(podman_host: rootless.RootlessHost, repo_root: pathlib.Path) -> str:
    """The name of the image that the Containerfile makes of this checkout."""
    return podman_host.build(repo_root, IMAGE)


@pytest.fixture(scope="module")
def upstream() -> Iterator[int]:
    """The port of a server on 127.0.0.1 that answers everything with 200."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
