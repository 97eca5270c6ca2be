"""JSON-RPC 2.0 over HTTP: a body to the calls that it makes (policy.md 2.9). The counterpart of MCP is `mcp`, on top of this.

Parameters are not looked at: upstream has no rule on them. A batch is the list of its calls; all of them must be allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from openshell_supervisor.verdict.bodies.strict_json import JsonError, loads, look_alike
from openshell_supervisor.verdict.bodies.wire import (
    DEFAULT_BODY_LIMIT,
    Headers,
    refuse_encodings,
    refuse_longer,
    values,
)

MAX_CALLS = 1024
"""Items of a batch. MCP had batches for three months only, Ethereum nodes stop at 100 to 1000 by default."""
_KEYS = ("jsonrpc", "method", "id", "params", "result", "error")


class RpcError(ValueError):
    """The message is none; the text is the reason that a denial gives."""


@dataclass(frozen=True, slots=True)
class RpcCall:
    """One call or notification. `tool` is what an MCP `tools/call` names."""

    method: str
    tool: str = ""


@dataclass(frozen=True, slots=True)
class RpcBody:
    """What a request asks for. `protocol` says as what it was read, "json-rpc" or "mcp".

    `responses` is True when it (also) answers calls of the server; `receive_stream` for a GET that opens an event stream. With
    an `error` the rest says nothing.
    """

    protocol: str
    calls: tuple[RpcCall, ...] = ()
    responses: bool = False
    receive_stream: bool = False
    error: str = ""
    graphql: None = None

    def texts(self) -> Iterator[str]:
        """Every text of the workload's in it."""
        for call in self.calls:
            yield call.method
            yield call.tool


def parse_json_rpc(method: str, headers: Headers, body: bytes, limit: int = 0) -> RpcBody:
    """The facts of a JSON-RPC request with the HTTP method `method`. `limit` in bytes, 0 for the default.

    Raises `BodyError` for a body over the limit and for one that is compressed or multipart.
    """
    return read_messages("json-rpc", method, headers, body, limit, plain_call)


def plain_call(message: dict[str, Any]) -> RpcCall:
    """A call without regard to its parameters. Raises `RpcError`."""
    if not isinstance(message.get("params", {}), dict | list | None):
        raise RpcError("'params' is neither an object nor an array")
    if "id" in message and not identifier(message["id"], null=True):
        raise RpcError("'id' is neither a string nor a number nor null")
    return RpcCall(message["method"])


def identifier(value: object, *, null: bool) -> bool:
    """True for what may be an `id`: text or a number, and null where `null`."""
    return (isinstance(value, str | int | float) and not isinstance(value, bool)) or (null and value is None)


def read_messages(
    protocol: str, method: str, headers: Headers, body: bytes, limit: int, call: Callable[[dict[str, Any]], RpcCall]
) -> RpcBody:
    """The messages of a body, calls through `call`. Raises `BodyError`; what else is wrong is the result's `error`."""
    refuse_longer(body, limit or DEFAULT_BODY_LIMIT, "HTTP request")
    refuse_encodings(headers, "JSON-RPC request")
    if method == "GET" and not body and _accepts_stream(headers):
        return RpcBody(protocol, receive_stream=True)
    try:
        return _messages(protocol, loads(body), call)
    except JsonError as error:
        detail = str(error)
        return RpcBody(protocol, error="invalid JSON" if detail == "not valid JSON" else f"invalid JSON: {detail}")
    except RpcError as error:
        return RpcBody(protocol, error=str(error))


def _accepts_stream(headers: Headers) -> bool:
    return any(part.split(";")[0].strip().lower() == "text/event-stream" for part in values(headers, "accept"))


def _messages(protocol: str, value: object, call: Callable[[dict[str, Any]], RpcCall]) -> RpcBody:
    if not isinstance(value, list):
        found = _message(value, call)
        return RpcBody(protocol, (found,) if found else (), responses=found is None)
    if not value:
        raise RpcError("empty batch")
    if len(value) > MAX_CALLS:
        raise RpcError(f"batch has more than {MAX_CALLS} items")
    try:
        items = [_message(item, call) for item in value]
    except RpcError as error:
        raise RpcError(f"batch item invalid: {error}") from None
    return RpcBody(protocol, tuple(item for item in items if item), responses=None in items)


def _message(value: object, call: Callable[[dict[str, Any]], RpcCall]) -> RpcCall | None:
    """The call that a message is, or None for an answer. Raises `RpcError`."""
    if not isinstance(value, dict):
        raise RpcError("message is not an object")
    if odd := look_alike(value, _KEYS):
        raise RpcError(f"the key '{odd[:40]}' differs from a JSON-RPC key in case alone")
    version = value.get("jsonrpc")
    if not isinstance(version, str):
        raise RpcError("missing or non-string 'jsonrpc' field")
    if version != "2.0":
        raise RpcError("unsupported 'jsonrpc' version, expected 2.0")
    answers = [key for key in ("result", "error") if key in value]
    if "method" in value:
        if answers:
            raise RpcError("message has both 'method' and 'result' or 'error'")
        if not isinstance(value["method"], str) or not value["method"]:
            raise RpcError("missing or non-string 'method' field")
        return call(value)
    if not answers:
        raise RpcError("missing or non-string 'method' field")
    if len(answers) == 2:
        raise RpcError("response has both 'result' and 'error'")
    if "id" not in value or not identifier(value["id"], null=True):
        raise RpcError("response has no valid 'id'")
    return None
