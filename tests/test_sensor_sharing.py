"""The whole sensor on a fake kernel: subscribers who share kernel events, and come and go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import pytest
from ringside.api.v0 import (
    FileEventFilter,
    FileEventType,
    SyscallEventFilter,
)
from ringside.sensor import perf, subscription
from ringside.sensor.engine import clock
from ringside.sensor.errors import UnservableError
from ringside.sensor.events import ladder

from .support.fakekernel import FakeKernel, reading
from .support.whole import ENTER, LEAVE, SYS_ENTER, SYS_EXIT, contexts, kernel, make, settled, until

# --- subscribers share


async def test_subscribers_share_one_kernel_event(kernel: FakeKernel) -> None:
    """However many, and whatever numbers they ask for: one perf event on each CPU."""
    async with kernel.sensor() as sensor:
        readers = []
        entered = contexts()
        async with entered as stack:
            for number in [*range(100, 200), *[150] * 20]:
                filters = [SyscallEventFilter(type=ENTER, id=number)]
                readers.append((number, await stack(reading(sensor, syscall_events=filters))))
            await settled(kernel, SYS_ENTER, 2)
            (filter,) = {one.filter for one in kernel.open_perfs(SYS_ENTER)}
            assert filter is not None
            assert all(f"id == {number}" in filter for number in range(100, 200))
            for number in range(99, 201):
                kernel.enter(number, number)
            for number, reader in readers:
                (told,) = await reader.take(1)
                assert (told.syscall.id, told.syscall.arg0) == (number, number)
            counted = sensor.engine.counters()
            assert (counted["events"], counted["delivered"], counted["unwanted"]) == (100, 100, 2)
            for _ in range(100):
                await entered.leave_first()
            await settled(kernel, SYS_ENTER, 2)
            (filter,) = {one.filter for one in kernel.open_perfs(SYS_ENTER)}
            assert filter is not None
            assert filter.count("id == ") == 1
        await settled(kernel, SYS_ENTER, 0)


async def test_too_many_numbers_for_a_filter(kernel: FakeKernel) -> None:
    """Then the kernel passes all but the sensor's own, and C decides alone."""
    filters = [SyscallEventFilter(type=ENTER, id=number) for number in range(1000)]
    async with kernel.sensor() as sensor, reading(sensor, syscall_events=filters) as reader:
        (filter,) = {one.filter for one in kernel.open_perfs(SYS_ENTER)}
        assert filter is not None
        assert "id ==" not in filter
        for number in (999, 1000, 5):
            kernel.enter(number)
        assert [one.syscall.id for one in await reader.take(2)] == [999, 5]


async def test_nothing_is_missed_or_doubled_while_others_come_and_go(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER, id=1)]) as reader,
    ):
        sent = 0
        for number in range(2, 60):
            kernel.enter(1, sent, when=clock())
            sent += 1
            async with reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER, id=number)]):
                kernel.enter(1, sent, when=clock())
                sent += 1
                kernel.enter(1, sent, when=clock())
                sent += 1
        assert [one.syscall.arg0 for one in await reader.take(sent)] == list(range(sent))
        await settled(kernel, SYS_ENTER, 2)


async def test_a_perf_event_is_closed_when_its_records_were_read(kernel: FakeKernel) -> None:
    async with kernel.sensor() as sensor:
        async with reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]):
            (first, _) = kernel.open_perfs(SYS_ENTER)
            descriptor = next(fd for fd, one in kernel.perfs.items() if one is first)
        before = clock()
        assert not first.enabled
        sensor.rings.settle(before - 10**9, wait=True)
        assert kernel.is_open(descriptor)
        sensor.rings.settle(before + 10**9, wait=True)
        assert not kernel.is_open(descriptor)


async def test_the_others_go_on_while_the_kernel_takes_its_time_to_close(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_close = threading.Event()
    closed = perf._close_all

    def slowly(descriptors: Iterable[int]) -> None:
        assert may_close.wait(60)
        closed(descriptors)

    monkeypatch.setattr(perf, "_close_all", slowly)
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader,
    ):
        async with reading(sensor, syscall_events=[SyscallEventFilter(type=LEAVE)]):
            (first, _) = kernel.open_perfs(SYS_EXIT)
            descriptor = next(fd for fd, one in kernel.perfs.items() if one is first)
        done: list[bool] = []
        sensor.rings.later(lambda: done.append(kernel.is_open(descriptor)))
        for number in range(50):
            kernel.enter(1, number, pid=10)
            assert [one.syscall.arg0 for one in await reader.take(1)] == [number]
        assert kernel.is_open(descriptor)
        assert not done
        may_close.set()
        await until(lambda: bool(done))
        assert done == [False]


async def test_what_does_not_work_is_not_tried_again_for_each_request(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "_PATIENCE", 10**7)
    async with kernel.sensor() as sensor:
        tried = []
        for _ in range(3):
            with pytest.raises(UnservableError, match=r"no way works here: .*: "):
                async with reading(sensor, file_events=[FileEventFilter(type=FileEventType.OPEN)]):
                    pass
            tried.append(len(kernel.perfs))
        assert tried[0] == tried[1] == tried[2]
        monkeypatch.setattr(ladder, "clock", lambda: clock() + 11 * 10**9)
        with pytest.raises(UnservableError):
            async with reading(sensor, file_events=[FileEventFilter(type=FileEventType.OPEN)]):
                pass
        assert len(kernel.perfs) > tried[0]


async def test_the_rings_are_read_less_often_while_they_are_empty(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor(drain_interval=10_000_000) as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader,
    ):
        quiet = [sensor._interval() for _ in range(10)]
        assert quiet == sorted(quiet)
        assert quiet[-1] == 25_000_000
        when = kernel.enter(1, pid=10)
        await until(lambda: clock() > when + 10**6)
        sensor.drain_once()
        assert sensor._quiet <= 1.5
        await reader.take(1)


async def test_a_filter_that_the_kernel_refuses_fails_that_subscription_only(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER, id=1)]) as reader,
    ):
        kernel.refuse_filters = True
        with pytest.raises(UnservableError, match="refuses the filter"):
            async with reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER, id=2)]):
                pass
        kernel.refuse_filters = False
        kernel.enter(1)
        assert (await reader.take(1))[0].syscall.id == 1
        assert len(kernel.open_perfs(SYS_ENTER)) == 2
        async with reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER, id=2)]) as other:
            kernel.enter(2)
            assert (await other.take(1))[0].syscall.id == 2


async def test_a_new_subscriber_gets_nothing_from_before(kernel: FakeKernel) -> None:
    filters = [SyscallEventFilter(type=ENTER, id=1)]
    async with kernel.sensor() as sensor, reading(sensor, syscall_events=filters) as first:
        kernel.enter(1, 1)
        await first.take(1)
        async with reading(sensor, syscall_events=filters) as second:
            kernel.enter(1, 2)
            assert (await second.take(1))[0].syscall.arg0 == 2
            assert (await first.take(1))[0].syscall.arg0 == 2


async def test_others_come_and_go_while_a_large_request_is_checked(kernel: FakeKernel) -> None:
    """It lets them between any two of its filters, and gets what it asked for."""
    large = [SyscallEventFilter(type=ENTER, id=number) for number in range(100, 1100)]
    small = [SyscallEventFilter(type=ENTER, id=99)]
    with mock.patch.object(subscription, "_SLICE", -1):
        async with kernel.sensor() as sensor:
            manager = reading(sensor, syscall_events=large)
            entering = asyncio.ensure_future(manager.__aenter__())
            for _ in range(3):
                async with reading(sensor, syscall_events=small):
                    assert not entering.done()
            reader = await entering
            kernel.enter(1099, 1)
            (told,) = await reader.take(1)
            assert told.syscall.id == 1099
            await manager.__aexit__(None, None, None)
