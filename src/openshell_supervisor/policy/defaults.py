"""The policy that holds when nobody gave one: upstream's restrictive default (policy.md 5.3). No network at all."""

from __future__ import annotations

from openshell_supervisor.policy.model import FilesystemPolicy, LandlockPolicy, SandboxPolicy


def default_policy() -> SandboxPolicy:
    """Version 1, the usual system directories read-only, /tmp writable, no network policies, no process section."""
    return SandboxPolicy(
        version=1,
        filesystem=FilesystemPolicy(
            include_workdir=True,
            read_only=("/usr", "/lib", "/proc", "/dev/urandom", "/app", "/etc", "/var/log"),
            read_write=("/tmp", "/dev/null"),
        ),
        landlock=LandlockPolicy("best_effort"),
    )
