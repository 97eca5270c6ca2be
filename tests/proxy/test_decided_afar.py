"""The proxy with a real Open Policy Agent that decides: asked before each answer, denied while it is away."""

from __future__ import annotations

import asyncio
import json
import pathlib
import sys
from collections.abc import Callable, Iterator

import pytest
from support import Upstream, answering, echo_head, json_of, ok, policy_for, running, status_of
from test_frontend import PINS

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "verdict"))

import opa_process
from opa_process import Opa

from openshell_supervisor.policy.yaml_file import parse
from openshell_supervisor.verdict.decide import build_generation
from openshell_supervisor.verdict.engines.opa_client import opa_address
from openshell_supervisor.verdict.engines.opa_server import OpaServerEngine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opa]:
    """A running OPA on a Unix socket; skipped only where there is no Go."""
    missing = opa_process.missing()
    if missing:
        pytest.skip(missing)
    opa = Opa(opa_process.build(), f"unix:{tmp_path_factory.mktemp('opa')}/opa.sock")
    opa.start()
    yield opa
    opa.stop()


def get(port: int, path: str) -> bytes:
    """A forward request for a path of the upstream."""
    return (
        f"GET http://plain.test:{port}{path} HTTP/1.1\r\nHost: plain.test:{port}\r\nConnection: close\r\n\r\n".encode()
    )


async def eventually(holds: Callable[[], object]) -> None:
    """Wait until `holds`, ten seconds at most."""
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.02)


async def test_the_server_decides_and_while_it_is_away_everything_is_denied(server: Opa) -> None:
    """Requests and tunnels are judged by the server; without it each is a 403; then again as before."""
    upstream = await Upstream(answering(lambda head, body: ok(b"reached"))).start()
    endpoint = (
        f"host: plain.test, port: {upstream.port}, protocol: rest, enforcement: enforce, "
        "rules: [{allow: {method: GET, path: /ok/**}}]"
    )
    policy = policy_for(endpoint)
    connect = f"CONNECT plain.test:{upstream.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    try:
        async with running(policy, pins=PINS) as proxy, OpaServerEngine(opa_address(server.url)) as engine:
            proxy.generation = build_generation(parse(policy, "test").policy, 2, engine=engine)
            for _ in range(2):
                assert b"reached" in await proxy.raw(get(upstream.port, "/ok/a"))
                refused = await proxy.raw(get(upstream.port, "/no"))
                assert status_of(refused) == 403 and "not permitted by policy" in json.dumps(json_of(refused))
                assert status_of(await proxy.raw(connect, wait=0.5)) == 200
                seen = upstream.connections
                server.stop()
                await eventually(lambda: engine.outage)
                for question in (get(upstream.port, "/ok/a"), get(upstream.port, "/ok/b"), connect):
                    denied = await proxy.raw(question)
                    assert status_of(denied) == 403
                    assert "cannot be asked" in json.dumps(json_of(denied))
                assert upstream.connections == seen
                server.start()
                await eventually(lambda: not engine.outage)
    finally:
        await upstream.stop()


async def test_many_requests_on_one_connection(server: Opa) -> None:
    """Pipelined requests with bodies wait for the server one after the other, and come out in order and whole."""
    upstream = await Upstream(answering(echo_head)).start()
    endpoint = (
        f"host: plain.test, port: {upstream.port}, protocol: rest, enforcement: enforce, "
        "rules: [{allow: {method: POST, path: /ok/**}}]"
    )
    policy = policy_for(endpoint)
    head = "POST http://plain.test:{0}/ok/{1} HTTP/1.1\r\nHost: plain.test:{0}\r\nContent-Length: 1000\r\n{2}\r\n"
    try:
        async with running(policy, pins=PINS) as proxy, OpaServerEngine(opa_address(server.url)) as engine:
            proxy.generation = build_generation(parse(policy, "test").policy, 2, engine=engine)
            sent = b"".join(
                head.format(upstream.port, at, "Connection: close\r\n" if at == 9 else "").encode() + bytes(1000)
                for at in range(10)
            )
            got = await proxy.raw(sent)
            assert [got.find(f"POST /ok/{at} ".encode()) > 0 for at in range(10)] == [True] * 10
            assert sorted(got.find(f"POST /ok/{at} ".encode()) for at in range(10)) == [
                got.find(f"POST /ok/{at} ".encode()) for at in range(10)
            ]
    finally:
        await upstream.stop()
