"""Rules of the operator's own: upstream's names, input and data around a module in upstream's dialect; both engines."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from opa_process import Opa

from openshell_supervisor.errors import PolicyError
from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.policy.normalise import normalise
from openshell_supervisor.policy.yaml_file import parse
from openshell_supervisor.verdict import custom
from openshell_supervisor.verdict.bodies.json_rpc import RpcBody, RpcCall
from openshell_supervisor.verdict.data_document import data_document
from openshell_supervisor.verdict.engines.opa_client import opa_address
from openshell_supervisor.verdict.engines.opa_server import OpaServerEngine
from openshell_supervisor.verdict.engines.protocol import EngineError
from openshell_supervisor.verdict.facts import Facts, Request, Verdict

# As upstream's evaluator wants it: `some x` before `x := …`, pairs inside comprehensions, `object.get(data, …)`, `list[i]` in a
# call, `concat` in a `sprintf`, and a rule with `every` that no question reaches.
MODULE = """package openshell.sandbox

default allow_request = false

identity := object.get(object.get(data, "runtime", {}), "require_binary_identity", true)

caller_listed(policy) if not identity

caller_listed(policy) if {
	some i
	same(policy.binaries[i], input.exec.path)
}

same(binary, path) if binary.path == path

records := [record |
	some name, policy in data.network_policies
	caller_listed(policy)
	some index, ep in policy.endpoints
	ep.host == input.network.host
	ep.ports[_] == input.network.port
	record := {"policy_name": name, "endpoint_index": index, "endpoint": ep}
]

# The operator's own idea: nothing on port 8443, whatever the policy says.
default action := "deny"

action := "allow" if {
	count(records) > 0
	input.network.port != 8443
}

callers := concat(" -> ", input.exec.ancestors)

egress_authorization := {
	"action": action,
	"deny_reason": sprintf("binary '%s' not welcome (%s)", [input.exec.path, callers]),
	"matched_policy": concat("", [r.policy_name | r := records[0]]),
	"endpoint_configs": [],
	"matched_endpoints": records,
	"exact_declared_endpoint_host": true,
}

allow_request if {
	not teatime
	some ep
	ep := records[_].endpoint
	some rule
	rule := ep.rules[_].allow
	rule.method == input.request.method
	glob.match(rule.path, ["/"], input.request.path)
}

allow_request if input.request.jsonrpc.method == "ping"

teatime if input.request.query_params.at[_] == "five"

request_deny_reason := sprintf("%s at teatime blocked by deny rule", [input.request.path]) if teatime

unreached if every port in [1] { port == 1 }
"""
POLICY = """version: 1
network_policies:
  own:
    endpoints:
      - {host: api.example.test, ports: [443, 8443], protocol: rest, enforcement: enforce, access: read-only}
      - {host: rpc.example.test, port: 443, protocol: json-rpc, enforcement: audit, rules: [{allow: {method: ping}}]}
      - {host: raw.example.test, port: 22}
    binaries: [{path: /usr/bin/curl}]
"""
Deciding = Callable[[Facts], Verdict]


def policy() -> SandboxPolicy:
    """The policy above, presets expanded."""
    return normalise(parse(POLICY, "test").policy)


def decided(engine: Any, facts: Facts) -> Verdict:
    """The verdict by a module in `engine`."""
    return custom.decided(facts, policy(), 5, engine)


async def ask_afar(address: str, facts: Facts) -> Verdict:
    """The verdict by the OPA server at `address`, prepared as the proxy does it."""
    module = custom.checked_module(MODULE, "own.rego")
    rules = custom.pushed_rules(module, data_document(policy(), True))
    async with OpaServerEngine(opa_address(address), rules) as engine:
        assert not engine.outage

        def quietly() -> None:
            try:
                decided(engine, facts)
            except EngineError:
                pass

        await engine.prepare(quietly)
        return decided(engine, facts)


@pytest.fixture(params=["embedded", "opa"])
def deciding(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Any:
    """The verdict of the module on facts, by either engine."""
    if request.param == "embedded":
        module = custom.checked_module(MODULE, "own.rego")
        custom.refuse_unsure(module, "own.rego")
        engine = custom.embedded_engine(module, data_document(policy(), True))
        yield lambda facts: decided(engine, facts)
        return
    opa = Opa(request.getfixturevalue("opa_program"), f"unix:{tmp_path}/opa.sock")
    opa.start()
    yield lambda facts: asyncio.run(ask_afar(opa.url, facts))
    opa.stop()


def api(path: str = "/x", method: str = "GET", *query: tuple[str, str], port: int = 443) -> Facts:
    """curl's request to the REST endpoint."""
    return Facts("api.example.test", port, "/usr/bin/curl", request=Request(method, path, query))


def test_the_module_decides_connections(deciding: Deciding) -> None:
    """What it allows is allowed with the policy's endpoint; what it forbids on its own account is denied in its words."""
    verdict = deciding(Facts("api.example.test", 443, "/usr/bin/curl"))
    assert (verdict.allow, verdict.policy, verdict.exact_host, verdict.generation) == (True, "own", True, 5)
    assert [item.endpoint.host for item in verdict.endpoints] == ["api.example.test"] and verdict.inspected
    assert deciding(Facts("raw.example.test", 22, "/usr/bin/curl")).allow
    denied = deciding(Facts("api.example.test", 8443, "/usr/bin/curl", ("/bin/sh", "/bin/bash")))
    assert (denied.allow, denied.reason_id) == (False, "binary_not_allowed")
    assert denied.reason == "binary '/usr/bin/curl' not welcome (/bin/sh -> /bin/bash)"
    assert not deciding(Facts("api.example.test", 443, "/usr/bin/wget")).allow
    assert not deciding(Facts("other.example.test", 443, "/usr/bin/curl")).allow


def test_the_module_decides_requests(deciding: Deciding) -> None:
    """An allowed request, one that it does not allow, and one that it blocks in words of its own."""
    assert deciding(api()).allow
    denied = deciding(api(method="POST"))
    assert (denied.allow, denied.reason_id, denied.enforcement) == (False, "rule_not_matched", "enforce")
    assert denied.reason == "request denied by policy"
    blocked = deciding(api("/x", "GET", ("at", "four"), ("at", "five")))
    assert (blocked.reason_id, blocked.reason) == ("deny_rule", "/x at teatime blocked by deny rule")
    assert deciding(api("/x", "GET", ("at", "four"))).allow


def test_every_call_of_a_batch_is_asked(deciding: Deciding) -> None:
    """One call that is not allowed denies the batch, softly under audit; a body that could not be read is denied in any case."""
    request = Request("POST", "/rpc", body=RpcBody("json-rpc", (RpcCall("ping"), RpcCall("ping"))))
    facts = Facts("rpc.example.test", 443, "/usr/bin/curl", request=request)
    assert deciding(facts).allow
    worse = replace(request, body=RpcBody("json-rpc", (RpcCall("ping"), RpcCall("drop"))))
    verdict = deciding(replace(facts, request=worse))
    assert (verdict.allow, verdict.enforcement) == (False, "audit")
    broken = deciding(replace(facts, request=replace(request, body=RpcBody("json-rpc", error="no JSON"))))
    assert (broken.allow, broken.reason_id, broken.enforcement) == (False, "json_rpc_rejected", "enforce")
    unread = deciding(replace(facts, request=replace(request, body=None)))
    assert (unread.allow, unread.enforcement) == (False, "enforce")


@pytest.mark.parametrize(
    "text",
    ['{"action": "allow", "matched_endpoints": [{"policy_name": "nobody", "endpoint_index": 0}]}',
     '{"action": "allow", "matched_endpoints": 7}', "[]", '"allow"', '{"action": true}', "{}"],
)  # fmt: skip
def test_an_answer_of_another_shape_is_a_denial(text: str) -> None:
    """A module that answers nonsense allows nothing; with the right shape it would have."""
    module = f"package openshell.sandbox\n\negress_authorization := {text}\n\nallow_request := true\n"
    engine = custom.embedded_engine(custom.checked_module(module, "m"), data_document(policy(), True))
    assert not decided(engine, api()).allow
    good = module.replace(
        text, '{"action": "allow", "matched_endpoints": [{"policy_name": "own", "endpoint_index": 0}]}'
    )
    engine = custom.embedded_engine(custom.checked_module(good, "m"), data_document(policy(), True))
    assert decided(engine, api()).allow


@pytest.mark.parametrize(
    ("module", "code", "line"),
    [
        (MODULE.replace("package openshell.sandbox", "package mine"), "rules_package", 1),
        (MODULE.replace("egress_authorization :=", "renamed :="), "rules_missing", 0),
        (MODULE.replace("allow_request if", "renamed if").replace("default allow_request = false", ""), "rules_missing", 0),
        (MODULE.replace("count(records) > 0", "count(records > 0"), "rules_invalid", None),
        ("", "rules_package", 1),
    ],
)  # fmt: skip
def test_a_module_that_cannot_decide_is_refused(module: str, code: str, line: int | None) -> None:
    """At the start, with a code, and with the place where there is one; the whole module passes."""
    with pytest.raises(PolicyError) as caught:
        custom.checked_module(module, "own.rego")
    problem = caught.value.problems[0]
    assert problem.code == code
    assert problem.line == line if line is not None else 28 <= problem.line <= 36
    assert custom.checked_module(MODULE, "own.rego")


def test_what_the_embedded_engine_may_misjudge_is_refused_there() -> None:
    """`list[i]` in a call that cannot be rewritten is named with its line: rego-cpp would not try each `i`."""
    tricky = MODULE.replace(
        "\tsame(policy.binaries[i], input.exec.path)", "\tsame(policy.binaries[i], {1: input.exec.path}[1])"
    )
    with pytest.raises(PolicyError) as caught:
        custom.refuse_unsure(custom.checked_module(tricky, "own.rego"), "own.rego")
    assert (
        caught.value.problems[0].line
        == tricky.splitlines().index("\tsame(policy.binaries[i], {1: input.exec.path}[1])") + 1
    )
    custom.refuse_unsure(custom.checked_module(MODULE, "own.rego"), "own.rego")


@pytest.mark.parametrize("pattern", ["/a/**/b", "/a**", "**/b", "/[", "/a\\\\b"])
def test_a_pattern_that_would_be_read_otherwise_is_refused(pattern: str) -> None:
    """The evaluator's globs are not upstream's: where they differ the policy is refused, and its plain neighbour is not."""
    text = POLICY.replace("access: read-only}", 'access: read-only, deny_rules: [{method: GET, path: "PATTERN"}]}')
    with pytest.raises(PolicyError) as caught:
        custom.refuse_patterns(parse(text.replace("PATTERN", pattern), "test").policy, "own.yaml")
    assert caught.value.problems[0].path == "network_policies.own.endpoints[0]"
    for plain in ("/a/**", "/a/*", "**", "/a*b"):
        custom.refuse_patterns(parse(text.replace("PATTERN", plain), "test").policy, "own.yaml")
