"""Sending a batch over HTTP/2 without copying it.

grpclib and h2 copy a message six times on its way to the transport, which costs more than all that C does
with the events in it. Here the frames' headers go out between slices of the batch itself, and h2's books on
flow control are kept as it would. It needs a few of their inner parts; where they are not as known, or for
anything but a batch, the ordinary way is taken.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from grpclib.server import Stream

log = logging.getLogger(__name__)

_PREFIX = struct.Struct(">BI")  # gRPC: not compressed, length
_FRAME = struct.Struct(">HBBBI")  # RFC 9113, 4.1: length (24 bits), type, flags, stream
_DATA = 0

# Where a connection's window is shut, its streams wait in line, a message each: all hear of it when it opens,
# and the first of them would always take all of it.
_turns: WeakKeyDictionary[Any, asyncio.Lock] = WeakKeyDictionary()


class BatchSender:
    """Sends messages on one response stream whose headers are sent."""

    def __init__(self, stream: Stream[bytes, bytes]) -> None:
        self._stream = stream
        self._parts = _inner_parts(stream)
        self._turn = asyncio.Lock()
        if self._parts is not None:
            self._turn = _turns.setdefault(self._parts[0].connection, self._turn)

    def send_now(self, data: bytes) -> bool:
        """Send one message if that needs no waiting; nothing of it, and False, if it does. Not while `send` runs."""
        if self._parts is None or self._turn.locked():
            return False
        inner, h2, h2_stream, _ = self._parts
        left = _PREFIX.size + len(data)
        if left > h2_stream.outbound_flow_control_window or left > h2.outbound_flow_control_window:
            return False
        if not inner.connection.write_ready.is_set():
            return False
        pieces = _pieces(data)
        while left:
            left -= self._write(pieces, left)
        return True

    async def send(self, data: bytes) -> None:
        """Send one message; waits for the peer's flow control and the transport."""
        if self._parts is None:
            await self._stream.send_message(data)
            return
        inner, h2, h2_stream, _ = self._parts
        pieces = _pieces(data)
        left = _PREFIX.size + len(data)
        while left:
            await inner.connection.write_ready.wait()
            if h2_stream.outbound_flow_control_window <= 0:
                await _update(inner)
            elif h2.outbound_flow_control_window <= 0 or self._turn.locked():
                async with self._turn:
                    while left and h2_stream.outbound_flow_control_window > 0:
                        if h2.outbound_flow_control_window <= 0:
                            await _update(inner)
                        else:
                            await inner.connection.write_ready.wait()
                            left -= self._write(pieces, left)
            else:
                left -= self._write(pieces, left)

    def _write(self, pieces: list[memoryview], left: int) -> int:
        """Write a frame of what is left, if the windows are open; how much of it went out."""
        assert self._parts is not None
        inner, h2, h2_stream, transport = self._parts
        window = min(h2.outbound_flow_control_window, h2_stream.outbound_flow_control_window)
        if window <= 0:
            return 0
        size: int = min(window, h2.max_outbound_frame_size, left)
        out: list[bytes | memoryview] = [_FRAME.pack(size >> 8, size & 0xFF, _DATA, 0, inner.id)]
        need = size
        while need:
            piece = pieces[0]
            if len(piece) > need:
                out.append(piece[:need])
                pieces[0] = piece[need:]
                need = 0
            else:
                out.append(piece)
                need -= len(piece)
                pieces.pop(0)
        h2.outbound_flow_control_window -= size
        h2_stream.outbound_flow_control_window -= size
        transport.writelines(out)
        return size


def _pieces(data: bytes) -> list[memoryview]:
    """What a message is made of."""
    return [memoryview(_PREFIX.pack(0, len(data))), memoryview(data)]


async def _update(inner: Any) -> None:
    """Wait for the peer to open a window."""
    inner.window_updated.clear()
    await inner.window_updated.wait()


def _inner_parts(stream: Any) -> tuple[Any, Any, Any, Any] | None:
    try:
        inner = stream._stream
        h2 = inner._h2_connection
        h2_stream = h2.streams[inner.id]
        parts = (inner, h2, h2_stream, inner._transport)
        ready = (
            callable(inner._transport.writelines),
            inner.connection.write_ready.wait,
            inner.window_updated.wait,
            min(
                h2.outbound_flow_control_window,
                h2_stream.outbound_flow_control_window,
                h2.max_outbound_frame_size,
            ),
        )
        return parts if all(part is not None for part in ready) else None
    except (AttributeError, KeyError, TypeError):
        log.info("an unknown version of grpclib or h2: messages are sent the ordinary way")
        return None
