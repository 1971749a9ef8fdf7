"""The system calls of 32-bit programs on a 64-bit kernel.

They have a table of numbers of their own (arch/x86/entry/syscalls/syscall_32.tbl). The tracepoints of single
calls leave them out (kernel/trace/trace_syscalls.c, arch_trace_is_compat_syscall); raw_syscalls brings them,
among everybody's calls. So the kernel picks the numbers, the process table knows who is meant by them, and
each number is a case of the family's table. Arguments are 32 bits wide, pointers among them.

raw_syscalls costs every system call of everybody some 150 ns, and lseek, fstat and getuid, which have some of
the numbers in 64-bit programs, a wake-up of the courier. So it is open only while a 32-bit program runs, on
most machines never, and a while longer. The first calls of the first one come too early.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from ..errors import KernelError, UnservableError
from ..expression import Op, Predicate, all_of
from ..plan import Kernel
from ..program import FieldInfo
from ..program import Kind as FieldKind
from .bulk import BulkEvent, BulkWant, foreign_flag

if TYPE_CHECKING:
    from ..expression import Expression
    from ..plan import Table
    from ..program import Fields
    from ..sensor import Sensor
    from ..tracefs.format import Format

SOCKETCALL = 102
_MARK = "sys/abi/vsyscall32"  # there if the kernel has the 32-bit table (arch/x86/entry/vdso/vdso32-setup.c)


def argument(number: int, size: int = 4, *, signed: bool = False) -> Kernel:
    """An argument of the call, counted from 0."""
    return Kernel("args", number, size=size, signed=signed)


def argument_field(record: Format, number: int, size: int = 4, *, signed: bool = False) -> FieldInfo:
    """The same as a filter compares it."""
    args = record["args"]
    return FieldInfo(FieldKind.INT, args.offset + number * args.element_size, size, signed)


class ForeignCalls:
    """raw_syscalls for the 32-bit callers of one event family."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor
        self._events: dict[str, BulkEvent | None] = {}

    def event(self, name: str, cases: Table, flags: int = 0) -> BulkEvent | None:
        """sys_enter or sys_exit, made into events as these cases say; None if nobody can call so."""
        if name not in self._events:
            self._events[name] = self._make(name, cases, flags)
        return self._events[name]

    def _make(self, name: str, cases: Table, flags: int) -> BulkEvent | None:
        if platform.machine() != "x86_64" or self._sensor.procfs.read(_MARK) is None:
            return None
        try:
            record = self._sensor.tracefs.read_format("raw_syscalls", name)
            event = BulkEvent(
                self._sensor.rings,
                record,
                record.id,
                cases,
                key="id",
                exclude=self._sensor.exclude_self(),
                flags=flags | foreign_flag() | self._sensor.lineage_flag(),
            )
        except (KernelError, UnservableError):
            return None
        table = self._sensor.processes

        def follow() -> None:
            event.rest(not table.has_foreign)

        table.on_foreign.append(follow)
        follow()
        return event


def want(
    family: str, event: BulkEvent, number: int, expression: Expression, fields: Fields, note: str = ""
) -> BulkWant:
    """Calls of this number that an expression over `fields` accepts."""
    known = {**fields, "id": event.fields["id"]}
    chosen = all_of([Predicate(Op.EQ, "id", number), expression])
    return BulkWant.of(
        family,
        event,
        chosen,
        key=number,
        tested=expression,
        note=note,
        fields=known,
    )
