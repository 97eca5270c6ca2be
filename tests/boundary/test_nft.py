"""The fence as the kernel has it: what `nft` lists, what a poor kernel leaves out, what is noticed when it is not
there."""

from __future__ import annotations

import ipaddress
import re
import struct
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openshell_supervisor.boundary import nft
from openshell_supervisor.boundary.netlink import (
    NETLINK_NETFILTER,
    Message,
    Netlink,
    NetlinkError,
    attribute,
    attributes,
    messages,
    nested,
)
from openshell_supervisor.boundary.nft import Rule

in_namespace = pytest.mark.usefixtures("outer_namespace")
Shell = Callable[[str], str]

PROXY = ipaddress.IPv4Address("10.200.0.1")
PREFIX = "openshell:bypass:sandbox-1c9e44a7:"
RULES = nft.ruleset(PROXY, 3128, PREFIX)
LIMITED_LOG = f'limit rate 5/second burst 10 packets log prefix "{PREFIX}" group 1'
LISTED = [
    "type filter hook output priority filter; policy drop;",
    "ip daddr 10.200.0.1 tcp dport 3128 accept",
    'oifname "lo" accept',
    "ct state established,related accept",
    f"tcp flags syn {LIMITED_LOG}",
    "meta l4proto tcp reject with icmp port-unreachable",
    "meta l4proto tcp reject with icmpv6 port-unreachable",
    f"meta l4proto udp {LIMITED_LOG}",
    "meta l4proto udp reject with icmp port-unreachable",
    "meta l4proto udp reject with icmpv6 port-unreachable",
    f"meta skuid >= 0 {LIMITED_LOG}",
    "drop",
]


def listed(shell: Shell) -> list[str]:
    """The lines of the chain as `nft` writes them, or nothing when there is no table."""
    text = shell("nft list ruleset")
    # nft from 1.0.7 spells a one-family reject with its family, older ones leave it out.
    text = re.sub(r"meta nfproto ipv[46] ", "", text)
    return [line.strip() for line in text.splitlines()[2:-2]]


@pytest.fixture
def netfilter(outer_namespace: None) -> Iterator[Netlink]:
    with Netlink(NETLINK_NETFILTER) as netlink:
        yield netlink


def test_order_and_weight_of_the_rules() -> None:
    """Proxy, loopback, established, then each log before the rejects it tells of, then the end of everything else."""
    assert [(rule.name, rule.required) for rule in RULES] == [
        ("proxy", True),
        ("loopback", True),
        ("established", False),
        ("log_tcp", False),
        ("reject_tcp4", True),
        ("reject_tcp6", True),
        ("log_udp", False),
        ("reject_udp4", True),
        ("reject_udp6", True),
        ("log_other", False),
        ("drop_other", True),
    ]


@pytest.mark.root
def test_the_kernel_has_what_nft_would_have_written(netfilter: Netlink, shell: Shell) -> None:
    """`nft` lists the chain as upstream's commands would have made it, closed and with a last rule that drops."""
    fence = nft.install(netfilter, RULES)
    assert listed(shell) == LISTED
    assert fence.installed == tuple(rule.name for rule in RULES)
    assert fence.left_out == {}


@pytest.mark.root
@pytest.mark.parametrize(("address", "port"), [("10.200.255.1", 1), ("10.200.7.1", 65535)])
def test_the_way_to_the_proxy_is_exact(netfilter: Netlink, shell: Shell, address: str, port: int) -> None:
    """Address and port are the given ones."""
    nft.install(netfilter, nft.ruleset(ipaddress.IPv4Address(address), port, PREFIX))
    assert listed(shell)[1] == f"ip daddr {address} tcp dport {port} accept"


@pytest.mark.root
@pytest.mark.parametrize("prefix", ["", 'a"b', "x" * 127, "y" * 300, "ü" * 80])
def test_any_prefix_gives_a_fence(netfilter: Netlink, prefix: str) -> None:
    """A prefix with quotes, without end or not ASCII never costs the fence a rule that refuses."""
    fence = nft.install(netfilter, nft.ruleset(PROXY, 3128, prefix))
    assert {rule.name for rule in RULES if rule.required} <= set(fence.installed)


@pytest.mark.root
def test_optional_rules_that_the_kernel_refuses_are_left_out_together(netfilter: Netlink, shell: Shell) -> None:
    """The refusals are named with their errno, and the rest stands in its order."""
    poor = [Rule(r.name, (("no_such_thing", b""),), False) if not r.required else r for r in RULES]
    fence = nft.install(netfilter, tuple(poor))
    optional = {rule.name for rule in RULES if not rule.required}
    assert fence.left_out == dict.fromkeys(optional, 2)
    assert listed(shell) == [line for line in LISTED if "log" not in line and "ct state" not in line]


@pytest.mark.root
def test_a_refused_required_rule_leaves_no_table(netfilter: Netlink, shell: Shell) -> None:
    """All or nothing: with one required rule refused not even the table stays."""
    poor = tuple(Rule(r.name, (("no_such_thing", b""),)) if r.name == "reject_udp6" else r for r in RULES)
    with pytest.raises(NetlinkError) as caught:
        nft.install(netfilter, poor)
    assert (caught.value.errno, caught.value.operation) == (2, "NFT_MSG_NEWRULE reject_udp6")
    assert shell("nft list ruleset") == ""


class Forgetful(Netlink):
    """A kernel that acknowledges everything and does less; no real one is at hand, so a message is changed on its
    way."""

    def __init__(self, change: Callable[[Message], Message | None]) -> None:
        super().__init__(NETLINK_NETFILTER)
        self.change = change

    def transaction(self, begin: Message, steps: Sequence[Message], end: Message) -> dict[int, NetlinkError]:
        changed = [step for step in (self.change(step) for step in steps) if step is not None]
        return super().transaction(begin, changed, end)


@pytest.mark.root
@in_namespace
@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_a_rule_that_is_not_there_is_noticed(rule: str) -> None:
    """An acknowledged rule that the kernel does not show makes the fence an error."""
    with Forgetful(lambda step: None if step.operation.endswith(f" {rule}") else step) as netlink:
        with pytest.raises(NetlinkError, match=r"is not what was sent|rules instead of"):
            nft.install(netlink, RULES)


def verdict(code: int) -> bytes:
    """How a rule's verdict is written: 0 drops, 1 accepts."""
    return nested(2, attribute(1, struct.pack("!i", code)))


@pytest.mark.root
@in_namespace
@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        pytest.param("proxy", PROXY.packed, bytes(4), id="address"),
        pytest.param("proxy", struct.pack("!H", 3128), struct.pack("!H", 3129), id="port"),
        pytest.param("loopback", b"lo".ljust(16, b"\0"), b"l".ljust(16, b"\0"), id="link"),
        pytest.param("reject_tcp6", attribute(2, b"\4"), attribute(2, b"\1"), id="answer"),
        pytest.param("drop_other", verdict(0), verdict(1), id="verdict"),
    ],
)
def test_a_rule_that_says_something_else_is_noticed(rule: str, old: bytes, new: bytes) -> None:
    """A rule whose address, port, link, answer or verdict is not the one sent makes the fence an error."""

    def twisted(step: Message) -> Message:
        if not step.operation.endswith(f" {rule}"):
            return step
        assert old in step.body
        return Message(step.operation, step.kind, step.body.replace(old, new), step.flags)

    with Forgetful(twisted) as netlink, pytest.raises(NetlinkError, match=f"rule {rule} is not what was sent"):
        nft.install(netlink, RULES)


@pytest.mark.root
@in_namespace
def test_a_chain_that_is_open_is_noticed() -> None:
    """A chain whose policy is accept is not the one that was asked for."""

    def opened(step: Message) -> Message:
        closed, accept = attribute(5, struct.pack("!I", 0)), attribute(5, struct.pack("!I", 1))
        if step.operation != "NFT_MSG_NEWCHAIN":
            return step
        assert closed in step.body
        return Message(step.operation, step.kind, step.body.replace(closed, accept), step.flags)

    with Forgetful(opened) as netlink, pytest.raises(NetlinkError, match="not closed"):
        nft.install(netlink, RULES)


@pytest.mark.root
def test_a_refused_message_says_what_the_kernel_said(netfilter: Netlink) -> None:
    """The error carries the operation, the errno and the kernel's text."""
    with pytest.raises(NetlinkError) as caught:
        netfilter.request(Message("NFT_MSG_GETTABLE", 10 << 8 | 1, b"\x01\0\0\0" + attribute(1, b"nothing\0")))
    assert (caught.value.operation, caught.value.errno) == ("NFT_MSG_GETTABLE", 2)
    assert "No such file" in str(caught.value)


@given(st.binary(max_size=200))
def test_framing_takes_any_bytes(data: bytes) -> None:
    """Whatever the bytes are, they are read as attributes and messages without an error and without going past them."""
    for _, payload in attributes(data):
        assert len(payload) <= len(data)
    for _, _, _, body in messages(data):
        assert len(body) <= len(data)


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=8))
def test_attributes_come_back_as_they_were_put(wanted: list[tuple[int, bytes]]) -> None:
    """Encoding and reading attributes are each other's inverse, nested or not."""
    data = b"".join(attribute(kind, payload) for kind, payload in wanted)
    assert list(attributes(data)) == wanted
    assert list(attributes(nested(5, data))) == [(5, data)]
