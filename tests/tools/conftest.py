"""The worlds: each is lived once in a session, with those of its rows that were selected, and answers for all of them."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

import pytest
import workshop

OUTSIDE = "/var/tmp"  # in no rule of the default policy, nor of the baseline; everybody may write there


@pytest.fixture(scope="session")
def outside() -> Iterator[pathlib.Path]:
    """A directory that everybody may read and run programs from, were it not for the file rules."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="oss-tools-", dir=OUTSIDE))
    shutil.copy("/bin/true", path / "program")
    (path / "file").write_text("text\n")
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest, outside: pathlib.Path) -> Iterator[Callable[[str], workshop.Lived]]:
    """`world(name)` answers what came of it; the first call runs it."""
    lived: dict[str, workshop.Lived] = {}
    made: list[pathlib.Path] = []

    def live(name: str) -> workshop.Lived:
        if name not in lived:
            made.append(pathlib.Path(tempfile.mkdtemp(prefix="oss-tools-")))
            made[-1].chmod(0o777)
            rows = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            tools = [row["tool"] for row in rows if row.get("place") == name and "tool" in row]
            wanted = [tool for tool in tools if not workshop.missing(tool, name)]
            lived[name] = workshop.live(name, wanted, made[-1], outside)
        return lived[name]

    yield live
    for path in made:
        shutil.rmtree(path, ignore_errors=True)
