"""The product with rules of the operator's own: they decide, and a module that cannot decide is refused at the start."""

from __future__ import annotations

import asyncio
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "verdict"))

import opa_process
from opa_process import Opa

from openshell_supervisor.policy.yaml_file import parse
from openshell_supervisor.verdict.decide import Generation, build_generation, decide
from openshell_supervisor.verdict.engines.opa_client import opa_address
from openshell_supervisor.verdict.facts import Facts, Request
from openshell_supervisor.verdict.own_rules import PushedRules, load_rules

MODULE = """package openshell.sandbox

records := [record |
	some name, policy in data.network_policies
	some index, ep in policy.endpoints
	ep.host == input.network.host
	ep.ports[_] == input.network.port
	record := {"policy_name": name, "endpoint_index": index}
]

egress_authorization := {
	"action": action,
	"deny_reason": "not in this house",
	"matched_policy": "own",
	"matched_endpoints": records,
}

default action := "deny"

action := "allow" if count(records) > 0

default allow_request := false

# Other than the policy says: it allows every GET.
allow_request if input.request.path == "/ok"
"""


def asked(tmp_path: pathlib.Path, upstream: int, module: str, *more: str) -> subprocess.CompletedProcess[str]:
    """A run with this module that fetches two paths and prints both status codes."""
    endpoint = f"{{host: plain.test, port: {upstream}, protocol: rest, enforcement: enforce, access: read-only}}"
    policy = f"version: 1\nnetwork_policies:\n  own:\n    endpoints: [{endpoint}]\n    binaries: [{{path: '/**'}}]\n"
    (tmp_path / "own.rego").write_text(module)
    (tmp_path / "own.yaml").write_text(policy)
    fetch = "curl -s -o /dev/null -w '%{http_code} '"
    script = f"{fetch} http://plain.test:{upstream}/ok; {fetch} http://plain.test:{upstream}/other"
    files = ["--policy-rules", str(tmp_path / "own.rego"), "--policy-data", str(tmp_path / "own.yaml")]
    command = [
        sys.executable,
        "-m",
        "openshell_supervisor",
        "run",
        "--egress",
        "enforce",
        "--resolve",
        "plain.test=127.0.0.1",
    ]
    return subprocess.run(
        [*command, *files, *more, "--", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )


def test_the_module_decides(tmp_path: pathlib.Path, upstream: int) -> None:
    """Of two paths that the policy allows, the module lets one through."""
    ran = asked(tmp_path, upstream, MODULE)
    if "no boundary" in ran.stderr or ran.returncode == 1:
        pytest.skip("needs a host with a boundary: needs root")
    assert (ran.returncode, ran.stdout) == (0, "200 403 "), ran.stderr
    other = asked(tmp_path, upstream, MODULE.replace('"/ok"', '"/other"'))
    assert other.stdout == "403 200 ", other.stderr


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (MODULE.replace("count(records)", "count(records"), "own.rego:20:"),
        (MODULE.replace("egress_authorization", "other"), "egress_authorization"),
        ("", "package openshell.sandbox"),
    ],
)
def test_a_module_that_cannot_decide_is_refused(tmp_path: pathlib.Path, upstream: int, module: str, said: str) -> None:
    """Exit code 2 before the workload, with the place or the name of what is missing."""
    ran = asked(tmp_path, upstream, module)
    assert ran.returncode == 2 and ran.stdout == ""
    assert said in ran.stderr, ran.stderr


def test_both_files_or_neither(tmp_path: pathlib.Path, upstream: int) -> None:
    """A policy beside them is a contradiction."""
    assert asked(tmp_path, upstream, MODULE, "--policy", str(tmp_path / "own.yaml")).returncode == 2


@pytest.fixture
def opa(tmp_path: pathlib.Path) -> Iterator[Opa]:
    """An OPA on a Unix socket, not started yet; skipped only where there is no Go."""
    missing = opa_process.missing()
    if missing:
        pytest.skip(missing)
    made = Opa(opa_process.build(), f"unix:{tmp_path}/opa.sock")
    yield made
    made.stop()


# What only the data can say: callers count in one run, and in the other they do not.
BY_IDENTITY = MODULE.replace(
    'input.request.path == "/ok"',
    'input.request.path == {true: "/ok", false: "/other"}[data.runtime.require_binary_identity]',
)


def test_the_module_decides_in_a_server(
    tmp_path: pathlib.Path, upstream: int, opa: Opa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is given module and data, with what is known of callers in this run; the next run's take their place."""
    opa.start()
    ran = asked(tmp_path, upstream, BY_IDENTITY, "--opa-url", opa.url)
    if "no boundary" in ran.stderr or ran.returncode == 1:
        pytest.skip("needs a host with a boundary: needs root")
    assert (ran.returncode, ran.stdout) == (0, "200 403 "), ran.stderr
    assert "policy engine cannot be asked" not in ran.stderr
    monkeypatch.setenv("OPENSHELL_NETWORK_BINARY_IDENTITY", "relaxed")
    relaxed = asked(tmp_path, upstream, BY_IDENTITY, "--opa-url", opa.url)
    assert (relaxed.returncode, relaxed.stdout) == (0, "403 200 "), relaxed.stderr


def test_a_generation_is_never_decided_by_anothers_data(tmp_path: pathlib.Path, opa: Opa) -> None:
    """When it turns out that callers cannot be known, the server gets the new data, and the old generation is denied for good.
    An outage and its end are told once, over both."""
    endpoint = "{host: plain.test, port: 80, protocol: rest, enforcement: enforce, access: read-only}"
    text = f"version: 1\nnetwork_policies:\n  own:\n    endpoints: [{endpoint}]\n    binaries: [{{path: '/**'}}]\n"
    policy = parse(text, "own.yaml").policy
    (tmp_path / "own.rego").write_text(BY_IDENTITY)
    module = load_rules(tmp_path / "own.rego", policy, "own.yaml", embedded=False)
    told: list[str] = []

    async def asked_both(generation: Generation) -> tuple[str, ...]:
        found = []
        for path in ("/ok", "/other"):
            facts = Facts("plain.test", 80, "/usr/bin/curl", request=Request("GET", path))
            await generation.prepare(facts)
            verdict = decide(facts, generation)
            found.append("allowed" if verdict.allow else verdict.reason_id)
        return tuple(found)

    async def story() -> None:
        async with PushedRules(opa_address(opa.url), told.append) as pushed:
            known = build_generation(policy, 1, True, pushed.engine(module, policy, True), own_rules=True)
            assert await asked_both(known) == ("engine_unavailable",) * 2  # the server is not there yet
            assert pushed.engine(module, policy, True) is known.engine
            opa.start()
            unknown = build_generation(policy, 1, False, pushed.engine(module, policy, False), own_rules=True)
            assert await asked_both(unknown) == ("rule_not_matched", "allowed")
            assert await asked_both(known) == ("engine_unavailable",) * 2
            again = build_generation(policy, 1, True, pushed.engine(module, policy, True), own_rules=True)
            assert await asked_both(again) == ("allowed", "rule_not_matched")
        assert await asked_both(again) == ("engine_unavailable",) * 2

    asyncio.run(story())
    assert len(told) == 2 and told[0] and not told[1], told


def test_without_its_server_the_module_allows_nothing(tmp_path: pathlib.Path, upstream: int, opa: Opa) -> None:
    """Not even what it would allow here, and that is said once."""
    ran = asked(tmp_path, upstream, MODULE, "--opa-url", opa.url)
    if "no boundary" in ran.stderr or ran.returncode == 1:
        pytest.skip("needs a host with a boundary: needs root")
    assert (ran.returncode, ran.stdout) == (0, "403 403 "), ran.stderr
    assert ran.stderr.count("policy engine cannot be asked") == 1, ran.stderr
    assert asked(tmp_path, upstream, MODULE).stdout == "200 403 "


@pytest.mark.parametrize("path", ["/ok", "/other"])
def test_explain_says_what_the_run_does(tmp_path: pathlib.Path, upstream: int, path: str) -> None:
    """With the same two files `explain` comes to the answer of the run, for both paths."""
    ran = asked(tmp_path, upstream, MODULE)
    if "no boundary" in ran.stderr or ran.returncode == 1:
        pytest.skip("needs a host with a boundary: needs root")
    files = ["--policy-rules", str(tmp_path / "own.rego"), "--policy-data", str(tmp_path / "own.yaml")]
    question = ["--host", "plain.test", "--port", str(upstream), "--method", "GET", "--path", path]
    told = subprocess.run(
        [sys.executable, "-m", "openshell_supervisor", "explain", *files, *question],
        capture_output=True,
        text=True,
        timeout=60,
    )
    status = dict(zip(("/ok", "/other"), ran.stdout.split(), strict=True))[path]
    assert (told.returncode, status) in ((0, "200"), (1, "403")), told.stdout + told.stderr
    assert told.stdout.startswith("allowed:" if path == "/ok" else "blocked:")
