"""The proxy as a way out: every spelling of a forbidden destination and of a forbidden path, against upstreams that answer."""

from __future__ import annotations

import json
import pathlib
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from typing import Any

import product
import pytest

HERE = pathlib.Path(__file__).resolve().parent
# host rules that a careless operator writes: they must still not lead to loopback, to metadata or to the proxy itself
POLICY = """
version: 1
network_policies:
  careless:
    name: careless
    binaries: [{{path: '/**'}}]
    endpoints:
    - {{host: "*.wild.test", ports: [{port}, 80, 443, 3128]}}
    - {{host: "**.wild.test", ports: [{port}, 80, 443, 3128]}}
    - {{host: localhost, port: {port}}}
    - {{host: sub.localhost, port: {port}}}
    - {{host: 127.0.0.1, port: {port}}}
    - {{host: "127.1", port: {port}}}
    - {{host: "2130706433", port: {port}}}
    - {{host: 0x7f.1, port: {port}}}
    - {{host: 0177.0.0.1, port: {port}}}
    - {{host: 0.0.0.0, port: {port}}}
    - {{host: "0", port: {port}}}
    - {{host: 169.254.169.254, port: {port}}}
  plain:
    name: plain
    binaries: [{{path: '/**'}}]
    endpoints:
    - {{host: tunnel.test, port: {port}}}
  inspected:
    name: inspected
    binaries: [{{path: '/**'}}]
    endpoints:
    - host: inspected.test
      port: {port}
      protocol: rest
      enforcement: enforce
      rules:
      - allow: {{method: GET, path: "/public/**"}}
      - allow: {{method: POST, path: "/public/form"}}
"""
ATTACKER = """
import concurrent.futures, json, os, socket, sys
host, _, port = os.environ["HTTP_PROXY"].removeprefix("http://").partition(":")
def ask(raw):
    said = b""
    try:
        with socket.create_connection((host, int(port)), 5) as sock:
            sock.settimeout(8)
            for part in raw:
                sock.sendall(part.replace("PROXY", host).encode("latin-1"))
                if len(raw) > 1 and part is not raw[-1]:
                    said += sock.recv(65536)
                    if b" 200 " not in said: break
            sock.settimeout(8 if len(raw) == 1 or b" 200 " in said else 0.1)
            while len(said) < 200000:
                piece = sock.recv(65536)
                if not piece: break
                said += piece
                sock.settimeout(1)  # whatever follows the first answer follows at once
    except TimeoutError:
        pass
    except OSError as error:
        said += repr(error).encode()
    return said.decode("latin-1")
with concurrent.futures.ThreadPoolExecutor(12) as pool:
    print(json.dumps(list(pool.map(ask, json.load(open(sys.argv[1]))))))
"""


class Upstream:
    """An HTTP server on 127.0.0.1 that answers everything with UPSTREAM and remembers every byte it got."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        self.heard: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        index = len(self.heard)
        self.heard.append(b"")
        with client:
            client.settimeout(3)
            try:
                while data := client.recv(65536):
                    self.heard[index] += data
                    if data.endswith(b"\r\n\r\n") or b"\r\n\r\n" in data:
                        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nUPSTREAM")
            except OSError:
                return


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    """One for the module."""
    server = Upstream()
    yield server
    server.listener.close()


def ask(upstream: Upstream, requests: list[list[str]], *, pins: tuple[str, ...] = ()) -> tuple[list[str], product.Ran]:
    """Send each (as one or more pieces, the later ones after a 200) from inside; all of what the proxy said."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="oss-attack-") as name:
        place = pathlib.Path(name)
        place.chmod(0o755)
        (place / "attacker.py").write_text(ATTACKER)
        (place / "requests.json").write_text(json.dumps(requests))
        options = [word for pin in pins for word in ("--resolve", pin)]
        command = [sys.executable, "-I", str(place / "attacker.py"), str(place / "requests.json")]
        ran = product.run(
            command, policy=POLICY.format(port=upstream.port), options=["--network-mode", "isolated", *options]
        )
    assert ran.out, ran.err
    answers: list[str] = json.loads(ran.out)
    return answers, ran


PINS = ("tunnel.test=127.0.0.1", "inspected.test=127.0.0.1")


def test_the_upstream_would_have_answered(upstream: Upstream) -> None:
    """The control of this module: through the proxy, by the rules, the same upstream is reached in both ways."""
    port = upstream.port
    requests = [
        [f"CONNECT tunnel.test:{port} HTTP/1.1\r\nHost: tunnel.test\r\n\r\n", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
        [f"GET http://inspected.test:{port}/public/x HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n"],
    ]
    answers, ran = ask(upstream, requests, pins=PINS)
    assert all(answer.endswith("UPSTREAM") for answer in answers), (answers, ran.err)


LOOPBACKS = [
    *(
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "0x7f.1",
        "0x7f000001",
        "2130706433",
        "017700000001",
        "0177.0.0.1",
        "0",
        "0.0.0.0",
    ),
    *(
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
    ),
    *(
        "localhost",
        "LOCALHOST",
        "localhost.",
        "sub.localhost",
        "x.y.localhost",
        "ip6-localhost",
        "localhost.localdomain",
    ),
    *(
        "127.0.0.1.",
        "127.0.0.1%00",
        "127.0.0.1%23",
        "\u00b9\u00b2\u00b7",
        "[::1%lo]",
        "[fe80::1%25lo]",
        "127.0.0.1\t",
        "@127.0.0.1",
    ),
    *(
        "x@127.0.0.1",
        "tunnel.test@127.0.0.1",
        "127.0.0.1#tunnel.test",
        "tunnel.test\\@127.0.0.1",
        "127.0.0.1\\.tunnel.test",
    ),
    *(
        "169.254.169.254",
        "0xa9fea9fe",
        "[::ffff:169.254.169.254]",
        "[fd00:ec2::254]",
        "PROXY",
        "a.wild.test",
        "127.0.0.1.wild.test",
    ),
]


@pytest.mark.parametrize("way", ["CONNECT", "absolute"])
def test_no_spelling_of_a_local_address_is_reached(upstream: Upstream, way: str) -> None:
    """Loopback, metadata, unspecified and the proxy's own address, as a name or in any notation, and although careless rules
    allow several of them by name: refused, and the upstream that listens there hears nothing."""
    port, before = upstream.port, len(upstream.heard)
    requests = []
    for host in LOOPBACKS:
        for at in (port, 3128) if host == "PROXY" else (port,):
            if way == "CONNECT":
                requests.append(
                    [f"CONNECT {host}:{at} HTTP/1.1\r\nHost: {host}:{at}\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\n\r\n"]
                )
            else:
                requests.append([f"GET http://{host}:{at}/ HTTP/1.1\r\nHost: {host}:{at}\r\n\r\n"])
    answers, _ = ask(upstream, requests, pins=PINS)
    bad = [
        (r[0].split("\r")[0], a[:60]) for r, a in zip(requests, answers, strict=True) if not a.startswith("HTTP/1.1 4")
    ]
    assert not [b for b in bad if not b[1].startswith("HTTP/1.1 502")], bad
    assert not [a for a in answers if "UPSTREAM" in a]
    assert len(upstream.heard) == before


DENIED_PATHS = [
    *("/private", "/public/../private", "/public/%2e%2e/private", "/public/.%2e/private", "/public/%2E./private"),
    *(
        "/public/..%2fprivate",
        "/public/..%2Fprivate",
        "/public%2f..%2fprivate",
        "/public/..;/private",
        "/public/..;x=1/private",
    ),
    *(
        "//private",
        "/./private",
        "/public/x/../../private",
        "/public//../private",
        "/public/\\../private".replace("\\", "/"),
    ),
    *(
        "/public/../private?x=/public/",
        "/private#/public/",
        "/private;/public/x",
        "/%70rivate",
        "/Public/x",
        "/PUBLIC/x",
    ),
    *("/public", "/publi%63/%2e%2e/private", "/public/%00/../private", "/public/\x01", "*", "private", "?/public/x"),
    *(
        "/public/%c0%ae%c0%ae/../../private",
        "/public/%2e%2e%2fprivate",
        "/public/%u002e%u002e/private",
        "/%2e%2e/private",
        "/../private",
    ),
]


def test_no_spelling_of_a_denied_path_is_forwarded(upstream: Upstream) -> None:
    """What arrives upstream is judged and canonical: no dot segment, encoded slash or parameter helps a denied path."""
    port, before = upstream.port, len(upstream.heard)
    requests = []
    for path in DENIED_PATHS:
        target = f"http://inspected.test:{port}{path}" if path[:1] in "/?" else path
        requests.append([f"GET {target} HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n"])
        tunnel = f"CONNECT inspected.test:{port} HTTP/1.1\r\nHost: inspected.test\r\n\r\n"
        requests.append([tunnel, f"GET {path} HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n"])
    answers, _ = ask(upstream, requests, pins=PINS)
    passed = [r[-1].split("\r")[0] for r, a in zip(requests, answers, strict=True) if "UPSTREAM" in a]
    assert not passed
    heard = b"".join(upstream.heard[before:])
    assert heard == b"", heard[:300]


DOUBLE = [
    "/public/%252e%252e/private",
    "/public/%252e%252e%252fprivate",
    "/public/..%255cprivate",
    "/public/..%5cprivate",
]


def test_what_a_second_decoder_would_make_of_it_arrives_as_it_was_judged(upstream: Upstream) -> None:
    """Double encodings and backslashes are names to us: they are forwarded encoded as before, or refused, never decoded."""
    port, before = upstream.port, len(upstream.heard)
    requests = [
        [f"GET http://inspected.test:{port}{path} HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n"] for path in DOUBLE
    ]
    ask(upstream, requests, pins=PINS)
    lines = [item.split(b"\r\n")[0] for item in upstream.heard[before:] if item]
    assert all(line.startswith(b"GET /public/%25") or line.startswith(b"GET /public/..%") for line in lines), lines


def smuggled(port: int) -> dict[str, list[str]]:
    """Requests that hide a second one, or another destination, from whoever judges the first."""
    head = f"GET http://inspected.test:{port}/public/x HTTP/1.1\r\nHost: inspected.test:{port}\r\n"
    post = f"POST http://inspected.test:{port}/public/form HTTP/1.1\r\nHost: inspected.test:{port}\r\n"
    evil = f"GET /private HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n"
    tunnel = f"CONNECT inspected.test:{port} HTTP/1.1\r\nHost: inspected.test\r\n\r\n"
    inner = f"GET /public/x HTTP/1.1\r\nHost: inspected.test:{port}\r\n"
    return {
        "cl.te": [post + f"Content-Length: {len(evil) + 5}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + evil],
        "te.te": [post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + evil],
        "te obfuscated": [post + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + evil],
        "te tab": [post + "Transfer-Encoding:\tchunked, identity\r\n\r\n0\r\n\r\n" + evil],
        "two lengths": [post + f"Content-Length: 0\r\nContent-Length: {len(evil)}\r\n\r\n" + evil],
        "length list": [post + f"Content-Length: 0, {len(evil)}\r\n\r\n" + evil],
        "length sign": [post + f"Content-Length: +{len(evil)}\r\n\r\n" + evil],
        "pipelined": [
            head + "\r\n" + f"GET http://inspected.test:{port}/private HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n"
        ],
        "pipelined in tunnel": [tunnel, inner + "\r\n" + evil],
        "bare lf": [head.replace("\r\n", "\n") + "\n" + evil],
        "bare cr": [head + "X: y\rGET /private HTTP/1.1\r\n\r\n"],
        "folded": [head + "X: y\r\n GET /private HTTP/1.1\r\n\r\n"],
        "space before colon": [head + f"Content-Length : {len(evil)}\r\n\r\n" + evil],
        "nul": [head + "X: a\x00b\r\n\r\n"],
        "crlf in target": [
            f"GET http://inspected.test:{port}/public/x%0d%0aX:%20y HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n"
        ],
        "two hosts": [head + "Host: other.test\r\n\r\n"],
        "host differs": [tunnel, "GET /public/x HTTP/1.1\r\nHost: other.test\r\n\r\n"],
        "absolute differs": [
            tunnel,
            f"GET http://other.test:{port}/public/x HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n",
        ],
        "no host": [tunnel, "GET /public/x HTTP/1.1\r\n\r\n"],
        "http 0.9": [tunnel, "GET /public/x\r\n\r\n"],
        "http 2.0 preface": [tunnel, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
        "lower-case method": [tunnel, f"get /public/x HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n"],
        "other method": [tunnel, f"DELETE /public/x HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n"],
        "override header": [
            tunnel,
            f"DELETE /public/form HTTP/1.1\r\nX-HTTP-Method-Override: GET\r\nHost: inspected.test:{port}\r\n\r\n",
        ],
        "connect inside": [tunnel, f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n"],
        "opaque bytes": [tunnel, "\x05\x01\x00" + "A" * 64],
        "ssh": [tunnel, "SSH-2.0-x\r\n" + "A" * 64],
        "connection names host": [head + "Connection: host\r\n\r\n"],
        "connect with body": [
            f"CONNECT inspected.test:{port} HTTP/1.1\r\nHost: i\r\nContent-Length: {len(evil)}\r\n\r\n" + evil
        ],
        "other scheme": [f"GET https://inspected.test:{port}/public/x HTTP/1.1\r\nHost: inspected.test\r\n\r\n"],
        "ftp scheme": [f"GET ftp://inspected.test:{port}/public/x HTTP/1.1\r\nHost: inspected.test\r\n\r\n"],
        "origin form": [f"GET /public/x HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n"],
    }


NAMES = list(smuggled(0))
# These carry one request that is allowed as it stands; what they hide must not have come with it.
MAY_ANSWER_FIRST = {"pipelined", "pipelined in tunnel", "crlf in target"}


@pytest.fixture(scope="module")
def smuggling(upstream: Upstream) -> dict[str, Any]:
    """All of them in one sandbox: {name: (answer, what the upstream heard in all)}."""
    requests = smuggled(upstream.port)
    before = len(upstream.heard)
    answers, _ = ask(upstream, [requests[name] for name in NAMES], pins=PINS)
    return {"answers": dict(zip(NAMES, answers, strict=True)), "heard": b"\n".join(upstream.heard[before:])}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_smuggled(smuggling: dict[str, Any], name: str) -> None:
    """A request that two readers could read differently is refused whole; behind an allowed one nothing rides along."""
    answer = smuggling["answers"][name]
    assert answer.count("UPSTREAM") <= (1 if name in MAY_ANSWER_FIRST else 0), answer
    for word in (b"/private", b"other.test", b"DELETE", b"CONNECT", b"get /", b"SSH-", b"\x05\x01\x00A", b"\r\nX: y"):
        assert word not in smuggling["heard"]


def test_an_upgrade_opens_no_tunnel(upstream: Upstream) -> None:
    """h2c and an unasked WebSocket are not passed on; what follows them is judged like any request."""
    port, before = upstream.port, len(upstream.heard)
    head = f"GET http://inspected.test:{port}/public/x HTTP/1.1\r\nHost: inspected.test:{port}\r\n"
    then = f"GET http://inspected.test:{port}/private HTTP/1.1\r\nHost: inspected.test:{port}\r\n\r\n"
    h2c = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"
    socket_like = "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    ask(upstream, [[head + h2c + then], [head + socket_like + then]], pins=PINS)
    heard = b"".join(upstream.heard[before:])
    assert b"/private" not in heard
    assert b"h2c" not in heard.lower()
    assert b"websocket" not in heard.lower()


def test_the_probe_is_no_door(upstream: Upstream) -> None:
    """policy.local answers 404 to whatever the workload guesses, opens nothing, and cannot be used as a tunnel."""
    requests = [
        ["GET http://policy.local/v1/probe/ HTTP/1.1\r\nHost: policy.local\r\n\r\n"],
        ["GET http://policy.local/v1/probe/" + "0" * 32 + " HTTP/1.1\r\nHost: policy.local\r\n\r\n"],
        ["GET http://policy.local/v1/probe/../probe/x HTTP/1.1\r\nHost: policy.local\r\n\r\n"],
        ["PUT http://policy.local/v1/probe/x HTTP/1.1\r\nHost: policy.local\r\nContent-Length: 0\r\n\r\n"],
        [
            "CONNECT policy.local:80 HTTP/1.1\r\nHost: policy.local\r\n\r\n",
            "GET /v1/probe/x HTTP/1.1\r\nHost: policy.local\r\n\r\n",
        ],
    ]
    answers, _ = ask(upstream, requests)
    assert [answer.split()[1] for answer in answers] == ["404", "404", "404", "404", "403"]


def test_the_name_in_the_hello_must_be_the_tunnels(upstream: Upstream) -> None:
    """A ClientHello for another host in an inspected tunnel gets no request through (domain fronting)."""
    context = ssl.create_default_context()
    outgoing, incoming = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="other.test")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    before = len(upstream.heard)
    tunnel = f"CONNECT inspected.test:{upstream.port} HTTP/1.1\r\nHost: inspected.test\r\n\r\n"
    answers, _ = ask(upstream, [[tunnel, outgoing.read().decode("latin-1")]], pins=PINS)
    assert "UPSTREAM" not in answers[0]
    assert b"other.test" not in b"".join(upstream.heard[before:])
