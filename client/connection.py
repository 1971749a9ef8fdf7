"""The async client: a connection to a sensor, and streams of its events.

    async with connect("unix:/run/ringside/sensor.sock") as sensor:
        async for event in sensor.events(subscription):
            ...

gRPC by grpclib; what it leaves to its defaults and does not suit large batches is set here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from grpclib.client import Channel
from grpclib.client import Stream as CallStream
from grpclib.config import Configuration
from grpclib.const import Cardinality, Status
from grpclib.encoding.base import CodecBase, StatusDetailsCodecBase
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.protocol import H2Protocol
from h2.exceptions import H2Error
from h2.settings import SettingCodes
from ringside.api import ErrorInfo
from ringside.api import Status as StatusMessage
from ringside.api.descriptors import message_class
from ringside.api.v0 import GetEventsRequest, Subscription, TelemetryEvent
from ringside.sensor.config import DEFAULT_SOCKET, parse_address

from .decode import converter
from .errors import Unreachable, call_error

if TYPE_CHECKING:
    import ssl
    from asyncio import BaseTransport
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from types import TracebackType
    from typing import Self

METHOD = "/capsule8.api.v0.TelemetryService/GetEvents"
MAX_FRAME = 1 << 20  # a batch of events in one HTTP/2 frame: with the default of 16 KiB it takes many
# A stream that is not read holds back its own window's worth of the connection's: that has to
# have room for many of them, or one would stop all.
WINDOWS = Configuration(http2_stream_window_size=4 << 20, http2_connection_window_size=(1 << 31) - 1)
KEPT_STATUSES = 100
LONGEST_PAUSE = 5.0  # seconds between two attempts to reconnect


class _BytesCodec(CodecBase):
    """Messages are encoded and decoded by us; gRPC carries bytes."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, _type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, _type: Any) -> bytes:
        return data


class _DetailsCodec(StatusDetailsCodecBase):
    """The details of a call's final status: a google.rpc.Status in a header."""

    def encode(self, status: Status, message: str | None, details: Any) -> bytes:
        return bytes(StatusMessage(code=status.value, message=message or "", details=details))

    def decode(self, _status: Status, _message: str | None, data: bytes) -> list[ErrorInfo]:
        return error_infos(StatusMessage.parse(data))


class _Protocol(H2Protocol):
    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        http2 = self.connection._connection
        http2.update_settings({SettingCodes.MAX_FRAME_SIZE: MAX_FRAME})
        # At once, not with the acknowledgement: h2 looks at it once per read, and the first large
        # frame may come in the same read as the acknowledgement.
        http2.max_inbound_frame_size = MAX_FRAME
        self.connection.flush()


class _Channel(Channel):
    def _protocol_factory(self) -> H2Protocol:
        made = super()._protocol_factory()
        made.__class__ = _Protocol
        return made


def error_infos(status: StatusMessage) -> list[ErrorInfo]:
    """What a status says about its cause: `reason`, and `metadata` with figures and names."""
    return [
        ErrorInfo.parse(detail.value)
        for detail in status.details
        if detail.type_url.endswith("/google.rpc.ErrorInfo")
    ]


@cache
def _response_parser() -> Callable[[bytes], Any]:
    parser: Any = message_class("capsule8.api.v0.GetEventsResponse")
    return parser.FromString  # type: ignore[no-any-return]


def _parse_response(data: bytes) -> Any:
    try:
        return _response_parser()(data)
    except Exception as error:  # protobuf's DecodeError has no other base
        raise call_error(Status.INTERNAL, f"the response can't be decoded: {error}") from error


def connect(address: str = DEFAULT_SOCKET, *, tls: ssl.SSLContext | bool = False) -> Sensor:
    """A connection to the sensor at unix:PATH or HOST:PORT, to be used in `async with`.

    RequestError if that is no address; Unreachable, at `async with`, if no sensor is there.
    """
    return Sensor(address, tls=tls)


class Sensor:
    """A connection to a sensor. Any number of streams can share it."""

    def __init__(self, address: str = DEFAULT_SOCKET, *, tls: ssl.SSLContext | bool = False) -> None:
        self.address = address
        self._parsed = parse_address(address, "address")
        self._tls = tls
        self._channel: Channel | None = None

    async def __aenter__(self) -> Self:
        where = self._parsed
        target: dict[str, Any] = (
            {"path": where.path} if where.path else {"host": where.host, "port": where.port}
        )
        channel = _Channel(
            **target,
            ssl=self._tls or None,
            codec=_BytesCodec(),
            status_details_codec=_DetailsCodec(),
            config=WINDOWS,
        )
        try:
            await channel.__connect__()
        except BaseException as error:
            channel.close()
            if isinstance(error, OSError):
                raise Unreachable(f"no sensor at {self.address}: {error.strerror or error}") from error
            raise
        self._channel = channel
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; its streams end with Unreachable. Does nothing the second time."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def events(
        self,
        subscription: Subscription,
        *,
        on_status: Callable[[StatusMessage], None] | None = None,
        reconnect: bool = False,
    ) -> Events:
        """The events of a subscription, to be iterated; see Events.

        With `reconnect`, a lost connection is told to `on_status` as UNAVAILABLE and the same
        subscription is made again as soon as a sensor answers; what happened meanwhile is missed.
        """
        return Events(self, subscription, on_status, reconnect)

    async def responses(self, subscription: Subscription) -> AsyncGenerator[bytes, None]:
        """The encoded GetEventsResponse messages of a subscription, for those who decode themselves."""
        call = await self._call(subscription)
        try:
            while (data := await call.receive()) is not None:
                yield data
        finally:
            await call.aclose()

    async def _call(self, subscription: Subscription) -> _Call:
        if self._channel is None:
            raise Unreachable(f"not connected to {self.address}: use `async with connect(...)`")
        return await _Call.begin(
            self._channel, self.address, bytes(GetEventsRequest(subscription=subscription))
        )


class Events:
    """The events of one subscription: an async iterator of TelemetryEvent.

        async for event in sensor.events(subscription): ...

    Or, to know that nothing that happens from here on is missed:

        async with sensor.events(subscription) as events:  # the subscription is live
            async for event in events: ...

    Leaving the loop, the block, or being cancelled ends the subscription. Ends by itself when the
    subscription's limit or duration is reached. Raises Unreachable and CallError.

    What the sensor says beside the events, such as that some were lost, is passed to `on_status`
    and kept in `statuses` (the last 100); `lost` counts the events that it reported lost.
    """

    def __init__(
        self,
        sensor: Sensor,
        subscription: Subscription,
        on_status: Callable[[StatusMessage], None] | None = None,
        reconnect: bool = False,
    ) -> None:
        self.statuses: deque[StatusMessage] = deque(maxlen=KEPT_STATUSES)
        self.lost = 0
        self._sensor = sensor
        self._subscription = subscription
        self._on_status = on_status
        self._reconnect = reconnect
        self._call: _Call | None = None
        self._pending: Any = None  # the first response, if it was awaited before the iteration
        self._iterator = self._generate()

    def __aiter__(self) -> AsyncIterator[TelemetryEvent]:
        return self._iterator

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the subscription. Does nothing the second time."""
        await self._iterator.aclose()
        await self._end()

    async def _generate(self) -> AsyncGenerator[TelemetryEvent, None]:
        convert = converter(TelemetryEvent)
        try:
            while True:
                try:
                    if self._call is None:
                        await self._begin()
                    while (response := await self._next()) is not None:
                        for event in response.events:
                            yield convert(event)
                    return
                except Unreachable as error:
                    if not self._reconnect:
                        raise
                    await self._end()
                    self._note(StatusMessage(code=error.status.value, message=error.message))
                    await self._begin_again()
        finally:
            await self._end()

    async def _begin(self) -> None:
        """Start the call and wait for the response that says that the subscription is live."""
        self._call = await self._sensor._call(self._subscription)
        self._pending = await self._next()

    async def _begin_again(self) -> None:
        pause = 0.1
        while True:
            await asyncio.sleep(pause)
            try:
                await self._begin()
                return
            except Unreachable:
                await self._end()
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _next(self) -> Any:
        """protobuf's message of the next response, its statuses noted; None at the end of the stream."""
        if self._pending is not None:
            response, self._pending = self._pending, None
            return response
        if self._call is None or (data := await self._call.receive()) is None:
            return None
        response = _parse_response(data)
        for status in response.statuses:
            self._note(converter(StatusMessage)(status))
        return response

    async def _end(self) -> None:
        call, self._call, self._pending = self._call, None, None
        if call is not None:
            await call.aclose()

    def _note(self, status: StatusMessage) -> None:
        self.statuses.append(status)
        for info in error_infos(status):
            if info.reason == "EVENTS_LOST":
                self.lost += int(info.metadata.get("count", 0))
        if self._on_status is not None:
            self._on_status(status)


class _Call:
    """One GetEvents call: its encoded responses, and one kind of error for all that can go wrong."""

    def __init__(self, call: CallStream[bytes, bytes], address: str) -> None:
        self._call = call
        self._address = address
        self._open = True

    @classmethod
    async def begin(cls, channel: Channel, address: str, request: bytes) -> Self:
        """Send the request."""
        call = channel.request(METHOD, Cardinality.UNARY_STREAM, bytes, bytes)
        made = cls(call, address)
        await call.__aenter__()
        try:
            await call.send_message(request, end=True)
        except BaseException as error:
            await made.fail(error)
            raise
        return made

    async def receive(self) -> bytes | None:
        """The next response; None when the sensor has ended the stream in peace."""
        try:
            data = await self._call.recv_message()
            if data is None:
                await self._call.recv_trailing_metadata()
                await self.aclose()
            return data
        except BaseException as error:
            await self.fail(error)
            raise

    async def fail(self, error: BaseException) -> None:
        """Give the call up and raise what a user of the client is to see."""
        try:
            # grpclib finds out here whether the sensor had sent a status before the stream broke off
            await self.aclose(error)
        except GRPCError as better:
            error = better
        if isinstance(error, GRPCError):
            details = error.details if isinstance(error.details, list) else []
            raise call_error(error.status, error.message or "", details) from error
        if isinstance(error, (StreamTerminatedError, ProtocolError, OSError)):
            raise Unreachable(f"lost the sensor at {self._address}: {error}") from error
        raise error

    async def aclose(self, error: BaseException | None = None) -> None:
        """Tell the sensor that no more is wanted, if it has not ended the stream itself."""
        if not self._open:
            return
        self._open = False
        if self._call.trailing_metadata is None and error is None:
            with suppress(ProtocolError, StreamTerminatedError, H2Error):
                await self._call.cancel()
        with suppress(StreamTerminatedError):
            await self._call.__aexit__(type(error) if error else None, error, None)
