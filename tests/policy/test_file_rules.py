"""The policy's `filesystem_policy` and `landlock`: what is refused, what is warned of, and what the paths come to."""

from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openshell_supervisor.errors import PolicyError, Problem
from openshell_supervisor.policy.defaults import default_policy
from openshell_supervisor.policy.lint import warnings_of
from openshell_supervisor.policy.normalise import normal_path, normalise
from openshell_supervisor.policy.yaml_file import parse


def faults(section: str) -> list[Problem]:
    """The problems of a policy with this `filesystem_policy`; empty when it loads."""
    try:
        parse(f"version: 1\nfilesystem_policy: {section}\n")
    except PolicyError as error:
        return list(error.problems)
    return []


def warned(text: str) -> list[Problem]:
    """The warnings of a policy with these further lines."""
    return list(parse(f"version: 1\n{text}\n").warnings)


@pytest.mark.parametrize(
    ("good", "bad", "code"),
    [
        ("{read_only: [/usr]}", "{read_only: [usr]}", "path_not_absolute"),
        ("{read_only: [/root]}", "{read_only: ['~/x']}", "path_not_absolute"),
        ("{read_only: [/..x, /x.., /...]}", "{read_only: [/usr/../etc]}", "path_traversal"),
        ("{read_write: [/a]}", "{read_write: [/..]}", "path_traversal"),
        ("{read_only: [/]}", "{read_write: [/]}", "path_too_broad"),
        ("{read_write: [//tmp]}", "{read_write: [//]}", "path_too_broad"),
        ("{read_write: [/./tmp]}", "{read_write: [/.]}", "path_too_broad"),
        ("{read_write: [/.tmp]}", "{read_write: [/././/]}", "path_too_broad"),
        (f"{{read_only: [/{'a' * 4095}]}}", f"{{read_only: [/{'a' * 4096}]}}", "path_too_long"),
        # The kernel's PATH_MAX counts bytes, and so does the limit.
        (f"{{read_only: [/{'ä' * 2047}]}}", f"{{read_only: [/{'ä' * 2048}]}}", "path_too_long"),
        ("{read_only: [/a b]}", '{read_only: ["/a\\0b"]}', "control_character"),
        ("{read_only: []}", "{read_only: ['']}", "path_not_absolute"),
    ],
)
def test_paths_that_are_refused(good: str, bad: str, code: str) -> None:
    """Each fault has its code and place; the neighbour that differs in nothing else loads."""
    assert faults(good) == []
    found = faults(bad)
    assert code in [problem.code for problem in found]
    assert all(problem.line == 2 and problem.column > 0 for problem in found)


def test_the_number_of_paths_is_bounded() -> None:
    """256 paths of both lists together load, 257 do not."""
    paths = ", ".join(f"/p{n}" for n in range(255))
    assert faults(f"{{read_only: [{paths}], read_write: [/q]}}") == []
    (problem,) = faults(f"{{read_only: [{paths}], read_write: [/q, /r]}}")
    assert problem.code == "too_many_paths" and "257 > 256" in problem.message


@pytest.mark.parametrize(
    ("quiet", "loud", "code", "hint"),
    [
        (
            "{read_only: [/a], read_write: [/b]}",
            "{read_only: [/a], read_write: [/a]}",
            "path_in_both",
            "one of the two",
        ),
        (
            "{read_only: [/a], read_write: [/b]}",
            "{read_only: [/a/], read_write: [//a]}",
            "path_in_both",
            "one of the two",
        ),
        (
            "{read_only: [/a], read_write: [/ab]}",
            "{read_only: [/a], read_write: [/a/b]}",
            "path_writable_below",
            "remove",
        ),
        (
            "{read_only: [/ab], read_write: [/a]}",
            "{read_only: [/a/b], read_write: [/a]}",
            "path_not_read_only",
            "not the whole",
        ),
        (
            "{read_only: [/], read_write: [/a]}",
            "{read_only: [/b], read_write: [/b/./a]}",
            "path_writable_below",
            "remove",
        ),
        ("{read_only: [/data]}", "{read_only: ['/data/**']}", "path_literal", "name the directory"),
        ("{read_only: [/data]}", "{read_write: ['/$HOME/x']}", "path_literal", "write the path out"),
    ],
)
def test_paths_that_are_warned_of(quiet: str, loud: str, code: str, hint: str) -> None:
    """Rules only add rights: lists that read otherwise get a warning with a place; the tidy neighbour gets none."""
    assert warned(f"filesystem_policy: {quiet}") == []
    (warning,) = warned(f"filesystem_policy: {loud}")
    assert (warning.code, warning.line) == (code, 2) and warning.column > 1
    assert hint in warning.hint


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("hard-requirement", "`hard_requirement`"),
        ("HARD_REQUIREMENT", "`hard_requirement`"),
        ("hard_requirment", "`hard_requirement`"),
        ("required", "`hard_requirement`"),
        ("besteffort", "`best_effort`"),
        ("Best_Effort", "`best_effort`"),
        ("later", "known: best_effort, hard_requirement"),
    ],
)
def test_other_compatibilities_mean_best_effort(word: str, hint: str) -> None:
    """A word that is neither of the two is best effort, as upstream has it, and never without a warning."""
    (warning,) = warned(f"landlock: {{compatibility: {word}}}")
    assert warning.code == "landlock_compatibility" and "means best_effort" in warning.message
    assert hint in warning.hint and (warning.line, warning.column) == (2, 12)
    assert not parse(f"version: 1\nlandlock: {{compatibility: {word}}}\n").policy.landlock.hard_requirement  # type: ignore[union-attr]


@pytest.mark.parametrize(("word", "hard"), [("best_effort", False), ("hard_requirement", True), ('""', False)])
def test_the_two_compatibilities(word: str, hard: bool) -> None:
    """The two words, and the empty one, are taken as they are."""
    loaded = parse(f"version: 1\nlandlock: {{compatibility: {word}}}\n")
    assert loaded.warnings == () and loaded.policy.landlock is not None
    assert loaded.policy.landlock.hard_requirement is hard


def test_paths_are_normalised_and_said_once() -> None:
    """Separators and dots are noise: the model has each path once, in its shortest form, in the order written."""
    loaded = parse(
        "version: 1\nfilesystem_policy: {read_only: [//usr//lib/, /a/./b, /usr/lib, /], read_write: [/tmp/.]}\n"
    )
    section = loaded.policy.filesystem
    assert section is not None
    assert section.read_only == ("/usr/lib", "/a/b", "/") and section.read_write == ("/tmp",)
    assert normalise(loaded.policy) == loaded.policy


@given(st.text("/.ab", max_size=12).map("/".__add__).filter(lambda path: ".." not in path.split("/")))
def test_normal_paths_are_the_librarys(path: str) -> None:
    """Where no `..` is in it, a path comes to what POSIX says (but `//x`, which means nothing special on Linux)."""
    expected = posixpath.normpath(path)
    assert normal_path(path) == (expected[1:] if expected.startswith("//") else expected)
    assert normal_path(normal_path(path)) == normal_path(path)


def test_the_default_policy_is_tidy() -> None:
    """The policy that holds when nobody gave one is warned of in nothing."""
    assert warnings_of(default_policy()) == []
