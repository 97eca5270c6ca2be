"""What the workload is given: a home, an environment block, and a word about why its program could not be run."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from openshell_supervisor import home
from openshell_supervisor.boundary.boundary import Boundary
from openshell_supervisor.confine.baseline import FileRules
from openshell_supervisor.errors import LaunchError
from openshell_supervisor.sandbox import Sandbox
from openshell_supervisor.workload import environ

# A workload may have filled its home for hours of unlinking, and `podman stop` waits for ten seconds in all; what is left is
# removed by the next run's end.
HOME_REMOVAL_SECONDS = 1.0


def home_of(sandbox: Sandbox) -> Path | None:
    """A home made for this run, where the workload's own is not there or lies outside of the file rules; else None."""
    identity, rules = sandbox.identity, _rules_that_hold(sandbox)
    if rules is None or "HOME" in sandbox.settings.user_variables or home.usable(identity.home, rules):
        return None
    made = home.make(identity, rules)
    if made is not None:
        note = (
            f"{identity.home} is outside of the file rules, shared, or not there: the workload gets the home {made}, which is "
            "removed at the end"
        )
        sandbox.telemetry.config("validated", note, unmapped={"home": str(made)})
    return made


def environment(sandbox: Sandbox, boundary: Boundary, its_home: str) -> dict[str, str]:
    """The workload's whole environment block; under file rules, programs that it may run are found first."""
    sandbox.telemetry.config("enabled", "TLS termination enabled: ephemeral CA generated")
    identity, rules = sandbox.identity, _rules_that_hold(sandbox)
    block = environ.workload_environment(
        os.environ,
        session=environ.Session(identity.user, its_home, sandbox.terminal is not None),
        user_variables=sandbox.settings.user_variables,
        proxy_url=boundary.proxy_url,
        trust=sandbox.trust.result(),
    )
    if rules is not None and "PATH" in block and "PATH" not in sandbox.settings.user_variables:
        block["PATH"] = home.search_path(block["PATH"], rules)
    return block


def _rules_that_hold(sandbox: Sandbox) -> FileRules | None:
    plan = sandbox.plan.result()
    return None if plan.ruleset is None else plan.file_rules


async def forget_home(path: Path, sandbox: Sandbox) -> None:
    """Remove a home made for this run."""
    removal = asyncio.create_task(asyncio.to_thread(home.remove, path, sandbox.identity.uid))
    await asyncio.wait({removal}, timeout=HOME_REMOVAL_SECONDS)


def explained(error: LaunchError, sandbox: Sandbox, block: Mapping[str, str]) -> LaunchError:
    """The same error, or one that says that the program is nowhere in PATH, or outside of the file rules, where it is so."""
    rules = _rules_that_hold(sandbox)
    program = sandbox.settings.command[0]
    found = shutil.which(program, path=block.get("PATH"))
    if found is None and "/" not in program:
        return LaunchError(
            f"cannot run {program!r}: not found in PATH ({block.get('PATH', '')})",
            code=error.code,
            step=error.step,
            errno=errno.ENOENT,
            hint="name it with its directory, or set PATH for the workload",
        )
    place = os.path.realpath(found or program)
    if error.errno != errno.EACCES or rules is None or home.within(place, rules):
        return error
    return LaunchError(
        f"cannot run {program!r}: {place} lies outside of the policy's file rules",
        code="workload_outside_file_rules",
        step=error.step,
        errno=error.errno,
        hint=f"list {os.path.dirname(place)}, and what the program needs besides, under filesystem_policy.read_only",
    )
