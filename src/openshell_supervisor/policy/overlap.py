"""Endpoints that meet must agree: upstream's ambiguity check (policy.md 5.2).

Some settings belong to a connection or to a request as a whole and come from one endpoint. Where two endpoints can match the same
one and disagree, which of them counts would be chance; such a policy is refused. Access and rules may differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

from openshell_supervisor.errors import Problem
from openshell_supervisor.policy.automaton import TooLarge, intersects
from openshell_supervisor.policy.globs import host_pattern, literal, path_specificity, selector_pattern
from openshell_supervisor.policy.model import Endpoint, SandboxPolicy
from openshell_supervisor.policy.reading import child, shown

MAX_REPORTED = 20
"""Conflicts named; one wrong endpoint in a large policy conflicts with all the others."""

_Settings = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Placed:
    key: str
    index: int
    endpoint: Endpoint
    host: str
    connection: _Settings
    request: _Settings

    def name(self) -> str:
        ports = ",".join(map(str, self.endpoint.ports))
        path = f" {shown(self.endpoint.path)}" if self.endpoint.path else ""
        return f"'{shown(self.key)}' endpoint[{self.index}] ({shown(self.host) or '*'}:{ports}{path})"


def overlap_problems(policy: SandboxPolicy) -> Iterator[Problem]:
    """One problem for each pair of endpoints that overlap and disagree, at the second of the two."""
    reported: set[tuple[int, int]] = set()
    for pair in _candidates(
        [_place(key, i, e) for key, rule in policy.network_policies.items() for i, e in enumerate(rule.endpoints)]
    ):
        left, right = sorted(pair, key=lambda item: (item.key, item.index))
        if (id(left), id(right)) in reported or len(reported) >= MAX_REPORTED:
            continue
        ports = sorted(set(left.endpoint.ports) & set(right.endpoint.ports))
        differences = _differences(left, right) if ports and _hosts_meet(left.host, right.host) else []
        if not differences:
            continue
        reported.add((id(left), id(right)))
        what = "; ".join(f'{name}="{shown(a)}" vs "{shown(b)}"' for name, a, b in differences)
        yield Problem(
            "ambiguous_endpoints",
            f"network policies {left.name()} and {right.name()} overlap on port(s) {','.join(map(str, ports))} "
            f"with conflicting metadata: {what}",
            f"{child('network_policies', right.key)}.endpoints[{right.index}]",
            hint="give both the same settings, or make their hosts, ports or paths distinct",
        )


def _candidates(placed: list[_Placed]) -> Iterator[tuple[_Placed, _Placed]]:
    """Pairs that share a port and could share a host and do not say the same; every conflicting pair is among them."""
    by_port: defaultdict[int, dict[tuple[object, ...], _Placed]] = defaultdict(dict)
    for item in placed:
        for port in set(item.endpoint.ports):
            # Two endpoints that say the same conflict with the same others: one of them stands for both.
            by_port[port].setdefault((item.host, item.endpoint.path, item.connection, item.request), item)
    for items in by_port.values():
        exact: defaultdict[str, list[_Placed]] = defaultdict(list)
        named, wild, anywhere = _Group(), _Group(), _Group()
        for item in items.values():
            domain = _domain(item.host)
            if item.host and "*" not in item.host:
                exact[item.host].append(item)
                named.add(domain, item)
            elif item.host and "*" not in domain:
                wild.add(domain, item)
            else:
                anywhere.add("", item)
        for same in exact.values():
            yield from combinations(same, 2)
        for domain in wild.domains:
            yield from _across(wild.domains[domain], wild.domains[domain])
            yield from _across(wild.domains[domain], named.domains.get(domain, {}))
        for group in (anywhere, wild, named):
            for others in group.domains.values():
                yield from _across(anywhere.domains.get("", {}), others)


_Alike = dict[tuple[_Settings, _Settings], list[_Placed]]


class _Group:
    """Endpoints by the last two labels of their host, and within those by what they say."""

    def __init__(self) -> None:
        self.domains: defaultdict[str, _Alike] = defaultdict(dict)

    def add(self, domain: str, item: _Placed) -> None:
        self.domains[domain].setdefault((item.connection, item.request), []).append(item)


def _across(left: _Alike, right: _Alike) -> Iterator[tuple[_Placed, _Placed]]:
    """Pairs of endpoints that do not say the same; a policy whose endpoints agree has none, however large it is."""
    for mine, items in left.items():
        for theirs, others in right.items():
            if mine[0] != theirs[0] or (mine[1] and theirs[1] and mine[1] != theirs[1]):
                yield from product(items, others)


def _domain(host: str) -> str:
    return ".".join(host.rsplit(".", 2)[-2:])


def _place(key: str, index: int, e: Endpoint) -> _Placed:
    addresses = ",".join(sorted({entry.strip().lower() for entry in e.allowed_ips}))
    connection = (
        ("transparent_tcp_eligible", _word(e.protocol.lower() == "tcp")),
        ("tls", "skip" if e.tls_skip else "auto"),
        ("allowed_ips", addresses),
        ("advisor_proposed", _word(e.advisor_proposed)),
    )
    return _Placed(key, index, e, e.host.lower(), connection, _request_settings(e))


def _request_settings(e: Endpoint) -> _Settings:
    """What an endpoint says about requests; nothing where it is only a place to connect to."""
    if not (e.extended or e.credential_binding):
        return ()
    protocol = e.protocol.lower()
    settings = [
        ("protocol", protocol),
        ("enforcement", "enforce" if e.enforced else "audit"),
        ("allow_encoded_slash", _word(e.allow_encoded_slash)),
        ("websocket_credential_rewrite", _word(e.websocket_credential_rewrite)),
        ("request_body_credential_rewrite", _word(e.request_body_credential_rewrite)),
        ("credential_signing", e.credential_signing),
        ("signing_service", e.signing_service),
        ("signing_region", e.signing_region),
        ("credential_binding.provider", e.credential_binding.provider if e.credential_binding else ""),
    ]
    if protocol == "websocket":
        graphql = any(m.operation_type or m.operation_name or m.fields for m in (*e.rules, *e.deny_rules))
        graphql = graphql or bool(e.graphql_persisted_queries) or e.persisted_queries not in ("", "deny")
        settings.append(("websocket_graphql_policy", _word(graphql)))
    if protocol == "graphql":
        settings.append(("graphql_max_body_bytes", str(e.graphql_max_body_bytes)))
    if protocol in ("json-rpc", "mcp"):
        settings.append(("json_rpc_max_body_bytes", str(e.json_rpc_max_body_bytes)))
    if protocol == "mcp":
        strict = e.mcp is None or e.mcp.strict_tool_names is not False
        settings.append(("mcp.strict_tool_names", _word(strict)))
    return tuple(settings)


def _word(value: bool) -> str:
    return "true" if value else "false"


def _differences(left: _Placed, right: _Placed) -> list[tuple[str, str, str]]:
    """The settings that both have and that differ; those of requests only where neither path is more specific."""
    pairs = [(left.connection, right.connection)]
    if (
        left.request
        and right.request
        and left.request != right.request
        and _paths_compete(left.endpoint.path, right.endpoint.path)
    ):
        pairs.append((left.request, right.request))
    found = []
    for mine, theirs in pairs:
        other = dict(theirs)
        found += [(name, value, other[name]) for name, value in mine if name in other and other[name] != value]
    return found


def _paths_compete(left: str, right: str) -> bool:
    if path_specificity(left) != path_specificity(right):
        return False
    a, b = selector_pattern(left), selector_pattern(right)
    try:
        return left == right or intersects(literal(left) if a is None else a, literal(right) if b is None else b)
    except TooLarge:
        return True


def _hosts_meet(left: str, right: str) -> bool:
    if not left or not right or left == right:
        return True
    ends = left[left.rfind("*") + 1 :], right[right.rfind("*") + 1 :]
    starts = left.partition("*")[0], right.partition("*")[0]
    if not (ends[0].endswith(ends[1]) or ends[1].endswith(ends[0])):
        return False  # a common name would have to end with both; the exact test below costs a hundred times as much
    if not (starts[0].startswith(starts[1]) or starts[1].startswith(starts[0])):
        return False
    return intersects(host_pattern(left), host_pattern(right))
