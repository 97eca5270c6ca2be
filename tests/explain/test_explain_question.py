"""One question on the command line: the verdict, its surroundings, the nearest rule, and exit codes that a script can use."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "verdict"))

import worlds

from openshell_supervisor.errors import PolicyError, SettingsError
from openshell_supervisor.explain.command import explain
from openshell_supervisor.explain.nearest import nearest
from openshell_supervisor.explain.question import Question, ask
from openshell_supervisor.verdict.decide import build_generation, decide

POLICY = """
version: 1
network_policies:
  api:
    endpoints:
      - host: api.explain.test
        port: 443
        protocol: rest
        enforcement: enforce
        rules:
          - allow: {method: GET, path: "/v1/**"}
          - allow: {method: POST, path: /v1/items, query: {dry: "true"}}
        deny_rules:
          - {method: "*", path: /v1/secret}
      - {host: watched.explain.test, port: 443, protocol: rest, enforcement: audit, access: read-only}
      - {host: "*.cdn.explain.test", port: 443}
    binaries: [{path: /usr/bin/curl}]
"""


@pytest.fixture
def policy(tmp_path: pathlib.Path) -> str:
    """The policy above, as a file."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return str(path)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the object of `explain --json`."""
    code = explain([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def request(policy: str, method: str, path: str, host: str = "api.explain.test") -> list[str]:
    """The arguments of a question about a request."""
    return ["--policy", policy, "--host", host, "--port", "443", "--method", method, "--path", path]


def test_an_allowed_request(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, the rule that decided, and no nearest rule: there is nothing to mend."""
    code, found = told(capsys, *request(policy, "GET", "/v1/a?x=1"))
    assert (code, found["allow"], found["outcome"]) == (0, True, "allowed")
    assert (found["matched_policy"], found["matched_rule"]) == ("api", "endpoints[0].rules[0]")
    assert found["nearest"] is None


@pytest.mark.parametrize(
    ("method", "path", "reason_id", "rule", "fields"),
    [
        ("DELETE", "/v1/a", "rule_not_matched", "endpoints[0].rules[0]", ["method"]),
        ("GET", "/v2", "rule_not_matched", "endpoints[0].rules[0]", ["path"]),
        ("POST", "/v1/items?dry=no", "rule_not_matched", "endpoints[0].rules[1]", ["query"]),
        ("POST", "/v1/items", "rule_not_matched", "endpoints[0].rules[1]", ["query"]),
        ("GET", "/v1/secret", "deny_rule", "endpoints[0].rules[0]", ["deny rule"]),
    ],
)
def test_the_nearest_rule_of_a_request(
    policy: str,
    capsys: pytest.CaptureFixture[str],
    method: str,
    path: str,
    reason_id: str,
    rule: str,
    fields: list[str],
) -> None:
    """A denied request names the rule that almost allowed it and exactly what differs."""
    code, found = told(capsys, *request(policy, method, path))
    assert (code, found["outcome"], found["reason_id"]) == (1, "blocked", reason_id)
    assert found["nearest"]["rule"] == rule
    assert [item["field"] for item in found["nearest"]["differs"]] == fields


@pytest.mark.parametrize(
    ("host", "port", "binary", "place", "fields"),
    [
        ("api.explian.test", "443", "/usr/bin/curl", "api.explain.test:443", ["host"]),
        ("x.cdn.explain.test", "80", "/usr/bin/curl", "*.cdn.explain.test:443", ["port"]),
        ("x.cdn.explain.test", "443", "/usr/bin/wget", "*.cdn.explain.test:443", ["binary"]),
    ],
)
def test_the_nearest_rule_of_a_connection(
    policy: str,
    capsys: pytest.CaptureFixture[str],
    host: str,
    port: str,
    binary: str,
    place: str,
    fields: list[str],
) -> None:
    """A misspelt host, another port, another program: each is named as the one thing that differs."""
    code, found = told(capsys, "--policy", policy, "--host", host, "--port", port, "--binary", binary)
    assert (code, found["outcome"]) == (1, "blocked")
    assert found["nearest"]["place"] == place
    assert [item["field"] for item in found["nearest"]["differs"]] == fields


def test_the_nearest_host_of_many(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Among 300 hosts the misspelt one is found, wherever it stands."""
    hosts = [*(f"n{number}.many.test" for number in range(300)), "artifacts.internal.test"]
    endpoints = ", ".join(f"{{host: {host}, port: 443}}" for host in hosts)
    text = f"version: 1\nnetwork_policies: {{p: {{endpoints: [{endpoints}], binaries: [{{path: '/**'}}]}}}}\n"
    (tmp_path / "p.yaml").write_text(text)
    asked = ("--policy", str(tmp_path / "p.yaml"), "--port", "443", "--host")
    assert told(capsys, *asked, "artefacts.internal.test")[1]["nearest"]["place"] == "artifacts.internal.test:443"
    assert told(capsys, *asked, "n299.mani.test")[1]["nearest"]["place"] == "n299.many.test:443"


def test_audit_is_not_allowed_and_passes(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What audit lets through is no for a script (exit code 1) and `audited` for a reader; its neighbour is allowed."""
    code, found = told(capsys, *request(policy, "DELETE", "/", "watched.explain.test"))
    assert (code, found["allow"], found["outcome"]) == (1, False, "audited")
    assert "lets it pass and logs" in found["proxy"]
    assert told(capsys, *request(policy, "GET", "/", "watched.explain.test"))[0] == 0


def test_what_the_proxy_refuses_before_any_rule(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A target that climbs out of the root is `rejected` (400); its neighbour that stays inside is judged, canonical."""
    code, found = told(capsys, *request(policy, "GET", "/v1/../../x"))
    assert (code, found["outcome"], found["reason_id"]) == (1, "rejected", "invalid_request_target")
    code, found = told(capsys, *request(policy, "GET", "/v1/b/../a//%63"))
    assert (code, found["canonical_path"]) == (0, "/v1/a/c")


def test_an_address_is_checked_where_it_is_named(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--address` gets the proxy's check; without it names are not looked up. A host that is an address is checked always."""
    base = ["--policy", policy, "--host", "x.cdn.explain.test", "--port", "443"]
    assert told(capsys, *base)[0] == 0
    assert told(capsys, *base, "--address", "1.1.1.1")[0] == 0
    code, found = told(capsys, *base, "--address", "10.1.2.3")
    assert (code, found["stage"], found["reason_id"]) == (1, "address", "ssrf_denied")


def test_the_text_says_what_the_json_says(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """For a person: outcome first, then reason, candidates, nearest rule, hint; nothing that drives a terminal."""
    assert explain(request(policy, "DELETE", "/v1/\x1b[31m".replace("\x1b", "%1B"))) == 1
    assert explain(request(policy, "DELETE", "/v1/a")) == 1
    out = capsys.readouterr().out
    for text in (
        "blocked: DELETE /v1/a",
        "rule_not_matched",
        "candidate  api, endpoints[0]",
        "nearest    api",
        "asked DELETE",
    ):
        assert text in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--policy", "p"],
        ["--policy", "p", "--host", "h"],
        ["--policy", "p", "--host", "h", "--port", "0"],
        ["--policy", "p", "--host", "h", "--port", "65536"],
        ["--policy", "p", "--host", "h", "--port", "٣"],
        ["--policy", "p", "--host", "h", "--port", "1", "--method", "GET"],
        ["--policy", "p", "--host", "h", "--port", "1", "--method", "GET", "--path", "v1"],
        ["--policy", "p", "--host", "h", "--port", "1", "--address", "here"],
        ["--policy", "p", "--host", "h", "--port", "1", "--ancestor", "/bin/sh"],
        ["--policy", "p", "--cases", "c"],
        ["--replay", "r"],
        ["--policy", "p", "--replay", "r", "--host", "h"],
        ["--nonsense"],
    ],
)
def test_a_question_that_makes_no_sense(arguments: list[str]) -> None:
    """Exit code 2 and one line that says what is wrong; no file is opened before."""
    with pytest.raises(SettingsError) as caught:
        explain(arguments)
    assert (caught.value.exit_code, caught.value.code) == (2, "usage")


def test_a_policy_that_cannot_be_used(tmp_path: pathlib.Path) -> None:
    """Exit code 2, never a verdict."""
    (tmp_path / "p.yaml").write_text("version: one\n")
    for name in ("p.yaml", "absent.yaml"):
        with pytest.raises(PolicyError) as caught:
            explain(["--policy", str(tmp_path / name), "--host", "a.test", "--port", "1"])
        assert caught.value.exit_code == 2


def test_a_reader_that_leaves_early(policy: str) -> None:
    """`explain | head -0` ends without a traceback."""
    arguments = ["--policy", policy, "--host", "a.test", "--port", "1"]
    program = f"from openshell_supervisor.explain.command import explain; explain({arguments})"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr and done.stderr == ""


@settings(max_examples=300, deadline=None)
@given(worlds.policies, worlds.facts, st.booleans())
def test_the_nearest_rule_keeps_its_word(policy: Any, facts: Any, identity: bool) -> None:
    """Where a nearest rule is named with an example, `decide` allows the example, and what does not differ was left alone."""
    generation = build_generation(policy, 1, identity)
    verdict = decide(facts, generation)
    found = None if verdict.allow else nearest(facts, verdict, generation)
    if found is None:
        return
    fields = {item.field for item in found.differs}
    if found.example is None:
        assert fields == {"deny rule"}
        return
    assert decide(found.example, generation).allow
    assert fields
    assert found.example.port == facts.port or "port" in fields
    assert found.example.host == facts.host or "host" in fields
    assert found.example.binary == facts.binary or "binary" in fields


@settings(max_examples=300, deadline=None)
@given(worlds.policies, st.text(max_size=20), st.integers(-1, 70000), st.text(max_size=8), st.text(max_size=30))
def test_no_question_is_too_odd(policy: Any, host: str, port: int, method: str, target: str) -> None:
    """Whatever is asked, there is an answer; it is never an exception, and never yes for what is no host."""
    generation = build_generation(policy, 1)
    for way in ("connect", "forward"):
        answer = ask(Question(host, port, method, target, way), generation)
        assert answer.outcome in ("allowed", "blocked", "audited", "rejected")
        assert answer.reason and answer.reason_id
