"""Links on the way to a path of the file rules: whose word they are, and that the walk answers as open(2) does."""

from __future__ import annotations

import os
import pathlib

import pytest

from openshell_supervisor.confine import landlock
from openshell_supervisor.confine.named_paths import find
from openshell_supervisor.errors import ConfineError

pytestmark = pytest.mark.skipif(landlock.support().abi == 0, reason="needs Landlock in the kernel")


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """A project that a workload may write, and a home beside it that it may not."""
    for name in ("project/build", "project/src", "home"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def plant(tree: pathlib.Path) -> None:
    """What a workload does for the next one: its directory becomes a link to the home."""
    (tree / "project/build").rmdir()
    (tree / "project/build").symlink_to(tree / "home")


def left_out(*paths: pathlib.Path) -> dict[str, str]:
    """The paths that a ruleset with these writable paths leaves out, with the reasons."""
    with landlock.build(landlock.Rules(read_write=tuple(map(str, paths)))) as ruleset:
        return {one.path: one.reason for one in ruleset.skipped}


def test_a_link_planted_beneath_a_writable_place_is_not_followed(tree: pathlib.Path) -> None:
    """Named by its text beneath the place, through a link of the operator's, or with the place itself named by a link."""
    alias, place = tree / "alias", tree / "place"
    alias.symlink_to(tree / "project/build")
    place.symlink_to(tree / "project")
    assert left_out(tree / "project", tree / "project/build", alias, place) == {}
    plant(tree)
    for paths in (
        (tree / "project", tree / "project/build"),
        (tree / "project", alias),
        (place, tree / "project/build"),
        (tree / "project/build", tree / "project"),
    ):
        reasons = left_out(*paths)
        assert list(reasons.values()) == [f"a link in the writable {tree}/project leads to {tree}/home"], paths


def test_a_hard_requirement_names_the_link(tree: pathlib.Path) -> None:
    """Under hard_requirement the start is refused, with where the link leads."""
    plant(tree)
    rules = landlock.Rules(read_only=(str(tree / "project/build"),), read_write=(str(tree / "project"),), hard=True)
    with pytest.raises(ConfineError, match=r"leads to .*/home"):
        landlock.build(rules)


def test_a_link_that_stays_inside_is_followed(tree: pathlib.Path) -> None:
    """Within one writable place a link gives nothing new; outside of all places it is the operator's."""
    (tree / "project/current").symlink_to("src")
    (tree / "outer").symlink_to(tree / "home")
    assert left_out(tree / "project", tree / "project/current", tree / "outer") == {}


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("absent/x", FileNotFoundError),
        ("file/x", NotADirectoryError),
        ("loop", OSError),
        ("x" * 300, OSError),
    ],
)
def test_the_walk_fails_as_open_does(tree: pathlib.Path, path: str, error: type[OSError]) -> None:
    """The errno is the kernel's own for the same path."""
    (tree / "file").touch()
    (tree / "loop").symlink_to("loop")
    with pytest.raises(error) as ours:
        find(str(tree / path))
    with pytest.raises(error) as kernels:
        os.open(tree / path, os.O_PATH)
    assert ours.value.errno == kernels.value.errno


@pytest.mark.parametrize(
    "path", ["/", "/proc/self/exe", "/dev/stdin", "/usr/../etc", "/proc/self/root/usr", "//usr///bin/."]
)
def test_the_walk_ends_where_open_does(path: str) -> None:
    """The same object as the kernel's own walk, without a descriptor left behind."""
    before = os.listdir("/proc/self/fd")
    found = find(path)
    assert os.path.samestat(found.status, os.stat(path))
    found.close()
    assert os.listdir("/proc/self/fd") == before
