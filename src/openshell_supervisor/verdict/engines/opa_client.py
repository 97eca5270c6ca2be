"""The way to an OPA server: its address, its token, its certificate, and the four requests that we send it.

opa-python-client's `AsyncOpaClient` builds and sends the requests. What it has no parameter for is added below it, in the aiohttp
session that it uses: Unix sockets, a CA file, and no redirects (a redirect would carry the token elsewhere).
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from opa_client.errors import ConnectionsError  # type: ignore[import-untyped]
from opa_client.errors import RegoParseError as RegoParseError  # what a refused module is answered with
from opa_client.opa_async import AsyncOpaClient  # type: ignore[import-untyped]

from openshell_supervisor.errors import SettingsError

MAX_TOKEN = 16384
"""Bytes of a token file; a Kubernetes service account's is about 1 KiB, and an HTTP head of more is refused by most servers."""
MAX_ANSWER = 8 << 20
"""Bytes of an answer. A verdict is below 1 KiB a matching endpoint; a policy holds at most 256 KiB (policy.md 5.4)."""
CONNECTIONS = 32
"""At once; further questions wait within their second."""


@dataclass(frozen=True, slots=True)
class OpaAddress:
    """Where the server is, and what proves both ends. `socket` is a path, or empty for TCP."""

    text: str
    host: str = "opa.invalid"
    port: int = 80
    tls: bool = False
    socket: str = ""
    token_file: Path | None = None
    ca_file: Path | None = None


class Refused(Exception):
    """The server answered with a status that is no answer to the question; `status` is HTTP's."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(f"HTTP {status}" + (f": {what}" if what else ""))
        self.status = status


def opa_address(text: str, token_file: Path | None = None, ca_file: Path | None = None) -> OpaAddress:
    """The address of `--opa-url`: `http://HOST[:PORT]`, `https://HOST[:PORT]` or `unix:/PATH`. Raises `SettingsError`.

    A port that is not given is the scheme's (80, 443), as in every URL; OPA itself listens on 8181 unless told otherwise.
    """
    hint = "use http://HOST:PORT, https://HOST:PORT or unix:/PATH"
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/") or "\0" in path:
            raise SettingsError("the OPA server's socket is no absolute path", code="opa_url_invalid", hint=hint)
        if ca_file is not None:
            raise SettingsError("a CA file for the OPA server needs https", code="opa_ca_without_tls", hint=hint)
        return OpaAddress(text, socket=path, token_file=token_file)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    more = (
        parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None or not text.isprintable()
    )
    if parts.scheme not in ("http", "https") or not host or more or port == 0:
        raise SettingsError(f"the OPA server's URL is not usable: {_shown(text)}", code="opa_url_invalid", hint=hint)
    if ca_file is not None and parts.scheme == "http":
        raise SettingsError("a CA file for the OPA server needs https", code="opa_ca_without_tls", hint=hint)
    tls = parts.scheme == "https"
    bracketed = f"[{host}]" if ":" in host else host
    return OpaAddress(text, bracketed, port or (443 if tls else 80), tls, "", token_file, ca_file)


def _shown(text: str) -> str:
    """A URL without what may be a password."""
    return repr(text if "@" not in text else f"…@{text.rpartition('@')[2]}")


def read_token(path: Path) -> str:
    """The bearer token of a file, without the white space around it. Raises `OSError` or `ValueError`."""
    with path.open("rb") as file:
        raw = file.read(MAX_TOKEN + 1)
    token = raw.strip().decode("ascii", "replace")
    if len(raw) > MAX_TOKEN or not token or not all("!" <= c <= "~" for c in token):
        raise ValueError("the token file does not hold one line of visible ASCII")
    return token


class OpaClient(AsyncOpaClient):  # type: ignore[misc]  # the library has no types
    """One session with the server. `timeout` is in seconds and for a whole request. Raises `OSError`, `ValueError` (files)."""

    def __init__(self, address: OpaAddress, timeout: float) -> None:
        token = read_token(address.token_file) if address.token_file is not None else None
        super().__init__(address.host, address.port, ssl=address.tls, token=token, retries=0, timeout=timeout)
        self._address = address
        self._context = ssl.create_default_context(cafile=address.ca_file) if address.tls else None

    async def _init_session(self) -> None:
        connector: aiohttp.BaseConnector
        if self._address.socket:
            connector = aiohttp.UnixConnector(self._address.socket, limit=CONNECTIONS)
        else:
            connector = aiohttp.TCPConnector(ssl=self._context or False, limit=CONNECTIONS)
        # No trust_env: the proxy variables of this environment are not for us.
        self._session = aiohttp.ClientSession(
            headers=self.headers, connector=connector, timeout=aiohttp.ClientTimeout(total=self.timeout)
        )

    @contextlib.asynccontextmanager
    async def _request(self, method: str, url: str, **kwargs: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        async with super()._request(method, url, allow_redirects=False, **kwargs) as response:
            yield response

    async def health(self) -> None:
        """Return when the server says that it is well. Raises `aiohttp.ClientError`, `Refused`, `TimeoutError`."""
        async with self._request("GET", f"{self.schema}{self.host}:{self.port}/health") as response:
            if response.status != 200:
                raise Refused(response.status, "the server is not healthy")

    async def push(self, module: str, name: str) -> None:
        """Put a module there. Raises as `health`, and `RegoParseError` where it does not compile."""
        try:
            await self.update_policy_from_string(module, name, rego_compat=False)
        except aiohttp.ContentTypeError as error:
            raise Refused(error.status, "the module was not taken") from error

    async def put_data(self, key: str, value: object) -> None:
        """Put a document at `data.KEY`, whole. Raises as `health`."""
        async with self._request("PUT", f"{self.root_url}/data/{key}", json=value) as response:
            if response.status not in (200, 204):
                raise Refused(response.status, f"the data document {key} was not taken")

    async def answer(self, package: str, rule: str, document: str) -> dict[str, Any]:
        """What the server says of a rule (`package` with slashes): {"result": …}, or {} where it is undefined there.

        `document` is the input as JSON text. `query_rule` of the library takes a dictionary, which would be read only to be
        written again. Raises as `health`, and `ValueError` for what is no JSON.
        """
        url = f"{self.root_url}/data/{package}/{rule}"
        headers = {"Content-Type": "application/json"}
        async with self._request("POST", url, data=f'{{"input":{document}}}'.encode(), headers=headers) as response:
            body = await response.content.read(MAX_ANSWER + 1)
            while len(body) <= MAX_ANSWER and (more := await response.content.read(MAX_ANSWER + 1 - len(body))):
                body += more
        if response.status != 200:
            raise Refused(response.status, "")
        return _object(body)


def _object(body: bytes) -> dict[str, Any]:
    import json

    if len(body) > MAX_ANSWER:
        raise ValueError("the answer is too long")
    found = json.loads(body)
    if not isinstance(found, dict):
        raise ValueError("the answer is no object")
    return found


TRANSPORT_ERRORS = (aiohttp.ClientError, ConnectionsError, OSError, TimeoutError, ValueError, Refused)
"""What the way to the server fails with. `ValueError` is an answer that cannot be read, or a token file."""
STALE = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)
"""A kept connection that the server closed meanwhile: worth one more try on a new one."""
