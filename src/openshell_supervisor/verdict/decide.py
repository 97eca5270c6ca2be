"""May this leave? One pure function of facts and a policy generation, the same for proxy, explain and dry-run.

`decide` canonicalises, looks in the generation's memory, narrows, asks the rules and turns their answer into a `Verdict`. It
never raises: facts that make no sense and an engine that fails are denials. No clock, no socket, no file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.policy.normalise import normalise
from openshell_supervisor.verdict import custom
from openshell_supervisor.verdict.cache import Lru
from openshell_supervisor.verdict.document import document
from openshell_supervisor.verdict.engines.embedded import shared_engine
from openshell_supervisor.verdict.engines.protocol import Engine, EngineError, EngineUnavailable, PreparedEngine
from openshell_supervisor.verdict.facts import Facts, MatchedEndpoint, Verdict
from openshell_supervisor.verdict.hints import connection_hint, request_hint
from openshell_supervisor.verdict.index import CompiledEndpoint, Index, ascii_lower
from openshell_supervisor.verdict.reasons import allowed_reason, connection_reason, request_reason

VERDICTS_KEPT = 4096
"""Entries of a generation's memory. With `MAX_REMEMBERED` it stays below some 10 MiB, and an agent's working set of hosts and
paths is far smaller."""
MAX_REMEMBERED = 2048
"""Characters of host, path and query in facts that are remembered; longer ones are decided anew each time."""
ANSWERS_KEPT = 512
"""The engine's answers by its input: requests whose paths match the same globs share one. With `MAX_KEPT_INPUT` below 5 MiB."""
MAX_KEPT_INPUT = 8192
"""Characters of an input that is remembered; a longer one comes of a policy with hundreds of rules on one host."""
MAX_FACT = 8192
"""Characters of any one text in the facts (the longest legal one is a path of 4096 bytes); more is no real request."""
MAX_QUERY = 1024
"""Query pairs in the facts, as many as `parse_query` gives."""
MAX_CALLERS = 256
"""Ancestors or command line paths in the facts; upstream follows 64 parents."""

FLEETING = frozenset(("engine_error", "engine_unavailable"))
"""Denials that are not remembered: the next question may be answered."""
SOFT = frozenset(("rule_not_matched", "deny_rule", "graphql_not_registered"))
"""Denials of a request that an endpoint's `audit` softens: the rules judged it and said no. All others block."""
UNAVAILABLE_HINT = "the OPA server of --opa-url decides here; decisions are made again as soon as it answers"
ENGINE_HINT = (
    "the rules could not be evaluated; this is a fault of the supervisor or of its installation, not of the policy"
)


class Generation:
    """One policy, ready to be asked. Immutable but for its memory of verdicts; replaced whole when the policy changes."""

    def __init__(
        self,
        policy: SandboxPolicy,
        number: int,
        require_binary_identity: bool = False,
        engine: Engine | None = None,
        *,
        own_rules: bool = False,
    ) -> None:
        self.number = number
        self.policy = normalise(policy)
        self.require_binary_identity = require_binary_identity
        self.index = Index(self.policy)
        self.own_rules = own_rules
        self._engine = engine
        self._afar = engine if isinstance(engine, PreparedEngine) else None
        self.memory: Lru[Facts, Verdict] = Lru(VERDICTS_KEPT)
        self._answers: Lru[str, Any] = Lru(ANSWERS_KEPT)

    @property
    def engine(self) -> Engine:
        """What evaluates the rules; the shipped one is loaded when first needed. Raises `EngineError`."""
        return self._engine or shared_engine()

    @property
    def outage(self) -> str:
        """Why nothing can be decided now, or an empty string; the embedded engine knows no outage."""
        return self._afar.outage if self._afar is not None else ""

    @property
    def afar(self) -> bool:
        """True where `prepare` has to be awaited before a decision."""
        return self._afar is not None

    async def prepare(self, question: Facts | Callable[[], object]) -> None:
        """Have the engine's answers to `question` at hand, where it answers from afar; else it returns at once.

        `question` is facts, or something that decides and has no effect: it is run until no answer is missing.
        """
        if self._afar is not None:
            await self._afar.prepare((lambda: decide(question, self)) if isinstance(question, Facts) else question)

    def request_answer(self, text: str) -> Any:
        """What the rules say of a request, from memory where the same input was asked before. Raises `EngineError`."""
        known = self._answers.get(text)
        if known is None:
            known = self.engine.ask("request_authorization", text)
            if len(text) <= MAX_KEPT_INPUT:
                self._answers.put(text, known)
        return known

    def forget(self) -> None:
        """Empty both memories, so that the next question is evaluated. For measurements."""
        self.memory = Lru(VERDICTS_KEPT)
        self._answers = Lru(ANSWERS_KEPT)

    def warm(self) -> None:
        """Load and compile the engine now (a few tens of milliseconds), so that the first decision does not. Thread-safe.

        Raises `EngineError` when the engine cannot be had; every decision would then be a denial.
        """
        if self._afar is None and not self.own_rules:
            self.engine.ask("egress_authorization", document(Facts("warm.invalid", 1), [], {}, False))


def build_generation(
    policy: SandboxPolicy,
    number: int,
    require_binary_identity: bool = False,
    engine: Engine | None = None,
    *,
    own_rules: bool = False,
) -> Generation:
    """A generation for `policy`. Cheap: nothing heavy is imported before the first decision or `Generation.warm`.

    With `own_rules` the engine holds a module of the operator's and its data (`custom.embedded_engine`), not the shipped rules.
    """
    return Generation(policy, number, require_binary_identity, engine, own_rules=own_rules)


def decide(facts: Facts, generation: Generation) -> Verdict:
    """The verdict on `facts`. Synchronous and total: it never raises, and what it cannot judge it denies.

    Where the engine answers from afar, `Generation.prepare` is awaited first; without it the answer is `engine_unavailable`.
    """
    if generation.outage:
        return _unavailable(generation.outage, generation)
    try:
        known = generation.memory.get(facts)
        if known is not None:
            return known
        fault = _malformed(facts)
    except (TypeError, AttributeError, ValueError):  # not facts at all, or not hashable
        fault = "the facts are not of the promised types"
    if fault:
        return _denied("malformed_facts", f"policy evaluation error: {fault}", generation)
    verdict = _decided(_canonical(facts, generation), generation)
    if verdict.reason_id not in FLEETING and _weight(facts) <= MAX_REMEMBERED:
        generation.memory.put(facts, verdict)
    return verdict


def decide_fully(facts: Facts, generation: Generation) -> Verdict:
    """As `decide`, but over every endpoint of the policy and without memory. For tests and `explain`: it must agree."""
    if _malformed(facts):
        return decide(facts, generation)
    return _asked(_canonical(facts, generation), generation, list(generation.index.all()), whole=True)


def _decided(facts: Facts, generation: Generation) -> Verdict:
    known = generation.memory.get(facts)
    if known is not None:
        return known
    verdict = _asked(facts, generation, generation.index.narrow(facts.host, facts.port))
    if verdict.reason_id not in FLEETING and _weight(facts) <= MAX_REMEMBERED:
        generation.memory.put(facts, verdict)
    return verdict


def _asked(facts: Facts, generation: Generation, candidates: list[CompiledEndpoint], whole: bool = False) -> Verdict:
    """Ask about the connection, and where that is allowed and inspected, about the request."""
    connection = replace(facts, request=None) if facts.request is not None else facts
    verdict = generation.memory.get(connection) if facts.request is not None and not whole else None
    try:
        if generation.own_rules:
            return custom.decided(facts, generation.policy, generation.number, generation.engine)
        if verdict is None:
            verdict = _connection(connection, generation, candidates)
            if facts.request is not None and not whole and verdict.reason_id not in FLEETING:
                generation.memory.put(connection, verdict)
        if facts.request is None or not verdict.allow or not verdict.inspected:
            return verdict
        return _request(facts, generation, candidates, verdict, whole)
    except EngineUnavailable as error:
        return _unavailable(str(error), generation)
    except Exception as error:  # noqa: BLE001 - the boundary of the rules: whatever goes wrong inside, the answer is no
        what = str(error) if isinstance(error, EngineError) else type(error).__name__
        return replace(_denied("engine_error", f"policy evaluation error: {what}", generation), hint=ENGINE_HINT)


def _connection(facts: Facts, generation: Generation, candidates: list[CompiledEndpoint]) -> Verdict:
    text = document(facts, candidates, generation.index.rules, generation.require_binary_identity)
    answer = generation.engine.ask("egress_authorization", text)
    reason_id = str(answer["reason_id"])
    if answer["action"] != "allow" or reason_id != "allowed":
        reason_id = "engine_error" if reason_id == "allowed" else reason_id
        reason = connection_reason(facts, reason_id, sorted(answer["endpoint_policies"]), sorted(answer["errors"]))
        return replace(_denied(reason_id, reason, generation), hint=connection_hint(facts, reason_id, generation.index))
    matched = {(str(key), int(index)) for key, index in answer["matched_endpoints"]}
    endpoints = tuple(
        MatchedEndpoint(c.policy, c.index, c.endpoint) for c in candidates if (c.policy, c.index) in matched
    )
    return Verdict(
        allow=True,
        reason_id="allowed",
        reason=f"{facts.host}:{facts.port} is allowed by policy '{answer['matched_policy']}'",
        policy=str(answer["matched_policy"]),
        generation=generation.number,
        endpoints=endpoints,
        exact_host=answer["exact_declared_endpoint_host"] is True,
    )


def _request(
    facts: Facts, generation: Generation, candidates: list[CompiledEndpoint], connection: Verdict, whole: bool
) -> Verdict:
    request = facts.request
    assert request is not None
    rules, identity = generation.index.rules, generation.require_binary_identity
    text = document(facts, candidates, rules, identity, whole=whole, stand_in=not whole)
    answer = generation.engine.ask("request_authorization", text) if whole else generation.request_answer(text)
    reason_id = str(answer["reason_id"])
    allow = answer["allow"] is True and reason_id == "allowed"
    selected = _endpoint_at(connection, answer["selected"][1:])
    by = sorted(answer["allowed_by"] if allow else answer["denied_by"], key=_rules_first)
    policy, rule = (
        _named(by[0], "rules" if allow else "deny_rules") if by else (selected.policy if selected else "", "")
    )
    audited = selected is not None and not selected.endpoint.enforced and reason_id in SOFT
    verdict = replace(connection, allow=allow, policy=policy, rule=rule, enforcement="audit" if audited else "enforce")
    if allow:
        return replace(verdict, reason=allowed_reason(request, policy, rule))
    reason_id = "engine_error" if reason_id == "allowed" else reason_id
    hint = request_hint(request, reason_id, selected, rule, connection)
    vetoed = answer.get("vetoed") is True
    reason = request_reason(request, reason_id, selected, sorted(answer["errors"]), connection, vetoed)
    return replace(verdict, reason_id=reason_id, reason=reason, hint=hint)


def _endpoint_at(connection: Verdict, pair: list[Any]) -> MatchedEndpoint | None:
    if not pair:
        return None
    return next(item for item in connection.endpoints if [item.policy, item.index] == [pair[0], int(pair[1])])


def _rules_first(triple: list[Any]) -> tuple[bool, list[Any]]:
    return int(triple[2]) < 0, triple


def _named(triple: list[Any], section: str) -> tuple[str, str]:
    """Policy and place of what decided; an endpoint as a whole where no single rule did (-1)."""
    key, endpoint, rule = str(triple[0]), int(triple[1]), int(triple[2])
    if rule < 0:
        return key, f"endpoints[{endpoint}]"
    return key, f"endpoints[{endpoint}].{section}[{rule}]"


def _denied(reason_id: str, reason: str, generation: Generation) -> Verdict:
    return Verdict(allow=False, reason_id=reason_id, reason=reason, generation=generation.number)


def _unavailable(why: str, generation: Generation) -> Verdict:
    return replace(_denied("engine_unavailable", f"policy evaluation error: {why}", generation), hint=UNAVAILABLE_HINT)


def _canonical(facts: Facts, generation: Generation) -> Facts:
    """The facts as far as they can matter: two that differ only in what no rule looks at are one question."""
    request = facts.request
    if request is not None and request.query and not generation.index.uses_query and not generation.own_rules:
        request = replace(request, query=())
    host = ascii_lower(facts.host)
    if generation.require_binary_identity:
        return replace(facts, host=host, request=request)
    return Facts(host, facts.port, request=request)


def _weight(facts: Facts) -> int:
    total = len(facts.host) + len(facts.binary) + sum(map(len, facts.ancestors)) + sum(map(len, facts.cmdline))
    request = facts.request
    if request is None:
        return total
    total += len(request.method) + len(request.path) + sum(len(key) + len(value) for key, value in request.query)
    return total if request.body is None else total + len(request.body.error) + sum(map(len, request.body.texts()))


def _malformed(facts: Facts) -> str:
    """Why the facts cannot be judged, or an empty string. Text that JSON or a glob cannot carry whole never gets further."""
    if not isinstance(facts.port, int) or isinstance(facts.port, bool) or not 1 <= facts.port <= 65535:
        return "the port is not between 1 and 65535"
    texts = [("host", facts.host), ("binary", facts.binary)]
    if len(facts.ancestors) > MAX_CALLERS or len(facts.cmdline) > MAX_CALLERS:
        return f"more than {MAX_CALLERS} callers"
    texts += [("caller", text) for text in (*facts.ancestors, *facts.cmdline)]
    request = facts.request
    if request is not None:
        if len(request.query) > MAX_QUERY:
            return f"more than {MAX_QUERY} query parameters"
        if any(len(pair) != 2 for pair in request.query):
            return "the query is not a list of pairs"
        texts += [("method", request.method), ("path", request.path)]
        texts += [("query", text) for pair in request.query for text in pair]
        if request.body is not None:
            texts += [("body", text) for text in (request.body.protocol, request.body.error, *request.body.texts())]
        if not request.method or not request.path.startswith("/"):
            return "the method is empty or the path is not absolute"
    for name, text in texts:
        if not isinstance(text, str) or len(text) > MAX_FACT:
            return f"the {name} is not a text of reasonable length"
        if "\0" in text:
            return f"the {name} contains a NUL byte"
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            return f"the {name} is not valid text"
    return "" if facts.host else "the host is empty"
