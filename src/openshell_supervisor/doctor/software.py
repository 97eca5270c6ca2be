"""The interpreter and the libraries that the supervisor stands on, and whether they are the ones it was built for."""

from __future__ import annotations

import ctypes
import platform
import re
import ssl
import sys
from importlib import metadata

from openshell_supervisor import __version__
from openshell_supervisor.doctor.checks import Check, Severity, failed, info, ok, warning

DISTRIBUTION = "openshell-supervisor"
# What is worth naming in a report; everything that is required is compared.
NAMED = ("mitmproxy", "regopy", "pyroute2", "pyseccomp", "landlock", "cryptography")


def checks() -> list[Check]:
    """Everything about software."""
    return [_python(), _libraries(), _libseccomp(), _openssl()]


def _python() -> Check:
    version = platform.python_version()
    where = sys.executable
    return info(
        "software.python", f"Python {version}, openshell-supervisor {__version__}", version=version, executable=where
    )


def _libraries() -> Check:
    name = "software.libraries"
    versions = {one: _version(one) for one in NAMED}
    wrong: list[str] = []
    for requirement in _requirements():
        match = re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*(==|>=)\s*([0-9][^\s;,]*)", requirement)
        if match is None or "extra ==" in requirement:
            continue
        library, operator, wanted = match.groups()
        present = versions.setdefault(library, _version(library))
        if present is None:
            wrong.append(f"{library} is missing")
        elif operator == "==" and present != wanted:
            wrong.append(f"{library} is {present} instead of {wanted}")
        elif operator == ">=" and _numbers(present) < _numbers(wanted):
            wrong.append(f"{library} is {present}, older than {wanted}")
    if wrong:
        hint = (
            "install the supervisor with the versions that it names (mitmproxy's internals are used: exactly that one)"
        )
        return failed(name, Severity.HIGH, "; ".join(wrong), hint, versions=versions)
    listed = ", ".join(f"{one} {versions[one]}" for one in NAMED if versions[one])
    return ok(name, listed, versions=versions)


def _requirements() -> list[str]:
    """What the installed supervisor asks for; nothing where it runs from files that were never installed."""
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("dev")[0].split("rc")[0])[:3])


def _libseccomp() -> Check:
    """The library that compiles the filters; pyseccomp finds it by its name, without it no layer of system calls can be had."""
    name = "software.libseccomp"
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        hint = "install it in the image (apt-get install libseccomp2, apk add libseccomp, dnf install libseccomp)"
        return failed(name, Severity.HIGH, f"libseccomp cannot be loaded: {error}", hint, version=None)
    library.seccomp_version.restype = ctypes.POINTER(ctypes.c_uint * 3)  # struct scmp_version, seccomp.h
    numbers = tuple(library.seccomp_version().contents)
    version = ".".join(map(str, numbers))
    if numbers < (2, 5, 0):
        hint = "install 2.5 or newer: older ones do not know clone3 and other calls by name"
        return warning(name, Severity.MEDIUM, f"libseccomp {version} is old", hint, version=version)
    return ok(name, f"libseccomp {version}", version=version)


def _openssl() -> Check:
    """Two of them: the interpreter's, and the one inside cryptography, which the proxy speaks TLS with."""
    from cryptography.hazmat.backends.openssl import backend

    bundled = backend.openssl_version_text()
    return info(
        "software.openssl",
        f"{bundled} in cryptography, {ssl.OPENSSL_VERSION} in Python",
        cryptography=bundled,
        python=ssl.OPENSSL_VERSION,
    )
