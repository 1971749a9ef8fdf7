"""Perf events on every CPU and the rings they write to.

Each CPU has a ring for each lane, opened by a dummy event of its own so that events may come and go:
lifecycle records have theirs from the start, bulk records theirs while a bulk event is open, and what
needs the caller's memory goes through the prompt ring and the courier, a thread of the engine.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from ._perf import ffi, lib
from .bpf import Attachment, Loaded, load_programs
from .engine import Engine, check, clock, pack_fetches
from .errors import KernelError, SetupError, UnservableError

if TYPE_CHECKING:
    from .plan import FetchSpec

log = logging.getLogger(__name__)
_PAGE = os.sysconf("SC_PAGESIZE")
_LOCKED = "give CAP_IPC_LOCK, raise RLIMIT_MEMLOCK or perf_event_mlock_kb"
_SMALLEST = 256 << 10  # bytes of a ring, however many CPUs there are
_CLOSERS = 8  # threads that wait, and do so for the same thing: that CPUs leave what was closed
# ns: a call is on its way no longer than that, though its CPU may be a virtual one that stands still at times
_OVERLAP = 50 * 10**6
_MOST_OVERLAPS = 4  # of one kernel event: each writes records of its own
_IN_FLIGHT = 10 * 10**6  # ns: a virtual CPU may stand still between a record's time and its place in the ring
_ONLINE = Path("/sys/devices/system/cpu/online")


class Lane(Enum):
    """Which ring an event writes to."""

    BULK = "bulk"
    LIFECYCLE = "lifecycle"
    PROMPT = "prompt"  # through the courier, which reads the caller's memory at once


def online_cpus(path: Path = _ONLINE) -> list[int]:
    """The CPUs that are up, from a list such as "0-3,8"."""
    cpus: list[int] = []
    for part in path.read_text().strip().split(","):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def raise_file_limit(need: int) -> None:
    """Let this process have `need` more descriptors than it may have now, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    want = used + need + 256
    if soft == resource.RLIM_INFINITY or want <= soft:
        return
    for limit in ((want, max(want, hard)), (min(want, hard), hard)):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            return


@dataclass
class _CpuRing:
    fd: int
    ring: int


@dataclass
class _Opened:
    """One kernel event with one filter, on every CPU, in certain cgroups or all: (cpu, descriptor, id)."""

    filter: str | None
    cgroups: tuple[str, ...] = ()
    since: int = 0  # from when on it was alone
    until: int = 0  # when another took its place; 0: not yet
    next: _Opened | None = None  # that one
    events: list[tuple[int, int, int]] = field(default_factory=list)
    programs: Loaded | None = None
    attached: list[int] = field(default_factory=list)  # descriptors of perf events that hold the programs


class KernelEvent:
    """A tracepoint or probe, opened on every CPU with one filter at a time.

    A perf event's filter can be set only once, so another filter means other perf events: they are
    enabled before the old ones are disabled, and the engine knows a call by the records of both.
    """

    _order = lib.RS_LATEST_FIRST

    def __init__(
        self,
        rings: Rings,
        name: str,
        event_id: int,
        source: int,
        lane: Lane,
        *,
        stack_size: int = 0,
        cgroup: bool = False,
        fetches: Sequence[FetchSpec] = (),
        first_argument: bool = False,
    ) -> None:
        self.rings = rings
        self.name = name
        self.event_id = event_id
        self.source = source
        self.lane = lane
        self._perf = ffi.new(
            "rs_perf *",
            {
                "tracepoint": event_id,
                "stack_size": stack_size,
                "cgroup": cgroup,
                "first_argument": first_argument,
            },
        )
        self._fetches = pack_fetches(fetches)
        self._n_fetches = len(fetches)
        self._opened: _Opened | None = None
        self._gone = self._told = 0  # samples lost by perf events that are closed; told of so far
        self.retired: list[int] = []  # descriptors of its perf events that are disabled, not closed yet
        self.outputs: Callable[[], list[int]] | None = None  # who misses what is lost; None: everybody

    @property
    def filter(self) -> str | None:
        """The kernel's filter now in force; None: every record passes."""
        return self._opened.filter if self._opened else None

    @property
    def cgroups(self) -> tuple[str, ...]:
        """The cgroups that it is limited to; none: the whole system."""
        return self._opened.cgroups if self._opened else ()

    @property
    def is_open(self) -> bool:
        """True while it produces records."""
        return self._opened is not None

    def open(self, filter_text: str | None = None) -> int:
        """Open it, or change its filter; from which time on records pass the new filter.

        UnservableError if the kernel refuses, with what was there before still in force.
        """
        cgroups = self._cgroups()
        if self._opened is not None and (self._opened.filter, self._opened.cgroups) == (filter_text, cgroups):
            return clock()
        try:
            return self._open(_Opened(filter_text, cgroups))
        except (KernelError, SetupError) as error:
            if not cgroups:
                raise
            log.info("%s: not limited to containers: %s", self.name, error)
        return self._open(_Opened(filter_text))

    def _cgroups(self) -> tuple[str, ...]:
        """The cgroups to limit it to; none: the whole system."""
        return self.rings.scope(self.outputs()) if self.outputs is not None else ()

    def rescope(self) -> None:
        """Open it anew where the containers that are wanted may have changed."""
        if self._opened is not None and self.outputs is not None:
            self.open(self._opened.filter)

    def _open(self, fresh: _Opened) -> int:
        self.rings.acquire(self.lane)
        try:
            self._prepare(fresh)
            for cpu in self.rings.cpus:
                self._open_on(cpu, fresh)
            for _, _, number in fresh.events:
                # not alone before the old one ends
                self._set(number, (1 << 64) - 1)
            for _, fd, _ in fresh.events:
                check(lib.rs_perf_enable(fd, 1), f"enable {self.name}")
            self._begin(fresh)
        except BaseException:
            self._close(fresh)
            self.rings.release(self.lane)
            raise
        stale, self._opened = self._opened, fresh
        now = clock()
        if stale is not None:
            stale.until, stale.next = now, fresh
            self._mark(stale)
            self.retired.extend(fd for _, fd, _ in stale.events)
            self.rings.overlap(self, stale)
        else:
            self.rings.open_events.append(self)
            self._mark(fresh)
        return now

    def replaced(self, stale: _Opened) -> None:
        """The calls that had begun before there was another in its place have ended: it is needed no more."""
        now = clock()
        for _, _, number in stale.events:
            lib.rs_event_end(self.rings.engine.handle, number, now)
        self._end(stale)
        self.rings.retire(self, stale.events)
        self.rings.release(self.lane)
        if stale.next is not None:
            stale.next.since = clock()
            self._mark(stale.next)

    def _mark(self, opened: _Opened) -> None:
        for _, _, number in opened.events:
            self._set(number, opened.since, opened.until)

    def _set(self, number: int, since: int, until: int = 0) -> None:
        handle = self.rings.engine.handle
        check(lib.rs_event_set(handle, number, self.source, self._order, since, until), "event")

    def close(self) -> None:
        """Stop producing records; what is in the rings is still delivered."""
        if self._opened is not None:
            self.rings.end_overlaps(self)
            stale, self._opened = self._opened, None
            self.rings.open_events.remove(self)
            self._end(stale)
            self.retired.extend(fd for _, fd, _ in stale.events)
            self.rings.retire(self, stale.events)
            self.rings.release(self.lane)

    def add_cpu(self, cpu: int) -> None:
        """Open it on a CPU that came up."""
        if self._opened is not None and all(cpu != there for there, _, _ in self._opened.events):
            try:
                self._open_on(cpu, self._opened)
            except KernelError as error:
                if not self._opened.cgroups:
                    raise
                log.info(
                    "%s: a container has ended: %s", self.name, error
                )  # then it is opened anew, everywhere
            for _, fd, number in [one for one in self._opened.events if one[0] == cpu]:
                self._set(number, 0)
                check(lib.rs_perf_enable(fd, 1), f"enable {self.name}")

    def drop_cpu(self, cpu: int) -> None:
        """Close it on a CPU that went down."""
        if self._opened is not None:
            gone = [one for one in self._opened.events if one[0] == cpu]
            self._opened.events = [one for one in self._opened.events if one[0] != cpu]
            self.retired.extend(fd for _, fd, _ in gone)
            self.rings.retire(self, gone)

    def lost(self) -> int | None:
        """Samples that found a ring full since the last time, as the kernel counts them; None before 6.0."""
        now = self._gone
        opened = self._opened.events if self._opened else ()
        for fd in (*self.retired, *(fd for _, fd, _ in opened)):
            count = lib.rs_perf_lost(fd)
            if count < 0:
                return None
            now += count
        fresh, self._told = now - self._told, now
        return fresh

    def closing(self, fd: int) -> None:
        """One of its perf events is about to be closed: keep its count."""
        self.retired.remove(fd)
        self._gone += max(0, lib.rs_perf_lost(fd))

    def _open_on(self, cpu: int, opened: _Opened) -> None:
        """Open it on a CPU, disabled: once, or once for each cgroup."""
        if not opened.cgroups:
            opened.events.append(self._open_one(cpu, opened.filter, -1))
        for path in opened.cgroups:
            try:
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise KernelError(f"opening {path}", error.errno or 0) from error
            try:
                opened.events.append(self._open_one(cpu, opened.filter, folder))
            finally:
                os.close(folder)

    def _open_one(self, cpu: int, filter_text: str | None, cgroup: int) -> tuple[int, int, int]:
        self._perf.watermark = self.rings.watermark(self.lane)
        fd = lib.rs_perf_open(self._perf, cpu, cgroup)
        if fd == -errno.EINVAL and self._perf.cgroup:  # without CONFIG_CGROUP_PERF
            self._perf.cgroup = 0
            fd = lib.rs_perf_open(self._perf, cpu, cgroup)
        if fd < 0:
            raise _refused(self.name, -fd)
        try:
            if filter_text is not None:
                result = lib.rs_perf_filter(fd, filter_text.encode("utf-8", "surrogateescape"))
                if result < 0:
                    raise UnservableError(
                        self.name, f"the kernel refuses the filter {filter_text!r}: {os.strerror(-result)}"
                    )
            check(lib.rs_perf_redirect(fd, self.rings.fd_of(cpu, self.lane)), f"output of {self.name}")
            number = ffi.new("uint64_t *")
            check(lib.rs_perf_id(fd, number), f"id of {self.name}")
            if self._n_fetches:
                check(
                    lib.rs_fetch_set(self.rings.engine.handle, number[0], self._fetches, self._n_fetches),
                    f"fetch of {self.name}",
                )
            return cpu, fd, number[0]
        except BaseException:
            os.close(fd)
            raise

    def _close(self, opened: _Opened) -> None:
        self._end(opened)
        for _, fd, number in opened.events:
            _forget(self.rings.engine, number)
            os.close(fd)

    def _prepare(self, opened: _Opened) -> None:
        """Before its perf events are opened."""

    def _begin(self, opened: _Opened) -> None:
        """Its perf events are enabled."""

    def _end(self, opened: _Opened) -> None:
        """Its perf events are about to be disabled; idempotent."""


class ProgramEvent(KernelEvent):
    """What bpf programs emit (bpf.emit), in place of a tracepoint's own records.

    The programs go into the kernel when it is opened; `build` makes them for a filter. The filter's meaning
    is theirs: with None they let everything pass. `caller`: records bring the caller's ABI and the id of its
    cgroup, for a source with RS_CALLER.
    """

    _order = lib.RS_LATEST_LAST

    def __init__(
        self,
        rings: Rings,
        name: str,
        build: Callable[[str | None], Sequence[Attachment]],
        source: int,
        lane: Lane,
        *,
        caller: bool = False,
    ) -> None:
        super().__init__(rings, name, lib.RS_PERF_OUTPUT, source, lane, cgroup=caller)
        self._perf.abi = caller
        self._build = build
        self._missed = self._counted = 0  # by programs that are gone; by all, as in the losses

    def add_cpu(self, cpu: int) -> None:
        """Open it on a CPU that came up."""
        super().add_cpu(cpu)
        if self._opened is not None:
            self._connect(self._opened, cpu)

    def drop_cpu(self, cpu: int) -> None:
        """Close it on a CPU that went down."""
        if self._opened is not None and self._opened.programs is not None:
            self._opened.programs.set_output(cpu, None)
        super().drop_cpu(cpu)

    def replaced(self, stale: _Opened) -> None:
        """The calls that had begun before have ended, but for some that wait long: the new programs' now."""
        if stale.next is not None and stale.programs is not None and stale.next.programs is not None:
            stale.next.programs.inherit(stale.programs)
        super().replaced(stale)

    def lost(self) -> int | None:
        """Records that found a ring full, and programs that did not run, since the last time."""
        there = (self._opened, *self.rings.replaced_of(self))
        now = self._missed + sum(one.programs.missed() for one in there if one and one.programs)
        self._gone += now - self._counted
        self._counted = now
        return super().lost()

    def _cgroups(self) -> tuple[str, ...]:
        return ()  # what programs emit is nobody's

    def _open_one(self, cpu: int, filter_text: str | None, cgroup: int) -> tuple[int, int, int]:  # noqa: ARG002
        return super()._open_one(cpu, None, cgroup)

    def _prepare(self, opened: _Opened) -> None:
        opened.programs = load_programs(self.name, self._build(opened.filter))

    def _connect(self, opened: _Opened, cpu: int | None = None) -> None:
        for there, fd, _ in opened.events:
            if opened.programs is not None and cpu in (None, there):
                opened.programs.set_output(there, fd)

    def _begin(self, opened: _Opened) -> None:
        self._connect(opened)
        for tracepoint, program in opened.programs.programs if opened.programs else ():
            # on one CPU, and never enabled: it only holds the program, which then runs on all
            fd = lib.rs_perf_open(ffi.new("rs_perf *", {"tracepoint": tracepoint}), self.rings.cpus[0], -1)
            if fd < 0:
                raise _refused(self.name, -fd)
            opened.attached.append(fd)
            result = lib.rs_perf_program(fd, program)
            if result == -errno.E2BIG:  # 64 at one tracepoint; those on their way out count
                self.rings.wait_closed()
                result = lib.rs_perf_program(fd, program)
            if result < 0:
                raise UnservableError(
                    self.name, f"the kernel attaches no bpf program to it: {os.strerror(-result)}"
                )

    def _end(self, opened: _Opened) -> None:
        for fd in opened.attached:
            self.rings.close_aside([fd])
        opened.attached = []
        if opened.programs is not None:
            self._missed += opened.programs.missed()
            opened.programs.close()


def _forget(engine: Engine, number: int) -> None:
    lib.rs_event_clear(engine.handle, number)
    lib.rs_fetch_set(engine.handle, number, ffi.NULL, 0)


def _close_all(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _capability() -> str:
    """What perf_event_open(2) takes here; level 3 is distributions' own."""
    try:
        paranoid = int(Path("/proc/sys/kernel/perf_event_paranoid").read_text())
    except (OSError, ValueError):
        paranoid = 0
    if paranoid > 2:
        return f"CAP_SYS_ADMIN, as kernel.perf_event_paranoid is {paranoid}; at 2 it is CAP_PERFMON"
    return "CAP_PERFMON (CAP_SYS_ADMIN before 5.8)"


def _refused(what: str, number: int) -> Exception:
    if number in (errno.EACCES, errno.EPERM):
        return SetupError(
            f"perf_event_open for {what} is not permitted",
            f"run as root, or with {_capability()}, and let seccomp allow it",
        )
    if number == errno.ENOSYS:
        return SetupError("this kernel has no perf events", "it needs CONFIG_PERF_EVENTS")
    if number in (errno.EMFILE, errno.ENFILE):
        return SetupError(
            "too few file descriptors for perf events", "raise the limit, as with ulimit -n 65536"
        )
    return KernelError(f"perf_event_open for {what}", number)


class NoRoomError(SetupError):
    """The kernel lets no ring of this size be locked in memory (perf_event_mlock_kb, RLIMIT_MEMLOCK)."""


class Rings:
    """The rings of every CPU that is up, and the kernel events that write to them.

    Opening raises SetupError if perf events are not permitted. Close is idempotent.
    """

    def __init__(self, engine: Engine, ring_size: int, lifecycle_ring_size: int, total: int) -> None:
        self.engine = engine
        self.cpus = online_cpus()
        self._sizes = {
            Lane.BULK: ring_size,
            Lane.LIFECYCLE: lifecycle_ring_size,
            Lane.PROMPT: lifecycle_ring_size,
        }
        while (
            len(self.cpus) * sum(self._sizes.values()) > total
        ):  # many CPUs: halve the largest until all fit
            lane = max(self._sizes, key=lambda one: self._sizes[one])
            if self._sizes[lane] <= _SMALLEST:
                break
            self._sizes[lane] //= 2
        self._rings: dict[tuple[int, Lane], _CpuRing] = {}
        self._users = dict.fromkeys(Lane, 0)
        # what is to be closed when the records from before these moments have been read
        self._retired: list[tuple[int, KernelEvent, int, int]] = []  # moment, whose, descriptor, id
        self._offline: list[tuple[int, _CpuRing]] = []
        self._later: list[tuple[int, Callable[[], None]]] = []
        # A tracepoint's last perf event takes some 20 ms to close (it waits for every CPU to have left the
        # tracepoint: kernel/tracepoint.c), so that is done aside.
        self._closer = ThreadPoolExecutor(_CLOSERS, "ringside-close")
        self._closing: list[Future[None]] = []
        self._overlaps: list[tuple[int, KernelEvent, _Opened]] = []  # since when, whose, what was replaced
        self._released: dict[Lane, int] = {}  # whose last event went, when
        self._at_close: list[Callable[[], None]] = []
        self.open_events: list[KernelEvent] = []
        self.scope: Callable[[Iterable[int]], tuple[str, ...]] = lambda _outputs: ()  # see scope.py
        self.on_open: Callable[[int], object] = int
        self.on_close: Callable[[int], object] = int
        raise_file_limit(64 * len(self.cpus))

    def watermark(self, lane: Lane) -> int:
        """How many bytes may wait before the kernel wakes the reader; 0: none."""
        return 0 if lane is Lane.PROMPT else self._sizes[lane] // 4

    def fd_of(self, cpu: int, lane: Lane) -> int:
        """The descriptor of a CPU's ring."""
        return self._rings[cpu, lane].fd

    def lane_of(self, ring: int) -> Lane | None:
        """Which lane the engine's ring of this number serves; None if it is closed."""
        for (_, lane), one in self._rings.items():
            if one.ring == ring:
                return lane
        return None

    def acquire(self, lane: Lane) -> None:
        """One more event needs this lane; open its rings if it is the first."""
        # those that the drain has yet to empty are still there
        missing = [cpu for cpu in self.cpus if (cpu, lane) not in self._rings]
        size, spared = self._sizes[lane], False
        while True:
            try:
                for cpu in missing:
                    self._open(cpu, lane)
                if spared or self._sizes[lane] in (size, _SMALLEST):
                    break
                spared = True  # half of what could be locked is for the other lanes
                for cpu in missing:
                    self._close(cpu, lane)
            except BaseException as error:
                for cpu in missing:
                    self._close(cpu, lane)
                if not isinstance(error, NoRoomError) or self._sizes[lane] <= _SMALLEST:
                    raise
            self._sizes[lane] //= 2
        if self._sizes[lane] < size:
            log.warning(
                "%s rings of %d KiB instead of %d, since no more memory may be locked: %s",
                *(lane.value, self._sizes[lane] >> 10, size >> 10, _LOCKED),
            )
        self._users[lane] += 1
        self._released.pop(lane, None)

    def release(self, lane: Lane) -> None:
        """One event less. The rings stay until the drain has emptied them."""
        self._users[lane] -= 1
        if not self._users[lane]:
            self._released[lane] = clock()

    def retire(self, of: KernelEvent, events: list[tuple[int, int, int]]) -> None:
        """Disable perf events now, and close them when their records have been read."""
        for _, fd, _ in events:
            lib.rs_perf_enable(fd, 0)
        now = clock()
        self._retired.extend((now, of, fd, number) for _, fd, number in events)

    def overlap(self, event: KernelEvent, stale: _Opened) -> None:
        """Have perf events that were replaced end in a while: their calls may have begun before that."""
        self._overlaps.append((clock(), event, stale))
        if len(self.replaced_of(event)) > _MOST_OVERLAPS:
            oldest = next(one for one in self._overlaps if one[1] is event)
            self._overlaps.remove(oldest)
            event.replaced(oldest[2])

    def replaced_of(self, event: KernelEvent) -> list[_Opened]:
        """What of an event was replaced and has not ended yet."""
        return [stale for _, of, stale in self._overlaps if of is event]

    def end_overlaps(self, event: KernelEvent | None = None, until: int = 1 << 64) -> None:
        """End those that have been replaced for long, or all of an event."""
        for one in [one for one in self._overlaps if one[0] < until and event in (None, one[1])]:
            self._overlaps.remove(one)
            one[1].replaced(one[2])

    def close_aside(self, descriptors: Sequence[int]) -> None:
        """Close perf events that nobody needs any more."""
        if descriptors:
            self._closing.append(self._closer.submit(_close_all, descriptors))

    def wait_closed(self) -> None:
        """Wait until what is being closed aside is closed."""
        while self._closing:
            self._closing.pop(0).result()

    def watch_closing(self, work: Callable[[], None]) -> None:
        """Do it when all perf events are closed, at the very end."""
        self._at_close.append(work)

    def later(self, work: Callable[[], None]) -> None:
        """Do it, in a later `settle`, when the perf events retired so far are closed."""
        self._later.append((clock(), work))

    @property
    def unsettled(self) -> bool:
        """True if something waits for `settle`."""
        return bool(
            self._retired or self._closing or self._overlaps or self._offline or self._released or self._later
        )

    def settle(self, until: int = 1 << 64, *, wait: bool = False) -> None:
        """After all records from before `until` were read: close what only they still needed.

        A drain leaves the youngest records for the next one; their perf events must be known then.
        Perf events are closed aside, unless `wait` is set.
        """
        self.end_overlaps(until=until - _OVERLAP)
        until -= _IN_FLIGHT
        gone = []
        while self._retired and self._retired[0][0] < until:
            _, event, fd, number = self._retired.pop(0)
            event.closing(fd)
            _forget(self.engine, number)
            gone.append(fd)
        self.close_aside(gone)
        while self._closing and (wait or self._closing[0].done()):
            self._closing.pop(0).result()
        while self._offline and self._offline[0][0] < until:
            _, one = self._offline.pop(0)
            lib.rs_ring_close(self.engine.handle, one.ring)
            os.close(one.fd)
        for lane in [lane for lane, when in self._released.items() if when < until]:
            del self._released[lane]
            for cpu in [cpu for cpu, other in self._rings if other is lane]:
                self._close(cpu, lane)
        while self._later and self._later[0][0] < until and not self._closing:
            self._later.pop(0)[1]()

    def follow_cpus(self) -> bool:
        """Open on CPUs that came up, drop those that went; True if anything changed."""
        now = online_cpus()
        came, went = set(now) - set(self.cpus), set(self.cpus) - set(now)
        if not came and not went:
            return False
        log.info("CPUs came up: %s, went down: %s", sorted(came), sorted(went))
        self.cpus = now
        for cpu in came:
            for lane in Lane:
                if self._users[lane]:
                    self._open(cpu, lane)
            for event in self.open_events:
                event.add_cpu(cpu)
        for cpu in went:
            for event in self.open_events:
                event.drop_cpu(cpu)
            for lane in Lane:
                one = self._rings.pop((cpu, lane), None)
                if one is not None:  # what it still holds is drained before it is closed
                    if lane is not Lane.PROMPT:
                        self.on_close(one.fd)
                    self._offline.append((clock(), one))
        return True

    def close(self) -> None:
        """Close every event and every ring."""
        for event in list(self.open_events):
            event.close()
        self.settle(wait=True)
        self._closer.shutdown()
        for cpu, lane in list(self._rings):
            self._close(cpu, lane)
        while self._at_close:
            self._at_close.pop()()

    def _open(self, cpu: int, lane: Lane) -> None:
        perf = ffi.new("rs_perf *", {"tracepoint": lib.RS_PERF_RING, "watermark": self.watermark(lane)})
        fd = lib.rs_perf_open(perf, cpu, -1)
        if fd < 0:
            raise _refused("a ring", -fd)
        open_ring = lib.rs_ring_prompt if lane is Lane.PROMPT else lib.rs_ring_open
        ring = open_ring(self.engine.handle, fd, cpu, self._sizes[lane] // _PAGE)
        if ring < 0:
            os.close(fd)
            if -ring in (errno.EPERM, errno.ENOMEM):
                raise NoRoomError(
                    f"no memory may be locked for a ring of {self._sizes[lane] >> 10} KiB on CPU {cpu}",
                    f"{_LOCKED}, or use smaller rings",
                )
            raise KernelError(f"mmap of CPU {cpu}'s ring", -ring)
        self._rings[cpu, lane] = _CpuRing(fd, ring)
        if lane is not Lane.PROMPT:  # the courier listens to those
            self.on_open(fd)

    def _close(self, cpu: int, lane: Lane) -> None:
        one = self._rings.pop((cpu, lane), None)
        if one is not None:
            if lane is not Lane.PROMPT:
                self.on_close(one.fd)
            lib.rs_ring_close(self.engine.handle, one.ring)
            os.close(one.fd)


class HotplugSocket:
    """The kernel's uevents, to know at once that a CPU came or went (netlink(7), NETLINK_KOBJECT_UEVENT)."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        with suppress(OSError):
            self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 15)
            self.socket.bind((0, 1))

    def changed(self) -> bool:
        """Read what has come; True if a CPU was among it."""
        seen = False
        with suppress(BlockingIOError):
            while self.socket is not None:
                try:
                    message = self.socket.recv(8192)
                except OSError as error:
                    if error.errno == errno.ENOBUFS:
                        seen = True
                        continue
                    raise
                seen |= b"SUBSYSTEM=cpu\0" in message
        return seen

    def close(self) -> None:
        """Close the socket; idempotent."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
