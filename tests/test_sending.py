"""Batches past the transport: what a socket takes at once, and what becomes of the rest."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ringside.sensor._perf import ffi
from ringside.sensor.sending import BatchSender

WINDOW = 1 << 20


class Transport:
    """One on a socket, with `waiting` bytes in its queue."""

    def __init__(self, ours: socket.socket) -> None:
        self._ours = ours
        self.waiting = 0
        self.gone = False
        self.written = b""

    def get_extra_info(self, _: str) -> socket.socket:
        return self._ours

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def is_closing(self) -> bool:
        return self.gone

    def write(self, data: bytes) -> None:
        self.written += data

    def writelines(self, pieces: list[bytes]) -> None:
        self.written += b"".join(pieces)


class Rig:
    """A sender on a socket whose other end is `theirs`."""

    def __init__(self, ours: socket.socket, theirs: socket.socket) -> None:
        self.theirs = theirs
        self.transport = Transport(ours)
        self.stream = SimpleNamespace(outbound_flow_control_window=WINDOW)
        self.h2 = SimpleNamespace(
            streams={7: self.stream}, outbound_flow_control_window=WINDOW, max_outbound_frame_size=1 << 14
        )
        self.connection = Connection()
        self.window_updated = asyncio.Event()
        self.sender = self.another(7)

    def another(self, number: int) -> BatchSender:
        """A stream of this number."""
        inner = SimpleNamespace(
            id=number,
            _h2_connection=self.h2,
            _transport=self.transport,
            connection=self.connection,
            window_updated=self.window_updated,
        )
        whole: Any = SimpleNamespace(_stream=inner)
        return BatchSender(whole)

    def send(self, message: bytes) -> bool:
        held = ffi.new("uint8_t[]", message)
        return self.sender.send_now(ffi.new("rs_batch *", {"data": held, "length": len(message)}))

    def arrived(self) -> bytes:
        """What the message's frames carry, from the socket and then from the transport."""
        data = b""
        self.theirs.setblocking(False)
        try:
            while some := self.theirs.recv(1 << 20):
                data += some
        except BlockingIOError:
            data += self.transport.written
        content = b""
        while data:
            size = int.from_bytes(data[:3], "big")
            assert data[3:9] == b"\0\0\0\0\0\7"
            content, data = content + data[9 : 9 + size], data[9 + size :]
        return content


class Connection:
    """grpclib's, as far as it is looked at."""

    def __init__(self) -> None:
        self.write_ready = asyncio.Event()
        self.write_ready.set()


@pytest.fixture
def rig() -> Iterator[Rig]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Rig(ours, theirs)


@pytest.mark.parametrize("length", [0, 1, (1 << 14) - 5, (1 << 14) - 4, 100_000])
def test_a_message_is_sent_whole(rig: Rig, length: int) -> None:
    message = bytes(range(256)) * (length // 256 + 1)
    assert rig.send(message[:length])
    assert not rig.transport.written
    assert rig.arrived() == b"\0" + length.to_bytes(4, "big") + message[:length]
    assert rig.h2.outbound_flow_control_window == WINDOW - length - 5
    assert rig.stream.outbound_flow_control_window == WINDOW - length - 5


def test_what_the_socket_does_not_take_is_the_transports(rig: Rig) -> None:
    rig.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 30_000)
    message = bytes(range(251)) * 900
    assert rig.send(message)
    assert rig.transport.written
    assert rig.arrived() == b"\0" + len(message).to_bytes(4, "big") + message
    assert rig.h2.outbound_flow_control_window == WINDOW - len(message) - 5


def test_nothing_is_sent_where_others_are_first_or_nothing_may_be(rig: Rig) -> None:
    for thing, name, value in (
        (rig.transport, "waiting", 1),
        (rig.transport, "gone", True),
        (rig.stream, "outbound_flow_control_window", 104),
        (rig.h2, "outbound_flow_control_window", 104),
    ):
        before = getattr(thing, name)
        setattr(thing, name, value)
        assert not rig.send(bytes(100))
        setattr(thing, name, before)
    rig.theirs.close()
    assert not rig.send(bytes(100))
    assert not rig.transport.written
    assert rig.h2.outbound_flow_control_window == rig.stream.outbound_flow_control_window == WINDOW


async def test_a_message_that_had_to_wait_goes_out_whole_once_nothing_is_before_it(rig: Rig) -> None:
    message = bytes(range(250)) * 200
    rig.transport.waiting = 1
    rig.connection.write_ready.clear()
    task = asyncio.create_task(rig.sender.send(message))
    await asyncio.sleep(0)
    assert not rig.arrived()
    rig.transport.waiting = 0
    rig.connection.write_ready.set()
    await task
    assert not rig.transport.written
    assert rig.arrived() == b"\0" + len(message).to_bytes(4, "big") + message


async def test_a_message_longer_than_the_window_goes_out_by_and_by(rig: Rig) -> None:
    message = bytes(range(250)) * 200
    rig.stream.outbound_flow_control_window = 30_000
    task = asyncio.create_task(rig.sender.send(message))
    await asyncio.sleep(0)
    assert len(rig.arrived()) == 30_000
    rig.stream.outbound_flow_control_window = WINDOW
    rig.window_updated.set()
    await task
    assert rig.arrived() == b"\0" + len(message).to_bytes(4, "big") + message


async def test_one_that_waits_for_its_own_window_keeps_nobody(rig: Rig) -> None:
    rig.stream.outbound_flow_control_window = 0
    other = SimpleNamespace(outbound_flow_control_window=WINDOW)
    rig.h2.streams[9] = other
    waits = asyncio.create_task(rig.sender.send(b"waits"))
    await asyncio.sleep(0)
    await rig.another(9).send(b"goes out")
    assert not waits.done()
    rig.stream.outbound_flow_control_window = WINDOW
    rig.window_updated.set()
    await waits
