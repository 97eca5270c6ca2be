"""A policy file becomes a policy, or all the reasons why not; whatever the bytes are, nothing else can happen."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openshell_supervisor.errors import PolicyError
from openshell_supervisor.policy.document import MAX_DEPTH, MAX_DOCUMENT_BYTES
from openshell_supervisor.policy.model import (
    Binary,
    CredentialBinding,
    FilesystemPolicy,
    L7Allow,
    L7Deny,
    LandlockPolicy,
    McpOptions,
    ProcessPolicy,
    QueryMatcher,
)
from openshell_supervisor.policy.yaml_file import LoadedPolicy, load, parse

VALID = """\
version: 1
filesystem_policy:
  include_workdir: true
  read_only: [/usr, /lib]
  read_write:
    - /tmp
landlock:
  compatibility: best_effort
process:
  run_as_user: sandbox
  run_as_group: "1500"
network_policies:
  github:
    name: GitHub
    endpoints:
      - host: api.github.com
        port: 443
        protocol: rest
        enforcement: enforce
        path: /repos/**
        rules:
          - allow: {method: GET, path: "/repos/**"}
          - allow:
              method: POST
              path: /repos/*/issues
              query: {state: "open*", label: {any: [bug, "feature-*"]}}
        deny_rules:
          - method: "*"
            path: /repos/*/rulesets
      - host: "*.githubusercontent.com"
        ports: [80, 443]
        tls: skip
    binaries:
      - {path: /usr/bin/git}
      - path: /usr/bin/curl
        harness: true
  internal:
    endpoints:
      - port: 9443
        allowed_ips: ["10.0.0.0/8"]
      - host: mcp.example.com
        port: 443
        protocol: mcp
        mcp: {strict_tool_names: true, max_body_bytes: 1000}
        rules: [{allow: {method: tools/call, tool: "search_*"}}]
        credential_binding: {provider: acme}
    binaries: [{path: "/**"}]
network_middlewares:
  redact:
    middleware: openshell/regex
    order: 3
    config: {patterns: [{name: x, n: 1.5}], on: true}
    endpoints: {include: ["*.github.com"], exclude: [a.github.com]}
"""


def codes(text: str) -> list[str]:
    """The codes of the problems of a text; empty when it loads."""
    try:
        parse(text, "policy.yaml")
    except PolicyError as error:
        return [problem.code for problem in error.problems]
    return []


def endpoint(extra: str) -> str:
    """A policy with one endpoint that has these further lines."""
    lines = "".join(f"        {line}\n" for line in extra.splitlines())
    head = "version: 1\nnetwork_policies:\n  p:\n    endpoints:\n      - host: api.example.com\n        port: 443\n"
    return f"{head}{lines}    binaries: [{{path: /x}}]\n"


def test_everything_written_is_in_the_model() -> None:
    """No part of the schema is dropped, also where it is not enforced yet."""
    policy = parse(VALID).policy
    assert policy.filesystem == FilesystemPolicy(True, ("/usr", "/lib"), ("/tmp",))
    assert policy.landlock == LandlockPolicy("best_effort")
    assert policy.process == ProcessPolicy("sandbox", "1500")
    github = policy.network_policies["github"]
    assert github.name == "GitHub"
    assert github.binaries == (Binary("/usr/bin/git"), Binary("/usr/bin/curl"))
    api, content = github.endpoints
    assert (api.host, api.ports, api.path, api.enforced, api.inspected) == (
        "api.github.com",
        (443,),
        "/repos/**",
        True,
        True,
    )
    query = (("label", QueryMatcher(any=("bug", "feature-*"))), ("state", QueryMatcher(glob="open*")))
    assert api.rules[1] == L7Allow(method="POST", path="/repos/*/issues", query=query)
    assert api.deny_rules == (L7Deny(method="*", path="/repos/*/rulesets"),)
    assert (content.ports, content.tls_skip, content.inspected) == ((80, 443), True, False)
    hostless, mcp = policy.network_policies["internal"].endpoints
    assert hostless.allowed_ips == ("10.0.0.0/8",)
    assert mcp.mcp == McpOptions(strict_tool_names=True)
    assert mcp.json_rpc_max_body_bytes == 1000
    assert mcp.credential_binding == CredentialBinding("acme")
    assert mcp.rules[0].params == (("name", QueryMatcher(glob="search_*")),)
    redact = policy.network_middlewares["redact"]
    assert redact.config == {"patterns": [{"name": "x", "n": 1.5}], "on": True}
    assert (redact.order, redact.include, redact.exclude) == (3, ("*.github.com",), ("a.github.com",))


@pytest.mark.parametrize(
    ("preset", "methods"),
    [
        ("read-only", {"GET", "HEAD", "OPTIONS"}),
        ("read-write", {"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH"}),
        ("full", {"*"}),
    ],
)
def test_presets_are_written_out(preset: str, methods: set[str]) -> None:
    """An access preset becomes its rules at load, each for every path."""
    loaded = parse(endpoint(f"protocol: rest\nenforcement: enforce\naccess: {preset}"))
    rules = loaded.policy.network_policies["p"].endpoints[0].rules
    assert {rule.method for rule in rules} == methods
    assert {rule.path for rule in rules} == {"**"}


def test_all_problems_are_reported_with_their_places() -> None:
    """One run names every fault: dotted path, line, column, code and what was probably meant."""
    text = (
        "version: 1\n"
        "network_policies:\n"
        "  p:\n"
        "    endpoints:\n"
        "      - host: api.example.com\n"
        "        prots: [443]\n"
        "        protocol: rset\n"
        "      - host: https://example.com/x\n"
        '        port: "443"\n'
        "process: {run_as_user: root}\n"
    )
    with pytest.raises(PolicyError) as caught:
        parse(text, "policy.yaml")
    found = [(p.code, p.path, p.line, p.column) for p in caught.value.problems]
    base = "network_policies.p.endpoints"
    assert found == [
        ("unknown_field", f"{base}[0].prots", 6, 9),
        ("protocol_unknown", f"{base}[0].protocol", 7, 9),
        ("host_invalid", f"{base}[1].host", 8, 9),
        ("wrong_type", f"{base}[1].port", 9, 15),
        ("bad_identity", "process.run_as_user", 10, 11),
    ]
    hints = [problem.hint for problem in caught.value.problems]
    assert "`ports`" in hints[0] and "`rest`" in hints[1] and "example.com" in hints[2]
    assert "6:9" in caught.value.screen()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "policy_empty"),
        ("# only a comment\n", "policy_empty"),
        ("network_policies: {}\n", "missing_field"),
        ("version: one\n", "wrong_type"),
        ("version: '1'\n", "wrong_type"),
        ("version: 99999999999999999999999999999999\n", "out_of_range"),
        ("version: -1\n", "out_of_range"),
        ("- 1\n", "wrong_type"),
        ("just text\n", "wrong_type"),
        ("version: 1\nversion: 1\n", "duplicate_key"),
        ("version: 1\n---\nversion: 1\n", "yaml_documents"),
        ("version: !!python/object/apply:os.system [id]\n", "yaml_tag"),
        ("version: !foo 1\n", "yaml_tag"),
        ("version: 1\nprocess: *nobody\n", "yaml_alias"),
        ("version: 1\nprocess: &a {run_as_user: *a}\n", "yaml_alias"),
        ("version: 1\n<<: {process: {}}\n", "merge_key"),
        ("version: 1\n? [a]\n: 1\n", "yaml_key"),
        ("version: 1\nprocess: {run_as_user: 1000}\n", "wrong_type"),
        ('version: 1\nprocess: {run_as_user: "a\\x1b[2J"}\n', "control_character"),
        ('version: 1\nnetwork_policies: {"a\\0b": {}}\n', "bad_key"),
        ("version: 1\n\tprocess: {}\n", "yaml_syntax"),
        ("version: 1\nprocess: {", "yaml_syntax"),
        ("\x00\x01\x02", "yaml_syntax"),
        ("version: 1\nlandlock: \ud800\n", "yaml_encoding"),
        ("version: " + "[" * 100_000, "yaml_depth"),
        ("{" * 100_000, "yaml_key"),
        ("? " * 50_000, "yaml_key"),
        ("- " * 50_000, "yaml_depth"),
        ("x" * (MAX_DOCUMENT_BYTES + 1), "policy_too_large"),
        ("version: 1\nnetwork_policies:\n  p: {endpoints: [{host: a.b.c, port: 1}], endpoints: []}\n", "duplicate_key"),
    ],
)
def test_what_is_no_policy_is_refused(text: str, code: str) -> None:
    """Broken, hostile and misunderstood documents are refused with a stable code, quickly and without a crash."""
    begun = time.monotonic()
    assert code in codes(text)
    assert time.monotonic() - begun < 2


def test_alias_bombs_are_bounded() -> None:
    """Aliases multiply: a document of a few lines may not become a billion values, in width or in depth."""
    wide = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    assert codes(wide) == ["yaml_nodes"]
    deep = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3 * MAX_DEPTH))
    assert codes(deep) == ["yaml_depth"]


def test_aliases_that_are_harmless_work() -> None:
    """An anchor shared by two rules is ordinary YAML."""
    text = (
        "version: 1\nnetwork_policies:\n"
        "  a: {endpoints: [{host: a.example.com, port: 443}], binaries: &all [{path: '/**'}]}\n"
        "  b: {endpoints: [{host: b.example.com, port: 443}], binaries: *all}\n"
    )
    rules = parse(text).policy.network_policies
    assert rules["a"].binaries == rules["b"].binaries == (Binary("/**"),)


def test_words_that_older_yaml_took_for_booleans_are_text() -> None:
    """`no`, `on` and leading zeros are text, as upstream's reader has it."""
    text = endpoint(
        "protocol: rest\nenforcement: enforce\nrules: [{allow: {method: GET, path: /x, query: {a: no, b: 0443}}}]"
    )
    rule = parse(text).policy.network_policies["p"].endpoints[0].rules[0]
    assert rule.query == (("a", QueryMatcher(glob="no")), ("b", QueryMatcher(glob="0443")))


@pytest.mark.parametrize(
    ("lines", "code", "meant"),
    [
        ("protocol: rest\naccess: full", "enforcement_unset", "enforcement: enforce"),
        ("protocol: rest\naccess: full\nenforcement: enforced", "enforcement_unknown", "`enforce`"),
        ("protocol: rest\naccess: full\nenforcement: ENFORCE", "enforcement_unknown", "`enforce`"),
        ("protocol: rest\nenforcement: enforce\naccess: readonly", "access_unknown", "`read-only`"),
        ("protocol: rest\nenforcement: enforce\naccess: all", "access_unknown", "`full`"),
        ("protocol: MCP\nenforcement: enforce\nrules: [{allow: {method: x}}]", "protocol_case", "protocol: mcp"),
        (
            "protocol: Json-Rpc\nenforcement: enforce\nrules: [{allow: {method: x}}]",
            "protocol_case",
            "protocol: json-rpc",
        ),
        ("protocol: GRAPHQL\nenforcement: enforce\naccess: full", "protocol_case", "protocol: graphql"),
        ("protocol: WebSocket\nenforcement: enforce\naccess: full", "protocol_case", "protocol: websocket"),
        ("protocol: mcp\nenforcement: enforce\nrules: [{allow: {tool: read}}]", "rule_inert", "method: tools/call"),
        ("tls: off", "tls_unknown", "tls: skip"),
        ("tls: passthrough", "tls_deprecated", "tls: skip"),
        ("tls: skip\nprotocol: rest\nenforcement: enforce\naccess: full", "tls_skip_l7", "remove"),
        ("access: read-only", "l7_without_protocol", "protocol: rest"),
        ("enforcement: enforce", "l7_without_protocol", "protocol: rest"),
        ("ports: [8443]", "port_ignored", "add 443"),
        ("allowed_ips: [10.0.0.0/33]", "allowed_ips_invalid", "10.0.0.0/8"),
        ("allowed_ips: [0.0.0.0/0]", "allowed_ips_blocked", "never reachable"),
        ("protocol: rest\nenforcement: enforce\nrules: [{allow: {method: GET}}]", "rule_inert", "path"),
        ("protocol: rest\nenforcement: enforce\naccess: full\ndeny_rules: [{path: /x}]", "rule_inert", "method"),
        ("protocol: rest\nenforcement: enforce\nrules: [{allow: {method: GTE, path: /x}}]", "method_unknown", "`GET`"),
        (
            "protocol: rest\nenforcement: enforce\nrules: [{allow: {method: 'GET,POST', path: /x}}]",
            "method_unknown",
            "one rule per",
        ),
        ("protocol: rest\nenforcement: enforce\nrules: [{allow: {method: GET, path: x}}]", "rule_path_relative", "/x"),
        (
            "protocol: rest\nenforcement: enforce\nrules: [{allow: {method: GET, path: '/x?a=1'}}]",
            "path_query",
            "query",
        ),
        (
            "protocol: rest\nenforcement: enforce\nrules: [{allow: {method: GET, path: '/['}}]",
            "glob_invalid",
            "backslash",
        ),
    ],
)
def test_silent_mistakes_are_warned_of(lines: str, code: str, meant: str) -> None:
    """What upstream loads in silence and nobody means is a warning with a place, a stable code and what was probably meant."""
    warnings = parse(endpoint(lines)).warnings
    found = [warning for warning in warnings if warning.code == code]
    assert found, [warning.code for warning in warnings]
    assert found[0].line > 0 and found[0].column > 0
    assert meant in found[0].hint


def test_a_tidy_policy_has_no_warnings() -> None:
    """A warning means something: a policy that says what it means gets none."""
    assert parse(endpoint("protocol: rest\nenforcement: enforce\naccess: read-only")).warnings == ()


def test_a_misread_endpoint_is_one_fault() -> None:
    """A misspelt key is not also reported as everything that is then missing."""
    assert codes("version: 1\nnetwork_policies: {p: {endpoints: [{hots: a.b.c, port: 443}]}}\n") == ["unknown_field"]


@pytest.mark.parametrize("make", ["missing", "directory", "fifo", "binary", "latin1"])
def test_unreadable_files_are_policy_errors(tmp_path: Path, make: str) -> None:
    """A file that is not there, not a file, a pipe without a writer or not text is refused by name, and at once."""
    path = tmp_path / "policy.yaml"
    if make == "directory":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "binary":
        path.write_bytes(bytes(range(256)) * 40)
    elif make == "latin1":
        path.write_bytes("version: 1\n# caf\xe9\n".encode("latin-1"))
    begun = time.monotonic()
    with pytest.raises(PolicyError) as caught:
        load(path)
    assert time.monotonic() - begun < 1
    assert caught.value.source == str(path)
    assert caught.value.problems[0].code in ("policy_unreadable", "yaml_encoding")
    if make == "latin1":
        assert caught.value.problems[0].line == 2


def test_a_file_with_a_byte_order_mark_loads(tmp_path: Path) -> None:
    """Editors that write a byte order mark do no harm."""
    path = tmp_path / "policy.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\r\nnetwork_policies: {}\r\n")
    assert load(path).policy.network_policies == {}


def mutated(text: str, source: random.Random) -> str:
    """One to three random changes of bytes, lines, indentation or values."""
    for _ in range(source.randint(1, 3)):
        lines = text.split("\n")
        at = source.randrange(len(lines))
        kind = source.randrange(8)
        if kind == 0 and text:
            place = source.randrange(len(text))
            text = (
                text[:place]
                + chr(source.choice([0, 9, 10, 32, 34, 38, 42, 58, 91, 123, 0x7F, 0xE9, 0x1F600]))
                + text[place + 1 :]
            )
            continue
        if kind == 1:
            del lines[at]
        elif kind == 2:
            lines.insert(at, source.choice(lines))
        elif kind == 3:
            lines[at] = " " * source.randint(0, 12) + lines[at].lstrip()
        elif kind == 4:
            key, colon, _ = lines[at].partition(":")
            junk = [
                "",
                "null",
                "-1",
                "1e400",
                "9" * 40,
                "[]",
                "{}",
                "!!int 3",
                "*x",
                "&x 1",
                "'",
                '"\\ud800"',
                "| \n  x",
                ".nan",
                "0x" + "f" * 80,
            ]
            lines[at] = f"{key}{colon} {source.choice(junk)}"
        elif kind == 5:
            lines[at] = lines[at].replace(source.choice("-:{}[],\"'/*"), source.choice("-:{}[],\"'/*\t\x00"))
        elif kind == 6:
            source.shuffle(lines)
        else:
            lines[at] = lines[at] * source.randint(2, 40)
        text = "\n".join(lines)
    return text


@pytest.mark.parametrize("seed", range(10))
def test_five_hundred_mutations_never_crash(seed: int) -> None:
    """However a policy's text is damaged, the outcome is a policy or a PolicyError with at least one located problem."""
    source = random.Random(seed)
    outcomes = set()
    for _ in range(60):
        text = mutated(VALID, source)
        try:
            loaded = parse(text, "mutant")
        except PolicyError as error:
            outcomes.add("refused")
            assert error.problems and all(problem.code and problem.message for problem in error.problems)
            assert error.screen().isprintable() or "\n" in error.screen()
        else:
            outcomes.add("loaded")
            assert isinstance(loaded, LoadedPolicy)
    assert "refused" in outcomes


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300) | st.binary(max_size=300).map(lambda raw: raw.decode("latin-1")))
def test_arbitrary_text_never_crashes(text: str) -> None:
    """Any text at all is a policy or a PolicyError."""
    codes(text)
    codes(f"version: 1\nnetwork_policies:\n  p:\n    endpoints: [{text}]\n")


def test_a_thousand_rules_load_within_a_second() -> None:
    """Reading stays linear: a thousand rules of two endpoints take less than a second."""
    rule = VALID[VALID.index("  github:") : VALID.index("  internal:")]
    text = "version: 1\nnetwork_policies:\n" + "".join(
        rule.replace("  github:", f"  rule-{n}:", 1).replace("api.github", f"api{n}.github") for n in range(1000)
    )
    begun = time.process_time()
    assert len(parse(text).policy.network_policies) == 1000
    assert time.process_time() - begun < 1.5  # 0.6 s measured; the machine is shared
