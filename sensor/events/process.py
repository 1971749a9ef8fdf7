"""Processes: forks, execs, exits. C handles their records and makes facts of them, and events of the facts.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ringside.api.v0 import Event, ProcessEventFilter, ProcessEventType

from .._perf import ffi, lib
from ..bpf import Attachment, Program
from ..btf import Btf, read_btf
from ..engine import Engine, Route, clock
from ..errors import RequestError, UnservableError
from ..exits import ExitConnector
from ..expression import Expression, Op, Predicate, all_of, to_bytes
from ..perf import KernelEvent, Lane, ProgramEvent
from ..plan import FetchKind, FetchSpec, Table, compile_plan
from ..program import Test, compile_program, fields_of
from ..tracefs.format import Format
from ..tracefs.probe import Probe, create
from . import Mechanism
from .process_facts import EXEC, EXIT, FACTS, FORK, TABLES
from .process_programs import EXECUTED, EXITED, exec_program, exit_program
from .process_ways import Proof, Reached, Way

if TYPE_CHECKING:
    from ..sensor import Sensor

FAMILY = "processes"
_CLONE_THREAD = 0x00010000
_STACK = 12 << 10  # bytes: pointers, the gap of up to 8 KiB, and the first strings
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


def _offset(record: Format, name: str) -> int:
    return record[name].offset if name in record else 0


class Follow(NamedTuple):
    """What a record says, for C (RS_ON_*): which events it makes, and the fields that say it."""

    what: int
    kind: ProcessEventType | None
    fields: tuple[str, ...]


class ProcessEvents:
    """Process events of one type: what C makes of their facts, and who gets it."""

    def __init__(self, engine: Engine, table: Table) -> None:
        self._engine = engine
        self.source = engine.open_source(lib.RS_LINEAGE, compile_plan(Event, table, FACTS))
        self._wants: list[tuple[int, ProcessWant]] = []

    @property
    def is_wanted(self) -> bool:
        """True while somebody wants them."""
        return bool(self._wants)

    def add(self, output: int, *wants: ProcessWant) -> int:
        """Have what these accept come to the output."""
        self._wants.extend((output, want) for want in wants)
        self._route()
        return 0

    def remove(self, output: int, *wants: ProcessWant) -> None:
        """No more."""
        gone = {(output, want) for want in wants}
        self._wants = [one for one in self._wants if one not in gone]
        self._route()

    def _route(self) -> None:
        self._engine.route(self.source, [Route(output, None, want.tests) for output, want in self._wants])


@dataclass(frozen=True, eq=False)
class ProcessWant:
    """Process events of one type, of which the tests accept the facts."""

    event: ProcessEvents
    tests: tuple[Test, ...] = ()
    family: str = FAMILY

    def attach(self, output: int) -> int:
        """Have them come to the output."""
        return self.event.add(output, self)

    def detach(self, output: int) -> None:
        """No more."""
        self.event.remove(output, self)


class ProcessFamily:
    """Opens the lifecycle events, keeps the process table by them, and tells subscribers."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor
        self._table = sensor.processes
        self._engine = sensor.engine
        self.handlers: dict[int, Callable[[], int]] = {}
        self.events = {kind: ProcessEvents(self._engine, table) for kind, table in TABLES.items()}
        self.connector: ExitConnector | None = None
        self._exit_probe: Probe | None = None
        self._codes: dict[int, int] = {}
        tracefs = sensor.tracefs
        newtask = tracefs.read_format("task", "task_newtask")
        executed = tracefs.read_format("sched", "sched_process_exec")
        exited = tracefs.read_format("sched", "sched_process_exit")
        renamed = tracefs.read_format("task", "task_rename")
        self._newtask = Layout(newtask, "pid", "clone_flags")
        self._group_dead = "group_dead" in exited
        self._records = {"newtask": newtask, "exec": executed, "exit": exited, "rename": renamed}
        self._told_exec = Layout(EXECUTED, "length", "arguments")
        self._told_exit = Layout(EXITED, "code")
        self._followed: list[tuple[int, Format, Follow]] = []
        self._btf: Btf | None = None
        self._opened: list[KernelEvent] = []

    # -- service -----------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin to follow processes."""
        config, family = self._sensor.config, self._sensor.container_family
        self._engine.set_life(
            boot=self._table.boot,
            proc=config.proc,
            history=config.history_size,
            threads_counted=not self._group_dead,
            cgroups_told=family.cgroups_told,
            untold=0 if config.include_self else self._sensor.pid,
        )
        self.follow(
            self._records["newtask"],
            self._on_placed,
            f"!(clone_flags & {_CLONE_THREAD})" if self._group_dead else None,
            how=Follow(lib.RS_ON_FORK, FORK, ("pid", "clone_flags", "comm")),
        )
        self.follow(self._records["rename"], how=Follow(lib.RS_ON_RENAME, None, ("pid", "newcomm")))
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
            self.follow(
                self._records["exit"],
                self._on_exit,
                "group_dead == 1" if self._group_dead else None,
                how=Follow(lib.RS_ON_EXIT, EXIT, ("group_dead",)),
            )
        for source, record, how in self._followed:  # not before: nobody was known while the ways were tried
            facts = 0 if how.kind is None else self.events[how.kind].source
            self._engine.follow(source, how.what, facts, [_offset(record, name) for name in how.fields])

    # -- ways to the command line and the exit status -----------------------------------------------

    def _load_exec(self) -> None:
        def is_it(raw: Any, proof: Proof) -> bool:
            length, word = self._told_exec.read(raw)
            text: bytes = raw[word & 0xFFFF : (word & 0xFFFF) + length]
            return text.split(b"\0")[:-1] == proof.arguments

        how = Follow(lib.RS_ON_EXEC_TOLD, EXEC, ("filename", "address", "length", "arguments"))
        self._follow_program("exec", exec_program, EXECUTED, how, is_it, caller=True)

    def _load_exit(self) -> None:
        def is_it(raw: Any, proof: Proof) -> bool:
            code: int = self._told_exit.read(raw)[0]
            return code == proof.status

        how = Follow(lib.RS_ON_EXIT_TOLD, EXIT, ("code",))
        self._follow_program("exit", exit_program, EXITED, how, is_it, handler=self._on_exit_told)

    def _sample_stack(self) -> None:
        fetch = FetchSpec(FetchKind.ARGUMENTS)
        self.follow(self._records["exec"], fetch=fetch, how=Follow(lib.RS_ON_EXEC, EXEC, ("filename",)))

    def _follow_program(
        self,
        name: str,
        make: Callable[[Btf, Format], Program],
        told: Format,
        how: Follow,
        is_it: Callable[[Any, Proof], bool],
        *,
        handler: Callable[[], int] | None = None,
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
        self._take_up(source, told, event, handler, how)

    def _take_up(
        self,
        source: int,
        record: Format,
        event: KernelEvent,
        handler: Callable[[], int] | None,
        how: Follow | None,
    ) -> None:
        if handler is not None:
            self.handlers[source] = handler
        if how is not None:
            self._followed.append((source, record, how))
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
        handler: Callable[[], int] | None = None,
        filter_text: str | None = None,
        *,
        fetch: FetchSpec | None = None,
        how: Follow | None = None,
    ) -> KernelEvent:
        """Have a lifecycle event's records handled: by C, if it is said how, and else by the handler."""
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
            event.open(None)  # who handles them looks for himself
        self._take_up(source, record, event, handler, how)
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
        if request.type not in self.events:
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
        accepted: list[Expression] = []
        if request.exec_filename is not None:
            if len(to_bytes(request.exec_filename)) > _PATH_MAX:
                raise RequestError(f"{path}.exec_filename", f"longer than {_PATH_MAX} bytes, no path can be")
            accepted.append(Predicate(Op.EQ, "filename", request.exec_filename))
        if request.exec_filename_pattern is not None:
            if len(to_bytes(request.exec_filename_pattern)) > _MAX_PATTERN:
                raise RequestError(f"{path}.exec_filename_pattern", f"longer than {_MAX_PATTERN} bytes")
            accepted.append(Predicate(Op.MATCH, "filename", request.exec_filename_pattern))
        if request.exit_code is not None:
            if not self._exit.mechanism:
                raise UnservableError(FAMILY, "the exit status is not known here", self._exit.note)
            accepted += [Predicate(Op.EQ, "known", 1), Predicate(Op.EQ, "code", request.exit_code)]
        tests = compile_program(all_of(accepted), fields_of(FACTS))
        return [ProcessWant(self.events[request.type], tests)]

    # -- records that C leaves to Python -----------------------------------------------------------

    def _on_placed(self) -> int:
        """A process was made in a cgroup that its parent is not in."""
        stop = self._engine.stop
        child = self._table.find(self._newtask.read(ffi.buffer(stop.raw, stop.raw_length))[0])
        if child is not None:
            self._sensor.container_family.place(child)
        return RESULT

    def _on_exit(self) -> int:
        """The last thread of a process is gone: how did it end?"""
        stop = self._engine.stop
        code = self._codes.pop(stop.tid, None)
        wanted = self.events[EXIT].is_wanted or stop.container
        if code is None and self.connector is not None and wanted:
            code = self.connector.take(stop.tid, stop.time)
            if code is None:
                self.connector.read()
                code = self.connector.take(stop.tid, stop.time)
            if code is None and not self._sensor.waited_for(stop.time + _PENDING):
                return WAIT
        stop.code = -1 if code is None else code
        lib.rs_process_exit(self._engine.handle, stop)
        return self._on_exit_told()

    def _on_exit_told(self) -> int:
        """A container has a process less."""
        stop = self._engine.stop
        if stop.container:
            self._sensor.container_family.process_exited(
                stop.pid, stop.container, None if stop.code < 0 else stop.code
            )
        return RESULT

    def replay(self, output: int, since: int) -> Callable[[int], bool]:
        """Tell an output what happened since then, as far as it is remembered.

        It is told up to a moment at each call of what this returns, which is True if the output has to be
        flushed before there is more. Times are CLOCK_MONOTONIC_RAW, in ns.
        """
        place = ffi.new("rs_place *")
        return lambda until: bool(lib.rs_replay(self._engine.handle, output, since, until, place))

    @property
    def remembered_since(self) -> int:
        """Nothing older than this is remembered (CLOCK_MONOTONIC_RAW ns)."""
        when: int = lib.rs_history_since(self._engine.handle)
        return when
