"""The workload: one request allowed, one denied by path, one denied by host, then every direct way it can think of.

Writes what happened as JSON to standard output and ends with 7, a code that nothing else uses.
"""

import json
import os
import socket
import sys
import urllib.error
import urllib.request

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


def main() -> None:
    """Run all of it."""
    report = {
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
