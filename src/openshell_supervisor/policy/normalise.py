"""What a policy comes to before it is evaluated: access presets become rules (policy.md 1.6, 5.1), file paths lose their noise.

Pure, and idempotent: an endpoint that already has rules is left alone. It decides nothing; it only writes shorthand out.
"""

from __future__ import annotations

from dataclasses import replace

from openshell_supervisor.policy.model import Endpoint, FilesystemPolicy, L7Allow, NetworkRule, SandboxPolicy

_READ = ("GET", "HEAD", "OPTIONS")
_HTTP = {"read-only": _READ, "read-write": (*_READ, "POST", "PUT", "PATCH"), "full": ("*",)}
_WEBSOCKET = {"read-only": ("GET",), "read-write": ("GET", "WEBSOCKET_TEXT"), "full": ("*",)}
_GRAPHQL = {"read-only": ("query",), "read-write": ("query", "mutation"), "full": ("*",)}


def normalise(policy: SandboxPolicy) -> SandboxPolicy:
    """The policy with every preset expanded; rules in key order, as upstream walks them; file paths in their shortest form."""
    rules = {key: _rule(rule) for key, rule in sorted(policy.network_policies.items())}
    return replace(policy, network_policies=rules, filesystem=_filesystem(policy.filesystem))


def _filesystem(section: FilesystemPolicy | None) -> FilesystemPolicy | None:
    if section is None:
        return None
    lists = [tuple(dict.fromkeys(map(normal_path, paths))) for paths in (section.read_only, section.read_write)]
    return replace(section, read_only=lists[0], read_write=lists[1])


def normal_path(path: str) -> str:
    """An absolute path without repeated or trailing separators and without `.`: text only, no link is followed.

    `..` stays (validation refuses it): what it comes to depends on links.
    """
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _rule(rule: NetworkRule) -> NetworkRule:
    if not any(endpoint.access or endpoint.mcp for endpoint in rule.endpoints):
        return rule
    return replace(rule, endpoints=tuple(_endpoint(endpoint) for endpoint in rule.endpoints))


def _endpoint(endpoint: Endpoint) -> Endpoint:
    if endpoint.rules:
        return endpoint
    if endpoint.protocol == "mcp":
        everything = endpoint.mcp is not None and endpoint.mcp.allow_all_known_mcp_methods and not endpoint.access
        return replace(endpoint, rules=(L7Allow(method="*"),)) if everything else endpoint
    return replace(endpoint, rules=preset_rules(endpoint.protocol, endpoint.access))


def preset_rules(protocol: str, access: str) -> tuple[L7Allow, ...]:
    """The rules of a preset; none for an unknown preset (so it denies) or a protocol without presets.

    Protocol names are compared exactly here, as upstream does: `GRAPHQL` gets REST rules.
    """
    if protocol in ("mcp", "json-rpc"):
        return ()
    if protocol == "graphql":
        return tuple(L7Allow(operation_type=kind) for kind in _GRAPHQL.get(access, ()))
    table = _WEBSOCKET if protocol == "websocket" else _HTTP
    return tuple(L7Allow(method=method, path="**") for method in table.get(access, ()))
