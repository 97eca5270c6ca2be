"""One form for what means the same: hosts, paths and policies come to rest after one step, however a policy came."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import worlds
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from openshell_supervisor.policy.model import SandboxPolicy
from openshell_supervisor.policy.normalise import normal_path, normalise
from openshell_supervisor.policy.proto import to_proto
from openshell_supervisor.policy.proto_reader import MessageReader
from openshell_supervisor.verdict.decide import build_generation, decide
from openshell_supervisor.verdict.facts import Facts, TargetError, canonical_host

labels = st.text("aZ0-_.:[]%*x1f", max_size=24)
names = st.lists(st.text("abXY09-_", min_size=1, max_size=6), min_size=1, max_size=4).map(".".join)
addresses = st.ip_addresses().map(str)
brackets = st.ip_addresses(v=6).map(lambda address: f"[{address.exploded}]")
mapped = st.ip_addresses(v=4).map(lambda address: f"[::ffff:{address}]")
hosts = names | names.map("{}.".format) | addresses | brackets | mapped | labels


@settings(max_examples=600, deadline=None)
@given(hosts)
def test_a_canonical_host_is_one_in_either_case_and_stays(host: str) -> None:
    """Once canonical it does not change again, and how it was spelled is gone: upper and lower case come to the same."""
    try:
        form = canonical_host(host)
    except TargetError:
        for other in (host.upper(), host.lower()):
            assert not _accepted(other)
        return
    assert canonical_host(form) == form == form.lower()
    assert canonical_host(host.upper()) == canonical_host(host.lower()) == form
    assert not set(form) & set("[]%*/ ")


def _accepted(host: str) -> bool:
    try:
        canonical_host(host)
    except TargetError:
        return False
    return True


@settings(max_examples=200, deadline=None)
@given(st.ip_addresses(v=6))
def test_every_spelling_of_an_address_is_one_host(address: ipaddress.IPv6Address) -> None:
    """Long or short, bare or in brackets; its neighbour is another host."""
    forms = {canonical_host(form) for form in (str(address), address.exploded, f"[{address}]", f"[{address.exploded}]")}
    assert len(forms) == 1
    neighbour = ipaddress.IPv6Address(int(address) ^ 1)
    assert canonical_host(str(neighbour)) not in forms


@settings(max_examples=300, deadline=None)
@given(worlds.policies)
def test_a_normalised_policy_stays_as_it_is(policy: SandboxPolicy) -> None:
    """Writing presets out happens once; rules stay in key order."""
    once = normalise(policy)
    assert normalise(once) == once
    assert list(once.network_policies) == sorted(policy.network_policies)


@settings(max_examples=300, deadline=None)
@given(st.text("/.ab ", max_size=16))
def test_a_normal_path_stays_as_it_is(path: str) -> None:
    """One leading separator, none at the end, none twice; a second time changes nothing."""
    once = normal_path(path)
    assert normal_path(once) == once
    assert "//" not in once and (once == "/" or not once.endswith("/"))


@settings(max_examples=300, deadline=None)
@given(worlds.policies | worlds.policies.map(worlds.open_world), st.lists(worlds.facts, min_size=1, max_size=4))
def test_a_policy_decides_alike_however_it_came(policy: SandboxPolicy, questions: list[Facts]) -> None:
    """From a file, or over protobuf with or without its presets written out: the same verdict with the same words."""
    plain = build_generation(policy, 1)
    sent = MessageReader().policy(to_proto(policy))
    written_out = MessageReader().policy(to_proto(normalise(policy)))
    for facts in questions:
        verdict = replace(
            decide(facts, plain), endpoints=()
        )  # they hold maps of matchers, which a message puts in order
        assert replace(decide(facts, build_generation(sent, 1)), endpoints=()) == verdict
        assert decide(facts, build_generation(written_out, 1)).allow is verdict.allow


@settings(max_examples=300, deadline=None)
@given(worlds.policies.map(worlds.open_world), worlds.facts, st.data())
def test_taking_a_rule_away_never_allows_more(policy: SandboxPolicy, facts: Facts, data: st.DataObject) -> None:
    """The counterpart of adding a denial: an endpoint's allow rule, or a whole named rule, that goes only takes away.

    Inspected endpoints excepted: where one goes, the requests that it held back are no longer asked about.
    """
    keys = [key for key, rule in policy.network_policies.items() if not any(e.inspected for e in rule.endpoints)]
    places = [
        (key, at, number)
        for key, rule in policy.network_policies.items()
        for at, e in enumerate(rule.endpoints)
        for number in range(len(e.rules) if len(e.rules) > 1 else 0)
    ]
    assume(keys or places)
    choice = data.draw(st.sampled_from([*keys, *places]))
    rules = dict(policy.network_policies)
    if isinstance(choice, str):
        del rules[choice]
    else:
        key, at, number = choice
        endpoints = list(rules[key].endpoints)
        left = tuple(rule for index, rule in enumerate(endpoints[at].rules) if index != number)
        endpoints[at] = replace(endpoints[at], rules=left)
        rules[key] = replace(rules[key], endpoints=tuple(endpoints))
    before = decide(facts, build_generation(policy, 1))
    after = decide(facts, build_generation(replace(policy, network_policies=rules), 1))
    assert before.allow or not after.allow or before.reason_id == "engine_error"
