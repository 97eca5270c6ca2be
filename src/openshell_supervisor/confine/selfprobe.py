"""The self-probe: what a twin of the confined launcher must not be able to do, tried before the workload's first instruction.

One forbidden thing per layer at least, each chosen so that it would succeed, or fail in another way, if the layer were not
there: a refusal that would have come anyway proves nothing. Where that depends on the host, the launcher tries the same before
the layer is there, as a control. `judge` reads the answers; the trying is the launcher's. Only a layer with evidence and
without a breach may be called enforced.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
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
    """What the twin saw of one layer: each attempt with its outcome, those that went through, and how many refusals are
    evidence, because the same attempt was possible before the layer was there."""

    tried: Mapping[str, str]
    breaches: tuple[str, ...]
    evidence: int = 0

    def detail(self) -> dict[str, object]:
        """The evidence for a statement."""
        return {"probed": bool(self.evidence), "tried": dict(self.tried)}


NOTHING = Seen({}, ())


def controls(tries: Iterable[Try]) -> list[Try]:
    """Those whose refusal depends on the host as well: owners, modes, users. The others were chosen so that it does not."""
    return [one for one in tries if one.layer is Layer.FILESYSTEM]


def judge(
    tries: Sequence[Try], answers: Iterable[Mapping[str, Any]], controlled: Sequence[int | None]
) -> dict[Layer, Seen]:
    """Per layer what was tried; a breach is an attempt that succeeded, or failed otherwise than the layer would make it.

    `controlled` has one answer for each of `controls(tries)`: None where it succeeded before the layer was there, else the errno.
    """
    seen: dict[Layer, Seen] = {}
    before_layer = dict(zip((one.name for one in controls(tries)), controlled, strict=True))
    for one, answer in zip(tries, answers, strict=True):
        before = seen.get(one.layer, NOTHING)
        number, killed = answer["errno"], answer.get("killed", False)
        outcome = "killed by an outer filter" if killed else errno_name(number) or "succeeded"
        held = killed or (number is not None and one.expect in (None, number))
        breaches = before.breaches if held else (*before.breaches, f"{one.name}: {outcome}")
        anyway = before_layer.get(one.name)
        if anyway is not None:
            outcome += f", no evidence: {errno_name(anyway)} without the layer too"
        evidence = before.evidence + (held and anyway is None)
        seen[one.layer] = Seen({**before.tried, one.name: outcome}, breaches, evidence)
    return seen


def files(paths: tuple[Sequence[str], Sequence[str]], run_directory: Path) -> tuple[list[Try], Path | None]:
    """Attempts outside of the file rules `(read only, read and write)`, and where a `canary` is to be while they are made (or
    None).

    Reading the root directory, where no rule covers it; and writing a file that everybody may write, beside the writable
    paths. Both succeed for every user where no file rules hold.
    """
    read_only, read_write = ({_inode(Path(path)) for path in some} - {None} for some in paths)
    attempts = []
    if not _covers("/", read_only | read_write) and os.stat("/").st_mode & 0o005 == 0o005:
        request = {"kind": "open", "path": "/", "flags": os.O_RDONLY | os.O_DIRECTORY}
        attempts.append(Try(Layer.FILESYSTEM, "read the directory /", request))
    for directory in (run_directory, *map(Path, CANARY_DIRECTORIES)):
        path = directory / f".{CANARY}-{secrets.token_hex(8)}"
        if not _covers(str(directory), read_write) and _possible(path):
            request = {"kind": "open", "path": str(path), "flags": os.O_WRONLY}
            attempts.append(Try(Layer.FILESYSTEM, f"write a file in {directory}", request))
            return attempts, path
    return attempts, None


def _covers(path: str, rules: Set[tuple[int, int] | None]) -> bool:
    """Does one of these rules allow something on `path` or above it? By inode: a mount may show a directory twice."""
    place = Path(os.path.realpath(path))
    return any(_inode(one) in rules for one in (place, *place.parents))


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def canary(path: Path | None) -> Iterator[None]:
    """A new file that every user may write stands at `path` for a moment. Raises OSError."""
    if path is None:
        yield
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o666)
        yield
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _possible(path: Path) -> bool:
    try:
        with canary(path):
            return True
    except OSError:
        return False


def signals(supervisor: int) -> Try:
    """A signal to the supervisor, which the ruleset's scope refuses (landlock(7), LANDLOCK_SCOPE_SIGNAL). Nothing is sent."""
    return Try(Layer.FILESYSTEM, "signal the supervisor", {"kind": "signal", "pid": supervisor})


def privileges() -> Try:
    """Taking uid 0 again."""
    return Try(Layer.PRIVILEGES, "take uid 0", {"kind": "root"})


def sockets(paths: Iterable[str]) -> list[Try]:
    """Sockets that programs outside have bound: none of them may be in reach."""
    return [Try(Layer.NETWORK, path, {"kind": "socket", "path": path}) for path in paths]


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
