"""The fence inside the workload's namespace: one nftables table that lets nothing out but TCP to the proxy.

Written over netlink, so that no `nft` binary is needed. The rules are a list in the order of the kernel's evaluation;
the whole of it is one transaction. A rule that only reports or speeds up may be refused by a poor kernel: it is then
left out and the transaction is sent again, so there is never a moment with half a fence. What was installed is read
back and compared expression by expression. This module does not know how the namespace came to be, nor who reads the
log.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from dataclasses import dataclass

from openshell_supervisor.boundary.netlink import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    Message,
    Netlink,
    NetlinkError,
    attribute,
    attributes,
    nested,
)

TABLE = "openshell_bypass"
CHAIN = "output"
# The group is private to the namespace; nobody else can listen there.
LOG_GROUP = 1
# How often a rule reports, per second; the refusal itself is never limited (upstream's numbers).
LOG_RATE = 5
LOG_BURST = 10
# NF_LOG_PREFIXLEN is 128 with the terminating zero (include/uapi/linux/netfilter/nf_log.h).
LOG_PREFIX_LIMIT = 127

# include/uapi/linux/netfilter.h, nfnetlink.h, nf_tables.h
_NFPROTO_INET, _NFPROTO_IPV4, _NFPROTO_IPV6 = 1, 2, 10
_NF_INET_LOCAL_OUT = 3
_NF_DROP, _NF_ACCEPT = 0, 1
_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _NEWCHAIN, _GETCHAIN, _NEWRULE, _GETRULE = (_SUBSYSTEM << 8 | n for n in (0, 3, 4, 6, 7))
_VERDICT_REGISTER, _REGISTER = 0, 1
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_EQUAL, _NOT_EQUAL, _AT_LEAST = 0, 1, 5
_META_OIFNAME, _META_SKUID, _META_NFPROTO, _META_L4PROTO = 7, 10, 15, 16
_CT_STATE = 0
_CT_ESTABLISHED_OR_RELATED = 0b110
_TCP_SYN = 0x02
_REJECT_ICMP_UNREACHABLE = 0
_ICMP_PORT_UNREACHABLE, _ICMPV6_PORT_UNREACHABLE = 3, 4
_DATA_VALUE, _DATA_VERDICT = 1, 2
_CMP_DATA, _IMMEDIATE_DATA, _BITWISE_MASK, _BITWISE_XOR = 3, 2, 4, 5
# Attributes that hold attributes, by expression; needed to compare what we sent with what the kernel shows.
_NESTED_IN = {"cmp": {_CMP_DATA}, "immediate": {_IMMEDIATE_DATA}, "bitwise": {_BITWISE_MASK, _BITWISE_XOR}}

type Expression = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: its name in reports, its expressions in order, and whether the fence is a fence without it."""

    name: str
    expressions: tuple[Expression, ...]
    required: bool = True


@dataclass(frozen=True, slots=True)
class Fence:
    """What was installed and read back: the names of the rules, and of those left out with the errno of the refusal."""

    installed: tuple[str, ...]
    left_out: dict[str, int]


def ruleset(proxy: ipaddress.IPv4Address, port: int, log_prefix: str) -> tuple[Rule, ...]:
    """The rules of the chain in order; a packet that meets none of them is dropped."""
    prefix = log_prefix[:LOG_PREFIX_LIMIT]
    return (
        _to_proxy(proxy, port),
        Rule("loopback", (_meta(_META_OIFNAME), _compare(b"lo".ljust(16, b"\0")), _verdict(_NF_ACCEPT))),
        Rule(
            "established",
            (_ct_state(), *_any_bit(struct.pack("=I", _CT_ESTABLISHED_OR_RELATED)), _verdict(_NF_ACCEPT)),
            False,
        ),
        Rule(
            "log_tcp",
            (
                *_protocol(socket.IPPROTO_TCP),
                _payload(_TRANSPORT_HEADER, 13, 1),
                *_any_bit(bytes([_TCP_SYN])),
                _limit(),
                _log(prefix),
            ),
            required=False,
        ),
        _reject("tcp", 4),
        _reject("tcp", 6),
        Rule("log_udp", (*_protocol(socket.IPPROTO_UDP), _limit(), _log(prefix)), False),
        _reject("udp", 4),
        _reject("udp", 6),
        # Only what a socket of a process sent: the kernel's own multicast chatter is no attempt to get out.
        Rule("log_other", (_meta(_META_SKUID), _compare(bytes(4), _AT_LEAST), _limit(), _log(prefix)), False),
        Rule("drop_other", (_verdict(_NF_DROP),)),
    )


def install(netlink: Netlink, rules: tuple[Rule, ...]) -> Fence:
    """Install the rules through a NETLINK_NETFILTER conversation opened in the namespace, and read them back.

    Raises `NetlinkError` when a required rule is refused or what is there afterwards is not what was sent.
    """
    left_out: dict[str, int] = {}
    while True:
        wanted = tuple(rule for rule in rules if rule.name not in left_out)
        refused = netlink.transaction(_batch(_BATCH_BEGIN), _steps(wanted), _batch(_BATCH_END))
        if not refused:
            break
        for index, error in sorted(refused.items()):
            if index < 2 or wanted[index - 2].required:
                raise error
            left_out[wanted[index - 2].name] = error.errno or 0
    _verify(netlink, wanted)
    return Fence(tuple(rule.name for rule in wanted), left_out)


def _steps(rules: tuple[Rule, ...]) -> list[Message]:
    table = attribute(1, _text(TABLE))
    hook = nested(4, attribute(1, _be32(_NF_INET_LOCAL_OUT)), attribute(2, _be32(0)))
    # Closed before the first rule is read: the chain's own policy is drop, beside the final rule that says so.
    chain = attribute(1, _text(TABLE)) + attribute(3, _text(CHAIN)) + hook
    chain += attribute(5, _be32(_NF_DROP)) + attribute(7, _text("filter"))
    steps = [
        Message("NFT_MSG_NEWTABLE", _NEWTABLE, _header() + table, NLM_F_CREATE),
        Message("NFT_MSG_NEWCHAIN", _NEWCHAIN, _header() + chain, NLM_F_CREATE),
    ]
    for rule in rules:
        body = _header() + attribute(1, _text(TABLE)) + attribute(2, _text(CHAIN))
        body += nested(4, *(nested(1, attribute(1, _text(name)), nested(2, data)) for name, data in rule.expressions))
        steps.append(Message(f"NFT_MSG_NEWRULE {rule.name}", _NEWRULE, body, NLM_F_CREATE | NLM_F_APPEND))
    return steps


def _verify(netlink: Netlink, rules: tuple[Rule, ...]) -> None:
    """Raise `NetlinkError` (EBADMSG) unless the chain is hooked and closed and holds exactly these rules in order."""
    place = attribute(1, _text(TABLE)) + attribute(2, _text(CHAIN))
    found = netlink.dump(Message("NFT_MSG_GETRULE", _GETRULE, _header() + place))
    there = [_expressions(body) for body in found]
    sent = [[(name, _plain(name, data)) for name, data in rule.expressions] for rule in rules]
    for rule, ours, theirs in zip(rules, sent, [*there, *([[]] * len(sent))], strict=False):
        same_names = [name for name, _ in ours] == [name for name, _ in theirs]
        if not same_names or any(not a.items() <= b.items() for (_, a), (_, b) in zip(ours, theirs, strict=True)):
            raise NetlinkError(errno.EBADMSG, "NFT_MSG_GETRULE", f"rule {rule.name} is not what was sent")
    if len(there) != len(sent):
        raise NetlinkError(errno.EBADMSG, "NFT_MSG_GETRULE", f"{len(there)} rules instead of {len(sent)}")
    chains = netlink.dump(Message("NFT_MSG_GETCHAIN", _GETCHAIN, _header()))
    if not any(_is_closed_output_chain(dict(attributes(body[4:]))) for body in chains):
        raise NetlinkError(errno.EBADMSG, "NFT_MSG_GETCHAIN", "the chain is not hooked or not closed")


def _is_closed_output_chain(chain: dict[int, bytes]) -> bool:
    hook = dict(attributes(chain.get(4, b"")))
    return (
        chain.get(1) == _text(TABLE)
        and chain.get(3) == _text(CHAIN)
        and chain.get(7) == _text("filter")
        and chain.get(5) == _be32(_NF_DROP)
        and hook.get(1) == _be32(_NF_INET_LOCAL_OUT)
        and hook.get(2) == _be32(0)
    )


def _expressions(body: bytes) -> list[tuple[str, dict[object, object]]]:
    """The expressions of a dumped rule, each with its attributes in plain form."""
    rule = dict(attributes(body[4:]))
    found = []
    for _, element in attributes(rule.get(4, b"")):
        parts = dict(attributes(element))
        name = parts.get(1, b"").rstrip(b"\0").decode("ascii", "replace")
        found.append((name, _plain(name, parts.get(2, b""))))
    return found


def _plain(name: str, data: bytes) -> dict[object, object]:
    """Attributes as a dict, nested ones resolved, so that order and the kernel's own additions do not matter."""
    plain: dict[object, object] = {}
    for kind, payload in attributes(data):
        if kind in _NESTED_IN.get(name, ()):
            inner = dict(attributes(payload))
            plain[kind] = (inner.get(_DATA_VALUE), tuple(attributes(inner.get(_DATA_VERDICT, b""))))
        else:
            plain[kind] = payload
    return plain


def _header(resource: int = 0) -> bytes:
    """struct nfgenmsg."""
    return struct.pack("!BBH", _NFPROTO_INET, 0, resource)


def _batch(kind: int) -> Message:
    name = "NFNL_MSG_BATCH_BEGIN" if kind == _BATCH_BEGIN else "NFNL_MSG_BATCH_END"
    return Message(name, kind, struct.pack("!BBH", socket.AF_UNSPEC, 0, _SUBSYSTEM))


def _be32(value: int) -> bytes:
    return struct.pack("!I", value)


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


def _meta(key: int) -> Expression:
    return "meta", attribute(2, _be32(key)) + attribute(1, _be32(_REGISTER))


def _payload(base: int, offset: int, length: int) -> Expression:
    values = (_REGISTER, base, offset, length)
    return "payload", b"".join(attribute(kind, _be32(value)) for kind, value in enumerate(values, 1))


def _ct_state() -> Expression:
    return "ct", attribute(2, _be32(_CT_STATE)) + attribute(1, _be32(_REGISTER))


def _compare(value: bytes, operation: int = _EQUAL) -> Expression:
    data = nested(_CMP_DATA, attribute(_DATA_VALUE, value))
    return "cmp", attribute(1, _be32(_REGISTER)) + attribute(2, _be32(operation)) + data


def _any_bit(mask: bytes) -> tuple[Expression, Expression]:
    """True when the register has one of the bits of `mask`."""
    zero = bytes(len(mask))
    data = b"".join(attribute(kind, _be32(value)) for kind, value in ((1, _REGISTER), (2, _REGISTER), (3, len(mask))))
    data += nested(_BITWISE_MASK, attribute(_DATA_VALUE, mask)) + nested(_BITWISE_XOR, attribute(_DATA_VALUE, zero))
    return ("bitwise", data), _compare(zero, _NOT_EQUAL)


def _family(family: int) -> tuple[Expression, Expression]:
    return _meta(_META_NFPROTO), _compare(bytes([family]))


def _protocol(number: int) -> tuple[Expression, Expression]:
    return _meta(_META_L4PROTO), _compare(bytes([number]))


def _limit() -> Expression:
    rate, per_seconds = (struct.pack("!Q", value) for value in (LOG_RATE, 1))
    packets = attribute(4, _be32(0))
    return "limit", attribute(1, rate) + attribute(2, per_seconds) + attribute(3, _be32(LOG_BURST)) + packets


def _log(prefix: str) -> Expression:
    return "log", attribute(1, struct.pack("!H", LOG_GROUP)) + attribute(2, _text(prefix))


def _verdict(code: int) -> Expression:
    verdict = nested(_DATA_VERDICT, attribute(1, struct.pack("!i", code)))
    return "immediate", attribute(1, _be32(_VERDICT_REGISTER)) + nested(_IMMEDIATE_DATA, verdict)


def _to_proxy(proxy: ipaddress.IPv4Address, port: int) -> Rule:
    """The one way out. Offsets: destination in the IPv4 header (RFC 791), destination port in the TCP header (RFC 9293)."""
    address = (_payload(_NETWORK_HEADER, 16, 4), _compare(proxy.packed))
    dport = (_payload(_TRANSPORT_HEADER, 2, 2), _compare(struct.pack("!H", port)))
    accept = _verdict(_NF_ACCEPT)
    return Rule("proxy", (*_family(_NFPROTO_IPV4), *address, *_protocol(socket.IPPROTO_TCP), *dport, accept))


def _reject(protocol: str, version: int) -> Rule:
    """Answer with "port unreachable": connect fails with ECONNREFUSED at once, a UDP send with EPERM."""
    number = socket.IPPROTO_TCP if protocol == "tcp" else socket.IPPROTO_UDP
    family, code = (
        (_NFPROTO_IPV4, _ICMP_PORT_UNREACHABLE) if version == 4 else (_NFPROTO_IPV6, _ICMPV6_PORT_UNREACHABLE)
    )
    reject = ("reject", attribute(1, _be32(_REJECT_ICMP_UNREACHABLE)) + attribute(2, bytes([code])))
    return Rule(f"reject_{protocol}{version}", (*_family(family), *_protocol(number), reject))
