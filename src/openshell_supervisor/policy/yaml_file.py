"""A policy file to a policy, or to all the reasons why not.

The one way from YAML into the house: bounded text, tree with positions, strict reading, checks, warnings, presets written
out. Whatever the input is, the outcome is a `LoadedPolicy` or a `PolicyError`.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from openshell_supervisor.errors import PolicyError, Problem
from openshell_supervisor.policy.document import MAX_DOCUMENT_BYTES, compose, refuse
from openshell_supervisor.policy.lint import warnings_of
from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.policy.normalise import normalise
from openshell_supervisor.policy.reader import read_policy
from openshell_supervisor.policy.reading import MAX_PROBLEMS, Reading
from openshell_supervisor.policy.validate import problems_of


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A usable policy with presets written out, what is odd about it, and where it came from."""

    policy: SandboxPolicy
    warnings: tuple[Problem, ...]
    source: str


def load(path: Path, *, files: bool = False) -> LoadedPolicy:
    """Read and parse a policy file; with `files`, one for --policy-rules (see `parse`).

    Raises `PolicyError`, also when the file cannot be read or is not a file.
    """
    source = str(path)
    try:
        data = _read(path)
    except (OSError, ValueError) as error:
        what = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        refuse(
            source, "policy_unreadable", f"the file cannot be read: {what}", hint="check the path and its permissions"
        )
    if data is None:
        refuse(source, "policy_unreadable", "it is not a regular file", hint="name the policy's YAML file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = Problem(
            "yaml_encoding", f"the file is not valid UTF-8 (byte {error.start})", "", line, hint="save it as UTF-8"
        )
        raise PolicyError((problem,), source=source) from None
    return parse(text, source, files=files)


def _read(path: Path) -> bytes | None:
    """The bytes of a regular file, one more than are allowed at most; None for anything that is not a regular file."""
    # O_NONBLOCK: a FIFO with no writer must be an error and not a hang.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        data = b""
        while len(data) <= MAX_DOCUMENT_BYTES and (piece := os.read(descriptor, MAX_DOCUMENT_BYTES + 1 - len(data))):
            data += piece
        return data
    finally:
        os.close(descriptor)


def parse(text: str, source: str = "", *, files: bool = False) -> LoadedPolicy:
    """The policy that a YAML text says. Raises `PolicyError` with every fault, each with line and column.

    With `files` request rules are checked as upstream's file loader does it (policy.md 5.1). Stricter than there: unknown keys, a
    missing `version`, identities, paths and contradicting endpoints are refused too.
    """
    root = compose(text, source)
    reading = Reading(files=files)
    policy = read_policy(root, reading)
    found = [
        *reading.problems,
        *not_caused_by(reading.problems, [reading.locate(item) for item in problems_of(policy, files=files)]),
    ]
    if found:
        found.sort(key=lambda problem: (problem.line, problem.column))
        raise PolicyError(tuple(found[:MAX_PROBLEMS]), source=source)
    warnings = [*reading.warnings, *(reading.locate(item) for item in warnings_of(policy))]
    warnings.sort(key=lambda problem: (problem.line, problem.column))
    return LoadedPolicy(normalise(policy), tuple(warnings[:MAX_PROBLEMS]), source)


_FOLLOWS_FROM_ABSENCE = frozenset(
    (
        "host_missing",
        "port_missing",
        "mcp_host",
        "mcp_port",
        "rules_missing",
        "rules_empty",
        "deny_needs_protocol",
        "deny_needs_base",
        "signing_service",
        "middleware_invalid",
        "tcp_host",
        "middleware_order",
    )
)


def not_caused_by(shape: list[Problem], meaning: list[Problem]) -> list[Problem]:
    """Leave out what only follows from a misread endpoint or section: `prots: 443` is one fault, not also a missing port."""
    roots = {_unit(problem.path) for problem in shape}
    return [item for item in meaning if item.code not in _FOLLOWS_FROM_ABSENCE or _unit(item.path) not in roots]


def _unit(path: str) -> str:
    """The endpoint, else the section, that a dotted path is in."""
    marker = path.find(".endpoints[")
    if marker >= 0:
        return path[: path.find("]", marker + len(".endpoints[")) + 1]
    return path.split(".", 1)[0].split("[", 1)[0] if not path.startswith("network_policies") else path
