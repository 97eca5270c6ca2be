"""One upstream for the whole session: starting it costs more than most tests here."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import rpc
import sandboxed
from content import Content
from upstream import Identity, Upstream


@pytest.fixture(scope="session")
def site() -> Iterator[sandboxed.Site]:
    """The HTTPS upstream and the gRPC server, on an address of this session's own."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="oss-clients-"))
    directory.chmod(0o755)
    try:
        address = sandboxed.site_address()
        identity = Identity.create(directory, sandboxed.HOST, sandboxed.ELSEWHERE)
        content = Content(f"https://{sandboxed.HOST}:{sandboxed.PORT}", directory)
        with (
            Upstream(address, sandboxed.PORT, identity, content) as upstream,
            rpc.serving(address, sandboxed.GRPC_PORT, identity.server),
        ):
            yield sandboxed.Site(address, identity, upstream, content)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def home(open_tmp: pathlib.Path) -> pathlib.Path:
    """The directory that a client runs in; it is the workload's to write."""
    path = open_tmp / "home"
    path.mkdir()
    path.chmod(0o777)
    return path
