"""A policy on the wire: the numbers are the protocol's, nothing is lost on the way, and a message may say no more than a file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import documents
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import assume, given, settings

from openshell_supervisor.errors import PolicyError
from openshell_supervisor.policy._generated import sandbox_pb2 as pb
from openshell_supervisor.policy.defaults import default_policy
from openshell_supervisor.policy.document import compose
from openshell_supervisor.policy.model import (
    Binary,
    Endpoint,
    FilesystemPolicy,
    L7Allow,
    Middleware,
    NetworkRule,
    SandboxPolicy,
)
from openshell_supervisor.policy.proto import from_proto, load_message, to_proto
from openshell_supervisor.policy.proto_reader import MessageReader
from openshell_supervisor.policy.reader import read_policy
from openshell_supervisor.policy.reading import Reading
from openshell_supervisor.policy.validate import problems_of
from openshell_supervisor.policy.yaml_file import parse

OURS = {("FilesystemPolicy", "include_workdir_unsaid"), ("SandboxPolicy", "network")}
"""What proto/README.md lists as added to the protocol's messages."""
TYPES = {
    name.removeprefix("TYPE_").lower(): number for name, number in vars(FieldDescriptor).items() if "TYPE_" in name
}


def test_the_generated_code_is_that_of_the_proto_file(repo_root: Path) -> None:
    """`make proto` has been run since the file was last changed."""
    done = subprocess.run(
        [sys.executable, repo_root / "scripts/generate_proto.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def written(field: FieldDescriptor) -> str:
    """A field's type as the contract writes it: `repeated string`, `map<string,X>`, `optional bool`."""

    def plain(f: FieldDescriptor) -> str:
        if f.message_type:
            return f.message_type.full_name.removeprefix("openshell.sandbox.v1.")
        return next(name for name, number in TYPES.items() if number == f.type)

    if field.message_type and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return f"map<{plain(key)},{plain(value)}>"
    if field.is_repeated:
        return f"repeated {plain(field)}"
    presence = field.has_presence and not field.message_type
    return f"{'optional ' if presence else ''}{plain(field)}"


def reached(message: Descriptor, found: dict[str, Descriptor]) -> dict[str, Descriptor]:
    """The messages of the protocol that `message` reaches, by name; what we added is not followed."""
    if message.full_name.startswith("openshell.") and message.name not in found:
        if not message.GetOptions().map_entry:
            found[message.name] = message
        for field in message.fields:
            if field.message_type and (message.name, field.name) not in OURS:
                reached(field.message_type, found)
    return found


def test_numbers_and_types_are_the_protocols(shared_dir: Path) -> None:
    """Every message that a policy reaches has the fields of the contract's list, and nothing else below number 1000."""
    text = (shared_dir / "reference/contract.md").read_text("utf-8")
    messages = reached(pb.SandboxPolicy.DESCRIPTOR, {})
    assert len(messages) == 16
    for name, message in messages.items():
        listed = re.search(rf"^\*\*openshell\.sandbox\.v1\.{name}\*\*.*\n((?:- .*\n)+)", text, re.M)
        assert listed, name
        theirs = set(re.findall(r"^- (\d+) `(\w+)`: ((?:(?:repeated|optional) )?[\w.<>,]+)", listed[1], re.M))
        ours = {(str(f.number), f.name, written(f)) for f in message.fields if (name, f.name) not in OURS}
        assert ours == theirs
        assert all(f.number >= 1000 for f in message.fields if (name, f.name) in OURS)


@settings(max_examples=400, deadline=None)
@given(documents.anything)
def test_nothing_is_lost_on_the_way(document: dict[str, Any]) -> None:
    """YAML -> model -> protobuf -> bytes -> protobuf -> model is the identity, for every section and key."""
    policy = read_policy(compose(text_of(document)), Reading())
    assume(not shorthand_with_rules(policy))
    message = pb.SandboxPolicy.FromString(to_proto(policy).SerializeToString())
    assert MessageReader().policy(message) == policy


def text_of(document: dict[str, Any]) -> str:
    """A document as YAML (JSON is YAML)."""
    return json.dumps(document, ensure_ascii=False)


def shorthand_with_rules(policy: SandboxPolicy) -> bool:
    """True where a preset, or every MCP method, stands beside rules that it could have been written out to."""
    endpoints = [e for rule in policy.network_policies.values() for e in rule.endpoints if e.rules]
    return any(e.access or (e.protocol == "mcp" and e.rules[0].method == "*") for e in endpoints)


@settings(max_examples=300, deadline=None)
@given(documents.anything | documents.tidy)
def test_both_forms_have_the_same_faults(document: dict[str, Any]) -> None:
    """A message is refused for exactly what its YAML is refused for, with the same codes, words and paths."""
    reading = Reading()
    policy = read_policy(compose(text_of(document)), reading)
    assume(not reading.problems and not shorthand_with_rules(policy))
    expected = problems_of(policy)
    try:
        assert from_proto(to_proto(policy)) == policy
        found: tuple[Any, ...] = ()
    except PolicyError as error:
        found = error.problems
    assert list(found) == expected[:200]


@settings(max_examples=300, deadline=None)
@given(documents.tidy)
def test_a_loaded_policy_arrives_as_it_was(document: dict[str, Any]) -> None:
    """With presets written out too: what `parse` gives, `load_message` gives again, warnings included."""
    try:
        loaded = parse(text_of(document))
    except PolicyError:
        assume(False)
        raise
    again = load_message(to_proto(loaded.policy), "gateway")
    assert again.policy == loaded.policy
    assert again.source == "gateway"
    codes = {problem.code for problem in again.warnings}
    assert codes == {problem.code for problem in loaded.warnings if problem.code != "port_ignored"}


def test_an_ordinary_message() -> None:
    """A message as a gateway makes it, read by hand: presets, marks and presence mean what the protocol says."""
    endpoint = pb.NetworkEndpoint(
        host="api.example.com", port=443, protocol="rest", access="read-only", advisor_proposed=True
    )
    rule = pb.NetworkPolicyRule(endpoints=[endpoint], binaries=[pb.NetworkBinary(path="/usr/bin/curl", harness=True)])
    message = pb.SandboxPolicy(version=1, filesystem=pb.FilesystemPolicy(), network_policies={"b": rule, "a": rule})
    policy = from_proto(message)
    assert list(policy.network_policies) == ["a", "b"]
    assert policy.network_policies["a"] == NetworkRule(
        endpoints=(Endpoint(host="api.example.com", ports=(443,), protocol="rest", access="read-only", advisor_proposed=True),),
        binaries=(Binary("/usr/bin/curl", advisor_proposed=True),),
    )  # fmt: skip
    assert policy.filesystem == FilesystemPolicy(include_workdir=False)
    assert (policy.landlock, policy.process, policy.network) == (None, None, None)
    loaded = load_message(message, "gateway").policy
    assert [rule.method for rule in loaded.network_policies["a"].endpoints[0].rules] == ["GET", "HEAD", "OPTIONS"]
    assert not to_proto(loaded).network_policies["a"].endpoints[0].rules


def test_several_ports_win_over_one() -> None:
    """`ports` counts where it is written; we send the first as `port` too, for readers that know only that."""
    assert MessageReader().endpoint(pb.NetworkEndpoint(port=80, ports=[443, 8443]), "e").ports == (443, 8443)
    assert MessageReader().endpoint(pb.NetworkEndpoint(port=80), "e").ports == (80,)
    sent = to_proto(SandboxPolicy(network_policies={"a": NetworkRule(endpoints=(Endpoint(ports=(443, 8443)),))}))
    assert (sent.network_policies["a"].endpoints[0].port, list(sent.network_policies["a"].endpoints[0].ports)) == (
        443,
        [443, 8443],
    )


@pytest.mark.parametrize(
    ("endpoint", "code", "path"),
    [
        (pb.NetworkEndpoint(host="a\x1b.test"), "control_character", "host"),
        (pb.NetworkEndpoint(path="/a\n"), "control_character", "path"),
        (pb.NetworkEndpoint(ports=[70000]), "port_invalid", ""),
        (pb.NetworkEndpoint(rules=[pb.L7Rule()]), "missing_field", "rules[0]"),
        (
            pb.NetworkEndpoint(deny_rules=[pb.L7DenyRule(query={"q": pb.L7QueryMatcher()})]),
            "empty_matcher",
            "deny_rules[0].query.q",
        ),
        (
            pb.NetworkEndpoint(deny_rules=[pb.L7DenyRule(query={"q": pb.L7QueryMatcher(glob="a", any=["b"])})]),
            "bad_matcher",
            "deny_rules[0].query.q",
        ),
        (
            pb.NetworkEndpoint(deny_rules=[pb.L7DenyRule(query={"q": pb.L7QueryMatcher(any=[""])})]),
            "empty_matcher",
            "deny_rules[0].query.q",
        ),
        (
            pb.NetworkEndpoint(graphql_persisted_queries={"": pb.GraphqlOperation()}),
            "bad_key",
            "graphql_persisted_queries",
        ),
    ],
)
def test_what_no_file_could_say_is_refused(endpoint: pb.NetworkEndpoint, code: str, path: str) -> None:
    """Faults that only a message can have are found beside all the others, with a path into the document."""
    good = pb.NetworkEndpoint(host="a.example.com", port=443, protocol="rest", access="read-only")
    message = pb.SandboxPolicy(version=1, network_policies={"p": pb.NetworkPolicyRule(endpoints=[good])})
    assert from_proto(message)
    bad = pb.NetworkEndpoint()
    bad.CopyFrom(good)
    bad.MergeFrom(endpoint)
    message.network_policies["p"].endpoints.append(bad)
    message.process.run_as_user = "root"
    with pytest.raises(PolicyError) as caught:
        from_proto(message)
    found = {(problem.code, problem.path) for problem in caught.value.problems}
    assert (code, f"network_policies.p.endpoints[1]{'.' if path else ''}{path}") in found
    assert ("bad_identity", "process.run_as_user") in found


def test_an_unknown_word_for_netlink_is_refused_and_denies() -> None:
    """A number that this version does not know is a fault; the neighbours that it knows are none."""
    for number, allowed in ((0, "denied"), (1, "route"), (2, "allowed")):
        assert (
            from_proto(pb.SandboxPolicy(version=1, network=pb.NetworkOptions(allow_netlink=number))).netlink == allowed
        )  # type: ignore[arg-type]
    message = pb.SandboxPolicy(version=1, network=pb.NetworkOptions(allow_netlink=7))  # type: ignore[arg-type]
    with pytest.raises(PolicyError) as caught:
        from_proto(message)
    assert [problem.path for problem in caught.value.problems] == ["network.allow_netlink"]


def test_a_reader_that_knows_only_the_protocol_loses_nothing_but_our_additions() -> None:
    """Dropping the fields from 1000 on leaves a policy that allows no more than before."""
    policy = replace(
        default_policy(), network=read_policy(compose("version: 1\nnetwork: {allow_netlink: route}"), Reading()).network
    )
    message = to_proto(replace(policy, filesystem=FilesystemPolicy(None, ("/usr",), ("/tmp",))))
    message.ClearField("network")
    message.filesystem.ClearField("include_workdir_unsaid")
    assert from_proto(message) == replace(policy, network=None, filesystem=FilesystemPolicy(True, ("/usr",), ("/tmp",)))


@pytest.mark.parametrize(
    "policy",
    [
        SandboxPolicy(version=-1),
        SandboxPolicy(version=2**32),
        SandboxPolicy(network_policies={"a": NetworkRule(endpoints=(Endpoint(host="\ud800"),))}),
        SandboxPolicy(network_policies={"a": NetworkRule(endpoints=(Endpoint(rules=(L7Allow("\udfff"),)),))}),
        SandboxPolicy(network_middlewares={"a": Middleware("x", config={"n": 2**53 + 1})}),
        SandboxPolicy(network_middlewares={"a": Middleware("x", config={"n": 10**400})}),
        SandboxPolicy(network_middlewares={"a": Middleware("x", config={"n": object()})}),
    ],
    ids=["version", "large version", "surrogate host", "surrogate method", "inexact", "huge", "no JSON"],
)
def test_what_has_no_form_on_the_wire_is_a_policy_error(policy: SandboxPolicy) -> None:
    """Never another exception, and never a silent change of the value."""
    assert to_proto(SandboxPolicy(network_middlewares={"a": Middleware("x", config={"n": 2**53})}))
    with pytest.raises(PolicyError) as caught:
        to_proto(policy)
    assert [problem.code for problem in caught.value.problems] == ["not_representable"]
