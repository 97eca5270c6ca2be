"""What one run carries from step to step, and nothing else: no step is taken here."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from openshell_supervisor.callers.links import Links
from openshell_supervisor.confine import launcher
from openshell_supervisor.confine.failure import FailureHandler
from openshell_supervisor.confine.identity import Identity
from openshell_supervisor.confine.plan import Plan
from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.proxy.authority import CertificateAuthority
from openshell_supervisor.settings import Settings
from openshell_supervisor.telemetry.events import Telemetry
from openshell_supervisor.workload.child import Child
from openshell_supervisor.workload.environ import Trust
from openshell_supervisor.workload.reaper import Reaper
from openshell_supervisor.workload.terminal import Terminal

if TYPE_CHECKING:
    from openshell_supervisor.verdict.decide import Generation
    from openshell_supervisor.verdict.engines.protocol import Engine
    from openshell_supervisor.verdict.own_rules import PushedRules


@dataclass(slots=True)
class Sandbox:
    """What one run carries from step to step."""

    settings: Settings
    telemetry: Telemetry
    reaper: Reaper
    policy: SandboxPolicy
    identity: Identity
    directory: Path
    authority: asyncio.Task[CertificateAuthority]
    trust: asyncio.Task[Trust]
    plan: asyncio.Task[Plan]
    failures: FailureHandler
    terminal: Terminal | None
    launchers: list[Child]
    open_files: tuple[int, int]
    memory_closed: bool = True
    generation_number: int = 1
    identity_known: bool = True
    engine: Engine | None = None
    own_rules: str = ""
    pushed: PushedRules | None = None
    links: Links = field(default_factory=Links)
    _generation: Generation | None = None

    @property
    def generation(self) -> Generation:
        """The policy, ready to be asked; made when the first question comes, because that imports the engine's room."""
        if self._generation is None:
            from openshell_supervisor.verdict.decide import build_generation

            required = self.identity_known and not self.settings.relaxed_identity
            policy = self.links.follow(self.policy) if required else self.policy
            engine = self._own_engine(policy, required) if self.own_rules else self.engine
            number, own = self.generation_number, bool(self.own_rules)
            self._generation = build_generation(policy, number, required, engine, own_rules=own)
        return self._generation

    def _own_engine(self, policy: SandboxPolicy, required: bool) -> Engine:
        """The operator's module with `policy` as its data, in the server where there is one. Raises `EngineError`."""
        from openshell_supervisor.verdict.own_rules import own_engine

        if self.pushed is not None:
            return self.pushed.engine(self.own_rules, policy, required)
        return own_engine(self.own_rules, policy, required)

    def callers_known(self, known: bool) -> None:
        """Whether programs can be told apart on the rung that is taken; where not, the rules go by destinations alone."""
        if known != self.identity_known:
            self.identity_known, self._generation = known, None

    def new_launcher(self) -> Child:
        """A launcher; the first was started early, so that its interpreter's start overlaps with ours."""
        return self.launchers.pop() if self.launchers else start_launcher(self.reaper, self.terminal)


def start_launcher(reaper: Reaper, terminal: Terminal | None = None) -> Child:
    """Start a launcher, on the terminal's slave where there is one. Raises `LaunchError`."""
    stdio = {0: terminal.slave, 1: terminal.slave, 2: terminal.slave} if terminal is not None else None
    return Child.start(reaper, Path(launcher.ENTRY), stdio)
