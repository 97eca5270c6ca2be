"""What makes a middleware section unusable (policy.md 1.7 A, 3.7). Middlewares themselves are not built yet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

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
    if not all(map(_exact, _numbers(item.config))):
        yield "config holds a number that a double cannot hold exactly"
    if not item.include:
        yield "endpoint selector must include at least one host pattern"
    for pattern in (*item.include, *item.exclude):
        fault = _pattern_fault(pattern)
        if fault:
            yield f"endpoint selector pattern '{shown(pattern)}' is invalid: {fault}"


def _numbers(value: object) -> Iterator[int | float]:
    """Every number in free-form configuration."""
    if isinstance(value, Mapping):
        yield from (number for item in value.values() for number in _numbers(item))
    elif isinstance(value, list):
        yield from (number for item in value for number in _numbers(item))
    elif isinstance(value, int | float):
        yield value


def _exact(number: int | float) -> bool:
    """Whether google.protobuf.Struct, which has doubles only, gives the number back; NaN and the infinities are no JSON."""
    try:
        return math.isfinite(number) and int(float(number)) == int(number)
    except OverflowError:
        return False


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
