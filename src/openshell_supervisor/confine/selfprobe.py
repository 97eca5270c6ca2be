"""The self-probe: what a twin of the confined launcher must not be able to do, tried before the workload's first instruction.

One forbidden thing per layer at least, each chosen so that it would succeed, or fail in another way, if the layer were not
there: a refusal that would have come anyway proves nothing. `tries` says what, `judge` reads the twin's answers; the trying is
the launcher's. Only a layer without a breach may be called enforced.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openshell_supervisor.enforcement import Layer, errno_name

CANARY = "self-probe"
# Where a world-writable file may stand for a moment when the run directory lies inside the writable paths; the first that does
# not, and that exists, is taken.
CANARY_DIRECTORIES = ("/var/tmp", "/run/lock", "/dev/shm", "/tmp")


@dataclass(frozen=True, slots=True)
class Try:
    """One attempt: the layer it belongs to, its name, what the launcher is told, and the errno that
    shows the layer (None: any failure does)."""

    layer: Layer
    name: str
    request: Mapping[str, Any]
    expect: int | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What the twin saw of one layer: each attempt with its outcome, and those that went through."""

    tried: Mapping[str, str]
    breaches: tuple[str, ...]

    def detail(self) -> dict[str, object]:
        """The evidence for a statement."""
        return {"probed": bool(self.tried), "tried": dict(self.tried)}


NOTHING = Seen({}, ())


def judge(tries: Sequence[Try], answers: Iterable[Mapping[str, Any]]) -> dict[Layer, Seen]:
    """Per layer what was tried; a breach is an attempt that succeeded, or failed otherwise than the layer would make it."""
    seen: dict[Layer, Seen] = {}
    for one, answer in zip(tries, answers, strict=True):
        before = seen.get(one.layer, NOTHING)
        number, killed = answer["errno"], answer.get("killed", False)
        outcome = "killed by an outer filter" if killed else errno_name(number) or "succeeded"
        held = killed or (number is not None and one.expect in (None, number))
        breaches = before.breaches if held else (*before.breaches, f"{one.name}: {outcome}")
        seen[one.layer] = Seen({**before.tried, one.name: outcome}, breaches)
    return seen


def files(paths: tuple[Sequence[str], Sequence[str]], run_directory: Path) -> tuple[list[Try], Path | None]:
    """Attempts outside of the file rules `(read only, read and write)`, and a canary file to be removed afterwards (or None).

    Reading the root directory, where no rule covers it; and writing a file that everybody may write, beside the writable
    paths. Both succeed for every user where no file rules hold.
    """
    read_only, read_write = ({os.path.realpath(path) for path in some} for some in paths)
    attempts = []
    if not _covers("/", read_only | read_write) and os.stat("/").st_mode & 0o005 == 0o005:
        request = {"kind": "open", "path": "/", "flags": os.O_RDONLY | os.O_DIRECTORY}
        attempts.append(Try(Layer.FILESYSTEM, "read the directory /", request))
    for directory in (run_directory, *map(Path, CANARY_DIRECTORIES)):
        canary = None if _covers(str(directory), read_write) else _canary(directory)
        if canary is not None:
            request = {"kind": "open", "path": str(canary), "flags": os.O_WRONLY}
            attempts.append(Try(Layer.FILESYSTEM, f"write a file in {directory}", request))
            return attempts, canary
    return attempts, None


def _covers(path: str, rules: Iterable[str]) -> bool:
    """Does one of these rules allow something on `path` or above it?"""
    real = os.path.realpath(path)
    return any(rule in ("/", real) or real.startswith(f"{rule}/") for rule in rules)


def _canary(directory: Path) -> Path | None:
    """A file that every user may write, made anew; None where this directory cannot have one."""
    path = directory / f".{CANARY}-{os.getpid()}"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        os.fchmod(descriptor, 0o666)
    finally:
        os.close(descriptor)
    return path


def signals(supervisor: int) -> Try:
    """A signal to the supervisor, which the ruleset's scope refuses (landlock(7), LANDLOCK_SCOPE_SIGNAL). Nothing is sent."""
    return Try(Layer.FILESYSTEM, "signal the supervisor", {"kind": "signal", "pid": supervisor})


def privileges() -> Try:
    """Taking uid 0 again."""
    return Try(Layer.PRIVILEGES, "take uid 0", {"kind": "root"})


def system_calls(calls: Iterable[Mapping[str, Any]]) -> list[Try]:
    """Refused system calls `{name, number, args, expect}`, each with the errno that only the filter gives it."""
    return [
        Try(
            Layer.SYSCALLS,
            str(call["name"]),
            {"kind": "syscall", "number": call["number"], "args": call["args"]},
            call["expect"],
        )
        for call in calls
    ]
