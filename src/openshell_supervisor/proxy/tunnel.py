"""A tunnel that nobody looks into: bytes go from socket to socket through a pipe, inside the kernel (splice(2)).

Two `_Flow`s, one per direction, driven by the event loop's readiness callbacks: no thread, no task, no copy. Half-close is
kept: the end of one direction becomes a FIN in the same direction and nothing else. This room knows two connected,
non-blocking sockets; it knows neither who may talk nor what is said.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
from collections.abc import Callable

# One hour without a byte in either direction. Long-lived SSH and WebSocket sessions idle for minutes; two minutes were too few
# elsewhere (proxy.md 8, row 36).
IDLE_TIMEOUT = 3600.0
# Once one side has ended its direction, the other gets this long between bytes: a client that is gone looks like one that has
# only finished sending, and would hold its place for as long as a silent upstream lives.
HALF_CLOSED_IDLE = 60.0
# A direction starts on the kernel's default pipe (64 KiB) and gets a big one when it proves to be bulk; the kernel refuses
# above /proc/sys/fs/pipe-user-pages-soft, which only costs speed.
BULK_AFTER = 256 * 1024
BULK_PIPE = 1024 * 1024
# Bytes moved per callback before the loop is given back, so that one download does not starve the others.
TURN = 4 * 1024 * 1024
_SPLICE_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_COPY_CHUNK = 64 * 1024


class _Flow:
    """One direction. `buffered` bytes are in the pipe (or, without splice, in `_held`)."""

    def __init__(
        self, source: socket.socket, sink: socket.socket, loop: asyncio.AbstractEventLoop, ended: Callable[[], None]
    ) -> None:
        self.moved = 0
        self.finished = False
        self.failed = False
        self._source = source
        self._sink = sink
        self._loop = loop
        self._ended = ended
        self._pipe: tuple[int, int] | None = None
        self._buffered = 0
        self._eof = False
        self._writing = False
        self._bulk = False
        self._held = b""
        self._copying = False

    def start(self) -> None:
        self._loop.add_reader(self._source.fileno(), self._turn)

    def stop(self) -> None:
        """Forget both registrations and the pipe; the sockets stay open."""
        self._loop.remove_reader(self._source.fileno())
        if self._writing:
            self._loop.remove_writer(self._sink.fileno())
            self._writing = False
        if self._pipe is not None:
            os.close(self._pipe[0])
            os.close(self._pipe[1])
            self._pipe = None
        self._held = b""

    def _turn(self) -> None:
        try:
            budget = TURN
            while budget > 0 and not self.finished:
                if self._buffered == 0 and not self._fill():
                    return
                budget -= self._flush()
                if self._writing:
                    return
        except OSError as error:
            if error.errno == errno.EINVAL and not self._copying and self._buffered == 0:
                # A socket type without splice support (RFC: man splice, EINVAL): copy through user space instead.
                self._copying = True
                return
            self.failed = True
            self._ended()

    def _fill(self) -> bool:
        """Take bytes from the source; False when there are none now. The end of the stream finishes the flow."""
        try:
            if self._copying:
                self._held = self._source.recv(_COPY_CHUNK)
                count = len(self._held)
            else:
                count = os.splice(self._source.fileno(), self._ensure_pipe()[1], BULK_PIPE, flags=_SPLICE_FLAGS)
        except BlockingIOError:
            return False
        if count == 0:
            self._finish()
            return False
        self._buffered = count
        self.moved += count
        if not self._bulk and self.moved > BULK_AFTER and not self._copying:
            self._grow()
        return True

    def _flush(self) -> int:
        """Give buffered bytes to the sink; registers for writability when it takes no more."""
        sent = 0
        while self._buffered:
            try:
                if self._copying:
                    count = self._sink.send(self._held)
                    self._held = self._held[count:]
                else:
                    assert self._pipe is not None
                    count = os.splice(self._pipe[0], self._sink.fileno(), self._buffered, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                if not self._writing:
                    self._writing = True
                    self._loop.remove_reader(self._source.fileno())
                    self._loop.add_writer(self._sink.fileno(), self._drained)
                return sent
            self._buffered -= count
            sent += count
        return sent

    def _drained(self) -> None:
        """The sink takes bytes again."""
        try:
            self._loop.remove_writer(self._sink.fileno())
            self._writing = False
            self._flush()
        except OSError:
            self.failed = True
            self._ended()
            return
        if not self._writing:
            self._loop.add_reader(self._source.fileno(), self._turn)

    def _finish(self) -> None:
        self.finished = True
        self._loop.remove_reader(self._source.fileno())
        try:
            self._sink.shutdown(socket.SHUT_WR)
        except OSError:
            self.failed = True
        self._ended()

    def _ensure_pipe(self) -> tuple[int, int]:
        if self._pipe is None:
            self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        return self._pipe

    def _grow(self) -> None:
        self._bulk = True
        assert self._pipe is not None
        try:
            fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, BULK_PIPE)
        except OSError:
            # EPERM or EBUSY: the user's pipe budget is spent. The small pipe works.
            return


class Tunnel:
    """Two flows between a client and an upstream socket. The caller keeps and closes the sockets."""

    def __init__(self, client: socket.socket, upstream: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[str] = self._loop.create_future()
        self._up = _Flow(client, upstream, self._loop, self._flow_ended)
        self._down = _Flow(upstream, client, self._loop, self._flow_ended)
        self._seen = 0
        self.client_ended_at: float | None = None  # loop time at which the client ended its direction
        self._timer: asyncio.TimerHandle | None = None

    @property
    def bytes_up(self) -> int:
        """Bytes taken from the client so far."""
        return self._up.moved

    @property
    def bytes_down(self) -> int:
        """Bytes taken from the upstream so far."""
        return self._down.moved

    async def run(self, idle_timeout: float = IDLE_TIMEOUT) -> str:
        """Relay until both directions ended. Returns how: "closed", "reset", "idle" or the reason given to `cut`."""
        try:
            self._up.start()
            self._down.start()
            self._timer = self._loop.call_later(idle_timeout, self._check_idle, idle_timeout)
            return await self._done
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._up.stop()
            self._down.stop()

    def cut(self, reason: str) -> None:
        """End the tunnel now; `run` returns `reason`."""
        if not self._done.done():
            self._done.set_result(reason)

    def _flow_ended(self) -> None:
        if self._up.finished and self.client_ended_at is None:
            self.client_ended_at = self._loop.time()
        if self._up.failed or self._down.failed:
            self.cut("reset")
        elif self._up.finished and self._down.finished:
            self.cut("closed")
        elif self._timer is not None:
            self._timer.cancel()
            self._seen = self._up.moved + self._down.moved
            self._timer = self._loop.call_later(HALF_CLOSED_IDLE, self._check_idle, HALF_CLOSED_IDLE)

    def _check_idle(self, idle_timeout: float) -> None:
        moved = self._up.moved + self._down.moved
        if moved == self._seen:
            self.cut("idle")
            return
        self._seen = moved
        self._timer = self._loop.call_later(idle_timeout, self._check_idle, idle_timeout)
