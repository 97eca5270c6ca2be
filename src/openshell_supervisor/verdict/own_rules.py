"""Rules of the operator's own, from their file to what evaluates them: the embedded engine, or an OPA server of their own.

Their data is a generation's: it holds the policy, and whether callers are known. The embedded engine is made with it; a
server is given it anew for each generation, and holds one at a time.
"""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from openshell_supervisor.errors import PolicyError, Problem
from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.policy.normalise import normalise
from openshell_supervisor.verdict.custom import (
    checked_module,
    embedded_engine,
    pushed_rules,
    refuse_patterns,
    refuse_unsure,
)
from openshell_supervisor.verdict.data_document import data_document
from openshell_supervisor.verdict.engines.embedded import EmbeddedEngine
from openshell_supervisor.verdict.engines.opa_server import OpaServerEngine
from openshell_supervisor.verdict.engines.protocol import EngineUnavailable, Rules

if TYPE_CHECKING:
    from openshell_supervisor.verdict.engines.opa_client import OpaAddress


MAX_MODULE = 1 << 20
"""Bytes of a module: four times the 256 KiB that a policy may have (policy.md 5.4)."""
NOT_HELD = "the OPA server does not hold this policy's data"


def load_rules(path: Path, policy: SandboxPolicy, policy_source: str, *, embedded: bool) -> str:
    """The checked module of `path`. Raises `PolicyError` with the place of what is wrong, also for patterns of the policy that
    such rules would read otherwise, and with `embedded` for what the evaluator here may misjudge and an OPA server would not."""
    source = str(path)
    module = checked_module(_read(path), source)
    if embedded:
        refuse_unsure(module, source)
    refuse_patterns(policy, policy_source)
    return module


def _read(path: Path) -> str:
    """The text of a regular file. Raises `PolicyError`."""
    what = "it is not a regular file, or too large"
    try:
        # O_NONBLOCK: a FIFO with no writer must be an error and not a hang.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode) and len(raw := file.read(MAX_MODULE + 1)) <= MAX_MODULE:
                return raw.decode("utf-8", "replace")
    except (OSError, ValueError) as error:
        what = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    problem = Problem("policy_unreadable", f"the rules cannot be read: {what}", hint="name a Rego file")
    raise PolicyError((problem,), source=str(path)) from None


def own_engine(module: str, policy: SandboxPolicy, require_binary_identity: bool) -> EmbeddedEngine:
    """The embedded engine with a checked module and `policy` as its data. Raises `EngineError`."""
    return embedded_engine(module, data_document(normalise(policy), require_binary_identity))


class PushedRules:
    """The OPA server at `address` for one run's own rules. Used as an asynchronous context, in one event loop.

    `told` is as `OpaServerEngine` has it, over all generations together.
    """

    def __init__(self, address: OpaAddress, told: Callable[[str], None] = lambda reason: None) -> None:
        self._address = address
        self._told = told
        self._said = ""
        self._newest: PushedEngine | None = None
        self._server: OpaServerEngine | None = None
        self._making = threading.Lock()  # a generation may be made in the thread that warms it
        self._changing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        async with self._changing:
            self._newest = None
            await self._leave()

    def engine(self, module: str, policy: SandboxPolicy, require_binary_identity: bool) -> PushedEngine:
        """What decides for a generation with a checked module. Engines of other data cannot be asked any more."""
        rules = pushed_rules(module, data_document(normalise(policy), require_binary_identity))
        with self._making:
            if self._newest is None or self._newest.rules != rules:
                self._newest = PushedEngine(self, rules)
            return self._newest

    async def server(self, asking: PushedEngine) -> OpaServerEngine | None:
        """The server, holding the rules and data of `asking`; None where a newer generation's take their place."""
        async with self._changing:
            if asking is not self._newest:
                return None
            if self._server is None or self._server.rules is not asking.rules:
                await self._leave()  # first: its watch would push the old data again
                self._server = await OpaServerEngine(self._address, asking.rules, self._say).__aenter__()
                if not self._server.outage:
                    self._say("")
            return self._server

    async def _leave(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.__aexit__()

    def _say(self, reason: str) -> None:
        if bool(reason) != bool(self._said):
            self._told(reason)
        self._said = reason


class PushedEngine:
    """One generation's engine: a `PreparedEngine` that cannot be asked unless the server holds this generation's data."""

    def __init__(self, pushed: PushedRules, rules: Rules) -> None:
        self.rules = rules
        self._pushed = pushed
        self._server: OpaServerEngine | None = None

    @property
    def outage(self) -> str:
        """Why nothing can be decided now, or an empty string; what is remembered counts for nothing then, either."""
        return self._server.outage if self._server is not None else NOT_HELD

    async def prepare(self, decide: Callable[[], object]) -> None:
        """Have the server hold these rules, and at hand every answer that `decide` asks for."""
        self._server = await self._pushed.server(self)
        if self._server is not None:
            await self._server.prepare(decide)

    def ask(self, rule: str, document: str) -> Any:
        """The prepared value. Raises `EngineUnavailable` where there is none, `EngineError` where it is undefined."""
        if self._server is None:
            raise EngineUnavailable(NOT_HELD)
        return self._server.ask(rule, document)
