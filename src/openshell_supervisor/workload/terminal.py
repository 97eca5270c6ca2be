"""A terminal of its own for the workload, relayed to ours.

The workload never gets our controlling terminal: with it, it could push characters into the shell outside (TIOCSTI,
ioctl_tty(2)). It gets the slave of a new pair in a session of its own; we copy bytes both ways and pass on size changes.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import signal
import stat
import struct
import termios
import tty
from types import TracebackType
from typing import Any

# One read's worth each way; a terminal's own buffer is 4 KiB (n_tty), so more would only sit here.
CHUNK_BYTES = 4096
# Size of a terminal nobody is attached to (upstream: 24 rows, 80 columns).
DEFAULT_ROWS, DEFAULT_COLUMNS = 24, 80
# After the workload's end its last output may still be in the pair; upstream waits 2 s for its readers.
DRAIN_SECONDS = 2.0
FEED_PAUSE_SECONDS = 0.01  # between chunks typed from a file: the reader on the other side needs its turn


class Terminal:
    """A pseudo-terminal pair; use as a context manager around the workload's life."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        os.set_blocking(self._master, False)
        self._outside = 0 if os.isatty(0) else None
        self._saved: list[Any] | None = None
        self._ended = asyncio.Event()
        self.resize()

    def resize(self) -> None:
        """Give the pair our own terminal's size, or 24x80 without one."""
        size = struct.pack("HHHH", DEFAULT_ROWS, DEFAULT_COLUMNS, 0, 0)
        if self._outside is not None:
            size = fcntl.ioctl(self._outside, termios.TIOCGWINSZ, size)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def adopt(self, master: int) -> None:
        """Relay `master` (owned from now on) instead: the launcher made the workload's terminal anew, among its own."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._master)
        os.close(self._master)
        os.set_blocking(master, False)
        self._master = master
        self.resize()
        loop.add_reader(master, self._from_workload)

    def started(self) -> None:
        """The workload holds the slave now: close ours, so that its end is seen, and pass on what was typed meanwhile."""
        os.close(self.slave)
        self.slave = -1
        loop = asyncio.get_running_loop()
        try:
            loop.add_reader(0, self._to_workload)
        except PermissionError:  # epoll takes no regular file and no /dev/null
            if stat.S_ISREG(os.fstat(0).st_mode):
                loop.call_soon(self._feed_file)
            # With /dev/null nobody is attached: the session waits, as a driver expects of its main process.

    def __enter__(self) -> Terminal:
        loop = asyncio.get_running_loop()
        if self._outside is not None:
            self._saved = termios.tcgetattr(self._outside)
            tty.setraw(self._outside)
            loop.add_signal_handler(signal.SIGWINCH, self.resize)
        loop.add_reader(self._master, self._from_workload)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._master)
        loop.remove_reader(0)
        if self._outside is not None and self._saved is not None:
            loop.remove_signal_handler(signal.SIGWINCH)
            termios.tcsetattr(self._outside, termios.TCSADRAIN, self._saved)
        os.close(self._master)
        if self.slave >= 0:
            os.close(self.slave)

    async def drain(self) -> None:
        """Wait until everything the workload wrote has been copied, at most `DRAIN_SECONDS`."""
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._ended.wait()
        except TimeoutError:
            pass  # a process left behind still holds the slave; its output is not the workload's

    def _from_workload(self) -> None:
        try:
            data = os.read(self._master, CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:  # EIO: the last holder of the slave is gone
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._master)
            self._ended.set()
            return
        _write_all(1, data)

    def _feed_file(self) -> None:
        """Type a regular file's content, a chunk a turn of the loop, then end of file; a full terminal is tried again."""
        place = os.lseek(0, 0, os.SEEK_CUR)
        data = os.read(0, CHUNK_BYTES) or b"\x04"
        try:
            written = os.write(self._master, data)
        except BlockingIOError:
            written = 0
        except OSError:
            return  # the workload is gone
        if data != b"\x04":
            os.lseek(0, place + written, os.SEEK_SET)
        if data != b"\x04" or not written:
            asyncio.get_running_loop().call_later(FEED_PAUSE_SECONDS, self._feed_file)

    def _to_workload(self) -> None:
        data = os.read(0, CHUNK_BYTES)
        if not data:
            asyncio.get_running_loop().remove_reader(0)
            data = b"\x04"  # end of file on a terminal is the EOF character (termios(3), VEOF)
        try:
            os.write(self._master, data)
        except BlockingIOError:
            pass  # the workload reads nothing and its buffer is full: a terminal drops input then, too


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            continue
        except OSError:
            return  # nobody reads our output any more; the workload goes on
