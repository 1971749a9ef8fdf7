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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .errors import RingsideError

if TYPE_CHECKING:
    from .cgroup import CgroupOwner
    from .perf import Rings
    from .procfs import Procfs

log = logging.getLogger(__name__)

MOST_CONTAINERS: Final = 8
MOST_EVENTS: Final = 256  # perf events for one kernel event: cgroups times CPUs


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
    def is_possible(self) -> bool:
        """False if nothing is ever limited."""
        return self._mount is not None

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
