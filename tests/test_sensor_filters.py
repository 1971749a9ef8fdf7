"""The whole sensor on a fake kernel: filters and modifiers."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
from ringside.api.v0 import (
    EventFilter,
    FileEventFilter,
    FileEventType,
    LimitModifier,
    Modifier,
    ProcessEventFilter,
    ProcessEventType,
    Subscription,
    SyscallEventFilter,
    ThrottleModifier,
    ThrottleModifierIntervalType,
)
from ringside.sensor.engine import clock
from ringside.sensor.events.ladder import Ladder

from .support.fakekernel import FakeKernel, reading
from .support.fakering import HERE, NEWEST, OLDEST, now
from .support.whole import (
    ENTER,
    EXEC,
    EXIT,
    FIRST,
    FORK,
    LEAVE,
    SYS_ENTER,
    any_kernel,
    contexts,
    kernel,
    kinds,
    make,
)

# --- filters


async def test_exec_filters(kernel: FakeKernel) -> None:
    kind = ProcessEventType.EXEC
    name = ProcessEventFilter(type=kind, exec_filename="/bin/ls")
    pattern = ProcessEventFilter(type=kind, exec_filename_pattern="/usr/[a-m]*/ls")
    both = ProcessEventFilter(type=kind, exec_filename="/bin/ls", exec_filename_pattern="/bin/*")
    none = ProcessEventFilter(type=kind, exec_filename="/bin/ls", exec_filename_pattern="/usr/*")
    files = [b"/bin/ls", b"/bin/lsx", b"/usr/bin/ls", b"/usr/sbin/ls", b"ls"]
    async with kernel.sensor() as sensor:
        wanted: list[tuple[list[ProcessEventFilter], list[str]]] = [
            ([name], ["/bin/ls"]),
            ([pattern], ["/usr/bin/ls"]),
            ([name, pattern], ["/bin/ls", "/usr/bin/ls"]),
            ([both, name, both], ["/bin/ls"]),
            ([none], []),
            ([EXEC], [one.decode() for one in files]),
        ]
        readers = []
        async with contexts() as stack:
            for filters, _ in wanted:
                readers.append(await stack(reading(sensor, process_events=[*filters, EXIT])))
            for one in files:
                kernel.exec(50, one, b"x")
            kernel.exit(50, 0)
            for reader, (_, names) in zip(readers, wanted, strict=True):
                told = await reader.take(len(names) + 1)
                assert [one.process.exec_filename for one in told[:-1]] == names
                assert kinds(told[-1:]) == [("exit", 50)]


async def test_filters_that_overlap_give_an_event_once(any_kernel: FakeKernel) -> None:
    kernel = any_kernel
    filters = [
        EXEC,
        ProcessEventFilter(type=ProcessEventType.EXEC, exec_filename_pattern="*"),
        FORK,
        FORK,
        EXIT,
        EXIT,
    ]
    async with kernel.sensor() as sensor, reading(sensor, process_events=filters) as reader:
        for pid in range(FIRST, FIRST + 100):
            kernel.fork(50, pid)
            kernel.exec(pid, b"/bin/true", b"true")
            kernel.exit(pid, 0)
        told = await reader.take(300)
        assert kinds(told) == [
            (kind, who)
            for pid in range(FIRST, FIRST + 100)
            for kind, who in (("fork", 50), ("exec", pid), ("exit", pid))
        ]
        numbers = [one.sensor_sequence_number for one in told]
        assert numbers == sorted(set(numbers))


async def test_system_calls_by_number_and_result(kernel: FakeKernel) -> None:
    filters = [
        SyscallEventFilter(type=LEAVE, id=2, ret=-2),
        SyscallEventFilter(type=LEAVE, ret=7),
        SyscallEventFilter(type=ENTER, id=39),
    ]
    async with kernel.sensor() as sensor, reading(sensor, syscall_events=filters) as reader:
        kernel.enter(39, 1, 2, 3, 4, 5, 6)
        kernel.enter(40)
        for number in (2, 3):
            for ret in (-2, 7, 0):
                kernel.leave(number, ret)
        told = [one.syscall for one in await reader.take(4)]
        assert [(one.type, one.id, one.ret) for one in told] == [(1, 39, 0), (2, 2, -2), (2, 2, 7), (2, 3, 7)]
        assert [getattr(told[0], f"arg{n}") for n in range(6)] == [1, 2, 3, 4, 5, 6]


async def test_programs_of_another_architecture_have_other_numbers(kernel: FakeKernel) -> None:
    """Their calls are left out until they are replaced by a native program."""
    kernel.proc.add(70, 1, "old32", 5000, elf_class=1)
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader,
    ):
        kernel.enter(1, pid=70)
        kernel.enter(2, pid=50)
        kernel.exec(50, b"/bin/thirtytwo", b"x", abi=1)
        kernel.enter(3, pid=50)
        kernel.fork(50, 60)
        kernel.enter(4, pid=60)
        kernel.exec(50, b"/bin/native", b"x", abi=2)
        kernel.enter(5, pid=50)
        kernel.exec(70, b"/bin/native", b"x", abi=2)
        kernel.enter(6, pid=70)
        assert [one.syscall.id for one in await reader.take(3)] == [2, 5, 6]


async def test_what_programs_of_another_architecture_open(kernel: FakeKernel) -> None:
    """Asked for only while there is one, as others use the numbers for something else."""
    (kernel.proc.root / "sys/abi").mkdir()
    (kernel.proc.root / "sys/abi/vsyscall32").write_text("1\n")
    wanted = [FileEventFilter(type=FileEventType.OPEN, open_flags_mask=1)]
    with mock.patch.object(Ladder, "_prove"):  # no event of ours comes of this kernel by itself
        async with kernel.sensor(mechanism="memory") as sensor, reading(sensor, file_events=wanted) as reader:
            assert not kernel.open_perfs(SYS_ENTER)
            kernel.exec(50, b"/bin/thirtytwo", b"x", abi=1)
            sensor.drain_once()
            (text,) = {one.filter for one in kernel.open_perfs(SYS_ENTER)}
            assert [f"id == {number}" in (text or "") for number in (5, 8, 295, 437, 6)] == [True] * 4 + [
                False
            ]
            for pid in (50, 60):
                kernel.enter(5, 0x1000, 1, pid=pid)
                kernel.enter(5, 0x1000, 2, pid=pid)
                kernel.enter(8, 0x1000, 0o600, pid=pid)
            told = await reader.take(2)
            assert [(one.process_pid, one.file.open_flags) for one in told] == [(50, 1), (50, 0o1101)]
            assert told[1].file.open_mode == 0o600
            kernel.exec(50, b"/bin/native", b"x", abi=2)
            sensor.drain_once()
            for later, is_open in ((0, True), (10, True), (10**6, False)):  # s
                sensor.processes.look_for_foreign(now() + later * 10**9)
                assert bool(kernel.open_perfs(SYS_ENTER)) == is_open


@pytest.mark.parametrize("include", [False, True])
async def test_the_sensor_itself(kernel: FakeKernel, include: bool) -> None:
    kernel.proc.add(os.getpid(), 50, "ringside", 5000)
    async with kernel.sensor(include_self=include) as sensor:
        syscalls = [SyscallEventFilter(type=ENTER)]
        async with reading(sensor, syscall_events=syscalls, process_events=[FORK]) as reader:
            kernel.enter(1, pid=os.getpid(), tid=4000)
            kernel.fork(os.getpid(), 60)
            kernel.enter(2, pid=50)
            told = await reader.take(3 if include else 1)
            assert [one.process_pid for one in told] == ([os.getpid()] * 2 if include else []) + [50]
            (filter,) = {one.filter for one in kernel.open_perfs(SYS_ENTER)}
            assert (filter or "").count("common_pid != ") == (0 if include else 2)


# --- modifiers


async def test_a_limit_ends_the_stream(kernel: FakeKernel) -> None:
    subscription = Subscription(
        event_filter=EventFilter(syscall_events=[SyscallEventFilter(type=ENTER)], process_events=[FORK]),
        modifier=Modifier(limit=LimitModifier(limit=3)),
    )
    async with kernel.sensor() as sensor, reading(sensor, subscription) as reader:
        kernel.enter(1)
        kernel.fork(50, 60)
        for number in range(2, 1000):
            kernel.enter(number)
        told = await reader.rest()
        assert [one.syscall.id for one in told] == [1, 0, 2]
        assert isinstance(reader.ended, StopAsyncIteration)


async def test_a_throttle_lets_one_event_through_each_interval(kernel: FakeKernel) -> None:
    throttle = ThrottleModifier(interval=5, interval_type=ThrottleModifierIntervalType.MILLISECOND)
    subscription = Subscription(
        event_filter=EventFilter(syscall_events=[SyscallEventFilter(type=ENTER)]),
        modifier=Modifier(throttle=throttle),
    )
    async with kernel.sensor() as sensor, reading(sensor, subscription) as reader:
        base = now()
        for step in range(100):
            kernel.enter(step, when=base + step * 10**6)
        assert [one.syscall.id for one in await reader.take(20)] == list(range(0, 100, 5))


async def test_for_a_duration(kernel: FakeKernel) -> None:
    subscription = Subscription(
        event_filter=EventFilter(syscall_events=[SyscallEventFilter(type=ENTER)]), for_duration=200_000_000
    )
    async with kernel.sensor() as sensor:
        begin = clock()
        async with reading(sensor, subscription) as reader:
            kernel.enter(1)
            kernel.enter(2, when=begin + 10**10)
            assert [one.syscall.id for one in await reader.rest()] == [1]
            assert isinstance(reader.ended, StopAsyncIteration)
            assert 200_000_000 <= clock() - begin < 5 * 10**9
