"""What an endpoint may say about requests: upstream's checks (B) and (C) (policy.md 1.7), on the model.

(B) concerns which keys go together; (C) looks into rules. Texts are upstream's. What the rules of graphql, websocket, json-rpc
and mcp may say is in `policy.validate_rpc`.
"""

from __future__ import annotations

from collections.abc import Iterator

from openshell_supervisor.errors import Problem
from openshell_supervisor.policy.model import KNOWN_PROTOCOLS, Endpoint, L7Match
from openshell_supervisor.policy.reading import nearest, shown
from openshell_supervisor.policy.validate_rpc import rpc_problems

_NO_RULES = 'write `access: read-only`, or `rules: [{allow: {method: GET, path: "/**"}}]`'


def l7_problems(
    name: str, key: str, index: int, endpoint: Endpoint, path: str, *, files: bool = False
) -> Iterator[Problem]:
    """Faults of one endpoint, with `files` in the terms of upstream's file loader.

    `name` is the rule's name, `key` its map key, `path` the endpoint's dotted path.
    """
    say = f"network policy '{shown(name)}': endpoint {index} has invalid L7 configuration: "
    for code, text, where, hint in (*_shared(endpoint), *_own(endpoint, files=files)):
        yield Problem(code, say + text, f"{path}.{where}" if where else path, hint=hint)
    prefix = f"{shown(key)}.endpoints[{index}]"
    yield from _data_problems(prefix, endpoint, path, files=files)


Fault = tuple[str, str, str, str]


def _shared(e: Endpoint) -> Iterator[Fault]:
    """(B), in upstream's order."""
    protocol = e.protocol.lower()
    everything = e.mcp is not None and e.mcp.allow_all_known_mcp_methods is True
    if e.protocol and protocol not in KNOWN_PROTOCOLS:
        yield _unknown_protocol(e.protocol)
        return
    if protocol == "tcp" and (e.access or e.rules or e.deny_rules):
        yield (
            "tcp_l7",
            "protocol tcp does not support access, rules, or deny_rules; remove those L7 fields",
            "protocol",
            "for requests over HTTP write `protocol: rest`",
        )
    if e.rules and e.access:
        yield (
            "rules_and_access",
            "rules and access are mutually exclusive",
            "access",
            "keep one: `access` is a shorthand for rules",
        )
    yield from _presets(e, protocol)
    if protocol == "json-rpc" and not e.rules and not e.access:
        yield "rules_missing", "protocol json-rpc requires explicit rules with allow.method", "protocol", ""
    if protocol in ("rest", "websocket", "graphql", "sql") and not e.rules and not e.access and not e.deny_rules:
        yield "rules_missing", "protocol requires rules or access to define allowed traffic", "protocol", _NO_RULES
    if protocol == "mcp" and not e.rules and not e.access and not everything:
        yield (
            "rules_missing",
            "protocol mcp requires rules when mcp.allow_all_known_mcp_methods is false",
            "protocol",
            "",
        )
    if e.rules and all(rule.empty for rule in e.rules) and not (protocol == "mcp" and everything):
        yield (
            "rules_empty",
            "rules would deny all traffic (no allow clause found). Use `access: full` or add allow clauses to rules.",
            "rules",
            "each entry needs a method and a path",
        )
    yield from _shared_deny(e, protocol, everything)


def _presets(e: Endpoint, protocol: str) -> Iterator[Fault]:
    if protocol == "mcp" and e.access:
        yield (
            "preset_unsupported",
            "protocol mcp does not support access presets; use rules/deny_rules or set "
            "mcp.allow_all_known_mcp_methods: true for an allow-all MCP policy",
            "access",
            "",
        )
    if protocol == "json-rpc" and e.access:
        yield (
            "preset_unsupported",
            'protocol json-rpc does not support access presets; use explicit rules with allow.method such as "*"',
            "access",
            "",
        )


def _unknown_protocol(written: str) -> Fault:
    word = written.lower()
    aliases = {
        "http": "rest",
        "https": "rest",
        "http/1.1": "rest",
        "http2": "rest",
        "h2": "rest",
        "api": "rest",
        "tls": "",
        "ssl": "",
        "ws": "websocket",
        "wss": "websocket",
        "grpc": "",
        "ssh": "",
        "any": "",
        "udp": "",
    }
    guess = aliases[word] if word in aliases else nearest(word, KNOWN_PROTOCOLS)
    hint = (
        f"did you mean `{guess}`?" if guess else "leave `protocol` out to allow the connection as a whole, uninspected"
    )
    if word in ("udp",):
        hint = "only TCP leaves the sandbox"
    expected = "(expected tcp, rest, websocket, graphql, sql, json-rpc, or mcp)"
    return "protocol_unknown", f"unknown protocol '{shown(written)}' {expected}", "protocol", hint


def _shared_deny(e: Endpoint, protocol: str, everything: bool) -> Iterator[Fault]:
    if e.deny_rules and not e.protocol:
        yield (
            "deny_needs_protocol",
            "deny_rules require protocol (L7 inspection must be enabled)",
            "deny_rules",
            "add `protocol: rest`",
        )
    elif e.deny_rules and protocol != "tcp" and not e.rules and not e.access and not (protocol == "mcp" and everything):
        yield (
            "deny_needs_base",
            "deny_rules require rules or access to define the base allow set",
            "deny_rules",
            "add `access: full` to deny only what deny_rules say",
        )
    if protocol == "tcp":
        fields = [name for name, written in _l7_only(e) if written]
        if fields:
            yield (
                "tcp_l7",
                f"protocol tcp does not support L7-only fields: {', '.join(fields)}; remove those fields",
                "protocol",
                "",
            )


def _l7_only(e: Endpoint) -> tuple[tuple[str, bool], ...]:
    return (
        ("enforcement", bool(e.enforcement)),
        ("path", bool(e.path)),
        ("allow_encoded_slash", e.allow_encoded_slash),
        ("websocket_credential_rewrite", e.websocket_credential_rewrite),
        ("request_body_credential_rewrite", e.request_body_credential_rewrite),
        ("persisted_queries", bool(e.persisted_queries)),
        ("graphql_persisted_queries", bool(e.graphql_persisted_queries)),
        ("graphql_max_body_bytes", bool(e.graphql_max_body_bytes)),
        ("json_rpc_max_body_bytes", bool(e.json_rpc_max_body_bytes)),
        ("mcp", e.mcp is not None),
        ("credential_signing", bool(e.credential_signing)),
        ("signing_service", bool(e.signing_service)),
        ("signing_region", bool(e.signing_region)),
        ("credential_binding", e.credential_binding is not None),
    )


def _own(e: Endpoint, *, files: bool) -> Iterator[Fault]:
    """The rest of (A) that concerns one endpoint's L7 keys."""
    if e.path and not e.path.startswith("/") and e.path != "**":
        text = f"endpoint path must start with '/' or be '**', got '{shown(e.path)}'"
        text = text if files else "path must start with '/' or be '**'"
        yield "path_relative", text, "path", f"write `path: /{shown(e.path)}`"
    if e.persisted_queries not in ("", "deny", "allow_registered"):
        yield (
            "persisted_queries",
            f"persisted_queries must be 'deny' or 'allow_registered', got '{shown(e.persisted_queries)}'",
            "persisted_queries",
            "",
        )
    if e.protocol == "sql" and e.enforced:
        text = "SQL enforcement requires full SQL parsing (not available in v1). Use `enforcement: audit`."
        text = text if files else "SQL enforcement requires full SQL parsing; use enforcement: audit"
        yield "sql_enforce", text, "enforcement", ""
    if e.mcp is not None and e.protocol.lower() != "mcp" and e.protocol.lower() != "tcp":
        yield "mcp_options", "mcp options are only valid for protocol mcp", "mcp", ""
    if e.protocol == "graphql" and not files:  # the file loader takes `*` and any case: policy.validate_rpc
        yield from _operation_types(e)


def _operation_types(e: Endpoint) -> Iterator[Fault]:
    kinds = ("query", "mutation", "subscription")
    text = "operation_type must be query, mutation, or subscription"
    for index, rule in enumerate(e.rules):
        if rule.operation_type not in kinds:
            yield "operation_type", f"rules[{index}].allow.{text}", f"rules[{index}]", ""
    for index, deny in enumerate(e.deny_rules):
        if deny.operation_type not in kinds:
            yield "operation_type", f"deny_rules[{index}].{text}", f"deny_rules[{index}]", ""
    for key, operation in e.graphql_persisted_queries:
        if operation.operation_type not in kinds:
            yield "operation_type", f"graphql_persisted_queries[{shown(key)}].{text}", "graphql_persisted_queries", ""


def _data_problems(prefix: str, e: Endpoint, path: str, *, files: bool) -> Iterator[Problem]:
    """(C): upstream's supervisor refuses these although its gateway stores them."""
    protocol = e.protocol.lower()
    if protocol == "mcp" and not e.host:
        yield Problem(
            "mcp_host", f"{prefix}: protocol mcp requires host; protocol alone is not a wildcard endpoint", path
        )
    if protocol == "mcp" and not e.ports:
        yield Problem(
            "mcp_port",
            f"{prefix}: protocol mcp requires port or ports; protocol alone is not a wildcard endpoint",
            path,
        )
    yield from rpc_problems(prefix, e, path, files=files)
    if protocol in ("json-rpc", "mcp"):
        return
    for index, rule in enumerate(e.rules):
        yield from _selector_problems(f"{prefix}.rules[{index}].allow", rule, f"{path}.rules[{index}]")
    for index, deny in enumerate(e.deny_rules):
        yield from _selector_problems(f"{prefix}.deny_rules[{index}]", deny, f"{path}.deny_rules[{index}]")


def _selector_problems(prefix: str, rule: L7Match, path: str) -> Iterator[Problem]:
    if rule.params:
        tool = all(key == "name" for key, _ in rule.params)
        text = (
            ".tool: MCP tool matching is only valid for protocol mcp"
            if tool
            else (".params: params matching is only valid for protocol mcp")
        )
        yield Problem("mcp_only", prefix + text, path, hint="for HTTP use `method`, `path` and `query`")
