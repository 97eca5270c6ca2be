"""A policy as upstream's data document, for rules that are not ours. It knows the shape and nothing of the rules."""

from __future__ import annotations

from typing import Any

from openshell_supervisor.policy.model import Endpoint, L7Match, Matchers, SandboxPolicy

Json = dict[str, Any]


def data_document(policy: SandboxPolicy, require_binary_identity: bool) -> Json:
    """What a module sees under `data` (policy.md 2.1), from a normalised policy: presets expanded, matchers in one form."""
    files, landlock, process = policy.filesystem, policy.landlock, policy.process
    return {
        "filesystem_policy": {
            "include_workdir": files.include_workdir if files else True,
            "read_only": list(files.read_only) if files else [],
            "read_write": list(files.read_write) if files else [],
        },
        "landlock": {"compatibility": landlock.compatibility if landlock else "best_effort"},
        "process": {
            "run_as_user": process.run_as_user if process else "sandbox",
            "run_as_group": process.run_as_group if process else "sandbox",
        },
        "network_policies": {
            key: {
                "name": rule.name or key,
                "endpoints": [_endpoint(endpoint) for endpoint in rule.endpoints],
                "binaries": [
                    {"path": b.path} | ({"advisor_proposed": True} if b.advisor_proposed else {}) for b in rule.binaries
                ],
            }
            for key, rule in policy.network_policies.items()
        },
        "network_middlewares": {},
        "runtime": {"require_binary_identity": require_binary_identity},
    }


_PLAIN = (
    "protocol", "tls", "enforcement", "access", "path", "allow_encoded_slash", "persisted_queries", "graphql_max_body_bytes",
    "websocket_credential_rewrite", "request_body_credential_rewrite", "credential_signing", "signing_service", "signing_region",
    "json_rpc_max_body_bytes", "allow_uninspected_credentials", "advisor_proposed", "provider_credentialed",
)  # fmt: skip


def _endpoint(endpoint: Endpoint) -> Json:
    found: Json = {"host": endpoint.host, "ports": list(endpoint.ports)}
    found |= {name: value for name in _PLAIN if (value := getattr(endpoint, name))}
    if endpoint.allowed_ips:
        found["allowed_ips"] = list(endpoint.allowed_ips)
    if endpoint.rules:
        empty = {"method": "", "path": "", "command": "", "operation_type": "", "operation_name": ""}
        found["rules"] = [{"allow": empty | _match(rule, endpoint)} for rule in endpoint.rules]
    if endpoint.deny_rules:
        found["deny_rules"] = [_match(rule, endpoint) for rule in endpoint.deny_rules]
    if endpoint.graphql_persisted_queries:
        found["graphql_persisted_queries"] = {
            key: {"operation_type": o.operation_type, "operation_name": o.operation_name, "fields": list(o.fields)}
            for key, o in endpoint.graphql_persisted_queries
        }
    if endpoint.mcp is not None:
        options = {
            "mcp_strict_tool_names": endpoint.mcp.strict_tool_names,
            "mcp_allow_all_known_mcp_methods": endpoint.mcp.allow_all_known_mcp_methods,
        }
        found |= {key: value for key, value in options.items() if value is not None}
    return found


def _match(rule: L7Match, endpoint: Endpoint) -> Json:
    names = ("method", "path", "command", "operation_type", "operation_name")
    found: Json = {name: value for name in names if (value := getattr(rule, name))}
    if endpoint.mcp is not None and endpoint.mcp.allow_all_known_mcp_methods and not rule.method:
        found["method"] = "tools/call" if rule.params else "*"  # upstream folds it so (policy.md 5.1)
    if rule.fields:
        found["fields"] = list(rule.fields)
    for name, matchers in (("query", rule.query), ("params", rule.params)):
        if matchers:
            found[name] = _matchers(matchers)
    return found


def _matchers(matchers: Matchers) -> Json:
    return {key: {"any": list(matcher.any)} if matcher.any else {"glob": matcher.glob} for key, matcher in matchers}
