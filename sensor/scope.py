"""Kernel events limited to the cgroups of the containers that are wanted (`--scope`).

perf_event_open(2) with PERF_FLAG_PID_CGROUP gives a perf event that the kernel schedules in with the tasks
of one cgroup and those below it. Others' events are not even made, their tracepoints cost next to nothing;
but whenever tasks of different cgroups follow each other, the kernel switches perf events too, which takes
microseconds. It is done only where it misses nothing that C would have let through:

- All that want the kernel event want certain containers, by id, that run. A name or an image may fit a
  container that begins later, whose first events come before anybody here knows that it exists.
- A process is in such a container exactly if it is in its one cgroup of the unified hierarchy, where
  perf_event then is. Where v1 hierarchies name containers too, a process is moved in each by itself.
- They are few: each is a perf event more on each CPU.

What may end that (the container's last process ends, its cgroup goes, it gets another, records were lost)
widens at once to the whole system; when all is as it should be again, the events are limited again. While
one perf event takes another's place both are there, and of what both tell the first counts (`is_twin()`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ._perf import ffi, lib
from .engine import clock
from .errors import RingsideError

if TYPE_CHECKING:
    from .cgroup import CgroupOwner
    from .perf import Rings
    from .procfs import Procfs

log = logging.getLogger(__name__)

MOST_CONTAINERS: Final = 8
MOST_EVENTS: Final = 256  # perf events for one kernel event: cgroups times CPUs

# A record that nobody wants costs its maker and the sensor some 0.7 us together. While some perf events are
# limited to cgroups, each switch from one's task to another's takes all of them off the CPU's list and puts
# them there again, 0.3 us each.
WORTH: Final = 1.0  # records for a perf event that is switched
NOT_WORTH: Final = 0.5
FEW_RECORDS: Final = 10_000.0  # a second: under 1 % of a CPU, not worth a look
FEW_SWITCHED: Final = 15_000.0
LOOK_AGAIN: Final = 60 * 10**9  # ns: records that are not made can't be counted


class Scope:
    """Which outputs are limited to which cgroups, and why they may be."""

    def __init__(
        self, rings: Rings, procfs: Procfs, mount: str | None, owner: Callable[[str], CgroupOwner | None]
    ) -> None:
        """`mount`: where the unified hierarchy is; None: nothing is ever limited."""
        self._rings = rings
        self._procfs = procfs
        self._mount = mount
        self._owner = owner
        self._limited: dict[int, dict[str, str]] = {}  # output -> container -> its cgroup's path
        rings.scope = self.cgroups

    def cgroups(self, outputs: Iterable[int]) -> tuple[str, ...]:
        """The folders of the cgroups that suffice for these outputs; none: the whole system it must be."""
        wanted: set[str] = set()
        for output in outputs:
            limited = self._limited.get(output)
            if limited is None:
                return ()
            wanted.update(limited.values())
        outermost = [path for path in wanted if not any(_is_below(path, other) for other in wanted)]
        most = min(MOST_CONTAINERS, MOST_EVENTS // max(1, len(self._rings.cpus)))
        return tuple(f"{self._mount}{path}" for path in sorted(outermost)) if len(outermost) <= most else ()

    @property
    def limited(self) -> list[int]:
        """The outputs that get events of certain cgroups only."""
        return list(self._limited)

    def is_limited(self, output: int) -> bool:
        """True while an output gets events of certain cgroups only."""
        return output in self._limited

    def has(self, output: int, container_id: str) -> bool:
        """True if the output gets this container's events."""
        return container_id in self._limited.get(output, {container_id})

    def limit(self, output: int, containers: Mapping[str, Sequence[int]]) -> bool:
        """Limit an output to these containers, with the processes in each; False if that may miss some."""
        if self._mount is None or not 0 < len(containers) <= MOST_CONTAINERS:
            return False
        found = {one: self._cgroup_of(one, pids) for one, pids in containers.items()}
        limited = {one: path for one, path in found.items() if path}
        if len(limited) < len(found):
            return False
        self._limited[output] = limited
        self._apply()
        return True

    def widen(self, outputs: Iterable[int]) -> None:
        """Give these outputs, as far as they are limited, everybody's events again."""
        before = len(self._limited)
        for output in outputs:
            self._limited.pop(output, None)
        if len(self._limited) < before:
            self._apply()

    def limited_to(self, container_id: str) -> list[int]:
        """The outputs that are limited to this container, and perhaps others."""
        return [output for output, there in self._limited.items() if container_id in there]

    def forget(self, output: int) -> None:
        """The output is gone, or about to be."""
        self._limited.pop(output, None)

    def is_outside(self, pid: int, container_id: str) -> bool:
        """True if a process that turned up in a container is not where its events are limited to."""
        there = {one[container_id] for one in self._limited.values() if container_id in one}
        text = self._procfs.cgroups(pid) if there else None
        return text is not None and there != {self._path_in(text, container_id)}

    def limited_to_cgroup(self, path: str) -> list[int]:
        """The outputs that are limited to the cgroup of this path, and perhaps others."""
        return [output for output, there in self._limited.items() if path in there.values()]

    def _apply(self) -> None:
        for event in list(self._rings.open_events):
            try:
                event.rescope()
            except RingsideError as error:
                log.error("%s: still made where it was before: %s", event.name, error)

    def _cgroup_of(self, container_id: str, pids: Sequence[int]) -> str | None:
        """The path of the one cgroup that a container's processes are all in; None if that can't be said."""
        paths: set[str | None] = set()
        proved: set[str] = set()
        for pid in pids:
            text = self._procfs.cgroups(pid)
            if text is None:
                continue
            paths.add(self._path_in(text, container_id))
            leaf = _unified_path(text)
            if leaf is not None and leaf not in proved and self._holds(leaf, pid):
                proved.add(leaf)
            elif leaf not in proved:
                return None
        return paths.pop() if len(paths) == 1 else None

    def _path_in(self, text: str, container_id: str) -> str | None:
        """Where in the unified hierarchy a container begins, by a /proc/PID/cgroup; None if v1 has a say."""
        path = _unified_path(text)
        if path is None or any(self._owner(line.split(":", 2)[-1]) for line in _v1_lines(text)):
            return None
        parts = path.split("/")
        tops = ("/".join(parts[: end + 1]) for end in range(1, len(parts)))
        for top in tops:
            owner = self._owner(top)
            if owner is not None and owner.id == container_id:
                return top
        return None

    def _holds(self, path: str, pid: int) -> bool:
        """Whether this path, below this mount, is the cgroup that the process is in."""
        try:
            return str(pid) in Path(f"{self._mount}{path}", "cgroup.procs").read_text().split()
        except OSError:
            return False


class Gain:
    """Whether it is cheaper to limit kernel events, by what is made in vain and what it costs."""

    def __init__(self, counts: Counts, now: Callable[[], int] = clock) -> None:
        self._counts = counts
        self._now = now
        self.pays = False
        self._looked = self._since = now()
        self._in_vain = 0.0  # records a second that were not wanted when they were last made
        self._once = False  # it would have paid at the last look

    def weigh(self, able: Collection[int]) -> None:
        """Look at what was counted since the last time. `able`: the outputs that are limited or can be."""
        now = self._now()
        seconds, self._looked = max(1, now - self._looked) / 1e9, now
        in_vain = self._counts.made_in_vain(able) / seconds if able else 0.0
        if not able or not (self.pays or in_vain >= FEW_RECORDS):
            self.close()
            return
        count = self._counts.switched()
        if count is None:
            return
        switched = count / seconds
        if not self.pays:
            before, self._once = self._once, in_vain > WORTH * switched
            if before and self._once:
                self._in_vain, self._since = in_vain, now
                self._decide(True, switched)
        elif self._in_vain < NOT_WORTH * switched:
            self._once = False
            self._decide(False, switched)
        elif switched > FEW_SWITCHED and now - self._since > LOOK_AGAIN:
            self.pays = False  # for as long as it takes to count again

    def close(self) -> None:
        """Count no more; idempotent."""
        self._counts.close()
        self.pays = self._once = False

    def _decide(self, pays: bool, switched: float) -> None:
        self.pays = pays
        where = "in the containers' cgroups only" if pays else "everywhere"
        log.info(
            "kernel events are made %s: %.0f a second in vain, %.0f perf events switched",
            *(where, self._in_vain, switched),
        )


class Counts:
    """What is made in vain, counted by the engine, and what is or would be switched, by the kernel."""

    def __init__(self, rings: Rings) -> None:
        self._rings = rings
        self._unwanted: dict[int, int] = {}  # source -> its records that nobody wanted, until the last look
        self._cpus: list[int] = []  # those that are counted on
        self._counters: list[int] = []  # descriptors of what counts there
        self._switches: int | None = None

    def made_in_vain(self, able: Collection[int]) -> int:
        """How many records nobody wanted since the last time, of kernel events that could be limited."""
        sources = set()
        for event in self._rings.open_events:
            outputs = event.outputs() if event.outputs is not None else ()
            if outputs and set(outputs) <= set(able):
                sources.add(event.source)
        counts = {one: lib.rs_source_unwanted(self._rings.engine.handle, one) for one in sources}
        before, self._unwanted = self._unwanted, counts
        return sum(count - before.get(one, count) for one, count in counts.items())

    def switched(self) -> int | None:
        """How many perf events that makes since then, as tasks of different cgroups followed each other.

        None if that is not known.
        """
        if self._cpus != self._rings.cpus:
            self.close()
            self._cpus = list(self._rings.cpus)
            perf = ffi.new("rs_perf *", {"tracepoint": lib.RS_PERF_SWITCHES})
            opened = [lib.rs_perf_open(perf, cpu, -1) for cpu in self._cpus]
            self._counters = [fd for fd in opened if fd >= 0]
            for fd in self._counters:
                lib.rs_perf_enable(fd, 1)
        if len(self._counters) < len(self._cpus):
            return None
        before, self._switches = self._switches, sum(map(lib.rs_perf_count, self._counters))
        return None if before is None else (self._switches - before) * len(self._rings.open_events)

    def close(self) -> None:
        """Count no more; idempotent."""
        for fd in self._counters:
            os.close(fd)
        self._cpus, self._counters, self._switches = [], [], None


def _unified_path(text: str) -> str | None:
    """The process's place in the unified hierarchy; None if perf_event is not there, or it can't be said."""
    for line in _v1_lines(text):
        if "perf_event" in line.split(":", 2)[1].split(","):
            return None
    path = next((line[3:] for line in text.splitlines() if line.startswith("0::")), None)
    return None if path is None or ".." in path.split("/") or path.endswith(" (deleted)") else path


def _v1_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("0::") and line.count(":") >= 2]


def _is_below(path: str, other: str) -> bool:
    return path.startswith(f"{other}/")
