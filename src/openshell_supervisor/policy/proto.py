"""A policy to a protobuf message and back: the form in which a gateway keeps it (`openshell.sandbox.v1`, proto/sandbox.proto).

Reading gives the same policies as YAML does and refuses the same, with paths of the YAML document, because that is what people
write; a message has no lines. Of gateways, of how a message came here and of gRPC nothing is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2  # type: ignore[import-untyped]

from openshell_supervisor.errors import PolicyError, Problem
from openshell_supervisor.policy._generated import sandbox_pb2 as pb
from openshell_supervisor.policy.document import MAX_DEPTH
from openshell_supervisor.policy.lint import warnings_of
from openshell_supervisor.policy.model import (
    Endpoint,
    FilesystemPolicy,
    GraphqlOperation,
    L7Allow,
    L7Match,
    McpOptions,
    Middleware,
    NetworkRule,
    SandboxPolicy,
)
from openshell_supervisor.policy.normalise import normalise, preset_rules
from openshell_supervisor.policy.proto_reader import NETLINK, SAME, MessageReader
from openshell_supervisor.policy.reading import MAX_PROBLEMS, shown
from openshell_supervisor.policy.validate import problems_of
from openshell_supervisor.policy.yaml_file import LoadedPolicy, not_caused_by


def to_proto(policy: SandboxPolicy) -> pb.SandboxPolicy:
    """The message for a policy, with or without its presets written out; a preset is sent as itself.

    Raises `PolicyError` for what has no form on the wire: a number that its field cannot hold, text that is not UTF-8, or a
    `config` with something else than JSON in it. A policy that was read from a file and validated has only the last, at most.
    """
    try:
        return _policy(policy)
    except (ValueError, OverflowError) as error:
        what = shown(str(error))
        raise PolicyError(
            (Problem("not_representable", f"it has no protobuf form: {what}"),), source="policy"
        ) from error


def from_proto(message: pb.SandboxPolicy) -> SandboxPolicy:
    """The policy that a message says, as written (presets stay words). Raises `PolicyError` with every fault."""
    reader = MessageReader()
    policy = reader.policy(message)
    found = [*reader.problems, *not_caused_by(reader.problems, problems_of(policy))]
    if found:
        raise PolicyError(tuple(found[:MAX_PROBLEMS]), source="message")
    return policy


def load_message(message: pb.SandboxPolicy, source: str) -> LoadedPolicy:
    """A usable policy of a message, presets written out, with its warnings; `source` says whose it is. Raises `PolicyError`."""
    try:
        policy = from_proto(message)
    except PolicyError as error:
        raise PolicyError(error.problems, source=source) from None
    return LoadedPolicy(normalise(policy), tuple(warnings_of(policy))[:MAX_PROBLEMS], source)


def _policy(policy: SandboxPolicy) -> pb.SandboxPolicy:
    files, landlock, process, network = policy.filesystem, policy.landlock, policy.process, policy.network
    return pb.SandboxPolicy(
        version=policy.version,
        filesystem=_filesystem(files) if files else None,
        landlock=pb.LandlockPolicy(compatibility=landlock.compatibility) if landlock else None,
        process=pb.ProcessPolicy(run_as_user=process.run_as_user, run_as_group=process.run_as_group)
        if process
        else None,
        network_policies={key: _rule(rule) for key, rule in policy.network_policies.items()},
        network_middlewares={key: _middleware(item) for key, item in policy.network_middlewares.items()},
        network=pb.NetworkOptions(allow_netlink=NETLINK[network.allow_netlink]) if network else None,
    )


def _filesystem(section: FilesystemPolicy) -> pb.FilesystemPolicy:
    """Not saying `include_workdir` means true; on the wire, not sending it would mean false."""
    return pb.FilesystemPolicy(
        include_workdir=section.include_workdir is not False,
        include_workdir_unsaid=section.include_workdir is None,
        read_only=section.read_only,
        read_write=section.read_write,
    )


def _rule(rule: NetworkRule) -> pb.NetworkPolicyRule:
    return pb.NetworkPolicyRule(
        name=rule.name,
        endpoints=[_endpoint(endpoint) for endpoint in rule.endpoints],
        binaries=[pb.NetworkBinary(path=binary.path, harness=binary.advisor_proposed) for binary in rule.binaries],
    )


def _endpoint(e: Endpoint) -> pb.NetworkEndpoint:
    mcp, binding = e.mcp, e.credential_binding
    return pb.NetworkEndpoint(
        **{name: getattr(e, name) for name in SAME},
        port=e.ports[0] if e.ports else 0,
        ports=e.ports,
        rules=[] if _written_out(e) else [pb.L7Rule(allow=pb.L7Allow(**_match(rule))) for rule in e.rules],
        deny_rules=[pb.L7DenyRule(**_match(rule)) for rule in e.deny_rules],
        allowed_ips=e.allowed_ips,
        graphql_persisted_queries={key: _operation(entry) for key, entry in e.graphql_persisted_queries},
        mcp=_mcp(mcp) if mcp else None,
        credential_binding=pb.NetworkCredentialBinding(provider=binding.provider) if binding else None,
    )


def _written_out(e: Endpoint) -> bool:
    """True where the rules are what `normalise` wrote for a shorthand; beside the shorthand every reader refuses them."""
    if e.protocol == "mcp":
        everything = e.mcp is not None and e.mcp.allow_all_known_mcp_methods and not e.access
        return bool(everything) and e.rules == (L7Allow(method="*"),)
    return bool(e.access) and e.rules == preset_rules(e.protocol, e.access)


def _mcp(options: McpOptions) -> pb.McpOptions:
    return pb.McpOptions(
        strict_tool_names=options.strict_tool_names, allow_all_known_mcp_methods=options.allow_all_known_mcp_methods
    )


def _operation(entry: GraphqlOperation) -> pb.GraphqlOperation:
    return pb.GraphqlOperation(
        operation_type=entry.operation_type, operation_name=entry.operation_name, fields=entry.fields
    )


def _match(rule: L7Match) -> dict[str, Any]:  # the keyword arguments of two message types
    return {
        "method": rule.method,
        "path": rule.path,
        "command": rule.command,
        "query": {key: pb.L7QueryMatcher(glob=matcher.glob, any=matcher.any) for key, matcher in rule.query},
        "operation_type": rule.operation_type,
        "operation_name": rule.operation_name,
        "fields": rule.fields,
        "params": {key: pb.L7QueryMatcher(glob=matcher.glob, any=matcher.any) for key, matcher in rule.params},
    }


def _middleware(item: Middleware) -> pb.NetworkMiddlewareConfig:
    chosen = bool(item.include or item.exclude)
    return pb.NetworkMiddlewareConfig(
        name=item.name,
        middleware=item.middleware,
        config=_struct(item.config, 0) if item.config else None,
        on_error=item.on_error,
        endpoints=pb.MiddlewareEndpointSelector(include=item.include, exclude=item.exclude) if chosen else None,
        order=item.order,
    )


def _struct(entries: Mapping[str, object], depth: int) -> struct_pb2.Struct:
    if depth > MAX_DEPTH:
        raise ValueError(f"config is nested deeper than {MAX_DEPTH} levels")
    return struct_pb2.Struct(fields={key: _value(value, depth + 1) for key, value in entries.items()})


def _value(value: object, depth: int) -> struct_pb2.Value:
    """JSON to a Struct's value. Raises ValueError for what a double cannot hold and for what is not JSON."""
    if depth > MAX_DEPTH:
        raise ValueError(f"config is nested deeper than {MAX_DEPTH} levels")
    match value:
        case None:
            return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
        case bool():
            return struct_pb2.Value(bool_value=value)
        case int() | float():
            if isinstance(value, int) and int(float(value)) != value:
                raise ValueError(f"config holds {value}, which a double cannot hold exactly; put it in quotes")
            return struct_pb2.Value(number_value=value)
        case str():
            return struct_pb2.Value(string_value=value)
        case list() | tuple():
            values = [_value(item, depth + 1) for item in value]
            return struct_pb2.Value(list_value=struct_pb2.ListValue(values=values))
        case Mapping():
            return struct_pb2.Value(struct_value=_struct(value, depth))
    raise ValueError(f"config holds a {type(value).__name__}, which is not JSON")
