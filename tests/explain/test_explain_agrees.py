"""Explain and the product cannot disagree: random requests through a real run, each answer, body and event compared.

The same recording, replayed under its own policy, changes nothing; under another one, exactly what explain says of each request.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pathlib
import random
import re
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "e2e"))

import product

from openshell_supervisor.explain.command import explain
from openshell_supervisor.explain.question import Answer, Question, ask
from openshell_supervisor.explain.replay import replay
from openshell_supervisor.policy.yaml_file import parse
from openshell_supervisor.verdict.decide import build_generation

QUESTIONS = 120
PYTHON, SHELL = os.path.realpath(sys.executable), os.path.realpath("/bin/sh")
BINARIES = ([{"path": "/**"}], [{"path": PYTHON}], [{"path": SHELL}], [{"path": "/usr/bin/none-of-ours"}], [])
"""Any program, the one that asks, its parent, another one, none."""
CLIENT = pathlib.Path(__file__).parent / "programs" / "asker.py"
LISTED = ("h0.agree.test", "h1.agree.test", "h2.agree.test", "h3.agree.test", "h4.agree.test")
HOSTS = (*LISTED, "w.wild.agree.test", "a.b.wild.agree.test", "unlisted.agree.test")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
PATHS = (
    "/",
    "/v1",
    "/v1/a",
    "/v1/a/b",
    "/v1//a",
    "/v1/./a",
    "/v1/../x",
    "/../x",
    "/v1/%61",
    "/v1/a%2Fb",
    "/x;y=1/z",
    "/%zz",
    "/V1/a",
)
QUERIES = ("", "?", "?q=a", "?q=a.b", "?q=b&q=a", "?r=1", "?q=%zz", "?q=%41+")
GLOBS = ("/**", "/v1/**", "/v1/*", "/v1", "/**/a", "/x/*", "/[", "**")


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers everything, so that a request that should have been refused would be seen to pass."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = b"" if self.command == "HEAD" else b"upstream"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Upstream", "yes")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = answer

    def log_message(self, *_: Any) -> None: ...


@contextlib.contextmanager
def upstream() -> Iterator[tuple[str, int]]:
    """A server on an address of this test's own."""
    server = http.server.ThreadingHTTPServer(
        (f"127.0.{64 + secrets.randbelow(128)}.{2 + secrets.randbelow(250)}", 0), Upstream
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield str(server.server_address[0]), server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def random_policy(dice: random.Random, port: int) -> str:
    """A policy over the hosts above: every host its own settings, so that no two endpoints contradict each other."""

    def match() -> dict[str, Any]:
        found: dict[str, Any] = {"method": dice.choice((*METHODS, "*", "get")), "path": dice.choice(GLOBS)}
        if dice.random() < 0.3:
            found["query"] = {dice.choice("qr"): dice.choice(("a", "*", "a.*", "**"))}
        return found

    def endpoint(host: str) -> dict[str, Any]:
        found: dict[str, Any] = {"host": host, "port": port}
        if host not in LISTED[:2] and dice.random() < 0.2:
            return found
        enforcement = {"h0.agree.test": "audit", "h1.agree.test": "enforce"}.get(host) or dice.choice(
            ("enforce", "audit")
        )
        found |= {"protocol": "rest", "enforcement": enforcement}
        if host in LISTED[:2]:
            found["access"] = "read-only"
        elif dice.random() < 0.3:
            found["access"] = dice.choice(("read-only", "read-write", "full"))
        else:
            found["rules"] = [{"allow": match()} for _ in range(dice.randint(1, 3))]
        if dice.random() < 0.5:
            found["deny_rules"] = [match() for _ in range(dice.randint(1, 2))]
        if dice.random() < 0.3:
            found["allow_encoded_slash"] = True
        if dice.random() < 0.2:
            found["path"] = dice.choice(("/v1/**", "/**", "/v1"))
        return found

    def binaries(host: str) -> list[dict[str, str]]:
        fixed = {LISTED[0]: BINARIES[0], LISTED[1]: BINARIES[0], LISTED[4]: BINARIES[3]}
        return fixed.get(host) or dice.choice(BINARIES)

    hosts = [*LISTED, "*.wild.agree.test"]
    rules = {
        f"rule{number}": {"endpoints": [endpoint(host)], "binaries": binaries(host)}
        for number, host in enumerate(hosts)
    }
    return json.dumps({"version": 1, "network_policies": rules})


def random_questions(dice: random.Random, port: int) -> list[Question]:
    """Requests in tunnels and in the clear, and bare connections, to the port of the upstream and one that is not listed."""
    found = []
    for _ in range(QUESTIONS):
        host = dice.choice(HOSTS)
        host = dice.choice((host, host, host.upper()))
        at = port if dice.random() < 0.92 else port ^ 1
        way = dice.choice(("connect", "forward"))
        target = dice.choice(PATHS) + dice.choice(QUERIES)
        found.append(Question(host, at, dice.choice(METHODS), target, way, PYTHON, (SHELL,)))
    return found


def compare(answer: Answer, seen: dict[str, Any], shown: str) -> None:
    """The proxy's answer is the one that explain foretold: passed, or refused with this reason."""
    if answer.outcome in ("allowed", "audited"):
        assert (seen["status"], seen["upstream"]) == (200, True), (shown, answer, seen)
        return
    assert not seen["upstream"], (shown, answer, seen)
    assert seen["status"] == (400 if answer.outcome == "rejected" else 403), (shown, answer, seen)
    if seen["body"]:
        body = json.loads(seen["body"])
        assert body["reason_id"] == answer.reason_id, (shown, answer, body)
        assert told(body["reason"]) == told(answer.reason), (shown, answer, body)
        if answer.outcome == "blocked":
            assert body["hint"] == answer.hint
    else:
        assert seen["deny"] == answer.reason_id


def told(reason: str | None) -> str | None:
    """A reason without the command line, which the question does not know."""
    return re.sub(r", cmdline: \[.*?\]\)", ")", reason) if reason else reason


def as_recorded(answer: Answer, question: Question) -> tuple[Any, ...]:
    """The last event of a question, as explain foretells it: method, action, policy, what decided, reason."""
    action = {"allowed": "Allowed", "audited": "Observed"}.get(answer.outcome, "Denied")
    reason = None if answer.outcome == "allowed" else answer.reason
    bare = answer.stage == "connection" and question.transport == "connect"
    engine = {"connection": "opa", "request": "l7"}.get(answer.stage, "http-parser")
    return ("" if bare else question.method, question.host.lower(), question.port, action, engine, told(reason))


def recorded(event: dict[str, Any]) -> tuple[Any, ...]:
    """The same of an event."""
    method = event.get("http_request", {}).get("http_method", "")
    end = event["dst_endpoint"]
    return (
        method,
        end["domain"],
        end["port"],
        event["action"],
        event["firewall_rule"]["type"],
        told(event.get("status_detail")),
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_explain_and_the_product_agree(seed: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """120 random requests of a program under a random policy: status, reason_id, reason and hint of every answer, action and
    reason of every event are what explain says beforehand; and all kinds of outcome occur."""
    dice = random.Random(seed)
    with upstream() as (address, port):
        policy, questions = random_policy(dice, port), random_questions(dice, port)
        asked = json.dumps([[q.transport, q.host, q.port, q.method, q.target] for q in questions])
        ran = product.run(
            ["/bin/sh", "-c", f'{sys.executable} -c "$1" "$2"; exit $?', "sh", CLIENT.read_text(), asked],
            policy=policy,
            options=[item for host in HOSTS for item in ("--resolve", f"{host}={address}")],
        )
    assert ran.code == 0, ran.err
    if ran.rung == "observed":
        pytest.skip("needs a network namespace: here the product only observes")
    identity = ran.layer("binary_identity")["state"] == "enforced"
    generation = build_generation(parse(policy, "random").policy, 1, identity)
    foretold = [ask(question, generation) for question in questions]
    answers = json.loads(ran.out)
    for question, answer, seen in zip(questions, foretold, answers, strict=True):
        compare(answer, seen, f"{question} under {policy}")
    assert {answer.outcome for answer in foretold} == {"allowed", "audited", "blocked", "rejected"}
    decided = [event for event in ran.events if event["class_uid"] in (4001, 4002) and event.get("action")]
    opened = [event for event in decided if event["class_uid"] == 4001 and event["action"] == "Allowed"]
    rest = Counter(recorded(event) for event in decided if event not in opened)
    expected = Counter(
        as_recorded(answer, question)
        for question, answer in zip(questions, foretold, strict=True)
        if not (answer.outcome == "allowed" and answer.stage == "connection" and question.transport == "connect")
    )
    assert rest == expected
    assert not identity or any(answer.reason_id == "binary_not_allowed" for answer in foretold)
    check_replay(tmp_path, ran.events, policy, random_policy(dice, port))
    capsys.readouterr()


def check_replay(directory: pathlib.Path, events: list[dict[str, Any]], policy: str, other: str) -> None:
    """Under its own policy a recording changes nothing but what hangs on a query; under another, something."""
    recording, own, new = directory / "events.jsonl", directory / "own.yaml", directory / "new.yaml"
    recording.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    own.write_text(policy)
    new.write_text(other)
    own_policy, new_policy = parse(policy, "own").policy, parse(other, "new").policy
    same = replay(recording, build_generation(own_policy, 1), build_generation(own_policy, 1, True))
    assert [change for change in same.changes if not change.unsure] == []
    assert same.decided > QUESTIONS / 2
    changed = replay(recording, build_generation(new_policy, 1), build_generation(new_policy, 1, True))
    assert changed.decided == same.decided
    assert [change for change in changed.changes if not change.unsure]
    assert explain(["--policy", str(new), "--replay", str(recording)]) == 1
    assert os.path.getsize(recording) > 0
