"""The engine's input: facts, the candidate endpoints, and which of their globs match.

Built as JSON text from ready parts, because that is what the engine takes and because most of it never changes. Every string
goes through `json.dumps`, ASCII only; nothing of the workload's is ever pasted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from openshell_supervisor.policy.globs import HOST, PATH, VALUE, GlobError, glob_match, glob_problem, path_selected
from openshell_supervisor.verdict.bodies.json_rpc import RpcBody
from openshell_supervisor.verdict.bodies.rules import call_input
from openshell_supervisor.verdict.bodies.websocket import WebSocketPart
from openshell_supervisor.verdict.facts import Body, Facts, Request
from openshell_supervisor.verdict.index import CompiledEndpoint, CompiledRule, ascii_upper
from openshell_supervisor.verdict.reasons import refused_as, rejection

_Answers = dict[str, bool]


def document(
    facts: Facts,
    candidates: Sequence[CompiledEndpoint],
    rules: Mapping[str, CompiledRule],
    require_binary_identity: bool,
    *,
    whole: bool = False,
    stand_in: bool = False,
) -> str:
    """The input for `facts` (host in lower case) on these candidates; with a request, the one for the question about it.

    Allow and deny rules that could not fire for this method and path are left out, unless `whole`. With `stand_in` the path is
    replaced by one that stands for all that match the same globs: the rules see a path only through globs and its `%2F`.
    """
    request = facts.request
    globs = _Globs()
    globs.match("hosts", (c.host_glob for c in candidates if c.host_glob), HOST, facts.host)
    keys = list(dict.fromkeys(c.policy for c in candidates))
    if require_binary_identity:
        patterns = {glob for key in keys for glob in rules[key].binary_globs}
        for caller in (facts.binary, *facts.ancestors):
            globs.match("binaries", patterns, PATH, caller)
    endpoints = [_with_request(globs, c, request, whole) if request else f"{{{c.connection_json}}}" for c in candidates]
    parts = [
        f'"network":{{"host":{json.dumps(facts.host)},"port":{facts.port}}}',
        f'"runtime":{{"require_binary_identity":{"true" if require_binary_identity else "false"}}}',
        f'"policies_exist":{"true" if rules else "false"}',
        f'"network_policies":{{{",".join(_policies(candidates, endpoints, rules, require_binary_identity))}}}',
        f'"globs":{json.dumps(globs.answers(), separators=(",", ":"))}',
    ]
    if require_binary_identity:
        parts.append(f'"exec":{json.dumps(_exec(facts))}')
    if request is not None:
        parts.append(f'"request":{json.dumps(_request(request, stand_in, candidates, whole))}')
    return f"{{{','.join(parts)}}}"


def _policies(
    candidates: Sequence[CompiledEndpoint],
    endpoints: Sequence[str],
    rules: Mapping[str, CompiledRule],
    with_binaries: bool,
) -> Iterable[str]:
    by_key: dict[str, list[str]] = {}
    for candidate, text in zip(candidates, endpoints, strict=True):
        by_key.setdefault(candidate.policy, []).append(text)
    for key, texts in by_key.items():
        binaries = f',"binaries":{rules[key].binaries_json}' if with_binaries else ""
        yield f'{json.dumps(key)}:{{"endpoints":[{",".join(texts)}]{binaries}}}'


def _exec(facts: Facts) -> dict[str, object]:
    return {"path": facts.binary, "ancestors": facts.ancestors, "cmdline_paths": facts.cmdline}


def _request(
    request: Request, stand_in: bool, candidates: Sequence[CompiledEndpoint], whole: bool
) -> dict[str, object]:
    path = ("/%2F" if "%2F" in request.path else "/") if stand_in else request.path
    values: dict[str, list[str]] = {}
    for key, value in request.query:
        values.setdefault(key, []).append(value)
    entry: dict[str, object] = {"method": ascii_upper(request.method), "path": path, "query_params": values}
    body = request.body
    if body is not None and body.error:
        entry["refused_as"] = refused_as(body)
        entry["refusal"] = "" if stand_in else rejection(body)
    elif isinstance(body, RpcBody):
        asked = [(c.policy, c.index, c.calls) for c in candidates if c.calls]
        entry["rpc"] = call_input(body, request.method, asked, whole=whole)
    elif isinstance(body, WebSocketPart) and body.control:
        entry["control"] = True
    elif body is not None and body.graphql is not None:
        entry["operations"] = True
    return entry


def _with_request(globs: _Globs, candidate: CompiledEndpoint, request: Request, whole: bool) -> str:
    """An endpoint with those of its rules that could fire; the globs they ask for are answered on the way."""
    if path_selected(candidate.endpoint.path, request.path):
        globs.tables["selectors"][candidate.endpoint.path] = True
    globs.match("paths", candidate.path_globs, PATH, request.path)
    method, paths = ascii_upper(request.method), globs.tables["paths"].keys() | globs.invalid.keys()
    sections = []
    for matches in (candidate.rules, candidate.deny_rules):
        live = [match for match in matches if whole or match.could_fire(method, paths)]
        for match in live:
            globs.match_values(match.query_globs, {value for _, value in request.query})
        sections.append(",".join(match.json for match in live))
    text = f'{candidate.request_json},"rules":[{sections[0]}],"deny_rules":[{sections[1]}]'
    return f"{{{text}{_for_body(candidate, request.body, whole)}}}"


def _for_body(candidate: CompiledEndpoint, body: Body | None, whole: bool) -> str:
    """What the endpoint says of the body: whether it can judge it, and its rules on what is in it."""
    text = ',"built":true' if candidate.reads == (body.protocol if body and candidate.reads else "") else ""
    if isinstance(body, RpcBody) and candidate.calls:
        text += f",{candidate.calls.members}"
    if body is not None and body.graphql is not None and candidate.operations:
        asked = json.dumps(candidate.operations.input(body.graphql, whole=whole), separators=(",", ":"))
        text += "".join(f",{part}" for part in (candidate.operations.members, f'"operations":{asked}') if part)
    return text


class _Globs:
    """The answers to the globs that the rules may ask for; only a match is recorded, and what is no glob at all."""

    def __init__(self) -> None:
        self.tables: dict[str, _Answers] = {"hosts": {}, "binaries": {}, "paths": {}, "selectors": {}}
        self.queries: dict[str, _Answers] = {}
        self.invalid: _Answers = {}

    def match(self, table: str, patterns: Iterable[str], delimiters: tuple[str, ...], value: str) -> None:
        answers = self.tables[table]
        for pattern in patterns:
            try:
                if glob_match(pattern, delimiters, value):
                    answers[pattern] = True
            except GlobError:
                self.invalid[pattern] = True

    def match_values(self, patterns: Iterable[str], values: Iterable[str]) -> None:
        for pattern in patterns:
            answers = self.queries.setdefault(pattern, {})
            for value in values:
                try:
                    if glob_match(pattern, VALUE, value):
                        answers[value] = True
                except GlobError:
                    self.invalid[pattern] = True
            if not answers and glob_problem(pattern, VALUE):
                self.invalid[pattern] = True

    def answers(self) -> dict[str, object]:
        """The tables that have an entry; the rules take an absent one for empty."""
        return {
            name: table
            for name, table in (*self.tables.items(), ("queries", self.queries), ("invalid", self.invalid))
            if table
        }
