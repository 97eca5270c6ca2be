"""One question, asked the way the proxy asks it: host, connection, address, request target, request.

The order is that of `proxy.connect` and `proxy.gate` (policy.md 3.8); a test drives the product with random requests and
compares. What depends on the network (names, certificates, an upstream that is away) is not asked here.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from openshell_supervisor.verdict.bodies.read import read_body, read_message
from openshell_supervisor.verdict.bodies.wire import BodyError
from openshell_supervisor.verdict.decide import Generation, decide
from openshell_supervisor.verdict.facts import (
    Facts,
    MatchedEndpoint,
    Request,
    TargetError,
    Verdict,
    canonical_host,
    canonical_target,
    parse_query,
)

CONNECT, FORWARD = "connect", "forward"
TRANSPORTS = (CONNECT, FORWARD)
"""Inside a CONNECT tunnel (every https URL), or as an absolute `http://` target, which most clients use for http URLs."""

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 5.6.2: what a method is made of
_TARGET = re.compile(r"[\x21-\x7e\x80-\U0010ffff]*")  # what may stand between the spaces of a request line
ALLOWED, BLOCKED, AUDITED, REJECTED = "allowed", "blocked", "audited", "rejected"


@dataclass(frozen=True, slots=True)
class Question:
    """Who wants to go where. Without a `method` it is about the connection; `target` is a path, perhaps with `?query`, as sent.

    `headers` (names in lower case) and `body` matter to protocols whose rules look into bodies; `message` is a text
    message on a WebSocket that this request, let through before, opened.
    `addresses` are what the host resolves to (empty: to nothing); None leaves the check of addresses out. `policy_only` puts
    to the policy what the proxy refuses before: a host that is no name, a method CONNECT inside a tunnel.
    """

    host: str
    port: int
    method: str = ""
    target: str = ""
    transport: str = CONNECT
    binary: str = ""
    ancestors: tuple[str, ...] = ()
    cmdline: tuple[str, ...] = ()
    addresses: tuple[str, ...] | None = None
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    message: bytes | None = None
    policy_only: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What the proxy would do, and the verdict it would do it on.

    `outcome` is one of allowed, blocked (403), audited (let through, and logged) and rejected (400: no verdict was come to).
    `stage` is what had the last word: host, connection, address, target, body or request. `path` is canonical, empty where no
    request was looked at; `facts` is all that is known of the question, more than was asked where the connection is denied;
    `protocol` is what an inspected request was read as.
    """

    outcome: str
    stage: str
    verdict: Verdict
    facts: Facts
    reason_id: str
    reason: str
    hint: str = ""
    path: str = ""
    protocol: str = ""

    @property
    def allow(self) -> bool:
        """The policy's answer: True only where nothing objects. A request that audit lets through is not allowed."""
        return self.outcome == ALLOWED


def ask(question: Question, generation: Generation) -> Answer:
    """What the proxy would do with this. Never raises for what the question holds."""
    facts = Facts(question.host, question.port, question.binary, question.ancestors, question.cmdline)
    try:
        facts = replace(facts, host=canonical_host(question.host))
    except TargetError as error:
        if not question.policy_only:
            return _rejected("host", error, facts, generation)
    passage = decide(facts, generation)
    if question.transport == FORWARD and question.method:
        return _forward(question, facts, passage, generation)
    if not passage.allow:
        return _by(passage, "connection", _with_request(question, facts))
    refused = _address(question, facts, passage)
    if refused is not None:
        return refused
    if not question.method or not passage.inspected or passage.tls_skip:
        return _by(passage, "connection", facts)
    return _request(question, facts, passage, generation)


def _forward(question: Question, facts: Facts, passage: Verdict, generation: Generation) -> Answer:
    """An absolute-form request: its target is read before its connection is judged, and its name is resolved last."""
    answer = _request(question, facts, passage, generation)
    if answer.outcome in (BLOCKED, REJECTED):
        return answer
    return _address(question, facts, passage) or answer


def _request(question: Question, facts: Facts, passage: Verdict, generation: Generation) -> Answer:
    fault = _head_fault(question)
    if fault:
        return _rejected("target", TargetError("invalid_request", fault), facts, generation)
    keep = passage.allow_encoded_slash or not passage.inspected
    try:
        path, query = canonical_target(question.target, allow_encoded_slash=keep)
        pairs = parse_query(query)
    except TargetError as error:
        return _rejected("target", error, facts, generation)
    request = Request(question.method, path, pairs)
    facts = replace(facts, request=request)
    if not passage.allow or not passage.inspected:
        return replace(_by(passage, "connection", facts), path=path)
    reader = passage.reads(path)
    protocol = reader.endpoint.protocol.lower() if reader is not None else ""
    try:
        facts = replace(facts, request=_read(question, request, reader))
    except BodyError as error:
        return replace(_rejected("body", error, facts, generation), path=path, protocol=protocol)
    return replace(_by(decide(facts, generation), "request", facts), path=path, protocol=protocol)


def _read(question: Question, request: Request, reader: MatchedEndpoint | None) -> Request:
    """The request with what its endpoint's protocol needs of it. Raises `BodyError`."""
    if reader is None:
        return request
    if question.message is not None and reader.endpoint.protocol.lower() == "websocket":
        return read_message(request, reader.endpoint, question.message)
    return read_body(request, reader.endpoint, question.headers, question.body)


def _with_request(question: Question, facts: Facts) -> Facts:
    """The facts with the request that the proxy never gets to read, where there is one that makes sense."""
    if not question.method or _head_fault(question):
        return facts
    try:
        path, query = canonical_target(question.target, allow_encoded_slash=True)
        return replace(facts, request=Request(question.method, path, parse_query(query)))
    except TargetError:
        return facts


def _head_fault(question: Question) -> str:
    """What the reader of heads would refuse: a method that is none, a target that breaks the line."""
    if question.policy_only:
        return ""
    if question.method == "CONNECT":
        return "CONNECT is not possible here; open a new connection to the proxy"
    if not _TOKEN.fullmatch(question.method):
        return "the method is not a token"
    if not _TARGET.fullmatch(question.target):
        return "the request target holds white space or control characters"
    if question.transport == CONNECT and not question.target.startswith("/"):
        return "the request target is not a path"
    return ""


def _address(question: Question, facts: Facts, passage: Verdict) -> Answer | None:
    """The check of the addresses that are known, by the proxy's own code; None where they pass or there is none to check."""
    if question.addresses is None:
        return None
    from openshell_supervisor.proxy import destinations  # asyncio and sockets: only where an address is known

    try:
        literal = destinations.parse_address(facts.host)
        addresses = (literal,) if literal is not None else tuple(map(ipaddress.ip_address, question.addresses))
        destinations.check(facts.host, facts.port, addresses, passage)
    except destinations.DestinationRefused as refusal:
        return Answer(BLOCKED, "address", passage, facts, "ssrf_denied", refusal.reason, hint=refusal.kind)
    if not addresses:
        reason = f"DNS resolution returned no addresses for {facts.host}:{facts.port}"
        return Answer(BLOCKED, "address", passage, facts, "ssrf_denied", reason)
    return None


def _by(verdict: Verdict, stage: str, facts: Facts) -> Answer:
    outcome = ALLOWED if verdict.allow else AUDITED if verdict.enforcement == "audit" else BLOCKED
    return Answer(outcome, stage, verdict, facts, verdict.reason_id, verdict.reason, verdict.hint)


def _rejected(stage: str, error: TargetError | BodyError, facts: Facts, generation: Generation) -> Answer:
    verdict = Verdict(False, error.reason_id, error.message, generation=generation.number)
    return Answer(REJECTED, stage, verdict, facts, error.reason_id, error.message)
