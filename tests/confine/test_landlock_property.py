"""Whatever the policy, the real kernel grants what its paths, the baseline and their links come to, and nothing else.

Policies and links are generated over a tree of real directories; a child under the ruleset of each tries every file and every
directory of the tree, and places outside that nobody named. The tree lies outside of the baseline's /tmp.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openshell_supervisor.confine import baseline, landlock
from openshell_supervisor.confine.baseline import beneath
from openshell_supervisor.policy.model import FilesystemPolicy, SandboxPolicy

OUTSIDE = "/var/tmp"
pytestmark = [
    pytest.mark.skipif(landlock.support().abi == 0, reason="needs Landlock in the kernel"),
    pytest.mark.skipif(not os.access(OUTSIDE, os.W_OK), reason=f"needs a writable {OUTSIDE}"),
]
DIRECTORIES = ("a", "a/a", "a/b", "b", "b/a", "b/b")
FILES = tuple(f"{directory}/file" for directory in DIRECTORIES)
LINKS = ("link", "a/link", "b/a/link")
PATHS = st.sampled_from([*DIRECTORIES, *FILES, *LINKS, "absent", "a/absent/b", "link/a", "a/./b/", "a//file"])
TARGETS = st.sampled_from([*DIRECTORIES, *FILES, "../a", "../file", ".", "..", "absent", "link"])


@pytest.fixture
def place() -> Iterator[pathlib.Path]:
    """A directory that no baseline covers."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="oss-landlock-", dir=OUTSIDE))
    yield path
    shutil.rmtree(path)


def _grow(place: pathlib.Path, links: dict[str, str]) -> pathlib.Path:
    """A new tree with the links; a target with dots is relative to the link, any other is absolute."""
    root = pathlib.Path(tempfile.mkdtemp(dir=place))
    for directory in DIRECTORIES:
        (root / directory).mkdir()
        (root / directory / "file").write_text("x")
    for name, target in links.items():
        (root / name).symlink_to(target if target.startswith(".") else root / target)
    return root


def _tries(root: pathlib.Path, made: baseline.FileRules) -> Iterator[tuple[tuple[str, str], bool]]:
    """Every try, and whether it is to succeed: a path is allowed by a rule for it or for a directory above it."""
    readable = [os.path.realpath(path) for path in (*made.read_only, *made.read_write)]
    writable = [os.path.realpath(path) for path in made.read_write]
    for name in FILES:
        path = str(root / name)
        yield ("read", path), any(beneath(path, rule) for rule in readable)
        yield ("write", path), any(beneath(path, rule) for rule in writable)
    for name in DIRECTORIES:
        path = str(root / name)
        yield ("list", path), any(beneath(path, rule) for rule in readable)
        yield ("make", f"{path}/made"), any(beneath(path, rule) for rule in writable)
    for name in LINKS:
        place = os.path.realpath(root / name)
        if os.path.isfile(root / name):
            yield ("read", str(root / name)), any(beneath(place, rule) for rule in readable)
            yield ("write", str(root / name)), any(beneath(place, rule) for rule in writable)
    yield ("make", f"{root}/made"), any(beneath(str(root), rule) for rule in writable)
    yield ("list", str(root.parent)), any(beneath(str(root.parent), rule) for rule in readable)
    yield ("list", "/"), False
    yield ("list", OUTSIDE), False
    yield ("make", f"{OUTSIDE}/{root.name}"), False
    yield ("make", f"/usr/{root.name}"), False
    yield ("list", "/usr"), True
    yield ("write", "/dev/null"), True


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(PATHS, max_size=4),
    st.lists(PATHS, max_size=4),
    st.dictionaries(st.sampled_from(LINKS), TARGETS),
    st.none() | st.sampled_from(DIRECTORIES),
    st.none() | st.sampled_from(DIRECTORIES),
)
def test_the_kernel_grants_what_was_named_and_no_more(
    landlock_try: Callable,
    place: pathlib.Path,
    read_only: list[str],
    read_write: list[str],
    links: dict[str, str],
    workdir: str | None,
    standing_in: str | None,
) -> None:
    """In each generated tree every try succeeds exactly where a rule reaches; all the others answer EACCES. A path that a link
    in a writable place leads out of it (the kernel's own word for where it is) is in no rule."""
    root = _grow(place, links)
    listed = [tuple(f"{root}/{path}" for path in paths) for paths in (read_only, read_write)]
    policy = SandboxPolicy(filesystem=FilesystemPolicy(None, *listed))
    made = baseline.file_rules(
        policy,
        workdir=f"{root}/{workdir}" if workdir else None,
        standing_in=f"{root}/{standing_in}" if standing_in else "/",
    )
    with landlock.build(landlock.Rules(made.read_only, made.read_write)) as ruleset:
        astray = {one.path for one in ruleset.skipped if "leads to" in one.reason}
        held = replace(
            made,
            read_only=tuple(path for path in made.read_only if path not in astray),
            read_write=tuple(path for path in made.read_write if path not in astray),
        )
        tries = list(_tries(root, held))
        seen = landlock_try(ruleset, *(one for one, _ in tries))
    wrong = [(one, answer) for (one, right), answer in zip(tries, seen, strict=True) if (answer == "ok") is not right]
    assert not wrong, made
    assert {answer for (_, right), answer in zip(tries, seen, strict=True) if not right} == {"EACCES"}
