"""The strongest rung: the workload alone in a network namespace whose only way out is the proxy.

A pair of virtual Ethernet links joins that namespace with ours: 10.200.N.1, where the proxy listens, and 10.200.N.2,
with a default route back to .1. A fence of nftables rules inside (`nft`) refuses everything but that one listener and
reports who tries (`bypass`). Everything is made by one thread that is thrown away, over netlink sockets; the namespace
has no name and dies with its last holder, and both links with it. Each step that the host refuses undoes all steps
before it.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openshell_supervisor.boundary import bypass, netns, nft, subnets
from openshell_supervisor.boundary.boundary import LISTEN_BACKLOG, Boundary
from openshell_supervisor.boundary.netlink import NETLINK_NETFILTER, Netlink, NetlinkError
from openshell_supervisor.enforcement import errno_name
from openshell_supervisor.errors import BoundaryError

if TYPE_CHECKING:
    from openshell_supervisor.telemetry.events import Telemetry

# The whole of it takes 10 to 40 ms; more than this is a kernel that does not answer.
BUILD_TIMEOUT = 10.0
RELEASE_TIMEOUT = 5.0

_HINTS = {
    errno.EPERM: "needs CAP_SYS_ADMIN and CAP_NET_ADMIN, and a runtime whose seccomp profile allows unshare and setns",
    errno.ENOSPC: "the limit user.max_net_namespaces is reached",
    errno.EADDRINUSE: "another process listens on this port, on this address or on all: choose another proxy port",
    errno.EOPNOTSUPP: "the kernel lacks veth or nf_tables",
    errno.ENOENT: "the kernel lacks a module of nf_tables",
}


@dataclass(frozen=True, slots=True)
class Names:
    """What the namespace and its two links are called. The kernel allows 15 characters for a link."""

    label: str
    host: str
    workload: str
    log_prefix: str

    @classmethod
    def of(cls, label: str) -> Names:
        """The names that go with `sandbox-<8 hex>`; a label of another form gets links with a suffix of their own."""
        match = re.fullmatch(r"sandbox-([0-9a-f]{8})", label)
        suffix = match[1] if match else secrets.token_hex(4)
        prefix = f"openshell:bypass:{label}:"[: nft.LOG_PREFIX_LIMIT]
        return cls(label, f"veth-h-{suffix}", f"veth-s-{suffix}", prefix)


@dataclass(slots=True)
class _Built:
    """What the thread hands back: descriptors, addresses, and what of the reporting could not be had."""

    names: Names
    namespace: netns.NetworkNamespace
    listener: socket.socket
    subnet: ipaddress.IPv4Network
    overlapped: list[str]
    fence: nft.Fence
    log: socket.socket | None
    log_errno: int | None

    @property
    def host_address(self) -> str:
        return str(self.subnet[1])

    @property
    def workload_address(self) -> str:
        return str(self.subnet[2])


async def build(label: str, port: int, telemetry: Telemetry | None) -> Boundary:
    """Build the rung: namespace, links, addresses, listener on 10.200.N.1:`port`, fence, bypass monitor.

    `label` is the namespace's name in events ("sandbox-1a2b3c4d"). Raises `BoundaryError` naming step, call and errno
    when any part but the reporting of bypass attempts cannot be had; everything made before is undone then. Attempts
    are reported from the call of the boundary's `watch` on.
    """
    names = Names.of(label)
    if telemetry is not None:
        telemetry.config(
            "creating",
            f"Creating network namespace [ns:{label} host_veth:{names.host} sandbox_veth:{names.workload}]",
        )
    try:
        built = await netns.on_own_thread(
            "boundary-veth", lambda: _construct(names, port), timeout=BUILD_TIMEOUT, discard=_discard
        )
    except TimeoutError as error:
        raise _error(label, "build", f"no end within {BUILD_TIMEOUT:g} s", None) from error
    except BoundaryError as error:
        if telemetry is not None and error.step.startswith("fence"):
            _report_failed_fence(telemetry, label, error)
        raise
    return _boundary(built, telemetry)


def _boundary(built: _Built, telemetry: Telemetry | None) -> Boundary:
    monitor = None
    if telemetry is not None:
        _report(built, telemetry)
        if built.log is not None:
            monitor = bypass.BypassMonitor(built.log, built.names.log_prefix, telemetry)
    elif built.log is not None:
        built.log.close()

    async def release() -> None:
        if monitor is not None:
            monitor.stop()
        await _delete_links(built, telemetry)

    return Boundary(
        rung="veth",
        label=built.names.label,
        listener=built.listener,
        proxy_address=(built.host_address, built.listener.getsockname()[1]),
        netns_fd=built.namespace.fd,
        netns_inode=built.namespace.inode,
        detail=_detail(built),
        release=release,
        watch=monitor.start if monitor is not None else None,
    )


def _construct(names: Names, port: int) -> _Built:
    """Make everything, on a thread that ends with it; undo everything when a step fails."""
    label = names.label
    with ExitStack() as undo:
        with _step(label, "netlink", "socket(AF_NETLINK)"):
            outer = undo.enter_context(Netlink(socket.NETLINK_ROUTE))
        with _step(label, "listener", "socket(AF_INET)"):
            listener = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP))
        with _step(label, "namespace", "unshare(CLONE_NEWNET)"):
            outside = netns.current_inode()
            namespace = netns.enter_fresh_namespace()
            undo.callback(os.close, namespace.fd)
        if namespace.inode == outside:
            raise _error(label, "namespace", "unshare(CLONE_NEWNET) answered 0 and did nothing", None)
        with _step(label, "enter", "setns(CLONE_NEWNET)"):
            # What the launcher will do. A host may allow the one call and refuse the other.
            os.setns(namespace.fd, os.CLONE_NEWNET)
        subnet, overlapped = _connect(names, namespace, outer, undo)
        with _step(label, "listener", f"bind({subnet[1]}:{port})"):
            _listen(listener, names.host, str(subnet[1]), port)
        with _step(label, "fence"), Netlink(NETLINK_NETFILTER) as netfilter:
            rules = nft.ruleset(subnet[1], listener.getsockname()[1], names.log_prefix)
            fence = nft.install(netfilter, rules)
        log, log_errno = _open_log()
        undo.pop_all()
    outer.close()
    return _Built(names, namespace, listener, subnet, overlapped, fence, log, log_errno)


def _connect(
    names: Names, namespace: netns.NetworkNamespace, outer: Netlink, undo: ExitStack
) -> tuple[ipaddress.IPv4Network, list[str]]:
    """Make the links, give them addresses, raise them; runs inside, `outer` speaks to the namespace outside."""
    label = names.label
    with _step(label, "codec", "import pyroute2"):
        from openshell_supervisor.boundary import rtnetlink
    with _step(label, "links"), Netlink(socket.NETLINK_ROUTE) as inner:
        outer.request(rtnetlink.veth_pair(names.host, names.workload, namespace.fd))
        undo.callback(_delete_host_link, names.host, outer)
        host, workload, loopback = (
            rtnetlink.index_of(netlink.fetch(rtnetlink.link_index(name)))
            for netlink, name in ((outer, names.host), (inner, names.workload), (inner, "lo"))
        )
        for netlink, index in ((outer, host), (inner, workload)):
            with contextlib.suppress(NetlinkError):  # no IPv6 in this kernel; the fence refuses IPv6 in any case
                netlink.request(rtnetlink.no_ipv6_address(index))
        with contextlib.suppress(NetlinkError):  # a second lock: nothing but the proxy's port passes the fence
            outer.request(rtnetlink.no_forwarding(host))
        inner.request(rtnetlink.bring_up(loopback))
        inner.request(rtnetlink.bring_up(workload))
        outer.request(rtnetlink.bring_up(host))
        subnet, overlapped = subnets.claim(outer, host)
        outer.request(rtnetlink.add_address(host, subnets.interface(subnet, 1), with_route=False))
        inner.request(rtnetlink.add_address(workload, subnets.interface(subnet, 2), with_route=True))
        inner.request(rtnetlink.default_route(workload, subnet[1]))
    return subnet, overlapped


def _listen(listener: socket.socket, link: str, address: str, port: int) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with contextlib.suppress(PermissionError):  # before Linux 5.7 this takes CAP_NET_RAW
        # The proxy serves the workload alone: neither this host's other processes nor its network come in by this link.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, link.encode())
    listener.bind((address, port))
    listener.listen(LISTEN_BACKLOG)


def _open_log() -> tuple[socket.socket | None, int | None]:
    """The socket for bypass reports, or the errno why there is none: the fence holds without it."""
    try:
        return bypass.open_log(nft.LOG_GROUP), None
    except OSError as error:
        return None, error.errno


def _delete_host_link(name: str, outer: Netlink) -> None:
    """Delete the host's end, and with it the workload's; a link that is gone already is as good."""
    from openshell_supervisor.boundary import rtnetlink

    try:
        outer.request(rtnetlink.delete_link(name))
    except NetlinkError as error:
        if error.errno != errno.ENODEV:
            raise


def _discard(built: _Built) -> None:
    """Undo a rung that came too late. The links die with the namespace; its last holders are closed here."""
    built.listener.close()
    if built.log is not None:
        built.log.close()
    os.close(built.namespace.fd)


async def _delete_links(built: _Built, telemetry: Telemetry | None) -> None:
    """Take the links down now; where the host refuses, the kernel does when the last process inside ends."""

    def work() -> None:
        with Netlink(socket.NETLINK_ROUTE) as outer:
            _delete_host_link(built.names.host, outer)

    message = f"Network namespace cleaned up [ns:{built.names.label}]"
    try:
        await netns.on_own_thread("boundary-veth-release", work, timeout=RELEASE_TIMEOUT)
    except (OSError, TimeoutError) as error:
        message = f"Network namespace left to the kernel to clean up [ns:{built.names.label}]: {error}"
    if telemetry is not None:
        telemetry.config("cleaned_up", message, enabled=False)


def _report(built: _Built, telemetry: Telemetry) -> None:
    """The events of a rung that stands: created, installed, and what of the reporting is missing."""
    label = built.names.label
    addresses = f"host_ip:{built.host_address} sandbox_ip:{built.workload_address}"
    telemetry.config("created", f"Network namespace created [ns:{label} {addresses}]")
    telemetry.config("installed", f"Bypass detection rules installed [ns:{label}]")
    missing = [f"{name} {errno_name(number)}" for name, number in built.fence.left_out.items()]
    if built.log_errno is not None:
        missing.append(f"nflog {errno_name(built.log_errno)}")
    if missing:
        from openshell_supervisor.telemetry.events import Severity

        telemetry.config(
            "degraded",
            f"Bypass attempts are refused but not all reported: {', '.join(missing)} [ns:{label}]",
            enabled=False,
            severity=Severity.MEDIUM,
            ok=False,
        )


def _report_failed_fence(telemetry: Telemetry, label: str, error: BoundaryError) -> None:
    from openshell_supervisor.telemetry.events import Severity

    telemetry.config(
        "failed",
        f"Failed to install bypass detection rules [ns:{label}]: {error.message}",
        enabled=False,
        severity=Severity.MEDIUM,
        ok=False,
    )


def _detail(built: _Built) -> dict[str, object]:
    """What the enforcement statement shows of this rung, as JSON-able values."""
    detail: dict[str, object] = {
        "namespace": built.names.label,
        "host_interface": built.names.host,
        "workload_interface": built.names.workload,
        "subnet": str(built.subnet),
        "host_address": built.host_address,
        "workload_address": built.workload_address,
        "fence": list(built.fence.installed),
        "bypass_monitor": "nflog" if built.log_errno is None else f"off: {errno_name(built.log_errno)}",
    }
    if built.fence.left_out:
        detail["fence_left_out"] = {name: errno_name(number) for name, number in built.fence.left_out.items()}
    if built.overlapped:
        detail["overrides_routes"] = built.overlapped
    return detail


@contextlib.contextmanager
def _step(label: str, step: str, call: str = "") -> Iterator[None]:
    """Turn what the host refuses in this step into a `BoundaryError` that names the step, the call and the errno."""
    try:
        yield
    except NetlinkError as error:
        raise _error(label, step, f"{error.operation}: {error.strerror}", error.errno) from error
    except OSError as error:
        raise _error(label, step, f"{call or 'system call'}: {error.strerror or error}", error.errno) from error
    except ImportError as error:
        raise _error(label, step, f"{call}: {error}", None) from error


def _error(label: str, step: str, what: str, number: int | None) -> BoundaryError:
    name = errno_name(number)
    message = f"network namespace {label}: step {step} failed: {what}" + (f" [{name}]" if name else "")
    return BoundaryError(message, code="boundary_veth", step=step, errno=number, hint=_HINTS.get(number or 0, ""))
