"""The routing messages of the veth rung, written by pyroute2's codec: links, addresses, routes.

Import this module late and on the thread that builds the rung. `import pyroute2` runs a package module that loads all
the library has (its database, DHCP, nl80211, multiprocessing): 180 ms. Its codec alone takes 2 ms, so it is imported
without that package module. pyroute2's own link message pulls in the rest again; the few attributes used here are
declared below. This module writes messages and reads answers; it opens no socket and decides nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import struct
import sys
from collections.abc import Iterator

from openshell_supervisor.boundary.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, attributes

# include/uapi/linux/rtnetlink.h, if_link.h, if.h, ip.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
IFF_UP = 1
RTA_DST = 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFA_F_NOPREFIXROUTE = 0x200
RT_TABLE_MAIN = 254
RTPROT_STATIC = 4
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
RTN_UNICAST = 1
IN6_ADDR_GEN_MODE_NONE = 1
AF_INET = 2


@contextlib.contextmanager
def _package_unexecuted(name: str) -> Iterator[None]:
    """Let submodules of a package be imported without running the package's own module.

    Afterwards none of them is in `sys.modules`, so that whoever imports the package later gets it whole.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or name in sys.modules:
        yield
        return
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        for module in list(sys.modules):  # a copy in one step: other threads import meanwhile
            if module == name or module.startswith(f"{name}."):
                del sys.modules[module]


with _package_unexecuted("pyroute2"):
    from pyroute2.netlink import nla, nlmsg
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

_LINK_FIELDS = (("family", "B"), ("pad", "B"), ("type", "H"), ("index", "i"), ("flags", "I"), ("change", "I"))


class _Link(nlmsg):  # type: ignore[misc]  # pyroute2 has no types
    """struct ifinfomsg and the IFLA_* attributes used here."""

    fields = _LINK_FIELDS
    nla_map = (
        (3, "IFLA_IFNAME", "asciiz"),
        (18, "IFLA_LINKINFO", "info"),
        (26, "IFLA_AF_SPEC", "family_settings"),
        (28, "IFLA_NET_NS_FD", "uint32"),
    )

    class info(nla):  # type: ignore[misc]
        nla_map = ((1, "IFLA_INFO_KIND", "asciiz"), (2, "IFLA_INFO_DATA", "veth"))

        class veth(nla):  # type: ignore[misc]
            nla_map = ((1, "VETH_INFO_PEER", "peer"),)

            class peer(nla):  # type: ignore[misc]
                fields = _LINK_FIELDS
                nla_map = ((3, "IFLA_IFNAME", "asciiz"), (28, "IFLA_NET_NS_FD", "uint32"))

    class family_settings(nla):  # type: ignore[misc]
        nla_map = ((2, "AF_INET", "inet"), (10, "AF_INET6", "inet6"))

        class inet(nla):  # type: ignore[misc]
            nla_map = ((1, "IFLA_INET_CONF", "configuration"),)

            class configuration(nla):  # type: ignore[misc]
                # IPV4_DEVCONF_*: the sysctls net.ipv4.conf.<interface>.*
                nla_map = (
                    (1, "forwarding", "uint32"),
                    (3, "proxy_arp", "uint32"),
                    (4, "accept_redirects", "uint32"),
                    (6, "send_redirects", "uint32"),
                    (8, "rp_filter", "uint32"),
                    (9, "accept_source_route", "uint32"),
                    (26, "route_localnet", "uint32"),
                )

        class inet6(nla):  # type: ignore[misc]
            nla_map = ((8, "IFLA_INET6_ADDR_GEN_MODE", "uint8"),)


def _body(message: nlmsg, **fields: object) -> bytes:
    """What follows the netlink header of an encoded pyroute2 message."""
    message.update(fields)
    message.encode()
    return bytes(message.data[16:])


def veth_pair(host: str, workload: str, namespace_fd: int) -> Message:
    """Make both ends in one step, the workload's already inside its namespace: there is no moment to clean up after."""
    peer = {"attrs": [("IFLA_IFNAME", workload), ("IFLA_NET_NS_FD", namespace_fd)]}
    info = {
        "attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]})],
    }
    body = _body(_Link(), attrs=[("IFLA_IFNAME", host), ("IFLA_LINKINFO", info)])
    return Message("RTM_NEWLINK", RTM_NEWLINK, body, NLM_F_CREATE | NLM_F_EXCL)


def link_index(name: str) -> Message:
    """Ask for a link by name; `index_of` reads the answer."""
    return Message("RTM_GETLINK", RTM_GETLINK, _body(_Link(), attrs=[("IFLA_IFNAME", name)]))


def index_of(body: bytes) -> int:
    """The interface index in a link's body (struct ifinfomsg)."""
    return int(struct.unpack_from("=i", body, 4)[0])


def bring_up(index: int) -> Message:
    """Set a link up."""
    return Message("RTM_NEWLINK", RTM_NEWLINK, _body(_Link(), index=index, flags=IFF_UP, change=IFF_UP))


def delete_link(name: str) -> Message:
    """Delete a link by name; a veth takes its peer along."""
    return Message("RTM_DELLINK", RTM_DELLINK, _body(_Link(), attrs=[("IFLA_IFNAME", name)]))


def no_ipv6_address(index: int) -> Message:
    """Keep the kernel from giving the link an IPv6 address, link-local included; the link must still be down."""
    settings = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", IN6_ADDR_GEN_MODE_NONE)]})]}
    return Message("RTM_NEWLINK", RTM_NEWLINK, _body(_Link(), index=index, attrs=[("IFLA_AF_SPEC", settings)]))


def no_forwarding(index: int) -> Message:
    """IPv4 settings of the host end, gone with it: what comes in there ends there, and must come from the other end."""
    values = {
        "forwarding": 0,
        "proxy_arp": 0,
        "accept_redirects": 0,
        "send_redirects": 0,
        "rp_filter": 1,
        "accept_source_route": 0,
        "route_localnet": 0,
    }
    settings = {"attrs": [("AF_INET", {"attrs": [("IFLA_INET_CONF", {"attrs": list(values.items())})]})]}
    return Message("RTM_NEWLINK", RTM_NEWLINK, _body(_Link(), index=index, attrs=[("IFLA_AF_SPEC", settings)]))


def add_address(index: int, address: ipaddress.IPv4Interface, *, with_route: bool) -> Message:
    """Give a link an address; without `with_route` the kernel does not add the subnet's route on its own."""
    attrs = [
        ("IFA_ADDRESS", str(address.ip)),
        ("IFA_LOCAL", str(address.ip)),
        ("IFA_BROADCAST", str(address.network.broadcast_address)),
    ]
    if not with_route:
        attrs.append(("IFA_FLAGS", IFA_F_NOPREFIXROUTE))  # type: ignore[arg-type]
    body = _body(ifaddrmsg(), family=AF_INET, prefixlen=address.network.prefixlen, index=index, attrs=attrs)
    return Message("RTM_NEWADDR", RTM_NEWADDR, body, NLM_F_CREATE | NLM_F_EXCL)


def claim_subnet(index: int, subnet: ipaddress.IPv4Network) -> Message:
    """The subnet's route, exclusively: the kernel answers EEXIST when anybody else holds it, at whatever moment."""
    attrs = [("RTA_TABLE", RT_TABLE_MAIN), ("RTA_DST", str(subnet.network_address)), ("RTA_OIF", index)]
    return _route(subnet.prefixlen, RT_SCOPE_LINK, attrs)


def default_route(index: int, gateway: ipaddress.IPv4Address) -> Message:
    """The default route through the other end."""
    attrs = [("RTA_TABLE", RT_TABLE_MAIN), ("RTA_GATEWAY", str(gateway)), ("RTA_OIF", index)]
    return _route(0, RT_SCOPE_UNIVERSE, attrs)


def _route(prefix_length: int, scope: int, attrs: list[tuple[str, object]]) -> Message:
    body = _body(
        rtmsg(),
        family=AF_INET,
        dst_len=prefix_length,
        table=RT_TABLE_MAIN,
        proto=RTPROT_STATIC,
        scope=scope,
        type=RTN_UNICAST,
        attrs=attrs,
    )
    return Message("RTM_NEWROUTE", RTM_NEWROUTE, body, NLM_F_CREATE | NLM_F_EXCL)


def all_addresses() -> Message:
    """Ask for every IPv4 address; `networks_in` reads the answers."""
    return Message("RTM_GETADDR", RTM_GETADDR, _body(ifaddrmsg(), family=AF_INET))


def all_routes() -> Message:
    """Ask for every IPv4 route of every table."""
    return Message("RTM_GETROUTE", RTM_GETROUTE, _body(rtmsg(), family=AF_INET))


def address_networks(bodies: list[bytes]) -> list[ipaddress.IPv4Network]:
    """The subnets of the addresses in the answers to `all_addresses`."""
    return [network for body in bodies if (network := _network(body, 8, body[1], (IFA_ADDRESS, IFA_LOCAL)))]


def route_networks(bodies: list[bytes]) -> list[ipaddress.IPv4Network]:
    """The destinations of the routes in the answers to `all_routes`, default routes left out."""
    return [network for body in bodies if (network := _network(body, 12, body[1], (RTA_DST,)))]


def _network(body: bytes, skip: int, prefix_length: int, kinds: tuple[int, ...]) -> ipaddress.IPv4Network | None:
    # Read by hand: a host with a full routing table has a million of these, and the codec takes 0.1 ms for each.
    if prefix_length > 32:
        return None
    for kind, payload in attributes(body[skip:]):
        if kind in kinds and len(payload) == 4:
            return ipaddress.IPv4Network((int.from_bytes(payload), prefix_length), strict=False)
    return None
