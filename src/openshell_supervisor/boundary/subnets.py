"""Which 10.200.N.0/24 the rung takes: the first that this host uses for nothing else.

Upstream always takes 10.200.0.0/24, which two supervisors side by side cannot share. This module reads addresses and
routes and claims a subnet; what is connected by it is not its business.
"""

from __future__ import annotations

import errno
import ipaddress

from openshell_supervisor.boundary.netlink import Netlink, NetlinkError

# The space of the subnets; the third octet is what changes.
SPACE = ipaddress.IPv4Network("10.200.0.0/16")
SUBNETS = tuple(SPACE.subnets(new_prefix=24))


def claim(outer: Netlink, host: int) -> tuple[ipaddress.IPv4Network, list[str]]:
    """Take the first free subnet for the host's end; with it come wider routes that it now overrides, as text.

    A subnet that touches any address or route of this host is passed over, unless each of them is covered by a wider
    route (10.0.0.0/8 to a company's network): then one that only such routes cover will do. Two supervisors that look
    at the same moment see the same free subnet; the route is added exclusively, so the kernel lets one of them have it.
    """
    from openshell_supervisor.boundary import rtnetlink

    on_links, routed = (
        [network for network in networks if network.overlaps(SPACE)]
        for networks in (
            rtnetlink.address_networks(outer.dump(rtnetlink.all_addresses())),
            rtnetlink.route_networks(outer.dump(rtnetlink.all_routes())),
        )
    )
    for wider_is_free in (False, True):
        for subnet in SUBNETS:
            wider = [network for network in routed if network.prefixlen < subnet.prefixlen and network.overlaps(subnet)]
            closer = [network for network in routed if network.prefixlen >= subnet.prefixlen]
            if any(network.overlaps(subnet) for network in (*on_links, *closer)) or (wider and not wider_is_free):
                continue
            try:
                outer.request(rtnetlink.claim_subnet(host, subnet))
            except NetlinkError as error:
                if error.errno != errno.EEXIST:
                    raise
                continue
            return subnet, [str(network) for network in wider]
    raise NetlinkError(errno.EADDRNOTAVAIL, "RTM_NEWROUTE", f"no free subnet in {SPACE}")


def interface(subnet: ipaddress.IPv4Network, number: int) -> ipaddress.IPv4Interface:
    """The address with this number in the subnet, with the subnet's prefix length."""
    return ipaddress.IPv4Interface(f"{subnet[number]}/{subnet.prefixlen}")
