"""One leg of an HTTP session: an asyncio transport on one side, the session's events on the other.

A protocol, not a stream: bytes go from the loop to the session in one call, and what the session writes during one event
leaves in one `send`. It counts nothing and understands nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

# The transport asks the session to stop its source above the first number and lets it go on below the second.
HIGH_WATER = 256 * 1024
LOW_WATER = 64 * 1024
# A peer that does not take the last bytes of a closed connection is dropped after this many seconds.
CLOSE_GRACE = 10.0


class WireOwner(Protocol):
    """What a wire tells."""

    def received(self, wire: Wire, data: bytes) -> None: ...
    def ended(self, wire: Wire) -> None: ...
    def lost(self, wire: Wire) -> None: ...
    def write_pressure(self, wire: Wire) -> None: ...


class Wire(asyncio.Protocol):
    """A connection's bytes. `connection` is the session's own name for it; `full` says that the peer does not take more."""

    def __init__(self, owner: WireOwner, connection: Any, *, tls: bool) -> None:
        self.connection = connection
        self.full = False
        self.transport: asyncio.Transport | None = None
        self._owner = owner
        self._tls = tls
        self._pending: list[bytes] = []
        self._grace: asyncio.TimerHandle | None = None
        self._read_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(HIGH_WATER, LOW_WATER)

    def data_received(self, data: bytes) -> None:
        self._owner.received(self, data)

    def eof_received(self) -> bool:
        if self._tls:
            return False  # TLS cannot be half closed in asyncio; the transport closes and `lost` follows
        self._owner.ended(self)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._grace is not None:
            self._grace.cancel()
        self._pending.clear()
        self._owner.lost(self)

    def pause_writing(self) -> None:
        self.full = True
        self._owner.write_pressure(self)

    def resume_writing(self) -> None:
        self.full = False
        self._owner.write_pressure(self)

    def write(self, data: bytes) -> bool:
        """Queue bytes until `flush`. True when this is the first of a batch."""
        self._pending.append(data)
        return len(self._pending) == 1

    def flush(self) -> None:
        """Send what was queued."""
        pending = self._pending
        if pending:
            self._pending = []
            if self.transport is not None and not self.transport.is_closing():
                self.transport.write(pending[0] if len(pending) == 1 else b"".join(pending))

    def allow_reading(self, allowed: bool) -> None:
        """Let bytes come in, or leave them in the kernel."""
        if self.transport is None or self._read_paused is not allowed or self.transport.is_closing():
            return
        self._read_paused = not allowed
        if allowed:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def close(self, *, half: bool = False) -> None:
        """Send what is queued, then end (or only our direction, where the transport can)."""
        self.flush()
        if self.transport is None or self.transport.is_closing():
            return
        if half and self.transport.can_write_eof():
            self.transport.write_eof()
            return
        self.transport.close()
        self._grace = asyncio.get_running_loop().call_later(CLOSE_GRACE, self.transport.abort)

    def abort(self) -> None:
        """End now; queued bytes are lost."""
        if self.transport is not None:
            self.transport.abort()
