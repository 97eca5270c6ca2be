"""The official OCSF 1.8.0 schema as an assertion, for every test that sees an event.

`assert_valid(event)` for one event, `assert_all_valid(path)` for a JSONL file. Beyond JSON Schema it checks two things
that the generated schema does not: `type_uid` is the class times 100 plus the activity, and each label is its number's
caption.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

VERSION = "1.8.0"
OTHER = 99


def assert_valid(event: Mapping[str, Any]) -> None:
    """Fail with every deviation of `event` from the schema, each with the path to it."""
    problems = list(deviations(event))
    assert not problems, f"{event.get('type_name')}: " + "; ".join(problems) + f"\n{json.dumps(event, default=str)}"


def assert_all_valid(path: Path | str) -> int:
    """Validate each line of a JSONL file; returns how many there were. An empty file fails: it would prove nothing."""
    text = Path(path).read_text(encoding="utf-8")
    assert text.endswith("\n"), f"{path} is empty or its last line is torn"
    lines = text.removesuffix("\n").split("\n")
    for line in lines:
        assert_valid(json.loads(line))
    return len(lines)


def deviations(event: Mapping[str, Any]) -> Iterable[str]:
    """Every deviation in words; nothing for a valid event."""
    profiles = tuple(event["metadata"].get("profiles", ()))
    for error in _validator(event["class_uid"], profiles).iter_errors(event):
        yield f"{error.json_path}: {error.message[:200]}"
    if event["type_uid"] != event["class_uid"] * 100 + event["activity_id"]:
        yield f"type_uid {event['type_uid']} is not class_uid * 100 + activity_id"
    if event["metadata"]["version"] != VERSION:
        yield f"metadata.version is not {VERSION}"
    yield from _wrong_captions(event)


@functools.cache
def _schema() -> OcsfJsonSchemaEmbedded:
    return OcsfJsonSchemaEmbedded(get_ocsf_schema(version=VERSION))


@functools.cache
def _validator(class_uid: int, profiles: tuple[str, ...]) -> jsonschema.Draft202012Validator:
    schema = _schema()
    made = schema.get_class_schema(schema.lookup_class_name_from_uid(class_uid), list(profiles))
    return jsonschema.Draft202012Validator(made)


def _wrong_captions(event: Mapping[str, Any]) -> Iterable[str]:
    attributes = _schema().schema.schema["classes"][_class_name(event["class_uid"])]["attributes"]
    for name, number in event.items():
        label = event.get(name.removesuffix("_id"))
        # `state` carries a free label under ids 1 and 2 as well: that is how consumers know CONFIG:CREATING.
        if not name.endswith("_id") or number == OTHER or label is None or name == "state_id":
            continue
        caption = attributes.get(name, {}).get("enum", {}).get(str(number), {}).get("caption")
        # The schema's activity_name is the caption of activity_id.
        if caption is not None and label != caption:
            yield f"{name} {number} is called {caption!r}, not {label!r}"
    caption = attributes["activity_id"].get("enum", {}).get(str(event["activity_id"]), {}).get("caption")
    if event["activity_id"] != OTHER and caption is not None and event.get("activity_name") != caption:
        yield f"activity_id {event['activity_id']} is called {caption!r}, not {event.get('activity_name')!r}"


@functools.cache
def _class_name(class_uid: int) -> str:
    return _schema().lookup_class_name_from_uid(class_uid)
