"""What the decision rows decide about: policies of any size, and an endless supply of facts that each of them allows.

Every tenth policy is a wildcard, the others are exact hosts, all with a REST rule. Engines are none of its business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.measure import BenchError

if TYPE_CHECKING:
    from openshell_supervisor.policy.model import SandboxPolicy
    from openshell_supervisor.verdict.facts import Facts, Verdict

DISTINCT = 32
"""Facts that are asked again and again where verdicts come from memory."""
WILDCARD_EVERY = 10


def policy_text(size: int) -> str:
    """A policy with `size` rules, as YAML."""
    rules = []
    for number in range(size):
        host = f"*.zone{number}.bench.example" if number % WILDCARD_EVERY == 0 else f"host{number}.bench.example"
        rules.append(
            f'  rule{number}:\n    endpoints: [{{host: "{host}", port: 443, protocol: rest, enforcement: enforce, '
            f'rules: [{{allow: {{method: GET, path: "/v1/**"}}}}]}}]\n    binaries: [{{path: "/**"}}]\n'
        )
    return "version: 1\nnetwork_policies:\n" + "".join(rules)


def policy_of(size: int) -> SandboxPolicy:
    """The same policy, read."""
    from openshell_supervisor.policy import yaml_file

    return yaml_file.parse(policy_text(size), "bench").policy


def asked_host(number: int, size: int) -> str:
    """A name that was not asked before, under one of the wildcards of a policy with `size` rules."""
    wildcards = -(-size // WILDCARD_EVERY)
    return f"n{number}.zone{number % wildcards * WILDCARD_EVERY}.bench.example"


class Questions:
    """Facts about a policy with `size` rules; equal ones are never the same objects."""

    def __init__(self, size: int) -> None:
        from openshell_supervisor.verdict.facts import Facts, Request

        self._facts, self._request = Facts, Request
        self._size = size
        self._asked = 0

    def new(self) -> Facts:
        """Facts with a name and a path that were never given before."""
        self._asked += 1
        return self._numbered(self._asked)

    def again(self, calls: int) -> list[Facts]:
        """`calls` facts, each equal to one of the 32 that `new` gave last."""
        first = self._asked - DISTINCT + 1
        return [self._numbered(first + number % DISTINCT) for number in range(calls)]

    def _numbered(self, number: int) -> Facts:
        request = self._request(method="GET", path=f"/v1/items/{number}")
        return self._facts(host=asked_host(number, self._size), port=443, binary="/usr/bin/curl", request=request)


def allowed(verdict: Verdict) -> None:
    """All facts given here are allowed. Raises `BenchError` for another verdict: it was not the decision that was measured."""
    if not verdict.allow:
        raise BenchError(f"a decision that must allow was {verdict.reason_id}: {verdict.reason}")
