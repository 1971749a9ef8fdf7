"""What tests of the command share: how it is run, and events for it to tell."""

from __future__ import annotations

import os
import subprocess
import sys

from ringside.api.v0 import (
    Event,
    ProcessEvent,
    ProcessEventType,
    SyscallEvent,
    SyscallEventType,
    TelemetryEvent,
)
from ringside.client.syscalls import number_of

COMMAND = (sys.executable, "-m", "ringside.sensor.cli")


ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("RINGSIDE_")}


DEADLINE = 60


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=DEADLINE, check=False
    )


def enter(number: int, *arguments: int) -> Event:
    values = {f"arg{index}": value for index, value in enumerate(arguments)}
    return Event(syscall=SyscallEvent(type=SyscallEventType.ENTER, id=number, **values))


def leave(number: int, ret: int) -> Event:
    return Event(syscall=SyscallEvent(type=SyscallEventType.EXIT, id=number, ret=ret))


def executed(filename: str, *arguments: str) -> Event:
    return Event(
        process=ProcessEvent(
            type=ProcessEventType.EXEC, exec_filename=filename, exec_command_line=list(arguments)
        )
    )


def telemetry(event: Event, at: int = 0) -> TelemetryEvent:
    event.sensor_monotime_nanos = 10**9 + at
    return TelemetryEvent(publish_time_micros=1_700_000_000_000_000 + at // 1000, event=event)


OPENAT = number_of("openat")
