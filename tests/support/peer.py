"""A gRPC client that may do what it likes: frames as a test wants them, over a connection of its own."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived

from .fakekernel import PATIENCE
from .fakering import Response

OK, INVALID_ARGUMENT, FAILED_PRECONDITION = 0, 3, 9
GET_EVENTS = "/capsule8.api.v0.TelemetryService/GetEvents"


def framed(data: bytes, compressed: int = 0) -> bytes:
    """A message as gRPC frames it."""
    return struct.pack(">BI", compressed, len(data)) + data


class Call:
    """One call, and what came back."""

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer = peer
        self.number = number
        self.headers: dict[str, str] = {}
        self.messages: list[bytes] = []
        self.is_over = False
        self.reads = True
        self._data = bytearray()
        self._unread = 0
        self._news = asyncio.Event()

    @property
    def status(self) -> int | None:
        """grpc-status, if it came."""
        return int(self.headers["grpc-status"]) if "grpc-status" in self.headers else None

    @property
    def message(self) -> str:
        """grpc-message."""
        return unquote(self.headers.get("grpc-message", ""))

    async def until(self, holds: Callable[[Call], object]) -> Call:
        """Wait for more to come until something holds of this call."""
        async with asyncio.timeout(PATIENCE):
            while not holds(self):
                self._news.clear()
                await self._news.wait()
        return self

    async def answer(self) -> Call:
        """Wait for the first message, or the end."""
        return await self.until(lambda call: call.messages or call.is_over)

    async def end(self) -> Call:
        """Wait for the end."""
        return await self.until(lambda call: call.is_over)

    def send(self, data: bytes, *, end: bool = False) -> None:
        """A DATA frame, or several if it is long. A call that is over takes none, and that is no error."""
        h2 = self._peer.h2
        while not self.is_over:
            piece, data = data[: h2.max_outbound_frame_size], data[h2.max_outbound_frame_size :]
            h2.send_data(self.number, piece, end_stream=end and not data)
            if not data:
                break
        self._peer.flush()

    def reset(self) -> None:
        """Give it up; our side of it too, if only the other has ended."""
        stream = self._peer.h2.streams.get(self.number)
        if stream is not None and not stream.closed and self._peer.is_open:
            self._peer.h2.reset_stream(self.number, error_code=8)
            self._peer.flush()
            self.is_over = True

    def read_on(self) -> None:
        """Read what came since reading stopped, and go on."""
        self.reads = True
        unread, self._unread = self._unread, 0
        self._acknowledge(unread)
        self._peer.flush()

    def _acknowledge(self, size: int) -> None:
        if size and not self.is_over:
            self._peer.h2.acknowledge_received_data(size, self.number)

    def take(self, event: Any) -> None:
        """What the connection tells of this call."""
        if isinstance(event, DataReceived):
            self._data += event.data
            if self.reads:
                self._acknowledge(event.flow_controlled_length)
            else:
                self._unread += event.flow_controlled_length
            while len(self._data) >= 5:
                size = 5 + int.from_bytes(self._data[1:5], "big")
                if len(self._data) < size:
                    break
                self.messages.append(bytes(self._data[5:size]))
                del self._data[:size]
        elif isinstance(event, ResponseReceived | TrailersReceived):
            self.headers |= {str(name): str(value) for name, value in event.headers}
        elif isinstance(event, StreamEnded | StreamReset):
            self.is_over = True
        self._news.set()

    def lost(self) -> None:
        """The connection is gone."""
        self.is_over = True
        self._news.set()


class Peer:
    """A connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.h2 = H2Connection(
            H2Configuration(
                client_side=True,
                header_encoding="utf-8",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.calls: dict[int, Call] = {}
        self.is_open = True
        self.h2.initiate_connection()
        self.flush()
        self._pump = asyncio.ensure_future(self._run())

    @classmethod
    async def connect(cls, path: str, window: int = 0) -> Peer:
        """To a unix socket. With a `window` of so many bytes more, streams nobody reads don't shut it."""
        made = cls(*await asyncio.open_unix_connection(path))
        if window:
            made.h2.increment_flow_control_window(window)
            made.flush()
        return made

    def flush(self) -> None:
        """Write what h2 has to say."""
        if self.is_open and not self.writer.is_closing():
            self.writer.write(self.h2.data_to_send())

    async def _run(self) -> None:
        try:
            while data := await self._reader.read(1 << 16):
                for event in self.h2.receive_data(data):
                    call = self.calls.get(getattr(event, "stream_id", None) or 0)
                    if call is not None:
                        call.take(event)
                self.flush()
        except ConnectionError:
            pass
        finally:
            self.is_open = False
            for call in self.calls.values():
                call.lost()

    def call(
        self,
        *frames: bytes,
        end: bool = True,
        path: str = GET_EVENTS,
        headers: Iterable[tuple[str, str]] = (),
    ) -> Call:
        """Begin a call, send these DATA frames."""
        number = self.h2.get_next_available_stream_id()
        self.h2.send_headers(
            number,
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", path),
                (":authority", "test"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                *headers,
            ],
            end_stream=end and not frames,
        )
        made = self.calls[number] = Call(self, number)
        for at, frame in enumerate(frames, 1):
            made.send(frame, end=end and at == len(frames))
        self.flush()
        return made

    async def close(self) -> None:
        """Hang up."""
        self.writer.transport.abort()
        await asyncio.gather(self._pump, self.writer.wait_closed(), return_exceptions=True)


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[Peer]:
    """A connection to a unix socket."""
    peer = await Peer.connect(path)
    try:
        yield peer
    finally:
        await peer.close()


async def send(peer: Peer, pieces: Sequence[bytes], *, end: bool, patience: int = 0) -> None:
    """A request to subscribe: accepted or refused if it has an end, else given up in a while."""
    call = peer.call(*pieces, end=end)
    if end:
        await call.answer()
        if call.messages:
            assert Response.FromString(call.messages[0]).statuses[0].code == OK
        else:
            assert call.status in (INVALID_ARGUMENT, FAILED_PRECONDITION), call.message
    else:  # the message may never be whole
        for _ in range(patience):
            await asyncio.sleep(0)
    call.reset()


async def see(watcher: Call, number: int) -> None:
    """Wait for the watched system call with this argument."""
    await watcher.until(lambda call: call.is_over or arguments(call)[-1:] == [number])
    assert not watcher.is_over
    del watcher.messages[:-1]


def arguments(call: Call) -> list[int]:
    """arg0 of the events that came."""
    events = [one.event for data in call.messages for one in Response.FromString(data).events]
    return [one.syscall.arg0 for one in events]
