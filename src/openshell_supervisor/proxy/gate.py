"""The question and the answer: facts to `decide`, the verdict to an order that a wire can carry out, one event for each.

Everything that leaves passes here exactly once per decision, in the clear or in a tunnel, HTTP/1 or HTTP/2. The gate holds no
socket and parses no bytes. In observe mode it asks the same question, writes down the same verdict as "would deny", and lets
pass.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Unpack

from openshell_supervisor.callers.caller import Caller
from openshell_supervisor.proxy import denials
from openshell_supervisor.proxy.denials import Denial
from openshell_supervisor.telemetry.events import Endpoint, Process, Severity, Telemetry, Traffic
from openshell_supervisor.verdict.decide import FLEETING, SOFT, Generation, decide
from openshell_supervisor.verdict.facts import Facts, Request, TargetError, Verdict, canonical_target, parse_query

# Remembered rulings of the current generation; one is a few hundred bytes. A workload that asks for more distinct targets
# only loses the shortcut. Longer ones, with the caller's paths, are not remembered at all.
MAX_RULINGS = 2048
MAX_REMEMBERED_TARGET = 1024
# What helps a program that could not be identified.
_UNIDENTIFIED = {
    "caller_unknown": "Connect again, and keep the connection open in the program that asks until it is answered.",
    "caller_ambiguous": "Only one program may hold the connection: do not share its socket with another one, and run programs "
    "from where they are installed.",
    "caller_unreadable": "A process of this sandbox hides itself (prctl(2), PR_SET_DUMPABLE); end it, then connect again.",
    "binary_changed": "The program was replaced since it was first used here. The operator must start the sandbox anew if that "
    "was meant.",
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Who asks and for whom: the workload's end of the connection, the decided destination, and how it came to us.

    `caller` is the program at that end; None where it was not asked for.
    """

    source: Endpoint
    host: str
    port: int
    scheme: str
    forward: bool
    caller: Caller | None = None


@dataclass(frozen=True, slots=True)
class Ruling:
    """What to do with a request (refuse it with `denial`, or send `target`: canonical path, query untouched) and its event."""

    denial: Denial | None
    target: str
    path: str
    message: str
    action: str
    policy: str
    engine: str
    reason: str | None
    fleeting: bool = False


def _facts(origin: Origin, request: Request | None = None) -> Facts:
    """What is known of a question, its caller included."""
    caller = origin.caller or Caller()
    return Facts(origin.host, origin.port, caller.binary, caller.ancestors, caller.cmdline, request)


def _unidentified(origin: Origin, generation: Generation) -> Verdict | None:
    """The denial of a connection that is nobody's for certain, where the policy must know whose it is."""
    caller = origin.caller
    if not generation.require_binary_identity or (caller is not None and not caller.problem):
        return None
    reason = caller.problem if caller is not None else "failed to resolve peer binary: it was not asked for"
    reason_id = caller.problem_id if caller is not None else "caller_unknown"
    return Verdict(False, reason_id, reason, hint=_UNIDENTIFIED.get(reason_id, ""), generation=generation.number)


def _actor(origin: Origin) -> Process | None:
    """The caller, for events."""
    caller = origin.caller
    if caller is None or not caller.binary:
        return None
    return Process(caller.binary, caller.pid, ancestors=caller.ancestors)


class Gate:
    """Asks the current generation. `generation` gives it, anew at every question."""

    def __init__(self, *, generation: Callable[[], Generation], telemetry: Telemetry, observe: bool) -> None:
        self.generation = generation
        self.observe = observe
        self._telemetry = telemetry
        self._rulings: dict[tuple[Caller | None, str, int, bool, str, str], Ruling] = {}
        self._rulings_of = -1

    async def prepare(self, origin: Origin) -> None:
        """Let an engine that answers from afar have its answer about a connection ready; otherwise it returns at once."""
        generation = self.generation()
        if generation.afar:
            await generation.prepare(lambda: self._passage(origin, generation))

    def preparation(self, origin: Origin, method: str, target: str) -> Awaitable[None] | None:
        """What to await before `request`: None where the engine is in the process."""
        generation = self.generation()
        if not generation.afar:
            return None
        return generation.prepare(lambda: self._rule(origin, method, target, generation))

    # -- connections (L4) ------------------------------------------------------------------------------------------

    def connection(self, origin: Origin) -> Verdict:
        """May this host and port be reached at all? No event yet: what becomes of it is not known."""
        return self._passage(origin, self.generation())

    def _passage(self, origin: Origin, generation: Generation) -> Verdict:
        return _unidentified(origin, generation) or decide(_facts(origin), generation)

    def connect_allowed(self, origin: Origin, verdict: Verdict, *, inspected: bool) -> None:
        """Say that a tunnel was opened."""
        word = "CONNECT_L7" if inspected else "CONNECT"
        self._telemetry.network(
            "Open",
            f"{word} allowed {origin.host}:{origin.port}",
            ok=True,
            action="Allowed",
            src=origin.source,
            actor=_actor(origin),
            dst=Endpoint(host=origin.host, port=origin.port),
            policy=verdict.policy or "-",
            engine="opa",
        )

    def connect_denied(self, origin: Origin, verdict: Verdict) -> None:
        """Say that a tunnel was refused by policy, or would have been."""
        self._refused_connection(
            origin, f"CONNECT {self._refused('denied')} {origin.host}:{origin.port}", "-", "opa", verdict.reason
        )

    def address_denied(self, origin: Origin, method: str, kind: str, reason: str, verdict: Verdict) -> None:
        """Say that the name was allowed and its address was not, or would not have been."""
        place = f"{origin.host}:{origin.port}"
        text = f"internal address {place}" if kind == "internal address" else f"{kind} for {place}"
        message = f"{'FORWARD' if origin.forward else method} {self._refused('blocked')}: {text}"
        self._refused_connection(origin, message, verdict.policy, "ssrf", reason)

    def tunnel_unsupported(self, origin: Origin, verdict: Verdict, reason: str) -> None:
        """Say that bytes came through an inspected tunnel that nobody can inspect."""
        message = f"CONNECT_L7 {self._refused('blocked')} unsupported tunnel protocol for {origin.host}:{origin.port}"
        self._refused_connection(origin, message, verdict.policy, "l7", reason)

    def _refused_connection(self, origin: Origin, message: str, policy: str, engine: str, reason: str) -> None:
        self._telemetry.network(
            "Open",
            message,
            ok=self.observe,
            action=self._action,
            severity=Severity.MEDIUM,
            src=origin.source,
            actor=_actor(origin),
            dst=Endpoint(host=origin.host, port=origin.port),
            policy=policy or "-",
            engine=engine,
            reason=reason,
        )

    def failed(self, message: str, origin: Origin | None = None) -> None:
        """Say that something broke that was no decision: an upstream, a handshake, a client."""
        if origin is not None and origin.host not in message:
            message = f"{message} ({origin.host}:{origin.port})"
        # The line shows a message only where no destination is set (ocsf.md 2.3); here the message says more.
        self._telemetry.network("Fail", message, severity=Severity.LOW, ok=False, src=origin.source if origin else None)

    # -- requests (L7) ---------------------------------------------------------------------------------------------

    def request(self, origin: Origin, method: str, target: str, *, upgrade: bool = False) -> Ruling:
        """Decide one request and write it down. `target` is origin-form, as the client sent it."""
        generation = self.generation()
        if generation.number != self._rulings_of or len(self._rulings) >= MAX_RULINGS:
            self._rulings.clear()
            self._rulings_of = generation.number
        key = (origin.caller, origin.host, origin.port, origin.forward, method, target)
        ruling = None if generation.outage else self._rulings.get(key)
        if ruling is None:
            ruling = self._rule(origin, method, target, generation)
            weight = len(target) + (origin.caller.weight if origin.caller is not None else 0)
            if weight <= MAX_REMEMBERED_TARGET and not ruling.fleeting:
                self._rulings[key] = ruling
        self._record(origin, method, ruling, upgrade)
        return ruling

    def _rule(self, origin: Origin, method: str, target: str, generation: Generation) -> Ruling:
        host, port = origin.host, origin.port
        passage = self._passage(origin, generation)
        try:
            path, query = canonical_target(
                target, allow_encoded_slash=passage.allow_encoded_slash or not passage.inspected
            )
            pairs = parse_query(query)
        except TargetError as error:
            return self._malformed(origin, target, passage, str(error))
        if not passage.allow:
            denial = denials.connection_denied(method, host, port, passage, path)
            return self._ruling(origin, method, denial, target, passage, "denied", path)
        if not passage.inspected:
            # No rule looks at the path, so the origin gets the very bytes that the client sent.
            return self._ruling(origin, method, None, target, passage, "allowed", path)
        verdict = decide(_facts(origin, Request(method, path, pairs)), generation)
        canonical = f"{path}?{query}" if "?" in target else path
        if verdict.allow:
            return self._ruling(origin, method, None, canonical, verdict, "allow", path)
        if verdict.enforcement == "audit" and verdict.reason_id in SOFT:
            return self._ruling(origin, method, None, canonical, verdict, "audit", path)
        denial = denials.request_denied(method, path, host, port, verdict)
        return self._ruling(origin, method, denial, canonical, verdict, "deny", path)

    def _malformed(self, origin: Origin, target: str, passage: Verdict, text: str) -> Ruling:
        hint = "Send the path in its plain form: no dot segments, control bytes or encoded slashes."
        return Ruling(
            denial=None if self.observe else denials.failure(400, "invalid_request_target", text, hint),
            target=target,
            path="/",
            message=f"HTTP request {self._refused('rejected')} before policy evaluation for {origin.host}:{origin.port}",
            action=self._action,
            policy=passage.policy or "-",
            engine="http-parser",
            reason=text,
            fleeting=passage.reason_id in FLEETING,
        )

    def _ruling(
        self,
        origin: Origin,
        method: str,
        denial: Denial | None,
        target: str,
        verdict: Verdict,
        decision: str,
        path: str,
    ) -> Ruling:
        """`decision` is allow, audit or deny for an L7 verdict, allowed or denied for an L4 one."""
        refused = denial is not None
        observed = self.observe or decision == "audit"
        by_rules = decision in ("allow", "audit", "deny")
        word = "FORWARD" if origin.forward else "L7_REQUEST"
        if by_rules and origin.forward:
            word = "FORWARD_L7"
        message = (
            f"{word} {self._refused(decision) if refused else decision} {method} {origin.host}:{origin.port}{path}"
        )
        return Ruling(
            denial=None if self.observe else denial,
            target=target,
            path=path,
            message=f"{message} reason={verdict.reason}" if by_rules else message,
            action=("Observed" if observed else "Denied") if refused or decision == "audit" else "Allowed",
            policy=verdict.policy or "-",
            engine="l7" if by_rules else "opa",
            reason=verdict.reason if refused or decision == "audit" else None,
            fleeting=verdict.reason_id in FLEETING,
        )

    def _record(self, origin: Origin, method: str, ruling: Ruling, upgrade: bool) -> None:
        message = ruling.message
        if upgrade:
            message = message.replace("L7_REQUEST allow ", "L7_REQUEST allow_upgrade ", 1)
        self._say_request(
            origin,
            method,
            ruling.path,
            message,
            action=ruling.action,
            policy=ruling.policy,
            engine=ruling.engine,
            reason=ruling.reason,
        )

    def _say_request(self, origin: Origin, method: str, path: str, message: str, **traffic: Unpack[Traffic]) -> None:
        traffic["src"] = origin.source
        traffic["actor"] = _actor(origin)
        self._telemetry.http(
            method,
            message,
            scheme=origin.scheme,
            host=origin.host,
            port=origin.port,
            path=path,
            **traffic,
        )

    def request_rejected(self, origin: Origin, method: str, path: str, reason: str, policy: str = "") -> None:
        """Say that a request was malformed and came to no verdict; it is refused in observe mode, too. `reason` is ours."""
        self._say_request(
            origin,
            method,
            path,
            f"HTTP request rejected before policy evaluation for {origin.host}:{origin.port}",
            action="Denied",
            severity=Severity.MEDIUM,
            policy=policy or "-",
            engine="http-parser",
            reason=reason,
        )

    def authority_mismatch(self, origin: Origin, method: str, path: str) -> None:
        """Say that a request named another host than its tunnel: denied, and a finding (domain fronting)."""
        self._say_request(
            origin,
            method,
            path,
            f"request authority {self._refused('refused')} for {origin.host}:{origin.port}",
            action=self._action,
            severity=Severity.HIGH,
            policy="-",
            engine="request-authority",
            reason="request_authority_mismatch",
        )
        self._telemetry.finding(
            "openshell.http.request_authority_mismatch",
            "Request authority does not match its tunnel",
            f"a request in the tunnel to {origin.host}:{origin.port} named another host",
            severity=Severity.HIGH,
            alert=True,
            action=self._action,
            evidence={"host": origin.host, "disposition": "observed" if self.observe else "denied"},
        )

    @property
    def _action(self) -> str:
        return "Observed" if self.observe else "Denied"

    def _refused(self, word: str) -> str:
        return f"would be {word}" if self.observe else word
