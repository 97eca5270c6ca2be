"""Hypothesis strategies for whole policy documents, every section and key, most of them usable."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

words = st.sampled_from(("", "a", "b.c", "Ü", "x y", "*", "a-*", "'\"", "😀"))
names = st.sampled_from(("a", "B", "a.b", "_provider_x", "é", "with space", "z/1"))
flags = st.booleans()
sizes = st.sampled_from((0, 1, 65536, 2**32 - 1))


def some(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings with any subset of these keys."""
    return st.fixed_dictionaries({}, optional=keys)


def several(items: st.SearchStrategy[Any], most: int = 2) -> st.SearchStrategy[list[Any]]:
    """Short lists."""
    return st.lists(items, max_size=most)


globs = st.sampled_from(("*", "a", "a.*", "{a,b}", "é"))
matchers = globs | st.fixed_dictionaries({"any": st.lists(globs, min_size=1, max_size=2)})
fields = several(st.sampled_from(("viewer", "repo*")))
operation_types = st.sampled_from(("query", "mutation", "subscription"))
rest = some(
    method=st.sampled_from(("GET", "*", "post")),
    path=st.sampled_from(("/**", "/x/*", "**", "")),
    query=st.dictionaries(names, matchers, max_size=3),
)
matches = rest | some(
    method=words,
    path=words,
    command=words,
    query=st.dictionaries(names, matchers, max_size=3),
    operation_type=operation_types,
    operation_name=globs,
    fields=fields,
    params=st.dictionaries(names, matchers | st.dictionaries(names, globs, max_size=2), max_size=2),
    tool=globs,
)
allows = st.fixed_dictionaries({"allow": matches})
operations = some(operation_type=operation_types, operation_name=words, fields=fields)
mcp = some(max_body_bytes=sizes, strict_tool_names=flags, allow_all_known_mcp_methods=flags)
endpoints = some(
    host=st.sampled_from(("a.example.com", "*.example.com", "", "10.0.0.1")),
    port=st.integers(0, 65535),
    ports=several(st.sampled_from((80, 443, 8443)), 3),
    protocol=st.sampled_from(("", "tcp", "rest", "rest", "rest", "graphql", "mcp", "json-rpc", "websocket", "sql")),
    tls=st.sampled_from(("", "skip", "terminate")),
    enforcement=st.sampled_from(("", "enforce", "audit")),
    access=st.sampled_from(("", "read-only", "read-write", "full", "typo")),
    rules=several(allows),
    deny_rules=several(matches),
    allowed_ips=several(st.sampled_from(("10.0.0.0/8", "192.0.2.7"))),
    allow_encoded_slash=flags,
    persisted_queries=st.sampled_from(("", "deny", "allow_registered")),
    graphql_persisted_queries=st.dictionaries(names, operations, max_size=2),
    graphql_max_body_bytes=sizes,
    path=st.sampled_from(("", "/v1/**", "**")),
    websocket_credential_rewrite=flags,
    request_body_credential_rewrite=flags,
    credential_signing=st.sampled_from(("", "sigv4", "sigv4:body")),
    signing_service=words,
    signing_region=words,
    json_rpc=some(max_body_bytes=sizes),
    mcp=mcp,
    credential_binding=st.fixed_dictionaries({"provider": words}),
    allow_uninspected_credentials=flags,
)
usable = st.fixed_dictionaries(
    {
        "host": st.sampled_from(("a.example.com", "*.example.com", "b.example.org")),
        "port": st.sampled_from((80, 443)),
        "protocol": st.just("rest"),
        "rules": st.lists(st.fixed_dictionaries({"allow": rest}), min_size=1, max_size=2),
    },
    optional={"deny_rules": several(rest), "enforcement": st.just("enforce"), "allow_encoded_slash": flags},
)
presets = st.fixed_dictionaries(
    {
        "host": st.sampled_from(("c.example.com", "d.example.com")),
        "ports": st.lists(st.sampled_from((80, 443)), min_size=1, unique=True),
        "protocol": st.sampled_from(("rest", "graphql", "websocket")),
        "access": st.sampled_from(("read-only", "read-write", "full")),
    }
)
every_method = st.just(
    {"host": "m.example.com", "port": 443, "protocol": "mcp", "mcp": {"allow_all_known_mcp_methods": True}}
)
binaries = st.fixed_dictionaries({"path": st.sampled_from(("/usr/bin/curl", "/**"))}, optional={"harness": flags})
rules = some(name=words, endpoints=several(endpoints | usable | presets | every_method), binaries=several(binaries))
tidy_rules = some(name=words, endpoints=several(usable | presets | every_method), binaries=several(binaries))
paths = several(st.sampled_from(("/usr", "/tmp/", "/srv//data", "/é")))
json_values = st.recursive(
    st.none() | flags | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: several(inner) | st.dictionaries(names, inner, max_size=2),
    max_leaves=6,
)
middlewares = st.fixed_dictionaries(
    {"middleware": words},
    optional={
        "name": words,
        "config": st.dictionaries(names, json_values, max_size=3),
        "on_error": st.sampled_from(("", "fail_closed", "fail_open")),
        "endpoints": some(include=several(st.sampled_from(("*.test", "a.test"))), exclude=several(st.just("b.test"))),
        "order": st.integers(-(2**31), 2**31 - 1),
    },
)
sections: dict[str, st.SearchStrategy[Any]] = {
    "filesystem_policy": some(include_workdir=flags, read_only=paths, read_write=paths),
    "landlock": some(compatibility=st.sampled_from(("best_effort", "hard_requirement", "other"))),
    "process": some(run_as_user=st.sampled_from(("", "sandbox", "1000")), run_as_group=st.sampled_from(("", "1000"))),
    "network": some(allow_netlink=flags | st.just("route")),
}
versions = {"version": st.sampled_from((1, 1, 1, 0, 2**32 - 1))}
anything = st.fixed_dictionaries(
    versions,
    optional={
        **sections,
        "network_policies": st.dictionaries(names, rules, max_size=3),
        "network_middlewares": st.dictionaries(names, middlewares, max_size=2),
    },
)
"""Documents of the right shape; many of them say something that validation refuses."""
tidy = st.fixed_dictionaries(
    versions, optional={**sections, "network_policies": st.dictionaries(names, tidy_rules, max_size=3)}
)
"""Documents most of which load."""
