"""Which parts of a policy are read and not yet enforced. A part that is not built is named here, never passed over.

The supervisor warns of each at start. Entries leave this file when their part is built.
"""

from __future__ import annotations

from collections.abc import Iterator

from openshell_supervisor.errors import Problem
from openshell_supervisor.policy.model import Endpoint, SandboxPolicy
from openshell_supervisor.policy.reading import child

BUILT_PROTOCOLS = frozenset(("", "tcp", "rest"))
"""Protocols whose traffic is judged as the policy says. Requests to an endpoint of another protocol are denied."""


def not_built(policy: SandboxPolicy) -> tuple[Problem, ...]:
    """One problem with code `not_built.<part>` for each part of the policy that is not enforced yet."""
    return tuple(_sections(policy)) + tuple(
        problem
        for key, rule in policy.network_policies.items()
        for index, endpoint in enumerate(rule.endpoints)
        for problem in _endpoint(endpoint, f"{child('network_policies', key)}.endpoints[{index}]")
    )


def _sections(policy: SandboxPolicy) -> Iterator[Problem]:
    if policy.network_middlewares:
        yield Problem("not_built.middlewares", "network middlewares are read and do not run yet", "network_middlewares")


def _endpoint(endpoint: Endpoint, path: str) -> Iterator[Problem]:
    protocol = endpoint.protocol.lower()
    if protocol not in BUILT_PROTOCOLS:
        yield Problem(
            f"not_built.{protocol.replace('-', '_')}",
            f"protocol {protocol} is not built yet: every request to {endpoint.place()} is denied",
            f"{path}.protocol",
        )
    if protocol == "tcp":
        yield Problem(
            "not_built.tcp",
            "protocol tcp is reachable through the proxy only; direct connections and policy DNS are not built yet",
            f"{path}.protocol",
        )
    credentials = (
        ("credential_signing", endpoint.credential_signing),
        ("credential_binding", endpoint.credential_binding),
        ("request_body_credential_rewrite", endpoint.request_body_credential_rewrite),
        ("websocket_credential_rewrite", endpoint.websocket_credential_rewrite),
        ("allow_uninspected_credentials", endpoint.allow_uninspected_credentials),
    )
    for name, written in credentials:
        if written:
            yield Problem(
                f"not_built.{name}", f"{name} is read and has no effect yet: no credential is added", f"{path}.{name}"
            )
