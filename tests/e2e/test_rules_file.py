"""The product with rules of the operator's own: they decide, and a module that cannot decide is refused at the start."""

from __future__ import annotations

import http.server
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

MODULE = """package openshell.sandbox

records := [record |
	some name, policy in data.network_policies
	some index, ep in policy.endpoints
	ep.host == input.network.host
	ep.ports[_] == input.network.port
	record := {"policy_name": name, "endpoint_index": index}
]

egress_authorization := {
	"action": action,
	"deny_reason": "not in this house",
	"matched_policy": "own",
	"matched_endpoints": records,
}

default action := "deny"

action := "allow" if count(records) > 0

default allow_request := false

# Other than the policy says: it allows every GET.
allow_request if input.request.path == "/ok"
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[int]:
    """The port of a server on 127.0.0.1 that answers everything with 200."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def asked(tmp_path: pathlib.Path, upstream: int, module: str, *more: str) -> subprocess.CompletedProcess[str]:
    """A run with this module that fetches two paths and prints both status codes."""
    endpoint = f"{{host: plain.test, port: {upstream}, protocol: rest, enforcement: enforce, access: read-only}}"
    policy = f"version: 1\nnetwork_policies:\n  own:\n    endpoints: [{endpoint}]\n    binaries: [{{path: '/**'}}]\n"
    (tmp_path / "own.rego").write_text(module)
    (tmp_path / "own.yaml").write_text(policy)
    fetch = "curl -s -o /dev/null -w '%{http_code} '"
    script = f"{fetch} http://plain.test:{upstream}/ok; {fetch} http://plain.test:{upstream}/other"
    files = ["--policy-rules", str(tmp_path / "own.rego"), "--policy-data", str(tmp_path / "own.yaml")]
    command = [
        sys.executable,
        "-m",
        "openshell_supervisor",
        "run",
        "--egress",
        "enforce",
        "--resolve",
        "plain.test=127.0.0.1",
    ]
    return subprocess.run(
        [*command, *files, *more, "--", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )


def test_the_module_decides(tmp_path: pathlib.Path, upstream: int) -> None:
    """Of two paths that the policy allows, the module lets one through."""
    ran = asked(tmp_path, upstream, MODULE)
    if "no boundary" in ran.stderr or ran.returncode == 1:
        pytest.skip("needs a host with a boundary: needs root")
    assert (ran.returncode, ran.stdout) == (0, "200 403 "), ran.stderr
    other = asked(tmp_path, upstream, MODULE.replace('"/ok"', '"/other"'))
    assert other.stdout == "403 200 ", other.stderr


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (MODULE.replace("count(records)", "count(records"), "own.rego:20:"),
        (MODULE.replace("egress_authorization", "other"), "egress_authorization"),
        ("", "package openshell.sandbox"),
    ],
)
def test_a_module_that_cannot_decide_is_refused(tmp_path: pathlib.Path, upstream: int, module: str, said: str) -> None:
    """Exit code 2 before the workload, with the place or the name of what is missing."""
    ran = asked(tmp_path, upstream, module)
    assert ran.returncode == 2 and ran.stdout == ""
    assert said in ran.stderr, ran.stderr


def test_both_files_or_neither(tmp_path: pathlib.Path, upstream: int) -> None:
    """A policy beside them, or an OPA server, is a contradiction."""
    assert asked(tmp_path, upstream, MODULE, "--policy", str(tmp_path / "own.yaml")).returncode == 2
    assert asked(tmp_path, upstream, MODULE, "--opa-url", "unix:/run/opa.sock").returncode == 2
