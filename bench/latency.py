"""From the kernel's timestamp to the client, at 10,000 events a second: median and 99th percentile."""

from __future__ import annotations

import argparse
import asyncio
import time

import uvloop
from common import LOAD_CPU, Arrivals, load_program, machine, pinned, sensor
from ringside.client import connect, events, syscalls


async def measure(seconds: float, rate: float) -> None:
    """Subscribe, run the load, take the time of each event's arrival."""
    late: list[int] = []
    with sensor() as (_, address):
        async with connect(address) as telemetry:
            command = pinned(LOAD_CPU, load_program(), "syscalls", str(seconds), str(rate))
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
            stream = telemetry.events(events(syscalls("getppid")))
            done = asyncio.create_task(process.wait())
            arrivals = Arrivals(aiter(stream))
            while not done.done():
                event = await arrivals.get(0.5)
                if event is not None and event.event is not None and event.event.process_pid == process.pid:
                    late.append(
                        time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - event.event.sensor_monotime_nanos
                    )
            await arrivals.close()
            await stream.aclose()
    late.sort()
    print(f"# {machine()}")
    print(
        f"{len(late):,} events: median {late[len(late) // 2] / 1e6:.1f} ms, "
        f"99th percentile {late[len(late) * 99 // 100] / 1e6:.1f} ms, worst {late[-1] / 1e6:.1f} ms"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rate", type=float, default=10000)
    options = parser.parse_args()
    uvloop.run(measure(options.seconds, options.rate))
