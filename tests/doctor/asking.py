"""The doctor as a real process: one call runs it and answers its report as an object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema

TIMEOUT = 60.0
Wrap = Callable[[list[str]], list[str]]

CHECK_IDS = (
    "runtime.container", "runtime.orchestrator", "runtime.kernel", "runtime.machine", "runtime.users",
    "kernel.release", "kernel.landlock", "seccomp.outer", "seccomp.calls", "seccomp.filter", "seccomp.all_threads",
    "privileges.no_new_privs", "userns.create", "userns.limit", "netns.create", "netns.limit", "lsm.label", "mount.private",
    "nft.fence", "nft.log", "privileges.capabilities", "privileges.identity", "limits.open_files", "limits.core",
    "limits.address_space", "mounts.root", "mounts.proc", "mounts.run_directory", "cgroup.version", "cgroup.pids",
    "software.python", "software.libraries", "software.libseccomp", "software.openssl", "policy.file", "policy.layers",
)  # fmt: skip
# Those that are there only where there is something to say.
SOMETIMES = ("policy.gateway", "rehearsal")

_TEXT_OR_NONE = {"type": ["string", "null"]}
_RUNG = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rung", "works", "why", "step", "errno", "seconds"],
    "properties": {
        "rung": {"enum": ["veth", "loopback", "observed", "external"]},
        "works": {"type": "boolean"},
        "why": {"type": "string"},
        "step": _TEXT_OR_NONE,
        "errno": _TEXT_OR_NONE,
        "seconds": {"type": "number"},
    },
}
_CHOICE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["mode", "starts", "rung", "egress", "network", "refusal", "passed_over"],
    "properties": {
        "mode": {"enum": ["auto", "isolated", "host"]},
        "starts": {"type": "boolean"},
        "rung": _TEXT_OR_NONE,
        "egress": {"enum": ["enforce", "observe", None]},
        "network": _TEXT_OR_NONE,
        "refusal": _TEXT_OR_NONE,
        "passed_over": {"type": "array", "items": _RUNG},
    },
}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["version", "supervisor", "seconds", "checks", "rungs", "layers", "auto", "mode", "require"],
    "properties": {
        "version": {"const": 1},
        "supervisor": {"type": "string"},
        "seconds": {"type": "number"},
        "checks": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["id", "state", "severity", "summary", "hint", "facts"],
                "properties": {
                    "id": {"enum": [*CHECK_IDS, *SOMETIMES]},
                    "state": {"enum": ["ok", "warning", "failed", "info"]},
                    "severity": {"enum": ["none", "low", "medium", "high"]},
                    "summary": {"type": "string", "minLength": 1},
                    "hint": {"type": "string"},
                    "facts": {"type": "object"},
                },
            },
        },
        "rungs": {"type": "array", "items": _RUNG},
        "layers": {
            "type": "array",
            "items": {"type": "object", "required": ["layer", "state", "reason", "errno", "detail"]},
        },
        "auto": _CHOICE,
        "mode": _CHOICE,
        "require": {
            "type": "object",
            "additionalProperties": False,
            "required": ["layers", "met", "unmet"],
            "properties": {
                "layers": {"type": "array"},
                "met": {"type": "boolean"},
                "unmet": {"type": "array", "items": {"type": "object", "required": ["layer", "state", "reason"]}},
            },
        },
    },
}  # fmt: skip


@dataclass
class Answer:
    """What the doctor said."""

    code: int
    body: dict[str, Any]
    err: str

    def check(self, name: str) -> dict[str, Any]:
        """One check by its id."""
        return next(item for item in self.body["checks"] if item["id"] == name)

    def state(self, name: str) -> str:
        """The state of one check."""
        return str(self.check(name)["state"])

    def rung(self, name: str) -> dict[str, Any]:
        """One rehearsed rung."""
        return next(item for item in self.body["rungs"] if item["rung"] == name)

    def layers(self) -> dict[str, tuple[str, str | None]]:
        """State and errno of each layer."""
        return {item["layer"]: (item["state"], item["errno"]) for item in self.body["layers"]}


def command(*options: str) -> list[str]:
    """The command line of the doctor."""
    return [sys.executable, "-m", "openshell_supervisor", "doctor", *options]


def ask(*options: str, wrap: Wrap | None = None, env: dict[str, str] | None = None, timeout: float = TIMEOUT) -> Answer:
    """Run the doctor to its end, with `--json`; the answer is valid, or this fails."""
    line = command("--json", *options)
    done = subprocess.run(
        wrap(line) if wrap else line,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd="/",
        env={**os.environ, **(env or {})},
    )
    assert done.stdout.startswith("{"), f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    body = json.loads(done.stdout)
    jsonschema.validate(body, SCHEMA)
    return Answer(done.returncode, body, done.stderr)


def say(*options: str, env: dict[str, str] | None = None, argv: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run the doctor as a person does, output as text."""
    line = [*argv, *command(*options)]
    return subprocess.run(
        line,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        cwd="/",
        env={**os.environ, **(env or {})},
    )
