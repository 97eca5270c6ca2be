"""Which endpoints could match a host and port: the reason why a thousand policies cost what ten do.

It may give too many and never too few; the rules decide among what it gives. Exact hosts are looked up, wildcards by the
literal end of their pattern, label by label from the right; hostless endpoints and patterns without such an end are always
candidates. All of them by port. A compiled endpoint carries its part of the engine's input as ready JSON text.
"""

from __future__ import annotations

import ipaddress
import json
from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass

from openshell_supervisor.policy.globs import path_specificity
from openshell_supervisor.policy.model import Endpoint, L7Match, SandboxPolicy
from openshell_supervisor.verdict.bodies.rules import CallRules, OperationRules, call_rules, members, operation_rules

HEAD_SUFFICES = ("", "tcp", "rest")
"""Protocols whose rules look at nothing but a request's head. The others allow only what was read as that protocol."""
MAX_RELATIVES = 16
"""Hosts of one domain kept to recognise a misspelling; comparing is slow, and a denial must stay cheap."""


def ascii_lower(text: str) -> str:
    """Lower case for A to Z only: to a host name rule the Kelvin sign is not the letter k."""
    return text.lower() if text.isascii() else "".join(c.lower() if c.isascii() else c for c in text)


def ascii_upper(text: str) -> str:
    """Upper case for a to z only."""
    return text.upper() if text.isascii() else "".join(c.upper() if c.isascii() else c for c in text)


def rule_host(host: str) -> str:
    """A policy's host as it is compared: lower case, an address in its shortest form."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return ascii_lower(host)


@dataclass(frozen=True, slots=True, eq=False)
class CompiledMatch:
    """An allow or deny rule as JSON, with what decides cheaply whether it could fire at all."""

    method: str
    path: str
    json: str
    query_globs: tuple[str, ...]

    def could_fire(self, method: str, paths: Container[str]) -> bool:
        """False only when the rules would find that method or path do not match. `paths` holds the globs that match the
        request, and those that are no globs; `method` is in upper case."""
        if self.path != "**" and self.path not in paths:
            return False
        return self.method in ("*", method) or (method == "HEAD" and self.method == "GET")


@dataclass(frozen=True, slots=True, eq=False)
class CompiledEndpoint:
    """An endpoint, where it stands, its JSON for each question (without braces), and the globs that its rules may ask for."""

    policy: str
    index: int
    endpoint: Endpoint
    connection_json: str
    request_json: str
    host_glob: str
    path_globs: tuple[str, ...]
    rules: tuple[CompiledMatch, ...]
    deny_rules: tuple[CompiledMatch, ...]
    reads: str
    calls: CallRules | None
    operations: OperationRules | None


@dataclass(frozen=True, slots=True, eq=False)
class CompiledRule:
    """A rule's endpoints and, as JSON, its binaries."""

    key: str
    endpoints: tuple[CompiledEndpoint, ...]
    binaries_json: str
    binary_globs: tuple[str, ...]


class Index:
    """Immutable once built. `narrow` gives candidates in policy order."""

    def __init__(self, policy: SandboxPolicy) -> None:
        self.rules = {key: _compile_rule(policy, key) for key in sorted(policy.network_policies)}
        self.uses_query = any(match.query_globs for e in self.all() for match in (*e.rules, *e.deny_rules))
        self.hosts: defaultdict[str, list[CompiledEndpoint]] = defaultdict(list)
        self.relatives: defaultdict[str, list[str]] = defaultdict(list)
        self._order: dict[int, int] = {}
        self._exact: defaultdict[tuple[int, str], list[CompiledEndpoint]] = defaultdict(list)
        self._suffix: defaultdict[tuple[int, str], list[CompiledEndpoint]] = defaultdict(list)
        self._always: defaultdict[int, list[CompiledEndpoint]] = defaultdict(list)
        for compiled in self.all():
            self._order[id(compiled)] = len(self._order)
            self.remember(rule_host(compiled.endpoint.host), compiled)
            for port in set(compiled.endpoint.ports):
                self._place(compiled, port)

    def remember(self, host: str, compiled: CompiledEndpoint) -> None:
        """Hosts as written, and those of one domain, for the hints of denials."""
        if host and host not in self.hosts and len(self.relatives[domain(host)]) < MAX_RELATIVES:
            self.relatives[domain(host)].append(host)
        self.hosts[host].append(compiled)

    def _place(self, compiled: CompiledEndpoint, port: int) -> None:
        host = rule_host(compiled.endpoint.host)
        if "*" in host:
            suffix = literal_suffix(host)
            if suffix:
                self._suffix[(port, suffix)].append(compiled)
            else:
                self._always[port].append(compiled)
        elif host:
            self._exact[(port, host)].append(compiled)
        elif compiled.endpoint.allowed_ips:
            self._always[port].append(compiled)

    def all(self) -> Iterable[CompiledEndpoint]:
        """Every endpoint, in policy order: what a full evaluation looks at."""
        return (compiled for rule in self.rules.values() for compiled in rule.endpoints)

    def narrow(self, host: str, port: int) -> list[CompiledEndpoint]:
        """The endpoints that could match; `host` is in lower case."""
        found = [*self._exact.get((port, host), ()), *self._always.get(port, ())]
        if self._suffix:
            at = -1
            while True:
                found.extend(self._suffix.get((port, host[at + 1 :]), ()))
                at = host.find(".", at + 1)
                if at < 0:
                    break
        found.sort(key=lambda compiled: self._order[id(compiled)])
        return found


def domain(host: str) -> str:
    """The last two labels."""
    return ".".join(host.rsplit(".", 2)[-2:])


def literal_suffix(pattern: str) -> str:
    """The whole labels at the end of a wildcard pattern that hold no glob character: "example.com" of "*.example.com"."""
    labels: list[str] = []
    if "{" in pattern or "[" in pattern or "\\" in pattern:  # a dot inside braces or a class separates nothing
        return ""
    for label in reversed(pattern.split(".")[1:]):
        if any(c in label for c in "*?"):
            break
        labels.append(label)
    return ".".join(reversed(labels))


def _compile_rule(policy: SandboxPolicy, key: str) -> CompiledRule:
    rule = policy.network_policies[key]
    binaries = [{"path": binary.path, "advisor_proposed": binary.advisor_proposed} for binary in rule.binaries]
    globs = tuple(binary.path for binary in rule.binaries if "*" in binary.path)
    endpoints = tuple(_compile_endpoint(key, index, endpoint) for index, endpoint in enumerate(rule.endpoints))
    return CompiledRule(key, endpoints, json.dumps(binaries), globs)


def _compile_endpoint(key: str, index: int, endpoint: Endpoint) -> CompiledEndpoint:
    host, protocol = rule_host(endpoint.host), endpoint.protocol.lower()
    connection: dict[str, object] = {
        "index": index,
        "host": host,
        "ports": list(endpoint.ports),
        "wildcard": "*" in host,
        "hostless": not host and bool(endpoint.allowed_ips),
        "advisor_proposed": endpoint.advisor_proposed,
    }
    request: dict[str, object] = connection | {
        "inspected": endpoint.inspected,
        "protocol": protocol,
        "path": endpoint.path,
        "specificity": path_specificity(endpoint.path),
        "allow_encoded_slash": endpoint.allow_encoded_slash,
    }
    rules, deny_rules = _matches(endpoint.rules, endpoint), _matches(endpoint.deny_rules, endpoint)
    paths = {match.path for match in (*rules, *deny_rules)} | {endpoint.path}
    return CompiledEndpoint(
        policy=key,
        index=index,
        endpoint=endpoint,
        connection_json=members(connection),
        request_json=members(request),
        host_glob=host if "*" in host else "",
        path_globs=tuple(sorted(paths - {"", "**"})),
        rules=rules,
        deny_rules=deny_rules,
        reads="" if protocol in HEAD_SUFFICES else protocol,
        calls=call_rules(endpoint),
        operations=operation_rules(endpoint),
    )


def _matches(matches: Iterable[L7Match], endpoint: Endpoint) -> tuple[CompiledMatch, ...]:
    """Rules as the Rego sees them, without those that can never fire (no method or path), nor those on calls."""
    if endpoint.protocol.lower() in ("json-rpc", "mcp"):
        return ()
    return tuple(_match(index, match) for index, match in enumerate(matches) if match.method and match.path)


def _match(index: int, match: L7Match) -> CompiledMatch:
    entry: dict[str, object] = {"index": index, "method": ascii_upper(match.method), "path": match.path}
    globs = {key: list(matcher.globs) for key, matcher in match.query}
    if globs:
        entry["query"] = globs
    values = sorted({glob for _, matcher in match.query for glob in matcher.globs})
    text = json.dumps(entry, separators=(",", ":"))
    return CompiledMatch(ascii_upper(match.method), match.path, text, tuple(values))
