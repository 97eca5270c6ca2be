"""The fuzz corpus, replayed with some mutations; the long runs are `python tests/verdict/fuzz.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import fuzz
import pytest

MUTATED = 250
"""Entries beside the corpus: two to three seconds. A run of ten minutes tries some 100,000."""


def test_the_corpus_and_what_is_near_it_breaks_nothing() -> None:
    """No crash, no decision over 50 ms of processor time, no verdict that contradicts itself; every seed loads."""
    assert sum(fuzz.examine(entry)[0] > 0 for entry in fuzz.seeds()) >= 4
    campaign = fuzz.Campaign(seed=11)
    campaign.run(60.0, most=len(campaign.pool) + MUTATED)
    assert campaign.findings == {}
    assert campaign.decisions > MUTATED


def _raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("planted")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("decide_fully", lambda right: lambda *a: replace(right(*a), allow=not right(*a).allow)),
        ("decide", lambda right: lambda *a: replace(right(*a), reason="")),
        ("decide", lambda _: _raises),
        ("parse", lambda _: _raises),
        ("to_proto", lambda right: lambda policy: right(replace(policy, version=7))),
        ("canonical_host", lambda right: lambda host: f"{right(host)}x"),
    ],
    ids=[
        "narrowed and full differ",
        "no reason",
        "decide raises",
        "parse raises",
        "protobuf changes it",
        "not idempotent",
    ],
)
def test_a_planted_fault_is_found(name: str, fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The search can fail: with a fault put in, the corpus alone gives a finding; without, none."""
    campaign = fuzz.Campaign()
    campaign.run(30.0, most=1)
    assert campaign.findings == {}
    monkeypatch.setattr(fuzz, name, fault(getattr(fuzz, name)))
    campaign.run(30.0, most=1)
    assert campaign.findings


def test_a_slow_decision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that nothing can keep is exceeded; the real one is kept."""
    campaign = fuzz.Campaign()
    campaign.run(30.0, most=1)
    assert campaign.findings == {} and 0 < campaign.slowest <= fuzz.SLOWEST_S
    monkeypatch.setattr(fuzz, "SLOWEST_S", 0.0)
    campaign.run(30.0, most=1)
    assert any("a decision takes" in what for what in campaign.findings)
