"""The one error tree.

    SupervisorError                 anything fatal that we can explain
    ├── SettingsError               the operator's flags, environment or files contradict each other (exit 2)
    ├── PolicyError                 the policy cannot be used (exit 2 when it is a local file)
    ├── GatewayError                the gateway's fault, or the way to it
    ├── BoundaryError               the host does not allow a network boundary
    ├── ConfineError                a Landlock, seccomp or privilege step failed
    ├── LaunchError                 the workload could not be started
    └── ProxyError                  the proxy cannot serve

Each error has a stable `code`, a one-line message that says what and where, and a `hint` that says how to mend it. The type
says whose fault it is. `exit_code` is what the process ends with when nobody handles the error.
"""

from __future__ import annotations

from dataclasses import dataclass

from openshell_supervisor.enforcement import errno_name

EXIT_FATAL = 1
EXIT_USAGE = 2
EXIT_TIMEOUT = 124


class SupervisorError(Exception):
    """Base of every error that ends the supervisor with an explanation instead of a traceback."""

    exit_code = EXIT_FATAL

    def __init__(self, message: str, *, code: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def screen(self) -> str:
        """What a person sees: the message with its code and, on a second line, what to do."""
        text = f"openshell-supervisor: {self.message} [{self.code}]"
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class SettingsError(SupervisorError):
    """The operator's input is unusable; nothing has been started."""

    exit_code = EXIT_USAGE


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a policy. `path` is a dotted path into the document, `line` and `column` count from 1 (0 = unknown)."""

    code: str
    message: str
    path: str = ""
    line: int = 0
    column: int = 0
    hint: str = ""

    def text(self, source: str = "") -> str:
        """`file:line:column: path: message (hint) [code]`, leaving out what is unknown."""
        place = ":".join(
            part
            for part in (source, str(self.line) if self.line else "", str(self.column) if self.column else "")
            if part
        )
        head = ": ".join(part for part in (place, self.path) if part)
        body = f"{self.message} [{self.code}]" + (f" (hint: {self.hint})" if self.hint else "")
        return f"{head}: {body}" if head else body


class PolicyError(SupervisorError):
    """A policy cannot be used; `problems` lists every fault that was found, not only the first."""

    exit_code = EXIT_USAGE

    def __init__(self, problems: tuple[Problem, ...], *, source: str = "") -> None:
        self.problems = problems
        self.source = source
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__(
            f"policy {source or 'document'} has {count}",
            code="policy_invalid",
            hint="`openshell-supervisor check POLICY` lists them all",
        )

    def screen(self) -> str:
        """The head line and every problem below it."""
        lines = "\n".join(f"  {problem.text(self.source)}" for problem in self.problems)
        return f"openshell-supervisor: {self.message} [{self.code}]\n{lines}"


class GatewayError(SupervisorError):
    """The gateway, or the way to it."""


class HostError(SupervisorError):
    """A system call that the host refused: which step, which call, which errno (a number, or None)."""

    def __init__(self, message: str, *, code: str, step: str = "", errno: int | None = None, hint: str = "") -> None:
        super().__init__(message, code=code, hint=hint)
        self.step = step
        self.errno = errno

    @property
    def errno_name(self) -> str | None:
        """The errno by name, "EPERM" for example."""
        return errno_name(self.errno)


@dataclass(frozen=True, slots=True)
class RungFailure:
    """Why a rung of the boundary ladder was not taken. `errno` is symbolic, None where no system call failed."""

    rung: str
    step: str
    errno: str | None
    message: str

    def brief(self) -> str:
        """`rung: step: errno or message`, for one line of a log."""
        return f"{self.rung}: {self.step}: {self.errno or self.message}"


class BoundaryError(HostError):
    """A rung of the boundary ladder could not be built, or none (then `failures` names each); what it had made is undone."""

    failures: tuple[RungFailure, ...] = ()


class ConfineError(HostError):
    """A confinement step failed."""


class LaunchError(HostError):
    """The launcher reported a failing step, or never came to the point where the workload runs."""


class ProxyError(SupervisorError):
    """The proxy cannot serve."""
