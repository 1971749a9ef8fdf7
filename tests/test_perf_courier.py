"""The courier, on a ring in a file and with this very process's memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.api.v0 import Event
from ringside.sensor._perf import ffi, lib
from ringside.sensor.engine import Route, pack_fetches
from ringside.sensor.plan import Came, Fetch, FetchKind, FetchSpec, Front, Kernel, Side, When, compile_plan

from .support.calls import Calls, rig
from .support.fakering import (
    HERE,
    PAGE,
    FakeRing,
    canned,
    now,
    raw_of,
    sample,
)

pytestmark = pytest.mark.asan


# --- the courier, on a ring in a file and with this very process's memory


@contextmanager
def couriered(rig: Calls) -> Iterator[FakeRing]:
    pages = 4
    fd = os.memfd_create("ring")
    try:
        os.ftruncate(fd, (pages + 1) * PAGE)
        with mmap.mmap(fd, (pages + 1) * PAGE) as memory:
            ring = FakeRing(pages, memory=memory)
            assert lib.rs_courier_start(rig.engine.handle, 0) > 0
            assert lib.rs_courier_start(rig.engine.handle, 0) > 0
            number = lib.rs_ring_prompt(rig.engine.handle, fd, 2, pages)
            assert number >= 0
            yield ring
            lib.rs_ring_close(rig.engine.handle, number)
            ring.bytes = ring.memory = None
    finally:
        os.close(fd)


def drain_until(rig: Calls, count: int, output: int) -> list[Any]:
    """The events of an output, when there are so many."""
    found: list[Any] = []
    deadline = time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < deadline, found
        rig.drain()
        found += rig.events(output)
    return found


def pointer_source(rig: Calls, fetch: Fetch) -> int:
    """A source whose plan fetches what args[0] points to, as perf event 9."""
    form = canned(HERE, "syscalls/sys_enter_openat")
    source = rig.source(form, {"file": [fetch]}, flags=lib.RS_FETCHED)
    rig.event(9, source)
    rig.engine.route(source, [Route(rig.all)])
    return source


OPENAT = canned(HERE, "syscalls/sys_enter_openat")


def opening(address: int, count: int = 0, pid: int | None = None) -> bytes:
    raw = raw_of(OPENAT, filename=address, flags=count)
    return sample(9, now(), raw, pid=os.getpid() if pid is None else pid)


def set_fetch(rig: Calls, kind: FetchKind, length: int = 4096, count: int = 0) -> None:
    how = pack_fetches([FetchSpec(kind, OPENAT["filename"].offset, count, length)])
    assert lib.rs_fetch_set(rig.engine.handle, 9, how, 1) == 0


def test_text_is_read_from_the_callers_memory(rig: Calls) -> None:
    texts = [
        b"/etc/passwd",
        b"",
        b"x" * 4095,
        b"y" * 300,
        "/tmp/gr\xfc\xdf".encode(),
        b"\xff\xfe",
        b"/a\x01b",
    ]
    names = [text.decode() for text in texts[:-2]] + ["", ""]  # the last two are no plausible names
    with couriered(rig) as ring:
        pointer_source(rig, Fetch("filename", {"filename": Side(0, 4096)}, FetchKind.TEXT))
        set_fetch(rig, FetchKind.TEXT)
        buffers = [ctypes.create_string_buffer(text) for text in texts]
        for buffer in buffers:
            ring.write(opening(ctypes.addressof(buffer)))
        told = drain_until(rig, len(texts), rig.all)
    assert [one.event.file.filename for one in told] == names
    assert [one.event.process_pid for one in told] == [os.getpid()] * len(texts)


def test_text_that_cannot_be_read_is_left_out(rig: Calls) -> None:
    """No address, none of the process's, no end within a path's length, or the process is gone."""
    endless = ctypes.create_string_buffer(b"z" * 5000)
    with couriered(rig) as ring:
        pointer_source(rig, Fetch("filename", {"filename": Side(0, 4096)}, FetchKind.TEXT))
        set_fetch(rig, FetchKind.TEXT)
        here = ctypes.addressof(endless)
        for one in (opening(0), opening(8), opening(2**64 - 9), opening(here), opening(here, pid=2**22 + 5)):
            ring.write(one)
        told = drain_until(rig, 5, rig.all)
    assert [one.event.WhichOneof("event") for one in told] == ["file"] * 5
    assert not any(one.event.file.filename for one in told)


def test_text_at_the_very_end_of_a_mapping(rig: Calls) -> None:
    """The page behind it can't be read; the text is whole all the same."""
    with couriered(rig) as ring, mmap.mmap(-1, 2 * PAGE) as memory:
        view = (ctypes.c_char * (2 * PAGE)).from_buffer(memory)
        address = ctypes.addressof(view)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address + PAGE), PAGE, 0) == 0
        memory[PAGE - 9 : PAGE] = b"/the/end\0"
        pointer_source(rig, Fetch("filename", {"filename": Side(0, 4096)}, FetchKind.TEXT))
        set_fetch(rig, FetchKind.TEXT)
        ring.write(opening(address + PAGE - 9), opening(address + PAGE - 5))
        told = drain_until(rig, 2, rig.all)
        libc.mprotect(ctypes.c_void_p(address + PAGE), PAGE, 3)
        del view
    assert [one.event.file.filename for one in told] == ["/the/end", "/end"]


def test_several_records_at_once_each_get_their_own(rig: Calls) -> None:
    """Of one process and of others, with addresses where nothing is among them."""
    texts = [f"/name/{number}/".encode() + b"x" * (number * 37 % 700) for number in range(40)]
    buffers = [ctypes.create_string_buffer(text) for text in texts]
    drawn = random.Random(5)
    want, records = [], []
    for text, buffer in zip(texts, buffers, strict=True):
        address, pid = ctypes.addressof(buffer), os.getpid()
        kind = drawn.choice(["there", "there", "there", "nowhere", "none", "gone"])
        if kind == "gone":
            pid = 2**22 + 5
        records.append(opening({"nowhere": 8, "none": 0}.get(kind, address), pid=pid))
        want.append(text.decode() if kind == "there" else "")
    with couriered(rig) as ring:
        pointer_source(rig, Fetch("filename", {"filename": Side(0, 4096)}, FetchKind.TEXT))
        set_fetch(rig, FetchKind.TEXT)
        ring.write(*records)
        told = drain_until(rig, len(want), rig.all)
    assert [one.event.file.filename for one in told] == want


def test_blocks_are_as_long_as_the_caller_said(rig: Calls) -> None:
    data = ctypes.create_string_buffer(b"0123456789abcdef" * 300)
    with couriered(rig) as ring:
        pointer_source(rig, Fetch("filename", {"filename": Side(0, 64)}, FetchKind.BLOCK, 16, "flags"))
        set_fetch(rig, FetchKind.BLOCK, 16, OPENAT["flags"].offset)
        for count in (5, 16, 1000, 0, -1, -(2**31)):
            ring.write(opening(ctypes.addressof(data), count))
        told = drain_until(rig, 6, rig.all)
    want = ["01234", "0123456789abcdef", "0123456789abcdef", "", "", ""]
    assert [one.event.file.filename for one in told] == want


def test_names_behind_a_message_header(rig: Calls) -> None:
    """struct msghdr: msg_name, msg_namelen."""
    name = ctypes.create_string_buffer(b"a socket's name")
    headers = [
        ctypes.create_string_buffer(struct.pack("=Qii", ctypes.addressof(name), length, 0))
        for length in (8, 100, 0, -5)
    ]
    headers.append(ctypes.create_string_buffer(struct.pack("=Qii", 0, 8, 0)))
    with couriered(rig) as ring:
        pointer_source(rig, Fetch("filename", {"filename": Side(0, 15)}, FetchKind.NAME, 15))
        set_fetch(rig, FetchKind.NAME, 15)
        for header in headers:
            ring.write(opening(ctypes.addressof(header)))
        ring.write(opening(16))
        told = drain_until(rig, len(headers) + 1, rig.all)
    assert [one.event.file.filename for one in told] == ["a socket", "a socket's name", "", "", "", ""]


def test_memory_of_32_bit_callers(rig: Calls) -> None:
    """By the call's number; pointers of 4 bytes, behind a message header and in an array of arguments too."""
    low = 1 << 20
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
    assert libc.mmap(ctypes.c_void_p(low), PAGE, 3, flags, -1, 0) == low
    try:
        ctypes.memmove(low, b"a name\0\0", 8)
        ctypes.memmove(low + 16, struct.pack("=Ii", low, 6), 8)  # a message header
        ctypes.memmove(low + 32, struct.pack("=IIi", 77, low, 4), 12)  # an array of arguments
        args = canned(HERE, "raw_syscalls/sys_enter")
        name = [("filename", Side(0, 64))]
        array = Front(Kernel("args", 1), 12)
        inner = Fetch(Side(4, 4), [("filename", Side(12, 64))], count=Side(8, 4), front=array, narrow=True)
        through = [("file", [inner, Came([("open_mode", Side(0, 4))])])]
        table = [
            When(Kernel("id"), 1, [("file", [Fetch(Kernel("args", 0), name, FetchKind.TEXT, narrow=True)])]),
            When(Kernel("id"), 2, [("file", [Fetch(Kernel("args", 0), name, FetchKind.NAME, narrow=True)])]),
            When(Kernel("id"), 3, [When(Kernel("args", 0, size=4), 9, through)]),
        ]
        with couriered(rig) as ring:
            plan = compile_plan(Event, table, args)
            source = rig.engine.open_source(lib.RS_FETCHED, plan)
            rig.event(9, source)
            rig.engine.route(source, [Route(rig.all)])
            fetches = pack_fetches(plan.fetches)
            assert lib.rs_fetch_set(rig.engine.handle, 9, fetches, len(plan.fetches)) == 0
            for number, first, second in (
                (1, low, 0),
                (1, low | 1 << 32, 0),  # no 32-bit caller's pointer
                (2, low + 16, 0),
                (3, 9, low + 32),
                (3, 9, 16),  # an array that can't be read
                (3, 8, low + 32),
                (4, low, 0),
            ):
                raw = raw_of(args, id=number, args=(first, second, 0, 0, 0, 0))
                ring.write(sample(9, now(), raw, pid=os.getpid()))
            told = [one.event.file for one in drain_until(rig, 7, rig.all)]
    finally:
        libc.munmap(ctypes.c_void_p(low), PAGE)
    assert [(one.filename, one.open_mode) for one in told] == [
        ("a name", 0),
        ("", 0),
        ("a name", 0),
        ("a na", 77),
        ("", 0),
        ("", 0),
        ("", 0),
    ]


def test_what_can_not_be_read_is_refused(rig: Calls) -> None:
    lib.rs_courier_start(rig.engine.handle, 0)
    good = FetchSpec(FetchKind.TEXT, 16)
    for specs in (
        [good] * 65,
        [replace(good, front=65)],
        [replace(good, when=((0, 3, 0),))],
    ):
        assert lib.rs_fetch_set(rig.engine.handle, 9, pack_fetches(specs), len(specs)) < 0


def test_the_couriers_own_ring_may_be_full_for_a_while(rig: Calls) -> None:
    """It stops, and goes on when the engine has made room; nothing is lost or overtaken."""
    text = ctypes.create_string_buffer(b"x" * 3000)
    with couriered(rig) as ring:
        pointer_source(rig, Fetch("filename", {"filename": Side(0, 4096)}, FetchKind.TEXT))
        set_fetch(rig, FetchKind.TEXT)
        found: list[Any] = []
        written = 0
        deadline = time.monotonic() + 20
        while len(found) < 200 and time.monotonic() < deadline:
            while written < 200 and ring.room >= 200:
                text_number = written
                ring.write(sample(9, now(), raw_of(OPENAT, filename=ctypes.addressof(text), dfd=text_number)))
                written += 1
            rig.drain()
            found += rig.events(rig.all)
        times = [one.event.sensor_monotime_nanos for one in found]
        assert len(found) == 200
        assert times == sorted(times)


def test_garbage_in_the_couriers_ring(rig: Calls) -> None:
    with couriered(rig) as ring:
        pointer_source(rig, Fetch("filename", {"filename": Side(0, 4096)}, FetchKind.TEXT))
        set_fetch(rig, FetchKind.TEXT)
        rolls = random.Random(3)
        for length in (8, 40, 200, 4, 36, 1000):
            ring.put(ring.head, rolls.randbytes(length))
            ring.head += length
            deadline = time.monotonic() + 20
            while ring.tail != ring.head:
                assert time.monotonic() < deadline
                rig.drain()
        ring.head = ring.head + 7 & ~7
        while ring.tail != ring.head:
            assert time.monotonic() < deadline
            rig.drain()
        text = ctypes.create_string_buffer(b"good")
        ring.write(opening(ctypes.addressof(text)))
        assert drain_until(rig, 1, rig.all)[-1].event.file.filename == "good"


def test_without_a_courier_there_is_nothing_to_set(rig: Calls) -> None:
    assert lib.rs_fetch_set(rig.engine.handle, 9, ffi.NULL, 0) < 0
    assert lib.rs_ring_prompt(rig.engine.handle, -1, 0, 1) < 0
    lib.rs_courier_start(rig.engine.handle, 0)
    assert lib.rs_ring_prompt(rig.engine.handle, -1, 0, 1) < 0
    assert lib.rs_fetch_set(rig.engine.handle, 9, ffi.NULL, 0) == 0


# --- the arguments of a program that has just begun


def arguments(stack: bytes, sp: int, abi: int = 2, pid: int = 2**22 + 9, room: int = 4096) -> tuple[Any, ...]:
    out = ffi.new("uint8_t[]", room)
    told = [ffi.new("uint64_t *") for _ in range(3)]
    length = lib.rs_fetch_arguments(pid, abi, sp, stack, len(stack), out, room, *told)
    return (length, bytes(ffi.buffer(out, length)) if length > 0 else b"", *(one[0] for one in told))


def initial_stack(sp: int, args: list[bytes], env: list[bytes], gap: int, word: int = 8) -> bytes:
    """What fs/binfmt_elf.c, create_elf_tables(), leaves: argc, argv, NULL, envp, NULL, auxv, gap, strings."""
    words = 1 + len(args) + 1 + len(env) + 1 + 4
    at = sp + words * word + gap
    pointers = []
    for text in (*args, *env):
        pointers.append(at)
        at += len(text) + 1
    table = [len(args), *pointers[: len(args)], 0, *pointers[len(args) :], 0, 6, 4096, 0, 0]
    packed = b"".join(one.to_bytes(word, "little") for one in table)
    return packed + b"\xee" * gap + b"".join(text + b"\0" for text in (*args, *env))


text_argument = st.binary(max_size=40).map(lambda data: data.replace(b"\0", b"0"))


@given(
    st.lists(text_argument, min_size=1, max_size=20),
    st.lists(text_argument, max_size=8),
    st.integers(0, 64).map(lambda n: 16 * n),
    st.sampled_from([(2, 8), (1, 4)]),
)
def test_arguments_from_the_top_of_the_stack(
    args: list[bytes], env: list[bytes], gap: int, abi: tuple[int, int]
) -> None:
    kind, word = abi
    sp = 0xFFAB0000
    stack = initial_stack(sp, args, env, gap, word)
    length, data, argc, address, complete = arguments(stack, sp, kind)
    assert (argc, complete) == (len(args), 1)
    assert data == b"".join(one + b"\0" for one in args)
    assert length == len(data)
    assert address == sp + (1 + len(args) + 1 + len(env) + 1 + 4) * word + gap


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2, 7]))
def test_any_stack_is_safe_to_read(stack: bytes, sp: int, abi: int) -> None:
    length, data, argc, _, complete = arguments(stack, sp, abi)
    assert len(data) == max(0, length) <= 4096
    assert argc <= 1 << 20
    assert not complete or data.count(b"\0") == argc


@pytest.mark.parametrize("count", [0, 2**61 - 3, 2**61 - 2, 2**64 - 1, 2**64 - 3, 2**32 - 2, 1 << 21])
@pytest.mark.parametrize("abi", [1, 2])
def test_a_count_of_arguments_that_no_program_has(count: int, abi: int) -> None:
    words = [count, 0x5000, 0x5010, 0, 0]
    stack = b"".join((one & (1 << 64) - 1).to_bytes(8, "little") for one in words) + bytes(64)
    length, _, argc, _, complete = arguments(stack, 0x4000, abi)
    assert (argc, complete) == (0, 0) or abi == 1
    assert length <= 0 or abi == 1


def test_arguments_beyond_the_sample_are_read_from_the_process() -> None:
    memory = ctypes.create_string_buffer(20_000)
    sp = ctypes.addressof(memory)
    args = [b"program", b"a" * 3000, b"b" * 5000]
    stack = initial_stack(sp, args, [b"HOME=/"], 4096)
    ctypes.memmove(memory, stack, len(stack))
    for sampled in (0, 8, 16, 100, 4200, 9000, len(stack)):
        length, data, argc, _, complete = arguments(stack[:sampled], sp, pid=os.getpid(), room=16_000)
        assert (argc, complete) == (3, 1), sampled
        assert data == b"".join(one + b"\0" for one in args)
    length, data, argc, _, complete = arguments(stack[:100], sp, pid=os.getpid(), room=5000)
    assert (argc, complete, length) == (3, 0, 5000)
    assert data == b"".join(one + b"\0" for one in args)[:5000]


def test_memory_is_read_as_far_as_it_is_there() -> None:
    buffer = ctypes.create_string_buffer(bytes(range(256)) * 64)
    out = ffi.new("uint8_t[]", 16384)
    assert lib.rs_read_memory(os.getpid(), ctypes.addressof(buffer), out, 16384) == 16384
    assert bytes(ffi.buffer(out, 16384)) == bytes(range(256)) * 64
    assert lib.rs_read_memory(os.getpid(), 8, out, 100) < 0
    assert lib.rs_read_memory(2**22 + 5, ctypes.addressof(buffer), out, 100) < 0
