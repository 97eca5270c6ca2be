"""The rules of an endpoint that look into bodies, and a body as those rules see it: parts of the engine's input.

A call or operation goes to the rules as the set of patterns that match it, never as text: calls that no rule can tell apart
become one, so that the work grows with the policy and not with what the workload sends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from openshell_supervisor.policy.globs import VALUE, GlobError, glob_match, glob_problem
from openshell_supervisor.policy.model import Endpoint, L7Match
from openshell_supervisor.verdict.bodies.graphql import GraphqlBody, GraphqlOperation
from openshell_supervisor.verdict.bodies.json_rpc import RpcBody, RpcCall

Json = dict[str, object]


@dataclass(frozen=True, slots=True, eq=False)
class CallRules:
    """Rules on JSON-RPC and MCP calls: their JSON (members, without braces) and the names and globs in them."""

    members: str
    names: frozenset[str]
    methods: tuple[str, ...]
    tools: tuple[str, ...]


def call_rules(endpoint: Endpoint) -> CallRules | None:
    """The call rules of an endpoint, None where its protocol has none.

    Names of protocols are compared exactly, as upstream's rules do: `MCP` loads and its rules never match.
    """
    if endpoint.protocol not in ("json-rpc", "mcp"):
        return None
    profile = bool(endpoint.mcp and endpoint.mcp.allow_all_known_mcp_methods)
    allow = [_call_rule(endpoint, n, rule, folds=profile) for n, rule in enumerate(endpoint.rules)]
    # A deny rule that names a tool and no method means calls of that tool, whatever the profile: upstream's would be inert.
    deny = [
        _call_rule(endpoint, n, rule, folds=profile or bool(rule.params)) for n, rule in enumerate(endpoint.deny_rules)
    ]
    entries: Json = {"call_rules": allow, "deny_call_rules": deny}
    if endpoint.protocol == "mcp" and profile:
        entries |= {"profile": True, "tool_rules": any(rule.params for rule in endpoint.rules)}
    written = [*allow, *deny]
    mcp = endpoint.protocol == "mcp"
    return CallRules(
        members=members(entries),
        names=frozenset() if mcp else frozenset(str(rule["method"]) for rule in written),
        methods=_patterns(str(rule["method"]) for rule in written) if mcp else (),
        tools=_patterns(glob for rule in (*endpoint.rules, *endpoint.deny_rules) for glob in _tool_globs(rule)),
    )


def _call_rule(endpoint: Endpoint, index: int, rule: L7Match, *, folds: bool) -> Json:
    method, tools = rule.method, _tool_globs(rule)
    if not method and folds and endpoint.protocol == "mcp":
        method = "tools/call" if tools else "*"
    entry: Json = {"index": index, "method": method}
    if endpoint.protocol == "mcp":
        if tools:
            entry["tools"] = list(tools)
        entry |= fault((method, *tools))
    return entry


def _tool_globs(rule: L7Match) -> tuple[str, ...]:
    return tuple(glob for _, matcher in rule.params for glob in matcher.globs)


def call_input(body: RpcBody, verb: str, rules: Iterable[CallRules]) -> Json:
    """The `request.rpc` of a body without error, for the rules that take part. `verb` is the HTTP method, exactly."""
    asked = list(rules)
    names = frozenset().union(*(rule.names for rule in asked))
    methods = sorted({glob for rule in asked for glob in rule.methods})
    tools = sorted({glob for rule in asked for glob in rule.tools})
    calls = distinct(_call_input(call, names, methods, tools) for call in dict.fromkeys(body.calls))
    entry: Json = {"verb": verb if verb in ("GET", "POST") else "", "calls": calls}
    return entry | {key: True for key in ("responses", "receive_stream") if getattr(body, key)}


def _call_input(call: RpcCall, names: frozenset[str], methods: list[str], tools: list[str]) -> Json:
    entry: Json = {"name": call.method if call.method in names else "", "methods": matching(methods, call.method)}
    if call.method == "tools/call":
        entry |= {"tool_call": True, "tools": matching(tools, call.tool)}
    return entry


@dataclass(frozen=True, slots=True, eq=False)
class OperationRules:
    """Rules on GraphQL operations: their JSON, the globs in them, and the persisted operations that the endpoint knows."""

    members: str
    names: tuple[str, ...]
    fields: tuple[str, ...]
    registry: dict[str, GraphqlOperation]

    def input(self, body: GraphqlBody) -> list[Json]:
        """The operations of a body as this endpoint sees them: a persisted one is what it was registered as."""
        return distinct(self._operation(operation) for operation in dict.fromkeys(body.operations))

    def _operation(self, operation: GraphqlOperation) -> Json:
        if operation.key:
            registered = self.registry.get(operation.key)
            if registered is None:
                return {"unregistered": True}
            operation = registered
        fields = distinct(matching(self.fields, name) for name in operation.fields)
        return {"type": operation.kind, "names": matching(self.names, operation.name), "fields": fields}


def operation_rules(endpoint: Endpoint) -> OperationRules | None:
    """The operation rules of an endpoint, None where it has none and its protocol wants none."""
    rules = [(n, rule) for n, rule in enumerate(endpoint.rules) if rule.operation_type]
    deny_rules = [(n, rule) for n, rule in enumerate(endpoint.deny_rules) if rule.operation_type]
    if not rules and not deny_rules and endpoint.protocol.lower() not in ("graphql", "websocket"):
        return None
    entries: Json = {
        "operation_rules": [_operation_rule(n, rule) for n, rule in rules],
        "deny_operation_rules": [_operation_rule(n, rule) for n, rule in deny_rules],
    }
    written = [rule for _, rule in (*rules, *deny_rules)]
    known = endpoint.graphql_persisted_queries if endpoint.persisted_queries == "allow_registered" else ()
    return OperationRules(
        members=members(entries),
        names=_patterns(rule.operation_name for rule in written if rule.operation_name),
        fields=_patterns(name for rule in written for name in rule.fields),
        registry={
            key: GraphqlOperation(entry.operation_type.lower(), entry.operation_name, tuple(sorted(set(entry.fields))))
            for key, entry in known
        },
    )


def _operation_rule(index: int, rule: L7Match) -> Json:
    entry: Json = {"index": index, "type": rule.operation_type.lower()}
    if rule.operation_name:
        entry["name"] = rule.operation_name
    if rule.fields:
        entry["fields"] = list(rule.fields)
    return entry | fault((rule.operation_name, *rule.fields) if rule.operation_name else rule.fields)


def matching(patterns: Iterable[str], value: str) -> Json:
    """The patterns that match a value, as a table for the rules; one that is no glob matches nothing (see `fault`)."""
    found: Json = {}
    for pattern in patterns:
        try:
            if glob_match(pattern, VALUE, value):
                found[pattern] = True
        except GlobError:
            continue
    return found


def fault(patterns: Iterable[str]) -> Json:
    """An entry that names the first pattern that is no glob; a question that reaches its rule is then denied."""
    bad = next((pattern for pattern in patterns if glob_problem(pattern, VALUE)), None)
    return {} if bad is None else {"invalid": bad}


def distinct(entries: Iterable[Json]) -> list[Json]:
    """Entries without repetitions, in an order that does not depend on that of the body."""
    return [json.loads(text) for text in sorted({json.dumps(entry, sort_keys=True) for entry in entries})]


def members(entries: Json) -> str:
    """JSON of the entries that say something, without braces; the rules take what is absent for false."""
    return json.dumps({key: value for key, value in entries.items() if value is not False}, separators=(",", ":"))[1:-1]


def _patterns(found: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(found)))
