"""The sentence of a verdict, in upstream's words where upstream has one (policy.md 2.4, 2.5).

The rules decide and name a reason; the sentence is written here, so that no text of the workload's comes out of an evaluator
whose escaping we would have to trust. `deny_reason` and `request_deny_reason` of the Rego say the same; a test compares them.
"""

from __future__ import annotations

from collections.abc import Sequence

from openshell_supervisor.verdict.bodies.websocket import WebSocketPart
from openshell_supervisor.verdict.bodies.wire import Unread
from openshell_supervisor.verdict.facts import Body, Facts, MatchedEndpoint, Request, Verdict

MAX_QUOTED = 120
"""Characters of a request's own text repeated in a hint."""

SYMLINK_HINT = (
    "SYMLINK HINT: the binary path is the kernel-resolved target of /proc/<pid>/exe, not the symlink. "
    "If the policy names a symlink, run `readlink -f` on it inside the sandbox and list the resolved path."
)


def quoted(text: str) -> str:
    """Text of the workload's, cut to a length that a hint can bear and without control characters."""
    clean = printable(text[: MAX_QUOTED + 1])
    return clean if len(text) <= MAX_QUOTED else f"{clean[: MAX_QUOTED - 3]}..."


def printable(text: str) -> str:
    """Text without control characters: a reason may not break a log line or drive a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def allowed_reason(request: Request, policy: str, rule: str) -> str:
    """The sentence of an allowed request."""
    body = request.body
    if isinstance(body, WebSocketPart) and body.control:
        return f"GraphQL WebSocket control message {body.control}"
    if isinstance(body, Unread):
        return (
            f"protocol {body.protocol} is not parsed, so {printable(request.method)} {printable(request.path)} passes"
        )
    return f"{printable(request.method)} {printable(request.path)} is allowed by {rule} of policy '{policy}'"


def refused_as(body: Body) -> str:
    """The reason_id of a body with an error."""
    return f"{ {'json-rpc': 'json_rpc', 'mcp': 'json_rpc'}.get(body.protocol, body.protocol) }_rejected"


def rejection(body: Body) -> str:
    """The sentence that refuses a body with an error."""
    what = {"graphql": "GraphQL request", "websocket": "GraphQL WebSocket message"}.get(
        body.protocol, "JSON-RPC request"
    )
    if isinstance(body, WebSocketPart) and body.handshake:
        what = "WebSocket handshake"
    return f"{what} rejected: {printable(body.error)}"


def connection_reason(facts: Facts, reason_id: str, policies: Sequence[str], errors: Sequence[str]) -> str:
    """Why a connection is denied. `policies` have the endpoint and not the binary; `errors` are patterns that are no globs."""
    if reason_id == "engine_error":
        return f"policy evaluation error: invalid glob '{errors[0]}'" if errors else "policy evaluation error"
    if reason_id == "binary_not_allowed":
        callers = f"(ancestors: [{' -> '.join(facts.ancestors)}], cmdline: [{', '.join(facts.cmdline)}])"
        return printable(
            "; ".join(
                f"binary '{facts.binary}' not allowed in policy '{key}' {callers}. {SYMLINK_HINT}" for key in policies
            )
        )
    if reason_id == "endpoint_not_allowed":
        return f"endpoint {printable(facts.host)}:{facts.port} is not allowed by any policy"
    return "network connections not allowed by policy"


def request_reason(
    request: Request,
    reason_id: str,
    selected: MatchedEndpoint | None,
    errors: Sequence[str],
    connection: Verdict,
    vetoed: bool = False,
) -> str:
    """Why a request is denied whose connection is allowed. `vetoed`: an endpoint does not allow one of its operations."""
    line = f"{printable(request.method)} {printable(request.path)}"
    if reason_id == "engine_error":
        return f"L7 evaluation error: invalid glob '{errors[0]}'" if errors else "L7 evaluation error"
    if reason_id == "protocol_not_built":
        protocol = selected.endpoint.protocol.lower() if selected else ""
        return f"protocol {protocol} is not built yet, so no request to this endpoint is let through"
    if reason_id == "invalid_request_target":
        return "request-target contains an encoded '/' (%2F) which is not allowed on this endpoint"
    body = request.body
    if body is not None and body.error and reason_id == refused_as(body):
        return rejection(body)
    if reason_id == "json_rpc_response":
        return "JSON-RPC response frames are not permitted from client to server"
    if reason_id == "graphql_not_registered":
        return "GraphQL persisted query is not registered"
    if body is not None and body.graphql is not None and reason_id in ("deny_rule", "rule_not_matched"):
        blocked = reason_id == "deny_rule" or vetoed
        return f"GraphQL operation {'blocked by endpoint policy' if blocked else 'not permitted by policy'}"
    if reason_id == "deny_rule":
        return f"{line} blocked by deny rule"
    if reason_id == "no_endpoint_path" and sum(item.endpoint.inspected for item in connection.endpoints) > 1:
        return "no L7 endpoint path matched request"
    return f"{line} not permitted by policy"
