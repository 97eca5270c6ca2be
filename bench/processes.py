"""Children of the bench: started with a clean environment, spoken to in lines with a deadline, ended by pid.

Nothing here knows what is measured.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.measure import BenchError

STOP_GRACE_S = 8.0
MARK = "@bench "


class Child:
    """A child with a pipe on standard input, its standard error in a file, and its standard output in a pipe that is
    read line by line or, for `talks=False`, in the same file: a pipe that nobody reads would stop it one day."""

    def __init__(
        self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, talks: bool = True
    ) -> None:
        self.log = log
        self.spawned = time.monotonic()
        with log.open("wb") as errors:
            try:
                self.process = subprocess.Popen(
                    argv,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if talks else errors,
                    stderr=errors,
                    env={**clean_environment(), **(env or {})},
                    bufsize=0,
                )
            except OSError as error:
                raise BenchError(f"{argv[0]} cannot be started: {error}") from error
        self._rest = b""

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def line(self, timeout: float) -> str:
        """The next line of standard output without its end; `BenchError` on end of file or after `timeout` seconds."""
        assert self.process.stdout is not None
        end = time.monotonic() + timeout
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                raise BenchError(f"{'end of output' if ready else f'no line in {timeout:.0f} s'}; {self.last_words()}")
            self._rest += data
        first, _, self._rest = self._rest.partition(b"\n")
        return first.decode(errors="replace")

    def answer(self, timeout: float) -> dict[str, Any]:
        """The next marked answer of a load generator; other lines are not ours and are passed over."""
        while True:
            line = self.line(timeout)
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                if "error" in answer:
                    raise BenchError(f"{answer['error']}; {self.last_words()}")
                return answer

    def order(self, order: Mapping[str, object], timeout: float) -> dict[str, Any]:
        """Send one order to a load generator and wait for its answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
        except OSError as error:
            raise BenchError(f"the load generator is gone ({error}); {self.last_words()}") from error
        return self.answer(timeout)

    def ended(self, timeout: float) -> float:
        """Wait for the end; seconds since the spawn. `BenchError` when it fails or takes longer than `timeout`."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            raise BenchError(f"still running after {timeout:.0f} s; {self.last_words()}") from None
        took = time.monotonic() - self.spawned
        if self.stop() != 0:
            raise BenchError(f"ended with {self.process.returncode}; {self.last_words()}")
        return took

    def last_words(self) -> str:
        """The end of standard error, in one line, for a message."""
        return " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-3:])[-600:] or "stderr empty"

    def stop(self) -> int:
        """Close the pipes, TERM, wait, KILL; returns the exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(STOP_GRACE_S)
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()


def clean_environment() -> dict[str, str]:
    """What a child needs and nothing that would change a measurement (no proxy or Python variables)."""
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": os.environ.get("HOME", "/"), "LANG": "C.UTF-8"}
