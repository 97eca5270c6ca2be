"""Write whole lines to a descriptor that we share with others, without waiting for them.

Standard error belongs to the container runtime at the far end and to the workload beside us. Either may stop reading
it or fill it, and the workload can even make it non-blocking for us, as the open file description is the same. So: one
line is one write(2) as far as the pipe allows, what cannot be written now waits in a bounded backlog that a thread
empties when there is room, and what is lost is counted and said. This module knows bytes and nothing of events.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque

# Largest write that POSIX keeps in one piece on a pipe (PIPE_BUF, pipe(7)), and that Linux takes without blocking on a
# pipe that it reports writable.
PIECE_BYTES = select.PIPE_BUF
# Lines kept while nobody reads: about a thousand events. More would be memory given to whoever blocks us.
BACKLOG_BYTES = 256 * 1024
# How long the draining thread waits for room before it looks again whether there is still something to drain.
DRAIN_SECONDS = 0.5
# The pause after that: a pipe that others fill as fast as it is read would otherwise keep the thread spinning.
RETRY_SECONDS = 0.01
# What closing may wait to get the backlog out.
CLOSE_SECONDS = 1.0


class LineWriter:
    """Writes lines to one descriptor, in order, from any thread. Never blocks while nobody reads, and never raises for
    what the descriptor does. `lost` counts dropped lines."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._unreported = 0
        self._drainer: threading.Thread | None = None
        self._busy = False
        # Reentrant, with `_busy` beside it: a destructor that logs may run in the middle of a flush, in the same
        # thread.
        self._lock = threading.RLock()
        self.lost = 0

    def write(self, line: str) -> None:
        """Write `line` and a newline, now or when there is room; dropped and counted when the backlog is full."""
        data = line.encode("utf-8", "replace") + b"\n"
        with self._lock:
            if self._backlog_bytes + len(data) > BACKLOG_BYTES:
                self._drop()
            else:
                self._keep(data)
            self._flush()
            if self._backlog and self._drainer is None and not self._busy:
                self._drainer = threading.Thread(target=self._drain, name="stderr-drain", daemon=True)
                self._drainer.start()

    def close(self) -> None:
        """Wait up to `CLOSE_SECONDS` for the backlog to go out; the descriptor is not ours and stays open."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._backlog and (left := deadline - time.monotonic()) > 0:
            self._room(left)
            with self._lock:
                self._flush()

    def _drain(self) -> None:
        while True:
            self._room(DRAIN_SECONDS)
            with self._lock:
                self._flush()
                if not self._backlog:
                    self._drainer = None
                    return
            time.sleep(RETRY_SECONDS)

    def _room(self, seconds: float) -> bool:
        """True when a write would not block (or would fail at once), waiting up to `seconds` for that."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(seconds * 1000))

    def _keep(self, data: bytes) -> None:
        self._backlog.append(data)
        self._backlog_bytes += len(data)

    def _drop(self) -> None:
        self.lost += 1
        self._unreported += 1

    def _flush(self) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            while self._backlog and self._room(0) and self._write_piece():
                pass
        finally:
            self._busy = False

    def _write_piece(self) -> bool:
        """Write one piece of the first line; False when there was no room after all."""
        head = self._backlog.popleft()
        try:
            written = os.write(self._descriptor, head[:PIECE_BYTES])
        except BlockingIOError:
            # Another writer of the same pipe was faster.
            self._backlog.appendleft(head)
            return False
        except OSError:
            # Nobody will ever read this line (EPIPE, EBADF, EIO), or the disk below is full.
            self._backlog_bytes -= len(head)
            self._drop()
            return True
        self._backlog_bytes -= written
        if written < len(head):
            self._backlog.appendleft(head[written:])
        elif self._unreported and not self._backlog:
            self._keep(f"openshell: {self._unreported} log lines were lost: standard error took no more\n".encode())
            self._unreported = 0
        return True


STDERR = LineWriter(2)
"""The one writer of standard error: events and plain log lines share it, so that they come out in order."""
