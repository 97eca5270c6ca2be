"""Upstream's verdicts: the cases of the shared policy corpus whose features are built.

One table says which cases are not run yet and why; everything that is run must agree, but for the deviations listed here, each of
which is stricter than upstream.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from openshell_supervisor.errors import PolicyError
from openshell_supervisor.policy.model import Endpoint
from openshell_supervisor.policy.yaml_file import LoadedPolicy, parse
from openshell_supervisor.verdict.bodies.read import read_body, read_message
from openshell_supervisor.verdict.bodies.wire import BodyError
from openshell_supervisor.verdict.decide import build_generation, decide
from openshell_supervisor.verdict.facts import Facts, Request, TargetError, Verdict, canonical_target, parse_query

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "reference" / "policy_cases.jsonl"

STRICTER = {
    "path-invalid-glob-forward-audit-passes": "an evaluation error denies, also under audit",
    "canon-forward-bad-query-becomes-empty": "an undecodable query is refused on every transport",
}
HANDSHAKE = {
    "upgrade": "websocket",
    "connection": "keep-alive, Upgrade",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def cases() -> list[dict[str, Any]]:
    """The corpus, or nothing where it is absent (the test below then says so)."""
    if not CORPUS.exists():
        return []
    return [json.loads(line) for line in CORPUS.read_text("utf-8").splitlines() if line.strip()]


def why_not(case: dict[str, Any]) -> str:
    """Why a case is not run yet, or an empty string."""
    group = case["group"]
    if group in ("authority", "middleware") and case["kind"] != "validate":
        return f"{group}: in proxy/"
    return ""


RUN = [case for case in cases() if not why_not(case)]


def load(case: dict[str, Any]) -> LoadedPolicy:
    """The policy of a case through our YAML reader, as the user of a gateway wrote it, or as the data of --policy-rules."""
    text = yaml.safe_dump(case["policy"], sort_keys=False, allow_unicode=True)
    return parse(text, case["id"], files=case["input"].get("pipeline") == "files")


def test_the_corpus_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    """The corpus is read, most of it is run, and what is not run is listed with its reason."""
    if not CORPUS.exists():
        if os.environ.get("CI"):
            pytest.fail("../shared/reference/policy_cases.jsonl is missing")
        pytest.skip("../shared/reference/policy_cases.jsonl is missing")
    everything = cases()
    table = Counter((why_not(case) or "run", case["group"]) for case in everything)
    with capsys.disabled():
        print(f"\npolicy corpus: {len(RUN)} of {len(everything)} cases run; not run yet:")
        for (reason, group), count in sorted(table.items()):
            if reason != "run":
                print(f"  {count:4d}  {group:<18} {reason}")
        print("  (ssrf: the policy's part is run here, the destination's in proxy/)")
    assert len(everything) >= 400
    assert len(RUN) >= 467


@pytest.mark.parametrize("case", [c for c in RUN if c["kind"] == "validate"], ids=lambda c: c["id"])
def test_validation(case: dict[str, Any]) -> None:
    """A policy loads or is refused as upstream does it, with upstream's words in the message."""
    expect = case["expect"]
    if "error" in expect:
        with pytest.raises(PolicyError) as caught:
            load(case)
        texts = [problem.message for problem in caught.value.problems]
        assert any(expect["error"] in text for text in texts), texts
        assert all(problem.code and problem.line for problem in caught.value.problems)
        return
    loaded = load(case)
    texts = [problem.message for problem in loaded.warnings]
    wanted = [*([expect["warning"]] if "warning" in expect else []), *expect.get("warnings", [])]
    for text in wanted:
        assert any(text in message for message in texts), (text, texts)


@pytest.mark.parametrize("case", [c for c in RUN if c["kind"] == "l4"], ids=lambda c: c["id"])
def test_connections(case: dict[str, Any]) -> None:
    """The verdict on a connection is upstream's, and so are its reason and the rule that decided."""
    verdict, expect = connection(case), case["expect"]
    # Where the case goes on to the destination stage (proxy/ tests that), `allow` is the outcome of both.
    assert verdict.allow is expect.get("policy_allow", expect["allow"])
    if "policy_allow" in expect:
        return
    if "matched_policy" in expect:
        assert verdict.policy == expect["matched_policy"]
    if "exact_declared_host" in expect:
        assert verdict.exact_host is expect["exact_declared_host"]
    if "endpoint_configs" in expect:
        assert sum(item.endpoint.extended for item in verdict.endpoints) == expect["endpoint_configs"]
    check_reason(verdict.reason, expect)


@pytest.mark.parametrize("case", [c for c in RUN if c["kind"] == "l7"], ids=lambda c: c["id"])
def test_requests(case: dict[str, Any]) -> None:
    """The verdict on a request is upstream's: canonical path, decision, reason, and what enforcement makes of a denial."""
    given, expect = case["input"], case["expect"]
    verdict = connection(case)
    if not verdict.allow:
        assert expect["stage"] == "l4" and not expect["allow"]
        check_reason(verdict.reason, expect)
        return
    try:
        path, raw = canonical_target(given["target"], allow_encoded_slash=verdict.allow_encoded_slash)
        query = parse_query(raw)
    except TargetError as error:
        if case["id"] in STRICTER:
            return
        assert expect["stage"] == "parse" and expect["error"] in error.message
        return
    assert path == expect.get("canonical_path", path)
    item = verdict.reads(path)
    try:
        request = read(given, Request(given["method"], path, query), item.endpoint if item else None)
    except BodyError as error:
        assert expect["stage"] == "parse" and expect["error"] in error.message
        return
    verdict = decide(facts(case, request), generation(case))
    assert verdict.allow is expect["allow"]
    if expect["stage"] == "parse":
        assert expect["error"] in verdict.reason
        return
    forwarded = verdict.allow or verdict.enforcement == "audit"
    if case["id"] in STRICTER:
        assert expect["forwarded"] and not forwarded
        return
    assert forwarded is expect["forwarded"]
    if not expect["allow"]:
        check_reason(verdict.reason, expect)
    if verdict.inspected and verdict.allow and expect["stage"] == "policy":
        assert verdict.rule
    if expect["stage"] == "control":
        assert verdict.reason == expect["reason"]
    assert item is None or item.endpoint.protocol.lower() == expect.get("protocol", item.endpoint.protocol.lower())


def read(given: dict[str, Any], request: Request, endpoint: Endpoint | None) -> Request:
    """The request of a case as its endpoint reads it: with its body, as a handshake, or as the message after one."""
    if endpoint is None:
        return request
    if "websocket_text" in given and endpoint.protocol == "websocket":
        return read_message(request, endpoint, given["websocket_text"].encode())
    fields = given.get("headers", {})
    if "websocket_text" in given or given.get("websocket_upgrade"):
        fields = fields | HANDSHAKE
    return read_body(request, endpoint, list(fields.items()), given.get("body", "").encode())


def check_reason(reason: str, expect: dict[str, Any]) -> None:
    """Upstream's wording, whole or in part."""
    if "reason" in expect and not expect["allow"]:
        assert reason == expect["reason"]
    if "reason_contains" in expect:
        assert expect["reason_contains"] in reason


def facts(case: dict[str, Any], request: Request | None = None) -> Facts:
    """The facts of a case."""
    given = case["input"]
    relaxed = given.get("relaxed_binary_identity", False)
    binary = given.get("binary", "" if relaxed else "/usr/bin/curl")
    callers = tuple(given.get("ancestors", ())), tuple(given.get("cmdline", ()))
    return Facts(given["host"], given["port"], binary, *callers, request=request)


def generation(case: dict[str, Any]) -> Any:
    """A generation with binary identity as the case has it."""
    return build_generation(load(case).policy, 7, not case["input"].get("relaxed_binary_identity", False))


def connection(case: dict[str, Any]) -> Verdict:
    """The verdict on a case's connection."""
    return decide(facts(case), generation(case))
