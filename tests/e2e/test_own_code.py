"""A plain user whose own files are the supervisor's code: it is all loaded before the workload, and everything still works."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys

import pytest

import hosts


@pytest.mark.root
def test_the_demo_passes_for_a_user_who_owns_the_code(open_tmp: pathlib.Path, repo_root: pathlib.Path) -> None:
    """TLS termination, verdicts and denials come out the same when nothing can be imported any more, and the rung is enforced."""
    home = open_tmp / "home"
    for name in ("src", "examples"):
        shutil.copytree(repo_root / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (home, *home.rglob("*")):
        os.chown(path, hosts.THROWAWAY_UID, hosts.THROWAWAY_UID)
    argv = [sys.executable, str(home / "examples" / "demo.py")]
    environment = {**os.environ, "PYTHONPATH": str(home / "src"), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    done = hosts.run(hosts.unprivileged(argv, home=home), timeout=90, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ImportError" not in done.stderr
