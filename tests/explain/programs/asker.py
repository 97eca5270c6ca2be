"""The workload of test_explain_agrees: asks each question through the proxy on a connection of its own, prints what came back.

The argument is a JSON list of [transport, host, port, method, target]; the output a list of {status, body, deny, upstream}.
Written with sockets, because a client library would tidy the targets up.
"""

import json
import os
import socket
import sys
from urllib.parse import urlsplit


def read_answer(sock, method):
    """Status, headers in lower case, body by Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = sock.recv(65536)
        if not part:
            return 0, {}, b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = 0 if method == "HEAD" else int(fields.get("content-length", 0))
    while len(body) < length:
        part = sock.recv(65536)
        if not part:
            break
        body += part
    return int(first.split(" ")[1]), fields, body


def ask(proxy, transport, host, port, method, target):
    """One question; a tunnel that is refused is the answer."""
    with socket.create_connection(proxy, timeout=30) as sock:
        place = f"{host}:{port}"
        if transport == "connect":
            sock.sendall(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n".encode())
            status, fields, body = read_answer(sock, "CONNECT")
            if status != 200:
                return status, fields, body
            line = f"{method} {target} HTTP/1.1"
        else:
            line = f"{method} http://{place}{target} HTTP/1.1"
        sock.sendall(f"{line}\r\nHost: {place}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode())
        return read_answer(sock, method)


def main():
    where = urlsplit(os.environ.get("http_proxy") or os.environ["HTTP_PROXY"])
    answers = []
    for question in json.loads(sys.argv[1]):
        status, fields, body = ask((where.hostname, where.port), *question)
        deny = fields.get("x-deny-reason", "")
        mine = "x-upstream" in fields
        answers.append({"status": status, "body": "" if mine else body.decode(), "deny": deny, "upstream": mine})
    print(json.dumps(answers))


main()
