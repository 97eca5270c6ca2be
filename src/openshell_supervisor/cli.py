"""Commands. `run` is the default; heavy imports happen inside the command that needs them.

Every failure that can be explained ends here: one screen on standard error, no traceback, and the exit code of its kind.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from openshell_supervisor import __version__
from openshell_supervisor.errors import EXIT_USAGE, SettingsError, SupervisorError

USAGE = f"""openshell-supervisor {__version__}: run a command behind the strongest network boundary that this host allows.

  openshell-supervisor [run] [OPTIONS] -- COMMAND [ARG ...]
  openshell-supervisor check POLICY [POLICY ...]
  openshell-supervisor explain --policy FILE --host NAME --port N [--method M --path P] [OPTIONS]
  openshell-supervisor doctor [--json] [--require LAYERS] [OPTIONS]
  openshell-supervisor --version

`openshell-supervisor run --help` lists the options; the user guide is docs/user-guide.md.
"""


def run(arguments: Sequence[str]) -> NoReturn:
    """`run`: live one sandbox's life and end the process; the exit code is the workload's."""
    import gc

    # Nothing is garbage while everything is being imported; collecting then costs a tenth of the start. The supervisor turns it
    # on again once the proxy is warm.
    gc.disable()
    from openshell_supervisor import settings as settings_room

    try:
        settings = settings_room.read(arguments, os.environ)
    except SettingsError:
        _forget_statement(settings_room.status_file_of(arguments, os.environ))
        raise
    from openshell_supervisor.proxy import authority

    begun = None
    with contextlib.suppress(OSError):  # then the supervisor makes its own
        begun = authority.begin()
    import asyncio

    from openshell_supervisor import supervisor

    code = asyncio.Runner().run(supervisor.run(settings, begun))
    # Everything of ours is closed. What may still run is the import of the proxy's inspection, in a thread that cannot be
    # cancelled: a workload shorter than that import must not wait for it.
    os._exit(code)


def _host_limit(error: BaseException) -> SupervisorError:
    """What the host refused where nothing of ours expects a refusal: named with its place, and with where to look.

    Imports nothing: there may be no memory left for it.
    """
    place, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        place = code.co_qualname if "openshell_supervisor" in code.co_filename else place
        trace = trace.tb_next
    return SupervisorError(
        f"the host ended the run: {type(error).__name__}: {error} (in {place})",
        code="host_limit",
        hint="look at the limits of this user and container (ulimit -a: processes, open files, address space), and at the "
        "runtime's seccomp profile",
    )


def _forget_statement(path: Path | None) -> None:
    """A start that is refused leaves no statement of an earlier run behind; anything but a statement is left alone."""
    try:
        if path is not None and '"network_mode"' in path.read_text():
            path.unlink()
    except (OSError, UnicodeDecodeError):
        pass  # there is none, or it is not ours


def check(arguments: Sequence[str]) -> int:
    """`check`: validate policies; 0 when all can be used, 2 when one cannot."""
    from openshell_supervisor.policy import check as check_room

    if not arguments or arguments[0].startswith("-"):
        raise SettingsError(
            "check: name at least one policy file", code="usage", hint="openshell-supervisor check POLICY"
        )
    good = True
    for path in arguments:
        text, usable = check_room.report(path)
        sys.stdout.write(text)
        good = good and usable
    return 0 if good else EXIT_USAGE


def doctor(arguments: Sequence[str]) -> int:
    """`doctor`: what this host, container and user can enforce, by really trying; 1 where a demand would not be met."""
    from openshell_supervisor.doctor.command import doctor as examine

    return examine(arguments)


def explain(arguments: Sequence[str]) -> int:
    """`explain`: what a policy says of a request, of cases or of a recording; 0 for yes, 1 for no."""
    from openshell_supervisor.explain.command import explain as answer

    return answer(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"run": run, "check": check, "explain": explain, "doctor": doctor}


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Answers the exit code; the interpreter's entry point hands it to exit(3)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _fill_standard_descriptors()
    try:
        try:
            return _dispatch(arguments)
        except (OSError, RuntimeError, MemoryError) as error:
            raise _host_limit(error) from error
    except SupervisorError as error:
        with contextlib.suppress(OSError):  # nobody reads our errors any more; the exit code still tells
            sys.stderr.write(error.screen() + "\n")
            sys.stderr.flush()
        return error.exit_code
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, before anything was started


def _fill_standard_descriptors() -> None:
    """Open what is closed of descriptors 0-2, so that nothing of ours takes their numbers and the workload inherits it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    if first in ("--version", "-V"):
        sys.stdout.write(f"openshell-supervisor {__version__}\n")
        return 0
    if first in COMMANDS:
        return COMMANDS[first](arguments[1:])
    from openshell_supervisor.still_to_come import RESERVED_WORDS

    if first in RESERVED_WORDS:
        raise SettingsError(
            f"{first}: {RESERVED_WORDS[first]}", code="not_built", hint="to run a program of that name: run -- " + first
        )
    return run(arguments)
