"""`openshell-supervisor explain` as a process: exit codes, streams, no privilege, no environment, nothing heavy."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

POLICY = """
version: 1
network_policies:
  größe:
    endpoints:
      - {host: api.process.test, port: 443, protocol: rest, enforcement: enforce, access: read-only}
      - host: calls.process.test
        port: 443
        protocol: mcp
        enforcement: enforce
        rules: [{allow: {method: tools/call, tool: "read_*"}}]
    binaries: [{path: "/**"}]
"""
ASK = ("--host", "api.process.test", "--port", "443", "--path", "/x")
Finished = subprocess.CompletedProcess[str]


@pytest.fixture
def policy(open_tmp: pathlib.Path) -> str:
    """A policy that every user may read."""
    path = open_tmp / "policy.yaml"
    path.write_text(POLICY, "utf-8")
    path.chmod(0o644)
    return str(path)


def command(*arguments: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "openshell_supervisor", "explain", *arguments]


def run(*arguments: str, env: dict[str, str] | None = None) -> Finished:
    """Run it to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False, env=env)


def test_exit_codes_and_streams(policy: str) -> None:
    """0 and 1 with the answer on standard output and nothing on standard error; 2 the other way round."""
    yes, no = run("--policy", policy, *ASK, "--method", "GET"), run("--policy", policy, *ASK, "--method", "POST")
    assert (yes.returncode, yes.stderr, yes.stdout.split(":")[0]) == (0, "", "allowed")
    assert (no.returncode, no.stderr, no.stdout.split(":")[0]) == (1, "", "blocked")
    for arguments in (("--policy", policy), ("--policy", "/nowhere", *ASK, "--method", "GET"), ("--cases", policy)):
        wrong = run(*arguments)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert wrong.stderr.startswith("openshell-supervisor: ") and "Traceback" not in wrong.stderr


def test_it_needs_no_privilege(policy: str, unprivileged: Callable[..., Finished]) -> None:
    """A user with nothing gets the same answer as root."""
    arguments = ("--policy", policy, *ASK, "--method", "POST", "--json")
    done = unprivileged(command(*arguments))
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout) == json.loads(run(*arguments).stdout)


@pytest.mark.parametrize(
    "env", [{}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}], ids=str
)
def test_a_terminal_that_cannot_show_a_name(policy: str, env: dict[str, str]) -> None:
    """Whatever the environment, the answer is printed; what cannot be shown is escaped."""
    done = subprocess.run(
        command("--policy", policy, *ASK, "--method", "GET"), capture_output=True, timeout=60, check=False, env=env
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"decided by gr" in done.stdout


def test_an_mcp_call(policy: str) -> None:
    """`--header` and `--body` are what a rule on calls looks at; the neighbour that no rule allows is denied."""
    for tool, code in (("read_file", 0), ("write_file", 1)):
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool}}
        done = run(
            *("--policy", policy, "--host", "calls.process.test", "--port", "443", "--method", "POST", "--path", "/"),
            *("--header", "Content-Type: application/json", "--body", json.dumps(body), "--json"),
        )
        found = json.loads(done.stdout)
        assert (done.returncode, found["protocol"]) == (code, "mcp"), done
        if code:
            assert found["nearest"]["differs"] == [
                {"field": "call", "asked": "tools/call of write_file", "allowed": "tools/call of read_*"}
            ]
            assert found["nearest"]["would_allow"].startswith("tools/call of read_")


def test_a_reader_that_leaves_early(policy: str) -> None:
    """`explain | true` ends without a traceback."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command("--policy", policy, *ASK, "--method", "GET"),
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    os.close(write)
    assert done.stderr == b""


def test_nothing_heavy_is_imported(policy: str) -> None:
    """A question without an address loads no proxy, no event loop and no event of ours; with one, still no mitmproxy."""
    arguments = ["--policy", policy, *ASK, "--method", "GET"]
    for extra, heavy in (
        ([], {"mitmproxy", "asyncio", "openshell_supervisor.proxy", "openshell_supervisor.telemetry"}),
        (["--address", "1.1.1.1"], {"mitmproxy"}),
    ):
        program = (
            "import sys; from openshell_supervisor.cli import main; code = main(sys.argv[1:]); "
            "sys.stderr.write(' '.join(sys.modules)); sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, "explain", *arguments, *extra],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0
        assert heavy & set(done.stderr.split()) == set()


def test_help_names_every_option() -> None:
    """`--help` is printed with exit code 0, and every option of it stands in docs/explain.md."""
    import re

    done = run("--help")
    options = set(re.findall(r"--[a-z]+", done.stdout))
    assert done.returncode == 0 and {"--cases", "--replay", "--policy"} <= options
    document = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "explain.md").read_text("utf-8")
    assert {option for option in options if option not in document} <= {"--help"}


RULES = """package openshell.sandbox

egress_authorization := {
	"action": "allow",
	"matched_policy": "größe",
	"matched_endpoints": [{"policy_name": "größe", "endpoint_index": 0}],
}

default allow_request := false

allow_request if input.request.method == "POST"
"""


def test_rules_of_the_operators_own(policy: str, open_tmp: pathlib.Path) -> None:
    """They decide, other than the policy alone would; half of the two files, a third beside them, or no Rego is code 2."""
    rules = open_tmp / "own.rego"
    rules.write_text(RULES, "utf-8")
    both = ("--policy-rules", str(rules), "--policy-data", policy)
    assert run("--policy", policy, *ASK, "--method", "GET").returncode == 0
    assert run(*both, *ASK, "--method", "GET").returncode == 1
    done = run(*both, *ASK, "--method", "POST")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    zero = open_tmp / "zero.yaml"  # what only a data file is refused for: explain must load what a run loads
    zero.write_text(POLICY.replace("access: read-only", "access: read-only, graphql_max_body_bytes: 0"), "utf-8")
    assert run("--policy", str(zero), *ASK, "--method", "GET").returncode == 0
    assert run(*both[:3], str(zero), *ASK, "--method", "POST").returncode == 2
    for wrong in (both[:2], both[2:], (*both, "--policy", policy), ("--policy-rules", policy, *both[2:])):
        refused = run(*wrong, *ASK, "--method", "POST")
        assert refused.returncode == 2 and refused.stderr.startswith("openshell-supervisor: "), refused.stderr
        assert "Traceback" not in refused.stderr
