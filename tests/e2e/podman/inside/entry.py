"""Runs in the container, as its entrypoint: a real HTTPS upstream, then the supervisor in our place (so as pid 1).

Usage: entry.py WORKLOAD [ARGS…]. The upstream listens on every address of the container's own network namespace, so a
direct connection that the boundary failed to stop would be answered. Standard library only.
"""

import http.server
import os
import ssl
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PORT = 8443


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers each GET with the path it was asked for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """200 and the path."""
        body = f"upstream saw {self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet: the container's output is the supervisor's and the workload's."""


def main() -> None:
    """Bind first, then fork: when the supervisor starts, the upstream accepts."""
    server = http.server.ThreadingHTTPServer(("0.0.0.0", PORT), Upstream)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{HERE}/upstream.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    if os.fork() == 0:
        server.serve_forever()
    server.socket.close()
    options = [
        "--policy",
        f"{HERE}/policy.yaml",
        "--resolve",
        "upstream.test=127.0.0.1",
        "--upstream-ca",
        f"{HERE}/ca.pem",
    ]
    options += ["--status-file", "/out/status.json", "--ocsf-file", "/out/events.jsonl"]
    command = ["openshell-supervisor", "run", *options, "--", "python3", "-I", *sys.argv[1:]]
    os.execvp(command[0], command)


main()
