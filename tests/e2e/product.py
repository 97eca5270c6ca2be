"""The product as a real process, for end-to-end tests: one call runs a workload and answers everything that came of it."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "telemetry"))
import schema

DENY_ALL = "version: 1\nnetwork_policies: {}\n"
TIMEOUT = 60.0
Wrap = Callable[[list[str]], list[str]]


@dataclass
class Ran:
    """What a run left: exit code, output, the statement (None when it never came to that), and the events as objects."""

    code: int
    out: str
    err: str
    statement: dict[str, Any] | None
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rung(self) -> str:
        """The rung in the statement."""
        assert self.statement is not None, self.err
        return str(self.statement["network_mode"]["rung"])

    def layer(self, name: str) -> dict[str, Any]:
        """One layer of the statement."""
        assert self.statement is not None, self.err
        return next(item for item in self.statement["layers"] if item["layer"] == name)

    def lines(self, prefix: str) -> list[str]:
        """The one-line events that begin with `prefix` (after the time and `OCSF `)."""
        return [line.split(" OCSF ", 1)[1] for line in self.err.splitlines() if f" OCSF {prefix}" in line]


def argv(
    directory: pathlib.Path,
    policy: str,
    command: Sequence[str],
    options: Sequence[str] = (),
    *,
    executable: str | None = None,
    records: bool = True,
) -> list[str]:
    """The command line of a run whose files all lie in `directory`; without `records`, no status and event files."""
    (directory / "policy.yaml").write_text(policy)
    base = [
        executable or sys.executable,
        "-m",
        "openshell_supervisor",
        "run",
        "--policy",
        str(directory / "policy.yaml"),
    ]
    if records:
        base += ["--status-file", str(directory / "status.json"), "--ocsf-file", str(directory / "events.jsonl")]
    return [*base, *options, "--", *command]


def run(
    command: Sequence[str],
    *,
    policy: str = DENY_ALL,
    options: Sequence[str] = (),
    wrap: Wrap | None = None,
    env: dict[str, str] | None = None,
    timeout: float = TIMEOUT,
    stdin: Any = subprocess.DEVNULL,
) -> Ran:
    """Run `command` inside the product to its end. `wrap` makes the host poorer (see hosts.py)."""
    with tempfile.TemporaryDirectory(prefix="oss-e2e-") as name:
        directory = pathlib.Path(name)
        directory.chmod(0o777)
        line = argv(directory, policy, command, options)
        done = subprocess.run(
            wrap(line) if wrap else line,
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, **(env or {})},
            cwd="/",
        )
        status, events = directory / "status.json", directory / "events.jsonl"
        if events.exists():
            schema.assert_all_valid(events)
        return Ran(
            done.returncode,
            done.stdout,
            done.stderr,
            json.loads(status.read_text()) if status.exists() else None,
            [json.loads(item) for item in events.read_text().splitlines()] if events.exists() else [],
        )
