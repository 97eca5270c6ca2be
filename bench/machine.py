"""What the numbers were measured on: facts that change them, and none that name a person or a path."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("openshell-supervisor", "mitmproxy", "mitmproxy-rs", "cryptography", "regopy", "pyroute2", "h2")


def _field(path: str, name: str) -> str:
    """The value of the first `name: value` line of a /proc file, or ""."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def facts() -> dict[str, object]:
    """Processor, kernel, interpreter, versions, uid and the load average before the run."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_kib": _field("/proc/meminfo", "MemTotal").removesuffix(" kB"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
        "uid": os.getuid(),
        "load_average": list(os.getloadavg()),
        "packages": {package: _version(package) for package in PACKAGES},
    }
