"""`h2_stalled.py HOST:PORT PATH SECONDS`: asks on HTTP/2 for something big and never opens its window again.

Reads the socket for as long, so that only the stream's window holds the proxy back. Prints how many bytes of the body came.
"""

import os
import socket
import ssl
import sys
import time

import h2.connection
import h2.events

address, path, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
host = address.split(":")[0]
proxy = os.environ["HTTPS_PROXY"].removeprefix("http://").split(":")
raw = socket.create_connection((proxy[0], int(proxy[1])))
raw.sendall(f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
assert b" 200 " in raw.recv(65536)
context = ssl.create_default_context()
context.set_alpn_protocols(["h2"])
with context.wrap_socket(raw, server_hostname=host) as sock:
    link = h2.connection.H2Connection()
    link.initiate_connection()
    link.send_headers(1, [(":method", "GET"), (":path", path), (":scheme", "https"), (":authority", address)], True)
    sock.sendall(link.data_to_send())
    sock.settimeout(0.2)
    came, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            data = sock.recv(65536)
        except TimeoutError:
            continue
        if not data:
            break
        for event in link.receive_data(data):
            came += len(event.data) if isinstance(event, h2.events.DataReceived) else 0
        sock.sendall(link.data_to_send())
print(came)
