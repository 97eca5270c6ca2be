"""GraphQL over HTTP: a request to the operations that it would execute (policy.md 2.9).

Whatever a server could execute instead is judged too or refused: a document that comes with the identifier of another one, a URL
that says otherwise than the body, a key that only a case-blind reader takes for `query`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from openshell_supervisor.verdict.bodies.graphql_document import Document, DocumentError
from openshell_supervisor.verdict.bodies.strict_json import JsonError, loads, look_alike
from openshell_supervisor.verdict.bodies.wire import (
    DEFAULT_BODY_LIMIT,
    BodyError,
    Headers,
    media_type,
    refuse_encodings,
    refuse_longer,
)

MAX_BATCH = 100
"""Requests of a batch; Apollo's clients send 10 at most by default, and servers commonly stop at 100."""
MAX_FIELDS = 1000
"""Root fields of all operations of a request; a hand-written one has a dozen, and each is compared with every rule."""
MAX_IDENTIFIER = 1024
"""Characters of a persisted query's identifier; a SHA-256 in hexadecimal has 64."""
_IDENTIFIERS = ("id", "documentId", "queryId")
_KEYS = ("query", "operationName", "extensions", *_IDENTIFIERS)

Query = tuple[tuple[str, str], ...]


class GraphqlError(ValueError):
    """The request is none that could be judged; the text is the reason that a denial gives."""


@dataclass(frozen=True, slots=True)
class GraphqlOperation:
    """One operation. A persisted one has `kind` "" and a `key`, which is its hash or identifier; `fields` are sorted."""

    kind: str = ""
    name: str = ""
    fields: tuple[str, ...] = ()
    key: str = ""


@dataclass(frozen=True, slots=True)
class GraphqlBody:
    """What a request would execute; every operation must be allowed. With an `error` the rest says nothing."""

    operations: tuple[GraphqlOperation, ...] = ()
    error: str = ""
    protocol: str = "graphql"

    @property
    def graphql(self) -> GraphqlBody | None:
        """Itself; a WebSocket message has one of these within."""
        return self

    def texts(self) -> Iterator[str]:
        """Every text of the workload's in it."""
        for operation in self.operations:
            yield from (operation.kind, operation.name, operation.key, *operation.fields)


def parse_graphql(method: str, query: Query, headers: Headers, body: bytes, limit: int = 0) -> GraphqlBody:
    """The facts of a GraphQL request. `query` holds the URL's decoded parameters; `limit` is in bytes, 0 for the default.

    Raises `BodyError` for a body over the limit, compressed, or of a type that is not JSON.
    """
    refuse_longer(body, limit or DEFAULT_BODY_LIMIT, "GraphQL request")
    refuse_encodings(headers, "GraphQL request")
    kind = media_type(headers)[0]
    # A form is read as `query=...` by many servers, and text can be JSON and such a form at once.
    if body and kind not in ("", "application/json") and not kind.endswith("+json"):
        raise BodyError("unsupported_content_type", f"GraphQL request content-type {kind[:80]} is not supported")
    try:
        if method == "GET":
            return _bounded(_get(query, body))
        if method == "POST":
            return _bounded(_post(query, body))
        raise GraphqlError(f"unsupported GraphQL HTTP method {method}")
    except GraphqlError as error:
        return GraphqlBody(error=str(error))


def _bounded(found: Iterator[GraphqlOperation]) -> GraphqlBody:
    operations = tuple(found)
    if sum(len(operation.fields) for operation in operations) > MAX_FIELDS:
        raise GraphqlError(f"GraphQL request asks for more than {MAX_FIELDS} root fields")
    return GraphqlBody(operations)


def message_body(payload: Mapping[str, Any]) -> GraphqlBody:
    """The operation of a message's payload. Raises `GraphqlError`."""
    return _bounded(envelope(payload))


def _get(query: Query, body: bytes) -> Iterator[GraphqlOperation]:
    if body:
        raise GraphqlError("GraphQL GET request has a body")
    found: dict[str, Any] = {}
    for key, value in query:
        if key in found and key in _KEYS:
            raise GraphqlError(f"GraphQL parameter {key} is there twice")
        found[key] = value
    if found.get("extensions"):
        found["extensions"] = _json(found["extensions"].encode("utf-8", "surrogatepass"), "GraphQL extensions")
    yield from envelope(found)


def _post(query: Query, body: bytes) -> Iterator[GraphqlOperation]:
    if not body.strip():
        raise GraphqlError("GraphQL POST body is empty")
    value = _json(body, "GraphQL request body")
    requests = value if isinstance(value, list) else [value]
    if not requests:
        raise GraphqlError("GraphQL batch request is empty")
    if len(requests) > MAX_BATCH:
        raise GraphqlError(f"GraphQL batch has more than {MAX_BATCH} requests")
    for request in requests:
        if not isinstance(request, dict):
            raise GraphqlError("GraphQL request is not a JSON object")
        for key, said in query:  # some servers prefer the URL, some the body
            if key in _KEYS and request.get(key) != said:
                raise GraphqlError(f"GraphQL parameter {key} of the URL is not that of the body")
        yield from envelope(request)


def _json(text: bytes, what: str) -> Any:
    try:
        return loads(text)
    except JsonError as error:
        detail = str(error)
        raise GraphqlError(
            f"{what} is not valid JSON" + ("" if detail == "not valid JSON" else f": {detail}")
        ) from None


def envelope(request: Mapping[str, Any]) -> Iterator[GraphqlOperation]:
    """The operations of one request object: that of its document, and a persisted one. Raises `GraphqlError`."""
    if odd := look_alike(dict(request), _KEYS):
        raise GraphqlError(f"the key '{odd[:40]}' differs from a GraphQL key in case alone")
    text, wanted = _text(request, "query"), _text(request, "operationName") or ""
    digest = _hash(request.get("extensions"))
    identifiers = [value for key in _IDENTIFIERS if (value := _text(request, key)) is not None]
    if len(identifiers) > 1:
        raise GraphqlError("GraphQL persisted query identifiers must not be combined")
    keys = [digest, *identifiers] if digest else identifiers
    if not all(0 < len(key) <= MAX_IDENTIFIER for key in keys):
        raise GraphqlError("GraphQL persisted query identifier is empty or too long")
    if text is None and not keys:
        raise GraphqlError("GraphQL request has no query document or persisted query identifier")
    if text is not None:
        yield _operation(text, wanted)
        if digest and digest.lower() != hashlib.sha256(text.encode()).hexdigest():
            raise GraphqlError("GraphQL persisted query hash is not that of the document")
        keys = identifiers
    for key in keys:  # where there are several, or one beside a document, servers differ in what they execute
        yield GraphqlOperation(key=key)


def _text(request: Mapping[str, Any], key: str) -> str | None:
    value = request.get(key)
    if value is not None and not isinstance(value, str):
        raise GraphqlError(f"GraphQL {key} is not a string")
    return value


def _hash(extensions: object) -> str:
    """The hash of automatic persisted queries, or an empty string."""
    if extensions is None or extensions == "":
        return ""
    if not isinstance(extensions, dict):
        raise GraphqlError("GraphQL extensions are not an object")
    if look_alike(extensions, ("persistedQuery",)):
        raise GraphqlError("a key of GraphQL extensions differs from persistedQuery in case alone")
    persisted = extensions.get("persistedQuery")
    if persisted is None:
        return ""
    if not isinstance(persisted, dict) or look_alike(persisted, ("sha256Hash",)):
        raise GraphqlError("GraphQL persistedQuery is not an object with a sha256Hash")
    found = persisted.get("sha256Hash")
    if not isinstance(found, str) or not found:
        raise GraphqlError("GraphQL persistedQuery is not an object with a sha256Hash")
    return found


def _operation(text: str, wanted: str) -> GraphqlOperation:
    """The operation of a document that would be executed; an empty `wanted` is none at all."""
    try:
        document = Document(text)
        found = document.operations
        if not found:
            raise GraphqlError("GraphQL document has no operation")
        if wanted:
            found = [operation for operation in found if operation.name == wanted]
            if not found:
                raise GraphqlError(f"GraphQL operation {json.dumps(wanted[:80])} was not found in the document")
        elif len(found) > 1:
            raise GraphqlError("GraphQL document has multiple operations but no operationName")
        return GraphqlOperation(found[0].kind, found[0].name, document.root_fields(found[0]))
    except DocumentError as error:
        raise GraphqlError(f"GraphQL document parse error: {error}") from None
