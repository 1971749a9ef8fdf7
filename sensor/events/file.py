"""Files: opens, whichever system call makes them.

The ladder:

1. A kprobe on do_sys_openat2 (fs/open.c, 5.6; do_sys_open before), where open, openat, openat2 and creat of
   64- and 32-bit callers meet.
2. bpf programs at the system calls' tracepoints, which read the name (call_programs.py).
3. The system calls' tracepoints and the caller's memory, read at once by the courier; raw_syscalls for 32-bit
   callers (foreign.py). Best effort: the caller may have changed the name, or be gone. A name that could not
   be read is left unset.

Two more ways were tried and are none. The tracepoints of 7.x bring the name (`__filename_val`), but cut at
syscall_user_buf_size, 165 bytes at most, and with dots for what is not printable ASCII: no exact name. Event
probes could follow the pointer, but perf sees nothing of them (kernel/trace/trace_eprobe.c has no
TRACE_REG_PERF_REGISTER to this day): a perf event on one opens, and stays silent.

Opens by io_uring pass none of these; they have a ladder of their own (uring.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ringside.api.v0 import FileEventFilter, FileEventType

from ..btf import read_btf
from ..errors import KernelError, RequestError, UnservableError
from ..expression import FALSE, TRUE, And, Expression, Op, Predicate, all_of
from ..plan import Came, Fetch, FetchKind, Front, Kernel, Side, Table, When
from ..program import FieldInfo, fields_of
from ..program import Kind as FieldKind
from ..tracefs.format import Format
from . import Mechanism, uring
from .bulk import BulkEvent, BulkWant
from .call_programs import OPENED, open_program, program_event
from .foreign import ForeignCalls, argument, argument_field
from .foreign import want as foreign_want
from .ladder import Ladder, Rung, touch_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..program import Fields
    from ..sensor import Sensor

FAMILY = "file opens"
BY_RING = "file opens by io_uring"
_PATH_MAX = 4096
_MAX_PATTERN = 1024
_CALLS = ("openat", "open", "creat", "openat2")
_CREAT_FLAGS = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
_HOW = 16  # bytes that are read of struct open_how
_CREATES = os.O_CREAT | 0o20000000  # __O_TMPFILE; without either the mode is what a register happened to hold

KPROBE_ARGUMENTS = (("filename", "+0($arg2):ustring"), ("flags", "+0($arg3):u64"), ("mode", "+8($arg3):u64"))
OLD_KPROBE_ARGUMENTS = (("filename", "+0($arg2):ustring"), ("flags", "$arg3:s32"), ("mode", "$arg4:u16"))


def open_table(call: str, record: Format, name: Any) -> Table:
    """The table of an open whose name comes from `name`, as far as the call has flags and mode."""
    if isinstance(name, Fetch) and name.front is not None:
        return {"file": _open(name, _HOW_ACCESS)}
    flags = _CREAT_FLAGS if call == "creat" else Kernel("flags") if "flags" in record else None
    mode = Kernel("mode") if "mode" in record else None
    return {"file": _open(name, *_access(flags, mode))}


def _open(name: Any, *more: Any) -> list[Any]:
    return [("type", FileEventType.OPEN), name if isinstance(name, Fetch) else ("filename", name), *more]


def _access(flags: Kernel | Side | int | None, mode: Kernel | Side | None) -> list[Any]:
    """Flags and mode of an open, as far as they are known."""
    fields: list[Any] = [] if flags is None else [("open_flags", flags)]
    if mode is not None and isinstance(flags, Kernel | Side):
        fields.append(When(flags, 0, [("open_mode", mode)], mask=_CREATES))
    elif mode is not None:
        fields.append(("open_mode", mode))
    return fields


_HOW_ACCESS = Came(_access(Side(0, 8), Side(8, 8)))  # openat2's struct open_how, read before the name


def _text(pointer: str | Kernel, front: Front | None = None, *, narrow: bool = False) -> Fetch:
    at = front.length if front else 0
    return Fetch(
        pointer, [("filename", Side(at, _PATH_MAX))], kind=FetchKind.TEXT, front=front, narrow=narrow
    )


def _text_field(at: int = 0) -> FieldInfo:
    return FieldInfo(FieldKind.CHARS, at, _PATH_MAX, side=True, may_fault=True)


_HOW_FIELDS = {
    "filename": _text_field(_HOW),
    "flags": FieldInfo(FieldKind.INT, 0, 8, side=True),
    "mode": FieldInfo(FieldKind.INT, 8, 8, side=True),
}


@dataclass(frozen=True)
class ForeignOpen:
    """An open of a 32-bit caller: the call's number, and which of its arguments is what."""

    number: int
    name: int
    flags: int | None = None
    mode: int | None = None
    how: int | None = None

    def table(self) -> list[Any]:
        """Its event."""
        name = argument(self.name, 8)
        if self.how is not None:
            return _open(_text(name, Front(argument(self.how, 8), _HOW), narrow=True), _HOW_ACCESS)
        flags = _CREAT_FLAGS if self.flags is None else argument(self.flags)
        mode = None if self.mode is None else argument(self.mode, 2)
        return _open(_text(name, narrow=True), *_access(flags, mode))

    def fields(self, record: Format) -> dict[str, FieldInfo]:
        """What a filter may compare."""
        if self.how is not None:
            return dict(_HOW_FIELDS)
        fields = {"filename": _text_field()}
        if self.flags is not None:
            fields["flags"] = argument_field(record, self.flags, signed=True)
        if self.mode is not None:
            fields["mode"] = argument_field(record, self.mode, 2)
        return fields


_FOREIGN = (
    ForeignOpen(5, 0, 1, 2),
    ForeignOpen(8, 0, None, 1),  # creat
    ForeignOpen(295, 1, 2, 3),
    ForeignOpen(437, 1, how=2),
)
FOREIGN_TABLE: Table = [When(Kernel("id"), one.number, [("file", one.table())]) for one in _FOREIGN]


_PROGRAMS = {
    "openat": open_program(1, 2, 3),
    "open": open_program(0, 1, 2),
    "creat": open_program(0, None, 1, fixed=_CREAT_FLAGS),
    "openat2": open_program(1, how=2),
}


class FileFamily:
    """Wants for FileEventFilter."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor
        self._tracepoints: dict[tuple[str, str], BulkEvent] = {}
        self._foreign = ForeignCalls(sensor)
        self.ladder = Ladder(
            sensor,
            FAMILY,
            (
                Rung("kprobe", "kprobe on do_sys_openat2", self._by_kprobe),
                Rung("program", "bpf program at the system call", self._by_program),
                Rung(
                    "memory",
                    "the caller's memory, read at once",
                    self._by_memory,
                    "a name may be missing if the caller is quicker",
                ),
            ),
            touch_nothing,
        )
        self._ring = uring.RingRequests(
            sensor,
            BY_RING,
            (
                Rung("program", "bpf program at the request", self._ring_by_program),
                Rung("kprobe", "kprobe on __io_openat_prep", self._ring_by_kprobe),
                Rung(
                    "memory",
                    "the request's tracepoint",
                    self._ring_by_tracepoint,
                    "without names, and not where a filter asks for more than any open",
                ),
            ),
            lambda: uring.make_request(uring.Opcode.OPENAT, -1, b"/.ringside-proof"),
        )

    def mechanisms(self) -> list[Mechanism]:
        """How this kernel serves file events."""
        try:
            rung = self.ladder.reached()
        except UnservableError as error:
            return [Mechanism(FAMILY, False, "none", error.cause)]
        return [Mechanism(FAMILY, True, rung.mechanism, rung.best_effort), *self._ring.mechanisms()]

    def wants(self, request: FileEventFilter, path: str) -> list[BulkWant]:
        """What a filter asks for. RequestError if it makes no sense, UnservableError if no rung works."""
        if request.type != FileEventType.OPEN:
            raise RequestError(f"{path}.type", "must be FILE_EVENT_TYPE_OPEN")
        expression = self._expression(request, path)
        rung = self.ladder.reached()
        note = self._ring.note(rung.best_effort)
        wants = [
            BulkWant.of(FAMILY, event, _settled(expression, event.fields, event.constants), note=note)
            for event in rung.events().values()
        ]
        if rung.name != "kprobe":
            wants += self._foreign_wants(expression, note)
        return wants + self._ring_wants(expression)

    def _ring_wants(self, expression: Expression) -> list[BulkWant]:
        return self._ring.wants(
            lambda rung: [(event, uring.OPENS) for event in rung.events().values()],
            lambda event: _settled(expression, event.fields, {}),
        )

    def _foreign_wants(self, expression: Expression, note: str) -> list[BulkWant]:
        event = self._foreign.event("sys_enter", FOREIGN_TABLE)
        if event is None:
            return []
        wants = []
        for one in _FOREIGN:
            fields = one.fields(event.record)
            chosen = _settled(expression, fields, _creat(one.flags is None))
            if chosen != FALSE:
                wants.append(foreign_want(FAMILY, event, one.number, chosen, fields, note))
        return wants

    def _expression(self, request: FileEventFilter, path: str) -> Expression:
        terms: list[Expression] = []
        if request.filename is not None:
            if not request.filename or len(request.filename.encode("utf-8", "replace")) >= _PATH_MAX:
                raise RequestError(f"{path}.filename", f"must be 1 to {_PATH_MAX - 1} bytes")
            terms.append(Predicate(Op.EQ, "filename", request.filename))
        if request.filename_pattern is not None:
            size = len(request.filename_pattern.encode("utf-8", "replace"))
            if not 1 <= size <= _MAX_PATTERN:
                raise RequestError(f"{path}.filename_pattern", f"{size} bytes; must be 1 to {_MAX_PATTERN}")
            terms.append(Predicate(Op.MATCH, "filename", request.filename_pattern))
        for name, field, mask in (
            ("open_flags_mask", "flags", request.open_flags_mask),
            ("create_mode_mask", "mode", request.create_mode_mask),
        ):
            if mask is not None:
                if mask == 0:
                    raise RequestError(f"{path}.{name}", "is 0, which no open could match")
                terms.append(Predicate(Op.BITS, field, mask & 0xFFFFFFFF))
        return all_of(terms)

    # -- the rungs ---------------------------------------------------------------------------------

    def _by_kprobe(self) -> dict[str, BulkEvent]:
        for symbol, arguments in (
            ("do_sys_openat2", KPROBE_ARGUMENTS),
            ("do_sys_open", OLD_KPROBE_ARGUMENTS),
        ):
            try:
                return {"open": self._probe("open", symbol, arguments)}
            except UnservableError as error:
                problem = error
        raise problem

    def _probe(self, stem: str, symbol: str, arguments: tuple[tuple[str, str], ...]) -> BulkEvent:
        if not self._sensor.features.kprobes or not self._sensor.tracefs.writable:
            raise UnservableError(FAMILY, "no kprobes")
        probes = self._sensor.probes
        try:
            return probes.get(
                probes.kprobe(stem, symbol, arguments),
                lambda record: open_table("", record, Kernel("filename", faulty=True)),
                fields=_faulty_fields,
                exclude=self._sensor.exclude_self(),
            )
        except RequestError as error:
            raise UnservableError(FAMILY, str(error)) from error

    def _by_program(self) -> dict[str, BulkEvent]:
        if ("program", "open") not in self._tracepoints:
            table = open_table("", OPENED, Kernel("filename"))
            self._tracepoints["program", "open"] = program_event(
                self._sensor, FAMILY, OPENED, _PROGRAMS, table
            )
        return {"open": self._tracepoints["program", "open"]}

    def _by_memory(self) -> dict[str, BulkEvent]:
        events = {}
        for call in _CALLS:
            record = self._record(call)
            if record is not None:
                front = Front(Kernel("how"), _HOW) if "how" in record else None
                table = open_table(call, record, _text(_pointer(record), front))
                fields = {**fields_of(record), **(_HOW_FIELDS if front else {"filename": _text_field()})}
                events[call] = self._tracepoint("memory", call, record, table, fields)
        return self._some(events)

    def _ring_by_program(self) -> dict[str, BulkEvent]:
        return self._ring_event(
            "program",
            lambda: uring.request_event(
                self._sensor, uring.open_request, open_table("", OPENED, Kernel("filename"))
            ),
        )

    def _ring_by_kprobe(self) -> dict[str, BulkEvent]:
        how = read_btf().offset("io_open", "how")
        arguments = (
            ("filename", f"+0(+{uring.ADDRESS}($arg2)):ustring"),
            ("flags", f"+{how}($arg1):u64"),
            ("mode", f"+{how + 8}($arg1):u64"),
        )
        return {"open": self._probe("uring", "__io_openat_prep", arguments)}

    def _ring_by_tracepoint(self) -> dict[str, BulkEvent]:
        cases = [
            When(Kernel("opcode"), one, [("file", [("type", FileEventType.OPEN)])]) for one in uring.OPENS
        ]
        return self._ring_event("memory", lambda: uring.bare_event(self._sensor, cases))

    def _ring_event(self, rung: str, make: Callable[[], BulkEvent]) -> dict[str, BulkEvent]:
        if (rung, "io_uring") not in self._tracepoints:
            self._tracepoints[rung, "io_uring"] = make()
        return {"open": self._tracepoints[rung, "io_uring"]}

    def _some(self, events: dict[str, BulkEvent]) -> dict[str, BulkEvent]:
        if not events:
            raise UnservableError(
                FAMILY, "no tracepoints of system calls", "a kernel with CONFIG_FTRACE_SYSCALLS"
            )
        return events

    def _record(self, call: str) -> Format | None:
        try:
            return self._sensor.tracefs.read_format("syscalls", f"sys_enter_{call}")
        except KernelError:
            return None

    def _tracepoint(self, rung: str, call: str, record: Format, table: Table, fields: Fields) -> BulkEvent:
        if (rung, call) not in self._tracepoints:
            event = BulkEvent(
                self._sensor.rings,
                record,
                record.id,
                table,
                exclude=self._sensor.exclude_self(),
                flags=self._sensor.lineage_flag(),
                fields=fields,
            )
            event.constants = _creat(call == "creat")
            self._tracepoints[rung, call] = event
        return self._tracepoints[rung, call]


def _pointer(record: Format) -> str:
    """The field that points at the name: creat calls it pathname."""
    return "filename" if "filename" in record else "pathname"


def _creat(is_it: bool) -> dict[str, int]:
    return {"flags": _CREAT_FLAGS} if is_it else {}


def _settled(expression: Expression, fields: Fields, constants: Mapping[str, int]) -> Expression:
    """The same with what is known beforehand: creat has no flags to compare."""
    match expression:
        case And(terms):
            return all_of(_settled(term, fields, constants) for term in terms)
        case Predicate(Op.BITS, name, mask) if name not in fields:
            return TRUE if constants.get(name, 0) & int(mask) else FALSE
        case Predicate(Op.BITS, "mode") if "flags" in fields:
            return all_of([expression, Predicate(Op.BITS, "flags", _CREATES)])
    return expression


def _faulty_fields(record: Format) -> Fields:
    fields = fields_of(record)
    name = record["filename"]
    fields["filename"] = FieldInfo(FieldKind.DATA_LOC, name.offset, name.size, kernel=name, may_fault=True)
    return fields
