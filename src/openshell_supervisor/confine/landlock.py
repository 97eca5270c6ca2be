"""Landlock rulesets: made here with the supervisor's rights, handed to the launcher as a descriptor, enforced there.

The paths are opened before the privileges are dropped, so a directory behind one that the workload may not enter can still be
allowed; access rights of files are never widened by that. A rule holds for the very object that was opened, under every name it
has, and for what lies beneath it there, mounts included; a path that appears later is not covered. Symbolic links are followed
when a path is opened. Everything that the kernel can mediate is handled, so what no rule names is refused. `build` returns what
was achieved: the rights that the kernel lacks and the paths that had to be left out.

This module knows no policy document (`confine.baseline` makes the lists) and makes no statement (`summary` words one).
"""

from __future__ import annotations

import contextlib
import errno as errno_module
import functools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NoReturn

from openshell_supervisor.confine import landlock_abi as kernel
from openshell_supervisor.confine.landlock_abi import Support, support
from openshell_supervisor.confine.named_paths import Found, find, led_astray
from openshell_supervisor.errors import ConfineError

__all__ = ["Rules", "Ruleset", "Skipped", "Support", "build", "detail", "summary", "support"]

REASON_WORDS = {
    errno_module.ENOENT: "path does not exist",
    errno_module.EACCES: "permission denied",
    errno_module.EPERM: "permission denied",
    errno_module.ELOOP: "too many symlink levels",
    errno_module.ENAMETOOLONG: "path name too long",
    errno_module.ENOTDIR: "path component is not a directory",
}
UNEXPECTED = "unexpected error"


@dataclass(frozen=True, slots=True)
class Rules:
    """What is to be allowed; everything else of the same kind is refused.

    read_only: execute, read, list. read_write: every right there is. Both empty: files are not restricted at all.
    connect_ports, bind_ports: TCP ports, () allows none, None leaves the network alone. scopes: no signals and no abstract
    Unix sockets to processes outside. hard: a path that cannot be had is an error instead of being skipped.
    """

    read_only: tuple[str, ...] = ()
    read_write: tuple[str, ...] = ()
    connect_ports: tuple[int, ...] | None = None
    bind_ports: tuple[int, ...] | None = None
    scopes: bool = True
    hard: bool = False

    @property
    def paths(self) -> int:
        """How many paths were asked for."""
        return len(self.read_only) + len(self.read_write)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A path without a rule: why, in the reference's words, the errno as a number, and whether it just does not exist."""

    path: str
    reason: str
    errno: int | None
    missing: bool


@dataclass(slots=True)
class Ruleset:
    """A ruleset in the kernel. `fd` is owned (close-on-exec; -1 once closed); the `handled_…` and `scopes` are the kernel's bit
    masks, `abi` is the one that was used and `kernel_abi` the one there is. `restrict_flags` belong to landlock_restrict_self.
    `missing_rights` names, in lower case, what was asked for and this ABI cannot mediate."""

    rules: Rules
    fd: int
    abi: int
    kernel_abi: int
    errata: int
    handled_fs: int
    handled_net: int
    scopes: int
    restrict_flags: int
    missing_rights: tuple[str, ...]
    applied: int = 0
    skipped: tuple[Skipped, ...] = ()

    def close(self) -> None:
        """Give the descriptor back; more than once does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Ruleset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def build(rules: Rules, *, limit_abi: int | None = None) -> Ruleset:
    """Make the ruleset with the best ABI that the kernel has and we know; `limit_abi` (1 or more) pretends an older kernel.

    Raises `ConfineError`: landlock_unavailable; landlock_path_unavailable (only `hard`: a path could not be opened);
    landlock_no_valid_paths (paths were asked for and none could be had: everything would be refused);
    landlock_build_failed (the kernel refused the ruleset or a port, or nothing was asked for that it can mediate).
    """
    found = support()
    if not found.abi:
        mode = " in hard_requirement mode" if rules.hard else ""
        raise ConfineError(
            f"Landlock unavailable{mode}: {found.reason}",
            code="landlock_unavailable",
            step="landlock_create_ruleset",
            errno=found.errno,
            hint=found.hint,
        )
    abi = min(found.abi, kernel.KNOWN_ABI, limit_abi or kernel.KNOWN_ABI)
    with contextlib.ExitStack() as undo:
        ruleset = _create(rules, found, abi)
        undo.callback(ruleset.close)
        _add_paths(ruleset)
        _add_ports(ruleset)
        undo.pop_all()
    return ruleset


def bare_domain() -> Ruleset | None:
    """A ruleset that refuses next to nothing (making block devices, which no workload may); None where Landlock is not to be had.

    What counts is the domain: from inside one, processes outside cannot be traced and their memory not be opened, whoever's they
    are (Documentation/userspace-api/landlock.rst, "Ptrace restrictions").
    """
    found = support()
    try:
        fd = kernel.create_ruleset(_mask(["MAKE_BLOCK"]), 0, 0) if found.abi else -1
    except OSError:
        return None
    return Ruleset(Rules(), fd, found.abi, found.abi, found.errata, 0, 0, 0, 0, ()) if fd >= 0 else None


def summary(ruleset: Ruleset) -> tuple[Literal["fully", "partly"], str]:
    """How much of what was asked for the ruleset holds, as a word and a sentence. Pure.

    "partly": the ABI lacks a right, or a path could not be opened. A path that does not exist is only counted.
    """
    rules, newer = ruleset.rules, ruleset.kernel_abi > ruleset.abi
    parts = [f"Landlock ABI {ruleset.abi}" + (f" (the kernel has {ruleset.kernel_abi})" if newer else "")]
    if rules.paths:
        parts.append(f"{ruleset.applied} of {rules.paths} paths allowed")
    if ruleset.handled_net & kernel.CONNECT_TCP:
        parts.append(f"TCP connect to {_ports(rules.connect_ports)}")
    if ruleset.handled_net & kernel.BIND_TCP:
        parts.append(f"TCP bind to {_ports(rules.bind_ports)}")
    if ruleset.scopes:
        parts.append("signals and abstract sockets stay inside")
    absent = sum(skipped.missing for skipped in ruleset.skipped)
    refused = [skipped for skipped in ruleset.skipped if not skipped.missing]
    if absent:
        parts.append(f"{absent} {'does' if absent == 1 else 'do'} not exist")
    if refused:
        parts.append("left out: " + ", ".join(f"{skipped.path} ({skipped.reason})" for skipped in refused))
    weaker = [name for name in ruleset.missing_rights if name != "refer"]
    if weaker:
        parts.append(f"this ABI does not mediate {', '.join(weaker)}")
    if "refer" in ruleset.missing_rights:
        # ABI 1 has no such right and refuses the act, always (landlock(7)).
        parts.append("files cannot move between directories")
    return "partly" if ruleset.missing_rights or refused else "fully", "; ".join(parts)


def detail(ruleset: Ruleset) -> dict[str, object]:
    """The evidence for a statement, as JSON types. Pure."""
    return {
        "abi": ruleset.abi,
        "kernel_abi": ruleset.kernel_abi,
        "errata": ruleset.errata,
        "read_only": len(ruleset.rules.read_only),
        "read_write": len(ruleset.rules.read_write),
        "rules_applied": ruleset.applied,
        "skipped": [{"path": skipped.path, "reason": skipped.reason} for skipped in ruleset.skipped],
        "missing_rights": list(ruleset.missing_rights),
    }


def terminal_rights(ruleset: Ruleset, *, writable: bool) -> tuple[int, int]:
    """The bit masks for the launcher's own rules: what is allowed in the directory of terminals, and on one of them. Pure."""
    rights = ruleset.handled_fs if writable else ruleset.handled_fs & _mask(kernel.READ_ONLY)
    return rights, rights & _mask(kernel.NOT_A_DIRECTORY)


def _ports(ports: tuple[int, ...] | None) -> str:
    return f"port {', '.join(map(str, ports))} only" if ports else "no port"


@functools.cache
def _values() -> Mapping[str, int]:
    """The bits of the file rights by name. The package is imported here, late: it takes 15 ms that a `--version` need not pay."""
    from landlock import FSAccess

    return {name: int(FSAccess[name]) for names in kernel.FILE_RIGHTS.values() for name in names}


def _mask(names: Iterable[str]) -> int:
    return sum(_values()[name] for name in names)


def _create(rules: Rules, found: Support, abi: int) -> Ruleset:
    """An empty ruleset that handles all that was asked for and `abi` has."""
    rights = [(since, name) for since, names in kernel.FILE_RIGHTS.items() for name in names if rules.paths]
    files = _mask(name for since, name in rights if since <= abi)
    net = (kernel.CONNECT_TCP if rules.connect_ports is not None else 0) | (
        kernel.BIND_TCP if rules.bind_ports is not None else 0
    )
    scopes = (kernel.SCOPE_ABSTRACT_UNIX_SOCKET | kernel.SCOPE_SIGNAL) if rules.scopes else 0
    missing = [name.lower() for since, name in rights if since > abi]
    if net and abi < kernel.NET_ABI:
        missing += [
            name for bit, name in ((kernel.BIND_TCP, "bind_tcp"), (kernel.CONNECT_TCP, "connect_tcp")) if net & bit
        ]
        net = 0
    if scopes and abi < kernel.SCOPE_ABI:
        missing += ["abstract_unix_socket", "signal"]
        scopes = 0
    try:
        fd = kernel.create_ruleset(files, net, scopes)
    except OSError as error:
        _failed("landlock_create_ruleset", error)
    flags = kernel.RESTRICT_LOG_NEW_EXEC_ON if abi >= kernel.LOG_ABI else 0
    return Ruleset(rules, fd, abi, found.abi, found.errata, files, net, scopes, flags, tuple(missing))


def _add_paths(ruleset: Ruleset) -> None:
    """One rule per path that can be had; the others are noted, or in hard mode raised.

    All are opened before the first is added: where a path may be led depends on which places are writable.
    """
    rules = ruleset.rules
    asked = [(path, False) for path in rules.read_only] + [(path, True) for path in rules.read_write]
    skipped: list[Skipped] = []
    with contextlib.ExitStack() as stack:
        found: list[tuple[str, bool, Found]] = []
        for path, writable in asked:
            with _leaving_out(path, rules, skipped):
                one = find(path)
                stack.callback(one.close)
                found.append((path, writable, one))
        places = [one.real for _, writable, one in found if writable and one.real != "/"]
        for path, writable, one in found:
            with _leaving_out(path, rules, skipped):
                _add_path(ruleset, one, writable, places)
                ruleset.applied += 1
    order = {path: index for index, (path, _) in enumerate(asked)}
    ruleset.skipped = tuple(sorted(skipped, key=lambda one: order[one.path]))
    if rules.paths and not ruleset.applied:
        raise ConfineError(
            f"Landlock: zero valid paths of {rules.paths}; refusing a ruleset that would deny every file",
            code="landlock_no_valid_paths",
            step="open",
            errno=skipped[0].errno,
            hint="name paths under filesystem_policy that exist in this image",
        )


@contextlib.contextmanager
def _leaving_out(path: str, rules: Rules, skipped: list[Skipped]) -> Iterator[None]:
    """A path that cannot be had is noted in `skipped`; in hard mode it is an error."""
    try:
        yield
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = REASON_WORDS.get(number, UNEXPECTED) if number else str(error)
        if rules.hard:
            _path_unavailable(path, reason, number, error)
        skipped.append(Skipped(path, reason, number, number == errno_module.ENOENT))


def _add_path(ruleset: Ruleset, found: Found, writable: bool, places: Sequence[str]) -> None:
    """Look at the very object that was opened (so no swap in between counts), mask the rights by its kind, add.

    Raises OSError, or ValueError for a path that a link in one of the writable `places` led out of it (a workload can plant links
    there, and must not choose by one what the next workload may reach), or that would make everything writable: under whatever
    name, as a symbolic link to / for example, which the policy's own check of its text cannot see. `ConfineError` when no path
    can be added at all.
    """
    rights = (ruleset.handled_fs if writable else _mask(kernel.READ_ONLY)) & ruleset.handled_fs
    place = led_astray(found, places)
    if place:
        raise ValueError(f"a link in the writable {place} leads to {found.real}")
    if not stat.S_ISDIR(found.status.st_mode):
        rights &= _mask(kernel.NOT_A_DIRECTORY)
    elif writable and os.path.samestat(found.status, os.stat("/")):
        raise ValueError("path is the root directory")
    try:
        kernel.add_path(ruleset.fd, found.descriptor, rights)
    except OSError as error:
        if error.errno in kernel.HINTS:  # not this path's fault: a filter around us forbids the call itself
            _failed("landlock_add_rule", error)
        raise


def _add_ports(ruleset: Ruleset) -> None:
    wanted = ((kernel.CONNECT_TCP, ruleset.rules.connect_ports), (kernel.BIND_TCP, ruleset.rules.bind_ports))
    for right, ports in wanted:
        for port in ports or ():
            if ruleset.handled_net & right:
                try:
                    kernel.add_port(ruleset.fd, port, right)
                except OSError as error:
                    _failed(f"landlock_add_rule(port {port})", error)


def _path_unavailable(path: str, reason: str, number: int | None, error: Exception) -> NoReturn:
    why = f": {os.strerror(number)}" if number else ""
    raise ConfineError(
        f"Landlock path unavailable in hard_requirement mode: {path} ({reason}){why}",
        code="landlock_path_unavailable",
        step="open",
        errno=number,
        hint="remove the path from filesystem_policy, provide it, or use landlock.compatibility: best_effort",
    ) from error


def _failed(step: str, error: OSError) -> NoReturn:
    nothing = error.errno == errno_module.ENOMSG
    hint = (
        "ask for paths, ports or scopes that this kernel's Landlock knows"
        if nothing
        else kernel.HINTS.get(error.errno or 0, "")
    )
    raise ConfineError(
        f"Landlock: {step} failed: {'there is nothing to restrict' if nothing else error.strerror}",
        code="landlock_build_failed",
        step=step,
        errno=error.errno,
        hint=hint,
    ) from error
