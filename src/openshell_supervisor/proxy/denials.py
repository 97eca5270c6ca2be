"""What the proxy answers when it does not forward: one shape, written for the agent that will read it.

A denial is data until it meets a wire: `head_and_body` for a raw HTTP/1 socket, `fields` for a layer that writes its own
head. Field names and their order are upstream's (proxy.md 1.7); `reason`, `reason_id`, `hint` and `generation` are added behind.
Never holds a query string.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import quote

from openshell_supervisor.verdict.facts import Verdict

# gRPC's PERMISSION_DENIED, UNAVAILABLE and INVALID_ARGUMENT (grpc/statuscodes.md).
_GRPC_STATUS = {403: 7, 502: 14, 503: 14, 400: 3}
RESOLUTION_FAILED = "DNS resolution"  # how the texts of `destinations` about a failed look-up begin
STAY = "This is a policy decision, not a fault: do not retry it and do not try another way round."


@dataclass(frozen=True, slots=True)
class Denial:
    """An answer of ours. `body` is the JSON object in order; `policy` is set for L7 decisions only (X-OpenShell-Policy)."""

    status: int
    reason_id: str
    body: dict[str, object] = field(default_factory=dict)
    policy: str = ""

    def payload(self) -> bytes:
        """The JSON body."""
        return json.dumps(self.body, ensure_ascii=True).encode()

    def fields(self, payload: bytes) -> list[tuple[bytes, bytes]]:
        """The headers that belong to the body, without Connection."""
        headers = [
            (b"Content-Type", b"application/json"),
            (b"Content-Length", b"%d" % len(payload)),
            (b"X-Deny-Reason", self.reason_id.encode()),
        ]
        if self.policy:
            headers.append((b"X-OpenShell-Policy", _header_text(self.policy)))
        return headers

    def phrase(self) -> bytes:
        """The reason phrase of an HTTP/1 status line: all that most clients show of a refused CONNECT. Fixed words only."""
        origin = "by sandbox policy" if self.status == 403 else "by the sandbox proxy"
        return f"{HTTPStatus(self.status).phrase} {origin}: {self.reason_id}".encode()

    def head_and_body(self) -> bytes:
        """The whole HTTP/1.1 answer, which also ends the connection."""
        payload = self.payload()
        lines = [b"HTTP/1.1 %d %s" % (self.status, self.phrase())]
        lines += [name + b": " + value for name, value in self.fields(payload)]
        return b"\r\n".join([*lines, b"Connection: close", b"", payload])

    def grpc_fields(self) -> list[tuple[bytes, bytes]]:
        """The trailers-only answer that a gRPC client understands: HTTP 200, the verdict in grpc-status."""
        text = f"{self.body.get('detail', '')}; {self.body.get('hint', '')}"
        return [
            (b"content-type", b"application/grpc"),
            (b"grpc-status", b"%d" % _GRPC_STATUS.get(self.status, 13)),
            (b"grpc-message", quote(text, safe=" ").encode()),
            (b"x-deny-reason", self.reason_id.encode()),
        ]


def _header_text(text: str) -> bytes:
    """A header value from a name that the policy's author chose: nothing that could end the line."""
    return "".join(c if 0x20 <= ord(c) < 0x7F else "?" for c in text).encode()


def _guidance(hint: str) -> str:
    """The hint for the agent that reads it: what to ask for, and that other ways round are not worth trying."""
    return hint if STAY in hint else f"{hint.rstrip('.')}. {STAY}"


def failure(status: int, reason_id: str, detail: str, hint: str = "") -> Denial:
    """An answer that is nobody's policy: malformed requests (4xx) and upstreams that fail (502, 503)."""
    body: dict[str, object] = {
        "error": reason_id,
        "detail": detail,
        "reason": detail,
        "reason_id": reason_id,
        "hint": hint,
    }
    return Denial(status, reason_id, body)


def connection_denied(method: str, host: str, port: int, verdict: Verdict, path: str = "") -> Denial:
    """The L4 refusal. `method` is CONNECT, or the request's own for absolute-form requests, which then carry a path."""
    hint = verdict.hint or (
        f"Ask for a network policy that lists {host}:{port} for this program if you need it. {STAY}"
    )
    body: dict[str, object] = {
        "error": "policy_denied",
        "detail": f"{method} {host}:{port}{path} not permitted by policy",
        "reason": verdict.reason,
        "reason_id": verdict.reason_id,
        "rule": verdict.rule or verdict.policy or f"{host}:{port}",
        "host": host,
        "port": port,
        "hint": hint,
        "agent_guidance": _guidance(hint),
        "generation": verdict.generation,
    }
    return Denial(403, verdict.reason_id, body)


def address_denied(method: str, host: str, port: int, detail: str, reason: str, generation: int) -> Denial:
    """The refusal of where a name leads to. `detail` is one of upstream's five phrases (proxy.md 1.7)."""
    hint = f"The name is allowed but its address is not: the operator may pin or list the address (allowed_ips). {STAY}"
    if reason.startswith(RESOLUTION_FAILED):
        hint = (
            "The name is allowed but could not be resolved: check its spelling. A resolver that is away for a while is a fault \
and no policy decision; retrying later is fine."
        )
    body: dict[str, object] = {
        "error": "ssrf_denied",
        "detail": f"{method} {host}:{port} blocked: {detail}",
        "reason": reason,
        "reason_id": "ssrf_denied",
        "rule": detail,
        "host": host,
        "port": port,
        "hint": hint,
        "agent_guidance": hint,
        "generation": generation,
    }
    return Denial(403, "ssrf_denied", body)


def request_denied(method: str, path: str, host: str, port: int, verdict: Verdict) -> Denial:
    """The L7 refusal, with upstream's thirteen keys in upstream's order. `path` is canonical and has no query."""
    hint = verdict.hint or (
        f"{method} {path} on {host}:{port} needs an allow rule in policy {verdict.policy or '(none matched)'}; ask for exactly "
        f"that rule if you need it. {STAY}"
    )
    missing = {
        "type": "rest_allow",
        "layer": "l7",
        "method": method,
        "path": path,
        "host": host,
        "port": port,
        "binary": "",
    }
    body: dict[str, object] = {
        "error": "policy_denied",
        "policy": verdict.policy,
        "rule": f"{method} {path}",
        "detail": verdict.reason,
        "layer": "l7",
        "protocol": "rest",
        "method": method,
        "path": path,
        "host": host,
        "port": port,
        "binary": "",
        "rule_missing": missing,
        "next_steps": [],
        "agent_guidance": _guidance(hint),
        "reason": verdict.reason,
        "reason_id": verdict.reason_id,
        "matched_rule": verdict.rule,
        "hint": hint,
        "generation": verdict.generation,
    }
    return Denial(403, verdict.reason_id, body, policy=verdict.policy or "-")


def authority_mismatch(host: str, port: int) -> Denial:
    """Host, :authority or SNI name another destination than the tunnel was allowed for (domain fronting)."""
    text = f"the request names another host than the tunnel to {host}:{port} was allowed for"
    hint = f"Open a tunnel to the host that the request is for; each host is decided on its own. {STAY}"
    body: dict[str, object] = {
        "error": "request_authority_mismatch",
        "message": text,
        "detail": text,
        "reason": text,
        "reason_id": "host_mismatch",
        "rule": f"{host}:{port}",
        "host": host,
        "port": port,
        "hint": hint,
        "agent_guidance": _guidance(hint),
    }
    return Denial(403, "host_mismatch", body)


def unsupported_protocol(host: str, port: int, detail: str) -> Denial:
    """Bytes on an inspected endpoint that cannot be inspected."""
    hint = f"This endpoint carries HTTP/1.1 or HTTP/2 over TLS, or HTTP/1.1 in the clear; nothing else. {STAY}"
    body: dict[str, object] = {
        "error": "unsupported_l7_protocol",
        "detail": detail,
        "reason": detail,
        "reason_id": "unsupported_protocol",
        "rule": f"{host}:{port}",
        "host": host,
        "port": port,
        "hint": hint,
        "agent_guidance": _guidance(hint),
    }
    return Denial(403, "unsupported_protocol", body)
