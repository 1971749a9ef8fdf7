"""grpclib's server, with what it makes of unusual clients put right.

What grpclib 0.4 does, and should not:
- a deadline that is over on arrival is UNKNOWN and an error in the log;
- binary metadata that is no base64, which nobody here reads, is an error in the log and no answer at all;
- a call reset in the same breath as it was made is never forgotten, nor its share of the window freed;
- an empty DATA frame in a message is taken for its end;
- frames of types that are not known end the connection, though RFC 9113 (5.5) demands to ignore them;
- a call that its client has cancelled and that waits for a full transport to say goodbye waits on when the
  connection is gone, for good, and with it all that was to be sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpclib.server
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import decode_timeout, encode_grpc_message
from grpclib.protocol import H2Protocol
from h2.events import DataReceived, UnknownFrameReceived
from h2.exceptions import StreamClosedError

from .sending import prepare

if TYPE_CHECKING:
    from grpclib.protocol import Stream

log = logging.getLogger(__name__)

_READ = frozenset((":method", ":path", ":scheme", ":authority", "content-type", "te", "user-agent"))
_FOREVER = 10**9  # s
_OVER = Status.DEADLINE_EXCEEDED, "the call's deadline is over"


class Server(grpclib.server.Server):
    """Use like grpclib's. Handlers get no metadata."""

    def _protocol_factory(self) -> H2Protocol:
        self.__gc_step__()
        handler = _Calls(self._mapping, self._codec, self._status_details_codec, self.__dispatch__)
        self._handlers.add(handler)
        return _Protocol(handler, self._config, self._h2_config)


class _Calls(grpclib.server.Handler):
    """The calls of one connection."""

    def accept(
        self, stream: Stream, headers: list[tuple[str, str]], release_stream: Callable[[], Any]
    ) -> None:
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None
        is_released = False

        def release(*_: object) -> None:
            nonlocal is_released
            if not is_released:
                is_released = True
                if timer is not None:
                    timer.cancel()
                release_stream()

        stream.headers = headers
        try:
            timeout = min(
                (decode_timeout(value) for name, value in headers if name == "grpc-timeout"), default=None
            )
        except ValueError:
            refusal = Status.INVALID_ARGUMENT, "grpc-timeout: must be a number of up to 8 digits and its unit"
            self._tasks[stream] = loop.create_task(_refuse(stream, *refusal))
        else:
            if timeout == 0:
                self._tasks[stream] = loop.create_task(_refuse(stream, *_OVER))
            else:
                super().accept(stream, [one for one in headers if one[0] in _READ], release)
            if timeout:
                timer = loop.call_later(min(timeout, _FOREVER), _end, stream, GRPCError(*_OVER))
        self._tasks[stream].add_done_callback(release)  # not only of one that was cancelled before it began


async def _refuse(stream: Stream, status: Status, message: str) -> None:
    """A call's end without a beginning."""
    with suppress(StreamClosedError):
        await stream.send_headers(
            [
                (":status", "200"),
                ("content-type", "application/grpc+proto"),
                ("grpc-status", str(status.value)),
                ("grpc-message", encode_grpc_message(message)),
            ],
            end_stream=True,
        )
        if stream.closable:
            stream.reset_nowait()


def _end(stream: Stream, error: GRPCError) -> None:
    if stream.wrapper is not None:
        stream.wrapper.cancel(error)


class _Protocol(H2Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        prepare(transport)
        known: dict[type, Any] = dict(self.processor.processors)
        take = known[DataReceived]
        known[DataReceived] = lambda event: take(event) if event.flow_controlled_length else None
        known[UnknownFrameReceived] = lambda _: None
        self.processor.processors = known

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except Exception as error:  # noqa: BLE001 - whatever the bytes made h2 stumble over
            log.debug("no HTTP/2: %s", error)
            self.processor.close("Protocol error")

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self.connection.write_ready.set()
