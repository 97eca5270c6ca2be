"""Fixtures every test may use, the `root` and `podman` markers, and CI's rule that nothing is skipped in silence.

With CI=true in the environment a skip is a failure unless its reason matches a line of tests/allowed_skips.txt: a test
that this machine could have run must run.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # so that `import hosts` works from every directory below

import hosts

ROOT = pathlib.Path(__file__).resolve().parent.parent
ALLOWED_SKIPS = pathlib.Path(__file__).parent / "allowed_skips.txt"


@pytest.fixture(scope="session")
def repo_root() -> pathlib.Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """The directory `shared` beside the checkout, with the references and case files; without it, skipped."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the directory shared beside the checkout ({path})")
    return path


@pytest.fixture
def open_tmp() -> Iterator[pathlib.Path]:
    """A temporary directory that every user may read and enter (pytest's own are 0700), removed afterwards."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="oss-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def unprivileged_home(open_tmp: pathlib.Path) -> pathlib.Path:
    """A home directory that the unprivileged user of `hosts.unprivileged` owns."""
    home = open_tmp / "home"
    home.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(home, hosts.THROWAWAY_UID, hosts.THROWAWAY_UID)
    return home


@pytest.fixture
def unprivileged(unprivileged_home: pathlib.Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`unprivileged(argv, timeout=…, env=…)` runs a command to its end as the throw-away user, in a home of its own."""

    def run(argv: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
        settings: dict[str, object] = {"cwd": unprivileged_home} | options
        return hosts.run(hosts.unprivileged(argv, home=unprivileged_home), **settings)  # type: ignore[arg-type]

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quickest answers first; and skip tests marked `root` where this process is not that, saying what is missing."""
    items.sort(key=lambda item: _rank(item.path))
    missing = hosts.missing_for_root_tests()
    for item in items:
        if missing and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason=missing))


def _rank(path: pathlib.Path) -> int:
    """Lint, format and types come before the tests of the rooms, whole containers after them."""
    if path.name == "test_static.py":
        return 0
    return 2 if "e2e" in path.relative_to(ROOT).parts else 1


def _allowed(reason: str) -> bool:
    """True when a line covers this reason: `any: REGEX`, or `user: REGEX` which counts only for a non-root run."""
    for line in ALLOWED_SKIPS.read_text().splitlines():
        who, _, pattern = line.partition(":")
        if line.startswith("#") or not pattern.strip() or (who == "user" and os.geteuid() == 0):
            continue
        if re.search(pattern.strip(), reason):
            return True
    return False


def _refuse_silent_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") != "true" or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not _allowed(reason):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, and {ALLOWED_SKIPS.name} does not allow it: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip that CI does not expect into a failure."""
    report = yield
    _refuse_silent_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole module that skips itself while it is collected."""
    report = yield
    _refuse_silent_skip(report)
    return report
