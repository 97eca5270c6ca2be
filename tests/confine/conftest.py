"""Children that restrict themselves with the real kernel and try things, and the files that they try them on."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest

from openshell_supervisor.confine import landlock

TRIES = pathlib.Path(__file__).with_name("landlock_tries.py")
# What the children's own Python, and the program that they execute, read: libraries, and time zones and the like.
SYSTEM = ("/usr", "/lib", "/lib64", "/etc", "/proc")


@pytest.fixture
def landlock_try() -> Callable[..., list[str]]:
    """`landlock_try(ruleset, (name, argument…), …, uid=None, nnp=True)`: one child becomes `uid`, enforces the ruleset (None:
    no ruleset) and tries; answers "ok" or an errno's name for each, in order (landlock_tries.py has the names)."""

    def run(
        ruleset: landlock.Ruleset | None,
        *tries: Sequence[object],
        uid: int | None = None,
        nnp: bool = True,
        wrap: Sequence[str] = (),
    ) -> list[str]:
        fd, flags = (ruleset.fd, ruleset.restrict_flags) if ruleset else (-1, 0)
        request = {"fd": fd, "flags": flags, "uid": uid, "nnp": nnp, "tries": tries}
        done = subprocess.run(
            [*wrap, sys.executable, "-I", "-S", str(TRIES)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            pass_fds=[fd] if ruleset else [],
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [str(answer) for answer in json.loads(done.stdout)]

    return run


def _zone(path: pathlib.Path) -> None:
    """One of everything that a try needs; each try has its own, so that they do not disturb one another."""
    for name in (".", "full", "empty", "other"):
        (path / name).mkdir(parents=True, exist_ok=True)
    for name in ("file", "victim", "full/moved", "full/renamed"):
        (path / name).write_text("x")
    shutil.copy("/bin/true", path / "run")


@pytest.fixture
def landlock_zones(open_tmp: pathlib.Path) -> Callable[..., pathlib.Path]:
    """`landlock_zones(uid=None)`: a new directory with the same files in `ro`, `rw` and `out`, all of them owned by `uid`."""

    def make(uid: int | None = None) -> pathlib.Path:
        root = open_tmp / f"zones{len(list(open_tmp.iterdir()))}"
        for name in ("ro", "rw", "out"):
            _zone(root / name)
        if uid is not None:
            for path in (root, *root.rglob("*")):
                os.chown(path, uid, uid)
        return root

    return make


@pytest.fixture
def landlock_rules() -> Callable[..., landlock.Rules]:
    """`landlock_rules(root, **more)`: `root/ro` and the system read-only, `root/rw` read-write; `more` are fields of Rules."""

    def make(root: pathlib.Path, **more: object) -> landlock.Rules:
        read_only = (*(path for path in SYSTEM if os.path.exists(path)), str(root / "ro"))
        return landlock.Rules(read_only, (str(root / "rw"), "/dev/null"), **more)  # type: ignore[arg-type]

    return make
