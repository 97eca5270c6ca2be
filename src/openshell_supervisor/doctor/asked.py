"""What the operator and the policy ask for: which layers, and whether the policy can be used at all."""

from __future__ import annotations

from pathlib import Path

from openshell_supervisor.confine import baseline
from openshell_supervisor.doctor.checks import Check, Severity, failed, info, ok, warning
from openshell_supervisor.enforcement import Layer
from openshell_supervisor.policy import check as policy_check
from openshell_supervisor.policy.defaults import default_policy
from openshell_supervisor.policy.model import SandboxPolicy

NO_FILE = "the built-in default (no file was named, none is on disk): no network at all"


def checks(path: Path | None) -> list[Check]:
    """Whether the policy can be used, and which layers it asks for. `path` is None where there is no file."""
    if path is None:
        policy: SandboxPolicy | None = default_policy()
        found = info("policy.file", NO_FILE, source=None)
    else:
        checked = policy_check.examine(path)
        policy = checked.policy if checked.ok else None
        found = _file(checked)
    if policy is None:
        return [found]
    asks = layers(policy)
    hard = policy.landlock is not None and policy.landlock.hard_requirement
    summary = "asks for " + ", ".join(layer.value for layer in Layer if layer in asks)
    if hard:
        summary += "; file rules are a hard requirement"
    facts = {"asks": [layer.value for layer in Layer if layer in asks], "hard_requirement": hard}
    return [found, info("policy.layers", summary, **facts)]


def _file(checked: policy_check.Checked) -> Check:
    name, hint = "policy.file", f"openshell-supervisor check {checked.source}"
    count = len(checked.problems) or len(checked.warnings)
    problems = [problem.text() for problem in checked.problems or checked.warnings]
    facts = {"source": checked.source, "problems": problems}
    if checked.problems:
        return failed(name, Severity.HIGH, f"{checked.source} cannot be used: {count} problems", hint, **facts)
    if checked.warnings:
        return warning(name, Severity.LOW, f"{checked.source} can be used, with {count} warnings", hint, **facts)
    return ok(name, f"{checked.source} can be used", **facts)


def layers(policy: SandboxPolicy) -> frozenset[Layer]:
    """The layers that a run with this policy asks for; three of them no policy can turn off."""
    asks = {Layer.NETWORK, Layer.SYSCALLS, Layer.PRIVILEGES, Layer.SUPERVISOR_SYSCALLS}
    if baseline.asked(policy):
        asks.add(Layer.FILESYSTEM)
    if any(rule.binaries for rule in policy.network_policies.values()):
        asks.add(Layer.BINARY_IDENTITY)
    return frozenset(asks)
