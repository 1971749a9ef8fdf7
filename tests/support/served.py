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

    def __init__(self, sensor: Sensor, path: str, kernel: FakeKernel | None = None) -> None:
        self._kernel = kernel
        self.sensor = sensor
        self.path = path
        self.runner: asyncio.Runner | None = None
        self.before = self.there()

    @property
    def kernel(self) -> FakeKernel:
        """The fake one."""
        assert self._kernel is not None
        return self._kernel

    def there(self) -> dict[str, Any]:
        """All that subscriptions make."""
        sensor = self.sensor
        engine = sensor.engine
        processes, containers = sensor.process_family, sensor.container_family
        return {
            "outputs": sorted(sensor.outputs),
            "subscribers": sum(len(one.subscribers) for one in sensor.outputs.values()),
            "shared": len(sensor._shared),
            "numbers": engine._outputs - len(engine._free_outputs),
            "events": sorted(one.name for one in sensor.rings.open_events),
            "perf events": self._perf_events(),
            "listeners": [*(len(one._wants) for one in processes.events.values()), len(containers.listeners)],
            "container filters": len(containers._filters),
            "probes": len(sensor.probes._made),
            "tasks": sorted(task.get_name() for task in sensor._tasks),
        }

    def _perf_events(self) -> list[tuple[int, bool]]:
        kernel = self._kernel
        if kernel is None:
            return []
        return sorted((fd, one.enabled) for fd, one in kernel.perfs.items() if kernel.is_open(fd))

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
    """A sensor on a fake kernel, at `folder`/socket."""
    kernel = FakeKernel(folder)
    kernel.proc.add(1, 0, "init", 1)
    async with kernel.sensor(**{"drain_interval": 10**6, **settings}) as sensor:
        for family in sensor._all_families:
            ladder: Any = getattr(family, "ladder", None)
            if ladder is not None:  # no event of ours will come that could prove it
                ladder._reached = ladder._rungs[1]
        async with listening(sensor, folder / "socket"):
            yield Served(sensor, str(folder / "socket"), kernel)


@asynccontextmanager
async def listening(sensor: Sensor, path: Path) -> AsyncIterator[None]:
    """A server. Clients must hang up before this ends."""
    server = Server(_handlers(TelemetryService(sensor)), codec=BytesCodec())
    await server.start(path=str(path))
    try:
        yield
    finally:
        async with asyncio.timeout(PATIENCE):  # that they did has yet to be noticed
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
