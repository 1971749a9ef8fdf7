"""Probes in the kernel live as long as their sensor, and no sensor disturbs another's."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ringside.api.v0 import KernelFunctionCallEventType, KernelFunctionCallFilter

from ..support.stream import LIBC, Told, is_missing, own_sensor, probes, watching

# a sensor with a probe of its own, that tells of each call it sees
OTHER = """
import asyncio
from ringside.api.v0 import EventFilter, KernelFunctionCallFilter, Subscription
from ringside.sensor.config import Config
from ringside.sensor.sensor import Sensor

async def main():
    fetch = {"fd": "$arg1:s32"}
    call = KernelFunctionCallFilter(type=1, symbol="__sys_listen", arguments=fetch, filter="fd > 900000")
    wanted = Subscription(event_filter=EventFilter(kernel_events=[call]))
    async with Sensor(Config(engine="none")) as sensor, sensor.subscribe(wanted) as subscriber:
        async for _ in subscriber:
            print(sensor.probes.group, flush=True)

asyncio.run(main())
"""


@contextmanager
def another() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another sensor, and the group of its probes."""
    with subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()
            process.stdout.close()


async def test_the_dead_are_swept_and_the_living_left_alone(record_property: Told) -> None:
    """After SIGKILL the next start removes what was left; a sensor beside it goes on undisturbed."""
    if is_missing("kprobe", record_property):
        return
    before = probes()
    mine = KernelFunctionCallFilter(
        type=KernelFunctionCallEventType.ENTER, symbol="__sys_listen", arguments={"fd": "$arg1:s32"}
    )
    with another() as (dead, dead_group), another() as (_, live_group):
        assert dead_group != live_group
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert dead_group in probes()
        assert live_group in probes()
    with another() as (alive, live_group):
        assert dead_group not in probes()
        async with own_sensor() as sensor, watching(sensor, kernel_events=[mine]) as stream:
            assert live_group in probes()
            assert sensor.probes.group in probes()
            LIBC.listen(987_654, 1)
            await stream.until(lambda event: event.kernel_call is not None)
            assert alive.stdout is not None
            assert alive.stdout.readline().strip() == live_group
        assert sensor.probes.group not in probes()
        assert live_group in probes()
        LIBC.listen(987_654, 1)
        assert alive.stdout.readline().strip() == live_group
    async with own_sensor():
        assert live_group not in probes()
    assert probes() == before


async def test_nothing_is_left(record_property: Told) -> None:
    """Neither after a subscription's end nor after the sensor's."""
    if is_missing("kprobe", record_property):
        return
    async with own_sensor():
        pass
    before = probes()
    async with own_sensor() as sensor:
        idle = probes()
        for symbol in ("__sys_listen", "__sys_bind"):
            call = KernelFunctionCallFilter(type=KernelFunctionCallEventType.ENTER, symbol=symbol)
            async with watching(sensor, kernel_events=[call]):
                assert probes() != idle
        async with watching(sensor, kernel_events=[call]) as stream:
            LIBC.bind(987_654, b"\1\0", 2)
            await stream.until(lambda event: event.kernel_call is not None)
    assert probes() == before
