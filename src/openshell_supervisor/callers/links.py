"""Policy paths that are links: what runs is known by the file that a link leads to, so a listed link stands for that file, too.

Upstream adds the file's path beside the listed one (policy.md 2.1), and so does this. A link is followed once per run: the
workload may own the directory that it is in, and could point it anywhere before the next policy arrives.
"""

from __future__ import annotations

import os
from dataclasses import replace

from openshell_supervisor.policy.model import Binary, NetworkRule, SandboxPolicy


class Links:
    """What the paths of this run's policies led to when they were first seen."""

    def __init__(self) -> None:
        self._ends: dict[str, str] = {}

    def follow(self, policy: SandboxPolicy) -> SandboxPolicy:
        """The policy with one more binary for each that is listed by a link, or through one. Patterns, and paths that lead to no
        file, stay as they are. Looks at the file system: a few microseconds for each distinct path."""
        rules = {key: self._rule(rule) for key, rule in policy.network_policies.items()}
        return replace(policy, network_policies=rules)

    def _rule(self, rule: NetworkRule) -> NetworkRule:
        known = {binary.path for binary in rule.binaries}
        ends = [Binary(self._end(binary.path), binary.advisor_proposed) for binary in rule.binaries]
        more = tuple(dict.fromkeys(end for end in ends if end.path not in known))
        return replace(rule, binaries=(*rule.binaries, *more)) if more else rule

    def _end(self, path: str) -> str:
        """Where the path leads; itself where nobody can say."""
        if "*" in path or not path.startswith("/"):
            return path
        end = self._ends.get(path)
        if end is None:
            try:
                end = os.path.realpath(path, strict=True)
            except (OSError, ValueError):  # not there, a loop, or no path at all
                return path
            self._ends[path] = end
        return end
