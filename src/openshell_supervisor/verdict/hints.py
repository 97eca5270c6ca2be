"""What would have allowed a denied connection or request, for a person. It never influences the decision."""

from __future__ import annotations

import difflib

from openshell_supervisor.policy.lint import HTTP_METHODS
from openshell_supervisor.policy.model import Endpoint, L7Allow
from openshell_supervisor.verdict.bodies.graphql import GraphqlBody
from openshell_supervisor.verdict.bodies.json_rpc import RpcBody
from openshell_supervisor.verdict.bodies.rules import call_rules, operation_rules
from openshell_supervisor.verdict.bodies.websocket import TEXT_METHOD
from openshell_supervisor.verdict.facts import Facts, MatchedEndpoint, Request, Verdict
from openshell_supervisor.verdict.index import Index, domain
from openshell_supervisor.verdict.reasons import MAX_QUOTED, quoted


def connection_hint(facts: Facts, reason_id: str, index: Index) -> str:
    """What would allow a denied connection, or what was probably meant."""
    host, place = quoted(facts.host), f"host: {quoted(facts.host)}, port: {facts.port}"
    if reason_id == "engine_error":
        return "a host pattern of the policy is not a glob; `openshell-supervisor check` names it"
    if reason_id == "binary_not_allowed":
        return f"add `- path: {quoted(facts.binary)}` to `binaries` of the rule, if this program may use it"
    if reason_id == "no_policies":
        return f"the policy has no network_policies; to allow this one add a rule with the endpoint {{{place}}}"
    same = index.hosts.get(facts.host)
    if same:
        ports = ", ".join(str(port) for compiled in same for port in compiled.endpoint.ports)
        return f"policy '{same[0].policy}' allows {host} on port {ports} only; add {facts.port} to its `ports`"
    if facts.host.endswith(".") and facts.host[:-1] in index.hosts:
        return "the host ends with a dot; rules are compared with names without it"
    for pattern in (f"*.{facts.host}", f"**.{facts.host}"):
        for compiled in index.hosts.get(pattern, ()):
            return (
                f"'{pattern}' of policy '{compiled.policy}' covers names below {host} only; add an endpoint {{{place}}}"
            )
    close = difflib.get_close_matches(
        facts.host[:MAX_QUOTED], index.relatives.get(domain(facts.host), ()), n=1, cutoff=0.75
    )
    similar = f" (the policy has '{close[0]}')" if close else ""
    return f"to allow it add an endpoint {{{place}}} to a rule under network_policies{similar}"


def request_hint(
    request: Request, reason_id: str, selected: MatchedEndpoint | None, rule: str, connection: Verdict
) -> str:
    """What would allow a denied request, naming the endpoint to change."""
    if reason_id == "engine_error":
        return "a path or query pattern of the policy is not a glob; `openshell-supervisor check` names it"
    if selected is None:
        paths = ", ".join(sorted({item.endpoint.path for item in connection.endpoints if item.endpoint.inspected}))
        return f"the endpoints of this host cover only: {quoted(paths)}; add an endpoint with a `path` that covers this one"
    where = f"policy '{selected.policy}', endpoints[{selected.index}] ({selected.endpoint.place()})"
    if reason_id == "protocol_not_built":
        return f"{where} has protocol {selected.endpoint.protocol}; only rest is inspected so far"
    if reason_id in ("json_rpc_rejected", "graphql_rejected", "websocket_rejected"):
        return "the request itself is at fault, no rule can allow it; the reason says what is wrong with it"
    if reason_id == "graphql_not_registered":
        return (
            f"register it: `persisted_queries: allow_registered` and an entry of `graphql_persisted_queries` in {where}"
        )
    if reason_id == "json_rpc_response":
        return "only protocol mcp lets a client answer the server"
    if reason_id == "invalid_request_target":
        return f"add `allow_encoded_slash: true` to {where}"
    if reason_id == "deny_rule":
        return f"{rule} of policy '{selected.policy}' denies it; a deny rule wins over every allow"
    if selected.endpoint.access and selected.endpoint.access not in ("read-only", "read-write", "full"):
        return f"access '{quoted(selected.endpoint.access)}' of {where} is not a preset, so nothing is allowed"
    return f"{_nearly(request, selected)}to allow it add `- allow: {_rule(request, selected.endpoint)}` to `rules` of {where}"


def _rule(request: Request, endpoint: Endpoint) -> str:
    body = request.body
    if isinstance(body, RpcBody):
        return _call_rule(body, endpoint)
    if body is not None and body.graphql is not None:
        return _operation_rule(body.graphql, endpoint)
    known = request.method.upper() in (*HTTP_METHODS, TEXT_METHOD)
    method = request.method.upper() if known else quoted(request.method)
    return f'{{method: {method}, path: "{quoted(request.path)}"}}'


def _call_rule(body: RpcBody, endpoint: Endpoint) -> str:
    """A rule for the first call that the endpoint's own rules do not allow."""
    rules = call_rules(endpoint)
    call = next((call for call in body.calls if rules is None or rules.allow.first(call) is None), None)
    if call is None:
        return "{method: ...}; calls are made by POST alone"
    if body.protocol == "mcp" and call.method == "tools/call":
        return f'{{method: tools/call, tool: "{quoted(call.tool)}"}}'
    return f'{{method: "{quoted(call.method)}"}}'


def _operation_rule(body: GraphqlBody, endpoint: Endpoint) -> str:
    """A rule for the first operation that the endpoint's own rules do not allow."""
    rules = operation_rules(endpoint)
    found = [item for item in body.operations if rules is None or not rules.allowed(item)]
    if not found:
        return "{operation_type: ..., fields: [...]}; another endpoint of this host refuses the operation"
    operation = found[0]
    if rules is not None and operation.key in rules.registry:
        operation = rules.registry[operation.key]
    return f"{{operation_type: {operation.kind}, fields: [{quoted(', '.join(operation.fields))}]}}"


def _nearly(request: Request, selected: MatchedEndpoint) -> str:
    """A remark where a rule came close: same path with another method, or a `*` that would have to cross a slash."""
    if request.body is not None:
        return ""
    rules: tuple[L7Allow, ...] = selected.endpoint.rules
    methods = [rule.method for rule in rules if rule.path == request.path]
    if methods:
        return f"this path is allowed for {', '.join(methods)} only; "
    for rule in rules:
        stem = rule.path.rstrip("*")
        if rule.path.endswith("/*") and request.path.startswith(stem) and "/" in request.path[len(stem) :]:
            return f"`{rule.path}` covers one segment, `{stem}**` would cover all below it; "
        if rule.path.endswith("/**") and request.path == stem.rstrip("/"):
            return f"`{rule.path}` does not cover `{request.path}` itself; "
    return ""
