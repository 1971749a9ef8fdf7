"""The client against a server of our own that plays the sensor."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import platform
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import CodecBase, StatusDetailsCodecBase
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream
from h2.config import H2Configuration
from h2.connection import H2Connection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ringside.api import Any as AnyMessage
from ringside.api import ErrorInfo
from ringside.api import Status as StatusMessage
from ringside.api.descriptors import message_class
from ringside.api.v0 import (
    ChargenEvent,
    Event,
    FilterExpression,
    GetEventsRequest,
    GetEventsResponse,
    NetworkEventType,
    ProcessEventType,
    Subscription,
    SyscallEvent,
    SyscallEventType,
    TelemetryEvent,
)
from ringside.client import (
    BadRequest,
    CallError,
    ClientError,
    NotServable,
    ParseError,
    RequestError,
    Sensor,
    UnknownSyscall,
    Unreachable,
    builders,
    connect,
    decode_response,
    decoder,
    error_infos,
)
from ringside.client.connection import MAX_FRAME, _Channel
from ringside.client.syscalls import name_of, number_of, table
from ringside.sensor.expression import from_message, parse

# ---- decoding

_RANGES = {
    **dict.fromkeys((3, 16, 18), (-(1 << 63), (1 << 63) - 1)),  # int64, sfixed64, sint64
    **dict.fromkeys((4, 6), (0, (1 << 64) - 1)),  # uint64, fixed64
    **dict.fromkeys((5, 15, 17), (-(1 << 31), (1 << 31) - 1)),  # int32, sfixed32, sint32
    **dict.fromkeys((7, 13), (0, (1 << 32) - 1)),  # fixed32, uint32
}
_BOOL, _STRING, _MESSAGE, _BYTES, _ENUM = 8, 9, 11, 12, 14


def messages(descriptor: Any) -> st.SearchStrategy[Any]:
    """protobuf's messages of a type, any subset of the fields set; drawn from the descriptor."""
    made = message_class(descriptor.full_name)

    def single(field: Any) -> st.SearchStrategy[Any]:
        if field.type in _RANGES:
            return st.integers(*_RANGES[field.type])
        kinds: dict[int, Callable[[], st.SearchStrategy[Any]]] = {
            _BOOL: lambda: st.sampled_from([False, True]),
            _STRING: lambda: st.text(max_size=5),
            _BYTES: lambda: st.binary(max_size=5),
            _ENUM: lambda: st.integers(0, 12),  # some are no member of the enum
            _MESSAGE: lambda: messages(field.message_type),
        }
        return kinds[field.type]()

    def of(field: Any) -> st.SearchStrategy[Any]:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            return st.dictionaries(single(key), single(value), max_size=2)
        return st.lists(single(field), max_size=2) if field.is_repeated else single(field)

    def build(values: dict[str, Any]) -> Any:
        message = made()
        for name, value in values.items():
            field = descriptor.fields_by_name[name]
            if isinstance(value, dict):
                for key, item in value.items():
                    getattr(message, name)[key].CopyFrom(item)
            elif field.is_repeated:
                getattr(message, name).extend(value)
            elif field.message_type is not None:
                getattr(message, name).CopyFrom(value)
            else:
                setattr(message, name, value)
        return message

    return st.deferred(
        lambda: st.fixed_dictionaries({}, optional={f.name: of(f) for f in descriptor.fields})
    ).map(build)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages(message_class("capsule8.api.v0.GetEventsResponse").DESCRIPTOR))
def test_the_decoder_agrees_with_betterproto2(message: Any) -> None:
    data = message.SerializeToString()
    ours, theirs = decode_response(data), GetEventsResponse.parse(data)
    assert ours == theirs
    assert GetEventsResponse.parse(bytes(ours)) == theirs
    compare_attributes(ours, theirs)


def compare_attributes(ours: Any, theirs: Any) -> None:
    """Equality does not see a 1 that should be an enum's member, or an attribute that is missing."""
    assert type(ours) is type(theirs)
    if isinstance(ours, list):
        for pair in zip(ours, theirs, strict=True):
            compare_attributes(*pair)
    elif hasattr(ours, "_betterproto"):
        assert vars(ours).keys() == vars(theirs).keys()
        for name, value in vars(ours).items():
            compare_attributes(value, getattr(theirs, name))


def test_fields_of_a_newer_api_are_skipped() -> None:
    event = TelemetryEvent(event=Event(id="1"))
    assert decoder(TelemetryEvent)(bytes(event) + b"\xfa\x3f\x01x") == event


@given(st.binary(max_size=30))
def test_garbage_is_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        decode_response(data)
    with pytest.raises(ValueError, match="no GetEventsResponse"):
        decode_response(b"\xff" + data[:1])


# ---- a sensor to talk to


class Codec(CodecBase):
    __content_subtype__ = "proto"

    def encode(self, message: Any, _type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> Any:
        return message_type.parse(data)


class Details(StatusDetailsCodecBase):
    def encode(self, status: Status, message: str | None, details: Any) -> bytes:
        return bytes(
            StatusMessage(code=status.value, message=message or "", details=[pack(one) for one in details])
        )

    def decode(self, _status: Status, _message: str | None, data: bytes) -> Any:
        return data


def pack(info: ErrorInfo) -> AnyMessage:
    return AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=bytes(info))


Script = Callable[["FakeSensor", Stream[GetEventsRequest, GetEventsResponse]], Awaitable[None]]

LIVE = GetEventsResponse(statuses=[StatusMessage(code=0)])


class FakeSensor:
    """Plays a script for each call and notes how the call ended."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Subscription] = []
        self.frame_sizes: list[int] = []
        self.ended = asyncio.Event()
        self.going = asyncio.Event()

    async def get_events(self, stream: Stream[GetEventsRequest, GetEventsResponse]) -> None:
        request = await stream.recv_message()
        assert request is not None
        assert request.subscription is not None
        self.requests.append(request.subscription)
        self.frame_sizes.append(stream._stream._h2_connection.max_outbound_frame_size)
        try:
            await self.script(self, stream)
        finally:
            self.ended.set()

    def __mapping__(self) -> Mapping[str, Handler]:
        path = "/capsule8.api.v0.TelemetryService/GetEvents"
        return {path: Handler(self.get_events, Cardinality.UNARY_STREAM, GetEventsRequest, GetEventsResponse)}


@asynccontextmanager
async def serving(fake: FakeSensor, **where: Any) -> AsyncIterator[Server]:
    server = Server([fake], codec=Codec(), status_details_codec=Details())
    await server.start(**where)
    try:
        yield server
    finally:
        server.close()
        await server.wait_closed()


@pytest.fixture
def socket(tmp_path: Path) -> str:
    return str(tmp_path / "sensor.sock")


def port_of(server: Server) -> int:
    listening: Any = server._server
    port: int = listening.sockets[0].getsockname()[1]
    return port


def batch(*ids: int) -> GetEventsResponse:
    return GetEventsResponse(
        events=[
            TelemetryEvent(event=Event(id=str(number), chargen=ChargenEvent(index=number))) for number in ids
        ]
    )


def ids_of(events: list[TelemetryEvent]) -> list[str]:
    return [event.event.id for event in events if event.event is not None]


async def two_batches(_: FakeSensor, stream: Any) -> None:
    for response in (LIVE, batch(1, 2), batch(3)):
        await stream.send_message(response)


async def forever(fake: FakeSensor, stream: Any) -> None:
    await stream.send_message(LIVE)
    number = 0
    while True:
        number += 1
        await stream.send_message(batch(number))
        fake.going.set()


async def live_and_silent(fake: FakeSensor, stream: Any) -> None:
    await stream.send_message(LIVE)
    fake.going.set()
    await asyncio.Event().wait()


def refuse(status: Status, message: str, *details: ErrorInfo) -> Script:
    async def script(_: FakeSensor, __: Any) -> None:
        raise GRPCError(status, message, list(details))

    return script


async def collect(sensor: Sensor, block: bool = False) -> list[TelemetryEvent]:
    if not block:
        return [event async for event in sensor.events(Subscription())]
    async with sensor.events(Subscription()) as stream:
        return [event async for event in stream]


async def soon(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), 10)


# ---- streams


async def test_events_come_as_dataclasses_one_by_one(socket: str) -> None:
    fake = FakeSensor(two_batches)
    subscription = builders.events(builders.chargen(1))
    async with serving(fake, path=socket), connect(f"unix:{socket}") as sensor:
        got = [event async for event in sensor.events(subscription)]
    assert got == [*batch(1, 2).events, *batch(3).events]
    assert fake.requests == [subscription]


async def test_raw_responses(socket: str) -> None:
    async with serving(FakeSensor(two_batches), path=socket), connect(f"unix:{socket}") as sensor:
        got = [data async for data in sensor.responses(Subscription())]
    assert got == [bytes(LIVE), bytes(batch(1, 2)), bytes(batch(3))]


async def test_statuses_are_told_and_losses_counted(socket: str) -> None:
    lost = StatusMessage(
        code=Status.DATA_LOSS.value,
        message="7 events lost",
        details=[pack(ErrorInfo(reason="EVENTS_LOST", domain="ringside", metadata={"count": "7"}))],
    )
    refused = StatusMessage(
        code=Status.FAILED_PRECONDITION.value,
        details=[pack(ErrorInfo(reason="FILTER_NOT_SERVED", domain="ringside"))],
    )

    async def script(_: FakeSensor, stream: Any) -> None:
        await stream.send_message(LIVE)
        await stream.send_message(GetEventsResponse(statuses=[refused]))
        await stream.send_message(GetEventsResponse(events=batch(1).events, statuses=[lost, lost]))

    told: list[StatusMessage] = []
    async with serving(FakeSensor(script), path=socket), connect(f"unix:{socket}") as sensor:
        stream = sensor.events(Subscription(), on_status=told.append)
        assert ids_of([event async for event in stream]) == ["1"]
    assert told == [*LIVE.statuses, refused, lost, lost]
    assert list(stream.statuses) == told
    assert stream.lost == 14
    assert [info.reason for info in error_infos(refused)] == ["FILTER_NOT_SERVED"]


async def test_a_block_begins_when_the_subscription_is_live(socket: str) -> None:
    fake = FakeSensor(live_and_silent)
    async with serving(fake, path=socket), connect(f"unix:{socket}") as sensor:
        async with sensor.events(Subscription()) as stream:
            assert fake.going.is_set()
            assert list(stream.statuses) == LIVE.statuses
        await soon(fake.ended)


async def test_a_block_loses_no_events_of_the_first_response(socket: str) -> None:
    async def older(_: FakeSensor, stream: Any) -> None:
        await stream.send_message(batch(1, 2))
        await stream.send_message(batch(3))

    async with (
        serving(FakeSensor(older), path=socket),
        connect(f"unix:{socket}") as sensor,
        sensor.events(Subscription()) as stream,
    ):
        assert ids_of([event async for event in stream]) == ["1", "2", "3"]


async def test_leaving_the_loop_ends_the_subscription(socket: str) -> None:
    fake = FakeSensor(forever)
    async with serving(fake, path=socket), connect(f"unix:{socket}") as sensor:
        async for _ in sensor.events(Subscription()):
            break
        gc.collect()
        await soon(fake.ended)


async def test_leaving_the_block_ends_the_subscription(socket: str) -> None:
    fake = FakeSensor(forever)
    async with serving(fake, path=socket), connect(f"unix:{socket}") as sensor:
        async with sensor.events(Subscription()) as stream:
            async for _ in stream:
                break
        await soon(fake.ended)
        await stream.aclose()


@pytest.mark.parametrize("script", [forever, live_and_silent])
async def test_cancellation_ends_the_subscription(socket: str, script: Script) -> None:
    fake = FakeSensor(script)
    async with serving(fake, path=socket), connect(f"unix:{socket}") as sensor:

        async def consume() -> None:
            async for _ in sensor.events(Subscription()):
                pass

        task = asyncio.create_task(consume())
        await soon(fake.going)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await soon(fake.ended)


async def test_a_timeout_around_the_loop(socket: str) -> None:
    fake = FakeSensor(live_and_silent)
    async with serving(fake, path=socket), connect(f"unix:{socket}") as sensor:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(collect(sensor), 0.05)
        await soon(fake.ended)


async def test_streams_share_a_connection(socket: str) -> None:
    fake = FakeSensor(two_batches)
    async with serving(fake, path=socket), connect(f"unix:{socket}") as sensor:

        async def consume() -> list[str]:
            return ids_of([event async for event in sensor.events(Subscription())])

        assert await asyncio.gather(*(consume() for _ in range(20))) == [["1", "2", "3"]] * 20


async def test_one_stream_that_is_not_read_does_not_stop_another(socket: str) -> None:
    async def much(_: FakeSensor, stream: Any) -> None:
        await stream.send_message(LIVE)
        for number in range(100):
            large = TelemetryEvent(ack=bytes(1 << 18))
            await stream.send_message(GetEventsResponse(events=[large, *batch(number).events]))

    async with (
        serving(FakeSensor(much), path=socket),
        connect(f"unix:{socket}") as sensor,
        sensor.events(Subscription()),
        sensor.events(Subscription()) as stream,
    ):
        assert len([event async for event in stream]) == 200


async def test_large_messages_travel_in_large_frames(socket: str) -> None:
    large = GetEventsResponse(events=[TelemetryEvent(ack=bytes(3 << 20))])

    async def script(_: FakeSensor, stream: Any) -> None:
        await stream.send_message(large)

    fake = FakeSensor(script)
    async with serving(fake, path=socket), connect(f"unix:{socket}") as sensor:
        assert [event async for event in sensor.events(Subscription())] == large.events
    assert fake.frame_sizes == [MAX_FRAME]


async def test_a_large_frame_may_come_with_the_acknowledgement_of_its_size(socket: str) -> None:
    """In one read: a sensor under load sends both at once."""
    sent = bytearray()

    class Wire(asyncio.Transport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            sent.extend(data)

        def is_closing(self) -> bool:
            return self.closed

        def close(self) -> None:
            self.closed = True

        closed = False

    wire = Wire()
    protocol = _Channel(path=socket)._protocol_factory()
    protocol.connection_made(wire)
    client, server = protocol.connection._connection, H2Connection(H2Configuration(client_side=False))
    request = {":method": "POST", ":scheme": "http", ":path": "/", ":authority": "x"}
    client.send_headers(1, list(request.items()))
    server.initiate_connection()
    server.receive_data(bytes(sent) + client.data_to_send())
    server.send_headers(1, [(":status", "200")])
    server.send_data(1, bytes(MAX_FRAME - 1))
    protocol.data_received(server.data_to_send())
    assert not wire.closed
    protocol.connection.close()


async def test_over_tcp() -> None:
    async with serving(FakeSensor(two_batches), host="127.0.0.1", port=0) as server:
        port = port_of(server)
        async with connect(f"127.0.0.1:{port}") as sensor:
            assert ids_of([event async for event in sensor.events(Subscription())]) == ["1", "2", "3"]


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    )
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return certificate, key


async def test_over_tls(certificate: tuple[Path, Path]) -> None:
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(*certificate)
    server_side.set_alpn_protocols(["h2"])
    client_side = ssl.create_default_context(cafile=str(certificate[0]))
    client_side.set_alpn_protocols(["h2"])
    async with serving(FakeSensor(two_batches), host="127.0.0.1", port=0, ssl=server_side) as server:
        port = port_of(server)
        async with connect(f"localhost:{port}", tls=client_side) as sensor:
            assert ids_of([event async for event in sensor.events(Subscription())]) == ["1", "2", "3"]
        with pytest.raises(Unreachable, match="certificate"):
            async with connect(f"localhost:{port}", tls=True):
                pass


# ---- errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (Status.INVALID_ARGUMENT, BadRequest),
        (Status.FAILED_PRECONDITION, NotServable),
        (Status.PERMISSION_DENIED, CallError),
        (Status.UNAVAILABLE, Unreachable),
    ],
)
@pytest.mark.parametrize("block", [True, False])
async def test_the_final_status_is_an_exception(
    socket: str, status: Status, kind: type[ClientError], block: bool
) -> None:
    info = ErrorInfo(reason="WHY", domain="ringside", metadata={"field": "x"})
    script = refuse(status, "no such thing", info)
    async with serving(FakeSensor(script), path=socket), connect(f"unix:{socket}") as sensor:
        with pytest.raises(kind, match="no such thing") as caught:
            await collect(sensor, block)
        assert caught.value.status is status
        assert caught.value.message == "no such thing"
        if isinstance(caught.value, CallError):
            assert caught.value.details == (info,)
        with pytest.raises(kind):
            [data async for data in sensor.responses(Subscription())]


async def test_an_error_after_events(socket: str) -> None:
    async def script(_: FakeSensor, stream: Any) -> None:
        await stream.send_message(LIVE)
        await stream.send_message(batch(1))
        raise GRPCError(Status.UNAVAILABLE, "the sensor stops")

    async with serving(FakeSensor(script), path=socket), connect(f"unix:{socket}") as sensor:
        stream = aiter(sensor.events(Subscription()))
        assert ids_of([await anext(stream)]) == ["1"]
        with pytest.raises(Unreachable, match="the sensor stops"):
            await anext(stream)


async def test_a_response_that_is_none(socket: str) -> None:
    async def script(_: FakeSensor, stream: Any) -> None:
        await stream.send_message(b"\xff\xff")

    async with serving(FakeSensor(script), path=socket), connect(f"unix:{socket}") as sensor:
        with pytest.raises(CallError, match="can't be decoded"):
            await collect(sensor)


async def test_nobody_there(socket: str) -> None:
    with pytest.raises(Unreachable, match=r"no sensor at unix:.*No such file"):
        async with connect(f"unix:{socket}"):
            pass
    with pytest.raises(Unreachable, match=r"no sensor at 127\.0\.0\.1:1: "):
        async with connect("127.0.0.1:1"):
            pass


@pytest.mark.parametrize("address", ["", "unix:", "localhost", "host:port", "unix:" + "x" * 200])
def test_bad_addresses(address: str) -> None:
    with pytest.raises(RequestError):
        connect(address)


async def test_a_sensor_that_goes_away(socket: str) -> None:
    async def drop(_: FakeSensor, stream: Any) -> None:
        await stream.send_message(LIVE)
        await stream.send_message(batch(1))
        stream._stream._transport.abort()
        await asyncio.Event().wait()

    async with serving(FakeSensor(drop), path=socket), connect(f"unix:{socket}") as sensor:
        with pytest.raises(Unreachable, match="lost the sensor"):
            await collect(sensor)


async def test_using_a_closed_connection(socket: str) -> None:
    fake = FakeSensor(live_and_silent)
    async with serving(fake, path=socket):
        async with connect(f"unix:{socket}") as sensor:
            stream = sensor.events(Subscription())
            await stream.__aenter__()
        with pytest.raises(Unreachable):
            [event async for event in stream]
        await stream.aclose()
        with pytest.raises(Unreachable, match="not connected"):
            await collect(sensor)
        sensor.close()


async def test_reconnecting(socket: str) -> None:
    async def drop_then_end(fake: FakeSensor, stream: Any) -> None:
        await stream.send_message(LIVE)
        await stream.send_message(batch(len(fake.requests)))
        if len(fake.requests) < 3:
            await asyncio.wait_for(fake.going.wait(), 10)
            fake.going.clear()
            stream._stream._transport.abort()
            await asyncio.Event().wait()

    fake = FakeSensor(drop_then_end)
    async with serving(fake, path=socket), connect(f"unix:{socket}") as sensor:
        stream = sensor.events(Subscription(), reconnect=True)
        got = []
        async for event in stream:
            got.append(event)
            fake.going.set()
    assert ids_of(got) == ["1", "2", "3"]
    unavailable = Status.UNAVAILABLE.value
    assert [status.code for status in stream.statuses] == [0, unavailable, 0, unavailable, 0]


# ---- builders


def test_a_whole_subscription() -> None:
    made = builders.events(
        builders.syscalls("openat", on="both"),
        builders.processes(),
        builders.network("connect", where="sin_port == 443"),
        builders.files("/etc/passwd", "/tmp/*"),
        builders.kernel("do_unlinkat", args={"name": "+0($arg2):string"}, where="name != 'x'"),
        builders.containers("created"),
        builders.ticker(1.5),
        builders.chargen(64),
        container="web*",
        limit=10,
        throttle=0.5,
        duration=2,
    )
    wanted = made.event_filter
    assert wanted is not None
    openat = number_of("openat")
    assert [(one.type, one.id) for one in wanted.syscall_events] == [
        (SyscallEventType.ENTER, openat),
        (SyscallEventType.EXIT, openat),
    ]
    assert [one.type for one in wanted.process_events] == [
        ProcessEventType.FORK,
        ProcessEventType.EXEC,
        ProcessEventType.EXIT,
    ]
    assert [one.type for one in wanted.network_events] == [NetworkEventType.CONNECT_ATTEMPT]
    assert from_message(wanted.network_events[0].filter or FilterExpression()) == parse("sin_port == 443")
    assert [(one.filename, one.filename_pattern) for one in wanted.file_events] == [
        ("/etc/passwd", None),
        (None, "/tmp/*"),
    ]
    assert wanted.kernel_events[0].arguments == {"name": "+0($arg2):string"}
    assert wanted.ticker_events[0].interval == 1_500_000_000
    assert wanted.chargen_events[0].length == 64
    assert made.container_filter is not None
    assert made.container_filter.names == ["web*"]
    assert made.modifier is not None
    assert made.modifier.limit is not None
    assert made.modifier.limit.limit == 10
    assert made.modifier.throttle is not None
    assert made.modifier.throttle.interval == 500
    assert (made.since_duration, made.for_duration) == (None, 2_000_000_000)
    assert Subscription.parse(bytes(made)) == made


def test_a_plain_subscription_has_nothing_else() -> None:
    made = builders.events(builders.ticker(1))
    assert (made.container_filter, made.modifier, made.since_duration, made.for_duration) == (None,) * 4


def test_system_calls() -> None:
    assert [(one.type, one.id) for one in builders.syscalls()] == [(SyscallEventType.ENTER, None)]
    assert [(one.type, one.id, one.ret) for one in builders.syscalls(5, ret=-2)] == [
        (SyscallEventType.EXIT, 5, -2)
    ]
    with pytest.raises(UnknownSyscall, match="did you mean openat"):
        builders.syscalls("opentat")


def test_processes() -> None:
    assert [one.type for one in builders.processes(pattern="*/sh")] == [ProcessEventType.EXEC]
    assert [(one.type, one.exit_code) for one in builders.processes(exit_code=256)] == [
        (ProcessEventType.EXIT, 256)
    ]
    assert [one.exec_filename for one in builders.processes("fork", "exec", filename="/bin/sh")] == [
        None,
        "/bin/sh",
    ]


@pytest.mark.parametrize(
    ("kinds", "where", "types"),
    [
        ((), None, 12),
        ((), "ret < 0", 6),
        ((), "sa_family == AF_INET", 6),
        (("connect", "bind"), None, 4),
        (("connect:result",), None, 1),
        (("connect",), "ret == -115", 1),
        (("connect",), "true", 2),
    ],
)
def test_network(kinds: tuple[str, ...], where: str | None, types: int) -> None:
    made = builders.network(*kinds, where=where)
    assert len({one.type for one in made}) == len(made) == types


@pytest.mark.parametrize(
    "build",
    [
        lambda: builders.network("connekt"),
        lambda: builders.network("connect:end"),
        lambda: builders.network("connect:result", where="fd == 3"),
        lambda: builders.network(where="fd == 3 && ret == 0"),
        lambda: builders.processes("born"),
        lambda: builders.containers("lost"),
        lambda: builders.syscalls(on="entry"),
        lambda: builders.kernel("f", on="entry"),
        lambda: builders.ticker(0),
        lambda: builders.chargen(0),
        lambda: builders.events(limit=0),
        lambda: builders.events(throttle=-1),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must be|where:"):
        build()


def test_a_filter_that_cannot_be_read() -> None:
    with pytest.raises(ParseError):
        builders.network("connect", where="sin_port = 443")


# ---- system call numbers


def test_known_numbers() -> None:
    assert [number_of(name, "x86_64") for name in ("read", "execve", "openat2", "rseq_slice_yield")] == [
        0,
        59,
        437,
        471,
    ]
    assert [number_of(name, "arm64") for name in ("io_setup", "execve", "openat2", "fcntl")] == [
        0,
        221,
        437,
        25,
    ]
    assert [number_of(given) for given in (7, "7", "0x10")] == [7, 7, 16]
    assert name_of(59, "x86_64") == "execve"
    assert name_of(100_000) is None
    with pytest.raises(LookupError, match="riscv64"):
        number_of("read", "riscv64")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_tables_are_one_to_one(machine: str) -> None:
    numbers = table(machine)
    assert len(set(numbers.values())) == len(numbers)
    assert all(name_of(number, machine) == name for name, number in numbers.items())


def test_numbers_agree_with_the_headers_of_this_machine() -> None:
    machine = platform.machine()
    header = Path(f"/usr/include/{machine}-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no C headers are installed")
    for name, number in re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()):
        assert table(machine)[name] == int(number)


async def test_the_example_of_the_package_is_right() -> None:
    import ringside.client

    names: dict[str, Any] = {}
    text = ringside.client.__doc__ or ""
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ")).replace(
        "asyncio.run(main())", ""
    )
    exec(code, names)
    with pytest.raises(Unreachable):
        await asyncio.wait_for(names["main"](), 10)


def test_syscall_event_is_whole() -> None:
    event = SyscallEvent(type=SyscallEventType.ENTER, id=1, arg5=5)
    assert decoder(SyscallEvent)(bytes(event)) == event


def test_the_client_needs_no_c_module() -> None:
    script = "import sys, ringside.client; print([name for name in sys.modules if name.endswith('._perf')])"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
