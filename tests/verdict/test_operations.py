"""GraphQL and WebSocket: what a request or message would execute is judged, and nothing else can be executed in its place."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openshell_supervisor.policy.model import (
    Binary,
    Endpoint,
    GraphqlOperation,
    L7Allow,
    L7Deny,
    NetworkRule,
    SandboxPolicy,
)
from openshell_supervisor.verdict.bodies import graphql
from openshell_supervisor.verdict.bodies.graphql import GraphqlBody
from openshell_supervisor.verdict.bodies.read import read_body, read_message
from openshell_supervisor.verdict.bodies.websocket import MAX_TEXT_BYTES, WebSocketPart, parse_handshake, parse_text
from openshell_supervisor.verdict.bodies.wire import BodyError, Headers, Unread
from openshell_supervisor.verdict.decide import build_generation, decide, decide_fully
from openshell_supervisor.verdict.document import document
from openshell_supervisor.verdict.engines.embedded import EmbeddedEngine, shipped_rules
from openshell_supervisor.verdict.facts import Facts, Request, Verdict, parse_query

HOST = "api.example.com"
HANDSHAKE = [
    ("upgrade", "websocket"),
    ("connection", "Upgrade"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
]


def endpoint(protocol: str = "graphql", **fields: Any) -> Endpoint:
    """An enforcing endpoint at `HOST`:443."""
    return Endpoint(**({"host": HOST, "ports": (443,), "protocol": protocol, "enforcement": "enforce"} | fields))


def policy_of(*endpoints: Endpoint) -> SandboxPolicy:
    """One rule `p` for every program."""
    return SandboxPolicy(network_policies={"p": NetworkRule(endpoints=endpoints, binaries=(Binary("/**"),))})


VIEWER = endpoint(rules=(L7Allow(operation_type="query", fields=("viewer",)),))


def verdict_on(policy: SandboxPolicy, request: Request) -> Verdict:
    """The verdict; index and memory make no difference to it."""
    generation, facts = build_generation(policy, 1), Facts(HOST, 443, request=request)
    verdict = decide(facts, generation)
    assert verdict == decide_fully(facts, generation)
    return verdict


def ask(
    policy: SandboxPolicy | Endpoint,
    body: Any = b"",
    *,
    method: str = "POST",
    query: str = "",
    headers: Headers = (),
    path: str = "/graphql",
) -> Verdict:
    """The verdict on a request with this body: bytes, or what is written as JSON."""
    policy = policy_of(policy) if isinstance(policy, Endpoint) else policy
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    item = decide(Facts(HOST, 443), build_generation(policy, 1)).reads(path)
    assert item is not None
    request = Request(method, path, parse_query(query))
    return verdict_on(policy, read_body(request, item.endpoint, headers, raw))


def say(where: Endpoint, message: Any) -> Verdict:
    """The verdict on a text message to a websocket endpoint."""
    raw = message if isinstance(message, bytes) else json.dumps(message).encode()
    return verdict_on(policy_of(where), read_message(Request("GET", "/graphql"), where, raw))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"query":"{viewer}","query":"{admin}"}', "twice"),
        (b'{"query":"{viewer}","Query":"mutation{x}"}', "case alone"),
        ('{"query":"{viewer}","extenſions":{}}'.encode(), "case alone"),
        ({"query": "{viewer}", "operationName": ["x"]}, "operationName is not a string"),
        ({"query": "query A{viewer} mutation B{x}"}, "multiple operations"),
        ({"query": "query A{viewer} mutation B{x}", "operationName": ""}, "multiple operations"),
        ({"query": "fragment F on Q {a}"}, "no operation"),
        ({"query": ""}, "expected an operation"),
        ({"query": "{viewer}", "extensions": []}, "not an object"),
        ({"query": "{viewer}", "extensions": {"persistedQuery": {"sha256Hash": "0" * 64}}}, "not that of the document"),
        ({"extensions": {"persistedQuery": {"SHA256Hash": "x", "sha256Hash": "y"}}}, "sha256Hash"),
        ({"id": "a", "queryId": "b"}, "must not be combined"),
        ({"id": "x" * 1025}, "too long"),
        ([{"query": "{viewer}"}, 1], "not a JSON object"),
        ([{"query": "{viewer}"}] * (graphql.MAX_BATCH + 1), "more than"),
        ({"query": "{viewer " + " ".join(f"f{n}" for n in range(graphql.MAX_FIELDS)) + "}"}, "root fields"),
        (b'"x"', "not a JSON object"),
        (b"  ", "empty"),
    ],
    ids=range(18),
)
def test_requests_that_servers_read_in_two_ways_are_refused(body: Any, why: str) -> None:
    """Under audit too; the plain request beside them is allowed."""
    audited = endpoint(enforcement="audit", rules=VIEWER.rules)
    assert ask(audited, {"query": "{viewer}", "variables": {"query": 1}, "operationName": None}).allow
    verdict = ask(audited, body)
    assert (verdict.reason_id, verdict.enforcement) == ("graphql_rejected", "enforce")
    assert verdict.reason.startswith("GraphQL request rejected: ") and why in verdict.reason


def test_the_url_may_not_say_otherwise_than_the_body() -> None:
    """Servers differ in which of the two they execute; parameters of other names are nobody's business."""
    body = {"query": "{viewer}", "operationName": None}
    assert ask(VIEWER, body, query="v=1").allow
    assert ask(VIEWER, body, query=urlencode({"query": "{viewer}"})).allow
    assert ask(VIEWER, body, query=urlencode({"query": "mutation{x}"})).reason_id == "graphql_rejected"
    assert ask(VIEWER, body, query="id=abc").reason_id == "graphql_rejected"


def test_operations_in_a_url() -> None:
    """GET carries its operation in parameters, once each, and no body."""
    good = urlencode({"query": "{viewer}"})
    assert ask(VIEWER, method="GET", query=good).allow
    assert not ask(VIEWER, method="GET", query=urlencode({"query": "mutation{viewer}"})).allow
    assert ask(VIEWER, method="GET", query=f"{good}&{good}").reason_id == "graphql_rejected"
    assert ask(VIEWER, b"{}", method="GET", query=good).reason_id == "graphql_rejected"
    assert ask(VIEWER, method="GET", query=urlencode({"extensions": "{"})).reason_id == "graphql_rejected"


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "text/plain", "application/graphql", "multipart/form-data"]
)
def test_a_body_that_is_also_a_form_is_refused(kind: str) -> None:
    """JSON that a server would read as a form is no JSON to it; sent as JSON it is allowed."""
    body = b'{"query":"{viewer}","variables":"&query=mutation{x}&"}'
    assert ask(VIEWER, body, headers=[("content-type", "application/graphql-response+json; charset=utf-8")]).allow
    with pytest.raises(BodyError):
        ask(VIEWER, body, headers=[("content-type", kind)])


def test_every_operation_of_a_batch_must_be_allowed() -> None:
    """One that is not denies all."""
    good = {"query": "{viewer}"}
    assert ask(VIEWER, [good, good]).allow
    assert ask(VIEWER, [good, {"query": "mutation{viewer}"}]).reason == "GraphQL operation blocked by endpoint policy"


def test_the_hint_names_the_operation_that_was_refused() -> None:
    """Type and fields of the first operation that no rule allows."""
    verdict = ask(VIEWER, [{"query": "{viewer}"}, {"query": "mutation{b a}"}])
    assert "`- allow: {operation_type: mutation, fields: [a, b]}`" in verdict.hint


def test_persisted_operations() -> None:
    """One that is registered is judged as what it was registered as; beside a document both must be allowed."""
    registry = (
        ("v", GraphqlOperation("query", "", ("viewer",))),
        ("m", GraphqlOperation("mutation", "", ("wipe",))),
    )
    where = endpoint(rules=VIEWER.rules, persisted_queries="allow_registered", graphql_persisted_queries=registry)
    digest = hashlib.sha256(b"{viewer}").hexdigest()
    assert ask(where, {"id": "v"}).allow and ask(where, {"query": "{viewer}", "id": "v"}).allow
    assert ask(where, {"id": "m"}).reason_id == "rule_not_matched"
    assert ask(where, {"query": "{viewer}", "id": "m"}).reason_id == "rule_not_matched"
    assert ask(where, {"id": "?"}).reason_id == "graphql_not_registered"
    assert ask(where, {"query": "{viewer}", "extensions": {"persistedQuery": {"sha256Hash": digest}}}).allow
    assert ask(where, {"extensions": {"persistedQuery": {"sha256Hash": digest}}}).reason_id == "graphql_not_registered"


def test_a_broad_rest_rule_lets_no_operation_through() -> None:
    """Rules on paths do not speak of operations, whatever the case in which the protocol's name is written."""
    broad = endpoint("rest", access="full")
    for protocol in ("graphql", "GRAPHQL"):
        narrow = endpoint(protocol, path="/graphql", rules=VIEWER.rules)
        assert ask(policy_of(broad, narrow), {"query": "{viewer}"}).allow
        assert ask(policy_of(broad, narrow), {"query": "{admin}"}).reason_id == "rule_not_matched"
    shouted = endpoint("GRAPHQL", access="read-only")  # gets REST rules, as upstream has it
    assert not ask(shouted, method="GET", query=urlencode({"query": "mutation{x}"})).allow


def test_handshakes() -> None:
    """A websocket endpoint takes nothing but a sound handshake, under audit too."""
    where = endpoint("websocket", access="read-only", enforcement="audit")
    assert ask(where, method="GET", headers=HANDSHAKE).allow
    lower = [(key, value.lower()) if key == "connection" else (key, value) for key, value in HANDSHAKE]
    assert ask(where, method="GET", headers=lower).allow
    bad = [HANDSHAKE[:at] + HANDSHAKE[at + 1 :] for at in range(4)]
    bad += [[*HANDSHAKE, field] for field in HANDSHAKE if field[0] != "connection"]
    bad += [[*HANDSHAKE[:3], ("sec-websocket-key", key)] for key in ("AAAA", "x" * 24, "")]
    for headers in bad:
        verdict = ask(where, method="GET", headers=headers)
        assert (verdict.reason_id, verdict.enforcement) == ("websocket_rejected", "enforce"), headers
    assert parse_handshake("POST", HANDSHAKE).error


def test_messages_are_judged_on_their_own() -> None:
    """A handshake that is allowed allows no message."""
    reading, writing = endpoint("websocket", access="read-only"), endpoint("websocket", access="read-write")
    assert ask(reading, method="GET", headers=HANDSHAKE).allow
    assert say(writing, b"hello").allow
    verdict = say(reading, b"hello")
    assert verdict.reason == "WEBSOCKET_TEXT /graphql not permitted by policy" and "WEBSOCKET_TEXT" in verdict.hint
    with pytest.raises(BodyError):
        parse_text(writing, b"x" * (MAX_TEXT_BYTES + 1))


GRAPHQL_SOCKET = endpoint(
    "websocket",
    enforcement="audit",
    rules=(L7Allow("GET", "/graphql"), L7Allow(operation_type="subscription", fields=("added",))),
    deny_rules=(L7Deny(operation_type="mutation"),),
)


def test_messages_with_operations() -> None:
    """Operations are judged, control messages pass, anything else is refused for good."""
    message = {"type": "subscribe", "id": "1", "payload": {"query": "subscription{added}"}}
    assert say(GRAPHQL_SOCKET, message).allow
    assert say(GRAPHQL_SOCKET, {"type": "ping"}).allow
    other = say(GRAPHQL_SOCKET, message | {"payload": {"query": "subscription{removed}"}})
    assert (other.reason_id, other.enforcement) == ("rule_not_matched", "audit")
    assert say(GRAPHQL_SOCKET, message | {"payload": {"query": "mutation{added}"}}).reason_id == "deny_rule"
    broken: list[Any] = [
        b"hi",
        b"[]",
        b'{"type":"ping","type":"subscribe"}',
        {"type": "ping", "Type": "start"},
        {"type": "Ping"},
    ]
    broken += [message | change for change in ({"id": ""}, {"id": 1}, {"payload": []}, {"payload": {}}, {"type": None})]
    for text in broken:
        verdict = say(GRAPHQL_SOCKET, text)
        assert (verdict.reason_id, verdict.enforcement) == ("websocket_rejected", "enforce"), text
        assert verdict.reason.startswith("GraphQL WebSocket message rejected: ")


def test_sql_passes_once_it_is_known_not_to_be_parsed() -> None:
    """As upstream: nobody parses it, so it passes; but only a request that was asked about as SQL, and no deny rule's."""
    where = endpoint("sql", access="full", enforcement="audit")
    assert verdict_on(policy_of(where), Request("GET", "/x", body=Unread("sql"))).allow
    assert verdict_on(policy_of(where), Request("GET", "/x")).reason_id == "protocol_not_built"
    beside = endpoint("rest", access="full", path="/x", deny_rules=(L7Deny("GET", "/x"),))
    assert ask(policy_of(where, beside), method="GET", path="/x").reason_id == "deny_rule"


operations = st.builds(
    graphql.GraphqlOperation,
    st.sampled_from(("query", "mutation")),
    st.sampled_from(("", "Get", 'a","allow":true,"')),
    st.sampled_from((("viewer",), ("admin",), ("admin", "viewer"), ("é",))),
) | st.sampled_from(("v", "m", "?")).map(lambda key: graphql.GraphqlOperation(key=key))
graphql_bodies = st.builds(
    GraphqlBody, st.lists(operations, max_size=3).map(tuple), st.sampled_from(("", "", "", "bad"))
)
bodies = (
    graphql_bodies
    | graphql_bodies.map(lambda body: WebSocketPart(graphql=body))
    | st.sampled_from(
        (WebSocketPart(), WebSocketPart(handshake=True), WebSocketPart(control="ping"), Unread("sql"), None)
    )
)
rules = st.sampled_from(
    [
        {"operation_type": kind, "operation_name": name, "fields": fields, "method": method, "path": method and "**"}
        for kind in ("", "query", "*", "Mutation")
        for name in ("", "G*", "[")
        for fields in ((), ("viewer",), ("*", "a"))
        for method in ("", "*", "POST")
    ]
)
endpoints = st.builds(
    endpoint,
    st.sampled_from(("graphql", "websocket", "graphql", "GRAPHQL", "rest", "sql")),
    enforcement=st.sampled_from(("enforce", "audit")),
    path=st.sampled_from(("", "/graphql", "/**")),
    access=st.sampled_from(("", "", "read-only", "full")),
    rules=st.lists(rules.map(lambda rule: L7Allow(**rule)), max_size=3).map(tuple),
    deny_rules=st.lists(rules.map(lambda rule: L7Deny(**rule)), max_size=1).map(tuple),
    persisted_queries=st.sampled_from(("", "allow_registered")),
    graphql_persisted_queries=st.just(
        (("v", GraphqlOperation("query", "", ("viewer",))), ("m", GraphqlOperation("mutation", "G")))
    ),
    host=st.sampled_from((HOST, "*.example.com", "other.example.com")),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(endpoints, min_size=1, max_size=3), bodies, st.sampled_from(("POST", "GET", "WEBSOCKET_TEXT")))
def test_narrowed_and_full_evaluation_agree(found: list[Endpoint], body: Any, method: str) -> None:
    """Index, memory and patterns instead of names are only about speed; of several operations each would be allowed alone."""
    policy = policy_of(*found)
    request = Request(method, "/graphql", body=body)
    verdict = verdict_on(policy, request)
    if verdict.allow and verdict.inspected and isinstance(body, GraphqlBody):
        for one in body.operations:
            assert verdict_on(policy, Request(method, "/graphql", body=GraphqlBody((one,)))).allow
    if not verdict.allow:
        engine = EmbeddedEngine(shipped_rules(), ("request_deny_reason",))
        generation = build_generation(policy, 1)
        facts = Facts(HOST, 443, request=request)
        text = document(facts, list(generation.index.all()), generation.index.rules, False, whole=True)
        assert engine.ask("request_deny_reason", text) == verdict.reason


@settings(max_examples=200, deadline=None)
@given(st.lists(endpoints, min_size=1, max_size=3), bodies, rules, st.integers(0, 2))
def test_a_deny_rule_never_turns_a_denial_into_an_allowance(
    found: list[Endpoint], body: Any, rule: dict[str, Any], at: int
) -> None:
    """Adding a deny rule on operations can only take away."""
    request = Request("POST", "/graphql", body=body)
    before = verdict_on(policy_of(*found), request)
    changed = [*found]
    place = min(at, len(found) - 1)
    changed[place] = endpoint(
        **{name: getattr(found[place], name) for name in Endpoint.__slots__}
        | {"deny_rules": (*found[place].deny_rules, L7Deny(**rule))}
    )
    assert before.allow or not verdict_on(policy_of(*changed), request).allow
