"""Whose a probe is, written in its name, so that those of dead sensors can be told and removed.

A probe outlives the sensor that is killed hard. Its group says who made it:

    ringside_<pid namespace>_<pid in it>_<start time>

The start time (clock ticks since boot, field 22 of /proc/PID/stat) tells a reused pid apart;
the namespace (inode of /proc/PID/ns/pid) a sensor in another container, for which the same pid
is somebody else. Boots need no mark: probes don't survive one.

When in doubt a sensor counts as alive: a probe left over costs little, a live one removed
blinds somebody.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path

PREFIX = "ringside"

_GROUP = re.compile(rf"^{PREFIX}_(?P<namespace>[0-9a-f]+)_(?P<pid>[0-9]+)_(?P<start>[0-9]+)(?:_[0-9]+)?$")

# PROC_PID_INIT_INO, include/linux/proc_ns.h: from the first pid namespace all processes are seen
_FIRST_PID_NAMESPACE = 0xEFFFFFFC


class Life(Enum):
    """What is known of an owner."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"  # in a namespace that can't be seen from here


@dataclass(frozen=True, slots=True)
class Owner:
    """One run of one sensor. `namespace` 0 if it could not be learned."""

    namespace: int
    pid: int
    start: int

    @classmethod
    def current(cls, proc: Path | str = "/proc") -> Owner:
        """This very process."""
        return _current(Path(proc), os.getpid())

    @classmethod
    def of_group(cls, group: str) -> Owner | None:
        """The owner that a group name tells; None if the group is another tool's."""
        match = _GROUP.match(group)
        return Owner(int(match["namespace"], 16), int(match["pid"]), int(match["start"])) if match else None

    @property
    def group(self) -> str:
        """The group for this owner's probes: [a-z0-9_], at most 63 characters."""
        return f"{PREFIX}_{self.namespace:x}_{self.pid}_{self.start}"

    def name(self, stem: str, serial: int) -> str:
        """An event name that no other sensor uses.

        kprobe_profile lists events without their groups, so the name alone must tell.
        """
        token = hashlib.blake2s(self.group.encode(), digest_size=4).hexdigest()
        return f"{stem}_{token}_{serial}"

    def life(self, proc: Path | str = "/proc") -> Life:
        """Whether this owner still runs, as seen from the pid namespace of `proc`."""
        proc = Path(proc)
        here = _pid_namespace(proc / "1") or _own_if_seen_by(proc)
        if here == self.namespace:
            return self._life_of(proc / str(self.pid))
        if not here or not self.namespace:
            return Life.UNKNOWN
        # In a namespace below this one the process is seen under another pid, above it not at all.
        for directory in proc.iterdir():
            if directory.name.isdecimal() and _pid_in_own_namespace(directory) == self.pid:
                namespace = _pid_namespace(directory)
                if namespace is None:
                    return Life.UNKNOWN  # perhaps the one, but it doesn't let us look
                if namespace == self.namespace and self._life_of(directory) is not Life.DEAD:
                    return Life.ALIVE
        return Life.DEAD if here == _FIRST_PID_NAMESPACE else Life.UNKNOWN

    def _life_of(self, directory: Path) -> Life:
        try:
            stat = _stat(directory)
        except (FileNotFoundError, ProcessLookupError):
            return Life.DEAD
        except OSError:
            return Life.UNKNOWN
        if stat is None:
            return Life.UNKNOWN
        state, start = stat
        # A time namespace shifts what is read as start time: then it can't tell processes apart.
        same_clock = _inode(directory / "ns" / "time") in (
            None,
            _inode(directory.parent / "self" / "ns" / "time"),
        )
        if start != self.start and same_clock:
            return Life.DEAD
        if state in "ZX" and _thread_count(directory) <= 1:
            return Life.DEAD
        return Life.ALIVE


@cache
def _current(proc: Path, pid: int) -> Owner:  # by pid, so that a forked child is another owner
    own = proc / "self"
    stat = _stat(own)
    return Owner(_pid_namespace(own) or 0, pid, stat[1] if stat else 0)


def _stat(directory: Path) -> tuple[str, int] | None:
    """State and start time of a process; None if the line has another shape."""
    # pid (comm) state ppid ...; comm may hold spaces and parentheses itself
    fields = (directory / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    return (fields[0], int(fields[19])) if len(fields) > 19 else None


def _pid_namespace(directory: Path) -> int | None:
    return _inode(directory / "ns" / "pid")


def _own_if_seen_by(proc: Path) -> int | None:
    """Our own namespace, if this procfs speaks in its pids (another's may be bound to a path)."""
    try:
        return _pid_namespace(proc / "self") if os.readlink(proc / "self") == str(os.getpid()) else None
    except OSError:
        return None


def _inode(link: Path) -> int | None:
    """The number in a link such as pid:[4026531836]; None if it can't be read."""
    try:
        match = re.search(r"\[(\d+)\]", os.readlink(link))
    except OSError:
        return None
    return int(match[1]) if match else None


def _pid_in_own_namespace(directory: Path) -> int | None:
    """The process's pid in the innermost namespace it is in: last of `NSpid: 4242 17 1`."""
    try:
        status = (directory / "status").read_text("utf-8", "replace")
    except OSError:
        return None
    match = re.search(r"^NSpid:.*?(\d+)$", status, re.MULTILINE)
    return int(match[1]) if match else None


def _thread_count(directory: Path) -> int:
    try:
        return sum(1 for _ in (directory / "task").iterdir())
    except OSError:
        return 0
