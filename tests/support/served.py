"""A sensor on a fake kernel that serves over gRPC, and the proof that nothing is left of its clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ringside.sensor.sensor import Sensor
from ringside.sensor.server import Server
from ringside.sensor.service import BytesCodec, TelemetryService, _handlers

from .fakekernel import PATIENCE, FakeKernel

_T = TypeVar("_T")


class Served:
    """The sensor, and what it had when it was started."""

    def __init__(self, kernel: FakeKernel, sensor: Sensor, path: str) -> None:
        self.kernel = kernel
        self.sensor = sensor
        self.path = path
        self.runner: asyncio.Runner | None = None
        self.before = self.there()

    def there(self) -> dict[str, Any]:
        """All that subscriptions make."""
        sensor, kernel = self.sensor, self.kernel
        engine = sensor.engine
        processes, containers = sensor.process_family, sensor.container_family
        return {
            "outputs": sorted(sensor.outputs),
            "subscribers": sum(len(one.subscribers) for one in sensor.outputs.values()),
            "shared": len(sensor._shared),
            "numbers": engine._outputs - len(engine._free_outputs),
            "perf events": sorted(fd for fd in kernel.perfs if kernel.is_open(fd)),
            "enabled": sorted(fd for fd, one in kernel.perfs.items() if one.enabled and kernel.is_open(fd)),
            "listeners": [*map(len, processes.listeners.values()), len(containers.listeners)],
            "container filters": len(containers._filters),
            "probes": len(sensor.probes._made),
            "tasks": sorted(task.get_name() for task in sensor._tasks),
        }

    async def settled(self) -> None:
        """Wait until there is nothing but what there was before."""
        try:
            async with asyncio.timeout(PATIENCE):
                while self.there() != self.before:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
        except TimeoutError:
            assert self.there() == self.before

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What comes of it, in time. For a loop that lasts from one example to the next."""

        async def bounded() -> _T:
            async with asyncio.timeout(2 * PATIENCE):
                return await work

        assert self.runner is not None
        return self.runner.run(bounded())


@asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[Served]:
    """At `folder`/socket."""
    kernel = FakeKernel(folder)
    kernel.proc.add(1, 0, "init", 1)
    async with kernel.sensor(**{"drain_interval": 10**6, **settings}) as sensor:
        for family in sensor._all_families:
            ladder: Any = getattr(family, "ladder", None)
            if ladder is not None:  # no event of ours will come that could prove it
                ladder._reached = ladder._rungs[1]
        server = Server(_handlers(TelemetryService(sensor)), codec=BytesCodec())
        await server.start(path=str(folder / "socket"))
        try:
            yield Served(kernel, sensor, str(folder / "socket"))
        finally:
            async with asyncio.timeout(PATIENCE):  # all have hung up; that has yet to be noticed
                while not all(handler.closing for handler in server._handlers):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            server.close()
            await server.wait_closed()


@contextmanager
def serving_in_a_loop(folder: Path, **settings: Any) -> Iterator[Served]:
    """The same, in a loop of its own."""
    with asyncio.Runner() as runner:
        manager = serving(folder, **settings)
        served = runner.run(manager.__aenter__())
        served.runner = runner
        try:
            yield served
        finally:
            runner.run(manager.__aexit__(None, None, None))
