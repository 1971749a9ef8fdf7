"""Who did it: the process table, the Python side of _processes.c.

C keeps it by lifecycle records, in the order of time. Here is what procfs has to say: which processes were
there before, who an unknown one is, and what has happened while records were lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ._perf import ffi, lib
from .engine import Engine, clock
from .procfs import Procfs, Stat

_FOREIGN_GRACE = 600 * 10**9  # ns for which the next 32-bit program is waited for


@dataclass(frozen=True, slots=True)
class Process:
    """What is known of a process at this moment. `start`: clock ticks since boot, None if not known."""

    pid: int
    start: int | None
    container: int
    flags: int

    @property
    def alive(self) -> bool:
        """False for one that ended a moment ago."""
        return bool(self.flags & lib.RS_ALIVE)

    @property
    def is_kernel_thread(self) -> bool:
        """True for the kernel's own."""
        return bool(self.flags & lib.RS_KERNEL_THREAD)


class ProcessTable:
    """All processes now, and those that died a moment ago."""

    def __init__(self, engine: Engine, procfs: Procfs) -> None:
        self.engine = engine
        self.procfs = procfs
        self.boot = procfs.boot_id().replace("-", "")[:8] or "0"
        self.on_emptied: Callable[[int], object] = int  # a container has no processes any more
        self.on_learned: Callable[[Process], object] = id  # from procfs, so that its container is not known
        self.on_resync: Callable[[], object] = int
        self.has_foreign = False  # 32-bit ones are there, or were a while ago
        self.on_foreign: list[Callable[[], object]] = []  # that has changed
        self._foreign_gone = 0  # when the last of them was forgotten
        self._told = ffi.new("rs_process *")

    def __len__(self) -> int:
        return len(self.pids())

    def pids(self) -> list[int]:
        """Every process that is known."""
        handle = self.engine.handle
        pids = ffi.new("int32_t[]", lib.rs_process_pids(handle, ffi.NULL, 0))
        lib.rs_process_pids(handle, pids, len(pids))
        return list(pids)

    def living(self) -> Iterator[Process]:
        """Every process that is alive."""
        for pid in self.pids():
            process = self.find(pid)
            if process is not None and process.alive:
                yield process

    def find(self, pid: int) -> Process | None:
        """The process of this pid, if it is known."""
        told = self._told
        if not lib.rs_process_get(self.engine.handle, pid, told):
            return None
        return Process(
            pid,
            None if told.flags & lib.RS_NAMELESS else told.start,
            told.container,
            told.flags,
        )

    def get(self, pid: int) -> Process:
        """The process of this pid, learned if need be."""
        return self.find(pid) or self.learn(pid)

    def processes_in(self, container: int) -> int:
        """How many processes of a container are alive."""
        count: int = lib.rs_container_processes(self.engine.handle, container)
        return count

    def lineage_field(self, pid: int) -> bytes:
        """Event.process_lineage of a process, encoded."""
        line = ffi.new("const uint8_t **")
        length = lib.rs_process_lineage(self.engine.handle, pid, line)
        return bytes(ffi.buffer(line[0], length)) if length else b""

    # -- learning ----------------------------------------------------------------------------------

    def scan(self) -> None:
        """Learn every process from procfs. Call it with the lifecycle events already open."""
        parents = {}
        for pid in self.procfs.pids():
            before = clock()
            stat = self.procfs.stat(pid)
            if stat is not None and self._learn(stat, before):
                parents[pid] = stat.parent
        for pid, parent in parents.items():
            self._adopt(pid, parent)
        self.look_for_foreign(clock())

    def _learn(self, stat: Stat, before: int) -> bool:
        """False if it is known."""
        known = self.find(stat.pid)
        if known is not None and known.alive and known.start == stat.start:
            return False
        flags = lib.RS_KERNEL_THREAD if stat.is_kernel_thread else 0
        if not stat.is_kernel_thread and self.procfs.is_foreign(stat.pid):
            flags |= lib.RS_FOREIGN
        self._set(stat, before, flags)
        return True

    def _set(self, stat: Stat, before: int, flags: int) -> None:
        """Take over what procfs says. A leader may be a zombie while others run on."""
        zombie = stat.state in "ZX"
        alive = not zombie or stat.threads > 1
        self.engine.set_process(
            stat.pid,
            stat.start,
            command=stat.command.encode(),
            flags=flags | (lib.RS_ALIVE if alive else 0),
            threads=stat.threads - zombie if alive else 0,
            counted_at=before,
        )

    def _adopt(self, pid: int, parent: int) -> None:
        lib.rs_process_adopt(self.engine.handle, pid, parent)

    def learn(self, pid: int) -> Process:
        """A process that should be known but isn't; one without an id if procfs has forgotten it too."""
        before = clock()
        stat = self.procfs.stat(pid)
        if stat is not None:
            self._learn(stat, before)
            if stat.parent:
                self.get(stat.parent)
                self._adopt(pid, stat.parent)
        else:
            self.engine.set_process(pid, flags=0)
        process = self.find(pid)
        assert process is not None
        if process.alive:
            self.on_learned(process)
        return process

    def moved(self, process: Process, container: int) -> None:
        """The process is in another container (0: the host) now."""
        before = process.container
        if before != container:
            lib.rs_process_move(self.engine.handle, process.pid, container)
            if process.alive and before and not self.processes_in(before):
                self.on_emptied(before)

    def look_for_foreign(self, now: int) -> None:
        """Tell if the first 32-bit process has come, or the last has been gone for long."""
        if lib.rs_process_foreign(self.engine.handle):
            self._foreign_gone = 0
            self._tell_foreign(True)
        elif not self.has_foreign:
            self._foreign_gone = 0
        elif not self._foreign_gone:
            self._foreign_gone = now
        elif self._foreign_gone + _FOREIGN_GRACE < now:
            self._tell_foreign(False)

    def _tell_foreign(self, there: bool) -> None:
        if there != self.has_foreign:
            self.has_foreign = there
            for tell in self.on_foreign:
                tell()

    def resync(self) -> None:
        """After lifecycle records were lost: learn who is new, let go who is gone."""
        now = clock()
        there = set()
        fresh = {}
        for stat in self.procfs.scan():
            there.add(stat.pid)
            known = self.find(stat.pid)
            if known is None or known.start != stat.start:
                if self._learn(stat, now):
                    fresh[stat.pid] = stat.parent
            else:
                self._set(stat, now, known.flags & ~lib.RS_ALIVE)
        for pid, parent in fresh.items():
            self._adopt(pid, parent)
        for process in self.living():
            if process.pid not in there:
                lib.rs_process_end(self.engine.handle, process.pid, now)
        self.on_resync()
