"""A protobuf message to the model, as strictly as `policy.reader` reads YAML.

Every fault is noted with its path in the YAML document, and reading goes on; maps come in key order. No meaning is checked here,
`policy.validate` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from google.protobuf import struct_pb2  # type: ignore[import-untyped]

from openshell_supervisor.errors import Problem
from openshell_supervisor.policy._generated import sandbox_pb2 as pb
from openshell_supervisor.policy.document import MAX_DEPTH
from openshell_supervisor.policy.model import (
    Binary,
    CredentialBinding,
    Endpoint,
    FilesystemPolicy,
    GraphqlOperation,
    L7Allow,
    L7Deny,
    LandlockPolicy,
    Matchers,
    McpOptions,
    Middleware,
    Netlink,
    NetworkOptions,
    NetworkRule,
    ProcessPolicy,
    QueryMatcher,
    SandboxPolicy,
)
from openshell_supervisor.policy.reading import MAX_PROBLEMS, child, clean, shown

NETLINK = {Netlink.DENIED: pb.NETLINK_DENIED, Netlink.ROUTE: pb.NETLINK_ROUTE, Netlink.ALLOWED: pb.NETLINK_ALLOWED}
_WORDS = {number: word for word, number in NETLINK.items()}
MAX_EXACT = 2**53
"""Integers up to here are exact in a double, the only number that google.protobuf.Struct has."""
SAME = (
    "host",
    "protocol",
    "tls",
    "enforcement",
    "access",
    "path",
    "allow_encoded_slash",
    "persisted_queries",
    "graphql_max_body_bytes",
    "websocket_credential_rewrite",
    "request_body_credential_rewrite",
    "credential_signing",
    "signing_service",
    "signing_region",
    "json_rpc_max_body_bytes",
    "allow_uninspected_credentials",
    "advisor_proposed",
    "provider_credentialed",
)
"""Fields of an endpoint with one name and one type on both sides."""


class MessageReader:
    """Reads one message; what is wrong with it is in `problems` afterwards. Never raises."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def note(self, code: str, path: str, message: str, hint: str = "") -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(code, message, path, hint=hint))

    def text(self, value: str, path: str) -> str:
        if clean(value):
            return value
        self.note("control_character", path, f"the value holds a control character: '{shown(value)}'", "remove it")
        return ""

    def texts(self, values: Iterable[str], path: str) -> tuple[str, ...]:
        return tuple(self.text(value, f"{path}[{number}]") for number, value in enumerate(values))

    def table[Item, T](self, entries: Mapping[str, Item], path: str, read: Callable[[Item, str], T]) -> dict[str, T]:
        """A map in key order, each entry read by `read(entry, path)`; an unusable key is a problem and left out."""
        found = {}
        for key in sorted(entries):
            if key and clean(key):
                found[key] = read(entries[key], child(path, key))
            else:
                said = f"a key may not be empty or hold control characters: '{shown(key)}'"
                self.note("bad_key", path, said)
        return found

    def policy(self, m: pb.SandboxPolicy) -> SandboxPolicy:
        return SandboxPolicy(
            version=m.version,
            filesystem=self.filesystem(m.filesystem) if m.HasField("filesystem") else None,
            landlock=LandlockPolicy(self.text(m.landlock.compatibility, "landlock.compatibility"))
            if m.HasField("landlock")
            else None,
            process=self.process(m.process) if m.HasField("process") else None,
            network_policies=self.table(m.network_policies, "network_policies", self.rule),
            network_middlewares=self.table(m.network_middlewares, "network_middlewares", self.middleware),
            network=self.network(m.network) if m.HasField("network") else None,
        )

    def filesystem(self, m: pb.FilesystemPolicy) -> FilesystemPolicy:
        path = "filesystem_policy"
        include = None if m.include_workdir_unsaid else m.include_workdir
        lists = [self.texts(values, f"{path}.{name}") for name, values in _lists(m)]
        return FilesystemPolicy(include, lists[0], lists[1])

    def process(self, m: pb.ProcessPolicy) -> ProcessPolicy:
        user = self.text(m.run_as_user, "process.run_as_user")
        return ProcessPolicy(user, self.text(m.run_as_group, "process.run_as_group"))

    def network(self, m: pb.NetworkOptions) -> NetworkOptions:
        word = _WORDS.get(m.allow_netlink)
        if word is None:
            said = f"invalid type: the number {m.allow_netlink}, expected `true`, `false` or `route`"
            self.note("wrong_type", "network.allow_netlink", said)
        return NetworkOptions(word or Netlink.DENIED)

    def rule(self, m: pb.NetworkPolicyRule, path: str) -> NetworkRule:
        endpoints = tuple(self.endpoint(item, f"{path}.endpoints[{at}]") for at, item in enumerate(m.endpoints))
        binaries = tuple(
            Binary(self.text(item.path, f"{path}.binaries[{at}].path"), item.harness)
            for at, item in enumerate(m.binaries)
        )
        return NetworkRule(self.text(m.name, f"{path}.name"), endpoints, binaries)

    def endpoint(self, m: pb.NetworkEndpoint, path: str) -> Endpoint:
        plain: dict[str, Any] = {name: getattr(m, name) for name in SAME}
        same: dict[str, Any] = {
            n: self.text(value, f"{path}.{n}") if isinstance(value, str) else value for n, value in plain.items()
        }
        binding = f"{path}.credential_binding.provider"
        operations = self.table(m.graphql_persisted_queries, f"{path}.graphql_persisted_queries", self.operation)
        return Endpoint(
            **same,
            ports=tuple(m.ports) or ((m.port,) if m.port else ()),
            rules=tuple(self.allow(item, f"{path}.rules[{at}]") for at, item in enumerate(m.rules)),
            deny_rules=tuple(
                L7Deny(**self.match(item, f"{path}.deny_rules[{at}]")) for at, item in enumerate(m.deny_rules)
            ),
            allowed_ips=self.texts(m.allowed_ips, f"{path}.allowed_ips"),
            graphql_persisted_queries=tuple(operations.items()),
            mcp=_mcp_options(m.mcp) if m.HasField("mcp") else None,
            credential_binding=CredentialBinding(self.text(m.credential_binding.provider, binding))
            if m.HasField("credential_binding")
            else None,
        )

    def operation(self, m: pb.GraphqlOperation, path: str) -> GraphqlOperation:
        kind, name = (self.text(getattr(m, key), f"{path}.{key}") for key in ("operation_type", "operation_name"))
        return GraphqlOperation(kind, name, self.texts(m.fields, f"{path}.fields"))

    def allow(self, m: pb.L7Rule, path: str) -> L7Allow:
        if not m.HasField("allow"):
            self.note("missing_field", path, "missing field `allow`")
        return L7Allow(**self.match(m.allow, f"{path}.allow"))

    # Any: the keyword arguments of L7Allow and of L7Deny, which have different types.
    def match(self, m: pb.L7Allow | pb.L7DenyRule, path: str) -> dict[str, Any]:
        names = ("method", "path", "command", "operation_type", "operation_name")
        maps: dict[str, Matchers] = {
            name: tuple(self.table(getattr(m, name), f"{path}.{name}", self.matcher).items())
            for name in ("query", "params")
        }
        texts = {name: self.text(getattr(m, name), f"{path}.{name}") for name in names}
        return {**texts, **maps, "fields": self.texts(m.fields, f"{path}.fields")}

    def matcher(self, m: pb.L7QueryMatcher, path: str) -> QueryMatcher:
        if m.glob and m.any:
            self.note("bad_matcher", path, "matcher cannot specify both `glob` and `any`", "keep one")
        elif not m.glob and not m.any:
            nothing = "unknown matcher keys; only `glob` or `any` are supported"
            self.note("empty_matcher", path, nothing, 'to match any value write "*"')
        elif not all(m.any):
            self.note("empty_matcher", path, "an entry of `any` is empty", 'to match any value write "*"')
        return QueryMatcher(self.text(m.glob, path), self.texts(m.any, f"{path}.any"))

    def middleware(self, m: pb.NetworkMiddlewareConfig, path: str) -> Middleware:
        where = f"{path}.endpoints"
        return Middleware(
            middleware=self.text(m.middleware, f"{path}.middleware"),
            name=self.text(m.name, f"{path}.name"),
            config=self.config(m.config, f"{path}.config", 0),
            on_error=self.text(m.on_error, f"{path}.on_error"),
            include=self.texts(m.endpoints.include, f"{where}.include"),
            exclude=self.texts(m.endpoints.exclude, f"{where}.exclude"),
            order=m.order,
        )

    def config(self, m: struct_pb2.Struct, path: str, depth: int) -> dict[str, object]:
        return self.table(m.fields, path, lambda value, where: self.value(value, where, depth + 1))

    def value(self, m: struct_pb2.Value, path: str, depth: int) -> object:
        """Plain JSON; a whole number becomes an int, a value that says nothing is null."""
        kind = m.WhichOneof("kind")
        if depth > MAX_DEPTH:
            self.note("yaml_depth", path, f"the configuration is nested deeper than {MAX_DEPTH} levels")
            return None
        if kind == "struct_value":
            return self.config(m.struct_value, path, depth)
        if kind == "list_value":
            return [self.value(v, f"{path}[{at}]", depth + 1) for at, v in enumerate(m.list_value.values)]
        if kind == "number_value":
            number = float(m.number_value)
            return int(number) if number.is_integer() and abs(number) <= MAX_EXACT else number
        return {"string_value": m.string_value, "bool_value": m.bool_value}.get(kind)


def _lists(m: pb.FilesystemPolicy) -> tuple[tuple[str, Iterable[str]], ...]:
    return ("read_only", m.read_only), ("read_write", m.read_write)


def _mcp_options(m: pb.McpOptions) -> McpOptions | None:
    """None where neither was written: the model has one word for that."""
    flags = [getattr(m, n) if m.HasField(n) else None for n in ("strict_tool_names", "allow_all_known_mcp_methods")]
    return McpOptions(flags[0], flags[1]) if any(flag is not None for flag in flags) else None
