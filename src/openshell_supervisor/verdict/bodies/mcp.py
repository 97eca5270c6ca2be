"""MCP over streamable HTTP: JSON-RPC whose known methods have typed parameters and whose tool calls name a tool (policy.md 2.9).

The table of methods is that of the MCP schema as upstream checks it; a method that is not in it passes with any parameters, and
whether it is allowed is for the rules to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from openshell_supervisor.verdict.bodies.json_rpc import RpcBody, RpcCall, RpcError, identifier, read_messages
from openshell_supervisor.verdict.bodies.strict_json import look_alike
from openshell_supervisor.verdict.bodies.wire import Headers

_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")
"""Upstream's strict form, that of the MCP specification (2025-11-25, tools, "Tool Names")."""
_IDENTIFIER = (str, int)
_Fields = Mapping[str, type | tuple[type, ...]]
_URI: _Fields = {"uri": str}
_TASK: _Fields = {"taskId": str}
_REQUIRED: Mapping[str, _Fields] = {
    "initialize": {"protocolVersion": str, "capabilities": dict, "clientInfo": dict},
    "tools/call": {"name": str},
    "resources/read": _URI,
    "resources/subscribe": _URI,
    "resources/unsubscribe": _URI,
    "prompts/get": {"name": str},
    "completion/complete": {"ref": dict, "argument": dict},
    "logging/setLevel": {"level": str},
    "tasks/get": _TASK,
    "tasks/update": _TASK,
    "tasks/result": _TASK,
    "tasks/cancel": _TASK,
}
_REQUIRED_OF_NOTIFICATIONS: Mapping[str, _Fields] = {
    "notifications/cancelled": {"requestId": _IDENTIFIER},
    "notifications/progress": {"progressToken": _IDENTIFIER, "progress": (int, float)},
}
_CLIENT: _Fields = {"name": str, "version": str}


def parse_mcp(method: str, headers: Headers, body: bytes, limit: int = 0, strict_tool_names: bool = True) -> RpcBody:
    """The facts of an MCP request with the HTTP method `method`. `limit` in bytes, 0 for the default.

    Raises `BodyError` for a body over the limit and for one that is compressed or multipart.
    """
    return read_messages("mcp", method, headers, body, limit, partial(_call, strict_tool_names=strict_tool_names))


def _call(message: dict[str, Any], strict_tool_names: bool) -> RpcCall:
    method, params = message["method"], message.get("params")
    if "id" in message and (not identifier(message["id"], null=False) or isinstance(message["id"], float)):
        raise RpcError("'id' of an MCP request is neither a string nor an integer")
    if params is not None and not isinstance(params, dict):
        raise RpcError("invalid MCP request params: not an object")
    table = _REQUIRED if "id" in message else {**_REQUIRED_OF_NOTIFICATIONS, "tools/call": _REQUIRED["tools/call"]}
    _check(params or {}, table.get(method, {}))
    if method == "initialize" and "id" in message:
        _check(message["params"]["clientInfo"], _CLIENT)
    if method != "tools/call":
        return RpcCall(method)
    tool = message["params"]["name"]
    if strict_tool_names and not _TOOL_NAME.match(tool):
        raise RpcError("MCP tool name does not match ^[A-Za-z0-9_.-]{1,128}$, which strict_tool_names requires")
    return RpcCall(method, tool)


def _check(table: dict[str, Any], fields: _Fields) -> None:
    if odd := look_alike(table, fields):
        raise RpcError(f"invalid MCP request params: the key '{odd[:40]}' differs from a known key in case alone")
    for name, kind in fields.items():
        if name not in table:
            raise RpcError(f"invalid MCP request params: missing field `{name}`")
        if not isinstance(table[name], kind) or isinstance(table[name], bool):
            raise RpcError(f"invalid MCP request params: field `{name}` has the wrong type")
