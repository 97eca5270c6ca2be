"""A recording decided again: the events are made by the proxy's own gate, the answers are those of the new policy."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "telemetry"))

import examples

from openshell_supervisor.errors import SettingsError
from openshell_supervisor.explain.command import explain
from openshell_supervisor.explain.replay import Replay, replay
from openshell_supervisor.policy.yaml_file import parse
from openshell_supervisor.proxy.gate import Gate, Origin
from openshell_supervisor.telemetry.events import Context, Endpoint, Process, Telemetry
from openshell_supervisor.verdict.decide import Generation, build_generation
from openshell_supervisor.verdict.facts import Verdict

SOURCE = Endpoint(ip="10.200.0.2", port=40000)


def policy(*endpoints: str) -> str:
    """A policy of one rule; each endpoint is YAML flow text without its braces."""
    lines = "\n".join(f"      - {{{endpoint}}}" for endpoint in endpoints)
    return f"version: 1\nnetwork_policies:\n  p:\n    endpoints:\n{lines}\n    binaries: [{{path: /usr/bin/curl}}]\n"


def rest(host: str, enforcement: str = "enforce", rule: str = "access: read-only") -> str:
    """An inspected endpoint."""
    return f"host: {host}, port: 443, protocol: rest, enforcement: {enforcement}, {rule}"


def generation(text: str, *, identity: bool = False) -> Generation:
    """A policy ready to be asked."""
    return build_generation(parse(text, "test").policy, 1, identity)


class Recorder:
    """A sandbox whose gate writes events to a list; nothing is sent."""

    def __init__(self, text: str, *, observe: bool = False) -> None:
        self.events: list[dict[str, Any]] = []
        self.telemetry = Telemetry(Context(), [self])
        self.gate = Gate(generation=lambda: made, telemetry=self.telemetry, observe=observe)
        made = generation(text)

    def write(self, event: dict[str, Any], line: str) -> None:
        """The sink."""
        self.events.append(json.loads(json.dumps(event)))

    def close(self) -> None:
        """Nothing to close."""

    def request(self, method: str, host: str, target: str, times: int = 1) -> None:
        """A request in a tunnel."""
        for _ in range(times):
            self.gate.request(Origin(SOURCE, host, 443, "https", forward=False), method, target)

    def connect(self, host: str) -> None:
        """A CONNECT, written down as the proxy does."""
        origin = Origin(SOURCE, host, 443, "https", forward=False)
        verdict = self.gate.connection(origin)
        if verdict.allow:
            self.gate.connect_allowed(origin, verdict, inspected=verdict.inspected)
        else:
            self.gate.connect_denied(origin, verdict)

    def file(self, directory: pathlib.Path) -> pathlib.Path:
        """The events as `--ocsf-file` writes them."""
        path = directory / "events.jsonl"
        path.write_text("".join(f"{json.dumps(event)}\n" for event in self.events))
        return path


def kinds(outcome: Replay) -> dict[str, int]:
    """Events by kind of change."""
    return outcome.counts()


def test_what_would_change_is_counted_and_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Allowed becomes blocked, blocked becomes allowed, audited becomes blocked; what stays is not named."""
    record = Recorder(policy(rest("a.test"), rest("b.test", "audit"), "host: c.test, port: 443"))
    record.request("GET", "a.test", "/kept")
    record.request("GET", "a.test", "/gone", times=3)
    record.request("POST", "a.test", "/new")
    record.request("DELETE", "b.test", "/watched", times=2)
    record.connect("c.test")
    record.connect("d.test")
    new = policy(
        rest("a.test", rule="rules: [{allow: {method: '*', path: /kept}}, {allow: {method: POST, path: /new}}]"),
        rest("b.test"),
        "host: d.test, port: 443",
    )
    file, target = record.file(tmp_path), tmp_path / "new.yaml"
    target.write_text(new)
    assert explain(["--replay", str(file), "--policy", str(target), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"allowed->blocked": 4, "audited->blocked": 2, "blocked->allowed": 2}
    changed = {(c["method"], c["host"], c["path"], c["from"], c["to"], c["times"]) for c in found["changes"]}
    assert changed == {
        ("GET", "a.test", "/gone", "allowed", "blocked", 3),
        ("POST", "a.test", "/new", "blocked", "allowed", 1),
        ("DELETE", "b.test", "/watched", "audited", "blocked", 2),
        ("", "c.test", "", "allowed", "blocked", 1),
        ("", "d.test", "", "blocked", "allowed", 1),
    }
    assert explain(["--replay", str(file), "--policy", str(target)]) == 1
    out = capsys.readouterr().out
    assert "9 events, 9 decided again" in out and "4 allowed -> blocked" in out
    assert "allowed -> blocked: GET /gone on a.test:443 (3 times): GET /gone not permitted by policy" in out


def test_nothing_changes_under_the_same_policy(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, and it is said."""
    text = policy(rest("a.test"), rest("b.test", "audit"))
    record = Recorder(text)
    for host in ("a.test", "b.test", "c.test"):
        for method in ("GET", "POST"):
            record.request(method, host, "/x")
        record.connect(host)
    (tmp_path / "p.yaml").write_text(text)
    assert explain(["--replay", str(record.file(tmp_path)), "--policy", str(tmp_path / "p.yaml")]) == 0
    assert "nothing would change" in capsys.readouterr().out


def test_a_sandbox_that_only_watched(tmp_path: pathlib.Path) -> None:
    """What was written down as `would be denied` counts as blocked; under another policy it may pass."""
    text = policy(rest("a.test"), rest("b.test", "audit"))
    record = Recorder(text, observe=True)
    record.request("POST", "a.test", "/x")
    record.request("POST", "b.test", "/x")
    record.connect("c.test")
    file = record.file(tmp_path)
    assert kinds(replay(file, generation(text))) == {}
    wider = policy(rest("a.test", rule="access: full"), rest("b.test"), "host: c.test, port: 443")
    assert kinds(replay(file, generation(wider))) == {"blocked->allowed": 2, "audited->blocked": 1}


def test_a_verdict_that_hangs_on_a_query_is_marked(tmp_path: pathlib.Path) -> None:
    """Events hold no query: the change is named as unsure, its neighbour without a query matcher is not."""
    record = Recorder(policy(rest("a.test"), rest("b.test")))
    record.request("GET", "a.test", "/x?q=a")
    record.request("GET", "b.test", "/x?q=a")
    new = policy(
        rest("a.test", rule="rules: [{allow: {method: GET, path: '/**', query: {q: a}}}]"),
        rest("b.test", rule="access: full, deny_rules: [{method: GET, path: /x}]"),
    )
    outcome = replay(record.file(tmp_path), generation(new))
    assert {(change.recorded.question.host, change.unsure) for change in outcome.changes} == {
        ("a.test", True),
        ("b.test", False),
    }
    assert outcome.unsure == 1


def test_who_asked_counts_where_it_is_recorded(tmp_path: pathlib.Path) -> None:
    """An event that names its program is asked with binary identity; one that does not is not."""
    record = Recorder(policy("host: a.test, port: 443"))
    for program in ("/usr/bin/curl", "/usr/bin/wget", "-"):
        record.telemetry.network(
            "Open",
            "CONNECT allowed a.test:443",
            action="Allowed",
            dst=Endpoint("a.test", None, 443),
            actor=Process(program, 1),
            policy="p",
            engine="opa",
        )
    text = policy("host: a.test, port: 443")
    outcome = replay(record.file(tmp_path), generation(text), generation(text, identity=True))
    (change,) = outcome.changes
    assert (change.recorded.question.binary, change.kind) == ("/usr/bin/wget", "allowed->blocked")
    assert change.unsure  # its ancestors are not recorded, and a rule may list one


def test_what_the_policy_did_not_decide_is_left_out(tmp_path: pathlib.Path) -> None:
    """Refused addresses, malformed requests, failures, other events: counted by reason, never decided."""
    record = Recorder(policy(rest("a.test")))
    origin = Origin(SOURCE, "a.test", 443, "https", forward=False)
    verdict = record.gate.connection(origin)
    record.gate.address_denied(origin, "CONNECT", "internal address", "no", verdict)
    record.request("GET", "a.test", "/../x")
    record.gate.failed("away", origin)
    record.telemetry.lifecycle("Start", "up")
    record.gate.connect_denied(origin, Verdict(False, "caller_unknown", "failed to resolve peer binary: gone"))
    record.request("GET", "a.test", "/x")
    outcome = replay(record.file(tmp_path), generation(policy(rest("b.test"))))
    assert outcome.left_out == {
        "not decided by the policy": 2,
        "no decision": 1,
        "not traffic": 1,
        "decided before any rule": 1,
    }
    assert (outcome.events, outcome.decided, kinds(outcome)) == (6, 1, {"allowed->blocked": 1})


def test_what_a_body_decides_is_left_out(tmp_path: pathlib.Path) -> None:
    """A recording holds no bodies: a request that the new policy would read as GraphQL is counted, not guessed at."""
    record = Recorder(policy(rest("a.test", rule="access: full")))
    record.request("POST", "a.test", "/graphql")
    record.request("POST", "a.test", "/other")
    new = "host: a.test, port: 443, path: /{}, protocol: {}, enforcement: enforce, access: read-only"
    outcome = replay(
        record.file(tmp_path), generation(policy(new.format("graphql", "graphql"), new.format("other", "rest")))
    )
    assert outcome.decided == 1 and kinds(outcome) == {"allowed->blocked": 1}
    ((why, count),) = outcome.left_out.items()
    assert why.startswith("graphql: ") and count == 1


def test_methods_that_the_schema_does_not_know(tmp_path: pathlib.Path) -> None:
    """PROPFIND stands elsewhere in an event and is found there."""
    record = Recorder(policy(rest("a.test", rule="access: full")))
    record.request("PROPFIND", "a.test", "/x")
    (change,) = replay(record.file(tmp_path), generation(policy(rest("a.test")))).changes
    assert change.recorded.question.method == "PROPFIND"


def test_events_of_the_reference_are_read(tmp_path: pathlib.Path) -> None:
    """Recordings of the supervisor that this one replaces can be replayed."""
    file = tmp_path / "events.jsonl"
    file.write_text("".join(f"{json.dumps(row['event'])}\n" for row in examples.rows()))
    outcome = replay(file, generation(policy(rest("a.test"))))
    assert outcome.events == examples.ROWS
    assert outcome.decided >= 8


@pytest.mark.parametrize("line", ["{", "[]", '{"class_uid": 40', "\xff"])
def test_a_line_that_is_no_event(tmp_path: pathlib.Path, line: str) -> None:
    """A torn or foreign line is an error with its number; nothing is guessed from the rest."""
    record = Recorder(policy(rest("a.test")))
    record.request("GET", "a.test", "/x")
    file = record.file(tmp_path)
    file.write_bytes(file.read_bytes() + line.encode("latin-1"))
    with pytest.raises(SettingsError) as caught:
        replay(file, generation(policy(rest("a.test"))))
    assert caught.value.message.startswith(f"{file}:2: ")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 70000)
    | st.sampled_from(("Allowed", "Denied", "opa", "l7", "a.test", "/x", "GET", "")),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(("url", "type", "domain", "port", "path", "process", "name", "http_method", "hostname")),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
events = st.fixed_dictionaries(
    {"class_uid": st.sampled_from((4001, 4002, "4001", None)) | values, "action": st.just("Allowed") | values},
    optional=dict.fromkeys(("firewall_rule", "dst_endpoint", "http_request", "actor", "unmapped", "message"), values),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(events, max_size=5))
def test_no_event_is_too_odd(found: list[dict[str, Any]]) -> None:
    """Whatever a line holds, it is decided or left out."""
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(f"{json.dumps(event)}\n" for event in found))
        file.flush()
        outcome = replay(pathlib.Path(file.name), generation(policy(rest("a.test"))))
    assert outcome.events == len(found) == outcome.decided + sum(outcome.left_out.values())
