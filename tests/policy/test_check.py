"""What `check` prints, what is not built, and the default."""

from __future__ import annotations

from pathlib import Path

import pytest

from openshell_supervisor.policy.check import check, report
from openshell_supervisor.policy.defaults import default_policy
from openshell_supervisor.policy.normalise import normalise
from openshell_supervisor.policy.not_built import not_built
from openshell_supervisor.policy.validate import problems_of
from openshell_supervisor.policy.yaml_file import parse
from openshell_supervisor.verdict.decide import build_generation, decide
from openshell_supervisor.verdict.facts import Facts

GOOD = """\
version: 1
network_policies:
  pypi:
    endpoints:
      - {host: pkg.test, port: 443, protocol: rest, enforcement: enforce, access: read-only}
      - {host: dl.pkg.test, port: 443}
    binaries: [{path: "/**"}]
"""


def write(path: Path, text: str) -> Path:
    """A policy file."""
    file = path / "policy.yaml"
    file.write_text(text)
    return file


def test_a_good_policy(tmp_path: Path) -> None:
    """The summary says what is allowed, and a policy without oddities has no warnings."""
    file = write(tmp_path, GOOD)
    text, usable = report(file)
    assert usable and text.endswith("\n")
    assert text.splitlines()[-1] == f"{file}: ok: 1 rule, 2 endpoints"
    problems, warnings = check(file)
    assert problems == () and warnings == ()


def test_problems_are_printed_as_compilers_do(tmp_path: Path) -> None:
    """file:line:column: error: path: message [code], a hint below, so that editors jump to it."""
    file = write(tmp_path, GOOD.replace("protocol: rest", "protocol: http"))
    text, usable = report(str(file))
    assert not usable
    lines = text.splitlines()
    assert lines[0].startswith(f"{file}:5:37: error: network_policies.pypi.endpoints[0].protocol: ")
    assert lines[0].endswith("[protocol_unknown]")
    assert lines[1] == "    hint: did you mean `rest`?"
    assert lines[-1].endswith("not usable: 1 error")


def test_a_missing_file(tmp_path: Path) -> None:
    """No traceback for a name mistyped."""
    text, usable = report(tmp_path / "nothing.yaml")
    assert not usable and "No such file" in text


def test_terminal_escapes_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """A policy from elsewhere cannot drive the terminal that prints its faults."""
    text, _ = report(write(tmp_path, GOOD + '"\\e[31mred\\a": 1\n' + '"' + "k" * 500 + '": 1\n'))
    assert "\x1b" not in text and "\a" not in text
    assert all(len(line) < 500 for line in text.splitlines())


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ("protocol: graphql\naccess: full", "not_built.graphql"),
        ("protocol: mcp\nmcp: {allow_all_known_mcp_methods: true}", "not_built.mcp"),
        ("protocol: json-rpc\nrules: [{allow: {method: a}}]", "not_built.json_rpc"),
        ("protocol: websocket\naccess: full", "not_built.websocket"),
        ("protocol: sql\naccess: full", "not_built.sql"),
        ("protocol: tcp", "not_built.tcp"),
        ("credential_binding: {provider: x}", "not_built.credential_binding"),
        (
            "protocol: rest\naccess: full\ncredential_signing: sigv4\nsigning_service: s3",
            "not_built.credential_signing",
        ),
        (
            "protocol: rest\naccess: full\nrequest_body_credential_rewrite: true",
            "not_built.request_body_credential_rewrite",
        ),
    ],
)
def test_what_is_not_built_is_named(lines: str, code: str) -> None:
    """A part that is read and not enforced is never passed over in silence."""
    body = "".join(f"        {line}\n" for line in lines.splitlines())
    text = (
        f"version: 1\nnetwork_policies:\n  p:\n    endpoints:\n      - host: a.example.com\n        port: 443\n{body}"
    )
    assert code in {problem.code for problem in not_built(parse(text).policy)}


def test_sections_that_are_not_built_are_named() -> None:
    """Middlewares; binaries, file rules and the landlock section are enforced and not named."""
    text = (
        GOOD
        + "filesystem_policy: {read_only: [/usr]}\nlandlock: {compatibility: hard_requirement}\n"
        + "network_middlewares: {m: {middleware: x, endpoints: {include: [a.b.c]}}}\n"
    )
    codes = {problem.code for problem in not_built(parse(text).policy)}
    assert codes == {"not_built.middlewares"}


def test_the_default_allows_no_network() -> None:
    """Without a policy nothing leaves."""
    policy = default_policy()
    assert problems_of(policy) == [] and normalise(policy).network_policies == {}
    verdict = decide(Facts("example.com", 443), build_generation(policy, 1))
    assert (verdict.allow, verdict.reason_id) == (False, "no_policies")
