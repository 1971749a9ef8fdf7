"""The whole sensor on a fake kernel: what is lost, and what goes on all the same."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from ringside.api.v0 import (
    SyscallEventFilter,
)

from .support.fakekernel import FakeKernel, loss, reading
from .support.fakering import HERE, NEWEST, OLDEST, now, sample
from .support.whole import (
    ALL,
    ENTER,
    EXIT,
    FIRST,
    FORK,
    LEAVE,
    SYS_ENTER,
    any_kernel,
    kernel,
    kinds,
    lineage,
    make,
    process_id,
    until,
)

# --- losses


async def test_lost_records_are_told_to_those_who_miss_them(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader,
        reading(sensor, syscall_events=[SyscallEventFilter(type=LEAVE)]) as other,
        reading(sensor, process_events=[FORK]) as forks,
    ):
        kernel.enter(1)
        kernel.lose(SYS_ENTER, 17)
        kernel.enter(2)
        kernel.leave(3, 0)
        kernel.fork(50, 60)
        assert [one.syscall.id for one in await reader.take(2)] == [1, 2]
        told = await reader.status()
        assert told.message == "17 events lost at most: sys_enter: a ring was full"
        assert loss(told) == (17, "sys_enter: a ring was full")
        await other.take(1)
        await forks.take(1)
        assert not other.statuses
        assert not forks.statuses


async def test_losses_with_nothing_behind_them_are_told_soon(kernel: FakeKernel) -> None:
    """The last of a burst: no record comes that could say so."""
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader,
    ):
        for one in kernel.open_perfs(SYS_ENTER):
            one.lost = 5
        assert loss(await reader.status())[0] == 10


async def test_what_a_replaced_perf_event_lost_is_told_once(kernel: FakeKernel) -> None:
    """Between the change of a filter and the next drain, when the old one is closed, too."""
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER, id=1)]) as reader,
    ):
        for one in kernel.open_perfs(SYS_ENTER):
            one.lost = 5
        assert loss(await reader.status())[0] == 10
        (event,) = (one for one in sensor.rings.open_events if one.name == "sys_enter")
        event.open("id == 1 || id == 2")
        assert event.lost() == 0
        sensor.drain_once()
        assert event.lost() == 0
        kernel.open_perfs(SYS_ENTER)[0].lost = 3
        assert loss(await reader.status())[0] == 3


@pytest.mark.parametrize("event", ["task/task_newtask", "sched/sched_process_exec"])
async def test_after_lost_process_records_the_table_is_read_anew(any_kernel: FakeKernel, event: str) -> None:
    kernel = any_kernel
    kernel.proc.add(60, 50, "goes", 5500)
    kernel.proc.add(70, 50, "stays", 5500)
    async with kernel.sensor() as sensor, reading(sensor, process_events=ALL) as reader:
        kernel.proc.remove(60)
        kernel.proc.add(70, 50, "renamed", 5500, threads=2)
        kernel.proc.add(75, 95, "child first", 6000)
        kernel.proc.add(95, 50, "then parent", 5900)
        kernel.proc.add(50, 1, "shell", 5000)
        kernel.lose(event, 3)
        count, _ = loss(await reader.status())
        assert count == 3
        kernel.fork(75, 100)
        kernel.fork(70, 101)
        kernel.fork(60, 102)
        child, renamed, gone = await reader.take(3)
        assert lineage(child) == [(75, "child first"), (95, "then parent"), (50, "shell"), (1, "init")]
        assert child.process_id == process_id(75, 6000)
        assert lineage(renamed)[0] == (70, "renamed")
        assert gone.process_pid == 60
        kernel.exit(70, 0, tid=71, last=False)
        kernel.exit(70, 0, tid=70, last=True)
        assert kinds(await reader.take(1)) == [("exit", 70)]


async def test_a_ring_that_holds_no_records_is_told(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader,
    ):
        ring = kernel.rings[kernel.open_perfs(SYS_ENTER)[0].ring]
        ring.put(ring.head, b"\xff" * 64)
        ring.head += 64
        count, cause = loss(await reader.status())
        assert (count, "no valid record" in cause) == (1, True)
        kernel.enter(3)
        assert (await reader.take(1))[0].syscall.id == 3


async def test_a_record_that_cannot_be_handled_does_not_end_the_rest(
    kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    async with kernel.sensor() as sensor, reading(sensor, process_events=[FORK]) as reader:
        (event, _) = kernel.open_perfs("task/task_newtask")
        kernel.rings[event.ring].write(sample(event.id, now(), bytes(4), 50))
        kernel.fork(50, 60)
        with caplog.at_level(logging.CRITICAL, "ringside"):
            assert kinds(await reader.take(1)) == [("fork", 50)]


async def test_a_flood_of_process_records_leaves_time_for_others(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor(lifecycle_ring_size=8 << 20) as sensor,
        reading(sensor, process_events=[FORK]) as reader,
    ):
        for pid in range(FIRST, FIRST + 60_000):
            kernel.fork(50, pid)
        turns = 0
        while sensor.processes.find(FIRST + 59_999) is None:
            turns += 1
            await asyncio.sleep(0)
        assert turns > 1
        told = [one.process.fork_child_pid for one in await reader.take(60_000)]
        assert told == list(range(FIRST, FIRST + 60_000))


async def test_the_dead_are_forgotten_after_a_while(kernel: FakeKernel) -> None:
    async with kernel.sensor() as sensor, reading(sensor, process_events=[EXIT]) as reader:
        before = len(sensor.processes)
        long_ago = now() - 3 * 10**9
        for pid in range(FIRST, FIRST + 1000):
            when = long_ago if pid < FIRST + 500 else None
            kernel.fork(50, pid, when=when)
            kernel.exit(pid, 0, when=when)
        await reader.take(1000)
        await until(lambda: len(sensor.processes) == before + 500)
        assert sensor.processes.find(FIRST) is None
        assert sensor.processes.find(FIRST + 500) is not None
