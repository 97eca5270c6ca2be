"""The file system and the cgroup that a runtime has put around this process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from openshell_supervisor.doctor.checks import Check, Severity, failed, inconclusive, info, ok, warning
from openshell_supervisor.doctor.files import Files, Mount, mounts

PIDS_HINT = "--pids-limit 512 (Kubernetes: podPidsLimit of the kubelet)"
# The one file that the supervisor reads for OPENSHELL_REQUIRE_RUNTIME_PID_LIMIT: the root of a container's cgroup namespace.
PID_LIMIT_FILE = "/sys/fs/cgroup/pids.max"


def checks(
    files: Files, environment: Mapping[str, str], run_dir: Path | None = None, *, pid_limit_required: bool = False
) -> list[Check]:
    """Everything about mounts and the cgroup."""
    mounted = mounts(files)
    return [
        _root(mounted),
        _proc(mounted),
        _run_directory(environment, run_dir),
        _cgroup(mounted),
        _pids(files, mounted, required=pid_limit_required),
    ]


def at(mounted: list[Mount], point: str) -> Mount | None:
    """What is mounted at `point`: the last one there covers those before it."""
    return next((mount for mount in reversed(mounted) if mount.point == point), None)


def _root(mounted: list[Mount]) -> Check:
    root = at(mounted, "/")
    if root is None:
        return inconclusive("mounts.root", "/proc/self/mountinfo does not show the root", "mount /proc")
    mode = "read-only" if "ro" in root.options else "writable"
    return info("mounts.root", f"the root is {root.kind}, {mode}", type=root.kind, read_only=mode == "read-only")


def _proc(mounted: list[Mount]) -> Check:
    name = "mounts.proc"
    proc = at(mounted, "/proc")
    if proc is None:
        return failed(name, Severity.HIGH, "/proc is not mounted", "mount it: nothing can be verified without it")
    masked = sorted({mount.point for mount in mounted if mount.point.startswith("/proc/")})
    hidden = [option for option in proc.super_options.split(",") if option.startswith(("hidepid", "subset"))]
    facts: dict[str, object] = {"masked": masked, "options": hidden, "read_only": "ro" in proc.options}
    if "ro" in proc.options:
        hint = "mount it writable: the maps of a user namespace are written there"
        return warning(name, Severity.MEDIUM, "/proc is read-only", hint, **facts)
    if hidden:
        hint = (
            "mount it without hidepid and subset: the supervisor looks there for who else runs as the workload's user"
        )
        return warning(name, Severity.MEDIUM, f"/proc hides processes ({', '.join(hidden)})", hint, **facts)
    covered = f"{len(masked)} places in it are masked" if masked else "nothing in it is masked"
    return info(name, f"/proc is mounted, {covered}", **facts)


def _run_directory(environment: Mapping[str, str], chosen: Path | None) -> Check:
    """Where a run could have its directory, in the order in which it looks; tried with files that have no name."""
    tried = {str(path): _writable(path) for path in _run_directories(environment, chosen)}
    usable = [path for path, why in tried.items() if not why]
    if not usable:
        hint = "mount a tmpfs (--tmpfs /run/openshell; Kubernetes: an emptyDir) or name a directory with --run-dir"
        summary = "no directory for a run: " + "; ".join(f"{path}: {why}" for path, why in tried.items())
        return failed("mounts.run_directory", Severity.HIGH, summary, hint, tried=tried)
    return ok("mounts.run_directory", f"a run can have its directory in {usable[0]}", tried=tried)


def _run_directories(environment: Mapping[str, str], chosen: Path | None) -> list[Path]:
    """The candidates, in the order in which a run tries them (`rundir.create`)."""
    runtime = environment.get("XDG_RUNTIME_DIR")
    own = [Path(runtime, "openshell")] if runtime and os.geteuid() != 0 else []
    return [chosen] if chosen else [Path("/run/openshell"), *own, Path(tempfile.gettempdir())]


def _writable(path: Path) -> str:
    """Why no file can be made there, or in the directory where it would be made; empty when one can. Leaves nothing."""
    place = path if path.is_dir() else path.parent
    try:
        os.close(os.open(place, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except IsADirectoryError:  # a kernel or a file system that knows no O_TMPFILE (open(2))
        return "" if os.access(place, os.W_OK | os.X_OK) else "not writable"
    except OSError as error:
        if error.errno == 95 and os.access(place, os.W_OK | os.X_OK):  # EOPNOTSUPP: the file system cannot, we may
            return ""
        return error.strerror or str(error)
    return ""


def _cgroup(mounted: list[Mount]) -> Check:
    kinds = {mount.kind for mount in mounted if mount.kind in ("cgroup", "cgroup2")}
    version = {
        frozenset(("cgroup2",)): "v2",
        frozenset(("cgroup",)): "v1",
        frozenset(("cgroup", "cgroup2")): "hybrid",
    }.get(frozenset(kinds), "none")
    text = "no cgroup file system is mounted" if version == "none" else f"cgroup {version}"
    return info("cgroup.version", text, version=version)


def _pids(files: Files, mounted: list[Mount], *, required: bool) -> Check:
    name = "cgroup.pids"
    limits = {path: word for path in _pids_files(files, mounted) if (word := files.word(path)) is not None}
    numbers = {path: int(word) for path, word in limits.items() if word.isdigit()}
    facts: dict[str, object] = {"files": limits, "limit": min(numbers.values(), default=None)}
    if required and not (files.word(PID_LIMIT_FILE) or "").isdigit():
        summary = (
            f"OPENSHELL_REQUIRE_RUNTIME_PID_LIMIT is set, and {PID_LIMIT_FILE} holds no limit: a run refuses to start"
        )
        return failed(name, Severity.HIGH, summary, PIDS_HINT, **facts)
    if numbers:
        path = min(numbers, key=lambda one: numbers[one])
        return ok(name, f"at most {numbers[path]} processes ({path})", **facts)
    if limits or _in_the_root(files, mounted):
        return warning(name, Severity.LOW, "no limit on the number of processes", PIDS_HINT, **facts)
    return inconclusive(name, "no pids.max can be read here", f"mount the cgroup file system; {PIDS_HINT}", **facts)


def _pids_files(files: Files, mounted: list[Mount]) -> list[str]:
    """Where a limit may stand: in our cgroup and in every one above it that is visible here."""
    places = [
        place
        for own, point in _own_cgroups(files, mounted)
        for place in (own, *own.parents)
        if place.is_relative_to(point)
    ]
    return list(dict.fromkeys([PID_LIMIT_FILE, *(f"{place}/pids.max" for place in places)]))


def _in_the_root(files: Files, mounted: list[Mount]) -> bool:
    """Is one of our cgroups the hierarchy's root? It has processes and no limits (cgroups(7))."""
    return any(
        own == point and files.exists(f"{point}/cgroup.procs") and not files.exists(f"{point}/pids.max")
        for own, point in _own_cgroups(files, mounted)
    )


def _own_cgroups(files: Files, mounted: list[Mount]) -> list[tuple[Path, Path]]:
    """The directory of our cgroup and the mount point above it, for v2 and for the pids controller of v1."""
    found = []
    for line in files.lines("/proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for mount in mounted:
            unified = mount.kind == "cgroup2" and not controllers
            legacy = mount.kind == "cgroup" and "pids" in controllers.split(",")
            if unified or (legacy and "pids" in mount.super_options.split(",")):
                inside = path.removeprefix(mount.root.rstrip("/")) if path.startswith(mount.root) else path
                found.append((Path(mount.point, inside.lstrip("/")), Path(mount.point)))
    return found
