"""A sensor without a kernel: fake rings, a real kernel's formats, a /proc tree in a temporary folder.

The sensor is the real one, C and all. What it asks of the kernel is answered here, and the records that a
test writes come out of the rings that the sensor has opened, if the perf events for them are enabled.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from ringside.api.descriptors import message_class
from ringside.api.v0 import EventFilter, Subscription
from ringside.sensor import bpf, gain, perf, sensor
from ringside.sensor._perf import lib
from ringside.sensor.config import Config
from ringside.sensor.engine import clock
from ringside.sensor.errors import RingsideError, UnservableError
from ringside.sensor.events import process as process_events
from ringside.sensor.sensor import Sensor
from ringside.sensor.subscription import Subscriber
from ringside.sensor.tracefs.format import Format, parse_format
from ringside.sensor.tracefs.mount import Tracefs

from .fakering import HERE, KERNELS, PAGE, FakeRing, Response, lost, now, raw_of, sample

ErrorInfo = message_class("google.rpc.ErrorInfo")
PATIENCE = float(os.environ.get("RINGSIDE_PATIENCE", "30"))  # s
BOOT_ID = "0123abcd-0000-4000-8000-000000000000"
CLONE_THREAD = 0x00010000
NO_BTF = UnservableError("kernel types", "this kernel is a fake")


class FakeProc:
    """A /proc tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "self").mkdir(parents=True)
        (root / "sys/kernel/random").mkdir(parents=True)
        (root / "sys/kernel/random/boot_id").write_text(BOOT_ID + "\n")
        (root / "self/stat").write_text(Path("/proc/self/stat").read_text())

    def add(
        self,
        pid: int,
        parent: int,
        command: str = "sh",
        start: int = 100,
        threads: int = 1,
        state: str = "S",
        arguments: tuple[str, ...] = (),
        flags: int = 0,
        elf_class: int = 2,
        cgroup: str = "0::/\n",
    ) -> None:
        """A process, or what became of it."""
        folder = self.root / str(pid)
        folder.mkdir(exist_ok=True)
        rest = [state, parent, pid, pid, 0, -1, flags, *[0] * 8, 20, 0, threads, 0, start, *[0] * 30]
        (folder / "stat").write_text(f"{pid} ({command}) " + " ".join(map(str, rest)) + "\n")
        (folder / "cmdline").write_bytes(b"".join(one.encode() + b"\0" for one in arguments))
        (folder / "cgroup").write_text(cgroup)
        (folder / "status").write_text(f"Name:\t{command}\nTgid:\t{pid}\n")
        (folder / "exe").write_bytes(b"\x7fELF" + bytes([elf_class]) + bytes(11))

    def remove(self, pid: int) -> None:
        """The process is gone."""
        folder = self.root / str(pid)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@dataclass
class FakePerf:
    """A perf event that the sensor has opened."""

    tracepoint: int
    cpu: int
    id: int
    name: str  # of the descriptor
    enabled: bool = False
    filter: str | None = None
    ring: int = -1  # the descriptor whose ring it writes to
    lost: int = 0
    count: int = 0
    cgroup: str = ""  # the folder of the only cgroup that it looks at


class FakeExits:
    """What the proc connector tells."""

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}
        self.ready: dict[int, int] = {}
        self.reads = 0

    def read(self) -> None:
        self.reads += 1
        self.ready.update(self.codes)
        self.codes.clear()

    def take(self, tid: int, since: int) -> int | None:
        assert since <= clock()
        return self.ready.pop(tid, None)

    def close(self) -> None:
        pass


@dataclass
class FakeKernel:
    """A kernel whose formats are those of `version`."""

    folder: Path
    version: str = HERE
    cpus: list[int] = field(default_factory=lambda: [0, 1])
    refuse_filters: bool = False

    def __post_init__(self) -> None:
        self.formats: dict[str, Format] = {}
        self.perfs: dict[int, FakePerf] = {}
        self.rings: dict[int, FakeRing] = {}
        self.exits = FakeExits()
        self.switches = 0  # on each CPU, from one look to the next
        self._ids = itertools.count(1000)
        self.proc = FakeProc(self.folder / "proc")
        self.tracefs = self.folder / "tracing"
        for path in (KERNELS / self.version).glob("*/*"):
            text = path.read_text()
            there = self.tracefs / "events" / path.parent.name / path.name
            there.mkdir(parents=True)
            (there / "format").write_text(text)
            form = parse_format(text)
            (there / "id").write_text(f"{form.id}\n")
            self.formats[f"{path.parent.name}/{path.name}"] = form

    # -- what the sensor asks for

    def __getattr__(self, name: str) -> Any:
        """Everything that needs no kernel is the engine's own."""
        if not name.startswith(("rs_", "RS_")):
            raise AttributeError(name)
        return getattr(lib, name)

    def rs_perf_open(self, asked: Any, cpu: int, cgroup: int) -> int:
        if cpu not in self.cpus:
            return -errno.ENODEV
        made = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM
        )  # never readable, and each has a name of its own
        name = os.readlink(f"/proc/self/fd/{made.fileno()}")
        folder = os.readlink(f"/proc/self/fd/{cgroup}") if cgroup >= 0 else ""
        self.perfs[made.fileno()] = FakePerf(asked.tracepoint, cpu, next(self._ids), name, cgroup=folder)
        return made.detach()

    def rs_perf_id(self, fd: int, number: Any) -> int:
        number[0] = self.perfs[fd].id
        return 0

    def rs_perf_filter(self, fd: int, text: bytes) -> int:
        if self.refuse_filters:
            return -errno.EINVAL
        self.perfs[fd].filter = text.decode()
        return 0

    def rs_perf_redirect(self, fd: int, ring: int) -> int:
        self.perfs[fd].ring = ring
        return 0

    def rs_perf_enable(self, fd: int, on: int) -> int:
        self.perfs[fd].enabled = bool(on)
        return 0

    def rs_perf_count(self, fd: int) -> int:
        """Tasks of different cgroups have followed each other so often more."""
        self.perfs[fd].count += self.switches
        return self.perfs[fd].count

    def rs_perf_lost(self, fd: int) -> int:
        return self.perfs[fd].lost

    def rs_bpf_map(self, *_: int) -> int:
        return -errno.EPERM

    def rs_ring_open(self, engine: Any, fd: int, cpu: int, pages: int) -> int:
        ring = self.rings[fd] = FakeRing(pages)
        return int(lib.rs_ring_attach(engine, ring.memory, pages, PAGE, cpu))

    rs_ring_prompt = rs_ring_open  # the test writes what the courier would have

    # -- what happens

    def open_perfs(self, event: str) -> list[FakePerf]:
        """The perf events that are open on a kernel event, one for each CPU, the latest first."""
        number = self.formats[event].id
        found = (
            one
            for fd, one in self.perfs.items()
            if one.enabled and one.tracepoint == number and self.is_open(fd)
        )
        return sorted(found, key=lambda one: one.id, reverse=True)

    def happen(
        self,
        event: str,
        fields: dict[str, Any],
        *,
        pid: int,
        tid: int | None = None,
        cpu: int = 0,
        when: int | None = None,
        more: bytes = b"",
    ) -> int:
        """A kernel event: a record for each perf event that is enabled for it. When it happened."""
        when = now() if when is None else when
        raw = raw_of(self.formats[event], **fields)
        for one in self.open_perfs(event):
            if one.cpu == cpu and self._is_in(pid, one.cgroup):
                record = sample(one.id, when, raw, pid, tid, more)
                ring = self.rings[one.ring]
                if len(record) > ring.room:
                    one.lost += 1
                else:
                    ring.write(record)
        return when

    def container(self, container_id: str, *pids: int) -> Path:
        """Its cgroup, with these processes in it."""
        mount = self.folder / "root/sys/fs/cgroup"
        cgroup = mount / "docker" / container_id
        cgroup.mkdir(parents=True)
        for name in ("cgroup.controllers", "cgroup.procs"):
            (mount / name).write_text("")
        (cgroup / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
        for pid in pids:
            (self.proc.root / str(pid) / "cgroup").write_text(f"0::/docker/{container_id}\n")
        return cgroup

    def _is_in(self, pid: int, cgroup: str) -> bool:
        return not cgroup or str(pid) in Path(cgroup, "cgroup.procs").read_text().split()

    def lose(self, event: str, count: int, cpu: int = 0) -> None:
        """So many records found no room, and one that came behind tells it."""
        for one in self.open_perfs(event):
            if one.cpu == cpu:
                one.lost += count
                self.rings[one.ring].write(lost(one.id, count, now()))

    def enter(self, number: int, *args: int, pid: int = 1, **more: Any) -> int:
        """A system call begins."""
        arguments = (*args, *[0] * (6 - len(args)))
        return self.happen("raw_syscalls/sys_enter", {"id": number, "args": arguments}, pid=pid, **more)

    def leave(self, number: int, ret: int, pid: int = 1, **more: Any) -> int:
        """A system call ends."""
        return self.happen("raw_syscalls/sys_exit", {"id": number, "ret": ret}, pid=pid, **more)

    def fork(
        self, parent: int, child: int, command: bytes = b"sh", *, thread: bool = False, **more: Any
    ) -> int:
        """A process or thread is made."""
        fields = {"pid": child, "comm": command, "clone_flags": CLONE_THREAD if thread else 0}
        return self.happen("task/task_newtask", fields, pid=parent, **more)

    def rename(self, pid: int, command: bytes, tid: int | None = None, **more: Any) -> int:
        """A thread gets another comm."""
        fields = {"newcomm": command}
        if "pid" in self.formats["task/task_rename"]:
            fields["pid"] = pid if tid is None else tid  # type: ignore[assignment]
        return self.happen("task/task_rename", fields, pid=pid, tid=tid, **more)

    def exec(
        self, pid: int, filename: bytes, *arguments: bytes, abi: int = 2, complete: int = 1, **more: Any
    ) -> int:
        """A program begins; the courier has read its arguments."""
        self.rename(pid, filename.rpartition(b"/")[2][:15])
        text = b"".join(one + b"\0" for one in arguments)
        fetched = struct.pack("=6Q", abi, len(arguments), 0x7FFF0000, complete, 0, len(text))
        behind = fetched + text + bytes(-len(text) % 8)
        fields = {"filename": filename, "pid": pid, "old_pid": pid}
        return self.happen("sched/sched_process_exec", fields, pid=pid, more=behind, **more)

    def exit(
        self, pid: int, code: int | None = 0, *, tid: int | None = None, last: bool = True, **more: Any
    ) -> int:
        """A thread ends, the `last` of its process or not; `code` is what wait(2) will say."""
        if code is not None:
            self.exits.codes[pid if tid is None else tid] = code
        fields: dict[str, Any] = {"pid": pid if tid is None else tid}
        if "group_dead" in self.formats["sched/sched_process_exit"]:
            fields["group_dead"] = int(last)
        return self.happen("sched/sched_process_exit", fields, pid=pid, tid=tid, **more)

    def start_of(self, when: int) -> int:
        """The start time, in clock ticks since boot, of a process that was forked then."""
        offset = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - clock()
        return (when + offset) * int(os.sysconf("SC_CLK_TCK")) // 10**9

    # -- the sensor on it

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While this lasts, a sensor that is started finds this kernel."""
        with (
            mock.patch.object(perf, "lib", self),
            mock.patch.object(bpf, "lib", self),
            mock.patch.object(gain, "lib", self),
            mock.patch.object(perf, "online_cpus", side_effect=lambda: list(self.cpus)),
            mock.patch.object(perf, "raise_file_limit"),
            mock.patch.object(sensor, "open_tracefs", return_value=Tracefs(self.tracefs, writable=False)),
            mock.patch.object(Sensor, "_check_privileges"),
            mock.patch.object(process_events, "ExitConnector", return_value=self.exits),
            mock.patch.object(process_events, "read_btf", side_effect=NO_BTF),
        ):
            yield

    def config(self, **settings: Any) -> Config:
        """A configuration that looks nowhere but here."""
        wanted = {
            "proc": str(self.proc.root),
            "host_root": str(self.folder / "root"),
            "engine": "none",
            "ring_size": 256 << 10,
            "lifecycle_ring_size": 256 << 10,
            "sensor_id": "fake",
            **settings,
        }
        return Config(**wanted)

    @asynccontextmanager
    async def sensor(self, **settings: Any) -> AsyncIterator[Sensor]:
        """A sensor on this kernel."""
        before = {fd for fd in self.perfs if self.is_open(fd)}
        with self.installed():
            async with Sensor(self.config(**settings)) as made:
                yield made
        left = [one for fd, one in self.perfs.items() if self.is_open(fd) and fd not in before]
        assert not left, "perf events left open"

    def is_open(self, fd: int) -> bool:
        try:
            return os.readlink(f"/proc/self/fd/{fd}") == self.perfs[fd].name
        except OSError:
            return False


def loss(status: Any) -> tuple[int, str]:
    """What a status says of lost events: how many, why."""
    assert status.code == 15, status
    (detail,) = status.details
    info = ErrorInfo.FromString(detail.value)
    assert (info.reason, info.domain) == ("EVENTS_LOST", "ringside")
    assert int(info.metadata["from"]) <= int(info.metadata["to"])
    assert str(info.metadata["count"]) in status.message
    return int(info.metadata["count"]), info.metadata["cause"]


class Reader:
    """What comes at a subscriber, decoded by Google's protobuf."""

    def __init__(self, subscriber: Subscriber) -> None:
        self.subscriber = subscriber
        self.events: list[Any] = []
        self.statuses: list[Any] = []
        self.ended: BaseException | None = None

    async def message(self) -> Any:
        """The next message."""
        async with asyncio.timeout(PATIENCE):
            message = Response.FromString(await anext(self.subscriber))
        self.events += [one.event for one in message.events]
        self.statuses += message.statuses
        return message

    async def take(self, count: int) -> list[Any]:
        """The next so many events."""
        while len(self.events) < count:
            await self.message()
        taken, self.events = self.events[:count], self.events[count:]
        return taken

    async def rest(self) -> list[Any]:
        """Everything up to the end of the stream, which an error may be, to be found in `ended`."""
        try:
            while True:
                await self.message()
        except (StopAsyncIteration, RingsideError) as end:
            self.ended = end
        taken, self.events = self.events, []
        return taken

    async def status(self) -> Any:
        """The next status."""
        while not self.statuses:
            await self.message()
        return self.statuses.pop(0)


@asynccontextmanager
async def reading(
    made: Sensor, subscription: Subscription | None = None, **filters: Any
) -> AsyncIterator[Reader]:
    """A subscription, live: to these filters, or this one."""
    wanted = subscription or Subscription(event_filter=EventFilter(**filters))
    async with made.subscribe(wanted) as subscriber:
        reader = Reader(subscriber)
        first = await reader.status()
        assert (first.code, first.message) == (0, "subscribed")
        yield reader
