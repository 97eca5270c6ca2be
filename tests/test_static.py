"""Lint, format and types, as tests, so that the suite's one summary line is honest about them too. They run first."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

TIMEOUT = 300.0  # mypy without a cache takes half a minute on two slow cores


def check(root: pathlib.Path, *command: str) -> None:
    """Run one tool of the environment over the checkout; what it prints is the failure's text."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)


def test_lint(repo_root: pathlib.Path) -> None:
    """ruff finds nothing."""
    check(repo_root, "ruff", "check", "--quiet", "--no-cache", ".")


def test_format(repo_root: pathlib.Path) -> None:
    """Every file is as ruff would format it."""
    check(repo_root, "ruff", "format", "--check", "--quiet", "--no-cache", ".")


@pytest.mark.timeout(TIMEOUT)
def test_types(repo_root: pathlib.Path) -> None:
    """mypy, strict, finds nothing."""
    writable = os.access(repo_root, os.W_OK)  # not so for an unprivileged user in somebody else's checkout
    check(repo_root, "mypy", *([] if writable else ["--cache-dir=/dev/null"]))
