"""The data of --policy-rules: what upstream's file loader takes and refuses otherwise than a gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from openshell_supervisor.errors import PolicyError
from openshell_supervisor.policy.model import QueryMatcher
from openshell_supervisor.policy.yaml_file import LoadedPolicy, load, parse


def policy(endpoint: str) -> str:
    return f"""version: 1
network_policies:
  p:
    endpoints:
      - {{host: api.example.com, port: 443, {endpoint}}}
    binaries: [{{path: /usr/bin/curl}}]
"""


def refused(endpoint: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse(policy(endpoint), files=True)
    assert all(problem.code and problem.line for problem in caught.value.problems)
    return [problem.message for problem in caught.value.problems]


def allow(rule: str, protocol: str = "rest") -> str:
    return f"protocol: {protocol}, rules: [{{allow: {rule}}}]"


def query(matcher: str) -> str:
    return allow(f"{{method: GET, path: /x, query: {{t: {matcher}}}}}")


@pytest.mark.parametrize(
    "endpoint",
    [
        query("{glob: 'a*'}"),
        allow("{operation_type: '*'}", "graphql"),
        allow("{operation_type: QUERY}", "graphql"),
        allow("{operation_type: query}", "websocket"),
        "protocol: graphql, access: full, graphql_persisted_queries: {h: {operation_type: query}}",
    ],
)
def test_taken_from_a_file_alone(endpoint: str) -> None:
    """Upstream's file loader takes these, its gateway refuses them; so do the two readings here."""
    assert parse(policy(endpoint), files=True).policy.network_policies
    with pytest.raises(PolicyError):
        parse(policy(endpoint))


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("protocol: rest, access: full, rules: []", "rules list cannot be empty"),
        ("protocol: rest, access: full, deny_rules: []", "deny_rules list cannot be empty"),
        ("protocol: graphql, access: full, graphql_max_body_bytes: 0", "graphql_max_body_bytes must be a positive"),
        (allow("{method: '*'}", "json-rpc") + ", json_rpc: {max_body_bytes: 0}", "json_rpc_max_body_bytes must be"),
        (allow("{method: tools/call, tool: a, params: {name: b}}", "mcp"), "either tool or params.name, not both"),
    ],
)
def test_refused_in_a_file_alone(endpoint: str, said: str) -> None:
    """What has no form on the wire is refused in a file; a gateway's policy with it loads."""
    assert any(said in text for text in refused(endpoint))
    assert parse(policy(endpoint)).policy.network_policies


@pytest.mark.parametrize(
    ("matcher", "said"),
    [
        ("5", "expected string glob or matcher object"),
        ("{}", "unknown matcher keys"),
        ("{glob: 5}", ".glob: expected glob string"),
        ("{any: x}", ".any: expected array of glob strings"),
        ("{any: []}", ".any: list must not be empty"),
        ("{any: [a, 5]}", ".any: all values must be strings"),
        ("{any: [a, '']}", "may not be empty"),
        ("''", "may not be empty"),
        ("{glob: ''}", "may not be empty"),
    ],
)
def test_a_matcher_that_is_none_is_refused(matcher: str, said: str) -> None:
    """Upstream's words, each once; an empty pattern is refused too."""
    assert [said in text for text in refused(query(matcher))] == [True]


def test_the_forms_of_a_matcher_are_the_same_matcher() -> None:
    """A glob, a mapping with it, and a list; in `params` too, where a mapping can be a deeper level."""

    def read(endpoint: str) -> LoadedPolicy:
        return parse(policy(endpoint), files=True)

    assert read(query("a*")).policy == read(query("{glob: a*}")).policy
    rule = "{method: tools/call, params: {name: %s}}"
    loaded = read(allow(rule % "{glob: a}", "mcp"))
    assert loaded.policy.network_policies["p"].endpoints[0].rules[0].params == (("name", QueryMatcher("a")),)
    assert any("unknown matcher keys" in text for text in refused(allow(rule % "{}", "mcp")))


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        (allow("{operation_type: read}", "graphql"), "expected query, mutation, subscription, or *, got 'read'"),
        (allow("{operation_type: query, fields: ['']}", "graphql"), "field glob must not be empty"),
        (allow("{operation_type: query, fields: []}", "graphql"), "omit fields to match all root fields"),
        (allow("{operation_name: X}", "websocket"), "operation_type: required for GraphQL L7 rules"),
        (allow("{method: GET, path: /g, operation_type: query}", "websocket"), "must not combine method/path/query"),
        (
            allow("{method: '*'}", "json-rpc") + ", json_rpc: {max_body_bytes: x}",
            "invalid json_rpc config: invalid type",
        ),
        ("path: x, protocol: rest, access: full", "endpoint path must start with '/' or be '**', got 'x'"),
        ("protocol: sql, access: full, enforcement: enforce", "(not available in v1)"),
    ],
)
def test_the_words_are_the_file_loaders(endpoint: str, said: str) -> None:
    """People search for upstream's texts."""
    texts = refused(endpoint)
    assert any(said in text for text in texts), texts


def test_a_deny_rule_on_fields_reaches_every_registered_operation() -> None:
    """An entry without fields would slip past it, which upstream lets happen; with its fields it loads."""
    endpoint = (
        "protocol: graphql, access: full, deny_rules: [{operation_type: query, fields: [admin]}], "
        "graphql_persisted_queries: {h: {operation_type: query%s}}"
    )
    assert any("deny_rules name fields" in text for text in refused(endpoint % ""))
    assert parse(policy(endpoint % ", fields: [viewer]"), files=True).policy.network_policies


def test_stricter_than_upstream() -> None:
    """Upstream's file loader ignores unknown keys and needs no version; here both are faults, as in every policy."""
    assert any("unknown field" in text for text in refused("protocl: rest"))
    with pytest.raises(PolicyError) as caught:
        parse("network_policies: {}", files=True)
    assert [problem.message for problem in caught.value.problems] == ["missing field `version`"]
    assert parse("version: 1", files=True).policy.network_policies == {}


def test_a_file_is_read_either_way(tmp_path: Path) -> None:
    """`load` hands the choice on."""
    path = tmp_path / "data.yaml"
    path.write_text(policy(query("{glob: a}")))
    assert load(path, files=True).policy.network_policies
    with pytest.raises(PolicyError):
        load(path)
