"""What only short-lived programs show: command lines and exit statuses, by each way there is."""

from __future__ import annotations

import os
import shutil
import time

import pytest
from ringside.api.v0 import Event, FileEventFilter, FileEventType, ProcessEventFilter, ProcessEventType

from ..support.stream import LIBC, RUNGS, Told, has_kprobes, is_missing, own_sensor, watching

EXEC, EXIT = ProcessEventType.EXEC, ProcessEventType.EXIT
MOST, LEAST, ENOUGH = 1000, 200, 15.0  # programs; at least, if they take more seconds than that
SIDE_BY_SIDE = 20


def anybodys(_: object) -> bool:
    return True


def start(program: str, *arguments: str) -> int:
    """A child of ours; its pid."""
    return os.posix_spawn(program, [program, *arguments], os.environ)


def wait(pid: int) -> int:
    """Its wait status."""
    return os.waitpid(pid, 0)[1]


async def test_every_command_line() -> None:
    """A thousand programs of a millisecond, each tenth with 2 KB of arguments: none is wrong or missing."""
    program = shutil.which("true")
    assert program
    wanted = ProcessEventFilter(type=EXEC, exec_filename=program)
    async with own_sensor() as sensor, watching(sensor, anybodys, process_events=[wanted]) as stream:
        expected: dict[int, list[str]] = {}
        begin = time.monotonic()
        while len(expected) < MOST and (len(expected) < LEAST or time.monotonic() - begin < ENOUGH):
            started = []
            for _ in range(SIDE_BY_SIDE):
                number = len(expected)
                arguments = ["ringside", str(number)]
                if number % 10 == 0:
                    arguments += [f"{number}-{n}-".ljust(200, "x") for n in range(10)] + ["", "last"]
                pid = start(program, *arguments)
                expected[pid] = [program, *arguments]
                started.append(pid)
            for pid in started:
                wait(pid)
        found: dict[int, list[str]] = {}

        def is_last(event: Event) -> bool:
            if event.process is not None and event.process_pid in expected:
                found[event.process_pid] = event.process.exec_command_line
            return len(found) == len(expected)

        await stream.until(is_last)
        # without probes what can't be read any more is unset; never is it another's, or a part
        wrong = {
            pid: line for pid, line in found.items() if line != expected[pid] and (line or has_kprobes())
        }
        assert wrong == {}
        assert sum(map(bool, found.values())) > 0.9 * len(found)


@pytest.mark.parametrize("mechanism", ["auto", "memory"])
async def test_every_exit_status(mechanism: str) -> None:
    """Of programs that end by themselves and by a signal; by kprobe, and by the proc connector."""
    shell = shutil.which("sh")
    assert shell
    wanted = ProcessEventFilter(type=EXIT)
    async with own_sensor(mechanism) as sensor:
        served = {row.family: row.mechanism for row in sensor.mechanisms()}["exit status"]
        assert served == ("kprobe on do_exit" if mechanism == "auto" and has_kprobes() else "proc connector")
        async with watching(sensor, anybodys, process_events=[wanted]) as stream:
            expected = {}
            for script in ("exit 0", "exit 1", "exit 255", "kill -9 $$", "kill -15 $$", "exit 7") * 3:
                pid = start(shell, "-c", script)
                status = wait(pid)
                expected[pid] = (status, os.waitstatus_to_exitcode(status))
            found: dict[int, tuple[int, int]] = {}

            def is_last(event: Event) -> bool:
                process = event.process
                if process is not None and event.process_pid in expected:
                    code = -process.exit_signal if process.exit_signal else process.exit_status
                    found[event.process_pid] = (process.exit_code & ~0x80, code)
                return len(found) == len(expected)

            await stream.until(is_last)
            assert found == {pid: (status & ~0x80, code) for pid, (status, code) in expected.items()}


async def test_the_best_rung_is_taken() -> None:
    """And `ringside check` says which."""
    async with own_sensor() as sensor:
        rows = {row.family: row for row in sensor.mechanisms()}
    assert all(row.served for name, row in rows.items() if name not in ("kernel functions", "containers"))
    assert rows["kernel functions"].served == has_kprobes()
    best = "kprobe" if has_kprobes() else "memory"
    assert best in rows["file opens"].mechanism
    assert best in rows["network attempts"].mechanism


@pytest.mark.parametrize("rung", RUNGS)
async def test_best_effort_is_said(rung: str, record_property: Told) -> None:
    """The memory rung's subscribers are told what they may miss; the others' are not."""
    if is_missing(rung, record_property):
        return
    async with own_sensor(rung) as sensor:
        opened = FileEventFilter(type=FileEventType.OPEN, filename="/ringside-test/none")
        async with watching(sensor, file_events=[opened]) as stream:
            reasons = [detail.unpack() for status in stream.statuses for detail in status.details]
            LIBC.open(b"/ringside-test/none", 0)
            await stream.until(lambda event: event.file is not None)
    assert [getattr(one, "reason", "") for one in reasons] == (["BEST_EFFORT"] if rung == "memory" else [])
