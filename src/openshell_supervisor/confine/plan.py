"""What the launcher is to do to itself beyond taking an identity, made before the host is touched: a Landlock ruleset, filters,
and what its twin is to try.

Nothing is decided here: what could not be made is kept as the error it was, for `confine.failure` to judge with the statement.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openshell_supervisor.confine import baseline, landlock, selfprobe, sockets
from openshell_supervisor.confine.baseline import FileRules
from openshell_supervisor.confine.landlock import Rules, Ruleset
from openshell_supervisor.confine.seccomp import FilterOptions, boundary_filter, self_probe_tries
from openshell_supervisor.enforcement import Layer
from openshell_supervisor.errors import ConfineError
from openshell_supervisor.policy.model import Netlink, SandboxPolicy


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the plan is made from. `readable` are files of the supervisor's that the workload reads, `directory` is the run's own;
    `skip` names the layers that are not ours; `workdir` and `standing_in` are as in `baseline.file_rules`. `same_user`: the
    workload has the supervisor's uid, so no file's mode keeps it from the other terminals of that user."""

    policy: SandboxPolicy
    netlink: Netlink
    directory: Path
    readable: tuple[Path, ...] = ()
    workdir: str | None = None
    standing_in: str = "/"
    skip: frozenset[Layer] = frozenset()
    self_probe: bool = True
    same_user: bool = False


@dataclass(slots=True)
class Plan:
    """The launcher's part of a run. Of each pair of a thing and its error, at most one is set; neither: not asked for. `canary`
    is where a file must stand while the launcher confines itself and its twin tries. `domain` is entered where there
    is no `ruleset`: it allows every file, and keeps other processes out of reach."""

    file_rules: FileRules | None = None
    ruleset: Ruleset | None = None
    domain: Ruleset | None = None
    file_rules_error: ConfineError | None = None
    hard: bool = False
    workload_filters: tuple[bytes, ...] = ()
    filters_error: ConfineError | None = None
    sockets: list[str] = field(default_factory=list)
    sockets_unknown: str = ""
    tries: list[selfprobe.Try] = field(default_factory=list)
    canary: Path | None = None
    own_terminals: bool = False

    def request(self) -> dict[str, Any]:
        """The plan's part of the `confine` request; the ruleset's descriptor goes beside it."""
        entered, boundary = self.ruleset or self.domain, boundary_filter()
        filters = {"boundary": [boundary.hex()] if boundary else []}
        if self.workload_filters:
            filters["workload"] = [program.hex() for program in self.workload_filters]
        return {
            "controls": [one.request for one in selfprobe.controls(self.tries)],
            "terminals": self._terminals() if self.own_terminals else None,
            "landlock": None if entered is None else {"flags": entered.restrict_flags},
            "filters": filters,
        }

    def _terminals(self) -> dict[str, int]:
        """The rules that only the launcher can add, once it has mounted another /dev/pts; 0 for none."""
        directory, file = 0, 0
        if self.ruleset is not None and self.file_rules is not None and self.file_rules.terminals:
            writable = self.file_rules.terminals == "read_write"
            directory, file = landlock.terminal_rights(self.ruleset, writable=writable)
        return {"directory_rights": directory, "file_rights": file}

    def descriptors(self) -> list[int]:
        """What is passed beside the `confine` request."""
        entered = self.ruleset or self.domain
        return [] if entered is None else [entered.fd]

    def close(self) -> None:
        """Give up the rulesets; what the launcher entered stays."""
        for ruleset in (self.ruleset, self.domain):
            if ruleset is not None:
                ruleset.close()


def make(wishes: Wishes, filters: Callable[[FilterOptions], tuple[bytes, ...]]) -> Plan:
    """The plan of one run; `filters` makes the workload's programs and may raise `ConfineError`. Raises nothing. Blocks."""
    plan = Plan(own_terminals=wishes.same_user and Layer.FILESYSTEM not in wishes.skip)
    if Layer.FILESYSTEM not in wishes.skip and baseline.asked(wishes.policy):
        _plan_files(plan, wishes)
    if plan.ruleset is None and Layer.FILESYSTEM not in wishes.skip:
        plan.domain = landlock.bare_domain()
    if Layer.SYSCALLS not in wishes.skip:
        _plan_filters(plan, wishes, filters)
    if wishes.self_probe:
        plan.tries.append(selfprobe.privileges())
    _plan_sockets(plan, wishes)
    return plan


def _plan_files(plan: Plan, wishes: Wishes) -> None:
    policy = wishes.policy
    plan.hard = policy.landlock is not None and policy.landlock.hard_requirement
    plan.file_rules = rules = baseline.file_rules(
        policy,
        workdir=wishes.workdir,
        standing_in=wishes.standing_in,
        readable=tuple(str(path) for path in wishes.readable),
        own_terminals=plan.own_terminals,
    )
    try:
        plan.ruleset = landlock.build(Rules(rules.read_only, rules.read_write, hard=plan.hard))
    except ConfineError as error:
        plan.file_rules_error = error
        return
    if wishes.self_probe:
        tries, plan.canary = selfprobe.files((rules.read_only, rules.read_write), wishes.directory)
        plan.tries += tries
        if plan.ruleset.scopes:
            plan.tries.append(selfprobe.signals(os.getpid()))


def _plan_sockets(plan: Plan, wishes: Wishes) -> None:
    """What programs outside have bound to paths; a policy that names such a path wants it to be in reach."""
    named = wishes.policy.filesystem
    try:
        plan.sockets = sockets.bound((*named.read_only, *named.read_write) if named else ())
    except OSError as error:
        plan.sockets_unknown = error.strerror or str(error)
    plan.tries += selfprobe.sockets(plan.sockets)


def _plan_filters(plan: Plan, wishes: Wishes, filters: Callable[[FilterOptions], tuple[bytes, ...]]) -> None:
    options = FilterOptions(netlink=wishes.netlink)
    try:
        plan.workload_filters = filters(options)
    except ConfineError as error:
        plan.filters_error = error
        return
    if wishes.self_probe:
        plan.tries += selfprobe.system_calls(self_probe_tries(options))
