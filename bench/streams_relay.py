"""The relay most Python proxies have: asyncio streams, read and write in a loop. The baseline of the tunnel row.

It answers CONNECT to any port on 127.0.0.1 and knows nothing else. Standard library only; prints its port and ends
when its standard input does.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading

READ = 1 << 18
"""As in the probe that set the target; larger reads did not make asyncio streams faster."""
HEAD_TIMEOUT_S = 10.0


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(READ):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HEAD_TIMEOUT_S)
        port = int(head.split(b" ", 2)[1].rpartition(b":")[2])
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
    except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError):
        writer.close()
        return
    writer.write(b"HTTP/1.1 200 Connection Established\r\n\r\n")
    await asyncio.gather(_pump(reader, upstream_writer), _pump(upstream_reader, writer))
    upstream_writer.close()
    writer.close()


def _watch_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


async def _main() -> None:
    server = await asyncio.start_server(_serve, "127.0.0.1", 0)
    threading.Thread(target=_watch_stdin, daemon=True).start()
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main())
