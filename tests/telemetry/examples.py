"""The reference's example events with their lines, found beside the checkout or where OPENSHELL_SHARED points."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS = 91


def rows() -> list[dict[str, Any]]:
    """All rows, `{"event": …, "shorthand": …}`. Without the file: a failure in CI, else a skip that names it."""
    shared = pathlib.Path(os.environ.get("OPENSHELL_SHARED") or ROOT.parent / "shared")
    path = shared / "reference" / "ocsf_examples.jsonl"
    if not path.is_file():
        missing = f"needs reference/ocsf_examples.jsonl under OPENSHELL_SHARED or beside the checkout ({path})"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
