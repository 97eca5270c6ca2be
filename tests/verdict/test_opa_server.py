"""The second engine against a real Open Policy Agent: over TCP, TLS and a Unix socket, with a token, away and back."""

from __future__ import annotations

import asyncio
import json
import pathlib
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from opa_process import Opa, free_port

from openshell_supervisor.errors import SettingsError
from openshell_supervisor.verdict.engines.opa_client import opa_address, read_token
from openshell_supervisor.verdict.engines.opa_server import (
    RETRY_INTERVAL,
    TIMEOUT,
    OpaServerEngine,
    Rules,
    shipped,
)
from openshell_supervisor.verdict.engines.protocol import EngineError, EngineUnavailable

CONNECTION = "egress_authorization"
SOON = 20 * RETRY_INTERVAL
"""Seconds within which an outage is noticed or over, on a busy machine."""


def question(host: str = "a.example.test", port: int = 443) -> str:
    """An input whose endpoint is a.example.test:443: allowed there, and nowhere else."""
    endpoint = {"index": 0, "host": "a.example.test", "ports": [443]}
    return json.dumps(
        {
            "network": {"host": host, "port": port},
            "runtime": {"require_binary_identity": False},
            "policies_exist": True,
            "network_policies": {"p": {"endpoints": [endpoint]}},
            "globs": {},
        }
    )


async def action(engine: OpaServerEngine, text: str) -> str:
    """What the engine says after it was prepared, as the proxy does it: the action, or why there is none."""

    def once() -> str:
        try:
            return str(engine.ask(CONNECTION, text)["action"])
        except EngineUnavailable as error:
            return f"unavailable: {error}"
        except EngineError as error:
            return f"error: {error}"

    await engine.prepare(once)
    return once()


async def eventually(holds: Callable[[], object], limit: float = SOON) -> None:
    """Wait until `holds`; fail after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


@pytest.fixture
def told() -> list[str]:
    """What the engine told: a reason when an outage began, "" when it ended."""
    return []


@pytest.fixture
def server(opa_program: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Opa]:
    """A running OPA on a Unix socket."""
    opa = Opa(opa_program, f"unix:{tmp_path}/opa.sock")
    opa.start()
    yield opa
    opa.stop()


@pytest.fixture
async def engine(server: Opa, told: list[str]) -> AsyncIterator[OpaServerEngine]:
    """An engine that has reached `server`."""
    async with OpaServerEngine(opa_address(server.url), told=told.append) as made:
        assert not made.outage
        yield made


async def test_a_prepared_question_is_answered(engine: OpaServerEngine, told: list[str]) -> None:
    """The server decides with our rules; its neighbour is denied by them, not by a fault."""
    assert await action(engine, question()) == "allow"
    assert await action(engine, question(port=80)) == "deny"
    assert await action(engine, question("b.example.test")) == "deny"
    assert told == []


async def test_a_question_that_was_not_prepared_is_no_answer(engine: OpaServerEngine) -> None:
    """`ask` never waits: without `prepare` it fails, and after it the same question is answered."""
    with pytest.raises(EngineUnavailable):
        engine.ask(CONNECTION, question())
    assert await action(engine, question()) == "allow"
    assert engine.ask(CONNECTION, question())["action"] == "allow"


async def test_questions_that_lead_to_others_are_prepared_too(engine: OpaServerEngine) -> None:
    """A decision asks a second question only after the first answer: `prepare` follows, also for several at once."""

    def decide() -> list[str]:
        first = engine.ask(CONNECTION, question())["action"]
        second = engine.ask(CONNECTION, question(port=80))["action"]
        return [first, second]

    def quietly() -> object:
        try:
            return decide()
        except EngineError:
            return None

    await asyncio.gather(*(engine.prepare(quietly) for _ in range(20)))
    assert decide() == ["allow", "deny"]


async def test_an_undefined_rule_is_an_error_and_no_outage(engine: OpaServerEngine, told: list[str]) -> None:
    """A question that cannot be answered fails alone; the next one is answered."""
    with pytest.raises(EngineError, match="is undefined"):
        await engine.prepare(lambda: _ignoring(engine, "no_such_rule"))
        engine.ask("no_such_rule", question())
    assert await action(engine, question()) == "allow"
    assert told == []


def _ignoring(engine: OpaServerEngine, rule: str) -> None:
    try:
        engine.ask(rule, question())
    except EngineError:
        pass


async def test_away_everything_is_denied_and_back_it_is_decided_again(
    engine: OpaServerEngine, server: Opa, told: list[str]
) -> None:
    """An outage begins with the first question, is told once, denies what was answered before, and ends without our help."""
    assert await action(engine, question()) == "allow"
    server.stop()
    assert (await action(engine, question("b.example.test"))).startswith("unavailable: ")
    assert (await action(engine, question())).startswith("unavailable: "), "also what is remembered"
    await asyncio.sleep(3 * RETRY_INTERVAL)
    assert (await action(engine, question())).startswith("unavailable: ")
    assert len(told) == 1 and told[0]
    server.start()  # it knows nothing: the rules are pushed again
    await eventually(lambda: not engine.outage)
    assert told == [told[0], ""]
    assert await action(engine, question("c.example.test")) == "deny"
    assert await action(engine, question()) == "allow"


async def test_a_silent_end_is_noticed_without_a_question(
    engine: OpaServerEngine, server: Opa, told: list[str]
) -> None:
    """The health check finds an outage while nobody asks."""
    server.stop()
    await eventually(lambda: engine.outage)
    assert len(told) == 1


async def test_no_server_at_the_start_is_an_outage_that_ends(
    opa_program: pathlib.Path, tmp_path: pathlib.Path, told: list[str]
) -> None:
    """We start without it, deny, say so, and decide as soon as it is there."""
    opa = Opa(opa_program, f"unix:{tmp_path}/late.sock")
    async with OpaServerEngine(opa_address(opa.url), told=told.append) as engine:
        assert (await action(engine, question())).startswith("unavailable: ")
        assert len(told) == 1
        opa.start()
        try:
            await eventually(lambda: not engine.outage)
            assert await action(engine, question()) == "allow"
        finally:
            opa.stop()
    assert engine.outage, "after the end there are no decisions"


async def test_a_server_that_lost_the_rules_gets_them_again(engine: OpaServerEngine, told: list[str]) -> None:
    """Somebody deletes our module: the next new question pushes it and is answered."""
    assert await action(engine, question()) == "allow"
    assert engine._client is not None
    await engine._client.delete_policy(shipped().name)
    assert await action(engine, question(port=80)) == "deny"
    assert await action(engine, question("d.example.test")) == "deny"
    assert told == []


async def test_a_server_that_hangs_costs_a_second_and_is_an_outage(told: list[str]) -> None:
    """Something accepts and never answers: the start goes on after the timeout, and everything is denied."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        begun = time.monotonic()
        async with OpaServerEngine(
            opa_address(f"http://127.0.0.1:{mute.getsockname()[1]}"), told=told.append
        ) as engine:
            assert TIMEOUT * 0.9 < time.monotonic() - begun < TIMEOUT * 3
            assert (await action(engine, question())).startswith("unavailable: ")
            assert time.monotonic() - begun < TIMEOUT * 3, "a known outage costs no further second"
    assert len(told) == 1 and "no answer within 1 s" in told[0]


SLOW = """package slow

huge := count([1 | some a in numbers.range(1, 3000); some b in numbers.range(1, 3000); a * b == 7]) if input.slow

quick := 1
"""


async def test_a_heavy_question_is_denied_in_time_and_no_outage(server: Opa, told: list[str]) -> None:
    """One question that takes longer than a second is denied; the server is well, and answers the next."""
    rules = Rules(SLOW, "slow", "slow", probe=("quick", "{}"))
    async with OpaServerEngine(opa_address(server.url), rules, told.append) as engine:

        def ask(rule: str, text: str) -> object:
            try:
                return engine.ask(rule, text)
            except EngineError:
                return None

        begun = time.monotonic()
        await engine.prepare(lambda: ask("huge", '{"slow":true}'))
        assert time.monotonic() - begun < TIMEOUT * 2
        assert ask("huge", '{"slow":true}') is None
        await eventually(lambda: not engine._checking.is_set())
        await engine.prepare(lambda: ask("quick", '{"n":1}'))
        assert engine.ask("quick", '{"n":1}') == 1
    assert told == []


async def test_over_tcp(opa_program: pathlib.Path) -> None:
    """`http://HOST:PORT` on loopback."""
    opa = Opa(opa_program, f"http://127.0.0.1:{free_port()}")
    opa.start()
    try:
        async with OpaServerEngine(opa_address(opa.url)) as engine:
            assert await action(engine, question()) == "allow"
    finally:
        opa.stop()


AUTHZ = """package system.authz

default allow := false

allow if input.identity == "right-token"
"""


async def test_the_token_is_sent_and_read_anew(
    opa_program: pathlib.Path, tmp_path: pathlib.Path, told: list[str]
) -> None:
    """A server that asks for a bearer token refuses a wrong one (an outage); with the right one in the same file it ends."""
    (tmp_path / "authz.rego").write_text(AUTHZ)
    token = tmp_path / "token"
    token.write_text("wrong-token\n")
    arguments = ("--authentication=token", "--authorization=basic", str(tmp_path / "authz.rego"))
    opa = Opa(opa_program, f"unix:{tmp_path}/opa.sock", arguments)
    opa.start()
    try:
        async with OpaServerEngine(opa_address(opa.url, token_file=token), told=told.append) as engine:
            assert "401" in engine.outage
            token.write_text("right-token\n")
            await eventually(lambda: not engine.outage)
            assert await action(engine, question()) == "allow"
            assert not any("token" in text for text in told)
    finally:
        opa.stop()


EC_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:P-256"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with a CA (ca.pem), its certificate for 127.0.0.1 (server.pem, server.key) and another CA (other.pem)."""
    place = tmp_path_factory.mktemp("tls")
    if shutil.which("openssl") is None:
        pytest.skip("needs the client program openssl")
    for name in ("ca", "other"):
        names = f"-keyout {name}.key -out {name}.pem -subj /CN={name} -addext keyUsage=critical,keyCertSign"
        _openssl(place, f"req -x509 {EC_KEY} -nodes -days 2 {names}")
    _openssl(place, f"req {EC_KEY} -nodes -keyout server.key -out server.csr -subj /CN=opa")
    (place / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    _openssl(
        place,
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile names -out server.pem -days 2",
    )
    return place


def _openssl(place: pathlib.Path, arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], cwd=place, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(("ca", "well"), [("ca.pem", True), ("other.pem", False), (None, False)])
async def test_tls_is_checked_against_the_ca_file(
    opa_program: pathlib.Path, certificate: pathlib.Path, ca: str | None, well: bool
) -> None:
    """Only the CA of the file is believed: with it the server decides, with another or the system's it is an outage."""
    port = free_port()
    arguments = (f"--tls-cert-file={certificate}/server.pem", f"--tls-private-key-file={certificate}/server.key")
    opa = Opa(opa_program, f"https://127.0.0.1:{port}", arguments)
    opa.start()
    try:
        async with OpaServerEngine(opa_address(opa.url, ca_file=certificate / ca if ca else None)) as engine:
            assert bool(engine.outage) is not well
            said = await action(engine, question())
            assert said == "allow" if well else "certificate" in said.lower()
    finally:
        opa.stop()


async def test_a_redirect_is_not_followed(tmp_path: pathlib.Path) -> None:
    """A server that sends us elsewhere gets no token carried there; it is an outage."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 307 Go\r\nLocation: /elsewhere\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    path = tmp_path / "odd.sock"
    async with await asyncio.start_unix_server(serve, path):
        async with OpaServerEngine(opa_address(f"unix:{path}")) as engine:
            assert "307" in engine.outage
    assert seen and not any(b"/elsewhere" in head for head in seen)


@pytest.mark.parametrize(
    "text",
    ["", "opa", "http://", "ftp://opa.test", "unix:opa.sock", "unix:", "http://opa.test/path", "http://user:secret@opa.test",
     "http://opa.test:99999", "http://opa.test?x=1", "http://opa.test:0", "https://[::1", "http://opa.test\n"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(text: str) -> None:
    """With a hint that names the three forms, and without a password in the message."""
    with pytest.raises(SettingsError) as caught:
        opa_address(text)
    assert "unix:/PATH" in caught.value.hint
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "host", "port", "tls", "path"),
    [
        ("http://opa.test:8181", "opa.test", 8181, False, ""),
        ("http://opa.test/", "opa.test", 80, False, ""),
        ("https://opa.test", "opa.test", 443, True, ""),
        ("https://[::1]:8443", "[::1]", 8443, True, ""),
        ("unix:/run/opa.sock", "opa.invalid", 80, False, "/run/opa.sock"),
        ("unix:///run/opa.sock", "opa.invalid", 80, False, "/run/opa.sock"),
    ],
)
def test_addresses(text: str, host: str, port: int, tls: bool, path: str) -> None:
    """The three forms, with the ports of their schemes."""
    found = opa_address(text)
    assert (found.host, found.port, found.tls, found.socket) == (host, port, tls, path)


def test_a_ca_file_needs_tls(tmp_path: pathlib.Path) -> None:
    """A CA file that would not be used is a contradiction; with https it is taken."""
    for text in ("http://opa.test", "unix:/run/opa.sock"):
        with pytest.raises(SettingsError):
            opa_address(text, ca_file=tmp_path)
    assert opa_address("https://opa.test", ca_file=tmp_path).ca_file == tmp_path


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"a\nb", b"\xff", b"x" * 20_000])
def test_a_token_file_that_holds_no_token(tmp_path: pathlib.Path, content: bytes) -> None:
    """Nothing that could break a header, and no endless file; white space around a token is left out."""
    file: Any = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="token file"):
        read_token(file)
    file.write_bytes(b" abc.def-1_2=\n")
    assert read_token(file) == "abc.def-1_2="
