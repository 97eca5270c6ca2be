"""The rules of an endpoint that look into bodies, and a body as those rules see it: parts of the engine's input.

Here patterns are matched, as for hosts and paths; what follows from the matches is for the Rego to say. A call or operation goes
there as the rules that match it, never as text, and those that the rules cannot tell apart go as one: an evaluator that takes
50 microseconds a comparison is not asked about a thousand calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from openshell_supervisor.policy.globs import VALUE, GlobError, glob_match, glob_problem
from openshell_supervisor.policy.model import Endpoint, L7Match
from openshell_supervisor.verdict.bodies.graphql import GraphqlBody, GraphqlOperation
from openshell_supervisor.verdict.bodies.json_rpc import RpcBody, RpcCall

Json = dict[str, object]
_SPECIAL = frozenset("*?[]{}\\")


class Patterns:
    """Any of these globs. Those without a special character are looked up, so that a long list of names costs nothing."""

    def __init__(self, patterns: Iterable[str], *, literal: bool = False) -> None:
        found = list(patterns)
        self.names = frozenset(found if literal else (text for text in found if not _SPECIAL & set(text)))
        self.globs = tuple(text for text in found if text not in self.names)
        self.fault = next((text for text in self.globs if glob_problem(text, VALUE)), None)

    def match(self, value: str) -> bool:
        """True when one matches. One that is no glob matches nothing: whoever asks its endpoint is denied (`fault`)."""
        return value in self.names or any(_match(pattern, value) for pattern in self.globs)


def _match(pattern: str, value: str) -> bool:
    try:
        return glob_match(pattern, VALUE, value)
    except GlobError:
        return False


@dataclass(frozen=True, slots=True, eq=False)
class CallRule:
    """A rule on calls: its place, the methods it is about (None: all), and the tools (None: not only calls of tools)."""

    index: int
    methods: Patterns | None
    tools: Patterns | None

    def match(self, call: RpcCall) -> bool:
        """True when the rule is about this call."""
        if self.methods is not None and not self.methods.match(call.method):
            return False
        return self.tools is None or (call.method == "tools/call" and self.tools.match(call.tool))


class CallList:
    """Rules on calls, of which the first that matches is found; those that only name things are looked up."""

    def __init__(self, rules: Iterable[CallRule]) -> None:
        self._named: dict[tuple[str, str | None], int] = {}
        self._others: list[CallRule] = []
        for rule in rules:
            if rule.methods is None or rule.methods.globs or (rule.tools is not None and rule.tools.globs):
                self._others.append(rule)
                continue
            for method in rule.methods.names:
                for tool in rule.tools.names if rule.tools is not None else (None,):
                    self._named.setdefault((method, tool), rule.index)

    def first(self, call: RpcCall) -> int | None:
        """The index of the first rule that is about a call, or None."""
        keys = [(call.method, None), (call.method, call.tool)] if call.method == "tools/call" else [(call.method, None)]
        found = [self._named[key] for key in keys if key in self._named]
        found += [rule.index for rule in self._others if rule.match(call)][:1]
        return min(found, default=None)


@dataclass(frozen=True, slots=True, eq=False)
class CallRules:
    """The rules of one endpoint on JSON-RPC and MCP calls, and what else of it matters to them as JSON (`call_input`)."""

    members: str
    allow: CallList
    deny: CallList


def call_rules(endpoint: Endpoint) -> CallRules | None:
    """The call rules of an endpoint, None where its protocol has none.

    Names of protocols are compared exactly, as upstream's rules do: `MCP` loads and its rules never match.
    """
    if endpoint.protocol not in ("json-rpc", "mcp"):
        return None
    profile = endpoint.protocol == "mcp" and bool(endpoint.mcp and endpoint.mcp.allow_all_known_mcp_methods)
    allow = tuple(_call_rule(endpoint, n, rule, folds=profile) for n, rule in enumerate(endpoint.rules))
    # A deny rule that names a tool and no method means calls of that tool, whatever the profile: upstream's would be inert.
    deny = tuple(
        _call_rule(endpoint, n, rule, folds=profile or bool(rule.params)) for n, rule in enumerate(endpoint.deny_rules)
    )
    entries: Json = {"calls": True, "profile": profile, "tool_rules": any(rule.params for rule in endpoint.rules)}
    asked = [patterns for rule in (*allow, *deny) for patterns in (rule.methods, rule.tools)]
    return CallRules(members(entries | fault("invalid_call", asked)), CallList(allow), CallList(deny))


def _call_rule(endpoint: Endpoint, index: int, rule: L7Match, *, folds: bool) -> CallRule:
    method = rule.method
    if endpoint.protocol == "json-rpc":
        return CallRule(index, None if method == "*" else Patterns((method,), literal=True), None)
    tools = [glob for _, matcher in rule.params for glob in matcher.globs]
    if not method and folds:
        method = "tools/call" if tools else "*"
    return CallRule(index, Patterns((method,)), Patterns(tools) if tools else None)


Asked = tuple[str, int, CallRules]
"""Policy and index of an endpoint with its rules on calls."""


def call_input(body: RpcBody, verb: str, asked: Sequence[Asked], *, whole: bool) -> Json:
    """The `request.rpc` of a body without error. `verb` is the HTTP method, exactly; `whole` keeps every call."""
    kinds: dict[object, Json] = {}
    for call in dict.fromkeys(body.calls):
        allow, deny = _firsts(call, asked, deny=False), _firsts(call, asked, deny=True)
        tool = call.method == "tools/call"
        kind = call if whole else (tuple(allow), tuple(deny), tool)
        known = kinds.setdefault(kind, {"allow": allow, "deny": deny, "tool_call": tool})
        known |= {"allow": _least(known["allow"], allow), "deny": _least(known["deny"], deny)}
    calls = [entry | {key: _triples(entry[key]) for key in ("allow", "deny")} for entry in kinds.values()]
    found: Json = {"verb": verb if verb in ("GET", "POST") else "", "calls": calls}
    return found | {key: True for key in ("responses", "receive_stream") if getattr(body, key)}


def _firsts(call: RpcCall, asked: Sequence[Asked], *, deny: bool) -> dict[tuple[str, int], int]:
    """The first rule of each endpoint that matches a call."""
    found = {}
    for policy, index, rules in asked:
        first = (rules.deny if deny else rules.allow).first(call)
        if first is not None:
            found[policy, index] = first
    return found


def _least(one: object, other: dict[tuple[str, int], int]) -> dict[tuple[str, int], int]:
    assert isinstance(one, dict)
    return {place: min(one[place], other[place]) for place in other}


def _triples(firsts: object) -> list[list[object]]:
    assert isinstance(firsts, dict)
    return [[policy, index, rule] for (policy, index), rule in firsts.items()]


@dataclass(frozen=True, slots=True, eq=False)
class OperationRule:
    """A rule on GraphQL operations; None where it does not say."""

    index: int
    kind: str
    names: Patterns | None
    fields: Patterns | None

    def about(self, operation: GraphqlOperation) -> bool:
        """True when type and name are the rule's."""
        return self.kind in ("*", operation.kind) and (self.names is None or self.names.match(operation.name))

    def allows(self, operation: GraphqlOperation) -> bool:
        """True when every field is one of the rule's."""
        if self.fields is None or not self.about(operation):
            return self.fields is None and self.about(operation)
        return bool(operation.fields) and all(map(self.fields.match, operation.fields))

    def denies(self, operation: GraphqlOperation) -> bool:
        """True when any field is one of the rule's."""
        return self.about(operation) and (self.fields is None or any(map(self.fields.match, operation.fields)))


@dataclass(frozen=True, slots=True, eq=False)
class OperationRules:
    """The rules of one endpoint on GraphQL operations, and the persisted operations that it knows."""

    members: str
    allow: tuple[OperationRule, ...]
    deny: tuple[OperationRule, ...]
    registry: dict[str, GraphqlOperation]

    def input(self, body: GraphqlBody, *, whole: bool) -> list[Json]:
        """The operations of a body as this endpoint sees them: a persisted one is what it was registered as.

        Each is the first rules that allow and deny it. `whole` keeps every operation.
        """
        kinds: dict[object, dict[str, int]] = {}
        for operation in dict.fromkeys(body.operations):
            entry = self._operation(operation)
            known = kinds.setdefault(operation if whole else frozenset(entry), entry)
            known |= {key: min(known[key], entry[key]) for key in entry}
        return [dict(entry) for entry in kinds.values()]

    def allowed(self, operation: GraphqlOperation) -> bool:
        """True when a rule of this endpoint allows an operation."""
        return "allow" in self._operation(operation)

    def _operation(self, operation: GraphqlOperation) -> dict[str, int]:
        if operation.key:
            if operation.key not in self.registry:
                return {"unregistered": 1}
            operation = self.registry[operation.key]
        allow = next((rule.index for rule in self.allow if rule.allows(operation)), None)
        deny = next((rule.index for rule in self.deny if rule.denies(operation)), None)
        return {key: index for key, index in (("allow", allow), ("deny", deny)) if index is not None}


def operation_rules(endpoint: Endpoint) -> OperationRules | None:
    """The operation rules of an endpoint, None where it has none and its protocol wants none."""
    allow = tuple(_operation_rule(n, rule) for n, rule in enumerate(endpoint.rules) if rule.operation_type)
    deny = tuple(_operation_rule(n, rule) for n, rule in enumerate(endpoint.deny_rules) if rule.operation_type)
    if not allow and not deny and endpoint.protocol.lower() not in ("graphql", "websocket"):
        return None
    asked = [patterns for rule in (*allow, *deny) for patterns in (rule.names, rule.fields)]
    known = endpoint.graphql_persisted_queries if endpoint.persisted_queries == "allow_registered" else ()
    registry = {
        key: GraphqlOperation(entry.operation_type.lower(), entry.operation_name, tuple(sorted(set(entry.fields))))
        for key, entry in known
    }
    return OperationRules(members(fault("invalid_operation", asked)), allow, deny, registry)


def _operation_rule(index: int, rule: L7Match) -> OperationRule:
    names = Patterns((rule.operation_name,)) if rule.operation_name else None
    return OperationRule(index, rule.operation_type.lower(), names, Patterns(rule.fields) if rule.fields else None)


def fault(name: str, asked: Iterable[Patterns | None]) -> Json:
    """An entry with the first pattern that is no glob; every question that reaches its endpoint is then denied."""
    bad = next((patterns.fault for patterns in asked if patterns is not None and patterns.fault is not None), None)
    return {} if bad is None else {name: bad}


def members(entries: Json) -> str:
    """JSON of the entries that say something, without braces; the rules take what is absent for false."""
    return json.dumps({key: value for key, value in entries.items() if value is not False}, separators=(",", ":"))[1:-1]
