"""A thousand fork + exec + exit a second: how many arrive, with command lines, and what it costs."""

from __future__ import annotations

import argparse
import asyncio
import time

import uvloop
from common import LOAD_CPU, Arrivals, cpu_time, load_program, machine, pinned, sensor
from ringside.client import connect, events, processes

ARGUMENTS = ["/bin/true", "an argument", "", "another"]


async def measure(seconds: float, rate: float) -> None:
    """Run the load, check each event."""
    with sensor() as (pid, address):
        async with connect(address) as telemetry:
            forked = right = wrong = exited = 0
            stream = telemetry.events(events(processes()))
            arrivals = Arrivals(aiter(stream))
            marker = await asyncio.create_subprocess_exec("/bin/true")  # its event: the stream is live
            await marker.wait()
            await arrivals.get(5)
            used = cpu_time(pid)
            start = time.monotonic()
            command = pinned(LOAD_CPU, load_program(), "execs", str(seconds), str(rate))
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            assert process.stdout is not None
            result = asyncio.create_task(process.stdout.read())
            ours: set[int] = set()
            issued = None
            deadline = start + seconds + 10
            while (issued is None or exited < issued) and time.monotonic() < deadline:
                event = await arrivals.get(1)
                if result.done() and issued is None:
                    issued = int(result.result().split()[0])
                    used = cpu_time(pid) - used
                    elapsed = time.monotonic() - start
                if event is None or event.event is None or event.event.process is None:
                    continue
                body = event.event.process
                if event.event.process_pid == process.pid and body.fork_child_pid:
                    forked += 1
                    ours.add(body.fork_child_pid)
                elif event.event.process_pid in ours:
                    if body.exec_filename == "/bin/true":
                        right += body.exec_command_line == ARGUMENTS
                        wrong += body.exec_command_line != ARGUMENTS
                    elif body.type == 3:
                        exited += 1
            await process.wait()
            await arrivals.close()
            await stream.aclose()
    print(f"# {machine()}")
    print(
        f"issued {issued:,} in {elapsed:.1f} s: forks {forked:,}, execs {right + wrong:,}, exits {exited:,}"
    )
    print(f"command lines right: {right:,}, wrong or missing: {wrong:,}")
    print(f"sensor's CPU: {used / elapsed:.1%} of a core, {used / max(1, issued or 1) * 1e6:.0f} µs each")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rate", type=float, default=1000)
    options = parser.parse_args()
    uvloop.run(measure(options.seconds, options.rate))
