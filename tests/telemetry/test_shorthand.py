"""The one-line form: byte for byte what the reference shows, and never more than one line."""

from __future__ import annotations

import copy
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from openshell_supervisor.telemetry import ocsf
from openshell_supervisor.telemetry.shorthand import cut, one_line, shorthand
from telemetry import examples, schema
from telemetry.hostile import HOSTILE, hostile_text


def test_all_example_rows_are_reproduced() -> None:
    """The line of each of the 91 reference events equals the reference's line, trailing spaces included."""
    rows = examples.rows()
    assert len(rows) == examples.ROWS
    wrong = [
        (number, shorthand(row["event"]), row["shorthand"])
        for number, row in enumerate(rows, start=1)
        if shorthand(row["event"]) != row["shorthand"]
    ]
    assert wrong == []


def test_the_examples_cannot_be_missing_in_silence(tmp_path: pathlib.Path) -> None:
    """Without the examples file the test fails under CI=true, and otherwise is skipped with a reason that names it."""
    for ci, outcome in (("true", "1 failed"), ("", "1 skipped")):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"{__file__}::{NAMED}"],
            env={"PATH": "/usr/bin:/bin", "CI": ci, "OPENSHELL_SHARED": str(tmp_path)},
            cwd=examples.ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert outcome in done.stdout, done.stdout
        assert "ocsf_examples.jsonl" in done.stdout


NAMED = test_all_example_rows_are_reproduced.__name__


def strict(event: dict[str, Any]) -> dict[str, Any]:
    """An upstream-shaped event in our strict shape: the fixes (a)–(i) of the reference, made on the outside."""
    made = copy.deepcopy(event)
    made["device"] |= {"type_id": 6, "type": "Virtual"}
    made["device"]["os"] |= {"type_id": 200, "type": "Linux"}
    container = made.pop("container", None)
    if container:
        image = container.get("image")
        if image:
            image["uid"] = image["name"]
        made["device"]["container"] = container
    if made["class_uid"] in (4001, 4007) and not {"src_endpoint", "dst_endpoint"} & made.keys():
        made["dst_endpoint"] = {"hostname": made["device"]["hostname"]}
    if made["class_uid"] == 1007:
        made.setdefault("actor", {"process": {"name": "openshell-supervisor", "pid": 1}})
    if "connection_info" in made:
        made["connection_info"]["direction_id"] = 2
    if made["class_uid"] == 4002:
        made.pop("is_src_dst_assignment_known", None)
    return made


def test_strict_rows_validate_and_keep_their_line() -> None:
    """What makes an event valid does not change its line. (4002 without a request cannot be made valid without one:
    fix g puts a request there, which the line then shows; those rows are left out.)"""
    checked = 0
    for row in examples.rows():
        made = strict(row["event"])
        if made["class_uid"] == 4002 and not {"http_request", "http_response"} & made.keys():
            continue
        problems = [text for text in schema.deviations(made) if " is called " not in text]
        assert problems == [], row["shorthand"]
        assert shorthand(made) == row["shorthand"]
        checked += 1
    assert checked >= examples.ROWS - 4


def observed(**changes: object) -> dict[str, Any]:
    return {
        "class_uid": 4001,
        "activity_name": "Open",
        "severity_id": 3,
        "action": "Observed",
        "message": "CONNECT observed",
        "status_detail": "endpoint x:1 is not allowed",
        "dst_endpoint": {"domain": "x", "port": 1},
        **changes,
    }


def test_a_would_be_denial_shows_its_reason() -> None:
    """Observed with the mark would_deny shows the reason as a denial does; without the mark it does not (row 91)."""
    marked = observed(status_code="would_deny")
    assert shorthand(marked) == "NET:OPEN [MED] OBSERVED x:1 [reason:endpoint x:1 is not allowed]"
    assert shorthand(observed()) == "NET:OPEN [MED] OBSERVED x:1"
    request = {"http_method": "get", "url": {"scheme": "http", "hostname": "x", "port": 80, "path": "/a"}}
    line = shorthand(observed(class_uid=4002, status_code="would_deny", http_request=request))
    assert line == "HTTP:GET [MED] OBSERVED GET http://x/a [reason:endpoint x:1 is not allowed]"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"action": "Denied", "status_detail": ""}, "NET:OPEN [MED] DENIED x:1"),
        ({"action": "Denied", "status_detail": "a\nb\rc"}, "NET:OPEN [MED] DENIED x:1 [reason:a b c]"),
        (
            {"action": "Denied", "status_detail": None, "message": "é" * 200},
            f"NET:OPEN [MED] DENIED x:1 [reason:{'é' * 128}...]",
        ),
        ({"action": None, "dst_endpoint": {"ip": "2001:db8::1", "port": 443}}, "NET:OPEN [MED] 2001:db8::1:443"),
        ({"action": None, "dst_endpoint": {}}, "NET:OPEN [MED] unknown"),
        ({"action": None, "dst_endpoint": None, "message": "x" * 121}, f"NET:OPEN [MED] [msg:{'x' * 120}...]"),
        ({"action": None, "dst_endpoint": {"hostname": "box"}}, "NET:OPEN [MED] [msg:CONNECT observed]"),
        (
            {"action": None, "actor": {"process": {"name": "/bin/a", "pid": 7}}, "dst_endpoint": None},
            "NET:OPEN [MED] /bin/a(7)",
        ),
        ({"severity_id": 6, "action": None}, "NET:OPEN [FATAL] x:1"),
        ({"severity_id": 99, "action": None}, "NET:OPEN [INFO] x:1"),
    ],
)
def test_network_grammar(changes: dict[str, Any], line: str) -> None:
    """The corners of the NET grammar: reasons, cuts on a character boundary, endpoints, tags."""
    event = {key: value for key, value in observed(**changes).items() if value is not None}
    assert shorthand(event) == line


def test_config_grammar() -> None:
    """CONFIG: no state id is UNKNOWN, a missing message is `config`, only string values of the six keys are
    appended."""
    assert shorthand({"class_uid": 5019}) == "CONFIG:UNKNOWN [INFO] config"
    assert shorthand({"class_uid": 5019, "state_id": 1, "message": "m"}) == "CONFIG:DISABLED [INFO] m"
    unmapped = {"policy_version": "v4", "source": "proto", "policy_hash": 7, "other": "x"}
    event = {"class_uid": 5019, "state_id": 99, "state": "loaded", "message": "m", "unmapped": unmapped}
    assert shorthand(event) == "CONFIG:LOADED [INFO] m [source:proto version:v4]"


def test_an_unknown_class_is_an_error() -> None:
    """A class that is not one of the nine has no line; saying nothing would hide an event."""
    with pytest.raises(ValueError, match="3002"):
        shorthand({"class_uid": 3002})
    with pytest.raises(ValueError, match="None"):
        shorthand({})


@given(hostile_text(400), st.integers(0, 300))
def test_cut_is_the_longest_prefix_of_whole_characters(text: str, limit: int) -> None:
    """At most `limit` bytes, on a character boundary, and not one character shorter than necessary."""
    text = text.encode("utf-8", "replace").decode()
    made = cut(text, limit)
    if len(text.encode()) <= limit:
        assert made == text
        return
    kept = made.removesuffix("...")
    assert text.startswith(kept)
    assert len(kept.encode()) <= limit < len(text[: len(kept) + 1].encode())


def poison(value: Any, text: str) -> Any:
    """`value` with `text` put into every string in it, and under a key of `unmapped`."""
    if isinstance(value, dict):
        return {key: poison(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item, text) for item in value]
    return value + text + value if isinstance(value, str) else value


@given(hostile_text(400))
def test_no_text_forges_a_second_line(text: str) -> None:
    """Whatever any string of any event holds, its line stays one line, is valid UTF-8 and cannot drive a terminal."""
    for row in examples.rows():
        event = poison(row["event"], text)
        event["unmapped"] = {**event.get("unmapped", {}), text: text, "policy_hash": text}
        line = shorthand(event)
        assert len((line + "x").splitlines()) == 1
        line.encode("utf-8")
        assert not [char for char in line if char != "\t" and not (char >= " " and not "\x7f" <= char <= "\x9f")]


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp", "Cf")), max_size=100))
def test_harmless_text_is_not_touched(text: str) -> None:
    """Text without control characters passes unchanged, so well-formed events keep their bytes; so does a tab."""
    assert one_line(text) == text
    assert one_line(f"a\t{text}") == f"a\t{text}"


def test_reading_json_back_gives_the_same_line() -> None:
    """A reader of the JSONL file can rebuild each line."""
    for row in examples.rows():
        assert shorthand(json.loads(json.dumps(row["event"]))) == row["shorthand"]


@pytest.mark.parametrize("char", HOSTILE)
def test_the_property_tests_see_hostile_text(char: str) -> None:
    """The strategy of the property tests really draws each dangerous character."""
    assert char in find(hostile_text(), lambda text: char in text, settings=settings(max_examples=5000, database=None))


def test_every_class_has_a_line() -> None:
    """No class of the table is without a one-line form, however bare the event."""
    for uid in ocsf.CLASSES:
        assert shorthand({"class_uid": uid})
