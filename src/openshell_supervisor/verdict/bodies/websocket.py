"""WebSocket: the opening handshake, and a client's text messages, which may carry GraphQL (policy.md 2.9).

A message is judged as a request with the method WEBSOCKET_TEXT and the handshake's path and query. Binary messages and what the
server sends are not looked at, as upstream has it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from openshell_supervisor.policy.model import Endpoint
from openshell_supervisor.verdict.bodies.graphql import GraphqlBody, GraphqlError, message_body
from openshell_supervisor.verdict.bodies.strict_json import JsonError, loads, look_alike
from openshell_supervisor.verdict.bodies.wire import BodyError, Headers, values

TEXT_METHOD = "WEBSOCKET_TEXT"
MAX_TEXT_BYTES = 4 * 1024 * 1024
"""Bytes of one text message, upstream's limit; the same as of a message that carries GraphQL."""
_OPERATIONS = ("subscribe", "start")
_CONTROLS = ("connection_init", "connection_terminate", "ping", "pong", "complete", "stop")


@dataclass(frozen=True, slots=True)
class WebSocketPart:
    """A handshake, or a text message: then `control` is the type of a GraphQL control message, or `graphql` its operation.

    A message of an endpoint without GraphQL rules has neither. With an `error` the rest says nothing.
    """

    handshake: bool = False
    control: str = ""
    graphql: GraphqlBody | None = None
    error: str = ""
    protocol: str = "websocket"

    def texts(self) -> Iterator[str]:
        """Every text of the workload's in it."""
        yield self.control
        if self.graphql is not None:
            yield from self.graphql.texts()


def graphql_mode(endpoint: Endpoint) -> bool:
    """True when the messages of a websocket endpoint are read as GraphQL: something in it speaks of operations."""
    rules = (*endpoint.rules, *endpoint.deny_rules)
    return (
        any(rule.operation_type or rule.operation_name or rule.fields for rule in rules)
        or bool(endpoint.graphql_persisted_queries)
        or endpoint.persisted_queries not in ("", "deny")
    )


def parse_handshake(method: str, headers: Headers) -> WebSocketPart:
    """The facts of a request to a websocket endpoint, which must be a handshake (RFC 6455, 4.2.1)."""
    problem = _handshake_problem(method, headers)
    return WebSocketPart(handshake=True, error=problem)


def _handshake_problem(method: str, headers: Headers) -> str:
    if method != "GET":
        return "the method is not GET"
    if [value.lower() for value in values(headers, "upgrade")] != ["websocket"]:
        return "there is no `Upgrade: websocket`"
    if "upgrade" not in (value.lower() for value in values(headers, "connection")):
        return "there is no `Connection: Upgrade`"
    if [value for key, value in headers if key == "sec-websocket-version"] != ["13"]:
        return "Sec-WebSocket-Version is not 13"
    keys = [value for key, value in headers if key == "sec-websocket-key"]
    try:
        sound = len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == 16
    except (binascii.Error, ValueError):
        sound = False
    return "" if sound else "Sec-WebSocket-Key is not one key of 16 bytes"


def parse_text(endpoint: Endpoint, message: bytes) -> WebSocketPart:
    """The facts of one whole text message to this endpoint. Raises `BodyError` for one over `MAX_TEXT_BYTES`."""
    if len(message) > MAX_TEXT_BYTES:
        raise BodyError("body_too_large", f"WebSocket text message exceeds {MAX_TEXT_BYTES} byte inspection limit")
    if not graphql_mode(endpoint):
        return WebSocketPart()
    try:
        return _graphql(loads(message))
    except JsonError as error:
        detail = str(error)
        what = "GraphQL WebSocket message is not valid JSON"
        return WebSocketPart(error=what if detail == "not valid JSON" else f"{what}: {detail}")
    except GraphqlError as error:
        return WebSocketPart(error=str(error))


def _graphql(message: Any) -> WebSocketPart:
    if not isinstance(message, dict):
        raise GraphqlError("GraphQL WebSocket message is not a JSON object")
    if odd := look_alike(message, ("type", "id", "payload")):
        raise GraphqlError(f"the key '{odd[:40]}' differs from a key of GraphQL over WebSocket in case alone")
    kind = message.get("type")
    if not isinstance(kind, str):
        raise GraphqlError("GraphQL WebSocket message has no type")
    if kind in _CONTROLS:
        return WebSocketPart(control=kind)
    if kind not in _OPERATIONS:
        raise GraphqlError(f"unsupported GraphQL WebSocket client message type {kind[:40]}")
    if not isinstance(message.get("id"), str) or not message["id"]:
        raise GraphqlError("GraphQL WebSocket operation has no id")
    if not isinstance(message.get("payload"), dict):
        raise GraphqlError("GraphQL WebSocket operation has no payload")
    return WebSocketPart(graphql=message_body(message["payload"]))
