"""What only short-lived programs show: command lines and exit statuses, by each way there is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ringside.api.v0 import Event, FileEventFilter, FileEventType, ProcessEventFilter, ProcessEventType
from ringside.client.syscalls import number_of
from ringside.sensor.sensor import Sensor

from ..support.stream import (
    LIBC,
    RUNGS,
    Told,
    has_kprobes,
    is_missing,
    own_sensor,
    takes_maps,
    takes_programs,
    watching,
)

EXEC, EXIT = ProcessEventType.EXEC, ProcessEventType.EXIT
MOST, LEAST, ENOUGH = 1000, 200, 15.0  # programs; at least, if they take more seconds than that
SIDE_BY_SIDE = 20
PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
CAP_SYS_ADMIN, CAP_BPF, PR_CAPBSET_DROP = 21, 39, 24


def anybodys(_: object) -> bool:
    return True


def start(program: str, *arguments: str, stdin: int = 0) -> int:
    """A child of ours; its pid."""
    actions = [(os.POSIX_SPAWN_DUP2, stdin, 0)]
    return os.posix_spawn(program, [program, *arguments], os.environ, file_actions=actions)


def wait(pid: int) -> int:
    """Its wait status."""
    return os.waitpid(pid, 0)[1]


def rows(sensor: Sensor) -> dict[str, str]:
    """What each event family is served by."""
    return {row.family: row.mechanism for row in sensor.mechanisms()}


@pytest.mark.parametrize("mechanism", ["auto", "memory"])
async def test_every_command_line(mechanism: str) -> None:
    """A thousand programs of a millisecond, each tenth with 2 KB of arguments: none is wrong or missing."""
    program = shutil.which("true")
    assert program
    wanted = ProcessEventFilter(type=EXEC, exec_filename=program)
    async with own_sensor(mechanism) as sensor, watching(sensor, anybodys, process_events=[wanted]) as stream:
        by_program = rows(sensor)["command lines"] == "bpf program at the exec"
        assert by_program == (mechanism == "auto" and takes_programs())
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
        # by the stack's sample what can't be read any more is unset; never is it another's, or a part
        wrong = {pid: line for pid, line in found.items() if line != expected[pid] and (line or by_program)}
        assert wrong == {}
        assert sum(map(bool, found.values())) > 0.9 * len(found)


@pytest.mark.parametrize("size", [1, 4 << 10, 27 << 10, 29 << 10, 100 << 10])
async def test_command_lines_of_any_length(size: int) -> None:
    """Those too long for a record are read from the program, which must still be there."""
    shell = shutil.which("sh")
    assert shell
    line = [shell, "-c", "read x", *(["x" * (size % 100 or 1)] + ["y" * 99] * (size // 100))]
    async with own_sensor() as sensor:
        wanted = ProcessEventFilter(type=EXEC, exec_filename=shell)
        async with watching(sensor, anybodys, process_events=[wanted]) as stream:
            reading, writing = os.pipe2(os.O_CLOEXEC)
            pid = start(*line, stdin=reading)
            try:
                (*_, event) = await stream.until(lambda event: event.process_pid == pid)
            finally:
                os.close(writing)
                os.close(reading)
                wait(pid)
    assert event.process is not None
    assert event.process.exec_command_line == line


@pytest.mark.parametrize("mechanism", ["auto", "program", "kprobe", "memory"])
async def test_every_exit_status(mechanism: str) -> None:
    """Of programs that end by themselves and by a signal, and of threads; by each way there is."""
    shell = shutil.which("sh")
    assert shell
    wanted = ProcessEventFilter(type=EXIT)
    way = "proc connector"
    if mechanism in ("auto", "program") and takes_programs():
        way = "bpf program at the exit"
    elif mechanism in ("auto", "kprobe") and has_kprobes():
        way = "kprobe on do_exit"
    async with own_sensor(mechanism) as sensor:
        assert rows(sensor)["exit status"] == way
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


@pytest.mark.parametrize(
    ("first", "last"), [("exit(3)", "exit(9)"), ("exit(3)", "kill(9)"), ("exit(0)", "exit_group(5)")]
)
async def test_the_status_is_what_wait_tells(first: str, last: str) -> None:
    """Of a process whose first thread is gone before its last one ends, by whichever way."""
    numbers = {name: number_of(name) for name in ("exit", "exit_group")}
    code = f"""
import ctypes, os, signal, sys, threading, time
number, libc = {numbers}, ctypes.CDLL(None)
exit, exit_group = (lambda status, name=name: libc.syscall(number[name], status) for name in number)
kill = lambda signal: os.kill(os.getpid(), signal)
def run():
    while "Z" not in open(f"/proc/self/task/{{os.getpid()}}/stat").read().rpartition(")")[2]:
        time.sleep(0.001)
    {last}
threading.Thread(target=run).start()
{first}
"""
    async with own_sensor() as sensor:
        if rows(sensor)["exit status"] != "bpf program at the exit":
            return  # the other ways tell what the last thread ended with, which is not always the same
        async with watching(sensor, anybodys, process_events=[ProcessEventFilter(type=EXIT)]) as stream:
            pid = start(sys.executable, "-c", code)
            status = wait(pid)
            (*_, event) = await stream.until(lambda event: event.process_pid == pid)
    assert event.process is not None
    assert event.process.exit_code == status
    assert status != 0


def test_without_the_capability_the_next_rung_is_taken() -> None:
    """`ringside check` by a root that has neither CAP_BPF nor CAP_SYS_ADMIN, with tracefs mounted for it."""
    code = f"""
import ctypes, os, sys
for capability in {CAP_BPF}, {CAP_SYS_ADMIN}:
    assert ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, capability, 0, 0, 0) == 0
os.execv(sys.executable, [sys.executable, "-m", "ringside.sensor.cli", "check", "--json"])
"""
    mount = "mountpoint -q /sys/kernel/tracing || mount -t tracefs nodev /sys/kernel/tracing"
    script = ["unshare", "--mount", "sh", "-c", f'{mount}; exec "$@"', "sh", sys.executable, "-c", code]
    paranoid = PARANOID.read_text()
    if int(paranoid) > 2:  # Debian's own: perf events for CAP_SYS_ADMIN only
        PARANOID.write_text("2")
    try:
        done = subprocess.run(script, capture_output=True, text=True, check=False)
    finally:
        PARANOID.write_text(paranoid)
    found = {row["family"]: row for row in json.loads(done.stdout)["mechanisms"]}
    line, status = found["command lines"], found["exit status"]
    assert line["mechanism"].startswith("the new program's stack")
    assert status["mechanism"] in ("kprobe on do_exit", "proc connector")
    assert line["note"] == "bpf(2) is not permitted"
    assert status["note"].startswith("bpf(2) is not permitted")


async def test_the_best_rung_is_taken() -> None:
    """And `ringside check` says which."""
    async with own_sensor() as sensor:
        rows = {row.family: row for row in sensor.mechanisms()}
    assert all(row.served for name, row in rows.items() if name not in ("kernel functions", "containers"))
    assert rows["kernel functions"].served == has_kprobes()
    best = "kprobe" if has_kprobes() else "bpf program" if takes_maps() else "memory"
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
