"""Opens, by each rung of the ladder that the kernel has: the same events."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ringside.api.v0 import Event, FileEventFilter, FileEventType
from ringside.sensor.errors import RequestError
from ringside.sensor.events.bulk import BulkWant
from ringside.sensor.sensor import Sensor

from ..support.stream import LIBC, RUNGS, Told, is_missing, own_sensor, watching

OPEN, CREAT, OPENAT, OPENAT2 = 2, 85, 257, 437
AT_FDCWD = -100
O_LARGEFILE = 0o100000  # the kernel adds it for 64-bit callers, before its function and after its tracepoint
END = b"/ringside-test/end"
FAULT = os.O_NOFOLLOW | os.O_NOATIME | os.O_DIRECTORY


@dataclass(frozen=True)
class Open:
    """A call, and what it must be told as. What it points at lives as long, whoever reads it late."""

    call: int
    name: bytes
    flags: int = 0
    mode: int = 0
    text: ctypes.Array[ctypes.c_char] = field(init=False, compare=False)
    how: ctypes.Array[ctypes.c_char] = field(init=False, compare=False)  # openat2's

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", ctypes.create_string_buffer(self.name))
        how = struct.pack("=QQQ", self.flags, self.mode, 0)
        object.__setattr__(self, "how", ctypes.create_string_buffer(how, len(how)))

    def make(self, at: int | None = None) -> None:
        """Call the kernel, which finds no such file; `at` is another place for the name."""
        name = ctypes.c_void_p(ctypes.addressof(self.text) if at is None else at)
        if self.call == CREAT:
            result = LIBC.syscall(CREAT, name, self.mode)
        elif self.call == OPEN:
            result = LIBC.syscall(OPEN, name, self.flags, self.mode)
        elif self.call == OPENAT:
            result = LIBC.syscall(OPENAT, AT_FDCWD, name, self.flags, self.mode)
        else:
            result = LIBC.syscall(OPENAT2, AT_FDCWD, name, self.how, len(self.how))
        assert result == -1
        assert ctypes.get_errno() in (errno.ENOENT, errno.EFAULT, errno.ENAMETOOLONG)

    def told(self) -> tuple[str, int, int]:
        """Filename, flags and mode of its event."""
        return self.name.decode(errors="replace"), self.flags, self.mode


def told(event: Event) -> tuple[str, int, int]:
    assert event.file is not None
    assert event.file.type == FileEventType.OPEN
    assert event.process_pid == os.getpid()
    return event.file.filename, event.file.open_flags & ~O_LARGEFILE, event.file.open_mode


def is_end(event: Event) -> bool:
    return event.file is not None and event.file.filename == END.decode()


def opened(**more: object) -> FileEventFilter:
    return FileEventFilter(type=FileEventType.OPEN, **more)  # type: ignore[arg-type]


def is_told(rung: str, name: bytes) -> bool:
    """True if the rung can bring this name: memory may hold anything."""
    if rung != "memory":
        return True
    try:
        return min(name) >= 32 and bool(name.decode())
    except UnicodeDecodeError:
        return False


WRITE = os.O_CREAT | os.O_WRONLY
CREATED = WRITE | os.O_TRUNC


@pytest.mark.parametrize("rung", RUNGS)
async def test_each_call(rung: str, record_property: Told) -> None:
    """open, openat, openat2, creat; odd names, long ones, and one that can't be read."""
    if is_missing(rung, record_property):
        return
    calls = [
        Open(OPEN, b"/ringside-test/none/open", os.O_RDWR | os.O_CLOEXEC),
        Open(OPEN, b"/ringside-test/none/created", WRITE | os.O_EXCL, 0o4751),
        Open(OPENAT, b"/ringside-test/none/at", os.O_RDONLY | os.O_DIRECTORY),
        Open(OPENAT, b"/ringside-test/none/at-created", WRITE | os.O_APPEND, 0o600),
        Open(CREAT, b"/ringside-test/none/creat", CREATED, 0o640),
        Open(OPENAT2, b"/ringside-test/none/at2", WRITE | os.O_NONBLOCK, 0o1777),
        Open(OPENAT, b"/ringside-test/none/\xff\xfe\xc3\xa9\xe2\x82"),
        Open(OPENAT, b"/ringside-test/none/with space\nand \x01 \"quotes'"),
        Open(OPENAT, b"relative/ringside"),
        Open(OPENAT, b"/ringside-test/" + b"n" * 50),
        Open(OPENAT, b"/ringside-test/none/" + b"1" * 1003),
        Open(OPENAT, (b"/ringside-test/none/" + b"/".join([b"x" * 200] * 20))[:4000]),
        Open(OPENAT, b"/ringside-test/none/" + b"y/" * 2037 + b"z"),  # 4,095 bytes
    ]
    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as memory:
        at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        # a name at the end of a page behind which there is nothing
        edge = Open(OPEN, b"/ringside-test/none/at-the-edge")
        memory[mmap.PAGESIZE - len(edge.name) - 1 : mmap.PAGESIZE - 1] = edge.name
        assert LIBC.mprotect(ctypes.c_void_p(at + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
        async with own_sensor(rung) as sensor, watching(sensor, file_events=[opened()]) as stream:
            for call in calls:
                call.make()
            edge.make(at + mmap.PAGESIZE - len(edge.name) - 1)
            for nowhere in (0, 16, at + mmap.PAGESIZE, (1 << 64) - 4096):
                Open(OPENAT, b"", FAULT).make(nowhere)
            end = Open(OPENAT, END)
            end.make()
            events = await stream.until(is_end)
        LIBC.mprotect(ctypes.c_void_p(at + mmap.PAGESIZE), mmap.PAGESIZE, 3)
    expected = [call.told() for call in calls if is_told(rung, call.name)]
    wanted = [one for one in map(told, events) if one[0] and "ringside" in one[0]]
    assert wanted == [*expected, edge.told(), Open(OPENAT, END).told()]
    assert [one for one in map(told, events) if one[1] == FAULT] == [("", FAULT, 0)] * 4
    unread = [
        one for one in map(told, events) if not one[0] and not one[1]
    ]  # the sensor's own have O_CLOEXEC
    assert len(unread) == sum(not is_told(rung, call.name) for call in calls)


@contextmanager
def untouched(path: Path, text: bytes) -> Iterator[int]:
    """The address of a text in a page that this process has not touched, but would find if it did."""
    path.write_bytes(bytes(mmap.PAGESIZE) + text + b"\0")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as memory,
    ):
        yield ctypes.addressof(ctypes.c_char.from_buffer(memory)) + mmap.PAGESIZE


@pytest.mark.parametrize("rung", ["program", "memory"])
async def test_names_that_are_not_present_yet(rung: str, tmp_path: Path, record_property: Told) -> None:
    """In pages of a file that nobody has touched yet: these ways read again, where a kprobe can't."""
    if is_missing(rung, record_property):
        return
    name = b"/ringside-test/none/untouched"
    calls = [Open(OPEN, b"", os.O_RDWR), Open(CREAT, b"", CREATED, 0o640), Open(OPENAT, b"", WRITE, 0o600)]
    calls.append(Open(OPENAT2, b"", WRITE | os.O_EXCL, 0o755))
    wanted = [opened(filename=name.decode()), opened(filename=END.decode())]
    async with own_sensor(rung) as sensor, watching(sensor, file_events=wanted) as stream:
        stack = ExitStack()
        for at, call in enumerate(calls):
            call.make(stack.enter_context(untouched(tmp_path / str(at), name)))
        end = Open(OPENAT, END)
        end.make()
        events = await stream.until(is_end)
        stack.close()
    assert [told(one) for one in events[:-1]] == [(name.decode(), call.flags, call.mode) for call in calls]


async def test_a_blocking_open_outlasts_what_others_want(tmp_path: Path, record_property: Told) -> None:
    """Its name is read when it returns, by then by other programs than those it began under."""
    if is_missing("program", record_property):
        return
    fifo = tmp_path / "ringside-fifo"
    os.mkfifo(fifo)
    flags = os.O_RDONLY | os.O_NOCTTY
    thread_ids: list[int] = []
    async with own_sensor("program") as sensor:
        asked = opened(filename=str(fifo), open_flags_mask=os.O_NOCTTY)
        async with watching(sensor, file_events=[asked]) as stream:
            with untouched(tmp_path / "name", os.fsencode(fifo)) as name:

                def wait() -> None:
                    thread_ids.append(threading.get_native_id())
                    os.close(LIBC.syscall(OPENAT, AT_FDCWD, ctypes.c_void_p(name), flags, 0))

                thread = threading.Thread(target=wait)
                thread.start()
                while not thread_ids or not is_in(thread_ids[0], OPENAT):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                for other in range(3):
                    async with watching(sensor, file_events=[opened(filename=f"/ringside-test/{other}")]):
                        pass
                    await all_replaced(sensor)
                os.close(os.open(fifo, os.O_WRONLY))
                thread.join()
                (event,) = await stream.until(lambda _: True)
    assert told(event) == (str(fifo), flags, 0)
    assert event.process_tid == thread_ids[0]


def is_in(thread: int, call: int) -> bool:
    """True while a thread of this process waits in a system call."""
    return Path(f"/proc/self/task/{thread}/syscall").read_text().split()[0] == str(call)


async def all_replaced(sensor: Sensor) -> None:
    """What was open before a filter changed has ended."""
    wants = [want for output in sensor.outputs.values() for want in output.attached]
    events = [want.event.kernel for want in wants if isinstance(want, BulkWant)]
    while any(map(sensor.rings.replaced_of, events)):  # noqa: ASYNC110
        await asyncio.sleep(0.001)


NAMES = (
    b"/ringside-test/etc/passwd",
    b"/ringside-test/etc/shadow",
    b"/ringside-test/a.conf",
    b"/ringside-test/b.conf",
    b"/ringside-test/z.conf",
    b"/ringside-test/sub/a.conf",
    b"/ringside-test/*",
    b"/ringside-test/[x]",
    b"/ringside-test/caf\xc3\xa9",
    b"/ringside-test/bad\xff",
    b"/ringside-test/" + b"q" * 300,
    b"ringside-test",
)
FILTERS: Sequence[tuple[list[FileEventFilter], set[int]]] = (
    ([opened(filename="/ringside-test/etc/passwd")], {0}),
    ([opened(filename="/ringside-test/caf\u00e9")], {8}),
    ([opened(filename="/ringside-test/*")], {6}),
    ([opened(filename="/ringside-test/etc/passw")], set()),
    ([opened(filename="/ringside-test/" + "q" * 300)], {10}),
    ([opened(filename_pattern="/ringside-test/*.conf")], {2, 3, 4, 5}),
    ([opened(filename_pattern="/ringside-test/[a-c].conf")], {2, 3}),
    ([opened(filename_pattern="/ringside-test/[!a-c].conf")], {4}),
    ([opened(filename_pattern="/ringside-test/?.c??f")], {2, 3, 4}),
    ([opened(filename_pattern="/ringside-test/\\*")], {6}),
    ([opened(filename_pattern="/ringside-test/[[]x]")], {7}),
    ([opened(filename_pattern="*side-test/e*c/*s*w*")], {0, 1}),
    ([opened(filename_pattern="ringside-test")], {11}),
    ([opened(filename_pattern="/ringside-test/bad?")], {9}),
    ([opened(filename_pattern="/ringside-test/" + "q" * 290 + "*")], {10}),
    (
        [opened(filename=f"/ringside-test/{x}.conf") for x in "az"]
        + [opened(filename_pattern="ringside-*t")],
        {2, 4, 11},
    ),
    ([opened(filename_pattern="/ringside-test/?.conf", open_flags_mask=os.O_APPEND)], {3}),
    ([opened(filename_pattern="*ringside-test*", open_flags_mask=os.O_APPEND | os.O_EXCL)], {3, 4}),
    ([opened(filename_pattern="*ringside-test*", open_flags_mask=os.O_TRUNC)], {5}),
    ([opened(filename_pattern="*ringside-test*", create_mode_mask=0o111)], {4, 5}),
    ([opened(filename_pattern="*ringside-test*", create_mode_mask=0o100, open_flags_mask=os.O_EXCL)], {4}),
)


@pytest.mark.parametrize("rung", RUNGS)
async def test_filters(rung: str, record_property: Told) -> None:
    """Exact names, globs, masks, and several at once: just what they mean comes."""
    if is_missing(rung, record_property):
        return
    calls = [Open(OPENAT, name) for name in NAMES]
    calls[3] = Open(OPENAT, NAMES[3], WRITE | os.O_APPEND, 0o600)
    calls[4] = Open(OPEN, NAMES[4], WRITE | os.O_EXCL, 0o700)
    calls[5] = Open(CREAT, NAMES[5], CREATED, 0o711)
    calls[6] = Open(OPENAT, NAMES[6], 0, 0o777)  # creates nothing, so its mode means nothing
    hidden = {9} if rung == "memory" else set()  # no UTF-8 is not believed to be a name
    async with own_sensor(rung) as sensor:
        for filters, which in FILTERS:
            wanted = [*filters, opened(filename=END.decode())]
            async with watching(sensor, file_events=wanted) as stream:
                end = Open(OPENAT, END)
                for call in (*calls, end):
                    call.make()
                events = [told(event)[0] for event in await stream.until(is_end)]
            names = [NAMES[at].decode(errors="replace") for at in sorted(which - hidden)]
            assert events == [*names, END.decode()], filters


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("type", FileEventFilter()),
        ("filename", opened(filename="")),
        ("filename", opened(filename="x" * 4096)),
        ("filename_pattern", opened(filename_pattern="")),
        ("filename_pattern", opened(filename_pattern="x" * 100_000)),
        ("open_flags_mask", opened(open_flags_mask=0)),
        ("create_mode_mask", opened(create_mode_mask=0)),
    ],
)
async def test_bad_requests(field: str, request_: FileEventFilter) -> None:
    async with own_sensor() as sensor:
        with pytest.raises(RequestError) as caught:
            async with watching(sensor, file_events=[request_]):
                pass
    assert caught.value.field == f"subscription.event_filter.file_events[0].{field}"


@pytest.mark.parametrize("rung", ["kprobe", "program", "memory"])
async def test_others_come_and_go(rung: str, record_property: Told) -> None:
    """Each changes what the kernel lets pass; who stays misses nothing, and gets nothing twice."""
    if is_missing(rung, record_property):
        return
    names: list[ctypes.Array[ctypes.c_char]] = []
    done = threading.Event()

    def call() -> None:
        while not done.wait(0.002):
            names.append(ctypes.create_string_buffer(f"/ringside-test/steady/{len(names)}".encode()))
            LIBC.open(names[-1], 0)

    async with (
        own_sensor(rung) as sensor,
        watching(sensor, file_events=[opened(filename_pattern="/ringside-test/steady/*")]) as stream,
    ):
        thread = threading.Thread(target=call)
        thread.start()
        try:
            for other in range(40):
                async with watching(
                    sensor, file_events=[opened(filename_pattern=f"/ringside-test/{other}/*")]
                ):
                    await asyncio.sleep(0)
        finally:
            done.set()
            thread.join()
        end = Open(OPEN, b"/ringside-test/steady/end")
        end.make()
        events = await stream.until(lambda event: event.file and event.file.filename.endswith("/end"))
    told_names = [event.file.filename for event in events if event.file]
    assert told_names == [one.value.decode() for one in names] + [end.name.decode()]
