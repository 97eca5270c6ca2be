"""The cell that an attacker is put in: users, policies, a field to fight over, and how a start that was refused looks."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import arena
import product
import pytest

import hosts

PROGRAM = pathlib.Path(__file__).resolve().parent / "confined.py"
Wrap = Callable[[list[str]], list[str]]
# What the attacker's own interpreter needs, wherever it is installed.
OWN = sorted({str(PROGRAM.parent), sys.prefix, sys.base_prefix})


def own(argv: list[str]) -> list[str]:
    """As a plain user: supervisor and workload are the same one."""
    return hosts.unprivileged(argv, uid=arena.UID)


def other(argv: list[str]) -> list[str]:
    """As root, whose workload is another user."""
    return argv


USERS = [pytest.param(own, id="own"), pytest.param(other, id="other", marks=pytest.mark.root)]


def policy(read_only: Sequence[object] = (), read_write: Sequence[object] = (), *, hard: bool = False) -> str:
    """Nothing of the network, these paths, and the attacker's user where root starts it."""
    lines = ["version: 1", "network_policies: {}", "filesystem_policy:", "  include_workdir: false"]
    for name, paths in (("read_only", ["/usr", "/etc", *OWN, *read_only]), ("read_write", read_write)):
        lines.append(f"  {name}: {json.dumps([str(path) for path in paths])}")
    if os.geteuid() == 0:
        lines.append(f"process: {{run_as_user: '{arena.UID}', run_as_group: '{arena.UID}'}}")
    if hard:
        lines.append("landlock: {compatibility: hard_requirement}")
    return "\n".join(lines) + "\n"


def lay_out(path: pathlib.Path) -> None:
    """What `confined.around_the_file_rules` expects, anew."""
    for name in ("hidden", "readable", "writable"):
        shutil.rmtree(path / name, ignore_errors=True)
        (path / name).mkdir()
        for file in ("f", "moves", "goes"):
            (path / name / file).write_text("secret")
    if os.geteuid() == 0:
        for one in (path, *path.rglob("*")):
            os.chown(one, arena.UID, arena.UID)
    path.chmod(0o755)


def attacker(files: pathlib.Path | None = None, victim: int | None = None) -> list[str]:
    """The attacker's command line."""
    order = {"files": str(files) if files else None, "victim": victim}
    return [sys.executable, "-I", str(PROGRAM), json.dumps(order)]


def outside(command: list[str]) -> dict[str, str]:
    """What the same user sees without a sandbox."""
    done = hosts.run(own(command))
    assert done.returncode == 0, done.stderr
    seen: dict[str, str] = json.loads(done.stdout)
    return seen


def inside(ran: product.Ran) -> dict[str, str]:
    """What it saw in the sandbox."""
    assert ran.code == 0, ran.err
    seen: dict[str, str] = json.loads(ran.out)
    return seen


def refused_to_start(ran: product.Ran) -> None:
    """Nothing ran, and a person is told why in words."""
    assert "STARTED" not in ran.out
    assert ran.code != 0
    assert "Traceback" not in ran.err
    assert "hint:" in ran.err


@contextmanager
def field_of_battle() -> Iterator[pathlib.Path]:
    """A directory of the attacker's, not beneath a place that everybody may write, with hidden/, readable/ and writable/."""
    base = pathlib.Path("/var" if os.geteuid() == 0 else os.environ.get("HOME", "/"))
    if not os.access(base, os.W_OK) or base == pathlib.Path("/tmp"):
        pytest.skip(f"needs a directory that can be written outside of /tmp: {base} is none")
    path = pathlib.Path(tempfile.mkdtemp(prefix="oss-field-", dir=base))
    try:
        lay_out(path)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
