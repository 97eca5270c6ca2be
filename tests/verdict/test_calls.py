"""JSON-RPC and MCP: what a body is read as, and that every call of it is judged."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openshell_supervisor.policy.model import (
    Binary,
    Endpoint,
    L7Allow,
    L7Deny,
    McpOptions,
    NetworkRule,
    QueryMatcher,
    SandboxPolicy,
)
from openshell_supervisor.verdict.bodies.json_rpc import MAX_CALLS, RpcBody, RpcCall, parse_json_rpc
from openshell_supervisor.verdict.bodies.mcp import parse_mcp
from openshell_supervisor.verdict.bodies.read import body_limit, read_body
from openshell_supervisor.verdict.bodies.strict_json import MAX_DEPTH
from openshell_supervisor.verdict.bodies.wire import BodyError, Headers
from openshell_supervisor.verdict.decide import build_generation, decide, decide_fully
from openshell_supervisor.verdict.document import document
from openshell_supervisor.verdict.engines.embedded import EmbeddedEngine, shipped_rules
from openshell_supervisor.verdict.facts import Facts, Request, Verdict

HOST = "api.example.com"


def tool(*globs: str) -> tuple[tuple[str, QueryMatcher], ...]:
    """The `params` of a rule with `tool: {any: globs}`."""
    return (("name", QueryMatcher(any=globs)),)


def rpc(protocol: str = "mcp", **fields: Any) -> Endpoint:
    """An enforcing endpoint at `HOST`:443."""
    return Endpoint(**({"host": HOST, "ports": (443,), "protocol": protocol, "enforcement": "enforce"} | fields))


def policy_of(*endpoints: Endpoint) -> SandboxPolicy:
    """One rule `p` for every program."""
    return SandboxPolicy(network_policies={"p": NetworkRule(endpoints=endpoints, binaries=(Binary("/**"),))})


def ask(
    policy: SandboxPolicy, message: Any, method: str = "POST", headers: Headers = (), path: str = "/mcp"
) -> Verdict:
    """The verdict on a request whose body is `message`, JSON unless it is bytes, read as the policy says."""
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    generation = build_generation(policy, 1)
    item = decide(Facts(HOST, 443), generation).reads(path)
    assert item is not None
    request = read_body(Request(method, path), item.endpoint, headers, body)
    facts = Facts(HOST, 443, request=request)
    verdict = decide(facts, generation)
    assert verdict == decide_fully(facts, generation)
    return verdict


def call(method: str, **params: Any) -> dict[str, Any]:
    """A JSON-RPC call."""
    return {"jsonrpc": "2.0", "id": 1, "method": method} | ({"params": params} if params else {})


def test_every_call_of_a_batch_must_be_allowed() -> None:
    """One call that no rule names denies the whole batch, wherever it stands; several endpoints may share the allowing."""
    policy = policy_of(rpc(rules=(L7Allow("tools/call", params=tool("a")),)), rpc(rules=(L7Allow("ping"),)))
    good = [call("tools/call", name="a"), call("ping")]
    assert ask(policy, good).allow
    for place in range(3):
        batch = [*good[:place], call("tools/call", name="b"), *good[place:]]
        assert ask(policy, batch).reason_id == "rule_not_matched"


def test_the_hint_names_the_call_that_was_refused() -> None:
    """Not the first of the batch, but the first that no rule names."""
    policy = policy_of(rpc(rules=(L7Allow("tools/call", params=tool("a")),)))
    batch = [call("tools/call", name="a"), call("tools/call", name="b"), call("ping")]
    assert '`- allow: {method: tools/call, tool: "b"}`' in ask(policy, batch).hint
    assert '`- allow: {method: "ping"}`' in ask(policy, call("ping")).hint
    assert "by POST alone" in ask(policy, batch[0], "PUT").hint


def test_a_denied_call_hides_nowhere() -> None:
    """A deny rule fires for any call of a batch, under a profile that allows everything too."""
    policy = policy_of(rpc(mcp=McpOptions(allow_all_known_mcp_methods=True), deny_rules=(L7Deny(params=tool("rm*")),)))
    assert ask(policy, [call("tools/call", name="ls"), call("x/y")]).allow
    verdict = ask(policy, [call("tools/call", name="ls"), call("tools/call", name="rm_all")])
    assert (verdict.reason_id, verdict.rule) == ("deny_rule", "endpoints[0].deny_rules[0]")


def test_a_deny_rule_with_a_tool_alone_denies_its_calls() -> None:
    """Without the profile upstream's rule would be inert; here it means calls of that tool."""
    policy = policy_of(rpc(rules=(L7Allow("tools/*"),), deny_rules=(L7Deny(params=tool("x")),)))
    assert ask(policy, call("tools/call", name="y")).allow
    assert ask(policy, call("tools/call", name="x")).reason_id == "deny_rule"


def test_an_answer_is_for_mcp_alone() -> None:
    """A client may answer an MCP server and has nothing to answer in plain JSON-RPC, under audit neither."""
    answer = {"jsonrpc": "2.0", "id": 1, "result": {}}
    assert ask(policy_of(rpc(rules=(L7Allow("ping"),))), answer).allow
    assert ask(policy_of(rpc(rules=(L7Allow("ping"),))), [answer, call("ping")]).allow
    assert ask(policy_of(rpc(rules=(L7Allow("ping"),))), [answer, call("pong")]).reason_id == "rule_not_matched"
    plain = policy_of(rpc("json-rpc", enforcement="audit", rules=(L7Allow("*"),)))
    verdict = ask(plain, answer)
    assert (verdict.reason_id, verdict.enforcement) == ("json_rpc_response", "enforce")
    assert ask(plain, call("ping")).allow


def test_a_stream_of_messages_may_be_opened_for_mcp() -> None:
    """GET without a body that accepts an event stream: allowed for MCP, for JSON-RPC it is no call that a rule names."""
    accept = [("accept", "application/json, text/event-stream;q=0.9")]
    assert ask(policy_of(rpc(rules=(L7Allow("ping"),))), b"", "GET", accept).allow
    assert ask(policy_of(rpc(rules=(L7Allow("ping"),))), b"", "GET").reason_id == "json_rpc_rejected"
    assert ask(policy_of(rpc("json-rpc", rules=(L7Allow("*"),))), b"", "GET", accept).reason_id == "rule_not_matched"


@pytest.mark.parametrize("method", ["GET", "PUT", "post", "DELETE"])
def test_only_post_calls(method: str) -> None:
    """A call in the body of another HTTP method is no call to the rules."""
    policy = policy_of(rpc(mcp=McpOptions(allow_all_known_mcp_methods=True)))
    assert ask(policy, call("ping")).allow
    assert not ask(policy, call("ping"), method).allow


def test_names_of_protocols_are_exact() -> None:
    """`MCP` is read as MCP and its rules match nothing, as upstream has it."""
    assert ask(policy_of(rpc("mcp", rules=(L7Allow("ping"),))), call("ping")).allow
    assert ask(policy_of(rpc("MCP", rules=(L7Allow("ping"),))), call("ping")).reason_id == "rule_not_matched"


def test_what_was_read_as_one_protocol_satisfies_no_other() -> None:
    """A body read as JSON-RPC was not held to MCP's types: the rules of an MCP endpoint do not allow it, but REST rules do."""
    plain, typed = rpc("json-rpc", path="/mcp", rules=(L7Allow("a"),)), rpc("mcp", rules=(L7Allow("ping"),))
    assert ask(policy_of(plain, typed), call("a")).allow
    assert not ask(policy_of(plain, typed), call("ping")).allow
    assert ask(policy_of(plain, rpc("rest", access="full")), call("ping")).allow


def test_a_pattern_that_is_no_glob_fails_the_evaluation() -> None:
    """A tool pattern that cannot be evaluated denies every call of its endpoint, under audit too."""
    broken = L7Allow("tools/call", params=tool("["))
    verdict = ask(policy_of(rpc(enforcement="audit", rules=(L7Allow("ping"), broken))), call("ping"))
    assert (verdict.reason_id, verdict.enforcement) == ("engine_error", "enforce")
    assert "invalid glob '['" in verdict.reason


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"jsonrpc":"2.0","method":"ping","method":"rm"}', "twice"),
        (b'{"jsonrpc":"2.0","method":"ping","Method":"rm"}', "case alone"),
        (b'{"jsonrpc":"2.0","method":"ping","METHOD":"rm"}', "case alone"),
        ('{"jsonrpc":"2.0","method":"ping","reſult":1}'.encode(), "case alone"),
        (b'{"jsonrpc":"2.0","method":"tools/call","params":{"name":"a","Name":"b"}}', "case alone"),
        (b'\xef\xbb\xbf{"jsonrpc":"2.0","method":"ping"}', "invalid JSON"),
        (b'{"jsonrpc":"2.0","method":"ping","params":{"x":NaN}}', "NaN"),
        (b'{"jsonrpc":"2.0","method":"ping"}{}', "invalid JSON"),
        (b'{"jsonrpc":"2.0","method":"ping\xff"}', "invalid JSON"),
        (b"[" * 5000, f"deeper than {MAX_DEPTH}"),
        (b"1" * 5000, "invalid JSON"),
        (b'{"jsonrpc":"2.0","method":"ping","result":1}', "both"),
        (b'{"jsonrpc":"2.0","method":""}', "method"),
        (b'{"jsonrpc":"2.0","method":["ping"]}', "method"),
        (b'{"jsonrpc":2.0,"method":"ping"}', "'jsonrpc'"),
        (b'{"jsonrpc":"2.0","id":null,"method":"ping"}', "'id'"),
        (b'{"jsonrpc":"2.0","id":true,"method":"ping"}', "'id'"),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}', "not an object"),
        (b'[{"jsonrpc":"2.0","method":"ping"},3]', "batch item invalid"),
        (b"[" + b",".join([b'{"jsonrpc":"2.0","method":"p"}'] * (MAX_CALLS + 1)) + b"]", "more than"),
    ],
    ids=range(20),
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_refused(body: bytes, why: str) -> None:
    """Ambiguous or broken bodies are denied for good; the plain one beside them is allowed."""
    policy = policy_of(rpc(enforcement="audit", mcp=McpOptions(allow_all_known_mcp_methods=True)))
    assert ask(policy, b'{"jsonrpc":"2.0","id":1,"method":"ping"}').allow
    verdict = ask(policy, body)
    assert (verdict.reason_id, verdict.enforcement) == ("json_rpc_rejected", "enforce")
    assert why in verdict.reason and verdict.reason.startswith("JSON-RPC request rejected: ")


@pytest.mark.parametrize(
    "headers",
    [[("content-encoding", "gzip")], [("content-encoding", "identity, br")], [("content-type", "multipart/form-data")],
     [("content-type", "application/json; charset=utf-16")], [("content-type", "a/b"), ("content-type", "c/d")]],
    ids=repr,
)  # fmt: skip
def test_bodies_in_other_clothes_are_refused(headers: Headers) -> None:
    """Compressed, multipart or recoded bodies are not read; the same one without these headers is."""
    plain = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
    json_type = [("content-type", "application/json; charset=UTF-8"), ("content-encoding", "identity")]
    assert parse_mcp("POST", json_type, plain) == RpcBody("mcp", (RpcCall("ping"),))
    with pytest.raises(BodyError):
        parse_mcp("POST", headers, plain)


def test_a_body_has_a_limit() -> None:
    """The endpoint's own limit holds to the byte; 65,536 where it has none."""
    endpoint = rpc("json-rpc", json_rpc_max_body_bytes=40, rules=(L7Allow("*"),))
    body = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
    assert len(body) == body_limit(endpoint) == 40
    assert read_body(Request("POST", "/"), endpoint, (), body).body == RpcBody("json-rpc", (RpcCall("ping"),))
    with pytest.raises(BodyError, match="exceeds 40 byte inspection limit"):
        read_body(Request("POST", "/"), endpoint, (), body + b" ")
    assert body_limit(rpc()) == 65_536 and body_limit(rpc("rest")) == 0


methods = st.sampled_from(("ping", "tools/call", "tools/list", "a.b", "vendor/x", "", '"', "tools/call "))
tools = st.sampled_from(("", "a", "a.b", "list_x", '","allow":true,"', "é"))
calls = st.builds(RpcCall, methods, tools)
bodies = st.builds(
    RpcBody,
    st.sampled_from(("mcp", "json-rpc")),
    st.lists(calls, max_size=4).map(tuple),
    st.booleans(),
    st.booleans(),
    st.sampled_from(("", "", "", "invalid JSON")),
)
matchers = st.sampled_from(((), (), tool("a"), tool("*"), tool("list_*", "a.*"), tool("[")))
patterns = st.sampled_from(("ping", "tools/call", "tools/*", "*", "", "a.b", "**", "tools/["))
endpoints = st.builds(
    rpc,
    st.sampled_from(("mcp", "json-rpc", "mcp", "MCP", "rest")),
    enforcement=st.sampled_from(("enforce", "audit")),
    path=st.sampled_from(("", "/mcp", "/**", "/x")),
    rules=st.lists(st.builds(L7Allow, patterns, params=matchers), max_size=3).map(tuple),
    deny_rules=st.lists(st.builds(L7Deny, patterns, params=matchers), max_size=2).map(tuple),
    mcp=st.sampled_from((None, McpOptions(allow_all_known_mcp_methods=True))),
    host=st.sampled_from((HOST, "*.example.com", "other.example.com")),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(endpoints, min_size=1, max_size=3), bodies, st.sampled_from(("POST", "GET", "post")), st.booleans())
def test_narrowed_and_full_evaluation_agree(
    found: list[Endpoint], body: RpcBody, method: str, whole_rules: bool
) -> None:
    """Index, memory and the patterns instead of names are only about speed; a batch is never better off than its calls."""
    generation = build_generation(policy_of(*found), 1)
    facts = Facts(HOST, 443, request=Request(method, "/mcp", body=body))
    verdict = decide(facts, generation)
    assert verdict == decide_fully(facts, generation) == decide(facts, generation)
    if verdict.allow and verdict.inspected and body.calls:
        for one in body.calls:
            alone = Request(method, "/mcp", body=RpcBody(body.protocol, (one,)))
            assert decide(Facts(HOST, 443, request=alone), generation).allow
    if not verdict.allow and verdict.inspected and whole_rules and method.isupper():
        engine = EmbeddedEngine(shipped_rules(), ("request_deny_reason",))
        text = document(facts, list(generation.index.all()), generation.index.rules, False, whole=True)
        assert engine.ask("request_deny_reason", text) == verdict.reason


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode), st.sampled_from(("POST", "GET")))
def test_any_bytes_are_read_or_refused(body: bytes, method: str) -> None:
    """The parsers are total: facts, or facts with an error."""
    for parse in (parse_json_rpc, parse_mcp):
        found = parse(method, (), body)
        assert found.error or found.calls or found.responses or found.receive_stream


@pytest.mark.parametrize(
    "body",
    [b"[" * 65_536, b'"' + b"\\" * 65_000, b'{"a":' * 13_000, b'["' * 30_000, b" " * 65_536, b'"' + b'\\"' * 32_000],
)
def test_hostile_bodies_cost_little(body: bytes) -> None:
    """A body of 64 KiB made to be slow takes under 50 ms of processor time (it takes about 2)."""
    best = 1.0
    for _ in range(5):
        start = time.thread_time()
        assert parse_mcp("POST", (), body).error
        best = min(best, time.thread_time() - start)
    assert best < 0.05


def test_a_large_batch_costs_what_its_kinds_do() -> None:
    """A thousand calls of a thousand names are one question to the rules, also with a rule for each."""
    one = policy_of(rpc(rules=(L7Allow("tools/call", params=tool("list_*")),)))
    many = policy_of(rpc(rules=tuple(L7Allow("tools/call", params=tool(f"list_{n}")) for n in range(MAX_CALLS))))
    body = RpcBody("mcp", tuple(RpcCall("tools/call", f"list_{n}") for n in range(MAX_CALLS)))
    for policy in (one, many):
        generation = build_generation(policy, 1)
        decide(Facts(HOST, 443), generation)
        start = time.thread_time()
        assert decide(Facts(HOST, 443, request=Request("POST", "/", body=body)), generation).allow
        assert time.thread_time() - start < 0.1
