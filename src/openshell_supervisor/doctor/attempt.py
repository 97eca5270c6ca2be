"""Starts the process that tries things (`tries`), and gives what came of it as values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openshell_supervisor.enforcement import errno_name

# All tries take 60 ms together; a loaded machine with one core has been given a hundred times that.
TRIES_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a try. `text` is empty when it worked; `errno` is symbolic, None where no system call failed."""

    name: str
    errno: str | None
    text: str

    @property
    def worked(self) -> bool:
        """True when the host did what it was asked."""
        return not self.text

    def brief(self) -> str:
        """`name: EPERM` for one line."""
        return f"{self.name}: {self.errno or self.text}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one try. `lost` says how the process that tried was lost, None when it ended by itself."""

    steps: tuple[Step, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    lost: str | None = None

    @property
    def refused(self) -> Step | None:
        """The first step that the host refused."""
        return next((step for step in self.steps if not step.worked), None)

    @property
    def worked(self) -> bool:
        """True when something was tried and nothing of it was refused."""
        return bool(self.steps) and self.refused is None and self.lost is None

    def step(self, name: str) -> Step | None:
        """The step of that name, None where the try never came to it."""
        return next((step for step in self.steps if step.name == name), None)

    def why(self) -> str:
        """In a few words why it did not work; empty when it did."""
        return self.refused.brief() if self.refused else self.lost or ("" if self.steps else "it was not tried")


class Tries:
    """The process that tries, begun early so that it works on another core."""

    def __init__(self) -> None:
        argv = [sys.executable, "-I", "-B", "-m", "openshell_supervisor.doctor.tries"]
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd="/"
            )
        except OSError as error:
            self._process, self._failure = None, f"cannot start {argv[0]}: {os.strerror(error.errno or 0)}"

    def outcomes(self) -> dict[str, Outcome]:
        """Every try by name; blocks, for a thread. Where the process failed as a whole, every outcome says so."""
        if self._process is None:
            return _Lost(self._failure)
        try:
            text, _ = self._process.communicate(timeout=TRIES_SECONDS)
            found: dict[str, dict[str, Any]] = json.loads(text)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return _Lost(f"no end within {TRIES_SECONDS:g} s")
        except ValueError:
            return _Lost(f"it ended with status {self._process.returncode} and no answer")
        return {name: _outcome(item) for name, item in found.items()}


class _Lost(dict[str, Outcome]):
    """The outcomes of tries that never were: each is lost, for the same reason."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self._why = why

    def __missing__(self, name: str) -> Outcome:
        return Outcome(lost=self._why)


def _outcome(item: Mapping[str, Any]) -> Outcome:
    steps = tuple(Step(name, errno_name(number), text) for name, number, text in item["steps"])
    return Outcome(steps, item["facts"], item["lost"])
