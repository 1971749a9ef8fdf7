"""Processes: forks, execs, exits. Lifecycle records, so each comes to Python, in the order of time.

What serves them, the same on every kernel since 5.10:

- task:task_newtask tells a fork, and by its clone flags a process from a thread.
- sched:sched_process_exec tells an exec. Its sample brings the top of the new program's stack, where the
  kernel has just put argc, argv and the strings (fs/binfmt_elf.c, create_elf_tables), so that the command
  line is mostly there however short the program lives. Between the pointers and the strings lies a gap of
  random size, and a page of it that was never touched ends the sample early: then the courier reads the
  strings from the process's memory, at an address that no other program of that process has them at.
- sched:sched_process_exit tells that a thread is gone, since 6.16 also whether it was the last; before,
  threads are counted.
- The exit status comes from a kprobe on do_exit or from the proc connector.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ringside.api.v0 import Event, ProcessEvent, ProcessEventFilter, ProcessEventType

from .. import wire
from .._perf import ffi, lib
from ..errors import RequestError, UnservableError
from ..exits import ExitConnector
from ..glob import glob_match
from ..perf import KernelEvent, Lane
from ..plan import FetchKind, FetchSpec
from ..process import Process
from ..tracefs.format import Format
from . import Mechanism

if TYPE_CHECKING:
    from ..sensor import Sensor

FAMILY = "processes"
_CLONE_THREAD = 0x00010000
_STACK = 12 << 10  # bytes: pointers, the gap of up to 8 KiB, and the first strings
_LONGEST = 2 << 20  # bytes of a command line that is kept
_MAX_PATTERN = 4096
_PENDING = 20_000_000  # ns that an exit waits for its status
_PATH_MAX = 4096

RESULT = 0
WAIT = 1


class Layout:
    """Reads some integer and text fields of a record at their offsets."""

    def __init__(self, record: Format, *names: str) -> None:
        self._readers: list[tuple[str, struct.Struct, int]] = []
        for name in names:
            found = record[name]
            code = {1: "b", 2: "h", 4: "i", 8: "q"}[found.size]
            self._readers.append((name, struct.Struct("=" + (code if found.signed else code.upper())), found.offset))

    def read(self, raw: Any) -> list[int]:
        """The fields' values, in the order of their names."""
        return [reader.unpack_from(raw, offset)[0] for _, reader, offset in self._readers]


def text_at(raw: Any, offset: int, length: int) -> bytes:
    """A NUL-terminated text of at most so many bytes."""
    return bytes(raw[offset : offset + length]).split(b"\0", 1)[0]


@dataclass(eq=False)
class ProcessWant:
    """Process events of one type, of which a predicate accepts the event's own fields."""

    events: ProcessFamily
    type: ProcessEventType
    filename: bytes | None = None
    pattern: bytes | None = None
    code: int | None = None
    family: str = field(default=FAMILY)

    def attach(self, output: int) -> int:
        """Have them come to the output."""
        self.events.listeners[self.type].append((output, self))
        return 0

    def detach(self, output: int) -> None:
        """No more."""
        listeners = self.events.listeners[self.type]
        if (output, self) in listeners:
            listeners.remove((output, self))

    def accepts_exec(self, filename: bytes) -> bool:
        """True if an exec of this file is wanted."""
        return (self.filename is None or filename == self.filename) and (
            self.pattern is None or glob_match(self.pattern, filename)
        )

    def accepts_exit(self, code: int | None) -> bool:
        """True if an exit with this raw status is wanted; an unknown one only if any is."""
        return self.code is None or code == self.code


class ProcessFamily:
    """Opens the lifecycle events, keeps the process table by them, and tells subscribers."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor
        self._table = sensor.processes
        self._engine = sensor.engine
        self.listeners: dict[ProcessEventType, list[tuple[int, ProcessWant]]] = {
            kind: [] for kind in ProcessEventType if kind
        }
        self.handlers: dict[int, Callable[[], int]] = {}
        self.connector: ExitConnector | None = None
        self._exit_note = ""
        self._waiting_since = 0
        self._codes: dict[int, int] = {}
        tracefs = sensor.tracefs
        newtask = tracefs.read_format("task", "task_newtask")
        executed = tracefs.read_format("sched", "sched_process_exec")
        exited = tracefs.read_format("sched", "sched_process_exit")
        renamed = tracefs.read_format("task", "task_rename")
        self._newtask = Layout(newtask, "pid", "clone_flags")
        self._newtask_comm = newtask["comm"].offset
        self._filename = Layout(executed, "filename")
        self._group_dead = "group_dead" in exited
        self._renamed = Layout(renamed, *(["pid"] if "pid" in renamed else []))
        self._renamed_comm = renamed["newcomm"].offset
        processes_only = f"!(clone_flags & {_CLONE_THREAD})" if self._group_dead else None
        self._events = [
            (newtask, self._on_newtask, processes_only, None),
            (executed, self._on_exec, None, FetchSpec(FetchKind.ARGUMENTS)),
            (exited, self._on_exit, "group_dead == 1" if self._group_dead else None, None),
            (renamed, self._on_rename, None, None),
        ]
        self._opened: list[KernelEvent] = []

    # -- service -----------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin to follow processes."""
        for record, handler, filter_text, fetch in self._events:
            self.follow(record, handler, filter_text, fetch)
        try:
            self.connector = ExitConnector()
        except UnservableError as error:
            self._exit_note = str(error)

    def follow(
        self,
        record: Format,
        handler: Callable[[], int],
        filter_text: str | None = None,
        fetch: FetchSpec | None = None,
    ) -> KernelEvent:
        """Have a lifecycle event's records handled."""
        source = self._engine.open_source(lib.RS_LIFECYCLE | (lib.RS_FETCHED if fetch else 0))
        event = KernelEvent(
            self._sensor.rings,
            record.name,
            record.id,
            source,
            Lane.PROMPT if fetch else Lane.LIFECYCLE,
            stack_size=_STACK if fetch and fetch.kind is FetchKind.ARGUMENTS else 0,
            fetch=fetch,
        )
        try:
            event.open(filter_text)
        except UnservableError:
            if filter_text is None:
                raise
            event.open(None)  # the handlers check for themselves
        self.handlers[source] = handler
        self._opened.append(event)
        return event

    def close(self) -> None:
        """Stop; idempotent."""
        for event in self._opened:
            event.close()
        self._opened.clear()
        if self.connector is not None:
            self.connector.close()
            self.connector = None

    def mechanisms(self) -> list[Mechanism]:
        """How this kernel serves process events."""
        last = "told by the kernel" if self._group_dead else "threads counted"
        return [
            Mechanism(FAMILY, True, "task_newtask, sched_process_exec and sched_process_exit tracepoints", last),
            Mechanism("command lines", True, "the new program's stack, in the exec's sample", "or read at once"),
            Mechanism(
                "exit status",
                self.connector is not None,
                "proc connector" if self.connector is not None else "none",
                self._exit_note,
                "" if self.connector is not None else "CAP_NET_ADMIN and CONFIG_PROC_EVENTS, or a kernel with kprobes",
            ),
        ]

    def wants(self, request: ProcessEventFilter, path: str) -> list[ProcessWant]:
        """What a filter asks for. RequestError if it makes no sense."""
        if request.type not in self.listeners:
            raise RequestError(
                f"{path}.type", "must be PROCESS_EVENT_TYPE_FORK, PROCESS_EVENT_TYPE_EXEC or PROCESS_EVENT_TYPE_EXIT"
            )
        for name, kind in (
            ("exec_filename", ProcessEventType.EXEC),
            ("exec_filename_pattern", ProcessEventType.EXEC),
            ("exit_code", ProcessEventType.EXIT),
        ):
            if getattr(request, name) is not None and request.type != kind:
                raise RequestError(f"{path}.{name}", f"goes with PROCESS_EVENT_TYPE_{kind.name} only")
        want = ProcessWant(self, request.type)
        if request.exec_filename is not None:
            want.filename = request.exec_filename.encode("utf-8", "surrogateescape")
            if len(want.filename) > _PATH_MAX:
                raise RequestError(f"{path}.exec_filename", f"longer than {_PATH_MAX} bytes, no path can be")
        if request.exec_filename_pattern is not None:
            want.pattern = request.exec_filename_pattern.encode("utf-8", "surrogateescape")
            if len(want.pattern) > _MAX_PATTERN:
                raise RequestError(f"{path}.exec_filename_pattern", f"longer than {_MAX_PATTERN} bytes")
        want.code = request.exit_code
        if want.code is not None and self.connector is None:
            raise UnservableError(FAMILY, "the exit status is not known here", self._exit_note)
        return [want]

    # -- records -----------------------------------------------------------------------------------

    def _on_newtask(self) -> int:
        stop = self._engine.stop
        raw = ffi.buffer(stop.raw, stop.raw_length)
        pid, flags = self._newtask.read(raw)
        parent = self._table.get(stop.pid) if stop.pid > 0 else None
        if flags & _CLONE_THREAD:
            if parent is not None and not self._group_dead and stop.time > parent.counted_at:
                parent.threads += 1
            return RESULT
        if parent is None:  # the idle task forks init, and CPUs their threads
            return RESULT
        child = self._table.forked(stop.time, parent, pid, text_at(raw, self._newtask_comm, 16))
        listeners = self.listeners[ProcessEventType.FORK]
        if listeners:
            body = wire.encode(
                ProcessEvent, type=ProcessEventType.FORK, fork_child_pid=pid, fork_child_id=child.id
            )
            self._emit([output for output, _ in listeners], parent, body)
        return RESULT

    def _on_exec(self) -> int:
        stop = self._engine.stop
        raw = ffi.buffer(stop.raw, stop.raw_length)
        word = self._filename.read(raw)[0] & 0xFFFFFFFF
        filename = text_at(raw, word & 0xFFFF, word >> 16)
        process = self._table.get(stop.pid)
        foreign = stop.abi == 1
        if foreign != process.foreign:
            process.foreign = foreign
            self._table.publish(process)
        if not self._group_dead and stop.time > process.counted_at:
            process.threads = 1
        outputs = [
            output for output, want in self.listeners[ProcessEventType.EXEC] if want.accepts_exec(filename)
        ]
        if outputs:
            body = wire.encode(
                ProcessEvent,
                type=ProcessEventType.EXEC,
                exec_filename=filename,
                exec_command_line=self._arguments(),
            )
            self._emit(outputs, process, body)
        return RESULT

    def _arguments(self) -> list[bytes]:
        """The command line of the program whose exec is at hand; empty if it could not be had."""
        stop = self._engine.stop
        text = bytes(ffi.buffer(stop.memory, stop.memory_length)) if stop.memory_length else b""
        if not stop.complete and stop.argc:  # longer than a record can be; the program may still be there
            buffer = bytearray(_LONGEST)
            read = lib.rs_read_memory(stop.pid, stop.address, ffi.from_buffer(buffer), _LONGEST)
            text = bytes(buffer[:read]) if read > len(text) else text
        found = text.split(b"\0", stop.argc)
        return found[: stop.argc] if len(found) > stop.argc else found[:-1]

    def _on_exit(self) -> int:
        stop = self._engine.stop
        process = self._table.get(stop.pid)
        if not self._group_dead:
            if not process.alive or stop.time <= process.counted_at:
                return RESULT
            process.threads -= 1
            if process.threads > 0:
                return RESULT
        code = None
        if self.connector is not None and self.listeners[ProcessEventType.EXIT]:
            code = self.connector.take(stop.tid)
            if code is None:
                self.connector.read()
                code = self.connector.take(stop.tid)
            if code is None and not self._sensor.waited_for(stop.time + _PENDING):
                if not self._group_dead:
                    process.threads += 1  # this record comes again
                return WAIT
        outputs = [output for output, want in self.listeners[ProcessEventType.EXIT] if want.accepts_exit(code)]
        if outputs:
            values: dict[str, int | bool] = {"type": ProcessEventType.EXIT}
            if code is not None:
                values["exit_code"] = code
                values["exit_status"] = code >> 8 & 0xFF
                values["exit_signal"] = code & 0x7F
                values["exit_core_dumped"] = bool(code & 0x80)
            self._emit(outputs, process, wire.encode(ProcessEvent, **values))
        self._table.exited(stop.time, process)
        return RESULT

    def _on_rename(self) -> int:
        stop = self._engine.stop
        raw = ffi.buffer(stop.raw, stop.raw_length)
        fields = self._renamed.read(raw)
        tid = fields[0] if fields else stop.tid
        process = self._table.by_pid.get(tid)
        if process is not None and process.alive:
            process.rename(text_at(raw, self._renamed_comm, 16))
        return RESULT

    def _emit(self, outputs: list[int], process: Process, body: bytes) -> None:
        stop = self._engine.stop
        lineage = process.lineage_field()
        self._engine.emit(
            outputs, stop.time, lineage + wire.nest(Event, "process", body), stop.cpu, stop.pid, stop.tid
        )
