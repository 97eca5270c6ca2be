"""The words of events that several rooms or a reader's script rely on. Pure text; `events.py` puts it into events."""

from __future__ import annotations

import re
from collections.abc import Mapping

from openshell_supervisor.telemetry.ocsf import Process

BYPASS_REASON = "direct connection bypassed HTTP CONNECT proxy"

# As the supervisor's own reader of denials redacts: from "?" to the next blank or closing bracket.
_QUERY = re.compile(r"\?[^\s\]]+")


def without_query(text: str) -> str:
    """`text` with what looks like a query string replaced: `/a?token=x now` becomes `/a?[redacted] now`."""
    return _QUERY.sub("?[redacted]", text) if "?" in text else text


def with_fields(message: str, fields: Mapping[str, object]) -> str:
    """`message [key:value …]`, values unquoted as readers expect; None is left out, the free text `error` comes last."""
    ordered = sorted(fields.items(), key=lambda item: item[0] == "error")
    shown = [f"{key}:{_field(value)}" for key, value in ordered if value is not None]
    return f"{message} [{' '.join(shown)}]" if shown else message


def _field(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def bypass_hint(protocol: str, port: int) -> str:
    """What the owner of a program that went around the proxy should change."""
    if protocol == "udp" and port == 53:
        return "names are resolved by the sandbox proxy; check this program's resolver configuration"
    if protocol == "udp":
        return "UDP does not leave the sandbox; use TCP through the sandbox proxy"
    return "make this program use HTTP_PROXY and HTTPS_PROXY (Node.js: set NODE_USE_ENV_PROXY=1)"


def bypass_evidence(ip: str, port: int, protocol: str, actor: Process) -> dict[str, str]:
    """The finding's evidence under the reference's keys; "-" for what the kernel did not show."""
    return {
        "dst_addr": ip,
        "dst_port": str(port),
        "proto": protocol,
        "binary": actor.name,
        "binary_pid": str(actor.pid) if actor.pid else "-",
        "ancestors": " -> ".join(actor.ancestors) or "-",
    }


def degraded_message(requested: str, effective: str, egress: str, subsystem: str | None, error: str | None) -> str:
    """The message of CONFIG:DEGRADED. With a namespace of its own the sandbox's isolation is not what is degraded."""
    head = "Network isolation degraded; egress policy" if effective == "host" else "Egress policy"
    shown = {
        "requested": requested,
        "effective": effective,
        "enforcement": egress,
        "subsystem": subsystem,
        "error": error,
    }
    extent = "is observation-only" if egress == "observe" else "holds only for clients that use the proxy"
    return with_fields(f"{head} {extent}", shown)


def fallback_facts(probe: str | None, errno: str | None) -> dict[str, str]:
    """What a fallback adds to `unmapped`: the step that failed, and that losing the network takes no other layer along."""
    known = {"probe": probe, "errno": errno}
    untouched = {"filesystem_enforcement": "unchanged", "seccomp_enforcement": "unchanged"}
    return {key: value for key, value in known.items() if value is not None} | untouched


def degraded_finding(effective: str, egress: str, asked: bool) -> tuple[str, str, str]:
    """Message, description and remedy of the finding that goes with CONFIG:DEGRADED."""
    if effective != "host":
        place = "The sandbox has a network namespace of its own"
        why, remedy = "observe mode was requested", "Request egress=enforce to enforce egress policy"
    elif asked:
        place = "The sandbox shares the host-side network namespace"
        why = "host mode was requested"
        remedy = "Request network_mode=auto or network_mode=isolated to enforce egress policy"
    else:
        place = "The sandbox shares the host-side network namespace"
        why = "the inner network namespace could not be created"
        remedy = (
            "Run on a host that permits network namespaces, "
            "or request network_mode=isolated to fail instead of degrading"
        )
    if egress == "enforce":
        desc = f"{place}; egress decisions are enforced only for clients that use the proxy."
        return f"Egress policy can be got around because {why}", desc, remedy
    desc = f"{place}; egress decisions are logged but not enforced."
    return f"Egress policy is observation-only because {why}", desc, remedy
