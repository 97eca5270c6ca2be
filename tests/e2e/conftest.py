"""Fixtures of the end-to-end tests: the rootless Podman host and the image built there, once per session."""

from __future__ import annotations

import pathlib
import sys
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
