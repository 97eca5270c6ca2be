"""`openshell-supervisor doctor`: what this host, container and user can enforce, by trying it.

The host is looked at by a process of its own (`attempt`) and a thread while the rehearsal builds every rung here. Nothing is
started that stays, and no workload runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from openshell_supervisor import settings as settings_room
from openshell_supervisor.doctor import asked, kernel, namespaces, outcome, rights, runtime, software, surroundings
from openshell_supervisor.doctor.attempt import Tries
from openshell_supervisor.doctor.checks import Check, Severity, failed, info
from openshell_supervisor.doctor.files import Files
from openshell_supervisor.doctor.report import Report
from openshell_supervisor.errors import SupervisorError
from openshell_supervisor.preparation import POLICY_ON_DISK
from openshell_supervisor.settings import Settings
from openshell_supervisor.telemetry.plain_log import configure_plain_logging

if TYPE_CHECKING:
    from openshell_supervisor.rehearsal import Rehearsal

HELP = """usage: openshell-supervisor doctor [--json] [OPTIONS OF run]

What this host, container and user can enforce, found by really trying: nothing is changed, no workload runs.

  --json             one JSON object instead of tables
  --require LAYERS   exit code 1 unless these layers would hold (comma-separated, as in run)
  --policy FILE      the policy that would be used, for what it asks
  --network-mode M   auto, isolated or host

Every other option of `run` is taken as well, so a command line can be tried as it is; the command itself is not run.
"""


def doctor(arguments: Sequence[str]) -> int:
    """Look, print, and answer 0, or 1 where a demand would not be met. Raises `SupervisorError` for unusable input."""
    began = time.monotonic()
    gc.disable()  # a second's life is too short to collect anything
    options, as_json = _options(arguments)
    if options is None:
        sys.stdout.write(HELP)
        return 0
    environment, notes = _environment(options)
    settings = _without_a_workload(settings_room.read(options, environment))
    view = View(Files().remember("/proc/self/status"), environment, rights.limits(), Tries())
    configure_plain_logging("error")  # what the rehearsal meets is in its statements
    # Before any thread runs, because these import: two threads in the imports of one package (cryptography) can block each other.
    known = [*software.checks(), *asked.checks(_policy_file(settings))]
    with _nobody_types(), _as_it_was(settings.run_dir):
        found, rehearsed = asyncio.run(_until_told(settings, view))
    found = [*found, *known, *notes]
    rungs = outcome.rungs(rehearsed)
    mode = outcome.choose(settings, rungs, settings.network_mode)
    demand = outcome.demand(settings.require, mode)
    auto = outcome.choose(settings, rungs, "auto")
    report = Report(tuple(found), rungs, auto, mode, demand, time.monotonic() - began)
    _print(report, as_json=as_json)
    return 0 if demand.met and mode.statement is not None else 1


def _options(arguments: Sequence[str]) -> tuple[list[str] | None, bool]:
    """The options of `run`, None where help was asked for, and whether the answer is to be JSON."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    before, after = words[:end], words[end:]
    if "-h" in before or "--help" in before:
        return None, False
    return [word for word in before if word != "--json"] + after, "--json" in before


def _environment(options: Sequence[str]) -> tuple[dict[str, str], list[Check]]:
    """The environment that the settings are read from. A gateway is not asked, so its address is no reason to refuse."""
    environment = dict(os.environ)
    local = "OPENSHELL_POLICY" in environment or any(word.partition("=")[0] == "--policy" for word in options)
    if local or not environment.pop("OPENSHELL_ENDPOINT", None):
        return environment, []
    return environment, [info("policy.gateway", "OPENSHELL_ENDPOINT is set: the doctor asks no gateway for its policy")]


def _without_a_workload(settings: Settings) -> Settings:
    """The same start, but nothing is written, no terminal is made, and what has no effect goes without saying."""
    return replace(settings, status_file=None, ocsf_file=None, tty=False, without_effect=())


@contextlib.contextmanager
def _nobody_types() -> Iterator[None]:
    """Standard input from nowhere: what a person types meanwhile is for the shell, not for a workload's terminal."""
    kept, nowhere = os.dup(0), os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 0)
        os.close(kept)


@contextlib.contextmanager
def _as_it_was(run_dir: Path | None) -> Iterator[None]:
    """Take away the `--run-dir` that the rehearsal made, where there was none and nobody uses it by now."""
    absent = run_dir is not None and not run_dir.exists()
    try:
        yield
    finally:
        if absent and run_dir is not None:
            with contextlib.suppress(OSError):  # never made, or another run has its directory in it
                run_dir.rmdir()


@dataclass(frozen=True, slots=True)
class View:
    """The host as it was before the rehearsal began, and the process that tries things beside it."""

    files: Files
    environment: Mapping[str, str]
    limits: rights.Limits
    tries: Tries


async def _until_told(settings: Settings, view: View) -> tuple[list[Check], tuple[Rehearsal, ...]]:
    """As `_examine`; a signal that ends takes down first what the rehearsal has built, and then ends (128 + its number)."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    told: list[int] = []

    def end(number: int) -> None:
        told.append(number)
        if task is not None:
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):  # SIGINT is asyncio's, and does the same
        loop.add_signal_handler(number, end, number)
    try:
        return await _examine(settings, view)
    except asyncio.CancelledError:
        if not told:
            raise
        raise SystemExit(128 + told[0]) from None


async def _examine(settings: Settings, view: View) -> tuple[list[Check], tuple[Rehearsal, ...]]:
    """The host's checks and the rehearsal, at the same time."""
    looking = asyncio.create_task(asyncio.to_thread(_look, settings, view))
    refusal: list[Check] = []
    rehearsed: tuple[Rehearsal, ...] = ()
    try:
        from openshell_supervisor.rehearsal import rehearse

        rehearsed = await rehearse(settings, outcome.wanted(settings))
    except SupervisorError as error:
        hint = error.hint or "a run with these settings ends with the same error"
        refusal.append(failed("rehearsal", Severity.HIGH, error.message, hint, code=error.code))
    return [*await looking, *refusal], rehearsed


def _look(settings: Settings, view: View) -> list[Check]:
    """Every check of the host, in the order of the report; for a thread, so nothing here imports."""
    files, environment = view.files, view.environment
    outcomes = view.tries.outcomes()
    return [
        *runtime.checks(files, environment, outcomes),
        *kernel.checks(files, outcomes),
        *namespaces.checks(files, outcomes),
        *rights.checks(files, outcomes, view.limits),
        *surroundings.checks(files, environment, settings.run_dir, pid_limit_required=settings.require_pid_limit),
    ]


def _policy_file(settings: Settings) -> Path | None:
    return settings.policy or next((path for path in POLICY_ON_DISK if path.is_file()), None)


def _print(report: Report, *, as_json: bool) -> None:
    """Write the report; a reader that left early (`| head`) is no error, the exit code still tells."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    colour = terminal and "NO_COLOR" not in os.environ
    try:
        sys.stdout.write(report.as_json() if as_json else report.table(width=width, colour=colour))
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # or the interpreter complains when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
