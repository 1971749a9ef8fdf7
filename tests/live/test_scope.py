"""Events limited to containers in the kernel: none is missing, none comes twice, whatever comes and goes."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from ringside.api.v0 import (
    ContainerFilter,
    EventFilter,
    ProcessEventFilter,
    ProcessEventType,
    Subscription,
    SyscallEventFilter,
    SyscallEventType,
)
from ringside.client.syscalls import number_of
from ringside.sensor.config import Config
from ringside.sensor.sensor import Sensor

from tests.support.cgroups import container_cgroup
from tests.support.stream import PATIENCE, RESPONSE

CALL = number_of("getppid")
SOURCE = Path(__file__).parents[1] / "support" / "numbered.c"
TURNS = int(os.environ.get("RINGSIDE_SCOPE_TURNS", "4"))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program that makes numbered calls flat out."""
    program = tmp_path_factory.mktemp("load") / "numbered"
    subprocess.run(["gcc", "-O2", "-o", str(program), str(SOURCE)], check=True)
    return str(program)


class Load:
    """A process that makes numbered calls once it is told to, until it is told to stop."""

    def __init__(self, program: str, cgroup: Path | None = None, rest: int = 1, step: int = 1) -> None:
        self.step = step
        self.process = subprocess.Popen(
            ["sh", "-c", 'read -r _; exec "$0" "$@"', program, str(CALL), str(rest), str(step)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if cgroup is not None:
            self.move(cgroup)

    def move(self, cgroup: Path) -> None:
        """Into a cgroup."""
        (cgroup / "cgroup.procs").write_text(str(self.process.pid))

    def begin(self) -> None:
        """Make calls."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    async def end(self) -> int:
        """Stop; how many calls it made."""
        out, _ = await asyncio.to_thread(self.process.communicate)
        return int(out)


@contextmanager
def loads() -> Iterator[list[Load]]:
    """Those that are put in here have ended at the end."""
    made: list[Load] = []
    try:
        yield made
    finally:
        for load in made:
            with suppress(ProcessLookupError):
                load.process.kill()
            load.process.communicate()


class Calls:
    """The numbers of the calls that a subscriber was told of, by process; decoded when asked for."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor
        self.numbers: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.trouble: list[str] = []
        self.news = asyncio.Event()
        self._messages: list[bytes] = []

    async def read(self, subscriber: Any) -> None:
        async for message in subscriber:
            self._messages.append(message)
            self.news.set()

    async def _decode(self) -> None:
        messages, self._messages = self._messages, []
        for message in messages:
            response = RESPONSE.FromString(message)
            for one in response.events:
                if one.event.WhichOneof("event") == "syscall":
                    mark, number = divmod(one.event.syscall.arg0, 1 << 32)
                    if mark == 1:
                        self.numbers.setdefault(one.event.process_pid, []).append(number)
                else:
                    self.ended.add(one.event.process_pid)
            self.trouble += [status.message for status in response.statuses if status.code]
            await asyncio.sleep(0)  # the rings are read in this thread

    async def more_of(self, load: Load) -> None:
        """Wait for more of the process's calls than were decoded so far."""
        before = len(self.numbers.get(load.process.pid, []))
        async with asyncio.timeout(PATIENCE):
            while len(self.numbers.get(load.process.pid, [])) == before:
                await self.news.wait()
                self.news.clear()
                await self._decode()

    async def all_of(self, load: Load, count: int) -> None:
        """Wait until the process's end was told; then all its calls were, each once."""
        async with asyncio.timeout(PATIENCE):
            while load.process.pid not in self.ended:
                await self.news.wait()
                self.news.clear()
                await self._decode()
        assert self.trouble == []
        assert not any(event.lost() for event in self._sensor.rings.open_events)
        got = self.numbers.get(load.process.pid, [])
        if load.step:
            assert missing(got, count) == []
        assert len(got) == count
        assert got == [load.step * number for number in range(count)]


def missing(got: list[int], count: int) -> list[tuple[int, int]]:
    """The ranges of numbers that are not there, first and last of each."""
    there = [-1, *sorted(got), count]
    return [(one + 1, two - 1) for one, two in itertools.pairwise(there) if two > one + 1]


@asynccontextmanager
async def calls_in(sensor: Sensor, *cgroups: Path) -> AsyncIterator[Calls]:
    """A subscription to the calls and process ends in these containers; in none: to the whole system's."""
    wanted = Subscription(
        event_filter=EventFilter(
            syscall_events=[SyscallEventFilter(type=SyscallEventType.ENTER, id=CALL)],
            process_events=[ProcessEventFilter(type=ProcessEventType.EXIT)],
        ),
        container_filter=ContainerFilter(ids=[one.name for one in cgroups]) if cgroups else None,
    )
    calls = Calls(sensor)
    async with sensor.subscribe(wanted) as subscriber:
        task = asyncio.create_task(calls.read(subscriber))
        try:
            await calls.news.wait()
            yield calls
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def big_rings(**more: Any) -> Sensor:
    settings = {"scope": "cgroup", **more}
    return Sensor(Config(engine="none", ring_size=64 << 20, queue_size=1 << 30, **settings))


def is_limited(sensor: Sensor) -> bool:
    """Whether the kernel has been told to look at certain cgroups only."""
    events = [one for one in sensor.rings.open_events if one.name == "sys_enter"]
    return bool(events) and all(one.cgroups for one in events)


async def pause() -> None:
    """Some calls' time; nothing depends on how long it is."""
    await asyncio.sleep(0.02)


async def test_the_hosts_calls_are_not_even_made(numbered: str) -> None:
    with container_cgroup() as cgroup, loads() as started:
        # the last one keeps the container alive
        inside, host = Load(numbered, cgroup), Load(numbered)
        started += [inside, host, Load(numbered, cgroup)]
        async with big_rings() as sensor, calls_in(sensor, cgroup) as calls:
            assert is_limited(sensor)
            before = sensor.engine.counters()["unwanted"]
            inside.begin()
            host.begin()
            await pause()
            of_host, count = await host.end(), await inside.end()
            await calls.all_of(inside, count)
            assert of_host >= 10_000
            assert sensor.engine.counters()["unwanted"] == before
            assert is_limited(sensor)
        assert set(calls.numbers) == {inside.process.pid}


@pytest.mark.parametrize("step", [1, 0], ids=["numbered", "all alike"])
async def test_limited_by_itself_where_that_is_cheaper(numbered: str, step: int) -> None:
    with container_cgroup() as cgroup, loads() as started:
        inside, host = Load(numbered, cgroup, rest=10, step=step), Load(numbered, rest=0)
        started += [inside, host]
        async with big_rings(scope="auto") as sensor, calls_in(sensor, cgroup) as calls:
            inside.begin()
            await calls.more_of(inside)
            assert not is_limited(sensor), "little is made in vain"
            host.begin()
            async with asyncio.timeout(PATIENCE):
                while not is_limited(sensor):
                    await pause()
            await host.end()
            await pause()
            await calls.all_of(inside, await inside.end())


async def test_not_told_to(numbered: str) -> None:
    with container_cgroup() as cgroup, loads() as started:
        inside = Load(numbered, cgroup)
        started.append(inside)
        async with big_rings(scope="system") as sensor, calls_in(sensor, cgroup) as calls:
            assert not is_limited(sensor)
            inside.begin()
            await pause()
            await calls.all_of(inside, await inside.end())


@pytest.mark.parametrize("step", [1, 0], ids=["numbered", "all alike"])
async def test_others_come_and_go(numbered: str, step: int) -> None:
    """Containers and subscribers, each of which limits the kernel's event otherwise, or not at all."""
    with container_cgroup() as cgroup, loads() as started:
        inside = Load(numbered, cgroup, step=step)
        started.append(inside)
        async with big_rings() as sensor, calls_in(sensor, cgroup) as calls:
            inside.begin()
            for _ in range(TURNS):
                with container_cgroup() as other:
                    first = Load(numbered, other, step=step)
                    started.append(first)
                    async with calls_in(sensor, other) as others:
                        first.begin()
                        await pause()
                        async with calls_in(sensor):
                            assert not is_limited(sensor)
                            await pause()
                        async with calls_in(sensor, cgroup, other):
                            assert is_limited(sensor)
                            await pause()
                        await others.all_of(first, await first.end())
                        await pause()
                        assert not is_limited(sensor), "what `others` may get next is not in a known cgroup"
                assert is_limited(sensor)
            await calls.all_of(inside, await inside.end())


async def test_a_container_that_begins_again(numbered: str) -> None:
    """Its cgroup is another then, of the same name. The sensor has heard of the end of the first."""
    with loads() as started:
        async with big_rings() as sensor:
            with container_cgroup() as cgroup:
                first = Load(numbered, cgroup)
                started.append(first)
                async with calls_in(sensor, cgroup) as calls:
                    first.begin()
                    await pause()
                    await calls.all_of(first, await first.end())
                    for _ in range(TURNS):
                        cgroup.rmdir()
                        cgroup.mkdir()
                        again = Load(numbered, cgroup)
                        started.append(again)
                        again.begin()
                        async with asyncio.timeout(PATIENCE):  # while it runs, a second at most
                            while not is_limited(sensor):
                                await pause()
                        await pause()
                        await calls.all_of(again, await again.end())


async def test_a_container_that_is_yet_to_come(numbered: str) -> None:
    with loads() as started, container_cgroup() as cgroup:
        async with big_rings() as sensor, calls_in(sensor, cgroup) as calls:
            assert not is_limited(sensor)
            load = Load(numbered, cgroup)
            started.append(load)
            load.begin()
            async with asyncio.timeout(PATIENCE):
                while not is_limited(sensor):
                    await pause()
            await calls.all_of(load, await load.end())


async def test_a_process_that_wanders(numbered: str) -> None:
    """Inside the container it may go anywhere; the calls it makes outside are not the container's."""
    with container_cgroup() as cgroup, container_cgroup() as elsewhere, loads() as started:
        stays, wanders = Load(numbered, cgroup, rest=10), Load(numbered, rest=10)
        started += [stays, wanders]
        async with big_rings() as sensor, calls_in(sensor, cgroup) as calls:
            assert is_limited(sensor)
            stays.begin()
            below = cgroup / "below"
            below.mkdir()
            async with calls_in(sensor) as everything:
                wanders.begin()
                await everything.more_of(wanders)
            assert is_limited(sensor)
            for place in (cgroup, below, cgroup, below):
                wanders.move(place)
                stays.move(place)
                await calls.more_of(wanders)
            assert is_limited(sensor)
            wanders.move(elsewhere)
            async with calls_in(sensor) as everything:
                await everything.more_of(wanders)
            count = await wanders.end()
            await calls.all_of(stays, await stays.end())
            got = calls.numbers[wanders.process.pid]
            assert got == list(range(got[0], got[-1] + 1)), "a hole while it was inside"
            assert 0 < got[0] < got[-1] < count - 1


@pytest.mark.parametrize("wanted", [{"names": ["web*"]}, {"image_names": ["*"]}])
async def test_names_may_come_to_fit_others(numbered: str, wanted: dict[str, list[str]]) -> None:
    with container_cgroup() as cgroup, loads() as started:
        started.append(Load(numbered, cgroup))
        request = Subscription(
            event_filter=EventFilter(
                syscall_events=[SyscallEventFilter(type=SyscallEventType.ENTER, id=CALL)]
            ),
            container_filter=ContainerFilter(ids=[cgroup.name], **wanted),
        )
        async with big_rings() as sensor, sensor.subscribe(request):
            assert not is_limited(sensor)
