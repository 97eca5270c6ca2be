"""Which rule almost allowed it? The nearest one, what differs, and a request of that rule's that would pass.

Every rule of the policy is compared field by field with what was asked, the cheapest difference wins, and the claim is tried:
a rule is only named when `decide` allows the question with the differing fields put right. It never influences a decision.
"""

from __future__ import annotations

import difflib
import functools
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

from openshell_supervisor.policy.globs import HOST, PATH, VALUE, GlobError, glob_match, path_selected
from openshell_supervisor.policy.model import Endpoint, L7Allow, NetworkRule
from openshell_supervisor.verdict.bodies.json_rpc import RpcBody, RpcCall
from openshell_supervisor.verdict.decide import Generation, decide
from openshell_supervisor.verdict.facts import Facts, Request, Verdict
from openshell_supervisor.verdict.index import ascii_upper, rule_host
from openshell_supervisor.verdict.reasons import quoted

COST = {"host": 12, "port": 4, "binary": 4, "endpoint path": 3, "path": 3, "method": 2, "query": 1, "call": 2}
"""How far apart a field makes two requests: another path on the same host is nearer than the same path on another."""
SHORTLIST = 32
"""Rules whose texts are compared character by character; comparing is slow, and a policy may have thousands."""
ENDPOINTS = 64
"""Endpoints whose rules are compared at all, the nearest to the connection first."""
TRIED = 8
"""Rules that are tried with `decide` before the search is given up."""
MAX_LISTED = 4
"""Programs of a rule that are listed."""
MAX_COMPARED = 200
"""Characters of a text that are compared for likeness; difflib is quadratic."""
_FILLINGS = ("x", "", "a.b", "a/b", "x/")
"""What stands in for a wildcard in an example; the first that the glob takes."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One field in which a question is not what a rule allows. `asked` and `allowed` are printable text."""

    field: str
    asked: str
    allowed: str


@dataclass(frozen=True, slots=True)
class Nearest:
    """A rule that would have allowed it but for `differs`. `rule` is as in a verdict, or the endpoint where it has no rules.

    `example` are facts of that rule's that are allowed; they were tried. It is None where a deny rule stands in the way.
    """

    policy: str
    rule: str
    place: str
    differs: tuple[Difference, ...]
    example: Facts | None


@dataclass(frozen=True, slots=True)
class _Candidate:
    policy: str
    rule: str
    endpoint: Endpoint
    differs: tuple[Difference, ...]
    example: Facts

    @property
    def cost(self) -> int:
        return sum(COST[item.field] for item in self.differs)

    def distance(self) -> float:
        """The cost, less where the texts are alike: `api.exmaple.com` is nearer to `api.example.com` than `unlike.test` is."""
        return sum(COST[item.field] * (1 - _likeness(item) / 2) for item in self.differs)


def nearest(facts: Facts, verdict: Verdict, generation: Generation) -> Nearest | None:
    """The rule that is nearest to `facts`, which `verdict` denies; None where no change of them would do.

    `facts` may say more than the verdict was asked: a request whose connection is denied is compared whole.
    """
    found = heapq.nsmallest(SHORTLIST, _candidates(facts, generation), key=lambda candidate: candidate.cost)
    found.sort(key=_Candidate.distance)
    for candidate in found[:TRIED]:
        place = candidate.endpoint.place()
        if not candidate.differs and verdict.reason_id == "deny_rule":
            obstacle = Difference("deny rule", _line(facts), f"all but {verdict.rule} of policy '{verdict.policy}'")
            return Nearest(candidate.policy, candidate.rule, place, (obstacle,), None)
        if candidate.differs and decide(candidate.example, generation).allow:
            return Nearest(candidate.policy, candidate.rule, place, candidate.differs, candidate.example)
    return None


def _line(facts: Facts) -> str:
    return f"{quoted(facts.request.method)} {quoted(facts.request.path)}" if facts.request else ""


def _candidates(facts: Facts, generation: Generation) -> Iterator[_Candidate]:
    """The rules of the endpoints that are nearest to the connection."""
    kin = functools.cache(functools.partial(_kinship, facts.host))
    places = heapq.nsmallest(
        ENDPOINTS, _places(facts, generation), key=lambda place: (place.cost, -kin(rule_host(place.endpoint.host)))
    )
    for place in places:
        if facts.request is None or not place.endpoint.inspected:
            yield place
            continue
        for number, match in enumerate(place.endpoint.rules):
            compared = _request(facts.request, place.endpoint, match)
            if compared is not None:
                differs, request = (*place.differs, *compared[0]), compared[1]
                example = replace(place.example, request=request)
                yield replace(place, rule=f"{place.rule}.rules[{number}]", differs=differs, example=example)


def _places(facts: Facts, generation: Generation) -> Iterator[_Candidate]:
    """Every endpoint, compared with the connection alone."""
    for key, rule in generation.policy.network_policies.items():
        caller, differs = _caller(facts, rule, generation)
        for index, endpoint in enumerate(rule.endpoints):
            passage = (*differs, *_passage(facts, endpoint))
            example = facts
            if passage:
                host, port = _passage_example(facts, endpoint)
                example = replace(facts, host=host, port=port, binary=caller)
            yield _Candidate(key, f"endpoints[{index}]", endpoint, passage, example)


def _kinship(asked: str, host: str) -> float:
    """A cheap likeness, from 0 to 1: how much of the two is the same at the front and at the end."""
    front = _same(asked, host)
    end = _same(asked[front:][::-1], host[front:][::-1])
    return (front + end) / max(len(asked), len(host), 1)


def _same(one: str, other: str) -> int:
    """How many characters at the front are equal."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _caller(facts: Facts, rule: NetworkRule, generation: Generation) -> tuple[str, tuple[Difference, ...]]:
    """A caller that the rule takes (this one where it does, or where nothing would be found), and what differs."""
    callers = (facts.binary, *facts.ancestors)
    if not generation.require_binary_identity or any(
        _matches_program(binary.path, caller) for binary in rule.binaries for caller in callers
    ):
        return facts.binary, ()
    listed = ", ".join(quoted(item.path) for item in rule.binaries[:MAX_LISTED]) or "none"
    examples = (_example(item.path, PATH) if "*" in item.path else item.path for item in rule.binaries)
    caller = next((example for example in examples if example is not None), facts.binary)
    return caller, (Difference("binary", quoted(facts.binary), listed),)


def _matches_program(pattern: str, caller: str) -> bool:
    return _globs(pattern, PATH, caller) if "*" in pattern else pattern == caller


def _passage(facts: Facts, endpoint: Endpoint) -> Iterator[Difference]:
    if not _host_matches(endpoint, facts.host):
        yield Difference("host", quoted(facts.host), quoted(endpoint.host))
    if facts.port not in endpoint.ports:
        yield Difference("port", str(facts.port), ", ".join(map(str, endpoint.ports)))


def _passage_example(facts: Facts, endpoint: Endpoint) -> tuple[str, int]:
    """Host and port put right; a pattern that nothing could be found for leaves the host, and the trial then fails."""
    host = rule_host(endpoint.host)
    found = facts.host if _host_matches(endpoint, facts.host) else _example(host, HOST) if "*" in host else host
    port = facts.port if facts.port in endpoint.ports else next(iter(endpoint.ports), facts.port)
    return found or facts.host, port


def _host_matches(endpoint: Endpoint, host: str) -> bool:
    pattern = rule_host(endpoint.host)
    if not pattern:
        return bool(endpoint.allowed_ips)
    return _globs(pattern, HOST, host) if "*" in pattern else pattern == host


def _request(request: Request, endpoint: Endpoint, match: L7Allow) -> tuple[list[Difference], Request] | None:
    """In what the request is not this rule's, and one that is; None where the rule is not about method and path."""
    if endpoint.protocol.lower() in ("json-rpc", "mcp"):
        return _call(request, endpoint, match)
    if not match.method or not match.path:
        return None
    differs: list[Difference] = []
    method, path, query = request.method, request.path, request.query
    asked, wanted = ascii_upper(method), ascii_upper(match.method)
    if wanted not in ("*", asked) and not (asked == "HEAD" and wanted == "GET"):
        differs.append(Difference("method", quoted(method), quoted(match.method)))
        method = match.method
    if not _path_matches(match.path, path):
        differs.append(Difference("path", quoted(path), quoted(match.path)))
    if not _selected(endpoint, path):
        differs.append(Difference("endpoint path", quoted(path), quoted(endpoint.path)))
    if any(item.field in ("path", "endpoint path") for item in differs):
        path = _example_path(endpoint, match) or path
    for key, matcher in match.query:
        values = [value for name, value in query if name == key]
        if not values or not all(any(_globs(glob, VALUE, value) for glob in matcher.globs) for value in values):
            shown = ", ".join(f"{key}={value}" for value in values) or f"no {key}"
            globs = " or ".join(f"{key}={glob}" for glob in matcher.globs)
            differs.append(Difference("query", quoted(shown), quoted(globs)))
            example = next((found for glob in matcher.globs if (found := _example(glob, VALUE)) is not None), "")
            query = (*(pair for pair in query if pair[0] != key), (key, example))
    return differs, replace(request, method=method, path=path, query=query)


def _call(request: Request, endpoint: Endpoint, match: L7Allow) -> tuple[list[Difference], Request] | None:
    """The same for a single JSON-RPC or MCP call; a batch, an answer and what could not be read are no rule's."""
    body = request.body
    if not isinstance(body, RpcBody) or len(body.calls) != 1 or body.error or not match.method:
        return None
    call, tools = body.calls[0], next((matcher.globs for key, matcher in match.params if key == "name"), ())
    allowed = f"{match.method}{f' of {" or ".join(tools)}' if tools else ''}"
    asked = f"{call.method}{f' of {call.tool}' if call.tool else ''}"
    method = call.method if _globs(match.method, VALUE, call.method) else _example(match.method, VALUE)
    examples = (_example(tool, VALUE) for tool in tools)
    fits = any(_globs(tool, VALUE, call.tool) for tool in tools)
    tool = call.tool if fits or not tools else next((found for found in examples if found is not None), None)
    if method is None or tool is None:
        return None
    differs = [] if (method, tool) == (call.method, call.tool) else [Difference("call", quoted(asked), quoted(allowed))]
    if not _selected(endpoint, request.path):
        differs.append(Difference("endpoint path", quoted(request.path), quoted(endpoint.path)))
    path = request.path if _selected(endpoint, request.path) else _example_path(endpoint, L7Allow(path="**"))
    example = replace(body, calls=(RpcCall(method, tool if method == "tools/call" else ""),))
    return differs, replace(request, path=path or request.path, body=example)


def _path_matches(pattern: str, path: str) -> bool:
    return pattern == "**" or _globs(pattern, PATH, path)


def _selected(endpoint: Endpoint, path: str) -> bool:
    """Both dialects must take the path: the one that picks the endpoint and the one that its rules are asked in."""
    taken = not endpoint.path or _path_matches(endpoint.path, path)
    return taken and path_selected(endpoint.path, path)


def _example_path(endpoint: Endpoint, match: L7Allow) -> str | None:
    """A path that the rule and its endpoint both take."""
    for pattern in (match.path, endpoint.path):
        for filling in _FILLINGS:
            path = _filled(pattern, filling)
            if path.startswith("/") and _path_matches(match.path, path) and _selected(endpoint, path):
                return path
    return None


def _example(pattern: str, delimiters: tuple[str, ...]) -> str | None:
    """A text that the glob takes, or None where none was found."""
    return next((text for filling in _FILLINGS if _globs(pattern, delimiters, text := _filled(pattern, filling))), None)


def _filled(pattern: str, filling: str) -> str:
    return pattern.replace("**", "*").replace("*", filling).replace("?", "x")


def _globs(pattern: str, delimiters: tuple[str, ...], value: str) -> bool:
    try:
        return glob_match(pattern, delimiters, value)
    except GlobError:
        return False


def _likeness(difference: Difference) -> float:
    """0 for texts that have nothing in common, 1 for equal ones; fields that are no names are as unlike as can be."""
    if difference.field not in ("host", "path", "binary", "endpoint path"):
        return 0.0
    return difflib.SequenceMatcher(
        None, difference.asked[:MAX_COMPARED], difference.allowed[:MAX_COMPARED], autojunk=False
    ).ratio()
