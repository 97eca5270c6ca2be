"""A middleware's configuration holds what every form of a policy can carry."""

from __future__ import annotations

import pytest

from openshell_supervisor.errors import PolicyError
from openshell_supervisor.policy.proto import load_message, to_proto
from openshell_supervisor.policy.yaml_file import parse

POLICY = "version: 1\nnetwork_middlewares:\n  m: {{middleware: x, config: {{n: [{{k: {}}}]}}, endpoints: {{include: [a]}}}}\n"


@pytest.mark.parametrize("number", ["0", "-1.5", "9007199254740992", "1e300", "true", "'9007199254740993'"])
def test_numbers_that_every_form_can_hold(number: str) -> None:
    """They load, and arrive over protobuf as they were."""
    policy = parse(POLICY.format(number)).policy
    assert load_message(to_proto(policy), "gateway").policy == policy


@pytest.mark.parametrize("number", ["9007199254740993", "-9007199254740993", ".inf", "-.inf", ".nan"])
def test_numbers_that_a_message_cannot_hold_are_refused(number: str) -> None:
    """Rather than changed on the way: protobuf's Struct has doubles, and JSON has no infinities."""
    with pytest.raises(PolicyError) as caught:
        parse(POLICY.format(number))
    assert [(p.code, p.path) for p in caught.value.problems] == [("middleware_invalid", "network_middlewares.m")]
    assert "double" in caught.value.problems[0].message
