"""System calls, processes and rings of the real kernel, through the sensor in this process."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from ringside.api.v0 import (
    Event,
    GetEventsResponse,
    ProcessEventFilter,
    ProcessEventType,
    Subscription,
    SyscallEventFilter,
    SyscallEventType,
)
from ringside.api.v0 import EventFilter as Filters
from ringside.client.syscalls import number_of
from ringside.sensor.config import Config
from ringside.sensor.sensor import Sensor

from tests.support.stream import PATIENCE, Stream, own_sensor, watching

ENTER, EXIT = SyscallEventType.ENTER, SyscallEventType.EXIT
GETPRIORITY = number_of("getpriority")
ALL = [
    ProcessEventFilter(type=kind)
    for kind in (ProcessEventType.FORK, ProcessEventType.EXEC, ProcessEventType.EXIT)
]
ONLINE = Path("/sys/devices/system/cpu/cpu1/online")


def call(*arguments: int) -> int:
    """getpriority(2) with these registers, which it mostly ignores."""
    result: int = ctypes.CDLL(None).syscall(GETPRIORITY, *map(ctypes.c_ulong, arguments))
    return result


async def run(code: str, *arguments: str) -> tuple[int, int]:
    """A Python program of its own; its pid and raw status as this process sees them."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", textwrap.dedent(code), *arguments)
    await process.wait()
    assert process.returncode is not None
    return process.pid, process.returncode


def anything(_event: object) -> bool:
    """Keep what comes from any process."""
    return True


@asynccontextmanager
async def of_processes() -> AsyncIterator[Stream]:
    """All process events of the machine."""
    async with (
        Sensor(Config(engine="none")) as sensor,
        watching(sensor, anything, process_events=ALL) as stream,
    ):
        yield stream


def exit_of(pid: int) -> Callable[[Event], bool]:
    """That process's exit."""
    return lambda event: event.process is not None and event.process_pid == pid and event.process.type == 3


async def test_a_call_has_its_number_arguments_and_result() -> None:
    filters = [SyscallEventFilter(type=kind, id=GETPRIORITY) for kind in (ENTER, EXIT)]
    async with own_sensor() as sensor, watching(sensor, syscall_events=filters) as stream:
        call(7, 2**63 + 1, 3, 4, 5, 2**64 - 1)
        entered, left = await stream.until(lambda event: event.syscall and event.syscall.type == EXIT)
    assert entered.syscall is not None
    assert left.syscall is not None
    got = [getattr(entered.syscall, f"arg{n}") for n in range(6)]
    assert got == [7, 2**63 + 1, 3, 4, 5, 2**64 - 1]
    assert (left.syscall.id, left.syscall.ret) == (GETPRIORITY, -22)
    assert entered.process_pid == os.getpid()
    assert left.sensor_sequence_number > entered.sensor_sequence_number
    assert left.sensor_monotime_nanos > entered.sensor_monotime_nanos


async def test_results_are_filtered() -> None:
    wanted = [SyscallEventFilter(type=EXIT, id=GETPRIORITY, ret=-22)]
    async with own_sensor() as sensor, watching(sensor, syscall_events=wanted) as stream:
        call(0, 0)  # this one succeeds
        call(9)
        call(9)
        await stream.until(lambda event: event.syscall)
        await stream.until(lambda event: event.syscall)
        assert [event.syscall.ret for event in stream.events if event.syscall] == [-22, -22]


async def test_every_system_call_does_not_feed_itself() -> None:
    """The sensor's own are left out, whatever they are; a wildcard stream has none of this process."""
    async with Sensor(Config(engine="none")) as sensor:
        wanted = Subscription(event_filter=Filters(syscall_events=[SyscallEventFilter(type=ENTER)]))
        async with sensor.subscribe(wanted) as subscriber:
            process = await asyncio.create_subprocess_exec("/bin/true")
            seen: set[int] = set()
            async with asyncio.timeout(PATIENCE):
                while process.pid not in seen:
                    for one in GetEventsResponse.parse(await anext(subscriber)).events:
                        assert one.event is not None
                        seen.add(one.event.process_pid)
            await process.wait()
    assert os.getpid() not in seen


async def test_equal_subscriptions_share_the_kernels_event() -> None:
    def perf_events() -> int:
        links = (os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink())
        return sum("[perf_event]" in link for link in links)

    wanted = [SyscallEventFilter(type=ENTER, id=GETPRIORITY)]
    async with own_sensor() as sensor, watching(sensor, syscall_events=wanted):
        one = perf_events()
        async with watching(sensor, syscall_events=wanted) as second:
            assert perf_events() == one
            call(1)
            await second.until(lambda event: event.syscall)


async def test_a_hundred_filters_are_one_event() -> None:
    wanted = [SyscallEventFilter(type=ENTER, id=number) for number in range(100, 200)]
    async with own_sensor() as sensor, watching(sensor, syscall_events=wanted) as stream:
        assert sum(event.name == "sys_enter" for event in sensor.rings.open_events) == 1
        call(4)
        await stream.until(lambda event: event.syscall and event.syscall.id == GETPRIORITY)


async def test_a_programs_life() -> None:
    async with of_processes() as stream:
        code = "import sys; sys.exit(7)"
        pid, status = await run(code, "an argument", "", "größe")
        events = await stream.until(exit_of(pid))
    assert status == 7
    own = [event for event in events if event.process_pid == pid and event.process]
    executed = [event for event in own if event.process and event.process.type == 2]
    left = own[-1]
    assert executed[-1].process is not None
    assert executed[-1].process.exec_command_line[-4:] == [code, "an argument", "", "größe"]
    assert os.fsdecode(executed[-1].process.exec_filename) == sys.executable
    assert left.process is not None
    assert (left.process.exit_code, left.process.exit_status, left.process.exit_signal) == (7 << 8, 7, 0)
    lineage = [process.pid for process in left.process_lineage]
    assert lineage[:2] == [pid, os.getpid()]
    assert lineage[-1] == 1
    assert len({event.process_id for event in own}) == 1
    numbers = [event.sensor_sequence_number for event in events]
    assert numbers == sorted(set(numbers))


async def test_a_signal_ends_a_process() -> None:
    async with of_processes() as stream:
        pid, status = await run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        left = (await stream.until(exit_of(pid)))[-1]
    assert status == -signal.SIGKILL
    assert left.process is not None
    assert (left.process.exit_code, left.process.exit_signal, left.process.exit_status) == (9, 9, 0)


async def test_threads_are_no_processes_and_the_last_one_is_the_exit() -> None:
    code = """
        import ctypes, os, sys, threading, time
        def last():
            time.sleep(0.1)
            os._exit(5)
        for _ in range(3):
            threading.Thread(target=int).start()
        threading.Thread(target=last).start()
        ctypes.CDLL(None).syscall(int(sys.argv[1]), 0)  # exit(2): only this thread, the leader
    """
    async with of_processes() as stream:
        pid, status = await run(code, str(number_of("exit")))
        events = await stream.until(exit_of(pid))
    assert status == 5
    own = [event.process for event in events if event.process_pid == pid and event.process]
    assert [one.type for one in own].count(ProcessEventType.FORK) == 0
    assert [one.exit_status for one in own if one.type == ProcessEventType.EXIT] == [5]


async def test_short_programs_have_their_command_lines() -> None:
    count = 100
    script = f"for i in $(seq {count}); do /bin/true $i 'a b'; done"
    async with Sensor(Config(engine="none")) as sensor:
        execs = [ProcessEventFilter(type=ProcessEventType.EXEC, exec_filename="/bin/true")]
        async with watching(sensor, anything, process_events=execs) as stream:
            process = await asyncio.create_subprocess_exec("/bin/sh", "-c", script)
            await process.wait()
            last = ["/bin/true", str(count), "a b"]
            await stream.until(
                lambda event: event.process and event.process.exec_command_line[1:2] == last[1:2]
            )
            lines = [event.process.exec_command_line for event in stream.events if event.process]
    assert [line for line in lines if line[2:] == ["a b"]] == [
        ["/bin/true", str(number), "a b"] for number in range(1, count + 1)
    ]


async def test_a_process_has_one_id_however_it_became_known() -> None:
    """One sensor sees the fork, the other finds the process when it starts."""
    async with Sensor(Config(engine="none")) as first:  # noqa: SIM117
        async with watching(first, anything, process_events=ALL[:1]) as forks:
            child = await asyncio.create_subprocess_exec("/bin/sleep", "1000")
            grown = await asyncio.create_subprocess_exec("/bin/sh", "-c", "/bin/sleep 1000 & wait")
            forked = (await forks.until(lambda event: event.process_pid == grown.pid))[-1]
            assert forked.process is not None
            async with Sensor(Config(engine="none")) as second:
                pid = forked.process.fork_child_pid
                assert forked.process.fork_child_id.endswith(f"-{pid:x}-{second.processes.get(pid).start:x}")
                assert first.processes.get(child.pid).start == second.processes.get(child.pid).start
                os.kill(pid, signal.SIGKILL)
    for process in (child, grown):
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_full_ring_is_told_and_the_books_close() -> None:
    issued = 50_000
    code = f"import os\nfor _ in range({issued}): os.getpriority(0, 0)"
    async with Sensor(Config(engine="none", ring_size=64 << 10)) as sensor:
        wanted = Subscription(
            event_filter=Filters(syscall_events=[SyscallEventFilter(type=ENTER, id=GETPRIORITY)])
        )
        async with sensor.subscribe(wanted) as subscriber:
            # not read while it runs, by blocking this very thread: so the ring must fill
            subprocess.run([sys.executable, "-c", code], check=True)  # noqa: ASYNC221
            got = lost = 0
            async with asyncio.timeout(PATIENCE):
                while got + lost < issued:
                    response = GetEventsResponse.parse(await anext(subscriber))
                    got += len(response.events)
                    for status in response.statuses:
                        lost += int(status.message.split()[0]) if status.code == 15 else 0
    assert lost > 0
    assert got + lost == issued


async def test_cpus_that_come_and_go_are_followed(record_property: Callable[[str, object], None]) -> None:
    if not ONLINE.exists():
        record_property("not_there", "no CPU that can be switched off")
        return
    wanted = [SyscallEventFilter(type=ENTER, id=GETPRIORITY)]

    async def cpus(sensor: Sensor, expected: set[int]) -> None:
        async with asyncio.timeout(PATIENCE):
            while set(sensor.rings.cpus) != expected:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def on_cpu_1(stream: Stream) -> None:
        os.sched_setaffinity(0, {1})
        try:
            call(1)
        finally:
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        await stream.until(lambda event: event.cpu == 1)

    async with own_sensor() as sensor, watching(sensor, syscall_events=wanted) as stream:
        before = set(sensor.rings.cpus)
        await on_cpu_1(stream)
        ONLINE.write_text("0")
        try:
            await cpus(sensor, before - {1})
            call(2)
            await stream.until(lambda event: event.syscall and event.syscall.arg0 == 2)
        finally:
            ONLINE.write_text("1")
        await cpus(sensor, before)
        await on_cpu_1(stream)


async def test_two_sensors_side_by_side() -> None:
    wanted = [SyscallEventFilter(type=ENTER, id=GETPRIORITY)]
    async with own_sensor() as first, own_sensor() as second:
        async with (
            watching(first, syscall_events=wanted) as one,
            watching(second, syscall_events=wanted) as two,
        ):
            call(1)
            await one.until(lambda event: event.syscall)
            await two.until(lambda event: event.syscall)
        assert first.sensor_id != second.sensor_id
