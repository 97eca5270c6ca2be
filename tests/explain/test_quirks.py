"""Upstream's quirks: each has its row in docs/compatibility.md, and those that weaken a policy in silence warn.

The verdicts themselves are the corpus' business; here the table is held to the code and the cases.
"""

from __future__ import annotations

import json
import pathlib
import re

import pytest

from openshell_supervisor.policy.yaml_file import parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
CORPUS = ROOT.parent / "shared" / "reference" / "policy_cases.jsonl"
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
CELLS = [line.split("|") for line in COMPATIBILITY.splitlines() if re.match(r"\| \d+ \|", line)]
ROWS = {int(cells[1]): (cells[4], cells[5]) for cells in CELLS}
REST = "host: a.test, port: 443, protocol: rest, enforcement: enforce"
FULL = f"{REST}, access: full"
WARNED = [
    (1, "enforcement_unknown", "host: a.test, port: 443, protocol: rest, access: full, enforcement: ENFORCE", FULL),
    (1, "tls_unknown", f"{FULL}, tls: Skip", FULL),
    (2, "access_unknown", f"{REST}, access: readonly", f"{REST}, access: read-only"),
    (3, "rule_inert", f"{FULL}, deny_rules: [{{path: /x}}]", f"{FULL}, deny_rules: [{{method: '*', path: /x}}]"),
    (
        9,
        "allowed_ips_invalid",
        "host: a.test, port: 443, allowed_ips: [10.0.0]",
        "host: a.test, port: 443, allowed_ips: [10.0.0.0/8]",
    ),
    (
        9,
        "allowed_ips_blocked",
        "host: a.test, port: 443, allowed_ips: ['0.0.0.0/0']",
        "host: a.test, port: 443, allowed_ips: [10.0.0.0/8]",
    ),
    (
        10,
        "glob_invalid",
        f"{REST}, rules: [{{allow: {{method: GET, path: '/['}}}}]",
        f"{REST}, rules: [{{allow: {{method: GET, path: '/x'}}}}]",
    ),
    (
        18,
        "protocol_case",
        "host: a.test, port: 443, protocol: GRAPHQL, enforcement: enforce, access: full",
        "host: a.test, port: 443, protocol: graphql, enforcement: enforce, access: full",
    ),
    (19, "host_trailing_dot", "host: a.test., port: 443", "host: a.test, port: 443"),
]


def codes(endpoint: str, *, version: int = 1, binaries: str = "[{path: '/**'}]") -> list[str]:
    """The codes of what the loader warns of."""
    text = f"version: {version}\nnetwork_policies: {{p: {{endpoints: [{{{endpoint}}}], binaries: {binaries}}}}}\n"
    return [problem.code for problem in parse(text, "quirk").warnings]


@pytest.mark.parametrize(("number", "code", "quirk", "meant"), WARNED, ids=[f"{row[0]}-{row[1]}" for row in WARNED])
def test_a_quirk_that_weakens_is_said(number: int, code: str, quirk: str, meant: str) -> None:
    """The quirk loads with its code, what was meant loads without it, and the table names the code."""
    assert code in codes(quirk)
    assert codes(meant) == []
    assert f"`{code}`" in ROWS[number][0]


def test_quirks_outside_of_endpoints_are_said() -> None:
    """A version that is not 1, and a rule without binaries."""
    plain = "host: a.test, port: 443"
    assert codes(plain, version=2) == ["version"] and codes(plain, binaries="[]") == ["no_binaries"]
    assert codes(plain) == []
    assert "`version`" in ROWS[17][0] and "`no_binaries`" in ROWS[4][0]


def test_every_quirk_has_its_row() -> None:
    """1 to 20, once each; every case that a row names is in the corpus."""
    assert sorted(ROWS) == list(range(1, 21))
    if not CORPUS.exists():
        pytest.skip("../shared/reference/policy_cases.jsonl is missing")
    known = {json.loads(line)["id"] for line in CORPUS.read_text("utf-8").splitlines() if line.strip()}
    named = {case for _, cases in ROWS.values() for case in re.findall(r"`([^`]+)`", cases)}
    assert len(named) > 15
    assert named <= known
