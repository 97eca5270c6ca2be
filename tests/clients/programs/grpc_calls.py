"""A gRPC client: `grpc_calls.py TARGET METHOD…` calls each method (unary, or streaming when its name says so).

No flag, no credential: the roots and the proxy come from the environment. Prints what came, or the status that came instead.
"""

import sys

import grpc

DEADLINE = 8


def main() -> int:
    """Exit 0 when every call was answered."""
    with grpc.secure_channel(sys.argv[1], grpc.ssl_channel_credentials()) as channel:
        for method in sys.argv[2:]:
            try:
                if "Stream" in method:
                    call = channel.unary_stream(method)
                    print(*(piece.decode() for piece in call(b"five", timeout=DEADLINE)))
                else:
                    print(channel.unary_unary(method)(b"one", timeout=DEADLINE).decode())
            except grpc.RpcError as error:
                print(error.code().name, error.details(), dict(error.trailing_metadata() or ()))
                return 1
    return 0


sys.exit(main())
