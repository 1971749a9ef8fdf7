"""The whole sensor on a fake kernel: the processes of old and new kernels, attribution, sharing, losses."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ringside.api.v0 import (
    ContainerFilter,
    EventFilter,
    FileEventFilter,
    FileEventType,
    LimitModifier,
    Modifier,
    ProcessEventFilter,
    ProcessEventType,
    Subscription,
    SyscallEventFilter,
    SyscallEventType,
    ThrottleModifier,
    ThrottleModifierIntervalType,
    TickerEventFilter,
)
from ringside.sensor import perf, process
from ringside.sensor._perf import lib
from ringside.sensor.engine import clock
from ringside.sensor.errors import KernelError, SetupError, UnservableError
from ringside.sensor.events import ladder
from ringside.sensor.events import process as process_events
from ringside.sensor.events.ladder import Ladder
from ringside.sensor.process import ProcessTable
from ringside.sensor.sensor import Sensor

from .support.fakekernel import BOOT_ID, FakeKernel, Reader, loss, reading
from .support.fakering import HERE, NEWEST, OLDEST, now, sample

FORK, EXEC, EXIT = (ProcessEventFilter(type=kind) for kind in list(ProcessEventType)[1:])
ALL = [FORK, EXEC, EXIT]
FIRST = 1 << 22  # of many pids: above all that there are, as this process's own events are left out
ENTER, LEAVE = SyscallEventType.ENTER, SyscallEventType.EXIT
SYS_ENTER, SYS_EXIT = "raw_syscalls/sys_enter", "raw_syscalls/sys_exit"


def make(folder: Path, version: str = HERE) -> FakeKernel:
    """A kernel with init and a shell."""
    made = FakeKernel(folder, version)
    made.proc.add(1, 0, "init", 1)
    made.proc.add(50, 1, "shell", 5000)
    return made


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return make(tmp_path)


@pytest.fixture(params=[HERE, OLDEST, NEWEST])
def any_kernel(request: pytest.FixtureRequest, tmp_path: Path) -> FakeKernel:
    """Kernels that tell the last thread's exit, and one that does not."""
    return make(tmp_path, request.param)


@pytest.fixture
def old_kernel(tmp_path: Path) -> FakeKernel:
    """Threads have to be counted."""
    return make(tmp_path, OLDEST)


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds that nothing tells of."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def process_id(pid: int, start: int) -> str:
    return f"{BOOT_ID[:8]}-{pid:x}-{start:x}"


def lineage(event: Any) -> list[tuple[int, str]]:
    return [(one.pid, one.command) for one in event.process_lineage]


def kinds(events: list[Any]) -> list[tuple[str, int]]:
    """What happened to whom."""
    names = {1: "fork", 2: "exec", 3: "exit"}
    return [(names[one.process.type], one.process_pid) for one in events]


# --- a process's life


async def test_fork_exec_and_exit_are_told_in_full(any_kernel: FakeKernel) -> None:
    kernel = any_kernel
    async with kernel.sensor() as sensor, reading(sensor, process_events=ALL) as reader:
        times = [
            kernel.fork(50, 60, b"shell", cpu=1),
            kernel.exec(60, b"/bin/true", b"true", b"--quite", b"", b"gr\xfc\xdf", "\u00e4".encode()),
            kernel.exit(60, 3 << 8),
        ]
        fork, exec, exit = await reader.take(3)
    start = kernel.start_of(times[0])
    child = process_id(60, start)
    assert fork.process_id == process_id(50, 5000)
    assert (fork.process_pid, fork.process_tid, fork.cpu) == (50, 50, 1)
    assert (fork.process.fork_child_pid, fork.process.fork_child_id) == (60, child)
    assert lineage(fork) == [(50, "shell"), (1, "init")]
    assert (exec.process_id, exec.process_pid, exec.cpu) == (child, 60, 0)
    assert exec.process.exec_filename == "/bin/true"
    assert list(exec.process.exec_command_line) == ["true", "--quite", "", "gr\ufffd\ufffd", "\u00e4"]
    assert lineage(exec) == lineage(exit) == [(60, "true"), (50, "shell"), (1, "init")]
    assert exit.process_id == child
    assert (exit.process.exit_code, exit.process.exit_status, exit.process.exit_signal) == (768, 3, 0)
    assert not exit.process.exit_core_dumped
    assert [one.sensor_monotime_nanos for one in (fork, exec, exit)] == times
    assert [one.sensor_sequence_number for one in (fork, exec, exit)] == [1, 2, 3]
    assert len({one.id for one in (fork, exec, exit)}) == 3


async def test_threads_are_no_processes(any_kernel: FakeKernel) -> None:
    kernel = any_kernel
    async with kernel.sensor() as sensor, reading(sensor, process_events=ALL) as reader:
        kernel.fork(50, 60)
        for tid in (61, 62, 63):
            kernel.fork(60, tid, thread=True)
        kernel.exit(60, 0, tid=62, last=False)
        kernel.exit(60, 0, tid=60, last=False)
        kernel.exit(60, 0, tid=63, last=False)
        kernel.exit(60, 5 << 8, tid=61, last=True)
        kernel.fork(50, 70)
        told = await reader.take(3)
    assert kinds(told) == [("fork", 50), ("exit", 60), ("fork", 50)]
    assert (told[1].process_tid, told[1].process.exit_status) == (61, 5)


async def test_a_program_begun_by_another_thread_than_the_first(any_kernel: FakeKernel) -> None:
    """The others die, the first too; the caller takes over its id (de_thread() in fs/exec.c)."""
    kernel = any_kernel
    async with kernel.sensor() as sensor, reading(sensor, process_events=ALL) as reader:
        kernel.fork(50, 60)
        for tid in (61, 62):
            kernel.fork(60, tid, thread=True)
        kernel.exit(60, 0, tid=61, last=False)
        kernel.exit(60, 0, tid=60, last=False)
        kernel.exec(60, b"/bin/other", b"other")
        kernel.fork(60, 65, thread=True)
        kernel.exit(60, 0, tid=65, last=False)
        kernel.exit(60, 1 << 8)
        told = await reader.take(3)
    assert kinds(told) == [("fork", 50), ("exec", 60), ("exit", 60)]
    assert told[1].process_id == told[2].process_id == told[0].process.fork_child_id


async def test_where_the_kernel_refuses_the_filter_threads_are_still_no_processes(kernel: FakeKernel) -> None:
    kernel.refuse_filters = True
    async with kernel.sensor() as sensor, reading(sensor, process_events=ALL) as reader:
        kernel.fork(50, 61, thread=True)
        kernel.exit(50, 0, tid=61, last=False)
        kernel.exit(50, 0)
        assert kinds(await reader.take(1)) == [("exit", 50)]


async def test_filters_leave_threads_to_the_kernel(kernel: FakeKernel) -> None:
    async with kernel.sensor():
        assert {one.filter for one in kernel.open_perfs("sched/sched_process_exit")} == {"group_dead == 1"}
        assert {one.filter for one in kernel.open_perfs("task/task_newtask")} == {"!(clone_flags & 65536)"}


async def test_threads_that_were_there_before_are_counted(old_kernel: FakeKernel) -> None:
    kernel = old_kernel
    kernel.proc.add(80, 50, "server", 6000, threads=3)
    async with kernel.sensor() as sensor, reading(sensor, process_events=[EXIT]) as reader:
        kernel.exit(80, 0, tid=81, last=False)
        kernel.fork(80, 90, thread=True)
        kernel.exit(80, 0, tid=82, last=False)
        kernel.exit(80, 0, tid=90, last=False)
        kernel.exit(50, 0)
        kernel.exit(80, 2 << 8)
        told = await reader.take(2)
    assert kinds(told) == [("exit", 50), ("exit", 80)]


async def test_a_leader_that_is_gone_does_not_count(old_kernel: FakeKernel) -> None:
    """It shows as a zombie, among the number of threads, until the last of them is gone."""
    kernel = old_kernel
    kernel.proc.add(80, 50, "server", 6000, threads=3, state="Z")
    kernel.proc.add(85, 50, "zombie", 6000, threads=1, state="Z")
    async with kernel.sensor() as sensor, reading(sensor, process_events=[EXIT]) as reader:
        kernel.exit(80, 0, tid=81, last=False)
        kernel.exit(80, 0, tid=82, last=True)
        kernel.exit(50, 0)
        told = await reader.take(2)
    assert kinds(told) == [("exit", 80), ("exit", 50)]


# --- who was there before


def during_scan(happens: Callable[[], None]) -> Any:
    """Patch: something happens after the tracepoints are open and before /proc is read."""
    scan = ProcessTable.scan

    def wrapped(table: ProcessTable) -> None:
        happens()
        scan(table)

    return mock.patch.object(ProcessTable, "scan", wrapped)


async def test_no_gap_between_the_scan_and_the_records(any_kernel: FakeKernel) -> None:
    """Forks, threads and exits from just before the scan count once."""
    kernel = any_kernel
    starts = {}

    def happens() -> None:
        when = kernel.fork(50, 60, b"both")  # a record, and in /proc
        starts[60] = kernel.start_of(when)
        kernel.fork(60, 61, thread=True)
        kernel.proc.add(60, 50, "both", starts[60], threads=2)
        when = kernel.fork(50, 70, b"gone")  # was over when /proc was read
        starts[70] = kernel.start_of(when)
        kernel.exec(70, b"/bin/gone", b"gone")
        kernel.exit(70, 0)
        now()

    with during_scan(happens):
        async with kernel.sensor() as sensor, reading(sensor, process_events=ALL) as reader:
            kernel.fork(60, 65, b"both")
            kernel.exit(60, 0, tid=61, last=False)
            kernel.exit(60, 0)
            kernel.fork(70, 75, b"late")
            told = await reader.take(3)
    assert kinds(told) == [("fork", 60), ("exit", 60), ("fork", 70)]
    assert told[0].process_id == told[1].process_id == process_id(60, starts[60])
    assert lineage(told[0]) == [(60, "both"), (50, "shell"), (1, "init")]
    assert told[2].process_id == process_id(70, starts[70])
    assert lineage(told[2]) == [(70, "gone"), (50, "shell"), (1, "init")]


async def test_a_process_has_one_id_however_it_became_known(any_kernel: FakeKernel) -> None:
    kernel = any_kernel
    async with kernel.sensor() as sensor, reading(sensor, process_events=[FORK]) as reader:
        when = kernel.fork(50, 60)
        (told,) = await reader.take(1)
        kernel.proc.add(60, 50, "child", kernel.start_of(when))
        child = told.process.fork_child_id
        async with kernel.sensor() as second, reading(second, process_events=[FORK]) as other:
            kernel.fork(60, 61)
            (seen,) = await other.take(1)
    assert seen.process_id == child


async def test_a_fork_near_the_next_tick_of_the_clock_has_its_id_from_proc(kernel: FakeKernel) -> None:
    """The start time is taken a moment before the record's."""
    tick = 10**9 // os.sysconf("SC_CLK_TCK")
    async with kernel.sensor() as sensor, reading(sensor, process_events=[FORK]) as reader:
        offset = sensor.processes._boot_offset
        when = (now() + offset) // tick * tick + tick - offset + 50_000
        assert kernel.start_of(when) == kernel.start_of(when - 100_000) + 1
        kernel.proc.add(60, 50, "child", kernel.start_of(when) - 1)
        kernel.fork(50, 60, when=when)
        (told,) = await reader.take(1)
        assert told.process.fork_child_id == process_id(60, kernel.start_of(when) - 1)


async def test_somebody_whose_fork_was_missed_is_learned_from_proc(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor() as sensor,
        reading(sensor, process_events=[EXEC], syscall_events=[SyscallEventFilter(type=ENTER)]) as reader,
    ):
        kernel.proc.add(90, 80, "late", 7000)
        kernel.proc.add(80, 50, "later", 6900)
        kernel.enter(39, pid=90)
        kernel.exec(80, b"/bin/new", b"new")
        kernel.enter(40, pid=4000)
        call, exec, nobody = await reader.take(3)
    assert call.process_id == process_id(90, 7000)
    assert lineage(exec) == [(80, "new"), (50, "shell"), (1, "init")]
    assert (nobody.process_id, nobody.process_pid, nobody.syscall.id) == ("", 4000, 40)


async def test_an_id_used_again_is_somebody_else(any_kernel: FakeKernel) -> None:
    kernel = any_kernel
    async with kernel.sensor() as sensor, reading(sensor, process_events=[FORK]) as reader:
        begin = now()
        kernel.fork(50, 60, b"old", when=begin)
        kernel.exit(60, 0, when=begin + 1000)
        kernel.fork(50, 60, b"new", when=begin + 50_000_000)
        kernel.fork(60, 61, when=begin + 50_000_001)
        old, new, by_new = await reader.take(3)
    assert old.process.fork_child_id != new.process.fork_child_id == by_new.process_id
    assert lineage(by_new)[0] == (60, "new")


# --- names


async def test_names_in_lineages_are_those_of_now(any_kernel: FakeKernel) -> None:
    kernel = any_kernel
    async with kernel.sensor() as sensor, reading(sensor, process_events=[FORK]) as reader:
        kernel.fork(50, 60, b"shell")
        kernel.fork(60, 70, b"shell")
        kernel.rename(60, b"middle")
        kernel.rename(60, b"a thread", tid=61)
        kernel.fork(70, 80)
        kernel.rename(50, b"renamed")
        kernel.fork(70, 81)
        told = [lineage(one) for one in await reader.take(4)]
    assert told[1] == [(60, "shell"), (50, "shell"), (1, "init")]
    assert told[2] == [(70, "shell"), (60, "middle"), (50, "shell"), (1, "init")]
    assert told[3] == [(70, "shell"), (60, "middle"), (50, "renamed"), (1, "init")]


async def test_ancestors_that_are_gone_are_remembered(kernel: FakeKernel) -> None:
    async with kernel.sensor() as sensor, reading(sensor, process_events=[FORK]) as reader:
        kernel.fork(50, 60, b"middle")
        kernel.fork(60, 70, b"leaf")
        kernel.exit(60, 0)
        kernel.fork(70, 80)
        told = await reader.take(3)
    assert lineage(told[2]) == [(70, "leaf"), (60, "middle"), (50, "shell"), (1, "init")]


async def test_generations_that_die_do_not_pile_up(kernel: FakeKernel) -> None:
    """A daemon that replaces itself by its child again and again."""
    async with kernel.sensor() as sensor, reading(sensor, process_events=[FORK]) as reader:
        for pid in range(FIRST, FIRST + 400):
            kernel.fork(pid - 1 if pid > FIRST else 50, pid)
            if pid > FIRST:
                kernel.exit(pid - 1, 0)
        told = await reader.take(400)
    assert max(len(one.process_lineage) for one in told) < 100
    assert all(one.process_lineage[-1].pid == 1 for one in told)


async def test_processes_nested_without_end(kernel: FakeKernel) -> None:
    """Anybody can make a lineage deeper than Python can recurse; events stay of reasonable size."""
    async with kernel.sensor(lineage="all", lifecycle_ring_size=2 << 20) as sensor:
        syscalls = [SyscallEventFilter(type=ENTER)]
        async with reading(sensor, process_events=[FORK], syscall_events=syscalls) as reader:
            for pid in range(FIRST, FIRST + 2500):
                kernel.fork(pid - 1 if pid > FIRST else 50, pid)
            kernel.enter(39, pid=FIRST + 2499)
            told = await reader.take(2501)
    assert max(one.ByteSize() for one in told) < 32 << 10
    assert max(len(one.process_lineage) for one in told) > 900
    assert all(one.process_lineage[-1].pid == 1 for one in told)
    assert [one.process_lineage[0].pid for one in told[1:]] == list(range(FIRST, FIRST + 2500))


async def test_lineage_in_every_event_if_asked_for(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor(lineage="all") as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader,
    ):
        kernel.enter(1, pid=50)
        kernel.exec(50, b"/bin/new", b"new")
        kernel.enter(2, pid=50)
        before, after = await reader.take(2)
    assert lineage(before) == [(50, "shell"), (1, "init")]
    assert lineage(after) == [(50, "new"), (1, "init")]


async def test_lineage_only_in_process_events_otherwise(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader,
    ):
        kernel.enter(1, pid=50)
        (told,) = await reader.take(1)
    assert not told.process_lineage
    assert told.process_id == process_id(50, 5000)


# --- exits and their status


@pytest.mark.parametrize(
    ("code", "status", "signal", "core"),
    [(0, 0, 0, False), (255 << 8, 255, 0, False), (9, 0, 9, False), (0x80 | 11, 0, 11, True)],
)
async def test_what_the_status_says(
    kernel: FakeKernel, code: int, status: int, signal: int, core: bool
) -> None:
    async with kernel.sensor() as sensor, reading(sensor, process_events=[EXIT]) as reader:
        kernel.exit(50, code)
        (told,) = await reader.take(1)
    exit = told.process
    assert (exit.exit_code, exit.exit_status, exit.exit_signal, exit.exit_core_dumped) == (
        code,
        status,
        signal,
        core,
    )


async def test_an_exit_waits_for_its_status_and_others_behind_it(any_kernel: FakeKernel) -> None:
    kernel = any_kernel
    async with (
        kernel.sensor() as sensor,
        reading(sensor, process_events=[FORK, EXIT]) as reader,
        patched(process_events, "_PENDING", 60 * 10**9),
    ):
        kernel.exit(50, None)
        kernel.fork(1, 60)
        reads = kernel.exits.reads
        await until(lambda: kernel.exits.reads >= reads + 3)
        assert not reader.subscriber.waiting
        kernel.exits.codes[50] = 7 << 8
        told = await reader.take(2)
    assert kinds(told) == [("exit", 50), ("fork", 1)]
    assert told[0].process.exit_status == 7


async def test_a_status_that_never_comes_is_left_out(any_kernel: FakeKernel) -> None:
    kernel = any_kernel
    seven = ProcessEventFilter(type=ProcessEventType.EXIT, exit_code=0)
    async with (
        kernel.sensor() as sensor,
        reading(sensor, process_events=[EXIT]) as reader,
        reading(sensor, process_events=[seven]) as picky,
    ):
        kernel.exit(50, None)
        kernel.exit(1, 0)
        told = await reader.take(2)
        assert kinds(told) == [("exit", 50), ("exit", 1)]
        assert kinds(await picky.take(1)) == [("exit", 1)]
        assert told[0].process.ListFields()[0][0].name == "type"
        assert len(told[0].process.ListFields()) == 1


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
                sensor.processes.forget_dead(now() + later * 10**9)
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


# --- subscribers share


@asynccontextmanager
async def patched(where: object, name: str, value: object) -> AsyncIterator[None]:
    with mock.patch.object(where, name, value):
        yield


class contexts:  # noqa: N801
    """Several context managers, left in reverse order."""

    def __init__(self) -> None:
        self._entered: list[Any] = []

    async def __aenter__(self) -> Callable[[Any], Any]:
        return self.enter

    async def enter(self, manager: Any) -> Any:
        made = await manager.__aenter__()
        self._entered.append(manager)
        return made

    async def leave_first(self) -> None:
        await self._entered.pop(0).__aexit__(None, None, None)

    async def __aexit__(self, *exc: object) -> None:
        while self._entered:
            await self._entered.pop().__aexit__(*exc)


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


async def settled(kernel: FakeKernel, event: str, count: int) -> None:
    """Wait until so many perf events are open on a kernel event, and none is waiting to be closed."""
    number = kernel.formats[event].id

    def is_so() -> bool:
        there = [one for fd, one in kernel.perfs.items() if one.tracepoint == number and kernel.is_open(fd)]
        return len(there) == count == sum(one.enabled for one in there)

    await until(is_so)


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
        assert quiet[-1] == 0.025
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
        kernel.sensor(lifecycle_ring_size=2 << 20) as sensor,
        reading(sensor, process_events=[FORK]) as reader,
    ):
        for pid in range(FIRST, FIRST + 8000):
            kernel.fork(50, pid)
        turns = 0
        while sensor.processes.by_pid.keys().isdisjoint([FIRST + 7999]):
            turns += 1
            await asyncio.sleep(0)
        assert turns > 5
        told = [one.process.fork_child_pid for one in await reader.take(8000)]
        assert told == list(range(FIRST, FIRST + 8000))


async def test_the_dead_are_forgotten_after_a_while(kernel: FakeKernel) -> None:
    async with kernel.sensor() as sensor, reading(sensor, process_events=[EXIT]) as reader:
        before = len(sensor.processes.by_pid)
        for pid in range(FIRST, FIRST + 500):
            kernel.fork(50, pid)
            kernel.exit(pid, 0)
        await reader.take(500)
        assert len(sensor.processes.by_pid) == before + 500
        with mock.patch.object(process, "_GRACE", 0):
            await until(lambda: len(sensor.processes.by_pid) == before)
        assert lib.rs_process_count(sensor.engine.handle) == before


# --- CPUs that come and go


async def test_cpus_are_followed(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)], process_events=ALL) as reader,
    ):
        kernel.cpus.append(7)
        sensor._cpus_changed()
        kernel.enter(1, cpu=7)
        kernel.fork(50, 60, cpu=7)
        kernel.exec(60, b"/bin/true", b"true", cpu=7)
        assert [one.cpu for one in await reader.take(3)] == [7, 7, 7]
        kernel.enter(2, cpu=1)
        kernel.cpus.remove(1)
        sensor._cpus_changed()
        kernel.enter(3, cpu=1)
        kernel.enter(4, cpu=0)
        assert [one.syscall.id for one in await reader.take(2)] == [2, 4]
        await until(lambda: not any(kernel.is_open(fd) for fd, one in kernel.perfs.items() if one.cpu == 1))
        kernel.cpus.append(1)
        sensor._cpus_changed()
        kernel.enter(5, cpu=1)
        assert [one.syscall.id for one in await reader.take(1)] == [5]
        assert len(kernel.open_perfs(SYS_ENTER)) == 3


# --- events limited to containers in the kernel


def only(*ids: str) -> Subscription:
    """The system calls in these containers."""
    return Subscription(
        event_filter=EventFilter(syscall_events=[SyscallEventFilter(type=ENTER)]),
        container_filter=ContainerFilter(ids=list(ids)),
    )


def places(kernel: FakeKernel) -> list[tuple[int, str]]:
    """On which CPUs and in which cgroups system calls are looked at; "" is everywhere."""
    return sorted((one.cpu, one.cgroup) for one in kernel.open_perfs(SYS_ENTER))


async def test_limited_events_follow_the_cpus(kernel: FakeKernel) -> None:
    kernel.proc.add(60, 50)
    cgroup = str(kernel.container("a" * 64, 60))
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 12)) as reader:
        await until(lambda: places(kernel) == [(0, cgroup), (1, cgroup)])
        kernel.cpus[:] = [0, 7]
        sensor._cpus_changed()
        await until(lambda: places(kernel) == [(0, cgroup), (7, cgroup)])
        kernel.enter(1, pid=50, cpu=7)
        kernel.enter(2, pid=60, cpu=7)
        assert [one.syscall.id for one in await reader.take(1)] == [2]
        assert sensor.engine.counters()["unwanted"] == 0


async def test_limited_while_all_who_want_the_event_are(kernel: FakeKernel) -> None:
    kernel.proc.add(60, 50)
    kernel.proc.add(70, 50)
    first, second = str(kernel.container("a" * 64, 60)), str(kernel.container("b" * 64, 70))
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 64)) as reader:
        async with reading(sensor, only("a" * 64, "b" * 64)):
            await until(lambda: places(kernel) == [(0, first), (0, second), (1, first), (1, second)])
            async with reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]):
                await until(lambda: places(kernel) == [(0, ""), (1, "")])
            kernel.enter(1, pid=70)
        await until(lambda: places(kernel) == [(0, first), (1, first)])
        async with reading(sensor, only("c" * 64)):
            await until(lambda: places(kernel) == [(0, ""), (1, "")])
        kernel.enter(2, pid=60)
        assert [one.syscall.id for one in await reader.take(1)] == [2]
        assert not reader.statuses


async def test_limited_no_more_when_the_container_ends(kernel: FakeKernel) -> None:
    kernel.proc.add(60, 50)
    kernel.container("a" * 64, 60)
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 64)) as reader:
        kernel.exit(60)
        await until(lambda: places(kernel) == [(0, ""), (1, "")])
        kernel.proc.add(61, 50, cgroup=f"0::/docker/{'a' * 64}\n")
        when = kernel.fork(50, 61)
        (kernel.folder / "root/sys/fs/cgroup/docker" / ("a" * 64) / "cgroup.procs").write_text("61\n")
        path = f"/docker/{'a' * 64}"
        kernel.happen("cgroup/cgroup_attach_task", {"pid": 61, "dst_path": path.encode()}, pid=50)
        kernel.enter(3, pid=61)
        (told,) = await reader.take(1)
        assert (told.syscall.id, told.container_id) == (3, "a" * 64)
        assert told.sensor_monotime_nanos > when
        await until(lambda: all(place for _, place in places(kernel)))
        assert not reader.statuses


async def test_a_container_that_begins_again_before_its_end_was_read_of(kernel: FakeKernel) -> None:
    """Its events since may be missing, and the stream says so."""
    kernel.proc.add(60, 50)
    kernel.proc.add(61, 50)
    kernel.container("a" * 64, 60)
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 64)) as reader:
        kernel.exit(60)
        path = f"/docker/{'a' * 64}"
        (kernel.proc.root / "61/cgroup").write_text(f"0::{path}\n")
        kernel.happen("cgroup/cgroup_attach_task", {"pid": 61, "dst_path": path.encode()}, pid=50)
        assert "began again" in loss(await reader.status())[1]


async def test_limited_no_more_when_the_container_gets_another_cgroup(kernel: FakeKernel) -> None:
    kernel.proc.add(60, 50)
    kernel.proc.add(61, 50)
    kernel.container("a" * 64, 60)
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 64)) as reader:
        path = f"/elsewhere/{'a' * 64}"
        (kernel.proc.root / "61/cgroup").write_text(f"0::{path}\n")
        kernel.happen("cgroup/cgroup_attach_task", {"pid": 61, "dst_path": path.encode()}, pid=50)
        assert "another cgroup" in loss(await reader.status())[1]
        await until(lambda: places(kernel) == [(0, ""), (1, "")])


async def test_limited_no_more_after_lost_process_records(kernel: FakeKernel) -> None:
    kernel.proc.add(60, 50)
    kernel.container("a" * 64, 60)
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 64)) as reader:
        kernel.lose("task/task_newtask", 1)
        await reader.status()
        await until(lambda: places(kernel) == [(0, ""), (1, "")])
        await until(lambda: all(place for _, place in places(kernel)))  # and again, since all is well


# --- what can't be


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errno.EACCES, "not permitted; run as root"),
        (errno.EPERM, "not permitted; run as root"),
        (errno.ENOSYS, "no perf events"),
        (errno.EMFILE, "too few file descriptors"),
    ],
)
@pytest.mark.parametrize("after", [0, 3, 9])
async def test_perf_events_that_are_refused(kernel: FakeKernel, error: int, words: str, after: int) -> None:
    left = [after]
    real = FakeKernel.rs_perf_open

    def refusing(self: FakeKernel, asked: Any, cpu: int, cgroup: int) -> int:
        left[0] -= 1
        return real(self, asked, cpu, cgroup) if left[0] >= 0 else -error

    with mock.patch.object(FakeKernel, "rs_perf_open", refusing), pytest.raises(SetupError, match=words):
        async with kernel.sensor():
            pass
    assert not any(kernel.is_open(fd) for fd in kernel.perfs)


async def test_rings_that_there_is_no_memory_for(kernel: FakeKernel) -> None:
    with (
        mock.patch.object(FakeKernel, "rs_ring_open", return_value=-errno.EPERM),
        pytest.raises(SetupError, match="no memory may be locked for a ring of 256 KiB"),
    ):
        async with kernel.sensor():
            pass
    assert not any(kernel.is_open(fd) for fd in kernel.perfs)


async def test_rings_that_there_is_less_memory_for(
    kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    """They are halved, on all CPUs, until they fit; what was opened in vain is closed."""
    opened: list[tuple[int, int]] = []
    original = FakeKernel.rs_ring_open

    def open_ring(self: FakeKernel, engine: Any, fd: int, cpu: int, pages: int) -> int:
        if pages > (64 if cpu else 128):
            return -errno.EPERM
        opened.append((cpu, pages))
        return original(self, engine, fd, cpu, pages)

    with mock.patch.object(FakeKernel, "rs_ring_open", open_ring):
        async with (
            kernel.sensor(ring_size=8 << 20, lifecycle_ring_size=256 << 10) as sensor,
            reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader,
        ):
            kernel.enter(3)
            assert (await reader.take(1))[0].syscall.id == 3
    assert opened == [(0, 64), (1, 64), (0, 128), (0, 64), (1, 64)]
    assert "bulk rings of 256 KiB instead of 8192" in caplog.text
    assert not any(kernel.is_open(fd) for fd in kernel.perfs)


async def test_an_error_while_a_kernel_event_is_opened_leaves_nothing_behind(kernel: FakeKernel) -> None:
    async with kernel.sensor() as sensor:
        before = {fd for fd in kernel.perfs if kernel.is_open(fd)}
        with (
            mock.patch.object(FakeKernel, "rs_perf_enable", return_value=-errno.EIO),
            pytest.raises(KernelError, match="enable sys_enter"),
        ):
            async with reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]):
                pass
        await until(lambda: {fd for fd in kernel.perfs if kernel.is_open(fd)} == before)
        async with reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader:
            kernel.enter(3)
            assert (await reader.take(1))[0].syscall.id == 3


async def test_many_cpus_get_smaller_rings(kernel: FakeKernel) -> None:
    kernel.cpus = list(range(64))
    async with kernel.sensor(ring_size=8 << 20, lifecycle_ring_size=1 << 20, ring_total=64 << 20) as sensor:
        async with reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader:
            kernel.enter(1, cpu=63)
            await reader.take(1)
        assert sum(ring.size for ring in kernel.rings.values()) <= 64 << 20


async def test_the_figures_add_up(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER, id=1)]) as reader,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]),
        reading(sensor, ticker_events=[TickerEventFilter(interval=10**15)]),
    ):
        await until(lambda: len(kernel.open_perfs(SYS_ENTER)) == 2)  # the one that was replaced has ended
        for number in (1, 1, 2):
            kernel.enter(number)
        await reader.take(2)
        figures = sensor.metrics.figures()
        assert (figures["engine_records"], figures["engine_events"], figures["engine_delivered"]) == (3, 3, 5)
        assert (figures["subscribers"], figures["subscribers_ever"], figures["outputs"]) == (3, 3, 3)
        assert figures["cpus"] == 2
        assert figures["processes"] == 2


async def test_a_sensor_that_closes_ends_its_streams(kernel: FakeKernel) -> None:
    with kernel.installed():
        sensor = await Sensor(kernel.config()).__aenter__()
        async with sensor.subscribe(
            Subscription(event_filter=EventFilter(process_events=[FORK]))
        ) as subscriber:
            reader = Reader(subscriber)
            kernel.fork(50, 60)
            await reader.take(1)
            await sensor.close()
            assert await reader.rest() == []
            assert "shutting down" in str(reader.ended)
        await sensor.close()
        assert not any(kernel.is_open(fd) for fd in kernel.perfs)
