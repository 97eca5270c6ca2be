"""What makes a middleware section unusable (policy.md 1.7 A, 3.7). Middlewares themselves are not built yet."""

from __future__ import annotations

from collections.abc import Iterator

from openshell_supervisor.errors import Problem
from openshell_supervisor.policy.model import Middleware, SandboxPolicy
from openshell_supervisor.policy.reading import child, shown

MAX_MIDDLEWARES = 10
MAX_SELECTOR_PATTERNS = 32
"""Upstream's limits."""


def middleware_problems(policy: SandboxPolicy) -> Iterator[Problem]:
    """Every fault of `network_middlewares`, each at its entry."""
    section = policy.network_middlewares
    if len(section) > MAX_MIDDLEWARES:
        yield Problem(
            "too_many_middlewares",
            f"too many middleware configs ({len(section)} > {MAX_MIDDLEWARES})",
            "network_middlewares",
        )
    orders: dict[int, str] = {}
    for key, item in section.items():
        path = child("network_middlewares", key)
        if item.order in orders:
            yield Problem(
                "middleware_order",
                f"middleware configs '{shown(orders[item.order])}' and '{shown(key)}' use duplicate order {item.order}",
                path,
                hint="give each its own `order`; they run from the smallest to the largest",
            )
        orders.setdefault(item.order, key)
        for fault in _faults(item):
            yield Problem("middleware_invalid", f"middleware config '{shown(key)}' is invalid: {fault}", path)
        count = len(item.include) + len(item.exclude)
        if count > MAX_SELECTOR_PATTERNS:
            yield Problem(
                "middleware_patterns",
                f"middleware config '{shown(key)}' has too many selector patterns ({count} > {MAX_SELECTOR_PATTERNS})",
                path,
            )


def _faults(item: Middleware) -> Iterator[str]:
    if not item.middleware:
        yield "middleware must not be empty"
    if item.on_error not in ("", "fail_closed", "fail_open"):
        yield f"invalid on_error '{shown(item.on_error)}'"
    if not item.include:
        yield "endpoint selector must include at least one host pattern"
    for pattern in (*item.include, *item.exclude):
        fault = _pattern_fault(pattern)
        if fault:
            yield f"endpoint selector pattern '{shown(pattern)}' is invalid: {fault}"


def _pattern_fault(pattern: str) -> str:
    if not pattern:
        return "host pattern must not be empty"
    if any(c.isspace() for c in pattern):
        return "host pattern must not contain whitespace"
    if "{" in pattern or "}" in pattern:
        return "host pattern must not contain brace alternates; list each host pattern separately"
    if "" in pattern.split("."):
        return "host pattern must not contain empty DNS labels"
    return ""
