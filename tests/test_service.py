"""The service over gRPC, with a sensor on a fake kernel behind it, and clients of every kind in front."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ringside.api.v0 import (
    ChargenEventFilter,
    EventFilter,
    Subscription,
    SyscallEventFilter,
    SyscallEventType,
)
from ringside.sensor.sensor import Sensor
from ringside.sensor.wire import varint

from .support.fakekernel import PATIENCE, FakeKernel
from .support.fakering import Response
from .support.peer import FAILED_PRECONDITION, INVALID_ARGUMENT, OK, Call, Peer, connected, framed, see, send
from .support.requests import encoded, frames
from .support.served import Served, serving, serving_in_a_loop

DEADLINE_EXCEEDED, UNIMPLEMENTED = 4, 12
ENTER = SyscallEventFilter(type=SyscallEventType.ENTER)
NUMBERS = itertools.count(1)
WANTED = framed(encoded(Subscription(event_filter=EventFilter(syscall_events=[ENTER]))))


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as made:
        yield made


@pytest.fixture
def kernel(served: Served) -> FakeKernel:
    return served.kernel


@pytest.fixture
def sensor(served: Served) -> Sensor:
    return served.sensor


@pytest.fixture
async def peer(served: Served) -> AsyncIterator[Peer]:
    async with connected(served.path) as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_is_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    for when in ("setup", "call"):
        assert not [one for one in caplog.get_records(when) if one.levelno >= logging.ERROR]


async def still_serves(peer: Peer, kernel: FakeKernel) -> None:
    """A subscription on this very connection gets its events."""
    call = await peer.call(WANTED).answer()
    assert Response.FromString(call.messages[0]).statuses[0].code == OK
    kernel.enter(39)
    await call.until(lambda call: len(call.messages) > 1)
    assert Response.FromString(call.messages[1]).events[0].event.syscall.id == 39
    call.reset()


# --- calls that grpclib alone makes much of


@pytest.mark.parametrize("deadline", ["0n", "0S", "00000000H"])
async def test_a_deadline_that_is_over_on_arrival(
    peer: Peer, kernel: FakeKernel, sensor: Sensor, deadline: str
) -> None:
    call = await peer.call(WANTED, headers=[("grpc-timeout", deadline)]).end()
    assert (call.status, call.message) == (DEADLINE_EXCEEDED, "the call's deadline is over")
    assert not call.messages
    assert not sensor.outputs
    await still_serves(peer, kernel)


@pytest.mark.parametrize("deadline", ["1n", "3u", "1m", "50m"])
async def test_a_deadline_that_is_over_soon(
    peer: Peer, kernel: FakeKernel, served: Served, deadline: str
) -> None:
    call = await peer.call(WANTED, headers=[("grpc-timeout", deadline)]).end()
    assert call.status == DEADLINE_EXCEEDED
    await served.settled()
    await still_serves(peer, kernel)


async def test_a_deadline_that_is_far_away(peer: Peer, kernel: FakeKernel) -> None:
    call = await peer.call(WANTED, headers=[("grpc-timeout", "99999999H")]).answer()
    assert not call.is_over
    await still_serves(peer, kernel)


@pytest.mark.parametrize("deadline", ["", "5", "-1S", "1x", "S", "1.5S"])
async def test_a_deadline_that_is_none(peer: Peer, kernel: FakeKernel, deadline: str) -> None:
    call = await peer.call(WANTED, headers=[("grpc-timeout", deadline)]).end()
    assert call.status == INVALID_ARGUMENT
    assert call.message.startswith("grpc-timeout: ")
    await still_serves(peer, kernel)


async def test_metadata_that_nobody_reads(peer: Peer, kernel: FakeKernel) -> None:
    call = await peer.call(WANTED, headers=[("x-bin", "!"), ("x-trace", "1"), ("x-bin", "A")]).answer()
    assert call.messages
    await still_serves(peer, kernel)


async def test_a_frame_of_a_type_to_come(peer: Peer, kernel: FakeKernel) -> None:
    """RFC 9113, 5.5."""
    peer.writer.write(b"\0\0\3\x4b\0\0\0\0\0abc")
    await still_serves(peer, kernel)


async def test_calls_reset_as_soon_as_made_leave_the_connection_its_window(
    peer: Peer, kernel: FakeKernel, served: Served
) -> None:
    """Ten times what the window has."""
    data = bytes(1 << 14)
    async with asyncio.timeout(PATIENCE):
        for _ in range(40 << 20 >> 14):
            while peer.h2.outbound_flow_control_window < len(data):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            call = peer.call(end=False)
            call.send(data)
            call.reset()
            await asyncio.sleep(0)
    await still_serves(peer, kernel)
    await served.settled()


async def test_bytes_that_are_no_http2(served: Served, peer: Peer, kernel: FakeKernel) -> None:
    for garbage in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 100,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\1\0\0\0\0\0\0x",
    ):
        reader, writer = await asyncio.open_unix_connection(served.path)
        writer.write(garbage)
        async with asyncio.timeout(20):
            await reader.read()  # to its end
        writer.close()
        await writer.wait_closed()
    await still_serves(peer, kernel)


async def test_headers_that_are_not_ascii(served: Served, peer: Peer, kernel: FakeKernel) -> None:
    async with connected(served.path) as other:
        await other.call(WANTED, headers=[("user-agent", "\u00e4")]).end()
    await still_serves(peer, kernel)


# --- messages


async def test_a_message_in_pieces(peer: Peer, kernel: FakeKernel) -> None:
    call = peer.call(*(WANTED[at : at + 1] for at in range(len(WANTED))))
    assert (await call.answer()).messages
    call = peer.call(WANTED[:3], b"", WANTED[3:], b"", end=False)
    assert (await call.answer()).messages
    await still_serves(peer, kernel)


BAD_MESSAGES = {
    "none": ([], INVALID_ARGUMENT, "subscription: is missing"),
    "an empty one": ([framed(b"")], INVALID_ARGUMENT, "subscription: is missing"),
    "half a prefix": ([b"\0\0"], INVALID_ARGUMENT, "request: ends before the message does"),
    "half a message": ([WANTED[:-1]], INVALID_ARGUMENT, "request: ends before the message does"),
    "a prefix only": ([b"\0\0\0\0\1"], INVALID_ARGUMENT, "request: ends before the message does"),
    "a flag that is none": ([framed(b"", 7)], INVALID_ARGUMENT, "request: begins with the byte 7"),
    "compressed somehow": ([framed(b"", 1)], INVALID_ARGUMENT, "request: begins with the byte 1"),
    "too long": ([b"\0\xff\xff\xff\xff"], INVALID_ARGUMENT, "request: 4294967295 bytes; the most is 4194304"),
    "not servable": (
        [framed(b"\x0a\x0f\x0a\x0d\x22\x0b\x08\x01\x52\x07do_exit")],
        FAILED_PRECONDITION,
        "kernel functions: this kernel has no kprobes",
    ),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
async def test_messages_that_are_none(peer: Peer, kernel: FakeKernel, served: Served, name: str) -> None:
    frames, status, words = BAD_MESSAGES[name]
    call = await peer.call(*frames).end()
    assert (call.status, call.message[: len(words)]) == (status, words)
    assert not call.messages
    await still_serves(peer, kernel)
    await served.settled()


async def test_a_message_that_is_too_long_is_not_waited_for(peer: Peer, kernel: FakeKernel) -> None:
    call = await peer.call(b"\0\x00\x40\x00\x01" + bytes(100), end=False).end()
    assert (call.status, call.message) == (
        INVALID_ARGUMENT,
        "request: 4194305 bytes; the most is 4194304",
    )
    await still_serves(peer, kernel)


async def test_compressed_messages(peer: Peer, kernel: FakeKernel) -> None:
    call = await peer.call(framed(b"x", 1), headers=[("grpc-encoding", "gzip")]).end()
    assert call.status == UNIMPLEMENTED
    call = await peer.call(WANTED, headers=[("grpc-encoding", "gzip")]).answer()
    assert call.messages
    await still_serves(peer, kernel)


async def test_what_is_said_of_an_error_fits_every_clients_headers(peer: Peer, kernel: FakeKernel) -> None:
    """gRPC's C core takes 8 KB; what a request quotes may have megabytes."""
    deep = b""
    for _ in range(200):
        deep = b"\x52" + varint(len(deep)) + deep
    for tag in (b"\x2a", b"\x0a", b"\x0a"):
        deep = tag + varint(len(deep)) + deep
    call = await peer.call(framed(deep)).end()
    assert call.status == INVALID_ARGUMENT
    assert call.message.endswith("is nested deeper than 100 messages")
    assert sum(len(name) + len(value) for name, value in call.headers.items()) < 4096
    await still_serves(peer, kernel)


# --- several streams on a connection


@pytest.fixture
def _small_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringside.sensor.sending._SOCKET", 1 << 16)


@pytest.mark.usefixtures("_small_socket")
@pytest.mark.parametrize("window", [0, 1 << 28], ids=["window shut", "socket full"])
async def test_streams_that_always_have_more_leave_others_their_turn(
    served: Served, kernel: FakeKernel, window: int
) -> None:
    """On a connection that takes nothing most of the time."""
    wanted = Subscription(event_filter=EventFilter(chargen_events=[ChargenEventFilter(length=1000)]))
    peer = await Peer.connect(served.path, window=window)
    try:
        eager = [await peer.call(framed(encoded(wanted))).answer() for _ in range(3)]
        for call in eager if window else ():
            peer.h2.increment_flow_control_window(window, call.number)
        peer.flush()
        for _ in range(3):
            await still_serves(peer, kernel)
        for call in eager:
            call.messages.clear()
        for call in eager:
            await call.until(lambda call: len(call.messages) > 10)
    finally:
        await peer.close()


@pytest.mark.usefixtures("_small_socket")
@pytest.mark.parametrize("window", [1 << 24, 1 << 17])
async def test_a_client_that_stalls_gets_everything_whole_and_in_order(
    served: Served, kernel: FakeKernel, sensor: Sensor, window: int
) -> None:
    """More than its socket takes, and less and more than the window lets through."""
    peer = await Peer.connect(served.path, window=window)
    try:
        call = await peer.call(WANTED).answer()
        peer.h2.increment_flow_control_window(window, call.number)
        peer.flush()
        reading: Any = peer.writer.transport
        for issued in range(2000, 12001, 2000):
            for _ in range(2000):
                kernel.enter(39)
            while sensor.engine.counters()["events"] < issued:
                sensor.drain_once()
                await asyncio.sleep(0)
            if issued == 4000:
                reading.pause_reading()
        reading.resume_reading()
        await call.until(
            lambda call: sum(len(Response.FromString(one).events) for one in call.messages) >= issued
        )
        told = [event.event for one in call.messages for event in Response.FromString(one).events]
        numbers = [one.sensor_sequence_number for one in told]
        assert [one.syscall.id for one in told] == [39] * issued
        assert numbers == sorted(set(numbers))
    finally:
        await peer.close()


# --- anything at all


ONE_CALL = SyscallEventFilter(type=SyscallEventType.ENTER, id=444)
WATCHED = framed(encoded(Subscription(event_filter=EventFilter(syscall_events=[ONE_CALL]))))


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[tuple[Served, Peer, list[Call]]]:
    """A connection, with a stream on it that goes on, and one on another connection."""
    with serving_in_a_loop(tmp_path) as served:
        peer, other = (served.run(Peer.connect(served.path)) for _ in range(2))
        watchers = [served.run(one.call(WATCHED).answer()) for one in (peer, other)]
        served.before = served.there()
        try:
            yield served, peer, watchers
        finally:
            served.run(peer.close())
            served.run(other.close())


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(pieces=frames(), end=st.booleans(), patience=st.integers(0, 3))
def test_whatever_is_sent_others_are_served(
    crowd: tuple[Served, Peer, list[Call]],
    caplog: pytest.LogCaptureFixture,
    pieces: list[bytes],
    end: bool,
    patience: int,
) -> None:
    served, peer, watchers = crowd

    async def run() -> None:
        await send(peer, pieces, end=end, patience=patience)
        number = next(NUMBERS)
        served.kernel.enter(444, number)
        for watcher in watchers:
            await see(watcher, number)
        await served.settled()

    served.run(run())
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]
