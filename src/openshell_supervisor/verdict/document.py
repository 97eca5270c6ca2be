"""The engine's input: facts, the candidate endpoints, and which of their globs match.

Built as JSON text from ready parts, because that is what the engine takes and because most of it never changes. Every string
goes through `json.dumps`, ASCII only; nothing of the workload's is ever pasted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from openshell_supervisor.policy.globs import HOST, PATH, VALUE, GlobError, glob_match, path_selected
from openshell_supervisor.verdict.facts import Facts, Request
from openshell_supervisor.verdict.index import CompiledEndpoint, CompiledRule

_Answers = dict[str, bool]


def document(
    facts: Facts,
    host: str,
    candidates: Sequence[CompiledEndpoint],
    rules: dict[str, CompiledRule],
    require_binary_identity: bool,
) -> str:
    """The input for `facts` on these candidates; with a request in the facts, the one for the question about it."""
    request = facts.request
    globs, invalid = _Globs(), {}
    globs.match("hosts", (c.host_glob for c in candidates if c.host_glob), HOST, host)
    keys = dict.fromkeys(c.policy for c in candidates)
    if require_binary_identity:
        patterns = {glob for key in keys for glob in rules[key].binary_globs}
        for caller in (facts.binary, *facts.ancestors):
            globs.match("binaries", patterns, PATH, caller)
    if request is not None:
        _request_globs(globs, candidates, request)
    invalid = globs.invalid
    parts = [
        f'"network":{{"host":{json.dumps(host)},"port":{facts.port}}}',
        f'"exec":{json.dumps(_exec(facts))}',
        f'"runtime":{{"require_binary_identity":{"true" if require_binary_identity else "false"}}}',
        f'"policies_exist":{"true" if rules else "false"}',
        f'"network_policies":{{{",".join(_rules(candidates, rules, keys, request is not None))}}}',
        f'"globs":{json.dumps(globs.tables | {"queries": globs.queries, "invalid": invalid})}',
    ]
    if request is not None:
        parts.append(f'"request":{json.dumps(_request(request))}')
    return f"{{{','.join(parts)}}}"


def _rules(
    candidates: Sequence[CompiledEndpoint], rules: dict[str, CompiledRule], keys: Iterable[str], with_request: bool
) -> Iterable[str]:
    by_key: dict[str, list[str]] = {key: [] for key in keys}
    for candidate in candidates:
        by_key[candidate.policy].append(candidate.request_json if with_request else candidate.connection_json)
    for key, endpoints in by_key.items():
        yield f'{json.dumps(key)}:{{"endpoints":[{",".join(endpoints)}],"binaries":{rules[key].binaries_json}}}'


def _exec(facts: Facts) -> dict[str, object]:
    return {"path": facts.binary, "ancestors": facts.ancestors, "cmdline_paths": facts.cmdline}


def _request(request: Request) -> dict[str, object]:
    values: dict[str, list[str]] = {}
    for key, value in request.query:
        values.setdefault(key, []).append(value)
    return {"method": request.method, "path": request.path, "query_params": values}


def _request_globs(globs: _Globs, candidates: Sequence[CompiledEndpoint], request: Request) -> None:
    values = {value for _, value in request.query}
    for candidate in candidates:
        selector = candidate.endpoint.path
        if path_selected(selector, request.path):
            globs.tables["selectors"][selector] = True
        globs.match("paths", candidate.path_globs, PATH, request.path)
        for pattern in candidate.query_globs:
            if pattern not in globs.queries and pattern not in globs.invalid:
                globs.match_values(pattern, values)


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

    def match_values(self, pattern: str, values: Iterable[str]) -> None:
        answers = self.queries[pattern] = {}
        for value in values:
            try:
                if glob_match(pattern, VALUE, value):
                    answers[value] = True
            except GlobError:
                self.invalid[pattern] = True
