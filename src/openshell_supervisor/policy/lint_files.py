"""What is legal and probably not meant in `filesystem_policy` and `landlock`. Pure: nobody looks at a disk here.

File rules only ever add rights: a path has what any rule on it or above it grants (landlock(7)). Half of these warnings are
about policies that read as if an inner rule could take something away.
"""

from __future__ import annotations

from collections.abc import Iterator

from openshell_supervisor.errors import Problem
from openshell_supervisor.policy.model import FilesystemPolicy, LandlockPolicy
from openshell_supervisor.policy.normalise import normal_path
from openshell_supervisor.policy.reading import nearest, shown

COMPATIBILITIES = ("best_effort", "hard_requirement")
_STRICT_WORDS = frozenset(("hard", "strict", "require", "required", "requirement", "enforce", "mandatory", "true"))
_NOT_EXPANDED = "*?$"


def file_warnings(section: FilesystemPolicy) -> Iterator[Problem]:
    """Paths that contradict each other, and paths with characters that a shell would have expanded."""
    lists = {"read_only": section.read_only, "read_write": section.read_write}
    for name, paths in lists.items():
        for index, path in enumerate(paths):
            yield from _literal(path, f"filesystem_policy.{name}[{index}]")
    for index, path in enumerate(section.read_write):
        yield from _writable_in_read_only(path, section.read_only, f"filesystem_policy.read_write[{index}]")
    for index, path in enumerate(section.read_only):
        yield from _read_only_in_writable(path, section.read_write, f"filesystem_policy.read_only[{index}]")


def _literal(path: str, where: str) -> Iterator[Problem]:
    found = next((char for char in _NOT_EXPANDED if char in path), "")
    if found:
        yield Problem(
            "path_literal",
            f"path '{shown(path)}' is taken literally: `{found}` has no meaning in it",
            where,
            hint="a directory covers all below it; name the directory" if found in "*?" else "write the path out",
        )


def _writable_in_read_only(path: str, read_only: tuple[str, ...], where: str) -> Iterator[Problem]:
    inner = normal_path(path)
    for other in read_only:
        outer = normal_path(other)
        if inner == outer:
            yield Problem(
                "path_in_both",
                f"path '{shown(path)}' is both read-only and read-write: it is writable",
                where,
                hint="remove it from one of the two lists",
            )
            return
        # Everything lies below `/`: there, naming what is writable is the whole point.
        if outer != "/" and inner.startswith(f"{outer}/"):
            yield Problem(
                "path_writable_below",
                f"read-write path '{shown(path)}' lies below read-only '{shown(other)}' and is writable",
                where,
                hint="that is how file rules work; remove it if all of the read-only path is to stay as it is",
            )
            return


def _read_only_in_writable(path: str, read_write: tuple[str, ...], where: str) -> Iterator[Problem]:
    inner = normal_path(path)
    for other in read_write:
        if inner.startswith(f"{normal_path(other)}/"):
            yield Problem(
                "path_not_read_only",
                f"read-only path '{shown(path)}' lies below read-write '{shown(other)}' and is writable: "
                "rules add rights, none takes away",
                where,
                hint="name the parts of the read-write path that are to be writable, and not the whole",
            )
            return


def landlock_warnings(section: LandlockPolicy) -> Iterator[Problem]:
    """A `compatibility` that is neither of the two words means best effort, also where it was meant to be strict."""
    word = section.compatibility
    if word in ("", *COMPATIBILITIES):
        return
    plain = word.strip().lower().replace("-", "_").replace(" ", "_")
    guess = "hard_requirement" if plain in _STRICT_WORDS else nearest(plain, COMPATIBILITIES)
    yield Problem(
        "landlock_compatibility",
        f"landlock.compatibility '{shown(word)}' means best_effort",
        "landlock.compatibility",
        hint=f"did you mean `{guess}`? It is compared exactly" if guess else f"known: {', '.join(COMPATIBILITIES)}",
    )
