"""A real gRPC server over TLS for these tests: one unary method, one that streams. Messages are plain bytes."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

ALLOWED, STREAMED, FORBIDDEN = "/real.Greeter/Say", "/real.Greeter/SayStream", "/real.Greeter/Forget"


def _say(message: bytes, context: grpc.ServicerContext) -> bytes:
    return b"said " + message


def _say_often(message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    return (b"%d-%b" % (number, message) for number in range(5))


@contextlib.contextmanager
def serving(address: str, port: int, server_pem: pathlib.Path) -> Iterator[None]:
    """The server, until the block ends."""
    methods = {
        "Say": grpc.unary_unary_rpc_method_handler(_say),
        "SayStream": grpc.unary_stream_rpc_method_handler(_say_often),
        "Forget": grpc.unary_unary_rpc_method_handler(_say),
    }
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("real.Greeter", methods),))
    pem = server_pem.read_bytes()
    server.add_secure_port(f"{address}:{port}", grpc.ssl_server_credentials([(pem, pem)]))
    server.start()
    try:
        yield
    finally:
        server.stop(grace=0).wait()
