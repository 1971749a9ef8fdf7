"""What tests of a whole sensor on a fake kernel share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ringside.api.v0 import (
    ProcessEventFilter,
    ProcessEventType,
    SyscallEventType,
)

from .fakekernel import BOOT_ID, FakeKernel
from .fakering import HERE, NEWEST, OLDEST

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


async def settled(kernel: FakeKernel, event: str, count: int) -> None:
    """Wait until so many perf events are open on a kernel event, and none is waiting to be closed."""
    number = kernel.formats[event].id

    def is_so() -> bool:
        there = [one for fd, one in kernel.perfs.items() if one.tracepoint == number and kernel.is_open(fd)]
        return len(there) == count == sum(one.enabled for one in there)

    await until(is_so)
