"""From an endpoint to the parser of its protocol: what a request's headers and body are to the rules.

The one way from bytes to `Request.body`, for the proxy, `explain` and replay alike.
"""

from __future__ import annotations

from dataclasses import replace

from openshell_supervisor.policy.model import Endpoint
from openshell_supervisor.verdict.bodies.graphql import parse_graphql
from openshell_supervisor.verdict.bodies.json_rpc import parse_json_rpc
from openshell_supervisor.verdict.bodies.mcp import parse_mcp
from openshell_supervisor.verdict.bodies.websocket import TEXT_METHOD, parse_handshake, parse_text
from openshell_supervisor.verdict.bodies.wire import DEFAULT_BODY_LIMIT, Headers, Unread
from openshell_supervisor.verdict.facts import Request


def body_limit(endpoint: Endpoint) -> int:
    """How many bytes of a request's body must be held to judge it; 0 where the protocol needs none."""
    protocol = endpoint.protocol.lower()
    if protocol in ("json-rpc", "mcp"):
        return endpoint.json_rpc_max_body_bytes or DEFAULT_BODY_LIMIT
    if protocol == "graphql":
        return endpoint.graphql_max_body_bytes or DEFAULT_BODY_LIMIT
    return 0


def read_body(request: Request, endpoint: Endpoint, headers: Headers, body: bytes) -> Request:
    """The request with what the protocol of `endpoint` (the one that `Verdict.reads` names) needs of headers and body.

    `body` is whole, or as much as one byte over `body_limit`. Raises `BodyError` for what is refused before any rule is asked.
    """
    protocol, limit = endpoint.protocol.lower(), body_limit(endpoint)
    if protocol == "json-rpc":
        return replace(request, body=parse_json_rpc(request.method, headers, body, limit))
    if protocol == "mcp":
        strict = not (endpoint.mcp and endpoint.mcp.strict_tool_names is False)
        return replace(request, body=parse_mcp(request.method, headers, body, limit, strict))
    if protocol == "graphql":
        return replace(request, body=parse_graphql(request.method, request.query, headers, body, limit))
    if protocol == "websocket":
        return replace(request, body=parse_handshake(request.method, headers))
    if protocol == "sql":
        return replace(request, body=Unread(protocol))
    return request


def read_message(handshake: Request, endpoint: Endpoint, text: bytes) -> Request:
    """The request that a client's text message is judged as, after `handshake` was let through to a websocket endpoint.

    `text` is the whole message. Raises `BodyError` for one that is too long.
    """
    return replace(handshake, method=TEXT_METHOD, body=parse_text(endpoint, text))
