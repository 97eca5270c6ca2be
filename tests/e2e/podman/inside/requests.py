"""The workload: one request allowed, one denied by path, one denied by host, then every direct way it can think of.

Writes what happened as JSON to standard output and ends with 7, a code that nothing else uses.
"""

import errno
import json
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable

TIMEOUT = 5.0


def fetch(url: str) -> dict[str, object]:
    """Status and body of a GET through the proxy that the environment names."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            return {"status": response.status, "body": response.read().decode()}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "body": error.read().decode()}
    except OSError as error:
        return {"status": None, "body": str(error)}


def direct(host: str, port: int, kind: int = socket.SOCK_STREAM) -> str:
    """What a connection without the proxy comes to: an errno's text, or "connected"."""
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.settimeout(TIMEOUT)
        try:
            sock.connect((host, port))
            if kind == socket.SOCK_DGRAM:
                sock.send(b"x")
        except OSError as error:
            return str(error)
    return "connected"


def attempt(action: Callable[[], object]) -> str:
    """The name of the errno that `action` failed with, or "succeeded"."""
    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "succeeded"


def enter(path: str) -> None:
    """setns(2) into the namespace at `path` (os.setns came with Python 3.12)."""
    with open(path, "rb") as namespace:
        os.setns(namespace.fileno(), 0)


def plant(directory: str) -> None:
    """Leave a file beside the certificates that this process is told to trust."""
    with open(os.path.join(directory, "planted"), "wb"):
        pass


def main() -> None:
    """Run all of it."""
    report = {
        # The supervisor is pid 1; its namespace, memory and environment are the other ways out.
        "supervisor": {
            "environment": attempt(lambda: open("/proc/1/environ", "rb").close()),
            "memory": attempt(lambda: open("/proc/1/mem", "r+b").close()),
            "descriptors": attempt(lambda: os.listdir("/proc/1/fd")),
            "network namespace": attempt(lambda: enter("/proc/1/ns/net")),
        },
        "trust": attempt(lambda: plant(os.path.dirname(os.environ["SSL_CERT_FILE"]))),
        "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
        "uid": os.getuid(),
        "netns": os.stat("/proc/self/ns/net").st_ino,
        "allowed": fetch("https://upstream.test:8443/public/a?token=secret"),
        "denied_path": fetch("https://upstream.test:8443/private"),
        "denied_host": fetch("https://elsewhere.test:8443/public/a"),
        # 10.0.2.100: the container's own address under slirp4netns; 10.0.2.2: the host as seen from it.
        "direct": {
            name: direct(*target)
            for name, target in {
                "upstream on loopback": ("127.0.0.1", 8443),
                "upstream on the container's address": ("10.0.2.100", 8443),
                "the host": ("10.0.2.2", 22),
                "the name server, UDP": ("10.0.2.3", 53, socket.SOCK_DGRAM),
                "the internet": ("192.0.2.1", 443),
            }.items()
        },
    }
    print("REPORT " + json.dumps(report), flush=True)
    sys.exit(7)


main()
