"""Listed links: the file behind one is meant, once and for all."""

from __future__ import annotations

import pathlib

from openshell_supervisor.callers.links import Links
from openshell_supervisor.policy.model import Binary, NetworkRule, SandboxPolicy
from openshell_supervisor.policy.yaml_file import parse


def policy(*paths: object) -> SandboxPolicy:
    """One rule with these binaries."""
    listed = "".join(f"      - {{path: {str(path)!r}}}\n" for path in paths)
    text = "version: 1\nnetwork_policies:\n  a:\n    endpoints: [{host: a.test, port: 443}]\n    binaries:\n"
    return parse(text + listed).policy


def listed(links: Links, *paths: object) -> list[str]:
    """The binaries' paths after the links were followed."""
    return [binary.path for binary in links.follow(policy(*paths)).network_policies["a"].binaries]


def test_a_link_stands_for_the_file_behind_it(tmp_path: pathlib.Path) -> None:
    """Over several links, and through a linked directory; a plain file stays alone."""
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "tool-1.2"
    tool.touch()
    (tmp_path / "tool").symlink_to("other")
    (tmp_path / "other").symlink_to("bin/tool-1.2")
    (tmp_path / "sbin").symlink_to("bin")
    assert listed(Links(), tmp_path / "tool") == [str(tmp_path / "tool"), str(tool)]
    assert listed(Links(), tmp_path / "sbin" / "tool-1.2") == [str(tmp_path / "sbin" / "tool-1.2"), str(tool)]
    assert listed(Links(), tool) == [str(tool)]
    assert listed(Links(), tmp_path / "tool", tool) == [str(tmp_path / "tool"), str(tool)]


def test_patterns_and_dead_ends_stay_as_they_are(tmp_path: pathlib.Path) -> None:
    """A pattern is no path, also where a file has its name; a link to nowhere and a loop lead to nothing."""
    (tmp_path / "file").touch()
    (tmp_path / "star*").symlink_to("file")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("star*", "nowhere", "loop", "absent"):
        assert listed(Links(), tmp_path / name) == [str(tmp_path / name)]


def test_a_link_is_followed_once_in_a_run(tmp_path: pathlib.Path) -> None:
    """Pointed elsewhere later, by a workload that owns it, it still means the first file; in another run, the new one."""
    for name in ("first", "second"):
        (tmp_path / name).touch()
    link = tmp_path / "tool"
    link.symlink_to("first")
    links = Links()
    assert listed(links, link)[1:] == [str(tmp_path / "first")]
    link.unlink()
    link.symlink_to("second")
    assert listed(links, link)[1:] == [str(tmp_path / "first")]
    assert listed(Links(), link)[1:] == [str(tmp_path / "second")]


def test_what_an_advisor_proposed_stays_so(tmp_path: pathlib.Path) -> None:
    """The file behind a proposed link counts as proposed, that behind a declared one as declared."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    for proposed in (False, True):
        rule = NetworkRule(name="a", endpoints=(), binaries=(Binary(str(tmp_path / "link"), proposed),))
        followed = Links().follow(SandboxPolicy(version=1, network_policies={"a": rule})).network_policies["a"]
        assert followed.binaries[1] == Binary(str(tmp_path / "file"), proposed)
