"""Policies and facts from a seeded generator: the constants of `worlds`, drawn a hundred times faster than Hypothesis does.

For tests that need tens of thousands of pairs and no shrinking: a failure names the seed and the pair.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence

from worlds import BINARIES, GLOBS, HOSTS, METHODS, PATH_GLOBS, PATHS, PATTERNS, PORTS, SELECTORS, VALUES

from openshell_supervisor.policy.model import (
    Binary,
    Endpoint,
    GraphqlOperation,
    L7Allow,
    L7Deny,
    L7Match,
    Matchers,
    McpOptions,
    NetworkRule,
    QueryMatcher,
    SandboxPolicy,
)
from openshell_supervisor.verdict.facts import Facts, Request

OFTEN = ("**.example.com", "**.example.com", "**.example.com", "a.example.com")
HOST_PATTERNS = tuple(pattern for pattern in PATTERNS if "[" not in pattern)
CALLS = ("initialize", "tools/call", "tools/list", "ping", "a.b", "no/such", "*", "tools/*", "[")
TOOLS = ("read", "write", "re*", "**", "a.b", "[")
OPERATIONS = ("query", "mutation", "subscription", "*", "Query", "")
NAMES = ("", "Q", "Q*", "Mine")
FIELDS = ("viewer", "issue", "view*", "deleteAll")
DOCUMENTS = (
    "{ viewer }",
    "query Q { viewer issue }",
    "mutation Mine { deleteAll }",
    "subscription { issue }",
    "{ a: viewer ...F } fragment F on X { issue }",
    "not graphql",
    "",
)
PROTOCOLS = (
    "",
    "tcp",
    "rest",
    "rest",
    "rest",
    "REST",
    "graphql",
    "websocket",
    "mcp",
    "mcp",
    "json-rpc",
    "json-rpc",
    "sql",
)
CALLERS = ("/usr/bin/curl", "/usr/lib/git", "/opt/x", "", "/usr/bin/git")


class World:
    """Everything is drawn from one `random.Random`."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def pairs(self, policies: int, facts: int) -> Iterator[tuple[SandboxPolicy, bool, list[tuple[Facts, bytes]]]]:
        """Policies, whether identity counts, and `facts` questions to each with the body of the request (empty without one)."""
        for _ in range(policies):
            policy = self.policy()
            yield policy, self.likely(0.3), [self.facts(policy) for _ in range(facts)]

    def likely(self, chance: float) -> bool:
        return self.draw.random() < chance

    def some[T](self, items: Sequence[T], most: int, least: int = 0) -> tuple[T, ...]:
        return tuple(self.draw.choice(items) for _ in range(self.draw.randint(least, most)))

    def matchers(self, keys: Sequence[str], globs: Sequence[str]) -> Matchers:
        if self.likely(0.6):
            return ()
        found = {}
        for key in self.some(keys, 2, 1):
            many = self.likely(0.3)
            found[key] = (
                QueryMatcher(any=self.some(globs, 2, 1)) if many else QueryMatcher(glob=self.draw.choice(globs))
            )
        return tuple(sorted(found.items(), key=lambda item: item[0]))

    def match[M: L7Match](self, kind: type[M], protocol: str) -> M:
        pick = self.draw.choice
        if protocol in ("json-rpc", "mcp"):
            return kind(method=pick(CALLS), params=self.matchers(("name",), TOOLS))
        if protocol in ("graphql", "websocket") and self.likely(0.7):
            return kind(operation_type=pick(OPERATIONS), operation_name=pick(NAMES), fields=self.some(FIELDS, 2))
        return kind(method=pick(METHODS), path=pick(PATH_GLOBS), query=self.matchers(("q", "r"), GLOBS))

    def endpoint(self) -> Endpoint:
        pick = self.draw.choice
        protocol = pick(PROTOCOLS)
        hostless = self.likely(0.1)
        kind = protocol.lower()
        return Endpoint(
            host="" if hostless else pick(PATTERNS if self.likely(0.02) else (*HOST_PATTERNS, *OFTEN)),
            ports=PORTS if self.likely(0.6) else (pick(PORTS),),
            protocol=protocol,
            tls=pick(("", "", "skip")),
            enforcement=pick(("", "enforce", "audit")),
            access=pick(("", "", "", "read-only", "read-write", "full", "typo")),
            rules=tuple(self.match(L7Allow, kind) for _ in range(self.draw.randint(0, 3))),
            deny_rules=tuple(self.match(L7Deny, kind) for _ in range(self.draw.choice((0, 0, 1, 2)))),
            allowed_ips=("10.0.0.0/8",) if hostless or self.likely(0.2) else (),
            path=pick(("", "", *SELECTORS)),
            allow_encoded_slash=self.likely(0.5),
            advisor_proposed=self.likely(0.3),
            mcp=McpOptions(pick((None, False)), pick((None, True))) if kind == "mcp" and self.likely(0.5) else None,
            persisted_queries=pick(("", "allow_registered")) if kind == "graphql" else "",
            graphql_persisted_queries=self.registry() if kind == "graphql" else (),
        )

    def registry(self) -> tuple[tuple[str, GraphqlOperation], ...]:
        return (("known", GraphqlOperation("query", "Q", ("viewer",))),) if self.likely(0.5) else ()

    def policy(self) -> SandboxPolicy:
        rules = {}
        for key in self.draw.sample(("a", "b", "c", 'd"e'), self.draw.choice((0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3))):
            endpoints = tuple(self.endpoint() for _ in range(self.draw.randint(0, 3)))
            binaries = tuple(Binary(path, self.likely(0.2)) for path in self.some((*BINARIES, "/**", "/**"), 2, 1))
            rules[key] = NetworkRule(endpoints=endpoints, binaries=binaries)
        return SandboxPolicy(network_policies=rules)

    def facts(self, policy: SandboxPolicy) -> tuple[Facts, bytes]:
        """Facts that have a real chance to meet the policy, and the body of the request."""
        pick = self.draw.choice
        hosts = [
            e.host for rule in policy.network_policies.values() for e in rule.endpoints if e.host and "*" not in e.host
        ]
        host = pick(hosts) if hosts and self.likely(0.4) else pick(HOSTS)
        callers = pick(CALLERS), self.some(CALLERS[:3], 2), self.some(("/opt/a.py",), 1)
        if self.likely(0.2):
            return Facts(host, pick(PORTS), *callers), b""
        query = tuple((pick(("q", "r")), pick(VALUES)) for _ in range(pick((0, 0, 1, 2))))
        request = Request(pick(("GET", "HEAD", "get", "POST", "POST", "PURGE")), pick(PATHS), query)
        return Facts(host, pick(PORTS), *callers, request), self.body()

    def body(self) -> bytes:
        pick = self.draw.choice
        if self.likely(0.4):
            persisted = {"persistedQuery": {"version": 1, "sha256Hash": pick(("known", "unknown"))}}
            extra = {"extensions": persisted} if self.likely(0.2) else {}
            return json.dumps({"query": pick(DOCUMENTS), **extra}).encode()
        calls = [self.call() for _ in range(self.draw.randint(1, 3))]
        return json.dumps(calls if len(calls) > 1 else calls[0]).encode()

    def call(self) -> dict[str, object]:
        if self.likely(0.1):
            return {"jsonrpc": "2.0", "id": 1, "result": {}}
        method = self.draw.choice(CALLS)
        params = {"name": self.draw.choice(TOOLS)} if self.likely(0.6) else {}
        return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
