"""`explain --cases`: policies with questions and the answers that are expected, one JSON object per line.

The format is that of the policy corpus (docs/explain.md): `id`, `kind` (l4, l7 or validate), `policy`, `input`, and perhaps
`expect`. This module builds the question of a case, has it answered, and says in what the answer is not the expected one.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from openshell_supervisor.errors import PolicyError, SettingsError
from openshell_supervisor.explain.jsonl import fault, objects, shown
from openshell_supervisor.explain.question import AUDITED, CONNECT, TRANSPORTS, Answer, Question, ask
from openshell_supervisor.policy.yaml_file import LoadedPolicy, parse
from openshell_supervisor.verdict.decide import Generation, build_generation

KINDS = ("l4", "l7", "validate")
DEFAULT_BINARY = "/usr/bin/curl"
GENERATION = 1
NOT_DECIDED = "not_decided"
HANDSHAKE = {
    "upgrade": "websocket",
    "connection": "keep-alive, Upgrade",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}
"""What a WebSocket client sends with its first request (the example of RFC 6455 1.3)."""
_TEXT, _TEXTS = "a text", "a list of texts"


@dataclass(frozen=True, slots=True)
class Case:
    """One line. `policy` is the document of a policy file; `given` holds the question; `expect` is None where nothing is."""

    id: str
    kind: str
    policy: dict[str, Any]
    given: dict[str, Any] = field(default_factory=dict)
    expect: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Decided:
    """What became of a case. `answer` is None for a policy that was only loaded, or that could not be.

    `allow` is None where the case could not be decided; `reason` then says why. `texts` are the errors or warnings of the policy.
    """

    case: Case
    allow: bool | None
    reason_id: str
    reason: str
    matched_policy: str = ""
    answer: Answer | None = None
    texts: tuple[str, ...] = ()

    def line(self) -> str:
        """The JSON line that is printed."""
        names = ("allow", "reason_id", "reason", "matched_policy")
        return json.dumps({"id": self.case.id} | {name: getattr(self, name) for name in names}, ensure_ascii=True)

    def disagreements(self) -> tuple[str, ...]:
        """In what this is not what the case expects; empty where it agrees or expects nothing."""
        expect = self.case.expect
        if expect is None:
            return ()
        if self.allow is None:
            return (f"not decided: {self.reason}",)
        check = _validation if self.case.kind == "validate" else _connection if self.case.kind == "l4" else _request
        return tuple(check(self, expect))


def read(path: Path) -> Iterator[Case]:
    """The cases of a file. Raises `SettingsError` with a line number for what is none."""
    for number, value in objects(path):
        yield _case(path, number, value)


def _case(path: Path, number: int, value: dict[str, Any]) -> Case:
    for name, kind, what in (("id", str, _TEXT), ("policy", dict, "an object"), ("input", dict, "an object")):
        if not isinstance(value.get(name), kind):
            if name == "input" and value.get("kind") == "validate" and name not in value:
                continue
            fault(path, number, f"`{name}` is not {what}: {shown(value.get(name))}", "docs/explain.md has the format")
    if value.get("kind") not in KINDS:
        fault(path, number, f"`kind` is none of {', '.join(KINDS)}: {shown(value.get('kind'))}")
    if not isinstance(value.get("expect", {}), dict):
        fault(path, number, f"`expect` is not an object: {shown(value['expect'])}")
    case = Case(value["id"], value["kind"], value["policy"], value.get("input", {}), value.get("expect"))
    problem = _input_problem(case)
    if problem:
        fault(path, number, f"case {shown(case.id)}: {problem}", "docs/explain.md has the format")
    return case


def _input_problem(case: Case) -> str:
    given = case.given
    if case.kind == "validate":
        return ""
    port = given.get("port")
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
        return f"`input.port` is not a port: {shown(port)}"
    needed = ("host", "method", "target") if case.kind == "l7" else ("host",)
    for name in (*needed, "binary", "body", "websocket_text"):
        if not isinstance(given.get(name, None if name in needed else ""), str):
            return f"`input.{name}` is not {_TEXT}: {shown(given.get(name))}"
    for name in ("ancestors", "cmdline", "resolved_ips"):
        found = given.get(name, [])
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            return f"`input.{name}` is not {_TEXTS}: {shown(found)}"
    headers = given.get("headers", {})
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        return f"`input.headers` is not an object of texts: {shown(headers)}"
    if given.get("transport", CONNECT) not in TRANSPORTS:
        return f"`input.transport` is none of {', '.join(TRANSPORTS)}: {shown(given['transport'])}"
    try:
        for item in given.get("resolved_ips", []):
            ipaddress.ip_address(item)
    except ValueError:
        return f"`input.resolved_ips` holds no address: {shown(item)}"
    return ""


def why_not(case: Case) -> str:
    """Why a case cannot be decided here, or an empty string."""
    if case.kind == "validate" and case.given.get("pipeline") == "files":
        return "the checks of the files pipeline (a rules file with a data file) are not made here"
    if "trusted_gateway" in case.given:
        return "trusted gateways are not built"
    if "authority" in case.given or "host" in {name.lower() for name in case.given.get("headers", {})}:
        return "the authority of a request is compared with its tunnel's by the proxy, not by the policy"
    return ""


def load(case: Case) -> LoadedPolicy:
    """The case's policy, through the reader of policy files: a gateway's, or the data of --policy-rules. Raises `PolicyError`."""
    text = yaml.safe_dump(case.policy, sort_keys=False, allow_unicode=True)
    return parse(text, case.id, files=case.given.get("pipeline") == "files")


def generation(case: Case) -> Generation:
    """The case's policy ready to be asked, with binary identity as the case has it. Raises `PolicyError`."""
    return build_generation(load(case).policy, GENERATION, not case.given.get("relaxed_binary_identity", False))


def question(case: Case) -> Question:
    """What the case asks."""
    given = case.given
    binary = given.get("binary", "" if given.get("relaxed_binary_identity") else DEFAULT_BINARY)
    fields = {name.lower(): value for name, value in given.get("headers", {}).items()}
    if "websocket_text" in given or given.get("websocket_upgrade"):
        fields |= HANDSHAKE
    return Question(
        given["host"],
        given["port"],
        given["method"] if case.kind == "l7" else "",
        given["target"] if case.kind == "l7" else "",
        given.get("transport", CONNECT),
        binary,
        tuple(given.get("ancestors", ())),
        tuple(given.get("cmdline", ())),
        tuple(given["resolved_ips"]) if "resolved_ips" in given else None,
        tuple(fields.items()),
        given.get("body", "").encode("utf-8", "surrogatepass"),
        given["websocket_text"].encode("utf-8", "surrogatepass") if "websocket_text" in given else None,
        policy_only=True,
    )


def decide_case(case: Case) -> Decided:
    """Answer a case. Never raises for what a policy or question holds."""
    reason = why_not(case)
    if reason:
        return Decided(case, None, NOT_DECIDED, reason)
    try:
        if case.kind == "validate":
            warnings = load(case).warnings
            return Decided(case, True, "loads", "the policy loads", texts=tuple(item.message for item in warnings))
        answer = ask(question(case), generation(case))
    except PolicyError as error:
        texts = tuple(problem.message for problem in error.problems)
        code = error.problems[0].code if error.problems else error.code
        return Decided(case, False, code, "; ".join(texts) or error.message, texts=texts)
    except (RecursionError, yaml.YAMLError) as error:
        return Decided(case, False, "policy_invalid", f"the policy cannot be written as YAML: {type(error).__name__}")
    # A request that the rules allow is allowed also where the answer to it is another matter: `allow` is the policy's word.
    return Decided(case, answer.allow, answer.reason_id, answer.reason, answer.verdict.policy, answer)


def decide_all(cases: Iterable[Case]) -> Iterator[Decided]:
    """Answer each case."""
    return map(decide_case, cases)


def _differs(name: str, found: object, expect: dict[str, Any]) -> Iterator[str]:
    if name in expect and found != expect[name]:
        yield f"{name} is {shown(found)}, expected {shown(expect[name])}"


def _validation(decided: Decided, expect: dict[str, Any]) -> Iterator[str]:
    if "error" in expect:
        if decided.allow:
            yield f"the policy loads, expected the error {shown(expect['error'])}"
        elif not any(str(expect["error"]) in text for text in decided.texts):
            yield f"the errors are {shown(decided.texts)}, expected {shown(expect['error'])}"
        return
    yield from _differs("allow", decided.allow, expect)
    for wanted in (*([expect["warning"]] if "warning" in expect else []), *expect.get("warnings", [])):
        if not any(str(wanted) in text for text in decided.texts):
            yield f"no warning says {shown(wanted)}"


def _connection(decided: Decided, expect: dict[str, Any]) -> Iterator[str]:
    answer = decided.answer
    if answer is None:
        yield f"the policy does not load: {decided.reason}"
        return
    yield from _differs("allow", decided.allow, expect)
    yield from _differs("policy_allow", answer.verdict.allow, expect)
    if answer.stage == "address":
        yield from _differs("http_detail", answer.hint, expect)
        return
    yield from _differs("matched_policy", decided.matched_policy, expect)
    if "policy_allow" not in expect:
        yield from _differs("exact_declared_host", answer.verdict.exact_host, expect)
        extended = sum(item.endpoint.extended for item in answer.verdict.endpoints)
        yield from _differs("endpoint_configs", extended, expect)
    yield from _reason(decided, expect)


def _request(decided: Decided, expect: dict[str, Any]) -> Iterator[str]:
    answer = decided.answer
    if answer is None:
        yield f"the policy does not load: {decided.reason}"
        return
    yield from _differs("allow", decided.allow, expect)
    yield from _differs("forwarded", answer.allow or answer.outcome == AUDITED, expect)
    if answer.path:
        yield from _differs("canonical_path", answer.path, expect)
    if "error" in expect and str(expect["error"]) not in decided.reason:
        yield f"reason is {shown(decided.reason)}, expected the error {shown(expect['error'])}"
    yield from _reason(decided, expect)


def _reason(decided: Decided, expect: dict[str, Any]) -> Iterator[str]:
    """A reason is compared where both deny; what is said of what is allowed is ours."""
    if decided.allow or expect.get("allow", False):
        return
    yield from _differs("reason", decided.reason, expect)
    if "reason_contains" in expect and str(expect["reason_contains"]) not in decided.reason:
        yield f"reason is {shown(decided.reason)}, expected one with {shown(expect['reason_contains'])}"


__all__ = ["Case", "Decided", "SettingsError", "decide_all", "decide_case", "generation", "load", "question", "read"]
