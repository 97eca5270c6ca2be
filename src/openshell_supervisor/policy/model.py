"""What a policy says, as frozen values.

The types mirror upstream's `openshell.sandbox.v1` messages field by field, so that a policy read from YAML and one read from
protobuf are the same object and compare equal. This module knows nothing of YAML, of files, of Rego or of requests; it
only holds what was written. Nothing here is validated: `policy.validate` does that, on these types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

L4_PROTOCOLS = ("", "tcp")
KNOWN_PROTOCOLS = ("tcp", "rest", "websocket", "graphql", "sql", "json-rpc", "mcp")
ACCESS_PRESETS = ("read-only", "read-write", "full")


@dataclass(frozen=True, slots=True)
class QueryMatcher:
    """How the values of one query parameter are matched: one glob, or any glob of a list. Exactly one of the two is set."""

    glob: str = ""
    any: tuple[str, ...] = ()

    @property
    def globs(self) -> tuple[str, ...]:
        """The globs of either form."""
        return self.any or ((self.glob,) if self.glob else ())


Matchers = tuple[tuple[str, QueryMatcher], ...]


@dataclass(frozen=True, slots=True)
class L7Match:
    """The keys that allow rules and deny rules share. An empty string or tuple means that the key was not written."""

    method: str = ""
    path: str = ""
    command: str = ""
    query: Matchers = ()
    operation_type: str = ""
    operation_name: str = ""
    fields: tuple[str, ...] = ()
    params: Matchers = ()

    @property
    def empty(self) -> bool:
        """True when nothing at all was written."""
        return self == type(self)()


@dataclass(frozen=True, slots=True)
class L7Allow(L7Match):
    """One `allow` clause of `rules`."""


@dataclass(frozen=True, slots=True)
class L7Deny(L7Match):
    """One entry of `deny_rules`."""


@dataclass(frozen=True, slots=True)
class GraphqlOperation:
    """A registered (persisted) GraphQL operation."""

    operation_type: str = ""
    operation_name: str = ""
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class McpOptions:
    """Present only when one of the two was written; None means not written."""

    strict_tool_names: bool | None = None
    allow_all_known_mcp_methods: bool | None = None


@dataclass(frozen=True, slots=True)
class CredentialBinding:
    """Ties an endpoint to the credentials of one attached provider."""

    provider: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A place that may be reached, and how. `ports` is what `port` and `ports` of the document come to."""

    host: str = ""
    ports: tuple[int, ...] = ()
    protocol: str = ""
    tls: str = ""
    enforcement: str = ""
    access: str = ""
    rules: tuple[L7Allow, ...] = ()
    deny_rules: tuple[L7Deny, ...] = ()
    allowed_ips: tuple[str, ...] = ()
    path: str = ""
    allow_encoded_slash: bool = False
    persisted_queries: str = ""
    graphql_persisted_queries: tuple[tuple[str, GraphqlOperation], ...] = ()
    graphql_max_body_bytes: int = 0
    websocket_credential_rewrite: bool = False
    request_body_credential_rewrite: bool = False
    credential_signing: str = ""
    signing_service: str = ""
    signing_region: str = ""
    json_rpc_max_body_bytes: int = 0
    mcp: McpOptions | None = None
    credential_binding: CredentialBinding | None = None
    allow_uninspected_credentials: bool = False
    advisor_proposed: bool = False
    provider_credentialed: bool = False

    @property
    def inspected(self) -> bool:
        """True when each request is looked at, not only the connection."""
        return self.protocol.lower() not in L4_PROTOCOLS

    @property
    def extended(self) -> bool:
        """Upstream's "extended config": the endpoint says more than host and port (policy.md 2.4)."""
        return self.inspected or bool(self.allowed_ips) or bool(self.tls)

    @property
    def tls_skip(self) -> bool:
        """Only the exact word `skip` leaves TLS alone; every other value means automatic."""
        return self.tls == "skip"

    @property
    def enforced(self) -> bool:
        """Only the exact word `enforce` blocks; every other value, the empty one included, audits."""
        return self.enforcement == "enforce"

    def place(self) -> str:
        """`host:port` for messages; several ports in brackets, a hostless endpoint as `*`."""
        ports = str(self.ports[0]) if len(self.ports) == 1 else f"[{','.join(map(str, self.ports))}]"
        return f"{self.host or '*'}:{ports}{self.path}"


@dataclass(frozen=True, slots=True)
class Binary:
    """A program that may use the endpoints of its rule."""

    path: str
    advisor_proposed: bool = False


@dataclass(frozen=True, slots=True)
class NetworkRule:
    """Endpoints times binaries. `name` is what was written; messages fall back to the map key."""

    name: str = ""
    endpoints: tuple[Endpoint, ...] = ()
    binaries: tuple[Binary, ...] = ()


@dataclass(frozen=True, slots=True)
class FilesystemPolicy:
    """`include_workdir` is None where the section did not write it."""

    include_workdir: bool | None = None
    read_only: tuple[str, ...] = ()
    read_write: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LandlockPolicy:
    """`hard_requirement`, or anything else for best effort."""

    compatibility: str = ""

    @property
    def hard_requirement(self) -> bool:
        """True when the sandbox may not start without Landlock."""
        return self.compatibility == "hard_requirement"


@dataclass(frozen=True, slots=True)
class ProcessPolicy:
    """Whom the workload runs as; empty strings are unset, each on its own."""

    run_as_user: str = ""
    run_as_group: str = ""


@dataclass(frozen=True, slots=True)
class Middleware:
    """One network middleware. `config` is plain JSON, `on_error` empty means fail_closed."""

    middleware: str
    name: str = ""
    config: Mapping[str, object] = field(default_factory=dict)
    on_error: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    order: int = 0


class Netlink(StrEnum):
    """How much of AF_NETLINK the workload may open: nothing, NETLINK_ROUTE alone (interfaces, addresses), or every protocol."""

    DENIED = "denied"
    ROUTE = "route"
    ALLOWED = "allowed"


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """What is not about single destinations. Upstream has no such section."""

    allow_netlink: Netlink = Netlink.DENIED


@dataclass(frozen=True, slots=True)
class SandboxPolicy:
    """A whole policy. A section that was not written is None; maps are in key order."""

    version: int = 1
    filesystem: FilesystemPolicy | None = None
    landlock: LandlockPolicy | None = None
    process: ProcessPolicy | None = None
    network_policies: Mapping[str, NetworkRule] = field(default_factory=dict)
    network_middlewares: Mapping[str, Middleware] = field(default_factory=dict)
    network: NetworkOptions | None = None

    @property
    def netlink(self) -> Netlink:
        """What the policy allows of AF_NETLINK; denied where it does not say."""
        return self.network.allow_netlink if self.network else Netlink.DENIED
