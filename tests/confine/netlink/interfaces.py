"""Lists interfaces as Python does and makes one socket of each kind that a filter may refuse; the C program's twin.

Prints one JSON object: {"interfaces": ["lo", …] or an errno, "AF_NETLINK/0": errno or 0, …}.
"""

import json
import socket


def attempt(family: int, kind: int, protocol: int) -> int:
    """0 when the kernel makes the socket, else the errno."""
    try:
        socket.socket(family, kind, protocol).close()
    except OSError as error:
        return error.errno or -1
    return 0


def interfaces() -> object:
    """The names, or the errno."""
    try:
        return [name for _, name in socket.if_nameindex()]
    except OSError as error:
        return error.errno


SOCKETS = {
    "AF_NETLINK/0": (16, socket.SOCK_RAW, 0),
    "AF_NETLINK/4": (16, socket.SOCK_RAW, 4),
    "AF_NETLINK/15": (16, socket.SOCK_DGRAM, 15),
    "AF_PACKET": (17, socket.SOCK_RAW, 0),
    "AF_BLUETOOTH": (31, socket.SOCK_RAW, 1),
    "AF_VSOCK": (40, socket.SOCK_STREAM, 0),
    "AF_ALG": (38, socket.SOCK_SEQPACKET, 0),
    "AF_INET": (socket.AF_INET, socket.SOCK_STREAM, 0),
    "AF_UNIX": (socket.AF_UNIX, socket.SOCK_STREAM, 0),
}
print(json.dumps({"interfaces": interfaces(), **{name: attempt(*what) for name, what in SOCKETS.items()}}))
