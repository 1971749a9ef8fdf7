"""Requests as bytes: read strictly, refused by name; and of none of them anything is left in the sensor."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from ringside.api.v0 import Subscription, SyscallEventFilter, SyscallEventType
from ringside.sensor.errors import RequestError, UnservableError
from ringside.sensor.sensor import Sensor
from ringside.sensor.service import decode_request

from .support.fakekernel import PATIENCE, FakeKernel, reading
from .support.fakering import Response
from .support.requests import encoded, requests, subscriptions

ENTER = SyscallEventFilter(type=SyscallEventType.ENTER)


class Served:
    """A sensor on a fake kernel in a loop that lasts from example to example."""

    def __init__(self, runner: asyncio.Runner, kernel: FakeKernel, sensor: Sensor) -> None:
        self._runner = runner
        self.kernel = kernel
        self.sensor = sensor
        self.clean = self.there()

    def run(self, work: Any) -> Any:
        """What comes of it, in time."""

        async def bounded() -> Any:
            async with asyncio.timeout(PATIENCE):
                return await work

        return self._runner.run(bounded())

    def there(self) -> dict[str, Any]:
        """All that subscriptions make."""
        sensor, kernel = self.sensor, self.kernel
        engine = sensor.engine
        processes, containers = sensor.process_family, sensor.container_family
        return {
            "outputs": (
                dict(sensor.outputs),
                dict(sensor._shared),
                engine._outputs - len(engine._free_outputs),
            ),
            "perf events": sorted(fd for fd in kernel.perfs if kernel.is_open(fd)),
            "enabled": sorted(fd for fd, one in kernel.perfs.items() if one.enabled and kernel.is_open(fd)),
            "listeners": [*map(len, processes.listeners.values()), len(containers.listeners)],
            "container filters": len(containers._filters),
            "probes": len(sensor.probes._made),
            "tasks": sorted(task.get_name() for task in sensor._tasks),
        }

    async def settled(self) -> None:
        """Wait until nothing but what was there at the beginning is."""
        try:
            async with asyncio.timeout(PATIENCE):
                while self.there() != self.clean:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
        except TimeoutError:
            assert self.there() == self.clean


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    kernel = FakeKernel(tmp_path)
    kernel.proc.add(1, 0, "init", 1)
    with asyncio.Runner() as runner:
        manager = kernel.sensor(drain_interval=10**6)
        sensor = runner.run(manager.__aenter__())
        for family in sensor._all_families:
            ladder: Any = getattr(family, "ladder", None)
            if ladder is not None:  # no event of ours will come that could prove it
                ladder._reached = ladder._rungs[1]
        yield Served(runner, kernel, sensor)
        runner.run(manager.__aexit__(None, None, None))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=requests)
def test_any_request_is_served_or_refused_and_leaves_nothing(
    served: Served, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    caplog.clear()

    async def serve() -> None:
        try:
            async with served.sensor.subscribe(decode_request(data).subscription) as subscriber:
                first = Response.FromString(await anext(subscriber))
                assert first.statuses[0].code == 0
                assert not first.events
        except (RequestError, UnservableError):
            pass
        await served.settled()
        async with reading(served.sensor, syscall_events=[ENTER]) as reader:
            served.kernel.enter(39)
            assert (await reader.take(1))[0].syscall.id == 39
        await served.settled()

    served.run(serve())
    assert not [one for one in caplog.records if one.levelname in ("ERROR", "CRITICAL")]


@given(subscriptions())
def test_what_the_dataclasses_write_is_read_as_it_was(subscription: Subscription) -> None:
    assert decode_request(encoded(subscription)).subscription == subscription
