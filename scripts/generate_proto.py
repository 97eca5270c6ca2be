"""Generate the Python code of proto/*.proto, or with `--check` say whether what is committed is what would be generated.

Usage: generate_proto.py [--check]. Exit status 1 when `--check` finds a difference. Needs grpcio-tools (requirements/dev.txt).
"""

from __future__ import annotations

import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "proto"
TARGET = ROOT / "src/openshell_supervisor/policy/_generated"
HEAD = "# fmt: off\n# ruff: noqa\n# mypy: ignore-errors\n"
"""Generated code is nobody's style; the checkers are told so in the file, so that no configuration has to know."""


def generated() -> dict[str, str]:
    """File name to text, for every file of `proto/`. Raises `SystemExit` when one does not compile."""
    sources = sorted(str(path) for path in SOURCE.glob("*.proto"))
    with tempfile.TemporaryDirectory() as directory:
        known = str(resources.files("grpc_tools").joinpath("_proto"))  # google/protobuf/*.proto
        out = [f"--python_out={directory}", f"--pyi_out={directory}"]
        if protoc.main(["protoc", f"-I{SOURCE}", f"-I{known}", *out, *sources]) != 0:
            raise SystemExit(1)
        return {path.name: HEAD + path.read_text("utf-8") for path in sorted(Path(directory).iterdir())}


def main(arguments: list[str]) -> int:
    """Write, or check."""
    files = generated()
    if arguments != ["--check"]:
        for name, text in files.items():
            (TARGET / name).write_text(text, "utf-8")
        return 0
    there = {path.name: path.read_text("utf-8") for path in TARGET.glob("*_pb2.py*")}
    stale = sorted(name for name in files.keys() | there.keys() if files.get(name) != there.get(name))
    if stale:
        sys.stdout.write(f"stale, run `make proto`: {', '.join(stale)}\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
