"""The gRPC service: TelemetryService, health, reflection, at unix sockets and TCP addresses.

Responses are bytes that the engine encoded, so the codec lets bytes pass; receiving.py decodes requests,
so that what can't be decoded is INVALID_ARGUMENT like any other request that makes no sense.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError
from grpclib.const import Cardinality, Handler
from grpclib.const import Status as GrpcStatus
from grpclib.encoding.proto import ProtoCodec
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from .config import Address, Config, parse_address
from .errors import RequestError, RingsideError, SetupError, UnservableError
from .receiving import decode_request, receive
from .sending import BatchSender
from .sensor import Sensor, SensorStopped
from .server import Server

if TYPE_CHECKING:
    from grpclib.server import Stream

log = logging.getLogger(__name__)

SERVICE = "capsule8.api.v0.TelemetryService"
_LONGEST_MESSAGE = 1024  # bytes; clients bound the headers that they take, some at 8 KB
_LAST_WORDS = 2.0  # s that clients get to take what still waits for them


class BytesCodec(ProtoCodec):
    """Protobuf messages as usual; where the type is bytes, bytes as they are."""

    def encode(self, message: Any, message_type: Any) -> bytes:
        """A message's wire form."""
        return message if message_type is bytes else super().encode(message, message_type)

    def decode(self, data: bytes, message_type: Any) -> Any:
        """A message from its wire form."""
        if message_type is bytes:
            return data
        try:
            return super().decode(data, message_type)
        except DecodeError as error:
            raise GRPCError(GrpcStatus.INVALID_ARGUMENT, str(error)) from error


def grpc_error(error: RingsideError) -> GRPCError:
    """The status that an error travels as."""
    said = str(error).encode("utf-8", "replace")
    if len(said) > _LONGEST_MESSAGE:
        said = said[: _LONGEST_MESSAGE - 4] + b" ..."
    message = said.decode("utf-8", "ignore")
    for kind, status in (
        (RequestError, GrpcStatus.INVALID_ARGUMENT),
        (SensorStopped, GrpcStatus.UNAVAILABLE),
        (UnservableError, GrpcStatus.FAILED_PRECONDITION),
        (SetupError, GrpcStatus.RESOURCE_EXHAUSTED),
    ):
        if isinstance(error, kind):
            return GRPCError(status, message)
    return GRPCError(GrpcStatus.INTERNAL, message)


class TelemetryService:
    """GetEvents: a stream of what the sensor sees."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor
        self._calls: set[asyncio.Task[Any]] = set()

    async def finish(self, patience: float) -> None:
        """Wait until every call has told its client how it ended, but not longer than so many seconds."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=patience)

    async def get_events(self, stream: Stream[bytes, bytes]) -> None:
        """Serve one subscription until its client, its modifiers or the sensor end it."""
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            request = decode_request(await receive(stream))
            async with self._sensor.subscribe(request.subscription) as subscriber:
                await stream.send_initial_metadata()
                sender = BatchSender(stream)
                subscriber.send_now = sender.send_now
                async for message in subscriber:
                    await sender.send(message)
        except RingsideError as error:
            raise grpc_error(error) from error
        except (StreamTerminatedError, ProtocolError, ConnectionError) as error:
            log.debug("a client went away: %s", error)

    def __mapping__(self) -> Mapping[str, Handler]:
        return {f"/{SERVICE}/GetEvents": Handler(self.get_events, Cardinality.UNARY_STREAM, bytes, bytes)}


def _handlers(service: TelemetryService) -> list[Any]:
    from grpclib.health.service import Health
    from grpclib.reflection.service import ServerReflection
    from ringside.api.descriptors import pool

    pool()
    handlers: list[Any] = [service, Health()]
    return ServerReflection.extend(handlers)


def bind(address: Address) -> socket.socket:
    """A listening socket. A stale unix socket is replaced; SetupError for a live one, or a port in use."""
    if not address.path:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((address.host, address.port))
            made.listen(128)
            return made
        except OSError as error:
            made.close()
            raise SetupError(
                f"can't listen at {address}: {error.strerror or error}", "choose another"
            ) from error
    path = Path(address.path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
    except OSError as error:
        raise SetupError(f"can't listen at {address}: {error.strerror}", "choose another path") from error
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        made.bind(address.path)
        made.listen(128)
        return made
    except OSError as error:
        made.close()
        raise SetupError(f"can't listen at {address}: {error.strerror}", "choose another path") from error
    finally:
        os.umask(mask)


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise SetupError(f"{path} is there and is no socket", "remove it, or listen elsewhere")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                with suppress(FileNotFoundError):
                    path.unlink()
                return
            raise
    raise SetupError(f"another sensor listens at unix:{path}", "stop it, or use another --listen")


def check_addresses(config: Config) -> list[Address]:
    """The addresses to listen at. SetupError for plain TCP beyond this machine without --insecure."""
    addresses = [parse_address(one) for one in config.listen]
    for address in addresses:
        if not address.is_local and not config.insecure:
            raise SetupError(
                f"plain TCP at {address} would show this machine's every system call to the network",
                "listen at a unix socket or at loopback, or say --insecure if something else protects it",
            )
    return addresses


async def serve(
    config: Config,
    *,
    started: Callable[[list[str]], object] = list,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT (or `stop` is set), then end all streams and leave nothing behind.

    `started` gets the addresses, with the port that was chosen for port 0.
    """
    stop = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(ValueError, NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    addresses = check_addresses(config)
    async with AsyncExitStack() as stack:
        sockets = []
        for address in addresses:
            made = bind(address)
            sockets.append((address, made))
            stack.callback(_unbind, address, made)
        sensor = await stack.enter_async_context(Sensor(config))
        if config.metrics:
            stack.callback(sensor.metrics.serve(parse_address(config.metrics, "metrics")))
        service = TelemetryService(sensor)
        servers = []
        names = []
        for address, made in sockets:
            server = Server(_handlers(service), codec=BytesCodec())
            await server.start(sock=made)
            servers.append(server)
            names.append(
                str(address if address.path else Address(host=address.host, port=made.getsockname()[1]))
            )
        started(names)
        await stop.wait()
        await sensor.stop_streams()
        await service.finish(_LAST_WORDS)
        for server in servers:
            server.close()
        for server in servers:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(server.wait_closed(), 5)


def _unbind(address: Address, made: socket.socket) -> None:
    made.close()
    if address.path:
        with suppress(FileNotFoundError):
            os.unlink(address.path)
