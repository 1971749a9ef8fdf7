"""Sending a batch over HTTP/2 without copying it.

grpclib and h2 copy a message six times on its way to the transport, which costs more than all that C does
with the events in it. Here the frames' headers go out between slices of the batch itself, and h2's books on
flow control are kept as it would. It needs a few of their inner parts; where they are not as known, or for
anything but a batch, the ordinary way is taken.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ._perf import ffi, lib

if TYPE_CHECKING:
    from grpclib.server import Stream

    from ._perf import CData

log = logging.getLogger(__name__)

_PREFIX = struct.Struct(">BI")  # gRPC: not compressed, length
_FRAME = struct.Struct(">HBBBI")  # RFC 9113, 4.1: length (24 bits), type, flags, stream
_DATA = 0
_REST = 260 << 10  # the longest message that goes out in one go, with its frames' headers
_rest = ffi.new("uint8_t[]", _REST)
# What a socket takes while its reader has not been scheduled: some 10 ms of a million events a second. With
# the usual 208 KiB most messages would have to wait in Python.
_SOCKET = 2 << 20
_SO_SNDBUFFORCE = 32

# Where a connection is full or its window shut, its streams wait in line, a message each: all hear of it when
# it opens, and the first of them would always take all of it.
_turns: WeakKeyDictionary[Any, asyncio.Lock] = WeakKeyDictionary()


def prepare(transport: Any) -> None:
    """Have a connection take many messages at once, and say when nothing waits in the transport any more."""
    transport.set_write_buffer_limits(high=0)
    ours = transport.get_extra_info("socket")
    if ours is not None and ours.family == socket.AF_UNIX:  # TCP's grows by itself, unless it is set
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET)  # as far as net.core.wmem_max allows
        with suppress(OSError):  # without CAP_NET_ADMIN
            ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET)


class BatchSender:
    """Sends messages on one response stream whose headers are sent."""

    def __init__(self, stream: Stream[bytes, bytes]) -> None:
        self._stream = stream
        self._parts = _inner_parts(stream)
        self._turn = asyncio.Lock()
        if self._parts is not None:
            self._turn = _turns.setdefault(self._parts[0].connection, self._turn)

    def send_now(self, batch: CData) -> bool:
        """Send an rs_batch past the transport if that can be done at once; False, and nothing sent, if not.

        Not while `send` runs.
        """
        return not self._turn.locked() and self._send_whole(batch.data, batch.length)

    async def send(self, data: bytes) -> None:
        """Send one message; waits for the peer's flow control and the transport."""
        if self._parts is None:
            await self._stream.send_message(data)
            return
        if not self._turn.locked() and self._send_whole(ffi.from_buffer(data), len(data)):
            return
        inner, h2, h2_stream, *_ = self._parts
        pieces, total = _pieces(data), _PREFIX.size + len(data)
        left = total
        while left:
            if h2_stream.outbound_flow_control_window <= 0:
                await _update(inner)  # which is nobody else's business
                continue
            async with self._turn:
                while left and h2_stream.outbound_flow_control_window > 0:
                    await inner.connection.write_ready.wait()
                    if left == total and self._send_whole(ffi.from_buffer(data), len(data)):
                        return
                    if h2.outbound_flow_control_window <= 0:
                        await _update(inner)
                    else:
                        left -= self._write(pieces, left)

    def _send_whole(self, data: CData, length: int) -> bool:
        """Send a message past the transport, which gets what the socket does not take; or nothing of it."""
        if self._parts is None:
            return False
        inner, h2, h2_stream, transport, descriptor = self._parts
        size, frame = _PREFIX.size + length, h2.max_outbound_frame_size
        if size > h2_stream.outbound_flow_control_window or size > h2.outbound_flow_control_window:
            return False
        if transport.get_write_buffer_size() or transport.is_closing():
            return False
        sent: int = lib.rs_send_message(descriptor, data, length, inner.id, frame, _rest, _REST)
        if sent < 0:  # its end, of which the transport will hear, or too long
            return False
        h2.outbound_flow_control_window -= size
        h2_stream.outbound_flow_control_window -= size
        left = size + _FRAME.size * -(-size // frame) - sent
        if left:
            transport.write(ffi.buffer(_rest, left)[:])
        return True

    def _write(self, pieces: list[memoryview], left: int) -> int:
        """Write a frame of what is left, if the windows are open; how much of it went out."""
        assert self._parts is not None
        _, h2, h2_stream, transport, _ = self._parts
        window = min(h2.outbound_flow_control_window, h2_stream.outbound_flow_control_window)
        if window <= 0:
            return 0
        size: int = min(window, h2.max_outbound_frame_size, left)
        h2.outbound_flow_control_window -= size
        h2_stream.outbound_flow_control_window -= size
        transport.writelines(self._frame(pieces, size))
        return size

    def _frame(self, pieces: list[memoryview], size: int) -> list[bytes | memoryview]:
        """A frame of so many bytes, which are taken off the pieces."""
        assert self._parts is not None
        out: list[bytes | memoryview] = [_FRAME.pack(size >> 8, size & 0xFF, _DATA, 0, self._parts[0].id)]
        while size:
            piece = pieces[0]
            if len(piece) > size:
                out.append(piece[:size])
                pieces[0] = piece[size:]
                size = 0
            else:
                out.append(piece)
                size -= len(piece)
                pieces.pop(0)
        return out


def _pieces(data: bytes) -> list[memoryview]:
    """What a message is made of."""
    return [memoryview(_PREFIX.pack(0, len(data))), memoryview(data)]


async def _update(inner: Any) -> None:
    """Wait for the peer to open a window."""
    inner.window_updated.clear()
    await inner.window_updated.wait()


def _inner_parts(stream: Any) -> tuple[Any, Any, Any, Any, int] | None:
    try:
        inner = stream._stream
        h2 = inner._h2_connection
        h2_stream = h2.streams[inner.id]
        transport = inner._transport
        parts = (inner, h2, h2_stream, transport, transport.get_extra_info("socket").fileno())
        ready = (
            callable(transport.writelines),
            transport.get_write_buffer_size(),
            transport.is_closing(),
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
