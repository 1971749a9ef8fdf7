"""The containers of this machine: what is known of each, and their life.

No I/O here. Facts come in from three kinds of witness, and every container has one that *drives* it,
that is, whose word makes transitions; the others only add facts:

    engine   (docker.py)    knows names, images, exit codes and the whole life
    disk     (runtimes.py)  knows names and images, never drives
    kernel   (the core)     knows that processes are in a container's cgroup, or none any more

A container that the kernel shows first waits until every engine and the disk have been asked. The kernel
drives what no engine claims, and what an engine drove once that engine is given up (`release`).
Everything runs on one thread; times are nanoseconds since the epoch.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
import zlib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

KERNEL: Final = "kernel"

#: Documents above this are left out of events: a message of gRPC has 4 MiB by default.
DOCUMENT_LIMIT: Final = 1 << 20
#: What all kept documents may take, compressed.
DOCUMENTS_LIMIT: Final = 32 << 20


class ContainerState(IntEnum):
    """The step of its life a container reached last; the numbers are ContainerEventType's."""

    UNKNOWN = 0
    CREATED = 1
    RUNNING = 2
    EXITED = 3
    DESTROYED = 4


UNKNOWN, CREATED, RUNNING, EXITED, DESTROYED = ContainerState


@dataclass(frozen=True, slots=True)
class Document:
    """A JSON document, kept compressed: they are long, alike, and rarely wanted."""

    packed: bytes
    length: int  # bytes, unpacked

    @staticmethod
    def of(text: bytes | str) -> Document | None:
        """None if it is longer than DOCUMENT_LIMIT."""
        raw = text.encode("utf-8", "replace") if isinstance(text, str) else text
        return None if len(raw) > DOCUMENT_LIMIT else Document(zlib.compress(raw, 1), len(raw))

    def text(self) -> str:
        """The document as it was; bytes that are not UTF-8 are replaced."""
        return zlib.decompress(self.packed).decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class ContainerExit:
    """How a container's first process ended, in ContainerEvent's fields."""

    code: int
    status: int
    signal: int
    core_dumped: bool


@dataclass(frozen=True, slots=True)
class Container:
    """What is known of one container; empty means unknown."""

    id: str
    name: str = ""  # as the engine has it: Docker's begin with '/'
    image_id: str = ""  # 64 hex digits, no 'sha256:'
    image_name: str = ""
    runtime: str = ""
    host_pid: int = 0
    state: ContainerState = ContainerState.UNKNOWN
    exit: ContainerExit | None = None
    docker_config: Document | None = field(default=None, repr=False)
    oci_config: Document | None = field(default=None, repr=False)

    @property
    def docker_config_json(self) -> str:
        """The engine's inspect document, "" if there is none."""
        return "" if self.docker_config is None else self.docker_config.text()

    @property
    def oci_config_json(self) -> str:
        """The runtime's config.json, "" if there is none."""
        return "" if self.oci_config is None else self.oci_config.text()


@dataclass(frozen=True, slots=True)
class Facts:
    """What a witness tells of a container; what is empty is not told."""

    name: str = ""
    image_id: str = ""
    image_name: str = ""
    runtime: str = ""
    host_pid: int = 0
    exit_code: int | None = None
    docker_config: Document | None = field(default=None, repr=False)
    oci_config: Document | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Listing:
    """One container of an engine's complete list."""

    id: str
    state: ContainerState
    facts: Facts
    created_ns: int = 0
    ran: bool = True  # False: it never came to run


@dataclass(frozen=True, slots=True)
class Transition:
    """One step of a container's life; `container` as it was at that step.

    `synthesized`: no witness told of it, but what came later implies it.
    """

    kind: ContainerState
    container: Container
    time_ns: int
    synthesized: bool = False


def image_id_of(text: str) -> str:
    """An image id without its 'sha256:'."""
    return text.removeprefix("sha256:")


def exit_of(code: int | None, wait_status: int | None = None) -> ContainerExit | None:
    """How a container ended, from the engine's exit code and the wait(2) status of its first process.

    An engine says 128 + N for death by signal N, and cannot say whether the program itself exited with that
    number or dumped core; the wait status can, and counts as long as it agrees with the engine.
    """
    if wait_status is not None:
        by_signal = os.WIFSIGNALED(wait_status)
        number = os.WTERMSIG(wait_status) if by_signal else os.WEXITSTATUS(wait_status)
        if code is None or code == number + (128 if by_signal else 0):
            if by_signal:
                return ContainerExit(128 + number, 0, number, os.WCOREDUMP(wait_status))
            return ContainerExit(number, number, 0, False)
    if code is None:
        return None
    if 128 < code < 128 + signal.NSIG:
        return ContainerExit(code, 0, code - 128, False)
    return ContainerExit(code, max(code, 0), 0, False)


class _Record:
    __slots__ = (
        "asked",
        "begun",
        "container",
        "driver",
        "exits",
        "kernel_ns",
        "last_ns",
        "occupied",
        "persistent",
        "seen_ns",
        "settled",
        "vanished",
    )

    def __init__(self, container_id: str) -> None:
        self.container = Container(container_id)
        self.driver = ""  # nobody yet
        self.asked: set[str] = set()  # who has still to say whether the container is theirs
        self.occupied = False  # as far as the kernel lane told
        self.begun = False  # so it told, and whoever is asked for the pid has not answered yet
        self.seen_ns = 0  # when that began
        self.kernel_ns = 0  # of what the kernel lane told last
        self.last_ns = 0  # of the last transition
        self.settled = False
        self.vanished = False  # its cgroup was removed
        self.persistent = False  # on disk, so it outlives its cgroup
        self.exits: dict[int, int] = {}  # pid -> wait status, of the latest processes to end


@dataclass(slots=True)
class ContainerCounts:
    """What happened, for the metrics."""

    transitions: int = 0
    synthesized: int = 0
    stale: int = 0  # news that came too late to matter
    evicted: int = 0
    documents_dropped: int = 0


class ContainerTable:
    """Every container known, and a step-by-step account of their lives.

    Listeners are plain functions, called at once and in order:
    `on_transition(Transition)`, `on_change(Container)` when a name, an image or the pid became known or
    changed, `on_settled(Container)` when nobody is going to tell more about its identity.
    """

    #: Exits kept for each container, until the engine has told which process was its first.
    EXITS: Final = 32

    def __init__(
        self,
        *,
        born_ns: int | None = None,
        limit: int = 65536,
        remembered_destroyed: int = 4096,
        catch_up: Callable[[], None] = lambda: None,
    ) -> None:
        """`born_ns`: what was created earlier is history and makes no events.

        `catch_up` has the kernel lane tell what has happened up to now.
        """
        self.born_ns = time.time_ns() if born_ns is None else born_ns
        self.counts = ContainerCounts()
        self.on_transition: list[Callable[[Transition], None]] = []
        self.on_change: list[Callable[[Container], None]] = []
        self.on_settled: list[Callable[[Container], None]] = []
        self._catch_up = catch_up
        self._limit = limit
        self._remembered = remembered_destroyed
        self._records: dict[str, _Record] = {}
        self._destroyed: OrderedDict[str, _Record] = OrderedDict()
        self._by_pid: dict[int, str] = {}
        self._sources: dict[str, Callable[[str], None]] = {}
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._documents_size = 0

    # Reading

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Container]:
        return (record.container for record in list(self._records.values()))

    def __contains__(self, container_id: str) -> bool:
        return container_id in self._records

    def get(self, container_id: str) -> Container | None:
        """The container, also for a while after it is destroyed; None if never heard of."""
        record = self._records.get(container_id) or self._destroyed.get(container_id)
        return None if record is None else record.container

    def with_prefix(self, prefix: str) -> list[Container]:
        """The living containers whose id begins so."""
        exact = self._records.get(prefix)
        if exact is not None:
            return [exact.container]
        return [
            record.container
            for key, record in self._records.items()
            if is_hex_id(key) and key.startswith(prefix)
        ]

    def kept_on_disk(self) -> list[str]:
        """The containers that the kernel drives, that are empty and that were last seen kept on disk."""
        return [
            key
            for key, record in self._records.items()
            if record.persistent and record.driver == KERNEL and not record.occupied
        ]

    def occupied(self, container_id: str) -> bool:
        """Whether a process is in it, as far as the kernel showed."""
        record = self._records.get(container_id)
        return record is not None and record.occupied

    def has_ended(self, container_id: str, pid: int) -> bool:
        """Whether this process of the container's current run has ended."""
        record = self._records.get(container_id)
        return record is not None and pid in record.exits

    def settled(self, container_id: str) -> bool:
        """Whether all that will be known of its name and image is known."""
        record = self._records.get(container_id)
        return record is None or record.settled

    async def named(self, container_id: str, within: float = 0.1) -> Container | None:
        """The container once it is settled, or as it is after `within` seconds."""
        if not self.settled(container_id):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiters = self._waiting.setdefault(container_id, [])
            waiters.append(waiter)
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(within):
                        await waiter
            finally:
                if waiter in waiters:
                    waiters.remove(waiter)
                if not waiters and self._waiting.get(container_id) is waiters:
                    del self._waiting[container_id]
        return self.get(container_id)

    # Witnesses

    def source_up(self, source: str, resolve: Callable[[str], None]) -> None:
        """From now on `source` is asked about containers that the kernel shows.

        `resolve(id)` must end in a transition, a `learn` or a `disclaim` by that source, at once or later.
        A source that is still connecting is up: it answers when it can, or goes down.
        """
        self._sources[source] = resolve

    def source_down(self, source: str) -> None:
        """`source` can't be asked for now. What it drives stays as it is: it may come back with the truth."""
        self._sources.pop(source, None)
        for record in list(self._records.values()):
            self._answered(record, source)

    def release(self, source: str, time_ns: int) -> None:
        """`source` is given up: the kernel drives its containers, from what it has seen of them."""
        for record in list(self._records.values()):
            if record.driver == source:
                record.driver = KERNEL
                record.begun = False
                if record.container.state is RUNNING and not record.occupied:
                    self._advance(record, EXITED, time_ns, synthesized=True)

    def learn(
        self, container_id: str, source: str, facts: Facts, *, final: bool = True, persistent: bool = False
    ) -> None:
        """Facts without a transition. `final`: `source` has nothing to add. Ignored if it is unknown."""
        record = self._records.get(container_id)
        if record is None:
            return
        record.persistent |= persistent
        self._merge(record, facts, authoritative=record.driver in ("", source, KERNEL))
        if final and source == record.driver:
            self._settle(record)

    def claim(self, container_id: str, source: str, facts: Facts) -> None:
        """`source` drives this container from now on; no transition, more facts follow."""
        if container_id in self._destroyed and container_id not in self._records:
            return
        record = self._record(container_id)
        record.driver = source
        record.asked.clear()
        self._merge(record, facts)

    def disclaim(self, container_id: str, source: str) -> None:
        """`source` does not know this container, or has told all that it knows without driving it."""
        record = self._records.get(container_id)
        if record is not None:
            self._answered(record, source)

    # Transitions told by engines

    def created(self, container_id: str, source: str, time_ns: int, facts: Facts = Facts()) -> None:
        """A container was made."""
        self._told(container_id, source, CREATED, time_ns, facts)

    def running(self, container_id: str, source: str, time_ns: int, facts: Facts = Facts()) -> None:
        """A container's program was started, for the first time or again."""
        self._told(container_id, source, RUNNING, time_ns, facts)

    def exited(
        self, container_id: str, source: str, time_ns: int, facts: Facts = Facts(), *, ran: bool = True
    ) -> None:
        """A container's program ended, or (`ran` False) never could be started."""
        self._told(container_id, source, EXITED, time_ns, facts, ran)

    def destroyed(self, container_id: str, source: str, time_ns: int, facts: Facts = Facts()) -> None:
        """A container was removed."""
        self._told(container_id, source, DESTROYED, time_ns, facts)

    def listed(
        self, source: str, listings: Iterable[Listing], time_ns: int, *, following: Collection[str] = ()
    ) -> None:
        """An engine's complete list. What it implies and nobody told is synthesized.

        Containers from before `born_ns` become known without any event. `following`: the containers of
        which the source has events in hand that it will tell after this; the list need not explain them.
        """
        present = set()
        for listing in listings:
            present.add(listing.id)
            self.listed_one(source, listing, time_ns)
        for record in list(self._records.values()):
            missing = record.driver == source and record.container.id not in present
            if missing and record.container.id not in following:
                self._advance(record, DESTROYED, time_ns, synthesized=True)

    def listed_one(self, source: str, listing: Listing, time_ns: int) -> None:
        record = self._records.get(listing.id)
        if record is None and listing.id in self._destroyed:
            return
        identity = replace(listing.facts, host_pid=0)  # a pid belongs to one run
        if record is None:
            record = self._record(listing.id)
        shown_by_kernel = record.occupied and record.container.state is UNKNOWN
        record.driver = source
        record.asked.clear()
        self._merge(record, identity)
        if record.container.state is UNKNOWN and listing.created_ns < self.born_ns:
            # Made before the sensor: no event for that. If the kernel showed it starting, that is one.
            state = CREATED if shown_by_kernel else listing.state
            record.container = replace(
                record.container,
                state=state,
                exit=exit_of(listing.facts.exit_code) if state is EXITED else None,
            )
            record.last_ns = min(time_ns, self.born_ns)
            if state is RUNNING:
                self._set_pid(record, listing.facts.host_pid)
        if listing.state is not record.container.state:
            self._advance(record, listing.state, time_ns, listing.facts, listing.ran, synthesized=True)
        elif listing.state is RUNNING:
            self._advance(record, listing.state, time_ns, listing.facts, synthesized=True)
        self._settle(record)

    # What the kernel shows

    def seen(self, container_id: str, time_ns: int, *, existing: bool = False) -> None:
        """A process is in the container's cgroup. `existing`: it was found so at start, which is no event."""
        record = self._records.get(container_id)
        if record is None:
            old = self._destroyed.get(container_id)
            if old is not None and (old.driver != KERNEL or is_hex_id(container_id)):
                return  # a straggler: engines never use an id twice
            record = self._record(container_id)
        record.vanished = False
        if record.occupied:
            return
        record.occupied = True
        record.seen_ns = record.kernel_ns = time_ns
        if record.driver == KERNEL and existing:
            self._kernel_says(record, time_ns)
        elif record.driver in ("", KERNEL):
            record.begun = not existing
            if existing:
                record.driver = KERNEL
                record.container = replace(record.container, state=RUNNING)
                record.last_ns = time_ns
            else:
                self._set_pid(record, 0, replace_old=True)  # of an earlier run
            self._ask(record)

    def emptied(self, container_id: str, time_ns: int) -> None:
        """The container's last process is gone."""
        record = self._records.get(container_id)
        if record is not None:
            record.occupied = False
            record.kernel_ns = time_ns
            if record.driver == KERNEL:
                self._kernel_says(record, time_ns)

    def removed(self, container_id: str, time_ns: int) -> None:
        """The container's cgroup is gone; so is the container unless it is kept on disk."""
        record = self._records.get(container_id)
        if record is not None:
            record.occupied = False
            record.vanished = True
            record.kernel_ns = time_ns
            if record.driver == KERNEL:
                self._kernel_says(record, time_ns)

    def gone(self, container_id: str, time_ns: int) -> None:
        """A container that was kept on disk is there no more."""
        record = self._records.get(container_id)
        if record is not None:
            record.persistent = False
            record.vanished = not record.occupied
            if record.driver == KERNEL:
                self._kernel_says(record, time_ns)

    def process_exited(self, pid: int, wait_status: int, container_id: str | None = None) -> None:
        """A process ended with this wait(2) status: if it was a container's first, that is how it ended.

        Give `container_id` if known: an engine may tell a short container's pid only when it is over.
        """
        if container_id is None:
            container_id = self._by_pid.get(pid)
        record = self._records.get(container_id) if container_id else None
        if record is not None:
            record.exits.pop(pid, None)
            if len(record.exits) >= self.EXITS:
                del record.exits[next(iter(record.exits))]
            record.exits[pid] = wait_status

    def _ask(self, record: _Record) -> None:
        container_id = record.container.id
        record.asked = set(self._sources)
        for source, resolve in list(self._sources.items()):
            if source in record.asked:
                resolve(container_id)
        if not record.asked:
            self._unclaimed(record)

    def _answered(self, record: _Record, source: str) -> None:
        if source in record.asked:
            record.asked.discard(source)
            if not record.asked:
                self._unclaimed(record)

    def _unclaimed(self, record: _Record) -> None:
        """Everybody was asked, no engine wants it."""
        record.driver = record.driver or KERNEL
        self._settle(record)
        if record.driver == KERNEL and record.begun:
            record.begun = False
            pid = Facts(host_pid=record.container.host_pid)
            self._advance(record, RUNNING, record.seen_ns, pid)
            self._kernel_says(record, record.kernel_ns)

    def _kernel_says(self, record: _Record, time_ns: int) -> None:
        """Bring a container that the kernel drives to where its cgroup is."""
        if record.begun:
            return  # that comes first
        time_ns = max(
            time_ns, record.last_ns
        )  # the kernel's news come in order, an engine's clock may differ
        if record.occupied:
            self._advance(record, RUNNING, time_ns)
        elif record.vanished and not record.persistent:
            self._advance(record, DESTROYED, time_ns)
        else:
            self._advance(record, EXITED, time_ns)

    # The life of one container

    def _told(
        self,
        container_id: str,
        source: str,
        kind: ContainerState,
        time_ns: int,
        facts: Facts,
        ran: bool = True,
    ) -> None:
        known = self.get(container_id)
        if kind in (RUNNING, EXITED) and not facts.host_pid and not (known and known.host_pid):
            self._catch_up()  # perhaps it is over, so that nobody but the kernel lane can tell its pid
        if container_id in self._destroyed and container_id not in self._records:
            self.counts.stale += 1
            return
        record = self._record(container_id)
        record.driver = source
        record.asked.clear()
        self._merge(record, replace(facts, host_pid=0))  # a pid belongs to one run, _advance decides
        self._advance(record, kind, time_ns, facts, ran)

    def _advance(
        self,
        record: _Record,
        kind: ContainerState,
        time_ns: int,
        facts: Facts = Facts(),
        ran: bool = True,
        synthesized: bool = False,
    ) -> None:
        """Bring the container to `kind`, through every step between, unless that is old news."""
        state = record.container.state
        if state is UNKNOWN and kind is not CREATED:
            self._to(record, CREATED, time_ns, synthesized=True)
            state = CREATED
        if kind is state and kind is not RUNNING:
            return
        if kind is CREATED and state is not UNKNOWN:
            return
        if kind in (RUNNING, EXITED) and state in (RUNNING, EXITED) and time_ns < record.last_ns:
            self.counts.stale += 1  # of an earlier run
            return
        if kind is RUNNING and state is RUNNING:
            pid = record.container.host_pid
            if not pid or not facts.host_pid or pid == facts.host_pid:
                self._set_pid(record, facts.host_pid)
                return
            self._to(record, EXITED, time_ns, synthesized=True)  # it was restarted unheard
        elif kind is EXITED and state is CREATED and ran:
            self._to(record, RUNNING, time_ns, facts, synthesized=True)
        elif kind is DESTROYED and state is RUNNING:
            self._to(record, EXITED, time_ns, facts, synthesized=True)
        self._to(record, kind, time_ns, facts, synthesized=synthesized)

    def _to(
        self,
        record: _Record,
        kind: ContainerState,
        time_ns: int,
        facts: Facts = Facts(),
        *,
        synthesized: bool = False,
    ) -> None:
        if kind is RUNNING:
            record.container = replace(record.container, state=kind, exit=None)
            self._set_pid(record, facts.host_pid or self._first_process(record), replace_old=True)
        elif kind is EXITED:
            self._set_pid(record, facts.host_pid)
            if not record.container.host_pid:
                self._set_pid(record, self._first_process(record, facts.exit_code))
            ended = exit_of(facts.exit_code, self._wait_status(record, facts.exit_code))
            record.container = replace(record.container, state=kind, exit=ended)
            self._by_pid.pop(record.container.host_pid, None)
            record.exits.clear()
        else:
            record.container = replace(record.container, state=kind)
        record.last_ns = max(record.last_ns, time_ns)
        self.counts.transitions += 1
        self.counts.synthesized += synthesized
        transition = Transition(kind, record.container, record.last_ns, synthesized)
        if kind is DESTROYED:
            self._bury(record)
        for listener in self.on_transition:
            listener(transition)

    def _first_process(self, record: _Record, code: int | None = None) -> int:
        """The pid of a container that is over, which nobody looked at in time; 0 if that can't be said.

        The first process of a pid namespace ends after all others in it; it ended as the engine says.
        """
        if record.occupied or not record.exits:
            return 0
        pid, status = next(reversed(record.exits.items()))
        ended = exit_of(None, status)
        return pid if code is None or (ended is not None and ended.code == code) else 0

    def _wait_status(self, record: _Record, code: int | None) -> int | None:
        """The wait status of the container's first process, if the kernel lane told it."""
        pid = record.container.host_pid
        if pid:
            return record.exits.get(pid)
        if code is None:
            # The first process of a pid namespace ends after all others in it.
            return next(reversed(record.exits.values()), None) if record.driver == KERNEL else None
        # The engine never told the pid: any process that ended with this very code is as good.
        for status in record.exits.values():
            ended = exit_of(None, status)
            if ended is not None and ended.code == code:
                return status
        return None

    def _set_pid(self, record: _Record, pid: int, *, replace_old: bool = False) -> None:
        old = record.container.host_pid
        if (pid or replace_old) and pid != old:
            self._by_pid.pop(old, None)
            record.container = replace(record.container, host_pid=pid)
            if pid:
                self._by_pid[pid] = record.container.id
                self._changed(record)

    def _merge(self, record: _Record, facts: Facts, *, authoritative: bool = True) -> None:
        """Take over what is new; a witness that doesn't drive only fills what is empty."""
        old = record.container
        changes: dict[str, object] = {}
        for key in ("name", "image_id", "image_name", "runtime"):
            value = getattr(facts, key)
            if value and value != getattr(old, key) and (authoritative or not getattr(old, key)):
                changes[key] = value
        identity = bool(changes)
        for key in ("docker_config", "oci_config"):
            document = getattr(facts, key)
            if document is not None and (authoritative or getattr(old, key) is None):
                size = len(document.packed) - len(getattr(getattr(old, key), "packed", b""))
                if self._documents_size + size > DOCUMENTS_LIMIT:
                    self.counts.documents_dropped += 1
                    continue
                self._documents_size += size
                changes[key] = document
        if changes:
            record.container = replace(old, **changes)  # type: ignore[arg-type]
        if facts.host_pid and (old.state is not EXITED or record.begun):
            self._set_pid(record, facts.host_pid)
        if identity:
            self._changed(record)
        container = record.container
        if container.name and container.image_name and container.image_id:
            self._settle(record)

    def _changed(self, record: _Record) -> None:
        for listener in self.on_change:
            listener(record.container)

    def _settle(self, record: _Record) -> None:
        if record.settled:
            return
        record.settled = True
        for waiter in self._waiting.pop(record.container.id, []):
            if not waiter.done():
                waiter.set_result(None)
        for listener in self.on_settled:
            listener(record.container)

    def _record(self, container_id: str) -> _Record:
        record = self._records.get(container_id)
        if record is None:
            while len(self._records) >= self._limit:
                self.counts.evicted += 1
                self._drop(self._records[next(iter(self._records))])
            self._destroyed.pop(container_id, None)
            record = self._records[container_id] = _Record(container_id)
        return record

    def _bury(self, record: _Record) -> None:
        """Out of the table, but remembered for a while: late news of it must not revive it."""
        self._drop(record)
        record.container = replace(record.container, docker_config=None, oci_config=None)
        self._destroyed[record.container.id] = record
        while len(self._destroyed) > self._remembered:
            self._destroyed.popitem(last=False)

    def _drop(self, record: _Record) -> None:
        container = record.container
        del self._records[container.id]
        self._by_pid.pop(container.host_pid, None)
        for document in (container.docker_config, container.oci_config):
            if document is not None:
                self._documents_size -= len(document.packed)
        self._settle(record)


HEX_DIGITS: Final = frozenset("0123456789abcdef")


def is_hex_id(text: str) -> bool:
    """Whether this is an id as engines make them, of which a prefix may stand for the whole."""
    return len(text) == 64 and HEX_DIGITS.issuperset(text)
