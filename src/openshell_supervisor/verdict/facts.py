"""The question and the answer: what is known about a connection or request, and what was decided.

Both are frozen values. Facts are what the proxy has established, in canonical form; nothing here asks where they came from
or what is done with the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openshell_supervisor.policy.globs import path_selected, path_specificity
from openshell_supervisor.policy.model import Endpoint
from openshell_supervisor.verdict.targets import TargetError, canonical_host, canonical_target, parse_query

# The parsers are wanted when a body comes, and the proxy needs this module before the workload starts.
if TYPE_CHECKING:
    from openshell_supervisor.verdict.bodies.graphql import GraphqlBody
    from openshell_supervisor.verdict.bodies.json_rpc import RpcBody
    from openshell_supervisor.verdict.bodies.websocket import WebSocketPart
    from openshell_supervisor.verdict.bodies.wire import Unread

__all__ = [
    "Body",
    "Facts",
    "MatchedEndpoint",
    "Request",
    "TargetError",
    "Verdict",
    "canonical_host",
    "canonical_target",
    "parse_query",
]


type Body = GraphqlBody | RpcBody | Unread | WebSocketPart
"""What was read of a request beyond its head. Each has `protocol`, as what it was read; `error`, a reason to refuse it;
`graphql`, the operations in it or None; and `texts()`, all that the workload wrote in it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request: `path` is canonical and has no query, `query` holds decoded pairs in order.

    `body` is None where nothing but the head was read; that suffices for protocol rest alone.
    """

    method: str
    path: str
    query: tuple[tuple[str, str], ...] = ()
    body: Body | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """Who wants to go where. Without a `request` it is the connection's (L4) question.

    `binary`, `ancestors` and `cmdline` are absolute paths of the calling process; empty where it is not identified.
    """

    host: str
    port: int
    binary: str = ""
    ancestors: tuple[str, ...] = ()
    cmdline: tuple[str, ...] = ()
    request: Request | None = None


@dataclass(frozen=True, slots=True)
class MatchedEndpoint:
    """An endpoint that matches host, port and binary; `policy` is the map key, `index` counts within that rule."""

    policy: str
    index: int
    endpoint: Endpoint


def _specificity(item: MatchedEndpoint) -> tuple[int, str, int]:
    return path_specificity(item.endpoint.path), item.policy, item.index


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision. `reason_id` is stable; `reason` is a sentence, in upstream's words where upstream has one.

    `policy` and `rule` name what decided ("" where nothing matched); `hint` says what would allow it. `enforcement` says what
    a denial means: "enforce" blocks, "audit" lets through and logs (only an L7 denial by rules is ever "audit").
    `exact_host` is upstream's exact_declared_endpoint_host.
    """

    allow: bool
    reason_id: str
    reason: str
    policy: str = ""
    rule: str = ""
    hint: str = ""
    generation: int = 0
    endpoints: tuple[MatchedEndpoint, ...] = ()
    enforcement: str = "enforce"
    exact_host: bool = False

    @property
    def inspected(self) -> bool:
        """True when requests of this connection must be looked at one by one."""
        return any(item.endpoint.inspected for item in self.endpoints)

    def reads(self, path: str) -> MatchedEndpoint | None:
        """The endpoint that says how a request to this canonical path is read, and what its denial means.

        The most path-specific one that is selected, the last of equals; the rules choose the same. None where none covers it.
        """
        found = [item for item in self.endpoints if item.endpoint.inspected and path_selected(item.endpoint.path, path)]
        return max(found, key=_specificity, default=None)

    @property
    def tls_skip(self) -> bool:
        """True when TLS is to be left alone: every endpoint that has a say (inspected, or with a `tls` key) says skip.

        Upstream takes the first one's word, which a load-time check keeps unambiguous; asking all of them can only
        lead to more inspection.
        """
        voices = [item.endpoint for item in self.endpoints if item.endpoint.inspected or item.endpoint.tls]
        return bool(voices) and all(endpoint.tls_skip for endpoint in voices)

    @property
    def allow_encoded_slash(self) -> bool:
        """True when some inspected endpoint keeps `%2F`; the request's own endpoint is asked again when it is judged."""
        return any(item.endpoint.inspected and item.endpoint.allow_encoded_slash for item in self.endpoints)

    @property
    def allowed_ips(self) -> tuple[str, ...]:
        """The address list of the first endpoint with extended settings, as upstream picks it; usually empty."""
        return next((item.endpoint.allowed_ips for item in self.endpoints if item.endpoint.extended), ())
