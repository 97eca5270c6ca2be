"""The product with an Open Policy Agent that decides: what it says holds, and without it nothing leaves."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator

import product
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "verdict"))

import opa_process
from opa_process import Opa


@pytest.fixture
def opa(tmp_path: pathlib.Path) -> Iterator[Opa]:
    """An OPA on a Unix socket, not started yet; skipped only where there is no Go."""
    missing = opa_process.missing()
    if missing:
        pytest.skip(missing)
    made = Opa(opa_process.build(), f"unix:{tmp_path}/opa.sock")
    yield made
    made.stop()


def asked(upstream: int, url: str) -> product.Ran:
    """A run that fetches an allowed and a forbidden path, and prints both status codes. Behind a boundary or not: enforced."""
    rules = "rules: [{allow: {method: GET, path: /ok}}]"
    endpoint = f"{{host: plain.test, port: {upstream}, protocol: rest, enforcement: enforce, {rules}}}"
    policy = f"version: 1\nnetwork_policies:\n  p:\n    endpoints: [{endpoint}]\n    binaries: [{{path: '/**'}}]\n"
    fetch = "curl -s -o /dev/null -w '%{http_code} '"
    place = f"http://plain.test:{upstream}"
    options = ["--opa-url", url, "--resolve", "plain.test=127.0.0.1"]
    return product.run(["sh", "-c", f"{fetch} {place}/ok; {fetch} {place}/no"], policy=policy, options=options)


def test_the_server_decides(opa: Opa, upstream: int) -> None:
    """The allowed path is reached and the other is refused, and the server holds our rules."""
    opa.start()
    ran = asked(upstream, opa.url)
    assert ran.code == 0, ran.err
    assert ran.out == ("200 403 " if ran.statement and ran.statement["egress"] == "enforce" else "200 200 "), ran.err
    assert not ran.lines("CONFIG:DEGRADED [MED] The policy engine")


def test_without_the_server_everything_is_denied_and_said_once(opa: Opa, upstream: int) -> None:
    """The workload starts and reaches nothing, not even what the policy allows; one CONFIG:DEGRADED names the socket's fault."""
    ran = asked(upstream, opa.url)
    assert ran.code == 0, ran.err
    assert ran.out == ("403 403 " if ran.statement and ran.statement["egress"] == "enforce" else "200 200 "), ran.err
    said = [line for line in ran.lines("CONFIG:DEGRADED") if "policy engine cannot be asked" in line]
    assert len(said) == 1 and "engine_unavailable" in said[0], ran.err


def test_an_address_that_is_none_is_a_usage_error(upstream: int) -> None:
    """Nothing starts with an address that cannot be meant; the hint names the forms."""
    ran = asked(upstream, "opa.test:8181")
    assert ran.code == 2 and "unix:/PATH" in ran.err
