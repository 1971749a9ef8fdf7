"""The whole sensor on a fake kernel: the processes of old and new kernels, their names, ids and ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ringside.api.v0 import (
    ProcessEventFilter,
    ProcessEventType,
    SyscallEventFilter,
)
from ringside.sensor._perf import lib
from ringside.sensor.events import process as process_events
from ringside.sensor.process import ProcessTable

from .support.fakekernel import FakeKernel, reading
from .support.fakering import HERE, NEWEST, OLDEST, now
from .support.whole import (
    ALL,
    ENTER,
    EXEC,
    EXIT,
    FIRST,
    FORK,
    any_kernel,
    kernel,
    kinds,
    lineage,
    make,
    patched,
    process_id,
    until,
)


@pytest.fixture
def old_kernel(tmp_path: Path) -> FakeKernel:
    """Threads have to be counted."""
    return make(tmp_path, OLDEST)


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
        offset = lib.rs_boot_offset(sensor.engine.handle)
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
