"""Processes: forks, execs, exits. Lifecycle records, so each comes to Python, in the order of time.

What serves them, the same on every kernel since 5.10:

- task:task_newtask tells a fork, and by its clone flags a process from a thread.
- sched:sched_process_exec tells an exec. A bpf program there reads the command line in the kernel. Where none
  is permitted, the sample brings the top of the new program's stack, where the kernel has just put argc, argv
  and the strings (fs/binfmt_elf.c, create_elf_tables), so that the command line is mostly there however short
  the program lives. Between the pointers and the strings lies a gap of random size, and a page of it that was
  never touched ends the sample early: then the courier reads the strings from the process's memory, at an
  address that no other program of that process has them at.
- sched:sched_process_exit tells that a thread is gone, since 6.16 also whether it was the last; before,
  threads are counted.
- The exit status comes from a bpf program there, from a kprobe on do_exit or from the proc connector.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ringside.api.v0 import Event, ProcessEventFilter, ProcessEventType

from .. import wire
from .._perf import ffi, lib
from ..bpf import Attachment, Program
from ..btf import Btf, read_btf
from ..engine import clock
from ..errors import RequestError, UnservableError
from ..exits import ExitConnector
from ..glob import glob_match
from ..history import History
from ..perf import KernelEvent, Lane, ProgramEvent
from ..plan import FetchKind, FetchSpec
from ..process import Process
from ..tracefs.format import Format
from ..tracefs.probe import Probe, create
from . import Mechanism
from .process_facts import EXEC, EXIT, FORK, Facts, body_of
from .process_programs import EXECUTED, EXITED, exec_program, exit_program
from .process_ways import Proof, Reached, Way

if TYPE_CHECKING:
    from ..sensor import Sensor

FAMILY = "processes"
_CLONE_THREAD = 0x00010000
_CLONE_INTO_CGROUP = 0x200000000  # clone3(2), 5.7
_STACK = 12 << 10  # bytes: pointers, the gap of up to 8 KiB, and the first strings
_LONGEST = 2 << 20  # bytes of a command line that is kept
_MAX_PATTERN = 4096
_PATIENCE = 20_000_000  # ns that what a program has told may take to be read
_PENDING = 20_000_000  # ns that an exit waits for its status
_PATH_MAX = 4096
_MOST_CODES = 4096

RESULT = 0
WAIT = 1


class Layout:
    """Reads some integer fields of a record, all at once."""

    def __init__(self, record: Format, *names: str) -> None:
        chosen = sorted((record[name] for name in names), key=lambda one: one.offset)
        text, at = "=", 0
        for one in chosen:
            code = {1: "b", 2: "h", 4: "i", 8: "q"}[one.size]
            text += f"{one.offset - at}x" + (code if one.signed else code.upper())
            at = one.offset + one.size
        if [one.name for one in chosen] != list(names):
            raise ValueError(f"{record.name}: {', '.join(names)} are not in the order of the record")
        self.read = struct.Struct(text).unpack_from


def text_at(raw: Any, offset: int, length: int) -> bytes:
    """A NUL-terminated text of at most so many bytes."""
    text: bytes = raw[offset : offset + length]
    return text.split(b"\0", 1)[0]


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

    def accepts(self, facts: Facts) -> bool:
        """True if an event of its type that says this is wanted."""
        return (
            (self.filename is None or facts[1] == self.filename)
            and (self.pattern is None or glob_match(self.pattern, facts[1]))
            and (self.code is None or facts[1] == self.code)
        )


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
        # looked up by name once, not for each record
        self._forks, self._execs, self._exits = (self.listeners[kind] for kind in (FORK, EXEC, EXIT))
        self.history = History(sensor.config.history_size)
        self.connector: ExitConnector | None = None
        self._exit_probe: Probe | None = None
        self._codes: dict[int, int] = {}
        self._untold = 0 if sensor.config.include_self else sensor.pid  # whose events nobody gets
        tracefs = sensor.tracefs
        newtask = tracefs.read_format("task", "task_newtask")
        executed = tracefs.read_format("sched", "sched_process_exec")
        exited = tracefs.read_format("sched", "sched_process_exit")
        renamed = tracefs.read_format("task", "task_rename")
        self._newtask = Layout(newtask, "pid", "clone_flags")
        self._newtask_comm = newtask["comm"].offset
        self._filename = Layout(executed, "filename")
        self._group_dead = "group_dead" in exited
        self._exited = Layout(exited, "group_dead") if self._group_dead else None
        self._renamed = Layout(renamed, "pid") if "pid" in renamed else None  # else it is the caller itself
        self._renamed_comm = renamed["newcomm"].offset
        self._records = {"newtask": newtask, "exec": executed, "exit": exited, "rename": renamed}
        self._told_exec = Layout(EXECUTED, "address", "length", "filename", "arguments")
        self._told_exit = Layout(EXITED, "code")
        self._btf: Btf | None = None
        self._opened: list[KernelEvent] = []

    # -- service -----------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin to follow processes."""
        config = self._sensor.config
        self.follow(
            self._records["newtask"],
            self._on_newtask,
            f"!(clone_flags & {_CLONE_THREAD})" if self._group_dead else None,
        )
        self.follow(self._records["rename"], self._on_rename)
        self._exec = Reached(
            (
                Way("program", "bpf program at the exec", self._load_exec),
                Way(
                    "stack",
                    "the new program's stack, in the exec's sample, or read at once",
                    self._sample_stack,
                ),
            ),
            config.mechanism,
        )
        self._exit = Reached(
            (
                Way("program", "bpf program at the exit", self._load_exit),
                Way("kprobe", "kprobe on do_exit", self._probe_exits),
                Way("connector", "proc connector", self._connect),
            ),
            config.mechanism,
        )
        if self._exit.name != "program":
            self.follow(self._records["exit"], self._on_exit, "group_dead == 1" if self._group_dead else None)

    # -- ways to the command line and the exit status -----------------------------------------------

    def _load_exec(self) -> None:
        def is_it(raw: Any, proof: Proof) -> bool:
            return self._read_exec(raw)[1].split(b"\0")[:-1] == proof.arguments

        self._follow_program("exec", exec_program, self._on_exec_told, is_it, caller=True)

    def _load_exit(self) -> None:
        def is_it(raw: Any, proof: Proof) -> bool:
            code: int = self._told_exit.read(raw)[0]
            return code == proof.status

        self._follow_program("exit", exit_program, self._on_exit_told, is_it)

    def _sample_stack(self) -> None:
        self.follow(self._records["exec"], self._on_exec, None, FetchSpec(FetchKind.ARGUMENTS))

    def _follow_program(
        self,
        name: str,
        make: Callable[[Btf, Format], Program],
        handler: Callable[[], int],
        is_it: Callable[[Any, Proof], bool],
        *,
        caller: bool = False,
    ) -> None:
        """Have what a bpf program at a tracepoint tells handled, once it has told of a program of ours."""
        sensor, record = self._sensor, self._records[name]
        if self._btf is None:
            self._btf = read_btf()
        attachment = Attachment(record.id, make(self._btf, record))
        source = self._engine.open_source(lib.RS_LIFECYCLE | (lib.RS_CALLER if caller else 0))
        event = ProgramEvent(
            sensor.rings, record.name, lambda _: [attachment], source, Lane.LIFECYCLE, caller=caller
        )
        event.open()
        try:
            self._prove(event, is_it)
        except BaseException:
            event.close()
            raise
        self.handlers[source] = handler
        self._opened.append(event)

    def _prove(self, event: ProgramEvent, is_it: Callable[[Any, Proof], bool]) -> None:
        """Nothing is known of any process yet, so whatever else is in the rings may be passed over."""
        proof = Proof.run()
        stop = self._engine.stop
        until = clock() + _PATIENCE
        while True:
            why = self._engine.drain(0)
            if why == lib.RS_RECORD and stop.source == event.source and stop.pid == proof.pid:
                if is_it(ffi.buffer(stop.raw, stop.raw_length), proof):
                    return
            elif why == lib.RS_DONE and clock() > until:
                raise UnservableError(FAMILY, "it was set up, but did not tell of a program of our own")

    def _probe_exits(self) -> None:
        sensor = self._sensor
        if not sensor.features.kprobes or not sensor.tracefs.writable:
            raise UnservableError(FAMILY, "no kprobes")
        spec = sensor.probes.kprobe("exit", "do_exit", (("code", "$arg1:s64"),))
        self._exit_probe = create(sensor.tracefs, spec, proc=sensor.config.proc)
        record = self._exit_probe.read_format()
        self._code = Layout(record, "code")
        self.follow(record, self._on_exit_code)
        sensor.rings.watch_closing(self._exit_probe.close)

    def _connect(self) -> None:
        self.connector = ExitConnector()

    def _on_exit_code(self) -> int:
        stop = self._engine.stop
        self._codes[stop.tid] = self._code.read(ffi.buffer(stop.raw, stop.raw_length))[0] & 0xFFFF
        if len(self._codes) > _MOST_CODES:  # threads whose exit was lost
            del self._codes[next(iter(self._codes))]
        return RESULT

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
            cgroup=bool(fetch and fetch.kind is FetchKind.ARGUMENTS),
            fetches=(fetch,) if fetch else (),
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

    def read_exits(self) -> None:
        """Take in what the proc connector has, so that there is room when an exit's status is wanted."""
        if self.connector is not None:
            self.connector.read()

    def mechanisms(self) -> list[Mechanism]:
        """How this kernel serves process events."""
        last = "told by the kernel" if self._group_dead else "threads counted"
        return [
            Mechanism(
                FAMILY, True, "task_newtask, sched_process_exec and sched_process_exit tracepoints", last
            ),
            Mechanism("command lines", True, self._exec.mechanism, self._exec.note),
            Mechanism(
                "exit status",
                bool(self._exit.mechanism),
                self._exit.mechanism or "none",
                self._exit.note,
                ""
                if self._exit.mechanism
                else "CAP_BPF and CAP_PERFMON, or the host's network namespace and CAP_NET_ADMIN,"
                " or a kernel with kprobes",
            ),
        ]

    def wants(self, request: ProcessEventFilter, path: str) -> list[ProcessWant]:
        """What a filter asks for. RequestError if it makes no sense."""
        if request.type not in self.listeners:
            raise RequestError(
                f"{path}.type",
                "must be PROCESS_EVENT_TYPE_FORK, PROCESS_EVENT_TYPE_EXEC or PROCESS_EVENT_TYPE_EXIT",
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
        if want.code is not None and not self._exit.mechanism:
            raise UnservableError(FAMILY, "the exit status is not known here", self._exit.note)
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
        if (
            parent is None or pid <= 0
        ):  # the idle task forks init; a CPU that comes up gets an idle task, pid 0
            return RESULT
        child = self._table.forked(stop.time, parent, pid, text_at(raw, self._newtask_comm, 16))
        if flags & _CLONE_INTO_CGROUP:
            self._sensor.container_family.place(child)
        self._tell(self._forks, parent, (FORK, pid, child.id))
        return RESULT

    def _on_exec(self) -> int:
        stop = self._engine.stop
        raw = ffi.buffer(stop.raw, stop.raw_length)
        word = self._filename.read(raw)[0] & 0xFFFFFFFF
        filename = text_at(raw, word & 0xFFFF, word >> 16)
        self._executed(filename, self._sampled_arguments())
        return RESULT

    def _on_exec_told(self) -> int:
        stop = self._engine.stop
        self._executed(*self._read_exec(ffi.buffer(stop.raw, stop.raw_length)))
        return RESULT

    def _read_exec(self, raw: Any) -> tuple[bytes, bytes]:
        """File name and command line that the bpf program has told."""
        address, length, name, line = self._told_exec.read(raw)
        at = name & 0xFFFF
        filename: bytes = raw[at : at + (name >> 16) - 1]
        at = line & 0xFFFF
        text: bytes = raw[at : at + (line >> 16)]
        if len(text) < length:  # longer than a record can be, or not present just then
            text = self._read_on(address, length, text)
        return filename, text

    def _executed(self, filename: bytes, arguments: bytes) -> None:
        stop = self._engine.stop
        process = self._table.get(stop.pid)
        foreign = stop.abi == 1
        if foreign != process.foreign:
            process.foreign = foreign
            self._table.publish(process)
        if not self._group_dead and stop.time > process.counted_at:
            process.threads = 1
        self._sensor.container_family.executed(process, stop.cgroup)
        text = len(filename) + len(arguments)
        self._tell(self._execs, process, (EXEC, filename, arguments), text)

    def _sampled_arguments(self) -> bytes:
        """The command line of the program whose exec is at hand; empty if it could not be had."""
        stop = self._engine.stop
        text = bytes(ffi.buffer(stop.memory, stop.memory_length)) if stop.memory_length else b""
        if not stop.complete and stop.argc:  # longer than a record can be
            text = self._read_on(stop.address, _LONGEST, text)
        found = text.split(b"\0", stop.argc)
        return b"".join([one + b"\0" for one in found[: stop.argc]]) if len(found) > stop.argc else text

    def _read_on(self, address: int, length: int, known: bytes) -> bytes:
        """A command line from the memory of its process, if that still runs; else what is known of it."""
        length = min(length, _LONGEST)
        buffer = bytearray(length)
        read = lib.rs_read_memory(self._engine.stop.pid, address, ffi.from_buffer(buffer), length)
        return bytes(buffer[:read]) if read > len(known) else known

    def _on_exit(self) -> int:
        stop = self._engine.stop
        if self._exited is not None and not self._exited.read(ffi.buffer(stop.raw, stop.raw_length))[0]:
            return RESULT  # a thread; the kernel's filter leaves these out, if it could be set
        process = self._last_thread()
        if process is None:
            return RESULT
        code = self._codes.pop(stop.tid, None)
        wanted = self._exits or process.container
        if code is None and self.connector is not None and wanted:
            code = self.connector.take(stop.tid, stop.time)
            if code is None:
                self.connector.read()
                code = self.connector.take(stop.tid, stop.time)
            if code is None and not self._sensor.waited_for(stop.time + _PENDING):
                if not self._group_dead:
                    process.threads += 1  # this record comes again
                return WAIT
        self._exit_of(process, code)
        return RESULT

    def _on_exit_told(self) -> int:
        stop = self._engine.stop
        process = self._last_thread()
        if process is not None:
            self._exit_of(process, self._told_exit.read(ffi.buffer(stop.raw, stop.raw_length))[0])
        return RESULT

    def _last_thread(self) -> Process | None:
        """The process that is gone with the thread at hand; None if others of it are left."""
        stop = self._engine.stop
        process = self._table.get(stop.pid)
        if not self._group_dead:
            if not process.alive or stop.time <= process.counted_at:
                return None
            process.threads -= 1
            if process.threads > 0:
                return None
        return process

    def _exit_of(self, process: Process, code: int | None) -> None:
        if code is not None and process.container:
            self._sensor.container_family.process_exited(process, code)
        self._tell(self._exits, process, (EXIT, code, None))
        self._table.exited(self._engine.stop.time, process)

    def _on_rename(self) -> int:
        stop = self._engine.stop
        raw = ffi.buffer(stop.raw, stop.raw_length)
        tid = self._renamed.read(raw)[0] if self._renamed is not None else stop.tid
        process = self._table.by_pid.get(tid)
        if process is not None and process.alive:
            self._table.renamed(process, text_at(raw, self._renamed_comm, 16))
        return RESULT

    def _tell(
        self, listeners: list[tuple[int, ProcessWant]], process: Process, facts: Facts, text: int = 0
    ) -> None:
        """An event of this process, to whom it may interest, now or later."""
        stop = self._engine.stop
        when, cpu, tid = stop.time, stop.cpu, stop.tid
        if process.pid != self._untold:
            self.history.add((when, cpu, tid, process, facts), text)
        outputs = [output for output, want in listeners if want.accepts(facts)] if listeners else None
        if outputs:
            body = process.lineage_field() + body_of(facts)
            self._engine.emit(outputs, when, body, cpu, process.pid, tid)

    def replay(self, output: int, since: int) -> None:
        """Tell an output what happened since then (CLOCK_MONOTONIC_RAW ns), as far as it is remembered."""
        wants = [
            want for listeners in self.listeners.values() for number, want in listeners if number == output
        ]
        fields = wire.fields(Event)
        for when, cpu, tid, process, facts in self.history.since_time(since):
            if any(want.type == facts[0] and want.accepts(facts) for want in wants):
                before, behind = self._table.containers.get(process.container, (b"", b""))
                body = b"".join(
                    (
                        self._table.head_of(process),
                        before,
                        process.lineage_field(),
                        body_of(facts),
                        behind,
                        fields["process_tid"].encode(tid),
                        fields["cpu"].encode(cpu),
                    )
                )
                self._engine.emit([output], when, body, container=process.container)
