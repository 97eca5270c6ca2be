"""Children of asyncio: waited for, killed, and talked to. Where pidfd_open(2) is refused asyncio waits in threads instead."""

import asyncio
import sys


async def main() -> None:
    said = await asyncio.create_subprocess_exec("echo", "said", stdout=asyncio.subprocess.PIPE)
    print("exec:", (await said.communicate())[0].decode().strip())
    children = [await asyncio.create_subprocess_shell(f"exit {code}") for code in range(4)]
    print("exit codes:", await asyncio.gather(*(child.wait() for child in children)))
    sleeper = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(30)")
    sleeper.kill()
    print("killed:", await sleeper.wait())
    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    print("streams:", (await reader.read()).decode())
    writer.close()
    server.close()


async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello")
    writer.close()


asyncio.run(main())
