"""A gRPC client that only counts: `count.py ADDRESS WHAT...`; answers "count" on its standard input."""

from __future__ import annotations

import asyncio
import sys

import uvloop
from ringside.api.v0 import GetEventsResponse
from ringside.client import connect, error_infos
from ringside.sensor._perf import ffi, lib
from ringside.sensor.what import subscription

DATA_LOSS = 15


async def main(address: str, what: list[str]) -> None:
    """Subscribe, say "live", count."""
    events = lost = 0

    async def answer() -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while await reader.readline():
            print(events, lost, flush=True)

    task = asyncio.create_task(answer())
    async with connect(address) as sensor:
        async for message in sensor.responses(subscription(what)):
            found = lib.rs_count_events(ffi.from_buffer(message), len(message))
            if found:
                events += found
                continue
            for status in GetEventsResponse.parse(message).statuses:
                if status.code == 0:
                    print("live", flush=True)
                elif status.code == DATA_LOSS:
                    lost += sum(int(info.metadata.get("count", 0)) for info in error_infos(status))
    task.cancel()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2:]))
