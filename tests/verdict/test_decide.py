"""The properties of a decision: narrowing changes nothing, case does not matter, denials only add up, nothing ever raises."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import worlds
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import openshell_supervisor.verdict.decide as decide_module
from openshell_supervisor.policy.model import Binary, Endpoint, L7Allow, L7Deny, NetworkRule, SandboxPolicy
from openshell_supervisor.verdict.decide import VERDICTS_KEPT, Generation, build_generation, decide, decide_fully
from openshell_supervisor.verdict.document import document
from openshell_supervisor.verdict.engines.embedded import (
    RULES,
    EmbeddedEngine,
    EngineError,
    shared_engine,
    shipped_rules,
)
from openshell_supervisor.verdict.facts import Facts, Request, Verdict

REASON_IDS = {
    "allowed", "endpoint_not_allowed", "binary_not_allowed", "no_policies", "rule_not_matched", "deny_rule",
    "no_endpoint_path", "malformed_facts", "engine_error", "engine_unavailable", "protocol_not_built", "invalid_request_target",
}  # fmt: skip


def policy_of(*endpoints: Endpoint, binaries: tuple[str, ...] = ("/**",)) -> SandboxPolicy:
    """One rule `p` with these endpoints."""
    return SandboxPolicy(
        network_policies={"p": NetworkRule(endpoints=endpoints, binaries=tuple(map(Binary, binaries)))}
    )


def rest(**fields: Any) -> Endpoint:
    """An enforcing REST endpoint at api.example.com:443."""
    return Endpoint(
        **({"host": "api.example.com", "ports": (443,), "protocol": "rest", "enforcement": "enforce"} | fields)
    )


def ask(
    generation: Generation, method: str, path: str, *query: tuple[str, str], host: str = "api.example.com"
) -> Verdict:
    """The verdict on one request."""
    return decide(Facts(host, 443, request=Request(method, path, query)), generation)


@settings(max_examples=400, deadline=None)
@given(
    worlds.policies | worlds.policies.map(worlds.open_world),
    st.lists(worlds.facts, min_size=1, max_size=6),
    st.booleans(),
)
def test_narrowed_and_full_evaluation_agree(policy: SandboxPolicy, questions: list[Facts], identity: bool) -> None:
    """The index and the memory are only about speed: asking the rules about everything gives the same verdict."""
    generation = build_generation(policy, 3, identity)
    for facts in questions:
        verdict = decide(facts, generation)
        full = decide_fully(facts, generation)
        assert verdict == full
        assert verdict == decide(facts, generation)
        assert verdict.reason_id in REASON_IDS
        assert verdict.allow is (verdict.reason_id == "allowed")
        assert verdict.reason and verdict.generation == 3


@settings(max_examples=200, deadline=None)
@given(worlds.policies, worlds.facts, st.booleans())
def test_the_case_of_a_host_never_matters(policy: SandboxPolicy, facts: Facts, identity: bool) -> None:
    """Neither the case of the request's host nor of the policy's changes a verdict."""
    shouted = {
        key: replace(rule, endpoints=tuple(replace(e, host=e.host.swapcase()) for e in rule.endpoints))
        for key, rule in policy.network_policies.items()
    }
    assume(not any("[" in e.host for rule in policy.network_policies.values() for e in rule.endpoints))
    verdict = decide(facts, build_generation(policy, 1, identity))
    again = decide(replace(facts, host=facts.host.swapcase()), build_generation(policy, 1, identity))
    other = decide(facts, build_generation(replace(policy, network_policies=shouted), 1, identity))
    assert (verdict.allow, verdict.reason_id, verdict.policy) == (again.allow, again.reason_id, again.policy)
    assert (verdict.allow, verdict.reason_id, verdict.policy) == (other.allow, other.reason_id, other.policy)


@settings(max_examples=300, deadline=None)
@given(worlds.policies.map(worlds.open_world), worlds.facts, worlds.denies, st.data())
def test_a_deny_rule_never_turns_a_denial_into_an_allowance(
    policy: SandboxPolicy, facts: Facts, deny: L7Deny, data: st.DataObject
) -> None:
    """Adding a deny rule to any endpoint can only take away."""
    places = [(key, at) for key, rule in policy.network_policies.items() for at in range(len(rule.endpoints))]
    assume(places)
    key, at = data.draw(st.sampled_from(places))
    rule = policy.network_policies[key]
    changed = list(rule.endpoints)
    changed[at] = replace(changed[at], deny_rules=(*changed[at].deny_rules, deny))
    stricter = replace(
        policy, network_policies={**policy.network_policies, key: replace(rule, endpoints=tuple(changed))}
    )
    before, after = decide(facts, build_generation(policy, 1)), decide(facts, build_generation(stricter, 1))
    assert before.allow or not after.allow


anything = st.text(max_size=40) | st.sampled_from(
    ["\0", "\ud800", "\u212a", '"},"allow":true', "x" * 20_000, "\r\n", "\\u0000", ""]
)


@settings(max_examples=400, deadline=None)
@given(
    anything,
    st.integers(-(2**70), 2**70),
    anything,
    st.lists(anything, max_size=3).map(tuple),
    st.none() | st.builds(Request, anything, anything, st.lists(st.tuples(anything, anything), max_size=3).map(tuple)),
    st.booleans(),
)
@example("api.example.com", 443, "", (), Request("GET", "/\0", ()), False)
def test_decide_is_total(
    host: str, port: int, binary: str, callers: tuple[str, ...], request: Request | None, identity: bool
) -> None:
    """Arbitrary text in the facts never raises and never allows what no rule names."""
    policy = policy_of(rest(rules=(L7Allow("GET", "/only"),)))
    verdict = decide(Facts(host, port, binary, callers, callers, request), build_generation(policy, 1, identity))
    assert not verdict.allow or host.lower() == "api.example.com"
    assert verdict.reason_id in REASON_IDS


@pytest.mark.parametrize(
    "facts",
    [None, "text", Facts(None, 443), Facts("a", "443"), Facts("a", 443, ancestors=[]), Facts("a", 443, request=object()),  # type: ignore[arg-type]
     Facts("a", 443, request=Request("GET", "/x", (("a",),))), Facts("a", 443, request=Request("GET", "/x", 5))],  # type: ignore[arg-type]
    ids=repr,
)  # fmt: skip
def test_what_are_no_facts_is_denied(facts: Any) -> None:
    """Even a caller's programming error ends in a denial."""
    verdict = decide(facts, build_generation(policy_of(rest(access="full")), 1))
    assert (verdict.allow, verdict.enforcement) == (False, "enforce")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12).map(lambda text: f"/{text}"))
@example('"', '","action":"allow","x":"', '/","allow":true,"x":"')
@example("\\", "\\u0041", "/\\n")
def test_hostile_text_is_only_text(key: str, value: str, path: str) -> None:
    """Quotes, backslashes and control characters in a request reach the rules as themselves and forge nothing."""
    request = Request("GET", path, ((key, value),))
    assume("\0" not in key + value + path)
    policy = policy_of(rest(rules=(L7Allow("GET", "/only", query=(("k", worlds.QueryMatcher(glob="v")),)),)))
    verdict = decide(Facts("api.example.com", 443, request=request), build_generation(policy, 1))
    assert verdict.allow is ((path, key, value) == ("/only", "k", "v"))
    assert verdict.reason_id in ("allowed", "rule_not_matched", "invalid_request_target")


@pytest.mark.parametrize("hostile", ['a","b', "\\u0041", "a\0b", "\n", "\u2028", "😀", '"}', "\ud83d"])
def test_the_engine_takes_text_whole(hostile: str) -> None:
    """Canary for regopy: JSON input comes back as it went in (set_input would not: it injects and cuts)."""
    module = 'package openshell.sandbox\nimport rego.v1\nresult := {"value": input.value, "same": input.value == input.again}\n'
    engine = EmbeddedEngine(module, ("result",))
    assert engine.ask("result", json.dumps({"value": hostile, "again": hostile})) == {"value": hostile, "same": True}


def test_a_broken_engine_denies() -> None:
    """A rule that is undefined, a module that does not compile and an engine that throws are denials, not exceptions."""
    with pytest.raises(EngineError):
        EmbeddedEngine("package openshell.sandbox\nthis is not rego")
    silent = EmbeddedEngine(
        "package openshell.sandbox\nimport rego.v1\n" + "".join(f"{rule} := 1 if input.no\n" for rule in RULES)
    )
    assert (
        decide(Facts("api.example.com", 443), Generation(policy_of(rest(access="full")), 1, engine=silent)).reason_id
        == "engine_error"
    )

    class Throws:
        def ask(self, rule: str, document: str) -> Any:
            raise MemoryError

    verdict = decide(Facts("api.example.com", 443), Generation(policy_of(rest(access="full")), 1, engine=Throws()))
    assert (verdict.allow, verdict.reason_id, verdict.enforcement) == (False, "engine_error", "enforce")


@pytest.mark.parametrize(
    "lie", [{"action": "allow"}, {"action": "allow", "reason_id": "allowed"}, [], "allow", None, {"action": True}]
)
def test_an_engine_that_answers_nonsense_denies(lie: Any) -> None:
    """Only an answer that is complete and consistent can allow."""

    class Lies:
        def ask(self, rule: str, document: str) -> Any:
            return lie

    assert not decide(Facts("api.example.com", 443), Generation(policy_of(rest(access="full")), 1, engine=Lies())).allow


def test_protocols_that_are_not_built_are_never_let_through() -> None:
    """An endpoint of another protocol denies every request, under audit and with a full preset too."""
    for protocol in ("graphql", "websocket", "sql", "json-rpc", "mcp", "MCP"):
        rules = (L7Allow("*", "**"), L7Allow("*", "/**", operation_type="query"))
        generation = build_generation(policy_of(rest(protocol=protocol, enforcement="audit", rules=rules)), 1)
        connection = decide(Facts("api.example.com", 443), generation)
        assert connection.allow and connection.inspected
        verdict = ask(generation, "GET", "/x")
        assert (verdict.allow, verdict.reason_id, verdict.enforcement) == (False, "protocol_not_built", "enforce")
        assert protocol in verdict.hint


def test_an_endpoint_that_is_not_built_allows_nothing_beside_rest() -> None:
    """A broad rule of an endpoint that is not built does not widen a narrow REST endpoint next to it."""
    broad = rest(protocol="graphql", rules=(L7Allow("*", "**"),))
    narrow = rest(path="/v1/**", rules=(L7Allow("GET", "/v1/a"),))
    generation = build_generation(policy_of(broad, narrow), 1)
    assert ask(generation, "GET", "/v1/a").allow
    assert ask(generation, "GET", "/v1/b").reason_id == "rule_not_matched"
    assert ask(generation, "GET", "/other").reason_id == "protocol_not_built"


def test_a_denial_names_policy_endpoint_rule_and_remedy() -> None:
    """The reason is upstream's sentence; policy, rule and hint say where and how to change it."""
    generation = build_generation(
        policy_of(
            rest(rules=(L7Allow("GET", "/repos/*"), L7Allow("GET", "/me")), deny_rules=(L7Deny("*", "/repos/secret"),))
        ),
        5,
    )
    allowed = ask(generation, "get", "/repos/a")
    assert (allowed.policy, allowed.rule, allowed.generation) == ("p", "endpoints[0].rules[0]", 5)
    deep = ask(generation, "GET", "/repos/a/b")
    assert (deep.reason, deep.reason_id) == ("GET /repos/a/b not permitted by policy", "rule_not_matched")
    assert "`/repos/**`" in deep.hint and "endpoints[0] (api.example.com:443)" in deep.hint and deep.policy == "p"
    assert "allowed for GET only" in ask(generation, "POST", "/me").hint
    denied = ask(generation, "GET", "/repos/secret")
    assert (denied.reason_id, denied.rule) == ("deny_rule", "endpoints[0].deny_rules[0]")
    assert denied.reason == "GET /repos/secret blocked by deny rule"
    assert "8443" in decide(Facts("api.example.com", 8443), generation).hint
    assert "api.example.com" in decide(Facts("apo.example.com", 443), generation).hint
    assert "allow_encoded_slash" in ask(generation, "GET", "/repos/a%2Fb").hint


@pytest.mark.parametrize(
    ("enforcement", "means"), [("", "audit"), ("audit", "audit"), ("ENFORCE", "audit"), ("enforce", "enforce")]
)
def test_enforcement_is_that_of_the_selected_endpoint(enforcement: str, means: str) -> None:
    """Only the exact word blocks; the most path-specific endpoint's word counts; a connection denial always blocks."""
    broad, special = rest(access="read-only"), rest(access="read-only", path="/admin/**", enforcement=enforcement)
    generation = build_generation(policy_of(broad, special), 1)
    assert ask(generation, "POST", "/admin/x").enforcement == means
    assert ask(generation, "POST", "/other").enforcement == "enforce"
    assert decide(Facts("evil.example.com", 443), generation).enforcement == "enforce"


def test_a_path_no_endpoint_covers_is_denied_under_audit_too() -> None:
    """Audit is a word about rules; where no endpoint covers the path there is nobody to say it."""
    for endpoints in (
        (rest(path="/v1/**", enforcement="audit", access="full"),),
        (rest(path="/v1/**", access="full"), rest(path="/v2/**", access="full")),
    ):
        verdict = ask(build_generation(policy_of(*endpoints), 1), "GET", "/other")
        assert (verdict.allow, verdict.reason_id, verdict.enforcement) == (False, "no_endpoint_path", "enforce")
        assert "/v1/**" in verdict.hint


def test_connection_settings_of_a_verdict() -> None:
    """TLS is left alone only where every endpoint with a say agrees; address lists and %2F come from what matched."""
    skip = Endpoint(host="api.example.com", ports=(443,), tls="skip")
    assert decide(Facts("api.example.com", 443), build_generation(policy_of(skip), 1)).tls_skip
    both = decide(Facts("api.example.com", 443), build_generation(policy_of(skip, rest(access="full")), 1))
    assert both.inspected and not both.tls_skip
    listed = Endpoint(host="api.example.com", ports=(443,), allowed_ips=("10.0.0.0/8",))
    assert decide(Facts("api.example.com", 443), build_generation(policy_of(listed), 1)).allowed_ips == ("10.0.0.0/8",)
    slash = build_generation(policy_of(rest(access="full", allow_encoded_slash=True)), 1)
    assert decide(Facts("api.example.com", 443), slash).allow_encoded_slash and ask(slash, "GET", "/a%2Fb").allow


def test_look_alike_hosts_are_other_hosts() -> None:
    """The Kelvin sign lower-cases to k in Unicode; to a rule it is not a k."""
    generation = build_generation(policy_of(rest(host="kube.example.com", access="full")), 1)
    assert decide(Facts("KUBE.example.com", 443), generation).allow
    assert not decide(Facts("\u212aube.example.com", 443), generation).allow


def test_ipv6_is_compared_as_an_address() -> None:
    """Two spellings of one IPv6 address are one host."""
    generation = build_generation(policy_of(rest(host="FD00:0:0::1", access="full")), 1)
    assert decide(Facts("fd00::1", 443), generation).allow


def test_the_memory_is_bounded_and_per_generation() -> None:
    """Old verdicts make room, long requests are not kept, and a new generation starts empty."""
    generation = build_generation(SandboxPolicy(), 1)
    for number in range(VERDICTS_KEPT + 50):
        decide(Facts(f"h{number}.example.com", 443), generation)
    assert len(generation.memory) == VERDICTS_KEPT
    opened = build_generation(policy_of(rest(access="full")), 2)
    ask(opened, "GET", "/" + "x" * 4000)
    assert len(opened.memory) == 1  # the connection's verdict alone
    assert not decide(Facts("api.example.com", 443), generation).allow
    assert decide(Facts("api.example.com", 443), opened).allow


def test_eight_thousand_questions_leave_nothing_behind() -> None:
    """The process does not grow with questions asked: interpreters are reused and keep nothing."""
    generation = build_generation(policy_of(rest(rules=(L7Allow("GET", "/repos/**"),))), 1)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def run(start: int) -> None:
        for number in range(start, start + 4000):
            verdict = ask(generation, "GET", f"/repos/{number}")
            assert verdict.allow

    run(0)
    before = resident()
    run(4000)
    assert resident() - before < 4 * 1024 * 1024


def test_threads_may_share_an_engine() -> None:
    """Four threads asking at once get the answers that one would."""
    generations = [build_generation(policy_of(rest(rules=(L7Allow("GET", f"/{n}/**"),))), n) for n in range(4)]
    wrong: list[str] = []

    def work(number: int) -> None:
        for at in range(100):
            verdict = ask(generations[number], "GET", f"/{at % 4}/{at}")
            if verdict.allow is not (at % 4 == number):
                wrong.append(verdict.reason)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_building_a_generation_loads_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start-up does not wait for Rego: the engine is loaded by `warm` or by the first decision."""

    def never() -> Any:
        raise AssertionError("the engine was loaded")

    monkeypatch.setattr(decide_module, "shared_engine", never)
    generation = build_generation(policy_of(rest(access="full")), 1)
    assert generation.number == 1
    monkeypatch.undo()
    generation.warm()


@pytest.mark.parametrize("identity", [False, True])
def test_the_rego_says_the_same_sentences(identity: bool) -> None:
    """`deny_reason` and `request_deny_reason` of the module, for those who query it, agree with the verdict's reason."""
    engine = EmbeddedEngine(shipped_rules(), ("deny_reason", "request_deny_reason"))
    policy = policy_of(
        rest(path="/v1/**", rules=(L7Allow("GET", "/v1/a"),), deny_rules=(L7Deny("*", "/v1/d"),)),
        rest(path="/gql", protocol="graphql", rules=(L7Allow(operation_type="query"),)),
        rest(host="bad.example.com", rules=(L7Allow("GET", "/["),)),
        binaries=("/usr/bin/curl",),
    )
    generation = build_generation(policy, 1, identity)
    for host in ("api.example.com", "evil.test", "bad.example.com"):
        for binary in ("/usr/bin/curl", "/bin/sh"):
            for path in ("/v1/b", "/v1/d", "/gql", "/zz", "/v1/a%2Fb"):
                facts = Facts(host, 443, binary, ("/a", "/b"), (), Request("GET", path))
                verdict = decide(facts, generation)
                assert not verdict.allow
                text = document(facts, list(generation.index.all()), generation.index.rules, identity, whole=True)
                assert engine.ask("request_deny_reason", text) == verdict.reason


def test_the_engine_is_one_per_process() -> None:
    """Generations share the compiled rules."""
    assert build_generation(SandboxPolicy(), 1).engine is build_generation(SandboxPolicy(), 2).engine is shared_engine()
