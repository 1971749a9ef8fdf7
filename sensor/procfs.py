"""What procfs says of processes. Reads only; a process that is gone gives None, never an error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

_FLAG_KTHREAD = 0x00200000  # PF_KTHREAD, include/linux/sched.h
_FLAG_EXITING = 0x00000004  # PF_EXITING


@dataclass(frozen=True, slots=True)
class Stat:
    """The parts of /proc/PID/stat that matter here (proc_pid_stat(5)).

    `start` is in clock ticks since boot. `exit_code` is the raw wait(2) status, of a zombie only.
    """

    pid: int
    command: str
    state: str
    parent: int
    threads: int
    start: int
    is_kernel_thread: bool
    is_exiting: bool = False


class Procfs:
    """The procfs mounted at `root`."""

    def __init__(self, root: str = "/proc") -> None:
        self.root = root

    def pids(self) -> list[int]:
        """Every process now."""
        return [int(name) for name in os.listdir(self.root) if name.isdecimal()]

    def read(self, *parts: object) -> bytes | None:
        """A file's content; None if it, or the process, is not there (any more)."""
        try:
            fd = os.open("/".join((self.root, *map(str, parts))), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            data = os.read(fd, 65536)
            if len(data) == 65536:
                while more := os.read(fd, 1 << 20):
                    data += more
            return data
        except OSError:
            return None
        finally:
            os.close(fd)

    def stat(self, pid: int) -> Stat | None:
        """A process's stat; None if it is gone."""
        data = self.read(pid, "stat")
        return parse_stat(data) if data else None

    def cgroups(self, pid: int) -> str | None:
        """The content of /proc/PID/cgroup."""
        data = self.read(pid, "cgroup")
        return None if data is None else data.decode("utf-8", "surrogateescape")

    def boot_id(self) -> str:
        """This boot's random id."""
        return (self.read("sys/kernel/random/boot_id") or b"").decode().strip()

    def is_foreign(self, pid: int) -> bool:
        """True if the program is 32-bit on a 64-bit kernel, and so has another system call table."""
        try:
            with open(f"{self.root}/{pid}/exe", "rb") as program:
                head = program.read(5)
        except OSError:
            return False
        return head[:4] == b"\x7fELF" and head[4:5] == b"\x01"

    def scan(self) -> Iterator[Stat]:
        """Every process that could be read."""
        for pid in self.pids():
            found = self.stat(pid)
            if found is not None:
                yield found


def parse_stat(data: bytes) -> Stat | None:
    """A stat file's content; the command may itself hold spaces and parentheses."""
    opening, closing = data.find(b"("), data.rfind(b")")
    if opening < 0 or closing < opening:
        return None
    rest = data[closing + 2 :].split()
    if len(rest) < 20:
        return None
    return Stat(
        pid=int(data[:opening]),
        command=data[opening + 1 : closing].decode("utf-8", "replace"),
        state=rest[0].decode(),
        parent=int(rest[1]),
        threads=int(rest[17]),
        start=int(rest[19]),
        is_kernel_thread=bool(int(rest[6]) & _FLAG_KTHREAD),
        is_exiting=bool(int(rest[6]) & _FLAG_EXITING),
    )
