"""Libraries that agents use, through the proxy and with the sandbox's bundle as their only trust."""

from __future__ import annotations

import asyncio
import ssl

import aiohttp
import httpx
import requests
import support
from support import Upstream, answering, echo_head, policy_for, running
from test_frontend import PINS, rest
from test_http2 import h2_upstream


async def test_python_clients(root: support.TestAuthority) -> None:
    """httpx over HTTP/2, requests and aiohttp: one allowed and one denied request each, the denial readable as JSON."""
    new = await Upstream(h2_upstream).start(root.server_context("api.test", ("h2", "http/1.1")))
    old = await Upstream(answering(echo_head)).start(root.server_context("api.test"))
    policy = policy_for(rest(new.port), rest(old.port))
    async with running(policy, pins=PINS, upstream_ca=root.file) as proxy:
        bundle = root.directory / "bundle.pem"
        bundle.write_bytes(proxy.authority.bundle_pem(root.file))
        url, address = f"http://127.0.0.1:{proxy.port}", f"https://api.test:{old.port}"
        trust = ssl.create_default_context(cafile=str(bundle))
        async with httpx.AsyncClient(http2=True, proxy=url, verify=trust) as client:
            answers = await asyncio.gather(*(client.get(f"https://api.test:{new.port}/ok/{n}") for n in range(20)))
            assert {a.http_version for a in answers} == {"HTTP/2"} and [a.text for a in answers][7] == "/ok/7"
            denied = await client.get(f"https://api.test:{new.port}/secret")
            assert denied.status_code == 403 and denied.json()["reason_id"] == "rule_not_matched"

        def with_requests() -> tuple[int, int]:
            session = requests.Session()
            session.proxies, session.verify, session.trust_env = {"https": url, "http": url}, str(bundle), False
            good, bad = session.get(f"{address}/ok/a b?q=1"), session.post(f"{address}/secret", data=b"x" * 500_000)
            assert bad.json()["error"] == "policy_denied" and "X-Deny-Reason" in bad.headers
            return good.status_code, bad.status_code

        assert await asyncio.to_thread(with_requests) == (200, 403)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{address}/ok/x", proxy=url, ssl=trust) as good:
                assert good.status == 200
            async with session.get(f"{address}/secret", proxy=url, ssl=trust) as bad:
                assert bad.status == 403 and (await bad.json())["policy"] == "test"
    await new.stop()
    await old.stop()
