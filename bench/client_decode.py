"""How fast the Python client is: `python bench/client_decode.py [--seconds N]`.

First the decoder alone, then the whole client reading from another process over a unix socket.
The event is a system call's in a container, as large as they come without a lineage.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from typing import TYPE_CHECKING, Any

import uvloop
from grpclib.const import Cardinality, Handler
from grpclib.exceptions import StreamTerminatedError
from grpclib.server import Server
from ringside.api import Status
from ringside.api.v0 import (
    Event,
    GetEventsRequest,
    GetEventsResponse,
    Subscription,
    SyscallEvent,
    SyscallEventType,
    TelemetryEvent,
)
from ringside.client import connect, decode_response
from ringside.sensor.service import BytesCodec

if TYPE_CHECKING:
    from collections.abc import Mapping

BATCH = 64 << 10


def response(container: bool) -> tuple[bytes, int]:
    """A response as large as the sensor's, and how many events are in it."""
    event = TelemetryEvent(
        publish_time_micros=1_700_000_000_000_000,
        event=Event(
            id="5c1f29d37a60-18446744",
            process_id="8f14e45fceea167a5a36dedd4bea2543",
            process_pid=123_456,
            process_tid=123_457,
            cpu=1,
            sensor_id="5c1f29d37a60",
            sensor_sequence_number=18_446_744,
            sensor_monotime_nanos=86_400_000_000_000,
            container_id="254dd98a7bf1581560ddace9f98b7933" * 2 if container else "",
            container_name="/web-frontend" if container else "",
            image_id="d462265d362c919b7dd37f8ba80caa82" * 2 if container else "",
            image_name="registry.example/shop/web:1.2.3" if container else "",
            syscall=SyscallEvent(type=SyscallEventType.ENTER, id=110, arg0=3, arg1=0x7FFC_1234_5678),
        ),
    )
    count = BATCH // (len(bytes(event)) + 3)
    return bytes(GetEventsResponse(events=[event] * count)), count


def decoding(data: bytes, seconds: float) -> float:
    """Events decoded a second of CPU time."""
    done, start = 0, time.process_time()
    while (spent := time.process_time() - start) < seconds:
        for _ in decode_response(data).events:
            done += 1
    return done / spent


class Firehose:
    """Sends the same response as fast as it is taken."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def get_events(self, stream: Any) -> None:
        await stream.recv_message()
        try:
            await stream.send_message(bytes(GetEventsResponse(statuses=[Status()])))
            while True:
                await stream.send_message(self.data)
        except (StreamTerminatedError, ConnectionError):
            pass

    def __mapping__(self) -> Mapping[str, Handler]:
        path = "/capsule8.api.v0.TelemetryService/GetEvents"
        return {path: Handler(self.get_events, Cardinality.UNARY_STREAM, GetEventsRequest, bytes)}


def serve(path: str, data: bytes, ready: Any) -> None:
    """The other process."""

    async def main() -> None:
        server = Server([Firehose(data)], codec=BytesCodec())
        await server.start(path=path)
        ready.set()
        await server.wait_closed()

    uvloop.run(main())


async def receiving(path: str, seconds: float) -> tuple[float, float]:
    """Events received a second, and the CPU seconds that one took."""
    async with connect(f"unix:{path}") as sensor, sensor.events(Subscription()) as events:
        done, start, cpu = 0, time.perf_counter(), time.process_time()
        async for _ in events:
            done += 1
            if not done % 1000 and time.perf_counter() - start > seconds:
                break
        return done / (time.perf_counter() - start), (time.process_time() - cpu) / done


def main() -> None:
    """Print a line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    seconds = parser.parse_args().seconds
    context = multiprocessing.get_context("spawn")
    for kind, container in (("plain", False), ("container", True)):
        data, count = response(container)
        size = f"{kind:<9} {len(data) / count:4.0f} bytes"
        print(f"decode {size}  {decoding(data, seconds):9,.0f} events/s of CPU")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "sensor.sock")
            ready = context.Event()
            process = context.Process(target=serve, args=(path, data, ready), daemon=True)
            process.start()
            try:
                ready.wait(10)
                rate, cost = uvloop.run(receiving(path, seconds))
            finally:
                process.terminate()
                process.join()
        print(f"stream {size}  {rate:9,.0f} events/s, {cost * 1e6:.2f} us of CPU each")


if __name__ == "__main__":
    main()
