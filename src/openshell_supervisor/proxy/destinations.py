"""From an allowed name to a connected socket: resolve once, check every address, dial only what was checked.

No second look-up happens between the check and the dial, so a name cannot be re-bound in between. This room knows addresses and
the verdict's endpoint settings; it knows no HTTP. Rules and texts: policy.md 3.1-3.3. Where upstream lets multicast, reserved
and embedded IPv4 addresses through, we do not.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from openshell_supervisor.verdict.facts import Verdict

type Address = ipaddress.IPv4Address | ipaddress.IPv6Address
type Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# glibc asks each name server for 5 s, twice; what takes longer will not help a client that waits.
DNS_TIMEOUT = 10.0
# One connect budget for all addresses of a name (proxy.md 9.5).
DIAL_TIMEOUT = 10.0
# RFC 8305 section 5: the delay before the next address is tried beside the first.
DIAL_STAGGER = 0.25
# Blocking getaddrinfo calls at a time; further ones wait in the executor's queue, itself bounded by the connection limit.
DNS_WORKERS = 8
# Upstream's limit for one answer (policy.md 3.6).
MAX_ADDRESSES = 16

# etcd, the Kubernetes API and kubelet (policy.md 3.2).
CONTROL_PLANE_PORTS = frozenset({2379, 2380, 6443, 10250, 10255})

_ALWAYS_BLOCKED: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",  # "this network": Linux delivers 0.0.0.0 to itself
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local, and every cloud's metadata service
        "224.0.0.0/4",
        "255.255.255.255/32",
        "::/127",  # unspecified and loopback
        "::ffff:0:0/96",  # IPv4-mapped: a second spelling of an IPv4 address
        "::/96",  # IPv4-compatible, deprecated: a third
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
        "fd00:ec2::/32",  # EC2's IPv6 metadata service
    )
)
# Private by intent although `is_global` says otherwise, or not said at all in older Pythons.
_INTERNAL: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in ("100.64.0.0/10", "192.0.0.0/24", "198.18.0.0/15", "240.0.0.0/4", "192.88.99.0/24")
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class DestinationRefused(Exception):
    """An address check failed. `kind` is upstream's phrase for the body, `reason` the sentence for the log."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class UpstreamUnreachable(Exception):
    """None of the checked addresses took the connection."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A checked destination: the name as decided and the addresses that may be dialled for it."""

    host: str
    port: int
    addresses: tuple[str, ...]


def embedded_ipv4(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 transition address (NAT64, 6to4, Teredo) leads to, if it is one."""
    if not isinstance(address, ipaddress.IPv6Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.sixtofour is not None:
        return address.sixtofour
    return address.teredo[1] if address.teredo is not None else None


def always_blocked(address: Address) -> bool:
    """True for loopback, link-local, metadata, unspecified, multicast and IPv4 in disguise, in every mode."""
    inner = embedded_ipv4(address)
    if inner is not None and always_blocked(inner):
        return True
    return any(address.version == network.version and address in network for network in _ALWAYS_BLOCKED)


def internal(address: Address) -> bool:
    """True for every address that is not plainly public."""
    inner = embedded_ipv4(address)
    if inner is not None and internal(inner):
        return True
    listed = any(address.version == network.version and address in network for network in _INTERNAL)
    return listed or not address.is_global or always_blocked(address)


def parse_address(host: str) -> Address | None:
    """The address that a host spells literally, scope refused, or None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise DestinationRefused("internal address", f"{host} carries a scope, connection rejected")
    return address


def check(host: str, port: int, addresses: tuple[Address, ...], verdict: Verdict) -> None:
    """Apply the first mode that fits (policy.md 3.1) to every address. Raises `DestinationRefused`."""
    if verdict.allowed_ips:
        networks = _allowed_networks(verdict.allowed_ips)
        _check_each(host, port, addresses, "allowed_ips check failed", networks)
    elif parse_address(host) is not None:
        _check_each(host, port, addresses, "allowed_ips check failed", None)
    elif verdict.exact_host:
        _check_each(host, port, addresses, "declared endpoint check failed", None)
    else:
        for address in addresses:
            if internal(address):
                reason = f"{host} resolves to internal address {address}, connection rejected"
                raise DestinationRefused("internal address", reason)


def _check_each(
    host: str, port: int, addresses: tuple[Address, ...], kind: str, networks: list[Network] | None
) -> None:
    if port in CONTROL_PLANE_PORTS:
        raise DestinationRefused(kind, f"port {port} is a blocked control-plane port, connection rejected")
    for address in addresses:
        if always_blocked(address):
            raise DestinationRefused(kind, f"{host} resolves to always-blocked address {address}, connection rejected")
        if networks is not None and not any(n.version == address.version and address in n for n in networks):
            reason = f"{host} resolves to {address} which is not in allowed_ips, connection rejected"
            raise DestinationRefused(kind, reason)


def _allowed_networks(entries: tuple[str, ...]) -> list[Network]:
    """One bad entry makes the whole list invalid, as upstream does (policy.md 3.3)."""
    networks: list[Network] = []
    problems: list[str] = []
    for entry in entries:
        try:
            network = ipaddress.ip_network(entry, strict=False)
        except ValueError:
            problems.append(f"invalid CIDR/IP in allowed_ips: {entry}")
            continue
        if any(network.version == blocked.version and network.overlaps(blocked) for blocked in _ALWAYS_BLOCKED):
            problems.append(
                f"allowed_ips entry {entry} falls within always-blocked range (loopback/link-local/unspecified)"
            )
        networks.append(network)
    if problems:
        raise DestinationRefused("invalid allowed_ips in policy", "; ".join(problems))
    return networks


class Destinations:
    """Resolves, checks and dials. `pins` (host -> addresses) is the operator's word: no DNS and no check for that very host."""

    def __init__(self, pins: Mapping[str, tuple[str, ...]]) -> None:
        self._pins = {host.lower().rstrip("."): tuple(addresses) for host, addresses in pins.items()}
        self._resolver = ThreadPoolExecutor(DNS_WORKERS, thread_name_prefix="proxy-dns")

    async def resolve(self, host: str, port: int, verdict: Verdict, *, enforce: bool = True) -> tuple[Destination, str]:
        """The checked destination and, when `enforce` is off, why it would have been refused ("" when it would not).

        Raises `DestinationRefused`; a name that does not resolve is refused in either case, there is nothing to dial.
        """
        pinned = self._pins.get(host.rstrip("."))
        if pinned is not None:
            return Destination(host, port, pinned), ""
        literal = parse_address(host)
        addresses = (literal,) if literal is not None else await self._look_up(host, port, verdict)
        complaint = ""
        try:
            check(host, port, addresses, verdict)
        except DestinationRefused as refusal:
            if enforce:
                raise
            complaint = refusal.reason
        return Destination(host, port, tuple(str(address) for address in addresses)), complaint

    async def _look_up(self, host: str, port: int, verdict: Verdict) -> tuple[Address, ...]:
        kind = "allowed_ips check failed" if verdict.allowed_ips else "internal address"
        if verdict.exact_host and not verdict.allowed_ips:
            kind = "declared endpoint check failed"
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(DNS_TIMEOUT):
                answers = await loop.run_in_executor(self._resolver, _getaddrinfo, host, port)
        except TimeoutError:
            raise DestinationRefused(kind, f"DNS resolution failed for {host}:{port}: timed out") from None
        except (OSError, UnicodeError) as error:
            text = error.strerror if isinstance(error, OSError) else "not a host name"
            raise DestinationRefused(kind, f"DNS resolution failed for {host}:{port}: {text}") from None
        addresses = tuple(dict.fromkeys(ipaddress.ip_address(answer) for answer in answers))
        if not addresses:
            raise DestinationRefused(kind, f"DNS resolution returned no addresses for {host}:{port}")
        return addresses[:MAX_ADDRESSES] if len(addresses) > MAX_ADDRESSES else addresses

    async def dial(self, destination: Destination) -> socket.socket:
        """A connected, non-blocking socket with TCP_NODELAY. Raises `UpstreamUnreachable` within `DIAL_TIMEOUT` seconds."""
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                if len(destination.addresses) == 1:
                    return await _connect(destination.addresses[0], destination.port)
                return await _connect_any(_interleave(destination.addresses), destination.port)
        except TimeoutError:
            raise UpstreamUnreachable(
                f"{destination.host}:{destination.port} did not answer within {DIAL_TIMEOUT:g} s"
            ) from None
        except OSError as error:
            text = error.strerror or type(error).__name__
            raise UpstreamUnreachable(f"{destination.host}:{destination.port}: {text}") from None

    def close(self) -> None:
        """Let the resolver's threads end; does not wait for a look-up that hangs."""
        self._resolver.shutdown(wait=False, cancel_futures=True)


def _getaddrinfo(host: str, port: int) -> list[str]:
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in answers]


def _interleave(addresses: tuple[str, ...]) -> list[str]:
    """Alternate the families, first answer first (RFC 8305 section 4)."""
    first = [a for a in addresses if (":" in a) == (":" in addresses[0])]
    other = [a for a in addresses if (":" in a) != (":" in addresses[0])]
    mixed: list[str] = []
    for index in range(max(len(first), len(other))):
        mixed += first[index : index + 1] + other[index : index + 1]
    return mixed


async def _connect(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a silent peer that died is noticed in the end
        await asyncio.get_running_loop().sock_connect(sock, (address, port))
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect_any(addresses: list[str], port: int) -> socket.socket:
    """Race the addresses, a new one each `DIAL_STAGGER` seconds or at once after a failure; the losers are closed."""
    running: set[asyncio.Task[socket.socket]] = set()
    error: OSError = OSError("no address")
    waiting = list(addresses)
    try:
        while waiting or running:
            if waiting:
                running.add(asyncio.create_task(_connect(waiting.pop(0), port)))
            done, running = await asyncio.wait(
                running, timeout=DIAL_STAGGER if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            winners = [task for task in done if task.exception() is None]
            for spare in winners[1:]:
                spare.result().close()
            if winners:
                return winners[0].result()
            error = next((e for task in done if isinstance(e := task.exception(), OSError)), error)
        raise error
    finally:
        for task in running:
            task.cancel()
            task.add_done_callback(_close_loser)


def _close_loser(task: asyncio.Task[socket.socket]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()
