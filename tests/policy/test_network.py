"""The policy's `network` section: how much of AF_NETLINK the workload may open."""

from __future__ import annotations

from pathlib import Path

import pytest

from openshell_supervisor.errors import PolicyError
from openshell_supervisor.policy.check import report
from openshell_supervisor.policy.defaults import default_policy
from openshell_supervisor.policy.model import Netlink, NetworkOptions
from openshell_supervisor.policy.yaml_file import parse


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("true", Netlink.ALLOWED),
        ("TRUE", Netlink.ALLOWED),
        ("false", Netlink.DENIED),
        ("route", Netlink.ROUTE),
        ('"route"', Netlink.ROUTE),
    ],
)
def test_the_three_values(written: str, meant: Netlink) -> None:
    """`true` is all of netlink, `route` only NETLINK_ROUTE, `false` nothing."""
    loaded = parse(f"version: 1\nnetwork: {{allow_netlink: {written}}}\n")
    assert loaded.policy.network == NetworkOptions(meant) and loaded.policy.netlink is meant
    assert loaded.warnings == ()


@pytest.mark.parametrize("text", ["version: 1\n", "version: 1\nnetwork: {}\n", "version: 1\nnetwork:\n"])
def test_unsaid_is_denied(text: str) -> None:
    """A policy that says nothing of netlink denies it, and so does the default policy."""
    assert parse(text).policy.netlink is Netlink.DENIED
    assert default_policy().netlink is Netlink.DENIED


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ('"true"', "write `true`, without quotes"),
        ("yes", "write `true`, without quotes"),
        ("1", "write `true`, without quotes"),
        ("allowed", "write `true`, without quotes"),
        ("no", "write `false`, without quotes"),
        ("0", "write `false`, without quotes"),
        ("off", "write `false`, without quotes"),
        ("Route", "write `route`"),
        ("routes", "write `route`"),
        ("NETLINK_ROUTE", "write `route`"),
        ("[route]", "write `route`"),
        ("{route: true}", "write `route`"),
        ("1.5", "write `route`"),
        ("null", "write `route`"),
        ("generic", "write `route`"),
    ],
)
def test_other_values_are_faults(written: str, hint: str) -> None:
    """Anything else is a fault at its place with what was probably meant, and never a silent yes or no."""
    with pytest.raises(PolicyError) as caught:
        parse(f"version: 1\nnetwork:\n  allow_netlink: {written}\n")
    (problem,) = caught.value.problems
    assert (problem.code, problem.path, problem.line) == ("wrong_type", "network.allow_netlink", 3)
    assert problem.column == 18 and hint in problem.hint
    assert "expected `true`, `false` or `route`" in problem.message


@pytest.mark.parametrize(
    ("text", "path", "hint"),
    [
        ("network: {allow_netlnk: true}", "network.allow_netlnk", "did you mean `allow_netlink`?"),
        ("network: {my-rule: {endpoints: []}}", "network.my-rule", "`network_policies`"),
        ("allow_netlink: true", "allow_netlink", "under `network`"),
        ("netwrk: {allow_netlink: true}", "netwrk", "did you mean `network`?"),
    ],
)
def test_misplaced_keys(text: str, path: str, hint: str) -> None:
    """A key of another section, or misspelt, is refused by name with the place where it belongs."""
    with pytest.raises(PolicyError) as caught:
        parse(f"version: 1\n{text}\n")
    (problem,) = caught.value.problems
    assert (problem.code, problem.path, problem.line) == ("unknown_field", path, 2)
    assert hint in problem.hint


@pytest.mark.parametrize("written", ["true", "[route]", "[]"])
def test_the_section_is_a_mapping(written: str) -> None:
    """A section of another shape is a fault."""
    with pytest.raises(PolicyError) as caught:
        parse(f"version: 1\nnetwork: {written}\n")
    assert [problem.code for problem in caught.value.problems] == ["wrong_type"]


def test_check_shows_place_and_hint(tmp_path: Path) -> None:
    """`check` prints the fault as a compiler does; the neighbour with a right value is usable."""
    file = tmp_path / "policy.yaml"
    file.write_text("version: 1\nnetwork: {allow_netlink: routing}\n")
    text, usable = report(file)
    assert not usable and text.startswith(f"{file}:2:26: error: network.allow_netlink: ")
    assert "    hint: write `route`" in text
    file.write_text("version: 1\nnetwork: {allow_netlink: route}\n")
    assert report(file)[1]
