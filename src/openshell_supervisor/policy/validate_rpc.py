"""What rules of GraphQL, WebSocket, JSON-RPC and MCP endpoints may say: the rest of upstream's (C) (policy.md 1.7).

These protocols are not enforced yet, but a policy that upstream refuses is refused here too. Texts are upstream's.
"""

from __future__ import annotations

from collections.abc import Iterator

from openshell_supervisor.errors import Problem
from openshell_supervisor.policy.file_graphql import file_graphql_problems
from openshell_supervisor.policy.globs import VALUE, GlobError, glob_match
from openshell_supervisor.policy.model import Endpoint, L7Match
from openshell_supervisor.policy.reading import shown

_GLOB_CHARACTERS = "*?[]{}"
_NOT_PATH = "{} L7 rules must use {}, not path/query"


def rpc_problems(prefix: str, endpoint: Endpoint, path: str, *, files: bool = False) -> Iterator[Problem]:
    """Faults of the rules of one endpoint, with `files` GraphQL's as upstream's file loader takes them.

    `prefix` begins the message (`KEY.endpoints[i]`), `path` is the dotted path.
    """
    protocol = endpoint.protocol
    for index, rule in enumerate(endpoint.rules):
        where, place = f"{prefix}.rules[{index}].allow", f"{path}.rules[{index}]"
        yield from _rule(endpoint, rule, where, place, "allow", files=files)
    for index, deny in enumerate(endpoint.deny_rules):
        where, place = f"{prefix}.deny_rules[{index}]", f"{path}.deny_rules[{index}]"
        yield from _rule(endpoint, deny, where, place, "deny", files=files)
    if files and protocol in ("graphql", "websocket"):
        yield from file_graphql_problems(prefix, endpoint, path)
    elif protocol == "graphql":
        for key, operation in endpoint.graphql_persisted_queries:
            where = f"{prefix}.graphql_persisted_queries[{shown(key)}]"
            text = f"{where}.fields: list must not be empty; omit fields to match all root fields"
            hint = "upstream refuses entries without fields; list them"
            if not operation.fields:
                yield Problem("graphql_fields_missing", text, f"{path}.graphql_persisted_queries", hint=hint)
    if protocol == "mcp":
        yield from _broad_mcp(endpoint, endpoint.rules, f"{prefix}.rules", f"{path}.rules", "allow")
        yield from _broad_mcp(endpoint, endpoint.deny_rules, f"{prefix}.deny_rules", f"{path}.deny_rules", "deny")


def _rule(e: Endpoint, rule: L7Match, prefix: str, path: str, kind: str, *, files: bool) -> Iterator[Problem]:
    if e.protocol == "json-rpc":
        yield from _json_rpc(rule, prefix, path)
    elif e.protocol == "mcp":
        yield from _mcp(e, rule, prefix, path)
    elif e.protocol == "websocket":
        yield from _websocket(rule, prefix, path, kind, files=files)


def _websocket(rule: L7Match, prefix: str, path: str, kind: str, *, files: bool) -> Iterator[Problem]:
    """A gateway's data always carries method and path in an allow rule: such a rule with GraphQL keys is always refused there."""
    graphql = rule.operation_type or rule.operation_name or rule.fields
    if graphql and ((kind == "allow" and not files) or rule.method or rule.path or rule.query):
        yield Problem(
            "websocket_graphql",
            f"{prefix}: WebSocket GraphQL {kind} rules must not combine method/path/query with "
            "operation_type/operation_name/fields",
            path,
            hint="upstream's gateway refuses every such allow rule; use protocol graphql over HTTP"
            if kind == "allow" and not files
            else "",
        )


def _json_rpc(rule: L7Match, prefix: str, path: str) -> Iterator[Problem]:
    if not rule.method:
        yield Problem(
            "rpc_method", f"{prefix}.method: required for json-rpc L7 rules", path, hint='`method: "*"` allows all'
        )
    elif rule.method != "*" and any(c in rule.method for c in _GLOB_CHARACTERS):
        yield Problem(
            "rpc_method",
            f"{prefix}.method: generic JSON-RPC method rules do not support glob or wildcard matchers; "
            'use "*" to allow all methods or an exact method name',
            f"{path}.method",
            hint="one rule per method",
        )
    if rule.params:
        yield Problem(
            "rpc_params", f"{prefix}: JSON-RPC rules do not support params matchers yet", path, hint="remove `params`"
        )
    if rule.path or rule.query:
        text = _NOT_PATH.format("json-rpc", "method")
        yield Problem("rpc_path", f"{prefix}: {text}", path, hint="the endpoint's own `path` says where")


def _mcp(e: Endpoint, rule: L7Match, prefix: str, path: str) -> Iterator[Problem]:
    globbed = any(c in rule.method for c in _GLOB_CHARACTERS)
    if globbed and not rule.method.startswith("tools/"):
        yield Problem(
            "mcp_method",
            f"{prefix}.method: MCP method globs are only valid for the tools/ method family; "
            "omit method to use the endpoint method profile",
            f"{path}.method",
        )
    selector = next((key for key, _ in rule.params if key == "name"), "")
    if not rule.method and not everything(e) and not selector:
        yield Problem("mcp_method", f"{prefix}.method: required when mcp.allow_all_known_mcp_methods is false", path)
    if selector and rule.method not in ("", "tools/call"):
        text = f"must be tools/call when an MCP rule uses tool or params.name, got '{shown(rule.method)}'"
        yield Problem("mcp_method", f"{prefix}.method: {text}", f"{path}.method")
    for key, matcher in rule.params:
        if key != "name":
            text = f"{prefix}.params.{shown(key)}: MCP tool argument matching is not supported yet"
            yield Problem("mcp_params", text, path, hint="match on the tool alone")
        elif strict_off(e) and any(c in glob for glob in matcher.globs for c in _GLOB_CHARACTERS):
            yield Problem("mcp_params", f"{prefix}.params.name: wildcard tool-name matchers require "
                          "mcp.strict_tool_names to remain enabled", path)  # fmt: skip
    if rule.path or rule.query:
        yield Problem("rpc_path", f"{prefix}: {_NOT_PATH.format('mcp', 'method/tool')}", path)


def _broad_mcp(e: Endpoint, rules: tuple[L7Match, ...], prefix: str, path: str, kind: str) -> Iterator[Problem]:
    """A rule for every tool call beside rules for single tools: the broad one makes the others meaningless."""
    if not any(rule.params for rule in rules):
        return
    for index, rule in enumerate(rules):
        if not rule.params and (_covers_tool_calls(rule.method) or (not rule.method and everything(e))):
            verb = "allows" if kind == "allow" else "denies"
            where = f"{prefix}[{index}]{'.allow' if kind == 'allow' else ''}"
            yield Problem(
                "mcp_broad",
                f"{where}: method matcher {verb} every tool call and conflicts with MCP tool {kind} rules; "
                "remove the broad rule or the tool rules",
                f"{path}[{index}]",
            )


def _covers_tool_calls(method: str) -> bool:
    try:
        return bool(method) and glob_match(method, VALUE, "tools/call")
    except GlobError:
        return False


def everything(e: Endpoint) -> bool:
    """True when the endpoint lets every known MCP method through."""
    return e.mcp is not None and e.mcp.allow_all_known_mcp_methods is True


def strict_off(e: Endpoint) -> bool:
    """True when tool names are not held to upstream's strict form."""
    return e.mcp is not None and e.mcp.strict_tool_names is False
