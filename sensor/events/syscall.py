"""System calls: raw_syscalls:sys_enter and sys_exit, which see every call of every program.

Filters on number and result are decided in the kernel, and again in C for whom a record is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringside.api.v0 import SyscallEventFilter, SyscallEventType

from ..errors import KernelError, RequestError, UnservableError
from ..expression import Op, Predicate, all_of
from . import Mechanism
from .bulk import BulkEvent, BulkWant, Kernel, native_flag

if TYPE_CHECKING:
    from ..sensor import Sensor

FAMILY = "system calls"
_HIGHEST = 0x400003FF  # with the x32 bit set; no table is longer

TABLES = {
    SyscallEventType.ENTER: (
        "sys_enter",
        {
            "syscall": {
                "type": SyscallEventType.ENTER,
                "id": Kernel("id"),
                **{f"arg{n}": Kernel("args", n) for n in range(6)},
            }
        },
    ),
    SyscallEventType.EXIT: (
        "sys_exit",
        {"syscall": {"type": SyscallEventType.EXIT, "id": Kernel("id"), "ret": Kernel("ret")}},
    ),
}


class SyscallFamily:
    """Wants for SyscallEventFilter."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor
        self._events: dict[SyscallEventType, BulkEvent] = {}

    def mechanisms(self) -> list[Mechanism]:
        """How this kernel serves system calls."""
        there = all(self._sensor.tracefs.has_event("raw_syscalls", name) for name, _ in TABLES.values())
        return [
            Mechanism(
                FAMILY,
                there,
                "raw_syscalls tracepoints" if there else "none",
                hint="" if there else "a kernel with CONFIG_FTRACE_SYSCALLS",
            )
        ]

    def wants(self, request: SyscallEventFilter, path: str) -> list[BulkWant]:
        """What a filter asks for. RequestError if it makes no sense."""
        if request.type not in TABLES:
            raise RequestError(f"{path}.type", "must be SYSCALL_EVENT_TYPE_ENTER or SYSCALL_EVENT_TYPE_EXIT")
        if request.id is not None and not 0 <= request.id <= _HIGHEST:
            raise RequestError(
                f"{path}.id", f"{request.id} is no system call number; it must be 0 or more, and small"
            )
        if request.ret is not None and request.type != SyscallEventType.EXIT:
            raise RequestError(
                f"{path}.ret", "only calls that return have a result: use SYSCALL_EVENT_TYPE_EXIT"
            )
        event = self._event(request.type)
        ret = [] if request.ret is None else [Predicate(Op.EQ, "ret", request.ret)]
        number = [] if request.id is None else [Predicate(Op.EQ, "id", request.id)]
        return [BulkWant.of(FAMILY, event, all_of([*number, *ret]), key=request.id, tested=all_of(ret))]

    def _event(self, kind: SyscallEventType) -> BulkEvent:
        if kind not in self._events:
            name, table = TABLES[kind]
            try:
                record = self._sensor.tracefs.read_format("raw_syscalls", name)
            except KernelError as error:
                raise UnservableError(
                    FAMILY, "no raw_syscalls tracepoints", "a kernel with CONFIG_FTRACE_SYSCALLS"
                ) from error
            self._events[kind] = BulkEvent(
                self._sensor.rings,
                record,
                record.id,
                table,
                key="id",
                exclude=self._sensor.exclude_self(),
                flags=native_flag() | self._sensor.lineage_flag(),
            )
        return self._events[kind]
