"""The engine with a source of system calls, an output and rings that no kernel writes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from ringside.api.v0 import ChargenEvent, Event, SyscallEventType
from ringside.sensor import wire
from ringside.sensor.engine import Route
from ringside.sensor.events.syscall import TABLES

from .fakering import (
    HERE,
    FakeRing,
    Rig,
    canned,
    raw_of,
    sample,
)

ENTER, LEAVE = canned(HERE, "raw_syscalls/sys_enter"), canned(HERE, "raw_syscalls/sys_exit")
EXEC = canned(HERE, "sched/sched_process_exec")
ENTER_TABLE = TABLES[SyscallEventType.ENTER][1]
LEAVE_TABLE = TABLES[SyscallEventType.EXIT][1]
SYS, LIFE = 7, 8  # ids of perf events


def call(number: int, when: int, *args: int, pid: int = 1000, tid: int | None = None, id: int = SYS) -> bytes:
    """A sample of raw_syscalls:sys_enter."""
    arguments = (*args, *([0] * (6 - len(args))))
    return sample(id, when, raw_of(ENTER, id=number, args=arguments), pid, tid)


class Calls(Rig):
    """An engine with the system call source, an output, and a ring for each CPU."""

    def __init__(self, cpus: int = 1, pages: int = 2, **more: Any) -> None:
        super().__init__(**more)
        self.enter = self.source(ENTER, ENTER_TABLE, "id")
        self.event(SYS, self.enter)
        self.all = self.engine.open_output(64 << 10)
        self.engine.route(self.enter, [Route(self.all)])
        self.engine.set_publish_time(1_700_000_000_000_000)
        self.rings = [FakeRing(pages) for _ in range(cpus)]
        for cpu, ring in enumerate(self.rings):
            ring.attach(self.engine, cpu)

    @property
    def ring(self) -> FakeRing:
        return self.rings[0]

    def numbers(self, output: int | None = None) -> list[int]:
        """The system call numbers that an output got."""
        return [one.event.syscall.id for one in self.events(self.all if output is None else output)]


@contextmanager
def calls(cpus: int = 1, pages: int = 2, **more: Any) -> Iterator[Calls]:
    rig = Calls(cpus, pages, **more)
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture
def rig() -> Iterator[Calls]:
    with calls() as made:
        yield made


@pytest.fixture
def pair() -> Iterator[Calls]:
    with calls(cpus=2) as made:
        yield made


def chargen(characters: str) -> bytes:
    return wire.nest(Event, "chargen", wire.encode(ChargenEvent, characters=characters))
