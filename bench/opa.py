"""Decisions by an Open Policy Agent: a real server on a Unix socket, and the product's engine that asks it, as `--opa-url` does.

The server is the one that scripts/opa builds for the tests; nothing is built here. Questions are put one after the other, each
with `await generation.prepare(facts)` before `decide`, as the proxy does. The connection to the server is made before each sample
and closed after it, so that no check of its health is left half done while another contender is measured.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench.measure import BenchError, Sample
from bench.processes import Child
from bench.questions import DISTINCT, Questions, allowed, policy_of

if TYPE_CHECKING:
    from openshell_supervisor.verdict.facts import Facts

PINNED = Path(__file__).parent.parent / "tests" / "verdict" / "opa"
START_TIMEOUT_S = 20.0
WARM_UP = 16
"""Questions before an uncached sample: the server compiles the module that it was just given with the first."""


def program() -> Path | None:
    """The server of the pinned version in the cache of scripts/opa, or None where it was not built."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    usual = Path("/var/cache") if os.getuid() == 0 else home
    cache = Path(os.environ.get("OSS_E2E_CACHE") or usual / "oss-e2e")
    pinned = (PINNED / "go.mod").read_bytes() + (PINNED / "go.sum").read_bytes()
    found = cache / "opa" / f"opa-{hashlib.sha256(pinned).hexdigest()[:12]}"
    return found if os.access(found, os.X_OK) else None


@contextmanager
def server(executable: Path) -> Iterator[str]:
    """The URL of a running server. Raises `BenchError` where it does not come up."""
    with tempfile.TemporaryDirectory(prefix="bench-opa-") as directory:
        path = Path(directory) / "opa.sock"
        options = ["run", "--server", "--skip-version-check", "--log-level=error", "--addr", f"unix://{path}"]
        child = Child([str(executable), *options], log=Path(directory) / "opa.log", talks=False)
        try:
            _wait(child, path)
            yield f"unix:{path}"
        finally:
            child.stop()


def _wait(child: Child, path: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                if child.process.poll() is not None or time.monotonic() > end:
                    raise BenchError(f"OPA does not listen; {child.last_words()}") from None
            else:
                return
        time.sleep(0.02)


class OpaDecider:
    """One policy generation whose engine is the server at `url`. All deciders of a run share its `runner`."""

    def __init__(self, size: int, url: str, runner: asyncio.Runner) -> None:
        from openshell_supervisor.verdict.decide import build_generation, decide
        from openshell_supervisor.verdict.engines.opa_client import opa_address
        from openshell_supervisor.verdict.engines.opa_server import OpaServerEngine

        self._decide = decide
        self._runner = runner
        self._engine = OpaServerEngine(opa_address(url))
        self._generation = build_generation(policy_of(size), 1, engine=self._engine)
        self._questions = Questions(size)

    async def _ask(self, question: Facts) -> None:
        await self._generation.prepare(question)
        allowed(self._decide(question, self._generation))

    async def _sample(self, warm_up: int, calls: int, cached: bool) -> Sample:
        async with self._engine:
            for _ in range(warm_up):
                await self._ask(self._questions.new())
            questions = self._questions.again(calls) if cached else [self._questions.new() for _ in range(calls)]
            begin, worked = time.perf_counter(), time.thread_time()
            for question in questions:
                await self._ask(question)
            elapsed, work = time.perf_counter() - begin, time.thread_time() - worked
        return {"elapsed": elapsed / calls * 1e6, "work": work / calls * 1e6}

    def uncached(self, calls: int) -> Sample:
        """Microseconds of one decision, each asked for the first time: on the clock, since most of it is waiting."""
        sample = self._runner.run(self._sample(WARM_UP, calls, cached=False))
        return {"us": sample["elapsed"], "here": sample["work"]}

    def cached(self, calls: int) -> Sample:
        """Microseconds of one decision out of 32 that were all asked before: processor time, since it waits for nothing."""
        sample = self._runner.run(self._sample(DISTINCT, calls, cached=True))
        return {"us": sample["work"]}
