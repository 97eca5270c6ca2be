"""The documents keep up with the code: what can be set, what can be refused and what can be answered is written down."""

from __future__ import annotations

import argparse
import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from openshell_supervisor import cli, settings, still_to_come
from openshell_supervisor.policy.yaml_file import load, parse
from openshell_supervisor.workload import environ

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src" / "openshell_supervisor").rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Functions whose argument at this place is an error code or a reason id.
CODE_ARGUMENT = {"_fail": 0}
REASON_ARGUMENT = {"failure": 1, "Denial": 1, "TargetError": 0, "_denied": 0}


def text(name: str) -> str:
    """A document of this repository."""
    return (ROOT / name).read_text("utf-8")


def text_of(path: pathlib.Path) -> str:
    """A document, by its path."""
    return path.read_text("utf-8")


def words(document: str) -> set[str]:
    """Everything that stands in code spans, split at spaces and punctuation that no name contains."""
    spans = re.findall(r"`+([^`]+)`+", document)
    return {word for span in spans for word in re.split(r"[\s,=|{}\"']+", span) if word}


def calls() -> Iterator[ast.Call]:
    """Every call in the sources."""
    for path in SOURCES:
        yield from (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call))


def constants(keyword: str, places: dict[str, int]) -> set[str]:
    """String constants given as `keyword=…`, or at the place of a function named in `places`."""
    found: set[str] = set()
    for call in calls():
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        values = [item.value for item in call.keywords if item.arg == keyword]
        if name in places and len(call.args) > places[name]:
            values.append(call.args[places[name]])
        found |= {v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)}
        for value in values:
            if isinstance(value, ast.IfExp):
                arms = (value.body, value.orelse)
                found |= {arm.value for arm in arms if isinstance(arm, ast.Constant) and isinstance(arm.value, str)}
    return {item for item in found if re.fullmatch(r"[a-z]+(_[a-z]+)*", item)}


def reason_ids() -> set[str]:
    """The reason ids of Python and Rego."""
    rego = "\n".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.rego"))
    named = set(re.findall(r'"reason_id": "([a-z_]+)"', rego)) | set(re.findall(r'else := "([a-z]+_[a-z_]+)"', rego))
    for path in SOURCES:
        named |= set(re.findall(r'"reason_id": "([a-z_]+)"', path.read_text("utf-8")))
        named |= set(re.findall(r'reason_id == "([a-z_]+)"', path.read_text("utf-8")))
    return named | constants("reason_id", REASON_ARGUMENT)


def test_every_flag_is_documented() -> None:
    """A flag of the command line, hidden ones included, stands in docs/settings.md."""
    flags = {name for action in settings.parser()._actions for name in action.option_strings}
    assert len(flags) > 30
    assert flags - words(text("docs/settings.md")) == set()


def test_help_tells_what_a_person_needs() -> None:
    """A flag that `--help` hides is one of the documented refusals or of the driver's interface."""
    hidden = {a.option_strings[0] for a in settings.parser()._actions if a.help == argparse.SUPPRESS}
    assert hidden <= words(text("docs/settings.md"))


def test_every_variable_is_documented() -> None:
    """A variable that the sources read, and each that is refused, stands in docs/settings.md."""
    read: set[str] = set(still_to_come.STILL_TO_COME_VARIABLES)
    for call in calls():
        if isinstance(call.func, ast.Attribute) and call.func.attr == "get" and call.args:
            value = call.args[0]
            if isinstance(value, ast.Constant) and re.fullmatch(r"OPENSHELL_[A-Z_]+|RUST_LOG", str(value.value)):
                read.add(str(value.value))
    assert "OPENSHELL_POLICY" in read
    assert read - words(text("docs/settings.md")) == set()


def test_every_refused_command_is_documented() -> None:
    """A reserved word stands in docs/settings.md."""
    assert set(still_to_come.RESERVED_WORDS) - words(text("docs/settings.md")) == set()


def test_every_error_code_is_documented() -> None:
    """A code that ends the supervisor stands in the table of docs/settings.md."""
    codes = constants("code", CODE_ARGUMENT)
    assert {"contradiction", "boundary_leaks", "workload_stuck"} <= codes, "the search finds nothing any more"
    assert codes - words(text("docs/settings.md")) == set()


def test_every_reason_id_is_documented() -> None:
    """What an agent can read in `reason_id` stands in the table of docs/user-guide.md."""
    found = reason_ids()
    assert {"rule_not_matched", "ssrf_denied", "head_too_large", "malformed_facts"} <= found, "the search is broken"
    assert found - words(text("docs/user-guide.md")) == set()


def test_every_trust_variable_is_documented() -> None:
    """A variable that the workload gets stands in docs/user-guide.md."""
    given = {*environ.PROXY_URL_VARIABLES, *environ.NO_PROXY_VARIABLES, *environ.BUNDLE_VARIABLES}
    given |= {*environ.ADDITION_VARIABLES, *environ.SWITCHES, *environ.TRUST_SWITCHES}
    assert given - words(text("docs/user-guide.md")) == set()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_policies_that_hold(path: pathlib.Path) -> None:
    """An example loads, warns of nothing, and no endpoint of it only audits."""
    loaded = load(path)
    assert loaded.warnings == ()
    endpoints = [endpoint for rule in loaded.policy.network_policies.values() for endpoint in rule.endpoints]
    assert endpoints
    assert all(endpoint.enforced for endpoint in endpoints if endpoint.inspected)


def policies_in_documents() -> list[tuple[str, str]]:
    """Each fenced YAML block that is a whole policy, with its document's name."""
    blocks = [
        (path.name, block)
        for path in DOCUMENTS
        for block in re.findall(r"^```yaml\n(.*?)^```", text_of(path), re.M | re.S)
    ]
    return [(name, block) for name, block in blocks if block.startswith("version:")]


@pytest.mark.parametrize(("name", "block"), policies_in_documents())
def test_policies_in_documents_hold(name: str, block: str) -> None:
    """A policy that a reader would copy loads without a warning."""
    assert parse(block, name).warnings == ()


def shell_lines(document: str) -> Iterator[str]:
    """The commands of the fenced blocks marked `sh`, continuation lines joined, comments and `$ ` removed."""
    for block in re.findall(r"^```sh\n(.*?)^```", document, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ").split(" #")[0].strip()
            if command and not command.startswith("#"):
                yield command


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z]+):", text("Makefile"), re.M))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_exist(document: pathlib.Path) -> None:
    """`make X` names a target, `openshell-supervisor …` parses, and files of this repository that are named are there."""
    for command in shell_lines(document.read_text("utf-8")):
        made = re.match(r"make ([a-z]+)", command)
        if made:
            assert made[1] in make_targets(), command
        ours = re.search(r"(?:^|/|\s)openshell-(?:supervisor|sandbox) (.*)", command)
        if ours and not re.match(r"(podman|docker|kubectl)\b", command):
            arguments = ours[1].split()
            if arguments[0] in cli.COMMANDS and arguments[0] != "run":
                continue
            arguments = arguments[1:] if arguments[0] == "run" else arguments
            if arguments[0] not in ("--version", "--help"):
                settings.parser().parse_args(arguments)
        for name in re.findall(r"(?<![\w/.-])((?:examples|docs|scripts)/[\w./-]+)", command):
            assert (ROOT / name).exists(), command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_tests_named_in_documents_exist(document: pathlib.Path) -> None:
    """A relative link leads to a file, and each `tests/…::test` that is given as evidence is there."""
    content = document.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", content):
        if "://" not in target:
            assert (document.parent / target).exists(), target
    for path, function in re.findall(r"(tests/[\w/]+\.py)::(\w+)", content):
        assert re.search(rf"def {function}\(", text(path)), f"{path}::{function}"


def test_the_demo_in_the_readme_is_the_demo() -> None:
    """README shows the two commands before anything else that can be typed."""
    first = list(shell_lines(text("README.md")))[:2]
    assert first == ["make demo", "make test"]


def test_version_is_what_the_documents_ran() -> None:
    """The console script answers; the documents assume it in .venv/bin."""
    done = subprocess.run([sys.executable, "-m", "openshell_supervisor", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("openshell-supervisor ")
