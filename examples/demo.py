"""`make demo`: the main job on this machine. No gateway, no OPA server, no internet.

Starts a real HTTPS server on a loopback address, runs a workload behind the strongest boundary this host allows, and checks
what the workload saw: an allowed request, a request denied by its path, a host denied outright, and a direct connection that
finds no way out although the server would have answered it. Exits 0 only if all of that happened.
"""

from __future__ import annotations

import contextlib
import datetime
import http.server
import ipaddress
import json
import pathlib
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HERE = pathlib.Path(__file__).resolve().parent
HOST, PORT = "api.demo.test", 18443
TIMEOUT_SECONDS = 60

# What runs inside the sandbox: plain shell, so that it needs nothing of this project. Each line: NAME STATUS DETAIL.
WITH_CURL = r"""
ask() {
  name=$1; shift
  out=$(curl -sS -m 20 -o "$BODY" -D "$HEAD" -w '%{http_code}' "$@" 2>"$ERR"); code=$?
  reason=$(sed -n 's/^[Xx]-[Dd]eny-[Rr]eason: *//p' "$HEAD" 2>/dev/null | tr -d '\r' | tail -n 1)
  status=$(sed -n 's/^HTTP[^ ]* \([0-9]*\).*/\1/p' "$HEAD" 2>/dev/null | tail -n 1)
  echo "$name|${status:-none}|${reason:-$([ $code = 0 ] && cat "$BODY" || cat "$ERR")}"
}
DIR=$(mktemp -d); BODY=$DIR/b; HEAD=$DIR/h; ERR=$DIR/e
: >"$HEAD"; ask allowed https://HOST:PORT/public/hello
: >"$HEAD"; ask path https://HOST:PORT/private/secret
: >"$HEAD"; ask host https://elsewhere.demo.test/
: >"$HEAD"; ask direct --noproxy '*' -k https://ADDRESS:PORT/public/hello
rm -rf "$DIR"
"""
WITH_PYTHON = r"""
import ssl, urllib.error, urllib.request
unverified = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), unverified)
for name, url, open_ in (("allowed", "https://HOST:PORT/public/hello", urllib.request.urlopen),
                         ("path", "https://HOST:PORT/private/secret", urllib.request.urlopen),
                         ("host", "https://elsewhere.demo.test/", urllib.request.urlopen),
                         ("direct", "https://ADDRESS:PORT/public/hello", direct.open)):
    try:
        answer = open_(url, timeout=20)
        print(f"{name}|{answer.status}|{answer.read().decode()}")
    except urllib.error.HTTPError as error:
        print(f"{name}|{error.code}|{error.headers.get('X-Deny-Reason')}")
    except OSError as error:
        status = "403" if "403" in str(error) else "none"
        print(f"{name}|{status}|{error}")
"""


def certificate(directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A root and a server certificate for the demo's host; answers (root, server key with chain) as PEM files."""
    now = datetime.datetime.now(datetime.UTC)
    life = {"not_valid_before": now - datetime.timedelta(days=1), "not_valid_after": now + datetime.timedelta(days=1)}
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Demo upstream root")])

    def build(subject: x509.Name, public: ec.EllipticCurvePublicKey, extension: x509.ExtensionType) -> x509.Certificate:
        builder = x509.CertificateBuilder(root_name, subject, public, x509.random_serial_number(), **life)
        builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
        return builder.add_extension(issuer, critical=False).sign(root_key, hashes.SHA256())

    root = build(root_name, root_key.public_key(), x509.BasicConstraints(ca=True, path_length=0))
    leaf_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    leaf = build(leaf_name, key.public_key(), x509.SubjectAlternativeName([x509.DNSName(HOST)]))
    pem, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    root_file, server_file = directory / "root.pem", directory / "server.pem"
    root_file.write_bytes(root.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_password)
    server_file.write_bytes(private + leaf.public_bytes(pem))
    return root_file, server_file


class Greeter(http.server.BaseHTTPRequestHandler):
    """Answers every GET, the private folder too: what is denied is denied by the supervisor, not by the server."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = b"hello from the real upstream"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the demo's output to the demo."""


@contextlib.contextmanager
def upstream(address: str, server_file: pathlib.Path):
    """A real HTTPS server on a loopback address of its own."""
    server = http.server.ThreadingHTTPServer((address, PORT), Greeter)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_file)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def answers_directly(address: str) -> bool:
    """The control: outside the sandbox the server can be reached without the proxy."""
    with socket.create_connection((address, PORT), timeout=5):
        return True


def workload(address: str) -> list[str]:
    """The command that runs inside: curl where there is one, else Python's own client."""
    script = WITH_CURL if shutil.which("curl") else WITH_PYTHON
    script = script.replace("HOST", HOST).replace("PORT", str(PORT)).replace("ADDRESS", address)
    return ["sh", "-c", script] if shutil.which("curl") else ["python3", "-c", script]


def run(address: str, directory: pathlib.Path, root_file: pathlib.Path) -> tuple[dict[str, tuple[str, str]], dict]:
    """Run the workload; answers what it saw, by name, and the statement."""
    status = directory / "status.json"
    argv = [sys.executable, "-m", "openshell_supervisor", "run", "--policy", str(HERE / "demo.yaml")]
    argv += ["--network-mode", "auto", "--resolve", f"{HOST}={address}", "--upstream-ca", str(root_file)]
    argv += ["--status-file", str(status), "--timeout", str(TIMEOUT_SECONDS), "--", *workload(address)]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=2 * TIMEOUT_SECONDS
    )
    rows = (line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2)
    seen = {name: (code, detail.strip()) for name, code, detail in rows}
    return seen, json.loads(status.read_text()) if status.exists() else {}


def main() -> int:
    """Run it, print what happened as a table, and answer the exit code."""
    address = str(ipaddress.ip_address("127.77.0.0") + secrets.randbelow(60_000) + 2)
    with tempfile.TemporaryDirectory(prefix="openshell-demo-") as name:
        directory = pathlib.Path(name)
        directory.chmod(0o755)
        root_file, server_file = certificate(directory)
        with upstream(address, server_file):
            control = answers_directly(address)
            seen, statement = run(address, directory, root_file)
    network = next((item for item in statement.get("layers", []) if item["layer"] == "network"), {"state": "unknown"})
    absent = ("absent", "")
    checks = [
        ("allowed request", seen.get("allowed", absent), lambda r: r[0] == "200" and "real upstream" in r[1]),
        ("request denied by path", seen.get("path", absent), lambda r: r[0] == "403"),
        ("host denied outright", seen.get("host", absent), lambda r: r[0] == "403"),
        ("direct connection", seen.get("direct", absent), lambda r: control and r[0] == "none"),
        (
            "network layer",
            (network["state"], statement.get("network_mode", {}).get("rung") or ""),
            lambda r: r[0] == "enforced",
        ),
    ]
    print(f"\n{'CHECK':<24}{'SEEN':<10}{'OK':<5}DETAIL")
    for title, row, good in checks:
        print(f"{title:<24}{row[0]:<10}{'yes' if good(row) else 'NO':<5}{row[1][:90]}")
    passed = all(good(row) for _, row, good in checks)
    print(f"\ndemo: {'all of it happened' if passed else 'FAILED: see the rows above'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
