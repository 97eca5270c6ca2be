"""`http://policy.local/`: the host that lives in the proxy itself.

It answers the start-up probe, by which the supervisor proves from inside the boundary that this proxy, and no other, is
reached. It opens no connection, needs no policy and imports nothing heavy, so it works from the first moment.
"""

from __future__ import annotations

from openshell_supervisor.proxy.denials import Denial, failure

HOST = "policy.local"
PORT = 80
_PROBE_PREFIX = "/v1/probe/"
# The supervisor asks for one probe per boundary rung; more are a mistake.
MAX_PROBES = 64


class LocalHost:
    """What policy.local knows. Requests to it are no decisions and make no events."""

    def __init__(self) -> None:
        self._nonces: set[str] = set()

    def answer_probe(self, nonce: str) -> None:
        """From now on `GET /v1/probe/<nonce>` is answered 200 with the nonce as body. Raises `ValueError` beyond `MAX_PROBES`."""
        if len(self._nonces) >= MAX_PROBES:
            raise ValueError("too many probes")
        self._nonces.add(nonce)

    def respond(self, method: str, path: str) -> Denial | bytes:
        """The body of a 200 as bytes, or the refusal."""
        if method == "GET" and path.startswith(_PROBE_PREFIX) and path[len(_PROBE_PREFIX) :] in self._nonces:
            return path[len(_PROBE_PREFIX) :].encode()
        return failure(404, "not_found", "policy.local has no such resource")


def plain_answer(body: bytes) -> bytes:
    """A complete HTTP/1.1 200 that ends the connection."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
        len(body),
        body,
    )
