"""Which container a process is in, by what the kernel says of its cgroup; no engine needed."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from pathlib import Path

from ringside.api.v0 import ProcessEventFilter, ProcessEventType, SyscallEventFilter, SyscallEventType
from ringside.client.syscalls import number_of
from ringside.sensor.config import Config
from ringside.sensor.sensor import Sensor

from tests.support.cgroups import container_cgroup
from tests.support.stream import watching

CALL = number_of("getpriority")
# clone3(2) straight into a cgroup: the child calls at once, waits for a line, and executes a program
STARTED_INSIDE = """
    import ctypes, os, struct, sys
    libc = ctypes.CDLL(None)
    into = os.open(sys.argv[1], os.O_RDONLY)
    arguments = struct.pack("=QQQQQQQQQQQ", 0x200000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, into)
    child = libc.syscall(435, arguments, len(arguments))
    if child == 0:
        for number in range(20):
            libc.syscall(int(sys.argv[2]), 100 + number)
        os.read(0, 1)
        os.execv("/bin/true", ["true", "inside"])
    assert child > 0, child
    print(child, flush=True)
    os.waitpid(child, 0)
"""


async def test_a_process_started_straight_in_a_containers_cgroup() -> None:
    """Its first calls too, from before it executes anything."""
    calls = [SyscallEventFilter(type=SyscallEventType.ENTER, id=CALL)]
    ends = [ProcessEventFilter(type=kind) for kind in (ProcessEventType.EXEC, ProcessEventType.EXIT)]
    pids: list[int] = []
    with container_cgroup() as cgroup:
        async with (
            Sensor(Config(engine="none")) as sensor,
            watching(sensor, lambda _: True, syscall_events=calls, process_events=ends) as stream,
        ):
            program = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", textwrap.dedent(STARTED_INSIDE), str(cgroup), str(CALL)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert program.stdout is not None
            pids.append(int(await program.stdout.readline()))
            told = await stream.until(lambda event: event.syscall and event.syscall.arg0 == 119)
            told = [event for event in told if event.process_pid == pids[0]]
            assert [event.syscall.arg0 for event in told if event.syscall] == list(range(100, 120))
            await program.communicate(b"\n")
            told += await stream.until(
                lambda event: event.process_pid == pids[0] and event.process and event.process.type == 3
            )
        inside = [event for event in told if event.process_pid == pids[0]]
        assert {event.container_id for event in inside} == {cgroup.name}
        assert {event.container_id for event in told if event.process_pid == program.pid} <= {""}
        assert not Path(cgroup, "cgroup.procs").read_text()
