"""GraphQL rules as upstream's file loader checks them (policy.md 1.7 C, 5.1): `*` and any case are operation types.

One refusal is ours: a registered operation without fields beside deny rules on fields. Upstream takes it, and those deny rules
then never fire for that operation.
"""

from __future__ import annotations

from collections.abc import Iterator

from openshell_supervisor.errors import Problem
from openshell_supervisor.policy.model import Endpoint, GraphqlOperation, L7Match
from openshell_supervisor.policy.reading import shown

_KINDS = ("query", "mutation", "subscription", "*")


def file_graphql_problems(prefix: str, e: Endpoint, path: str) -> Iterator[Problem]:
    """Faults of the GraphQL rules and registered operations of a graphql or websocket endpoint. `prefix` begins the message."""
    for where, place, rule in _rules(prefix, e, path):
        if e.protocol == "graphql" or _on_operations(rule):
            yield from _operation(where, rule, place)
    denied = any(rule.fields for rule in e.deny_rules)
    for key, entry in e.graphql_persisted_queries:
        where, place = f"{prefix}.graphql_persisted_queries[{shown(key)}]", f"{path}.graphql_persisted_queries"
        yield from _operation(where, entry, place)
        if denied and not entry.fields:
            text = (
                f"{where}.fields: deny_rules name fields, and none of them would apply to an operation without fields"
            )
            yield Problem("graphql_fields_missing", text, place, hint="list the operation's root fields")
    if e.protocol == "websocket":
        yield from _raw_text(prefix, e, path)


def _rules(prefix: str, e: Endpoint, path: str) -> Iterator[tuple[str, str, L7Match]]:
    """Every rule with what begins its messages and its dotted path."""
    for index, rule in enumerate(e.rules):
        yield f"{prefix}.rules[{index}].allow", f"{path}.rules[{index}]", rule
    for index, deny in enumerate(e.deny_rules):
        yield f"{prefix}.deny_rules[{index}]", f"{path}.deny_rules[{index}]", deny


def _on_operations(rule: L7Match) -> bool:
    return bool(rule.operation_type or rule.operation_name or rule.fields)


def _operation(prefix: str, rule: L7Match | GraphqlOperation, path: str) -> Iterator[Problem]:
    kind = rule.operation_type
    if not kind:
        yield Problem("operation_type", f"{prefix}.operation_type: required for GraphQL L7 rules", path)
    elif kind.lower() not in _KINDS:
        text = f"expected query, mutation, subscription, or *, got '{shown(kind)}'"
        yield Problem("operation_type", f"{prefix}.operation_type: {text}", path)
    if not all(rule.fields):
        yield Problem("operation_fields", f"{prefix}.fields: field glob must not be empty", path)


def _raw_text(prefix: str, e: Endpoint, path: str) -> Iterator[Problem]:
    """Raw messages cannot be ruled where each message is read as an operation."""
    rules = list(_rules(prefix, e, path))
    registry = e.graphql_persisted_queries or e.persisted_queries not in ("", "deny")
    if not registry and not any(_on_operations(rule) for _, _, rule in rules):
        return
    for where, place, rule in rules:
        if rule.method.upper() == "WEBSOCKET_TEXT":
            yield Problem(
                "websocket_graphql",
                f"{where}: WebSocket endpoints with GraphQL operation policy must use "
                "operation_type/operation_name/fields rules for client messages instead of WEBSOCKET_TEXT",
                place,
            )
