"""Containers: which one a process is in, and the lifecycle events.

Identity comes from the kernel: cgroup:cgroup_attach_task says when a process is moved into a container's
cgroup; a child is in its parent's, unless clone3(2) put it straight into another: then procfs says which, or,
if it is gone already, the sample of its first exec, which carries the cgroup's id. Names and images come
from engines and runtimes (docker.py, runtimes.py) by way of the container table. Until a new container's
names are known, its events wait in the engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringside.api.v0 import (
    ContainerEvent,
    ContainerEventFilter,
    ContainerEventType,
    ContainerEventView,
    ContainerFilter,
    Event,
)

from .. import wire
from .._perf import ffi, lib
from ..cgroup import Attach, CgroupOwner, attached, owner_from_proc_cgroup
from ..container import Container, ContainerState, ContainerTable, Transition
from ..container_filter import ContainerMatcher
from ..container_past import Past, Step
from ..docker import DockerSource, engine_sockets
from ..engine import clock
from ..errors import KernelError, RequestError, UnservableError
from ..gain import Counts, Gain
from ..process import Process
from ..runtimes import DiskSource, Runtimes
from ..scope import Scope
from ..subscription import Loss
from . import Mechanism
from .process import RESULT, Layout, text_at

if TYPE_CHECKING:
    from ..sensor import Sensor
    from ..subscription import Output

log = logging.getLogger(__name__)

FAMILY = "containers"
_FORGET = 10.0  # s after its end that a container's number may be given to another
_REST, _LONGEST_REST = 10**9, 600 * 10**9  # ns between tries to limit events
_UNIFIED = ("sys/fs/cgroup", "sys/fs/cgroup/unified")


@dataclass(eq=False)
class ContainerWant:
    """Container events of one type, in one view."""

    events: ContainerFamily
    type: ContainerEventType
    view: ContainerEventView
    family: str = field(default=FAMILY)

    def attach(self, output: int) -> int:
        """Have them come to the output."""
        self.events.listeners.append((output, self))
        return 0

    def detach(self, output: int) -> None:
        """No more."""
        if (output, self) in self.events.listeners:
            self.events.listeners.remove((output, self))


class _Member:
    """A container as the lanes know it: by number."""

    __slots__ = ("held", "id", "new", "number", "told", "wide")

    def __init__(self, id: str, number: int) -> None:
        self.id = id
        self.number = number
        self.new = True  # no process was seen in it
        self.wide = 0  # since when its events are made wherever they happen, if they ever were not
        self.told = 0  # when its last event was
        self.held: asyncio.TimerHandle | None = None


class ContainerFamily:
    """Follows containers, attributes processes to them, tells of their life."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor
        self._processes = sensor.processes
        self.table = ContainerTable(catch_up=sensor.drain_once)
        self.table.on_transition.append(self._on_transition)
        self.table.on_change.append(self._on_change)
        self.table.on_settled.append(self._on_settled)
        self.listeners: list[tuple[int, ContainerWant]] = []
        self._fields = wire.fields(Event)
        self._past = Past(sensor.config.history_size // 4)
        self._members: dict[str, _Member] = {}
        self._numbers: dict[int, _Member] = {}
        self._free: list[int] = []
        self._ended: set[str] = set()  # containers whose numbers may be given to others
        self._filters: dict[int, tuple[Output, ContainerMatcher, bytearray]] = {}
        self._cgroup_ids: dict[int, str | None] = {}
        self._runtimes = Runtimes(Path(sensor.config.host_root))
        self._disk = DiskSource(self.table, self._runtimes, on_cgroups=self._on_cgroups, is_in=self._is_in)
        self._opened = False
        self._unified = self._find_unified()
        self._only_unified = self._unified == str(Path(sensor.config.host_root, _UNIFIED[0]))
        self._scope = Scope(
            sensor.rings,
            sensor.processes.procfs,
            None if sensor.config.scope == "system" else self._unified,
            self._disk.owner,
        )
        self._gain = Gain(Counts(sensor.rings)) if sensor.config.scope == "auto" else None
        self._unlimited: set[int] = set()  # outputs that may be limited when their containers run
        # those that could not be: when to try again, and the ns to rest then
        self._later: dict[int, tuple[int, int]] = {}
        self._said = False  # in the log: events are limited
        self._sources: list[Path] = []
        self._attach: Layout | None = None

    # -- life --------------------------------------------------------------------------------------

    def open(self) -> None:
        """Follow cgroups, learn the containers there are, listen to the engines."""
        tracefs, family = self._sensor.tracefs, self._sensor.process_family
        with suppress(KernelError):
            record = tracefs.read_format("cgroup", "cgroup_attach_task")
            self._attach = Layout(record, "pid", "dst_path")
            family.follow(record, self._on_attach)
            removed = tracefs.read_format("cgroup", "cgroup_rmdir")
            self._path = Layout(removed, "path")
            family.follow(removed, self._on_rmdir)
        processes = self._processes
        processes.on_emptied = self._emptied
        processes.on_learned, processes.on_resync = self.place, self._resync
        self._disk.start()
        for process in self._living():
            self.place(process, existing=True)
        self._opened = True
        self._sensor.spawn(self._disk.run(), "disk")
        self._open_engines()

    def close(self) -> None:
        """Leave nothing open; idempotent."""
        if self._gain is not None:
            self._gain.close()

    def _living(self) -> list[Process]:
        return [process for process in self._processes.living() if not process.is_kernel_thread]

    def _open_engines(self) -> None:
        config = self._sensor.config
        if config.engine == "none":
            return
        sockets = engine_sockets(Path(config.host_root))
        if config.engine != "auto":
            sockets = [("engine", Path(config.engine.removeprefix("unix:")))]
        for at, (kind, path) in enumerate(sockets):
            self._sources.append(path)
            name = f"{kind} {at}" if at else kind  # the table tells its sources apart by name
            source = DockerSource(self.table, path, name=name, running_facts=self._runtimes.running)
            self._sensor.spawn(source.run(), name)

    def mechanisms(self) -> list[Mechanism]:
        """How containers are told apart here."""
        there = [str(one) for one in self._sources if _is_there(one)]
        return [
            Mechanism(
                FAMILY,
                self._attach is not None,
                "cgroup tracepoints" if self._attach else "none",
                f"names from {', '.join(there)}" if there else "names from what runtimes leave on disk",
                "" if self._attach else "a kernel with CONFIG_CGROUPS",
            )
        ]

    def wants(self, request: ContainerEventFilter, path: str) -> list[ContainerWant]:
        """What a filter asks for. RequestError if it makes no sense."""
        if request.type not in list(ContainerEventType)[1:]:
            raise RequestError(f"{path}.type", "must be one of CONTAINER_EVENT_TYPE_CREATED and so on")
        if request.view not in list(ContainerEventView):
            raise RequestError(f"{path}.view", "must be BASIC or FULL")
        if self._attach is None:
            raise UnservableError(FAMILY, "no cgroup tracepoints", "a kernel with CONFIG_CGROUPS")
        return [ContainerWant(self, request.type, request.view)]

    # -- who is where ------------------------------------------------------------------------------

    def place(self, process: Process, *, existing: bool = False) -> None:
        """Read from procfs which container a process is in."""
        text = self._processes.procfs.cgroups(process.pid)
        if text is None:
            return
        owner = self._owner_in(text)
        if owner is None and process.container:
            stat = self._processes.procfs.stat(process.pid)
            if stat is None or stat.is_exiting:
                return  # in v1 such a process is shown at the root, wherever it was
        self._move(process, owner.id if owner else None, existing=existing)

    def _owner_in(self, text: str) -> CgroupOwner | None:
        owner = owner_from_proc_cgroup(text)
        paths = {line.split(":", 2)[-1] for line in text.splitlines()} - {"/"} if owner is None else ()
        return owner or next((found for path in paths if (found := self._disk.owner(path))), None)

    def _is_in(self, pid: int, container_id: str) -> bool:
        """Whether a process is of the container's current run."""
        process, member = self._processes.find(pid), self._members.get(container_id)
        if process is None or member is None or not process.alive:
            return self.table.has_ended(container_id, pid)
        return process.container == member.number

    def _on_cgroups(self, _owner: CgroupOwner, _paths: tuple[str, ...]) -> None:
        """These cgroups turned out to be a container's; who is in them?"""
        self._cgroup_ids.clear()
        lib.rs_cgroups_clear(self._sensor.engine.handle)
        for process in self._living() if self._opened else ():
            if not process.container:
                self.place(process)

    def _resync(self) -> None:
        """Records were lost, of moves between cgroups too."""
        self._widen(self._filters)
        for process in self._living():
            self.place(process)
        for member in list(self._members.values()):
            if not self._processes.processes_in(member.number):
                self.table.emptied(member.id, self._time())

    def _time(self) -> int:
        """When what is being handled happened, in ns since the epoch."""
        return time.time_ns() - (clock() - self._sensor.moment())

    def _move(self, process: Process, container_id: str | None, *, existing: bool = False) -> None:
        current = self._numbers.get(process.container)
        if (current.id if current else None) == container_id:
            return
        number = 0
        if container_id is not None:
            member = self._member(container_id)
            number = member.number
            self.table.seen(container_id, self._time(), existing=existing)
            if existing:
                member.new = False
            elif member.new:
                member.new = False
                if not self.table.settled(container_id):
                    self._disk.look_up(container_id)  # an engine may say it later
                if not self.table.settled(container_id):
                    self._hold(member)
        if number:
            self._check_scope(process, self._numbers[number])
        self._processes.moved(process, number)

    def _check_scope(self, process: Process, member: _Member) -> None:
        """A process came into a container: are its events made?"""
        since, outputs = self._sensor.engine.stop.time, self._scope.limited_to(member.id)
        if outputs and self._scope.is_outside(process.pid, member.id):
            self._widen(outputs)
            loss = Loss(f"container {member.id[:12]} has another cgroup", 1, since, clock())
            self._sensor.report(outputs, loss)
        elif since < member.wide and not self._processes.processes_in(member.number):
            container = self._known(member)
            concerned = [number for number, (_, one, _) in self._filters.items() if one.matches(container)]
            loss = Loss(f"container {member.id[:12]} began again too soon", 1, since, member.wide)
            self._sensor.report(concerned, loss)

    def _member(self, container_id: str) -> _Member:
        member = self._members.get(container_id)
        if member is None:
            member = _Member(container_id, self._free.pop() if self._free else len(self._numbers) + 1)
            self._members[container_id] = self._numbers[member.number] = member
            self._describe(member)
        return member

    def _known(self, member: _Member) -> Container:
        """What is known of a container, or was."""
        return self.table.get(member.id) or self._past.container(member.id) or Container(member.id)

    def _describe(self, member: _Member) -> None:
        """Publish what its processes' events say of a container, and who wants them."""
        container = self._known(member)
        fields = self._fields
        head = fields["container_id"].encode(container.id)
        tail = (
            fields["container_name"].encode(container.name)
            + fields["image_id"].encode(container.image_id)
            + fields["image_name"].encode(container.image_name)
        )
        self._sensor.engine.set_container(member.number, head, tail, hold=member.held is not None)
        for output, matcher, bits in self._filters.values():
            self._set_bit(output, matcher, bits, member, container)

    def _set_bit(
        self,
        output: Output,
        matcher: ContainerMatcher,
        bits: bytearray,
        member: _Member,
        container: Container,
    ) -> None:
        at, bit = divmod(member.number, 8)
        if len(bits) <= at:
            bits.extend(bytes(at + 64 - len(bits)))
        before = bits[at]
        bits[at] = before | 1 << bit if matcher.matches(container) else before & ~(1 << bit)
        if bits[at] != before:
            self._sensor.engine.set_containers(output.number, bytes(bits))
            if bits[at] > before and not self._scope.has(output.number, member.id):
                self._widen([output.number])

    def _hold(self, member: _Member) -> None:
        if self._sensor.config.hold:
            loop = asyncio.get_running_loop()
            member.held = loop.call_later(self._sensor.config.hold / 1e9, self._release, member)
            self._describe(member)

    def _release(self, member: _Member) -> None:
        if member.held is not None:
            member.held.cancel()
            member.held = None
        self._describe(member)
        self._sensor.engine.release(member.number)

    def _emptied(self, number: int) -> None:
        """The last process of a container is gone."""
        member = self._numbers.get(number)
        if member is not None:
            if limited := self._scope.limited_to(member.id):  # what runs in it next has another cgroup
                self._widen(limited)
                member.wide = clock()
            self.table.emptied(member.id, self._time())

    def _on_attach(self) -> int:
        assert self._attach is not None
        stop = self._sensor.engine.stop
        raw = ffi.buffer(stop.raw, stop.raw_length)
        pid, word = self._attach.read(raw)
        process = self._processes.find(pid)
        if process is None or not process.alive:  # a thread of a threaded cgroup, or gone
            return RESULT
        owner = self._disk.owner(_path_at(raw, word))
        new = owner.id if owner else None
        current = self._numbers.get(process.container)
        where = attached(current.id if current else None, new)
        if where is Attach.REREAD:
            self.place(process)
        else:
            self._move(process, where)
        return RESULT

    def _on_rmdir(self) -> int:
        stop = self._sensor.engine.stop
        raw = ffi.buffer(stop.raw, stop.raw_length)
        path = _path_at(raw, self._path.read(raw)[0])
        self._widen(self._scope.limited_to_cgroup(path))
        owner = self._disk.owner(path)
        member = self._members.get(owner.id) if owner else None
        if owner and (member is None or not self._processes.processes_in(member.number)):
            self.table.removed(owner.id, self._time())
            self._disk.forget(owner.id)
        return RESULT

    @property
    def cgroups_told(self) -> int:
        """Of which programs' cgroups C is to tell."""
        if self._unified is None:
            return lib.RS_CGROUPS_NONE
        # in a hybrid, a container may have left the unified hierarchy alone
        return lib.RS_CGROUPS_ALL if self._only_unified else lib.RS_CGROUPS_HOST

    def executed(self, pid: int, cgroup: int) -> None:
        """A program begins in this cgroup (its id in the unified hierarchy), perhaps of another container."""
        process = self._processes.get(pid)
        if cgroup not in self._cgroup_ids:
            if len(self._cgroup_ids) >= 65536:
                del self._cgroup_ids[next(iter(self._cgroup_ids))]
            self._cgroup_ids[cgroup] = self._container_of_cgroup(pid, cgroup)
        found = self._cgroup_ids[cgroup]
        current = self._numbers.get(process.container)
        if found != (current.id if current else None):
            if process.container == 0:
                self._move(process, found)
            else:
                self.place(process)
        member = self._members.get(found) if found else None
        if found is None or member is not None:
            lib.rs_cgroup_set(self._sensor.engine.handle, cgroup, member.number if member else 0)

    def process_exited(self, pid: int, container: int, code: int | None) -> None:
        """A container's process ended with this wait(2) status, if known; perhaps its first, or last."""
        member = self._numbers.get(container)
        if member is not None and code is not None:
            self.table.process_exited(pid, code, member.id)
        if not self._processes.processes_in(container):
            self._emptied(container)

    def _container_of_cgroup(self, pid: int, cgroup: int) -> str | None:
        assert self._unified is not None
        text = self._processes.procfs.cgroups(pid) or ""
        for line in text.splitlines():
            if line.startswith("0::"):
                path = line[3:]
                with suppress(OSError):
                    if os.stat(f"{self._unified}{path}").st_ino == cgroup:
                        return self._container_at(path)
        for folder, _, _ in os.walk(self._unified):
            with suppress(OSError):
                if os.stat(folder).st_ino == cgroup:
                    return self._container_at(folder[len(self._unified) :])
        return None

    def _container_at(self, path: str) -> str | None:
        owner = self._disk.owner(path or "/")
        return owner.id if owner else None

    def _find_unified(self) -> str | None:
        for place in _UNIFIED:
            path = Path(self._sensor.config.host_root, place)
            if (path / "cgroup.procs").exists() and (path / "cgroup.controllers").exists():
                return str(path)
        return None

    # -- what is known of containers ---------------------------------------------------------------

    def _on_change(self, container: Container) -> None:
        self._describe(self._member(container.id))

    def _on_settled(self, container: Container) -> None:
        member = self._members.get(container.id)
        if member is not None and member.held is not None:
            self._release(member)

    def _end(self, container_id: str) -> None:
        self._ended.add(container_id)
        self._forget(container_id)

    def _forget(self, container_id: str) -> None:
        """Give its number to others, if it ended long enough ago and nobody can look back at it."""
        if container_id not in self._ended or container_id in self._past:
            return
        self._ended.discard(container_id)
        member = self._members.get(container_id)
        if member is None or container_id in self.table:
            return
        if not self._processes.processes_in(member.number):
            del self._members[container_id], self._numbers[member.number]
            lib.rs_cgroups_clear(self._sensor.engine.handle)
            self._free.append(member.number)

    # -- events ------------------------------------------------------------------------------------

    def _on_transition(self, transition: Transition) -> None:
        kind = ContainerEventType(int(transition.kind))
        container = transition.container
        member = self._member(container.id)
        when = min(clock(), clock() - (time.time_ns() - transition.time_ns))
        init = self._processes.find(container.host_pid) if container.host_pid else None
        lineage = self._processes.lineage_field(init.pid) if init is not None and init.alive else b""
        member.told = max(1, when, member.told)  # two clocks may be some ns apart: in order all the same
        step = Step(member.told, transition, lineage)
        for gone in self._past.remember(step):
            self._forget(gone)
        wants = [(output, want) for output, want in self.listeners if want.type == kind]
        if wants:
            full = {output for output, want in wants if want.view == ContainerEventView.FULL}
            basic = {output for output, _ in wants} - full
            for outputs, is_full in ((basic, False), (full, True)):
                if outputs:
                    self._emit(sorted(outputs), step, member.number, is_full)
        if transition.kind is ContainerState.DESTROYED:
            asyncio.get_running_loop().call_later(_FORGET, self._end, container.id)

    def _emit(self, outputs: list[int], step: Step, number: int, full: bool) -> None:
        kind, container = step.transition.kind, step.transition.container
        values: dict[str, object] = {
            "type": ContainerEventType(int(kind)),
            "name": container.name,
            "image_id": container.image_id,
            "image_name": container.image_name,
            "host_pid": container.host_pid,
        }
        if container.exit is not None and kind is ContainerState.EXITED:
            values["exit_code"] = container.exit.code
            values["exit_status"] = container.exit.status
            values["exit_signal"] = container.exit.signal
            values["exit_core_dumped"] = container.exit.core_dumped
        if full:
            values["docker_config_json"] = container.docker_config_json
            values["oci_config_json"] = container.oci_config_json
        fields = self._fields
        body = b"".join(
            (
                fields["container_id"].encode(container.id),
                step.lineage,
                wire.nest(Event, "container", wire.encode(ContainerEvent, **values)),
                fields["container_name"].encode(container.name),
                fields["image_id"].encode(container.image_id),
                fields["image_name"].encode(container.image_name),
            )
        )
        self._sensor.publish(outputs, step.when, body, number)

    @property
    def remembered_since(self) -> int:
        """Nothing older than this is remembered (CLOCK_MONOTONIC_RAW ns)."""
        return self._past.since

    def look_back(self, output: int, since: int) -> Iterator[int]:
        """Tell an output what it wants of what happened since then; before each step, its time."""
        wants = [want for number, want in self.listeners if number == output]
        filtered = self._filters.get(output)
        for step in self._past.after(since):
            container = step.transition.container
            views = [want.view for want in wants if want.type == int(step.transition.kind)]
            member = self._members.get(container.id)
            if not views or (filtered and not (member and filtered[1].matches(container))):
                continue
            yield step.when
            self._emit([output], step, member.number if member else 0, ContainerEventView.FULL in views)

    # -- filters -----------------------------------------------------------------------------------

    def check(self, wanted: ContainerFilter) -> None:
        """RequestError if a container filter makes no sense."""
        matcher = ContainerMatcher.of(wanted)
        if matcher is not None:
            matcher.bind(self.table)

    def filter(self, output: Output, wanted: ContainerFilter) -> None:
        """Let only these containers' events pass to an output."""
        matcher = ContainerMatcher.of(wanted)
        if matcher is None:
            return
        matcher.bind(self.table)
        bits = bytearray(64)
        self._sensor.engine.set_containers(output.number, bytes(bits))
        self._filters[output.number] = (output, matcher, bits)
        for member in self._members.values():
            container = self._known(member)
            self._set_bit(output, matcher, bits, member, container)
        self._unlimited.add(output.number)
        self.limit()

    def unfilter(self, output: Output) -> None:
        """The output is gone."""
        self._filters.pop(output.number, None)
        self._unlimited.discard(output.number)
        self._later.pop(output.number, None)
        self._scope.forget(output.number)

    def weigh(self) -> None:
        """Once in a while: have the kernel make events where that is cheaper, as far as it misses none."""
        if not self._scope.is_possible:
            return
        if self._gain is not None:
            limited = self._scope.limited
            self._gain.weigh({*limited, *self._able()})
            if not self._gain.pays:
                self._widen(limited)
        self.limit()
        is_limited = bool(self._scope.limited)
        if is_limited != self._said and not (self._gain and self._gain.is_counting_anew):
            self._said = is_limited
            where = "in the cgroups of the containers that are wanted" if is_limited else "everywhere"
            log.info("kernel events are made %s%s", where, f": {self._gain.why}" if self._gain else "")

    def limit(self) -> None:
        """Let the kernel make only those events that outputs want, where all their containers run by now."""
        if not self._scope.is_possible or (self._gain is not None and not self._gain.pays):
            return
        able = self._able()
        running = {member.number: member.id for members in able.values() for member in members}
        pids: dict[str, list[int]] = {one: [] for one in running.values()}
        for process in self._living() if able else ():
            if process.container in running:
                pids[running[process.container]].append(process.pid)
        for number, members in able.items():
            if self._scope.limit(number, {member.id: pids[member.id] for member in members}):
                self._unlimited.discard(number)
                self._later.pop(number, None)
            else:
                _, rest = self._later.get(number, (0, _REST))
                self._later[number] = clock() + rest, min(2 * rest, _LONGEST_REST)

    def _able(self) -> dict[int, list[_Member]]:
        """Outputs that are not limited but could be, and to which containers: all that they want run."""
        able, now = {}, clock()
        for number in self._unlimited:
            if number in self._later and now < self._later[number][0]:
                continue
            members = [self._members.get(one) for one in self._filters[number][1].definite() or ()]
            there = [one for one in members if one and self._processes.processes_in(one.number)]
            if there and len(there) == len(members):
                able[number] = there
        return able

    def _widen(self, outputs: Iterable[int]) -> None:
        wider = [output for output in outputs if self._scope.is_limited(output)]
        self._unlimited.update(wider)
        self._scope.widen(wider)


def _path_at(raw: Any, word: int) -> str:
    """A cgroup's path, by the __data_loc word of a record."""
    word &= 0xFFFFFFFF
    return text_at(raw, word & 0xFFFF, word >> 16).decode("utf-8", "replace")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
