"""Network namespaces without names, made on threads that are thrown away.

`unshare` and `setns` change the calling thread for good, and whatever is started from it later lands in the same place.
So neither ever runs on the event loop's thread or on a thread of a pool: each piece of work gets a thread of its own,
which ends with it. A namespace lives as long as a descriptor, a socket or a process holds it; nothing is mounted
anywhere.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Of the calling thread; /proc/self is the process's first thread, which never moves.
_CURRENT = "/proc/thread-self/ns/net"


@dataclass(frozen=True, slots=True)
class NetworkNamespace:
    """A namespace by its descriptor (close-on-exec) and its inode, which the launcher compares with where it stands."""

    fd: int
    inode: int


def current_inode() -> int:
    """The inode of the calling thread's network namespace."""
    return Path(_CURRENT).stat().st_ino


def enter_fresh_namespace() -> NetworkNamespace:
    """Move the calling thread into a new network namespace, for good, and give its descriptor, the caller's to close.

    Raises `OSError` with the kernel's errno: EPERM (no CAP_SYS_ADMIN, or an outer filter), ENOSPC (limit reached).
    """
    os.unshare(os.CLONE_NEWNET)
    fd = os.open(_CURRENT, os.O_RDONLY | os.O_CLOEXEC)
    return NetworkNamespace(fd, os.fstat(fd).st_ino)


async def on_own_thread[T](
    name: str, work: Callable[[], T], *, timeout: float, discard: Callable[[T], object] = lambda _: None
) -> T:
    """Run `work` on a new thread that ends with it; give its result or raise its exception.

    After `timeout` seconds raises `TimeoutError`. A result that nobody waits for any more (timeout, cancellation, loop
    closed) goes to `discard` on whichever thread sees it, so that what `work` made is never lost.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T) -> None:
        if future.done():
            discard(result)
        else:
            future.set_result(result)

    def refuse(error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)

    def body() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  a thread's boundary: whatever it was, the waiter hears of it
            _call(loop, refuse, error)
        else:
            if not _call(loop, settle, result):
                discard(result)

    threading.Thread(target=body, name=name, daemon=True).start()
    try:
        async with asyncio.timeout(timeout):
            return await future
    except BaseException:
        # Cancelled in the very step in which the result arrived: the await never saw it.
        if future.done() and not future.cancelled() and future.exception() is None:
            discard(future.result())
        raise


def _call[A](loop: asyncio.AbstractEventLoop, function: Callable[[A], None], argument: A) -> bool:
    """Hand over to the loop's thread; False when there is no loop any more."""
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        return False
    return True
