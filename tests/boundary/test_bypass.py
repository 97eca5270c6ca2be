"""Attempts to go round the proxy are seen and reported, and nothing that a packet holds can hurt the reader."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openshell_supervisor.boundary import bypass, veth
from openshell_supervisor.boundary.boundary import Boundary
from openshell_supervisor.boundary.bypass import Attempt, BypassMonitor, attempts
from openshell_supervisor.boundary.netlink import HEADER, attribute
from openshell_supervisor.telemetry.events import Telemetry

root = [pytest.mark.root, pytest.mark.usefixtures("outer_namespace")]
PREFIX = "openshell:bypass:sandbox-1c9e44a7:"
Inside = Callable[..., Any]


@asynccontextmanager
async def watched(telemetry: Telemetry) -> AsyncIterator[Boundary]:
    boundary = await veth.build(f"sandbox-{random.randrange(16**8):08x}", 3128, telemetry)
    assert boundary.watch is not None
    boundary.watch()
    try:
        yield boundary
    finally:
        await boundary.close()


def reported(recorder: Any) -> list[str]:
    return [line for line in recorder.lines if "BYPASS_DETECT" in line and line.startswith("NET:")]


class TestInTheKernel:
    """Real packets, refused by the real fence, read through the real log."""

    pytestmark = root

    async def test_an_attempt_is_reported_with_where_it_went(
        self, recorder: Any, telemetry: Telemetry, inside: Inside
    ) -> None:
        """A refused connection becomes a network event and a finding, in upstream's words, at once."""
        async with watched(telemetry) as boundary:
            inside(boundary, "print(json.dumps(attempt(lambda: tcp('203.0.113.9', 443))))", uid=64001)
            refused = await recorder.wait_for("NET:REFUSE")
            finding = await recorder.wait_for("FINDING:")
        assert refused["dst_endpoint"]["ip"] == "203.0.113.9"
        assert refused["dst_endpoint"]["port"] == 443
        assert refused["firewall_rule"] == {"name": "bypass-detect", "type": "nftables"}
        assert refused["message"] == (
            "BYPASS_DETECT 203.0.113.9:443 proto=tcp binary=- action=reject "
            "reason=direct connection bypassed HTTP CONNECT proxy"
        )
        assert finding["finding_info"]["title"] == "Proxy Bypass Detected"
        assert "HTTP_PROXY" in finding["remediation"]["desc"]

    async def test_the_log_names_the_user(self, telemetry: Telemetry, inside: Inside) -> None:
        """What the kernel hands over holds the sender's uid and both ends of the refused packet."""
        boundary = await veth.build("sandbox-1c9e44a7", 3128, None)
        with contextlib.closing(await opened(boundary)) as log:
            inside(boundary, "print(json.dumps(attempt(lambda: tcp('203.0.113.9', 443))))", uid=64001)
            (found,) = attempts(log.recv(bypass.RECEIVE_BUFFER), PREFIX.encode())
        await boundary.close()
        assert (found.destination, found.destination_port, found.uid) == ("203.0.113.9", 443, 64001)
        assert found.source == "10.200.0.2"
        assert found.source_port > 0

    @pytest.mark.parametrize(
        ("program", "expected"),
        [
            ("send('8.8.8.8', 53)", "8.8.8.8:53 proto=udp"),
            ("send('8.8.8.8', 123)", "8.8.8.8:123 proto=udp"),
            ("send('192.0.2.1', 9, socket.AF_INET, socket.SOCK_DGRAM, 136)", "192.0.2.1:9 proto=udplite"),
            ("send('192.0.2.1', 0, socket.AF_INET, socket.SOCK_RAW, 1)", "192.0.2.1:0 proto=icmp"),
            ("send('192.0.2.1', 0, socket.AF_INET, socket.SOCK_RAW, 253)", "192.0.2.1:0 proto=protocol-253"),
        ],
    )
    async def test_every_protocol_is_reported(
        self, recorder: Any, telemetry: Telemetry, inside: Inside, program: str, expected: str
    ) -> None:
        """UDP and protocols that are dropped are reported as TCP is."""
        async with watched(telemetry) as boundary:
            assert inside(boundary, f"print(json.dumps(attempt(lambda: {program})[0]))") == "EPERM"
            await recorder.wait_for(f"BYPASS_DETECT {expected}")

    async def test_ipv6_is_reported(
        self, recorder: Any, telemetry: Telemetry, inside: Inside, shell: Callable[[str], str]
    ) -> None:
        """Were there an IPv6 route, an attempt over it would be seen."""
        async with watched(telemetry) as boundary:
            link = boundary.detail["workload_interface"]
            into = f"nsenter --net=/proc/{os.getpid()}/fd/{boundary.netns_fd}"
            shell(f"{into} ip addr add fd00::2/64 dev {link} nodad")
            inside(boundary, "print(json.dumps(attempt(lambda: send('fd00::1', 53, socket.AF_INET6))))")
            await recorder.wait_for("BYPASS_DETECT fd00::1:53 proto=udp")

    async def test_the_proxy_and_lo_are_no_attempts(self, recorder: Any, telemetry: Telemetry, inside: Inside) -> None:
        """Using the proxy and talking to oneself is reported by nobody; neither is the kernel's own chatter."""
        async with watched(telemetry) as boundary:
            ways = [("10.200.0.1", 3128), ("127.0.0.1", 9)]
            program = f"print(json.dumps([attempt(lambda: tcp(h, p))[0] for h, p in {ways}]))"
            assert inside(boundary, program) == ["connected", "ECONNREFUSED"]
            await asyncio.sleep(1.2)  # multicast reports of a link that came up follow within a second
        assert reported(recorder) == []

    async def test_nothing_before_watch_is_reported(self, recorder: Any, telemetry: Telemetry, inside: Inside) -> None:
        """The supervisor's own look from inside is not reported; the first attempt after `watch` is."""
        boundary = await veth.build("sandbox-1c9e44a7", 3128, telemetry)
        inside(boundary, "[attempt(lambda: tcp('198.51.100.1', p)) for p in range(1, 8)]; print(1)")
        assert boundary.watch is not None
        boundary.watch()
        boundary.watch()
        inside(boundary, "print(json.dumps(attempt(lambda: send('203.0.113.9', 99))))")
        await recorder.wait_for("203.0.113.9:99")
        await boundary.close()
        assert len(reported(recorder)) == 1

    async def test_what_came_last_is_still_reported(self, recorder: Any, telemetry: Telemetry, inside: Inside) -> None:
        """An attempt right before the end is reported by the close."""
        async with watched(telemetry) as boundary:
            inside(boundary, "print(json.dumps(attempt(lambda: tcp('203.0.113.9', 99))))")
        assert len(reported(recorder)) == 1

    async def test_a_storm_is_bounded(self, recorder: Any, telemetry: Telemetry, inside: Inside) -> None:
        """Many attempts give a handful of reports, and each of them is refused."""
        async with watched(telemetry) as boundary:
            program = "print(json.dumps([attempt(lambda: tcp('203.0.113.9', p))[0] for p in range(1, 46)]))"
            answers = inside(boundary, program)
            await asyncio.sleep(0.2)
        assert set(answers) == {"ECONNREFUSED"}
        assert 5 <= len(reported(recorder)) <= 15

    async def test_a_workload_without_privileges_cannot_listen(self, inside: Inside, telemetry: Telemetry) -> None:
        """The group is ours: a second listener, even a privileged one, is refused while we hold it."""
        boundary = await veth.build("sandbox-1c9e44a7", 3128, telemetry)
        with pytest.raises(OSError) as caught:
            await opened(boundary)
        await boundary.close()
        assert caught.value.errno in (1, 16)


async def opened(boundary: Boundary) -> socket.socket:
    """A log socket of the boundary's namespace, opened on a thread of its own as the rung does it."""
    from openshell_supervisor.boundary import netns, nft

    def work() -> socket.socket:
        assert boundary.netns_fd is not None
        os.setns(boundary.netns_fd, os.CLONE_NEWNET)
        return bypass.open_log(nft.LOG_GROUP)

    return await netns.on_own_thread("test-log", work, timeout=5)


def ipv4(protocol: int, rest: bytes, *, options: bytes = b"", fragment: int = 0) -> bytes:
    first = 0x40 | (20 + len(options)) // 4
    head = struct.pack("!BBHHHBBH", first, 0, 0, 0, fragment, 64, protocol, 0)
    return (
        head + ipaddress.ip_address("10.200.0.2").packed + ipaddress.ip_address("203.0.113.9").packed + options + rest
    )


def ipv6(protocol: int, rest: bytes) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(rest), protocol, 64)
    return head + ipaddress.ip_address("fd00::2").packed + ipaddress.ip_address("fd00::1").packed + rest


def datagram(packet: bytes, *, prefix: str = PREFIX, uid: bytes | None = struct.pack("!I", 64001)) -> bytes:
    body = bytes(4) + attribute(10, prefix.encode() + b"\0") + attribute(9, packet)
    body += attribute(11, uid) if uid is not None else b""
    return HEADER.pack(HEADER.size + len(body), 4 << 8, 0, 0, 0) + body


PORTS = struct.pack("!HH", 40000, 443)


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (ipv4(6, PORTS), ("tcp", "203.0.113.9", 443, 40000)),
        (ipv4(17, PORTS), ("udp", "203.0.113.9", 443, 40000)),
        (ipv4(6, PORTS, options=bytes(40)), ("tcp", "203.0.113.9", 443, 40000)),
        (ipv4(6, PORTS, fragment=7), ("tcp", "203.0.113.9", 0, 0)),
        (ipv4(6, b"\1"), ("tcp", "203.0.113.9", 0, 0)),
        (ipv4(1, PORTS), ("icmp", "203.0.113.9", 0, 0)),
        (ipv4(99, PORTS), ("protocol-99", "203.0.113.9", 0, 0)),
        (ipv6(6, PORTS), ("tcp", "fd00::1", 443, 40000)),
        (ipv6(0, b"\x3c\0" + bytes(6) + b"\x11\0" + bytes(6) + PORTS), ("udp", "fd00::1", 443, 40000)),
        (ipv6(0, b"\x06\xff"), ("tcp", "fd00::1", 0, 0)),
    ],
)
def test_packets_are_read(packet: bytes, expected: tuple[str, str, int, int]) -> None:
    """Address, protocol and ports are found behind options and extension headers, and are 0 where they are not
    there."""
    (found,) = attempts(datagram(packet), PREFIX.encode())
    assert (found.protocol, found.destination, found.destination_port, found.source_port) == expected
    assert found.uid == 64001


@pytest.mark.parametrize("packet", [b"", b"\x45", ipv4(6, PORTS)[:19], ipv6(6, PORTS)[:39], b"\x75" + bytes(60)])
def test_what_is_no_packet_is_no_attempt(packet: bytes) -> None:
    """A packet that is cut before its addresses, or of no known version, is passed over."""
    assert list(attempts(datagram(packet), PREFIX.encode())) == []


def test_only_our_prefix_counts() -> None:
    """A message with another prefix is somebody else's."""
    others = [PREFIX[:-1], PREFIX + "x", "", "openshell:bypass:sandbox-00000000:"]
    assert [list(attempts(datagram(ipv4(6, PORTS), prefix=other), PREFIX.encode())) for other in others] == [[]] * 4


def test_several_in_one_datagram() -> None:
    """The kernel packs several messages into one datagram; all are read, and one without a uid as well."""
    two = datagram(ipv4(6, PORTS)) + datagram(ipv4(17, PORTS), uid=None)
    assert [(found.protocol, found.uid) for found in attempts(two, PREFIX.encode())] == [("tcp", 64001), ("udp", None)]


@given(st.binary(max_size=300))
def test_any_datagram_is_harmless(data: bytes) -> None:
    """Whatever arrives is read without an error."""
    list(attempts(data, PREFIX.encode()))


@given(st.binary(max_size=130), st.none() | st.binary(max_size=8))
def test_any_packet_is_harmless(packet: bytes, uid: bytes | None) -> None:
    """Whatever a workload sends is read as one attempt or none, with a port in range."""
    found = list(attempts(datagram(packet, uid=uid), PREFIX.encode()))
    assert len(found) <= 1
    assert all(isinstance(attempt, Attempt) and 0 <= attempt.destination_port < 65536 for attempt in found)


@pytest.fixture
def pair() -> Any:
    """Two ends of a datagram socket: what is sent on the first is what the kernel would have sent."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


async def test_reports_are_limited_and_counted(pair: Any, recorder: Any, telemetry: Telemetry) -> None:
    """Ten at once, then five a second; what is left out is counted and the count is told with the next report."""
    now = 100.0
    kernel, log = pair
    monitor = BypassMonitor(log, PREFIX, telemetry, clock=lambda: now)
    monitor.start()
    for _ in range(3):
        for _ in range(10):
            kernel.send(datagram(ipv4(6, PORTS)))
        await asyncio.sleep(0.05)
    assert len(reported(recorder)) == 10
    now += 0.2
    kernel.send(datagram(ipv4(6, PORTS)))
    await recorder.wait_for("20 more bypass attempts")
    assert len(reported(recorder)) == 11
    monitor.stop()
    monitor.stop()
    assert log.fileno() == -1


class Overrun(socket.socket):
    """A socket that lost messages: the kernel says ENOBUFS once, then goes on. (Made up: to lose a message for real
    takes more attempts than the fence reports.)"""

    lost = 1

    def recv(self, *arguments: Any) -> bytes:
        if self.lost:
            self.lost -= 1
            raise OSError(105, os.strerror(105))
        return super().recv(*arguments)


async def test_an_overrun_is_survived(pair: Any, recorder: Any, telemetry: Telemetry) -> None:
    """After ENOBUFS the next attempt is reported."""
    kernel, theirs = pair
    log = Overrun(fileno=theirs.detach())
    monitor = BypassMonitor(log, PREFIX, telemetry)
    log.lost = 0
    monitor.start()
    log.lost = 2
    kernel.send(datagram(ipv4(6, PORTS)))
    await recorder.wait_for("BYPASS_DETECT")
    assert monitor.overruns == 2
    monitor.stop()


async def test_a_broken_socket_is_said_and_left(pair: Any, recorder: Any, telemetry: Telemetry) -> None:
    """A socket that cannot be read any more is told once, and the loop does not spin on it."""

    class Broken(socket.socket):
        def recv(self, *arguments: Any) -> bytes:
            raise OSError(5, os.strerror(5))

    kernel, theirs = pair
    log = Broken(fileno=theirs.detach())
    monitor = BypassMonitor(log, PREFIX, telemetry)
    monitor.start()
    kernel.send(b"x")
    await recorder.wait_for("CONFIG:DEGRADED")
    await asyncio.sleep(0.05)
    assert len(recorder.lines) == 1
    monitor.stop()
