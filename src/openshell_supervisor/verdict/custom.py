"""Rules of the operator's own (`--policy-rules`): upstream's input and rule names around a module that is not ours.

The module answers the two questions that upstream asks it, `egress_authorization` and `allow_request`; what upstream
decides outside of Rego (which endpoint reads a request, what its denial means, an encoded slash, a body that cannot be
judged) is decided here. The module sees the whole policy: nothing is narrowed, so it costs more than the shipped rules. It
fails closed: an answer of another shape is a denial.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

from openshell_supervisor.errors import PolicyError, Problem
from openshell_supervisor.policy.globs import HOST, PATH, VALUE, glob_problem
from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.verdict.bodies.graphql import GraphqlBody
from openshell_supervisor.verdict.bodies.json_rpc import RpcBody, RpcCall
from openshell_supervisor.verdict.bodies.websocket import WebSocketPart
from openshell_supervisor.verdict.engines.dialect import adapted, rule_names, unsure
from openshell_supervisor.verdict.engines.embedded import PACKAGE, EmbeddedEngine
from openshell_supervisor.verdict.engines.protocol import EngineError, EngineUnavailable, Rules
from openshell_supervisor.verdict.facts import Facts, MatchedEndpoint, Request, Verdict
from openshell_supervisor.verdict.reasons import allowed_reason, printable, request_reason

Json = dict[str, Any]

REQUIRED = ("egress_authorization", "allow_request")
OPTIONAL = ("request_deny_reason",)
_PACKAGE = "package openshell.sandbox"
_INNER_STARS = re.compile(r"\*\*.|[^/]\*\*")  # `**` that is not the whole last segment
_HINT = "the rules of --policy-rules decide here; see the data document and the input in the policy reference"


class Asked(Protocol):
    """What evaluates the module. Raises `EngineError`."""

    def ask(self, rule: str, document: str) -> Any:
        """The value of a rule for an input."""
        ...


def checked_module(text: str, source: str) -> str:
    """The module in the form that both engines take. Raises `PolicyError` where it is in another package, lacks a rule that we
    ask for, or does not compile, with the place where there is one."""
    problems = []
    if _PACKAGE not in (line.split("#")[0].strip() for line in text.splitlines()):
        problems.append(Problem("rules_package", "the module is not in `package openshell.sandbox`", line=1, column=1))
    names = rule_names(text)
    for rule in REQUIRED:
        if rule not in names:
            problems.append(Problem("rules_missing", f"the module has no rule `{rule}`, which every decision asks for"))
    if problems:
        raise PolicyError(tuple(problems), source=source)
    module = adapted(text, (*REQUIRED, *OPTIONAL))
    try:
        embedded_engine(module, {"network_policies": {}})
    except EngineError as error:
        raise PolicyError((_compile_problem(str(error), module),), source=source) from None
    return module


def _compile_problem(said: str, module: str) -> Problem:
    """rego-cpp names a byte offset as `|OFFSET|LENGTH` behind the module's name, and the fault before it."""
    fault = re.search(r"errormsg \d+:([^)]*)\)", said)
    place = re.search(r"sandbox\.rego\|(\d+)\|", said)
    before = module.encode()[: int(place.group(1))].decode(errors="replace") if place else ""
    line = before.count("\n") + 1 if place else 0
    column = len(before.rpartition("\n")[2]) + 1 if place else 0
    text = f"the module does not compile: {fault.group(1).strip() if fault else ' '.join(said.split())[:200]}"
    return Problem("rules_invalid", text, line=line, column=column)


def refuse_unsure(module: str, source: str) -> None:
    """Raise `PolicyError` for a checked module that the embedded engine may misjudge; an OPA server takes it."""
    text = "a call here takes `list[i]`, which the embedded evaluator may not try for each `i`"
    hint = "write `item := list[i]` on a line of its own before the call, or decide in an OPA server (--opa-url)"
    problems = tuple(Problem("rules_unsure", text, line=line, column=1, hint=hint) for line in unsure(module))
    if problems:
        raise PolicyError(problems, source=source)


def refuse_patterns(policy: SandboxPolicy, source: str) -> None:
    """Raise `PolicyError` for patterns that the evaluator's own `glob.match` reads otherwise than upstream's, or not at all.

    There, what is no glob matches nothing (a deny rule would be off), `/**/` wants a segment, `a**` crosses a slash, and in
    rego-cpp a backslash is no escape.
    """
    hint = "write it with `*` within a segment and `**` as the whole last one"
    problems = tuple(
        Problem("rules_pattern", f"rules of your own would read the pattern {pattern!r} otherwise", place, hint=hint)
        for place, pattern, delimiters in _patterns(policy)
        if "\\" in pattern or glob_problem(pattern, delimiters) or ("/" in delimiters and _INNER_STARS.search(pattern))
    )
    if problems:
        raise PolicyError(problems, source=source)


def _patterns(policy: SandboxPolicy) -> Iterable[tuple[str, str, tuple[str, ...]]]:
    """Every pattern with its place and delimiters. What holds no `*` is no pattern for hosts and binaries."""
    for key, rule in policy.network_policies.items():
        place = f"network_policies.{key}"
        yield from ((f"{place}.binaries", binary.path, PATH) for binary in rule.binaries if "*" in binary.path)
        for index, endpoint in enumerate(rule.endpoints):
            here = f"{place}.endpoints[{index}]"
            if "*" in endpoint.host:
                yield here, endpoint.host, HOST
            for match in (*endpoint.rules, *endpoint.deny_rules):
                if match.path:
                    yield here, match.path, PATH
                values = [glob for _, matcher in (*match.query, *match.params) for glob in matcher.globs]
                for glob in (*values, *match.fields, *filter(None, [match.operation_name])):
                    yield here, glob, VALUE
            if endpoint.path:
                yield here, endpoint.path, PATH


def pushed_rules(module: str, data: Json) -> Rules:
    """A checked module and its data for an OPA server of its own: they stand at `data`, where no second supervisor has room."""
    probe = _input(Facts("probe.invalid", 1))
    return Rules(module, PACKAGE, "openshell-sandbox-own", data, (REQUIRED[0], probe))


def embedded_engine(module: str, data: Json) -> EmbeddedEngine:
    """The embedded engine with a checked module and its data. Raises `EngineError`."""
    rules = (*REQUIRED, *(rule for rule in OPTIONAL if rule in rule_names(module)))
    return EmbeddedEngine(module, rules, data)


def decided(facts: Facts, policy: SandboxPolicy, number: int, engine: Asked) -> Verdict:
    """The module's verdict on well-formed facts, host in lower case. Raises `EngineUnavailable`; any other fault is a denial."""
    try:
        connection = _connection(facts, policy, number, engine)
        if facts.request is None or not connection.allow or not connection.inspected:
            return connection
        return _request(facts, facts.request, connection, engine)
    except EngineUnavailable:
        raise
    except (EngineError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = str(error) if isinstance(error, EngineError) else "the module's answer has another shape"
        return _denial(number, "engine_error", f"policy evaluation error: {what}")


def _denial(number: int, reason_id: str, reason: str) -> Verdict:
    return Verdict(False, reason_id, printable(reason), hint=_HINT, generation=number)


def _input(facts: Facts, request: Json | None = None) -> str:
    found: Json = {
        "exec": {"path": facts.binary, "ancestors": facts.ancestors, "cmdline_paths": facts.cmdline},
        "network": {"host": facts.host, "port": facts.port},
    }
    return json.dumps(found if request is None else found | {"request": request})


def _connection(facts: Facts, policy: SandboxPolicy, number: int, engine: Asked) -> Verdict:
    answer = engine.ask("egress_authorization", _input(facts))
    if answer["action"] != "allow":
        reason = str(answer.get("deny_reason", "")) or "network connections not allowed by policy"
        known = "endpoint_not_allowed" if policy.network_policies else "no_policies"
        return _denial(number, "binary_not_allowed" if reason.startswith("binary ") else known, reason)
    matched = str(answer.get("matched_policy", ""))
    return Verdict(
        True,
        "allowed",
        f"{facts.host}:{facts.port} is allowed by policy '{printable(matched)}'",
        policy=matched,
        generation=number,
        endpoints=tuple(_matched(answer.get("matched_endpoints", ()), policy)),
        exact_host=answer.get("exact_declared_endpoint_host") is True,
    )


def _matched(records: Iterable[Json], policy: SandboxPolicy) -> Iterable[MatchedEndpoint]:
    """The policy's own endpoints: what a module says of their settings is not believed, only which they are."""
    for record in records:
        key, index = str(record["policy_name"]), int(record["endpoint_index"])
        yield MatchedEndpoint(key, index, policy.network_policies[key].endpoints[index])


def _request(facts: Facts, request: Request, connection: Verdict, engine: Asked) -> Verdict:
    selected, body = connection.reads(request.path), request.body
    fault = _outside_of_rego(request, selected)
    if selected is None or fault:
        reason = request_reason(request, fault, selected, (), connection)
        return replace(
            connection,
            allow=False,
            reason_id=fault,
            reason=reason,
            hint=_HINT,
            policy=selected.policy if selected else "",
        )
    audited = "enforce" if selected.endpoint.enforced else "audit"
    denied = replace(connection, allow=False, policy=selected.policy, enforcement="enforce", hint=_HINT)
    if isinstance(body, WebSocketPart) and body.control:
        return replace(
            connection,
            policy=selected.policy,
            rule="allow_request",
            reason=allowed_reason(request, selected.policy, ""),
        )
    line = f"{printable(request.method)} {printable(request.path)}"
    for asked in _requests(request):
        text = _input(facts, asked)
        if engine.ask("allow_request", text) is not True:
            reason = _deny_reason(engine, text)
            deny = "deny rule" in reason
            return replace(
                denied, reason_id="deny_rule" if deny else "rule_not_matched", reason=reason, enforcement=audited
            )
    return replace(
        connection,
        policy=selected.policy,
        rule="allow_request",
        reason=f"{line} is allowed by the rules of --policy-rules",
    )


def _outside_of_rego(request: Request, selected: MatchedEndpoint | None) -> str:
    """The reason id of a denial that no module is asked about, or an empty string."""
    if selected is None:
        return "no_endpoint_path"
    protocol, body = selected.endpoint.protocol.lower(), request.body
    if protocol != "rest" and (body is None or body.protocol != protocol):
        return "protocol_not_built"
    if "%2F" in request.path and not selected.endpoint.allow_encoded_slash:
        return "invalid_request_target"
    if body is not None and body.error:
        return "json_rpc_rejected" if isinstance(body, RpcBody) else f"{protocol}_rejected"
    return ""


def _deny_reason(engine: Asked, text: str) -> str:
    try:
        return printable(str(engine.ask("request_deny_reason", text)))
    except EngineUnavailable:
        raise
    except EngineError:  # undefined, or the module has no such rule: upstream's words for both
        return "request denied by policy"


def _requests(request: Request) -> Iterable[Json]:
    """What `allow_request` is asked: once, or once for each call of a batch; each of them has to be allowed."""
    values: dict[str, list[str]] = {}
    for key, value in request.query:
        values.setdefault(key, []).append(value)
    asked: Json = {
        "method": request.method,
        "path": request.path,
        "query_params": values,
        "graphql": None,
        "jsonrpc": None,
    }
    body = request.body
    if body is not None and body.protocol == "websocket" and not getattr(body, "handshake", False):
        asked["method"] = "WEBSOCKET_TEXT"
    if isinstance(body, RpcBody):
        calls = [_call(call) for call in body.calls]
        frames = (
            [_call(None, responses=body.responses, stream=body.receive_stream)] if body.responses or not calls else []
        )
        return [asked | {"jsonrpc": call} for call in (*calls, *frames)]
    graphql = body.graphql if body is not None else None
    return [asked | {"graphql": _graphql(graphql)} if graphql is not None else asked]


def _call(call: RpcCall | None, *, responses: bool = False, stream: bool = False) -> Json:
    tool = call.tool if call is not None and call.tool else None
    return {
        "method": call.method if call is not None else None,
        "params": {"name": tool} if tool else {},
        "tool": tool,
        "receive_stream": stream,
        "has_response": responses,
        "error": None,
    }


def _graphql(body: GraphqlBody) -> Json:
    operations = []
    for operation in body.operations:
        found: Json = {
            "operation_type": operation.kind,
            "fields": list(operation.fields),
            "persisted_query": bool(operation.key),
        }
        if operation.name:
            found["operation_name"] = operation.name
        if operation.key:
            found["persisted_query_hash"] = operation.key
        operations.append(found)
    return {"operations": operations}
