"""A client that asks once through a proxy and says so: the smallest workload with a proxied response.

Standard library only. `first.py PROXY URL`, where PROXY is `host:port` or `env`. It retries a refused connection,
because stock mitmdump is started at the same moment as this client; a supervisor's listener is always there.
"""

from __future__ import annotations

import os
import socket
import sys
import time

GIVE_UP_S = 20.0
RETRY_S = 0.002


def _dial(address: tuple[str, int]) -> socket.socket:
    """Connect, again and again while refused, for `GIVE_UP_S`."""
    end = time.monotonic() + GIVE_UP_S
    while True:
        try:
            return socket.create_connection(address, GIVE_UP_S)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(RETRY_S)


def main() -> int:
    """0 and `first` on standard output when the response is a 200."""
    proxy, url = sys.argv[1:3]
    if proxy == "env":
        proxy = os.environ["HTTP_PROXY"]
    host, _, port = proxy.removeprefix("http://").rstrip("/").rpartition(":")
    authority = url.removeprefix("http://").partition("/")[0]
    with _dial((host, int(port))) as sock:
        sock.sendall(f"GET {url} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n".encode())
        answer = sock.recv(4096)
    if not answer.startswith(b"HTTP/1.1 200 "):
        print(answer[:300], file=sys.stderr)
        return 1
    print("first", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
