"""Who did it: the process table.

Fed by lifecycle records in the order of time, and by procfs for what was there before. For each process
it publishes to the engine the encoded fields that go into that process's events.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator

from ringside.api.v0 import Event
from ringside.api.v0 import Process as ProcessMessage

from . import wire
from ._perf import lib
from .engine import Engine, clock
from .procfs import Procfs, Stat

log = logging.getLogger(__name__)

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_TICK = 10**9 // TICKS_PER_SECOND
_CLOSE = 20_000  # ns between two looks at two clocks
_UNSURE = 1_000_000  # ns that may lie between a process's start time being taken and its fork event
_GRACE = 2 * 10**9  # ns that a dead process is kept, for events of its last moments
_FOREIGN_GRACE = 600 * 10**9  # ns for which the next 32-bit program is waited for
_MAX_DEPTH = 64
_LONGEST_LINE = 16 << 10  # bytes of a lineage, about a thousand processes; what is below has pid 1 for parent
_PID, _COMMAND = (wire.fields(ProcessMessage)[name].tag for name in ("pid", "command"))
_LINEAGE, _EVENT_ID, _EVENT_PID = (
    wire.fields(Event)[name].tag for name in ("process_lineage", "process_id", "process_pid")
)


class Process:
    """One process, alive or remembered as somebody's ancestor."""

    __slots__ = (
        "_entry",
        "_line",
        "_line_at",
        "alive",
        "command",
        "container",
        "counted_at",
        "foreign",
        "has_forked",
        "head",
        "id",
        "is_kernel_thread",
        "parent",
        "pid",
        "start",
        "threads",
    )  # fmt: skip

    changes = 0  # of names and parents of any process that may be an ancestor

    def __init__(
        self, pid: int, start: int | None, id: str, command: str | bytes, parent: Process | None
    ) -> None:
        self.pid = pid
        self.start = start  # clock ticks since boot; None if unknown
        self.id = id
        self.command = command
        self.parent = parent
        self.threads = 1
        self.counted_at = 0  # CLOCK_MONOTONIC_RAW ns: thread records before this are in `threads` already
        self.alive = True
        self.container = 0
        self.foreign = False  # 32-bit on a 64-bit kernel
        self.is_kernel_thread = False
        self.has_forked = False
        self._entry: bytes | None = None
        self._line = b""
        self._line_at = -1
        self.head = b""  # Event.process_id and process_pid, encoded

    def rename(self, command: bytes) -> None:
        """Another comm."""
        self.command = command
        self._entry = None
        self._line_at = -1
        if self.has_forked:
            Process.changes += 1

    def entry(self) -> bytes:
        """This process as one entry of Event.process_lineage."""
        if self._entry is None:
            name = wire.utf8(self.command)
            body = _PID + wire.varint(self.pid << 1) + _COMMAND + wire.varint(len(name)) + name
            self._entry = _LINEAGE + wire.varint(len(body)) + body
        return self._entry

    def lineage(self) -> Iterator[Process]:
        """The process itself, its parent as it was at the fork, and so on up to pid 1 or 2."""
        process: Process | None = self
        while process is not None:
            yield process
            process = process.parent

    def lineage_field(self) -> bytes:
        """Event.process_lineage, encoded. Kept until an ancestor has another name, which is rare."""
        if self._line_at != Process.changes:
            stale = []
            process: Process | None = self
            while process is not None and process._line_at != Process.changes:
                stale.append(process)
                process = process.parent
            line = b"" if process is None else process._line
            for process in reversed(stale):  # anybody can make a lineage too deep for a recursion
                line = process._line = process.entry() + line
                process._line_at = Process.changes
        return self._line

    def adopt(self, parent: Process | None) -> None:
        """Another parent."""
        self.parent = parent
        if parent is not None:
            parent.has_forked = True
        Process.changes += 1

    def depth(self) -> int:
        """How many processes the lineage has."""
        return sum(1 for _ in self.lineage())

    def __repr__(self) -> str:
        return f"<Process {self.pid} {self.command!r}>"


class ProcessTable:
    """All processes now, and those that died a moment ago."""

    def __init__(self, engine: Engine, procfs: Procfs, lineage_in_all: bool = False) -> None:
        self.engine = engine
        self.procfs = procfs
        self.by_pid: dict[int, Process] = {}
        self._boot = procfs.boot_id().replace("-", "")[:8] or "0"
        self._lineage_in_all = lineage_in_all
        self._dead: deque[tuple[int, Process]] = deque()
        self._boot_offset = 0
        self.containers: dict[int, tuple[bytes, bytes]] = {0: (b"", b"")}  # fields before and behind
        self.on_enter: Callable[[int], object] = int  # a container has one process more
        self.on_leave: Callable[[int], object] = int  # and one less
        self.on_learned: Callable[[Process], object] = id  # from procfs, so that its container is not known
        self.on_resync: Callable[[], object] = int
        self.has_foreign = False  # 32-bit ones are there, or were a while ago
        self.on_foreign: list[Callable[[], object]] = []  # that has changed
        self._foreign: set[Process] = set()
        self._foreign_gone = 0  # when the last of them was forgotten
        self.sync_clock()

    def sync_clock(self) -> None:
        """Measure how CLOCK_BOOTTIME and the events' clock lie; they drift apart by what NTP corrects."""
        for _ in range(4):
            before = clock()
            boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            after = clock()
            if after - before < _CLOSE or not self._boot_offset:
                self._boot_offset = boot - (before + after) // 2
            if after - before < _CLOSE:
                break  # else we were interrupted, and the difference is none

    def process_id(self, pid: int, start: int) -> str:
        """The id of the process with this pid that started so many clock ticks after boot."""
        return f"{self._boot}-{pid:x}-{start:x}"

    # -- learning ----------------------------------------------------------------------------------

    def scan(self) -> None:
        """Learn every process from procfs. Call it with the lifecycle events already open."""
        parents = {}
        for pid in self.procfs.pids():
            before = clock()
            stat = self.procfs.stat(pid)
            if stat is not None:
                process = self._learned(stat, before)
                parents[process] = stat.parent
        for process, parent in parents.items():
            process.adopt(self.by_pid.get(parent))
        for process in parents:
            self.publish(process)

    def _learned(self, stat: Stat, before: int) -> Process:
        known = self.by_pid.get(stat.pid)
        if known is not None and known.alive and known.start == stat.start:
            return known
        command = stat.command.encode()
        process = Process(stat.pid, stat.start, self.process_id(stat.pid, stat.start), command, None)
        self._count(process, stat, before)
        process.is_kernel_thread = stat.is_kernel_thread
        process.foreign = not stat.is_kernel_thread and self.procfs.is_foreign(stat.pid)
        self.by_pid[stat.pid] = process
        if not process.alive:
            self._dead.append((before, process))
        return process

    def _count(self, process: Process, stat: Stat, before: int) -> None:
        """Take over from procfs how many threads there are. A leader may be a zombie while others run on."""
        zombie = stat.state in "ZX"
        process.alive = not zombie or stat.threads > 1
        process.threads = stat.threads - zombie if process.alive else 0
        process.counted_at = before

    def learn(self, pid: int) -> Process:
        """A process that should be known but isn't; one without an id if procfs has forgotten it too."""
        before = clock()
        stat = self.procfs.stat(pid)
        if stat is not None:
            process = self._learned(stat, before)
            if stat.parent:
                process.adopt(self.by_pid.get(stat.parent) or self.learn(stat.parent))
        else:
            process = Process(pid, None, "", b"", None)
            process.alive = False
            self.by_pid[pid] = process
            self._dead.append((clock(), process))
        self.publish(process)
        if process.alive:
            self.on_learned(process)
        return process

    def get(self, pid: int) -> Process:
        """The process of this pid, learned if need be."""
        return self.by_pid.get(pid) or self.learn(pid)

    # -- what the kernel reports -------------------------------------------------------------------

    def forked(self, when: int, parent: Process, pid: int, command: bytes) -> Process:
        """A new process; its start is told from the event's time, or read where that may be off by a tick."""
        known = self.by_pid.get(pid)
        at = when + self._boot_offset
        start = at // _TICK
        if known is not None and known.alive and known.start is not None and abs(known.start - start) <= 1:
            return known  # the scan saw it already
        if (at - _UNSURE) // _TICK != start:
            stat = self.procfs.stat(pid)
            if stat is not None and abs(stat.start - start) <= 1:
                start = stat.start
        process = Process(pid, start, self.process_id(pid, start), command, parent)
        if len(parent._line) > _LONGEST_LINE:  # nested that deep by mistake, or to fill events
            process.parent = self.by_pid.get(1, parent)
        parent.has_forked = True
        process.container = parent.container
        process.foreign = parent.foreign
        process.is_kernel_thread = parent.is_kernel_thread
        self.by_pid[pid] = process
        if process.container:
            self.on_enter(process.container)
        self.publish(process)
        return process

    def exited(self, when: int, process: Process) -> None:
        """The last thread is gone. The process is remembered for a while, and as an ancestor."""
        if process.alive and process.container:
            self.on_leave(process.container)
        process.alive = False
        self._dead.append((when, process))
        parent = process.parent
        if parent is not None and not parent.alive and process.depth() > _MAX_DEPTH:
            process.adopt(self.by_pid.get(1))  # a chain that grows by dying, one generation at a time

    def renamed(self, process: Process, command: bytes) -> None:
        """Another comm: where every event carries the lineage, in those of the descendants, too."""
        process.rename(command)
        if self._lineage_in_all:
            self.publish(process)
            if process.has_forked:
                for other in self.by_pid.values():
                    if other.alive and other is not process and process in other.lineage():
                        self.publish(other)

    def moved(self, process: Process, container: int) -> None:
        """The process is in another container (0: the host) now."""
        before = process.container
        if before != container:
            process.container = container
            if process.alive and container:
                self.on_enter(container)
            if process.alive and before:
                self.on_leave(before)
            self.publish(process)

    def forget_dead(self, now: int) -> None:
        """Drop the processes that have been dead for long."""
        while self._dead and self._dead[0][0] + _GRACE < now:
            _, process = self._dead.popleft()
            self._foreign.discard(process)
            if self.by_pid.get(process.pid) is process and not process.alive:
                del self.by_pid[process.pid]
                self.engine.clear_process(process.pid)
        if self._foreign or not self.has_foreign:
            self._foreign_gone = 0
        elif not self._foreign_gone:
            self._foreign_gone = now
        elif self._foreign_gone + _FOREIGN_GRACE < now:
            self._tell_foreign(False)

    def resync(self) -> None:
        """After lifecycle records were lost: learn who is new, let go who is gone."""
        now = clock()
        there = set()
        fresh = {}
        for stat in self.procfs.scan():
            there.add(stat.pid)
            known = self.by_pid.get(stat.pid)
            if known is None or known.start != stat.start:
                fresh[self._learned(stat, now)] = stat.parent
            else:
                was_alive = known.alive
                self._count(known, stat, now)
                if known.command != stat.command.encode():
                    self.renamed(known, stat.command.encode())
                if was_alive and not known.alive:
                    known.alive = True
                    self.exited(now, known)
        for process, parent in fresh.items():
            process.adopt(self.by_pid.get(parent))
        for process in fresh:
            self.publish(process)
        for pid, process in list(self.by_pid.items()):
            if pid not in there and process.alive:
                self.exited(now, process)
        if self._lineage_in_all:
            for process in self.by_pid.values():
                self.publish(process)
        self.on_resync()

    # -- what the engine gets ----------------------------------------------------------------------

    def head_of(self, process: Process) -> bytes:
        """The encoded fields that say who it is; they stand before an event's own."""
        if not process.head:
            process.head = _EVENT_PID + wire.varint(process.pid)
            if process.id:
                name = process.id.encode()
                process.head = _EVENT_ID + wire.varint(len(name)) + name + process.head
        return process.head

    def publish(self, process: Process) -> None:
        """Give the engine the fields that every event of this process carries."""
        self.engine.set_process(
            process.pid,
            self.head_of(process),
            process.lineage_field() if self._lineage_in_all else b"",
            process.container,
            lib.RS_FOREIGN if process.foreign else 0,
        )
        if process.foreign:
            self._foreign.add(process)
            self._tell_foreign(True)
        else:
            self._foreign.discard(process)

    def _tell_foreign(self, there: bool) -> None:
        if there != self.has_foreign:
            self.has_foreign = there
            for tell in self.on_foreign:
                tell()
