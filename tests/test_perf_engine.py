"""The C engine on rings that no kernel writes to: order, attribution, delivery, and garbage."""

from __future__ import annotations

import ast
import ctypes
import errno
import mmap
import os
import random
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ringside.sensor._perf as compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from ringside.api.v0 import ChargenEvent, Event, FileEvent, SyscallEventType
from ringside.sensor import wire
from ringside.sensor._perf import ffi, lib
from ringside.sensor.engine import Route, clock, pack_fetches
from ringside.sensor.errors import KernelError
from ringside.sensor.events.syscall import TABLES
from ringside.sensor.plan import Came, Fetch, FetchKind, FetchSpec, Front, Kernel, Side, When, compile_plan
from ringside.sensor.program import Cmp, Test, TestFlag, TestKind

from .support.fakering import (
    EXIT,
    HERE,
    PAGE,
    SAMPLE,
    FakeRing,
    Rig,
    canned,
    decode,
    lost,
    now,
    process_id,
    raw_of,
    record,
    sample,
)

pytestmark = pytest.mark.asan

ENTER, LEAVE = canned(HERE, "raw_syscalls/sys_enter"), canned(HERE, "raw_syscalls/sys_exit")
EXEC = canned(HERE, "sched/sched_process_exec")
ENTER_TABLE = TABLES[SyscallEventType.ENTER][1]
LEAVE_TABLE = TABLES[SyscallEventType.EXIT][1]
SYS, LIFE = 7, 8  # ids of perf events


def call(number: int, when: int, *args: int, pid: int = 1000, tid: int | None = None, id: int = SYS) -> bytes:
    """A sample of raw_syscalls:sys_enter."""
    arguments = (*args, *([0] * (6 - len(args))))
    return sample(id, when, raw_of(ENTER, id=number, args=arguments), pid, tid)


class Calls(Rig):
    """An engine with the system call source, an output, and a ring for each CPU."""

    def __init__(self, cpus: int = 1, pages: int = 2, **more: Any) -> None:
        super().__init__(**more)
        self.enter = self.source(ENTER, ENTER_TABLE, "id")
        self.event(SYS, self.enter)
        self.all = self.engine.open_output(64 << 10)
        self.engine.route(self.enter, [Route(self.all)])
        self.engine.set_publish_time(1_700_000_000_000_000)
        self.rings = [FakeRing(pages) for _ in range(cpus)]
        for cpu, ring in enumerate(self.rings):
            ring.attach(self.engine, cpu)

    @property
    def ring(self) -> FakeRing:
        return self.rings[0]

    def numbers(self, output: int | None = None) -> list[int]:
        """The system call numbers that an output got."""
        return [one.event.syscall.id for one in self.events(self.all if output is None else output)]


@contextmanager
def calls(cpus: int = 1, pages: int = 2, **more: Any) -> Iterator[Calls]:
    rig = Calls(cpus, pages, **more)
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture
def rig() -> Iterator[Calls]:
    with calls() as made:
        yield made


@pytest.fixture
def pair() -> Iterator[Calls]:
    with calls(cpus=2) as made:
        yield made


def chargen(characters: str) -> bytes:
    return wire.nest(Event, "chargen", wire.encode(ChargenEvent, characters=characters))


# --- what an event has in it


def test_an_event_says_what_the_record_said(rig: Calls) -> None:
    when = now()
    rig.ring.write(call(257, when, 0xFFFFFFFFFFFFFF9C, 0x7FFE0000, 0, 1, 2, 3, pid=4000, tid=4001))
    rig.engine.set_process(4000, 1)
    assert rig.drain() == []
    (told,) = rig.events(rig.all)
    assert told.publish_time_micros == 1_700_000_000_000_000
    event = told.event
    assert event.id == "test-sen-1"
    assert event.sensor_id == "test-sensor"
    assert (event.process_id, event.process_pid, event.process_tid) == (process_id(4000, 1), 4000, 4001)
    assert (event.sensor_sequence_number, event.sensor_monotime_nanos, event.cpu) == (1, when, 0)
    assert event.WhichOneof("event") == "syscall"
    assert (event.syscall.type, event.syscall.id) == (1, 257)
    assert [getattr(event.syscall, f"arg{n}") for n in range(6)] == [
        0xFFFFFFFFFFFFFF9C,
        0x7FFE0000,
        0,
        1,
        2,
        3,
    ]


def test_negative_numbers_and_results_arrive_as_such(rig: Calls) -> None:
    leave = rig.source(LEAVE, LEAVE_TABLE, "id")
    rig.event(9, leave)
    rig.engine.route(leave, [Route(rig.all)])
    when = now()
    for index, (number, ret) in enumerate([(-1, -38), (0, 0), (1, -(2**63)), (2, 2**63 - 1)]):
        rig.ring.write(sample(9, when + index, raw_of(LEAVE, id=number, ret=ret)))
    rig.drain()
    told = [(one.event.syscall.id, one.event.syscall.ret) for one in rig.events(rig.all)]
    assert told == [(-1, -38), (0, 0), (1, -(2**63)), (2, 2**63 - 1)]


def test_a_record_shorter_than_its_format_leaves_fields_out(rig: Calls) -> None:
    """As much as is there is told; nothing is read behind it."""
    full = raw_of(ENTER, id=1, args=(1, 2, 3, 4, 5, 6))
    when = now()
    for index, length in enumerate(range(4, len(full) + 1, 8)):
        rig.ring.write(sample(SYS, when + index, full[:length]))
    rig.drain()
    told = [one.event.syscall for one in rig.events(rig.all)]
    assert [sum(bool(getattr(one, f"arg{n}")) for n in range(6)) for one in told] == [0, 0, 0, 1, 2, 3, 4, 5]


def test_lineage_only_where_the_source_says_so(rig: Calls) -> None:
    with_lineage = rig.source(ENTER, ENTER_TABLE, "id", lib.RS_LINEAGE)
    rig.event(9, with_lineage)
    rig.engine.route(with_lineage, [Route(rig.all)])
    tail = wire.fields(Event)["container_name"].encode("/web")
    rig.engine.set_process(1000, 1, command=b"sh", container=7)
    rig.engine.set_container(7, tail=tail)
    when = now()
    rig.ring.write(call(1, when), call(2, when + 1, id=9))
    rig.drain()
    plain, more = (one.event for one in rig.events(rig.all))
    assert [(one.pid, one.command) for one in more.process_lineage] == [(1000, "sh")]
    assert not plain.process_lineage
    assert plain.container_name == more.container_name == "/web"


def test_a_part_of_the_record_taken_for_memory(rig: Calls) -> None:
    """rs_source_view(): a block fetched by a probe, cut to what the count says."""
    source = rig.source(ENTER, {"file": [Fetch("args", {"filename": Side(0, 4096)})]})
    assert lib.rs_source_view(rig.engine.handle, source, 24, 16, 8) == 0
    rig.event(9, source)
    rig.engine.route(source, [Route(rig.all)])
    when = now()
    for index, count in enumerate([3, 0, -1, 16, 1000]):
        raw = raw_of(ENTER, id=count)[:24] + b"abcdefghijklmnopqrstuvwxyz"
        rig.ring.write(sample(9, when + index, raw))
    rig.ring.write(sample(9, when + 9, bytes(12)), sample(9, when + 10, raw_of(ENTER, id=5)[:20]))
    rig.drain()
    told = [one.event.file.filename for one in rig.events(rig.all)]
    assert told == ["abc", "", "", "abcdefghijklmnop", "abcdefghijklmnop", "", ""]


# --- order


@given(st.data())
def test_records_of_all_rings_come_in_the_order_of_time(data: st.DataObject) -> None:
    with calls(cpus=4) as rig:
        base = now() - 10**6
        times = [
            sorted(data.draw(st.lists(st.integers(0, 200), max_size=25), label=f"cpu {cpu}"))
            for cpu in range(4)
        ]
        for cpu, ring in enumerate(rig.rings):
            ring.write(*(call(cpu, base + one) for one in times[cpu]))
        rig.drain(budget=data.draw(st.sampled_from([0, 1, 7])))
        told = [one.event for one in rig.events(rig.all)]
        assert [one.sensor_monotime_nanos - base for one in told] == sorted(
            one for ring in times for one in ring
        )
        for cpu, wanted in enumerate(times):
            assert [one.sensor_monotime_nanos - base for one in told if one.cpu == cpu] == wanted
            assert all(one.syscall.id == cpu for one in told if one.cpu == cpu)
        assert all(ring.tail == ring.head for ring in rig.rings)


def test_what_is_younger_than_the_drain_waits(pair: Calls) -> None:
    """Another CPU may still be writing a record that comes before it."""
    early, late = now(), clock() + 5_000_000
    pair.rings[0].write(call(1, early), call(3, late + 1))
    pair.rings[1].write(call(2, late))
    pair.drain()
    assert pair.numbers() == [1]
    assert pair.rings[1].tail == 0
    while clock() <= late + 100_000:
        pass
    pair.drain()
    assert pair.numbers() == [2, 3]


def test_wrapped_records_arrive_whole(rig: Calls) -> None:
    """More than the ring holds, several times over, with sizes that meet its end in every way."""
    numbers = []
    base = now() - 10**7
    for index in range(600):
        length = 12 + 8 * (index * 7 % 40)
        args = (index, index * 3)
        raw = raw_of(ENTER, id=index, args=(*args, 0, 0, 0, 0)) + bytes([index % 251]) * length
        one = sample(SYS, base + index, raw)
        if len(one) > rig.ring.room:
            rig.drain()
            rig.ring.scribble()
        rig.ring.write(one)
        numbers.append((index, index, index * 3))
    rig.drain()
    told = [
        (one.event.syscall.id, one.event.syscall.arg0, one.event.syscall.arg1) for one in rig.events(rig.all)
    ]
    assert told == numbers


def test_a_ring_whose_position_passes_two_to_the_64() -> None:
    with calls() as rig:
        ring = FakeRing(2, (1 << 64) - 256)
        ring.attach(rig.engine, 3)
        base = now() - 10**6
        ring.write(*(call(index, base + index) for index in range(8)))
        assert ring.head < 1024
        rig.drain()
        assert rig.numbers() == list(range(8))
        assert ring.tail == ring.head


def test_the_space_is_given_back_only_after_its_bytes_were_used(rig: Calls) -> None:
    """While Python looks at a record, the kernel may write over everything that was given back."""
    life = rig.engine.open_source(lib.RS_LIFECYCLE)
    rig.event(LIFE, life)
    base = now() - 10**6
    for index in range(60):
        raw = bytes([index]) * 60
        rig.ring.write(sample(LIFE, base + index, raw))
    seen = 0
    for index in range(60):
        stop = rig.step()
        assert stop.why == "RECORD"
        rig.ring.scribble()
        again = bytes(ffi.buffer(rig.engine.stop.raw, rig.engine.stop.raw_length))
        assert again == stop.raw == bytes([index]) * 60
        seen += 1
    assert rig.step().why == "DONE"
    assert rig.ring.tail == rig.ring.head
    assert seen == 60


def test_space_is_given_back_before_a_long_drain_ends() -> None:
    """Else a full ring would stay full, and lose, until all that waits has been handled."""
    with calls(pages=8) as rig:
        base = now() - 10**6
        for index in range(200):
            rig.ring.write(call(index, base + index))
        before = rig.ring.room
        assert rig.step(budget=100).why == "UNKNOWN"
        rig.engine.set_process(1000)
        assert rig.step(budget=100).why == "YIELD"
        assert rig.ring.room > before
        rig.drain()
        assert rig.numbers() == list(range(200))


def test_a_budget_only_pauses(pair: Calls) -> None:
    base = now() - 10**6
    for index in range(20):
        pair.rings[index % 2].write(call(index, base + index))
    whys = [stop.why for stop in pair.drain(budget=3)]
    assert whys.count("YIELD") == 6
    assert pair.numbers() == list(range(20))


# --- lost and corrupt


def test_lost_records_are_told_with_ring_count_and_times(pair: Calls) -> None:
    base = now() - 10**6
    pair.rings[1].write(call(1, base), lost(SYS, 17, base + 500), call(2, base + 501))
    pair.rings[0].write(call(3, base + 100), lost(SYS, 4, base + 400))
    stops = [stop for stop in pair.drain() if stop.why == "LOST"]
    assert [(one.index, one.cpu, one.count, one.since, one.time) for one in stops] == [
        (0, 0, 4, base + 100, base + 400),
        (1, 1, 17, base, base + 500),
    ]
    assert pair.counters["lost"] == 21
    assert [lib.rs_ring_lost(pair.engine.handle, ring) for ring in (0, 1)] == [4, 17]
    assert pair.numbers() == [1, 3, 2]


def test_other_kinds_of_records_are_passed_over(rig: Calls) -> None:
    base = now() - 10**6
    exit_record = record(
        EXIT, struct.pack("=iiiiQ", 1, 1, 1, 1, base + 1) + struct.pack("=iiQQ", 1, 1, base + 1, 3)
    )
    rig.ring.write(call(1, base), exit_record, call(2, base + 2))
    rig.drain()
    assert rig.numbers() == [1, 2]
    assert rig.counters["corrupt"] == 0


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (struct.pack("=IHH", SAMPLE, 0, 0), "size 0"),
        (struct.pack("=IHH", SAMPLE, 0, 8), "a header alone"),
        (struct.pack("=IHH", SAMPLE, 0, 52), "a size that 8 does not divide"),
        (struct.pack("=IHH", SAMPLE, 0, 65528), "more than is there"),
        (b"\xff" * 8, "all ones"),
    ],
)
def test_what_is_no_record_is_skipped_and_told(rig: Calls, header: bytes, what: str) -> None:
    base = now() - 10**6
    rig.ring.write(call(1, base))
    rig.ring.put(rig.ring.head, header + bytes(40))
    rig.ring.head += 48
    stops = [(stop.why, stop.index, stop.count) for stop in rig.drain() if stop.why != "UNKNOWN"]
    assert stops == [("CORRUPT", 0, 48)], what
    assert rig.counters["corrupt"] == 48
    assert rig.numbers() == [1]
    rig.ring.write(call(2, base + 1))
    assert rig.drain() == []
    assert rig.numbers() == [2]


@pytest.mark.parametrize("head", [4, 12, 20, 47])
def test_a_torn_head_is_told_and_the_ring_goes_on(rig: Calls, head: int) -> None:
    rig.ring.head = head
    assert [stop.why for stop in rig.drain()] == ["CORRUPT"]
    assert rig.ring.tail == head
    rig.ring.head = 8 * PAGE  # aligned again, and more than the ring can hold
    assert [stop.why for stop in rig.drain()] == ["CORRUPT"]
    rig.ring.write(call(2, now()))
    rig.drain()
    assert rig.numbers() == [2]


def test_a_head_that_goes_back_is_told(rig: Calls) -> None:
    rig.ring.write(call(1, now()))
    rig.drain()
    rig.ring.head -= 64
    assert [stop.why for stop in rig.drain()] == ["CORRUPT"]
    rig.ring.write(call(2, now()))
    rig.drain()
    assert rig.numbers() == [1, 2]


def test_raw_data_longer_than_its_record(rig: Calls) -> None:
    """The size inside a sample is not believed."""
    good = call(1, now())
    for size in (len(good), 65535, 0xFFFFFFFF, 0x7FFFFFFF):
        rig.ring.write(good[:32] + struct.pack("=I", size) + good[36:])
    rig.ring.write(good)
    rig.drain()
    assert rig.numbers() == [1]
    assert rig.counters["corrupt"] == 4 * len(good)


junk = st.binary(min_size=0, max_size=200)


@st.composite
def half_records(draw: st.DrawFn) -> bytes:
    """Bytes that look like a record at first."""
    body = draw(junk)
    kind = draw(st.sampled_from([SAMPLE, SAMPLE, SAMPLE, 2, EXIT, 0, 0xFFFFFFFF]))
    size = draw(st.sampled_from([len(body) + 8, len(body) + 8 & ~7, 32, 40, 48, 64, 65528, 0, 7]))
    start = struct.pack("=IHH", kind, 0, size & 0xFFFF)
    if draw(st.booleans()):
        event = draw(st.sampled_from([SYS, LIFE, 9, 10, 11]))
        start += struct.pack("=Q", event)
        pid, moment = draw(st.integers(-2, 3)), draw(st.sampled_from([1, 10**6, 2**40]))
        start += struct.pack(
            "=iiQI", pid, pid, moment, draw(st.sampled_from([0, 4, 12, 20, 60, 300, 0xFFFFFFFF]))
        )
    return start + body


@settings(max_examples=150)
@given(
    st.lists(st.one_of(half_records(), junk), max_size=12),
    st.integers(0, 2 * PAGE // 8).map(lambda n: 8 * n),
    st.integers(0, 9000),
)
def test_any_bytes_in_a_ring(pieces: list[bytes], start: int, extra: int) -> None:
    """The drain ends, what comes out is protobuf, and the ring works on."""
    with calls() as rig:
        ring = FakeRing(2, start)
        ring.attach(rig.engine, 1)
        side_table = {"file": [Fetch("args", {"filename": Side(2, 100, abstract=True)})]}
        fetched = rig.source(ENTER, side_table, flags=lib.RS_FETCHED)
        name = rig.source(EXEC, {"file": {"filename": Kernel("filename")}})
        viewed = rig.source(ENTER, side_table)
        assert lib.rs_source_view(rig.engine.handle, viewed, 8, 48, 16) == 0
        for event, source in ((9, fetched), (10, name), (11, viewed)):
            rig.event(event, source)
            rig.engine.route(source, [Route(rig.all)])
        rig.event(LIFE, rig.engine.open_source(lib.RS_LIFECYCLE | lib.RS_FETCHED))
        data = b"".join(pieces)[: ring.size]
        ring.put(start, data)
        ring.head = start + len(data) + extra
        rig.drain()
        rig.events(rig.all)
        ring.head = ring.tail = rig.ring.head  # whatever state it was left in
        good = FakeRing()
        good.attach(rig.engine, 2)
        good.write(call(42, now()))
        rig.drain()
        assert rig.numbers()[-1:] == [42]


# --- perf events that come, go and are replaced


@pytest.mark.parametrize(
    ("newer_first", "order"),
    [
        (True, lib.RS_LATEST_FIRST),
        (False, lib.RS_LATEST_LAST),
        (True, lib.RS_ANY_ORDER),
        (False, lib.RS_ANY_ORDER),
    ],
)
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_or_told_twice_while_one_perf_event_replaces_another(
    newer_first: bool, order: int, alike: bool, seed: int
) -> None:
    """Each call makes a record of either, a little apart, in one order or the other; or all are `alike`."""
    rolls = random.Random(seed)
    with calls(pages=16) as rig:
        at = now() - 10**7
        times = []
        for _ in range(100):
            at += rolls.randint(300, 2000)
            times.append((at, at + rolls.randint(40, 140 if alike else 250)))
            at = times[-1][1]
        on = rolls.randint(times[30][0], times[32][1])
        off = rolls.randint(times[68][0], times[70][1])
        rig.event(SYS, rig.enter, until=on, order=order, end=off)
        rig.event(SYS + 1, rig.enter, since=off, order=order)
        ids = (SYS + 1, SYS) if newer_first else (SYS, SYS + 1)
        for index, (first, second) in enumerate(times):
            there = {SYS: (0, off), SYS + 1: (on, 1 << 63)}
            records = [
                (when, id)
                for when, id in zip((first, second), ids, strict=True)
                if there[id][0] <= when < there[id][1]
            ]
            rig.ring.write(*(call(0 if alike else index, when, id=id) for when, id in records))
        rig.drain()
        assert rig.numbers() == [0 if alike else index for index in range(len(times))]


@pytest.mark.parametrize(
    ("order", "alike"),
    [
        (lib.RS_LATEST_FIRST, False),
        (lib.RS_LATEST_FIRST, True),
        (lib.RS_LATEST_LAST, False),
        (lib.RS_LATEST_LAST, True),
        (lib.RS_ANY_ORDER, False),
    ],
)
@pytest.mark.parametrize("seed", range(10))
def test_several_perf_events_that_replace_one_another(order: int, alike: bool, seed: int) -> None:
    """Filters that change before the last ones have ended: each call makes a record of all there are."""
    rolls = random.Random(seed)
    with calls(pages=64) as rig:
        base, gap = now() - 10**9, 10**6
        begins = [0, *sorted(rolls.sample(range(50, 400), 5))]
        ends = [begins[at + 1] + rolls.randrange(20, 60) for at in range(5)]
        for at in range(6):
            last = at == 5
            rig.event(
                SYS + at,
                rig.enter,
                since=0 if at == 0 else base + ends[at - 1] * gap,
                until=0 if last else base + begins[at + 1] * gap,
                end=None if last else base + ends[at] * gap,
                order=order,
            )
        for index in range(500):
            there = [at for at in range(6) if begins[at] <= index and (at == 5 or index < ends[at])]
            if order == lib.RS_LATEST_FIRST:
                there.reverse()
            if order == lib.RS_ANY_ORDER:
                rolls.shuffle(there)
            for nth, at in enumerate(there):
                when = base + index * gap + nth * 200
                rig.ring.write(call(0 if alike else index, when, id=SYS + at))
        rig.drain()
        assert rig.numbers() == [0 if alike else index for index in range(500)]


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("order", [lib.RS_LATEST_FIRST, lib.RS_LATEST_LAST])
def test_an_interrupt_between_the_two_records_of_a_call(order: int, alike: bool) -> None:
    """However long it takes; that could be a call of its own only where the order is not known."""
    with calls() as rig:
        on, off = now() - 10**9, now() - 10**8
        rig.event(SYS, rig.enter, until=on, order=order)
        rig.event(SYS + 1, rig.enter, since=off, order=order)
        first, second = (SYS + 1, SYS) if order == lib.RS_LATEST_FIRST else (SYS, SYS + 1)
        for index in range(10):
            when = on + 10**6 + index * 10**7
            number = 0 if alike else index
            rig.ring.write(call(number, when, id=first), call(number, when + 8 * 10**6, id=second))
        rig.drain()
        assert rig.numbers() == [0 if alike else index for index in range(10)]


@pytest.mark.parametrize("order", [lib.RS_LATEST_FIRST, lib.RS_LATEST_LAST, lib.RS_ANY_ORDER])
def test_a_slow_caller_of_the_same_again_and_again_while_one_perf_event_replaces_another(
    rig: Calls, order: int
) -> None:
    """Equal records of both that are not of one call: the older came before there was a newer."""
    moment = now() - 10**9
    rig.event(SYS, rig.enter, until=moment, order=order, end=moment)
    rig.event(SYS + 1, rig.enter, since=moment, order=order)
    ids = ((-4 * 10**7, SYS), (4 * 10**7, SYS + 1), (8 * 10**7, SYS + 1))
    rig.ring.write(*(call(1, moment + when, id=id) for when, id in ids))
    rig.drain()
    assert len(rig.numbers()) == 3


def test_the_record_that_counts_in_place_of_another_may_be_of_a_process_to_learn(rig: Calls) -> None:
    """It is taken again then."""
    moment = now() - 10**6
    rig.event(SYS, rig.enter, until=moment)
    rig.event(SYS + 1, rig.enter, since=moment)
    rig.ring.write(call(1, moment - 50, id=SYS + 1, pid=77), call(1, moment + 50, id=SYS, pid=77))
    stop = rig.step()
    assert (stop.why, stop.pid) == ("UNKNOWN", 77)
    rig.engine.set_process(77)
    rig.drain()
    assert rig.numbers() == [1]


def test_records_of_unknown_events_are_stale(rig: Calls) -> None:
    when = now()
    rig.ring.write(call(1, when, id=77), call(2, when + 1), call(3, when + 2, id=78))
    rig.drain()
    assert rig.numbers() == [2]
    assert rig.counters["stale"] == 2


def test_at_a_switch_over_each_call_counts_once(pair: Calls) -> None:
    """Two perf events produce the same records for a while; the moment between says which counts."""
    old, new = SYS, 20
    base = now() - 10**6
    last = lib.RS_LATEST_LAST
    pair.event(new, pair.enter, (1 << 64) - 1, order=last)
    for index in range(40):
        ring = pair.rings[index % 2]
        if index < 30:
            ring.write(call(index, base + index, id=old))
        if index >= 10:
            ring.write(call(index, base + index, id=new))
    between = base + 20
    pair.event(new, pair.enter, between, order=last)
    pair.event(old, pair.enter, 0, between, order=last)
    pair.drain()
    assert pair.numbers() == list(range(40))
    assert pair.counters["stale"] == 20


def test_an_event_that_was_cleared_and_one_that_has_its_id_again(rig: Calls) -> None:
    when = now()
    rig.ring.write(call(1, when))
    rig.drain()
    lib.rs_event_clear(rig.engine.handle, SYS)
    lib.rs_event_clear(rig.engine.handle, SYS)
    rig.ring.write(call(2, when + 1))
    rig.drain()
    rig.event(SYS, rig.enter)
    rig.ring.write(call(3, when + 2))
    rig.drain()
    assert rig.numbers() == [1, 3]


def test_a_thousand_events_and_processes_come_and_go(rig: Calls) -> None:
    """The maps behind them, held against a dict."""
    rolls = random.Random(1)
    known: dict[int, str] = {}
    base = now() - 10**8
    for step in range(3000):
        pid = rolls.randrange(1, 700)
        if rolls.random() < 0.5:
            known[pid] = process_id(pid, step)
            rig.engine.set_process(pid, step)
            rig.event(1000 + pid, rig.enter)
        elif rolls.random() < 0.8:
            known.pop(pid, None)
            lib.rs_process_end(rig.engine.handle, pid, 0)
            rig.drain()
            lib.rs_event_clear(rig.engine.handle, 1000 + pid)
        assert lib.rs_process_pids(rig.engine.handle, ffi.NULL, 0) == len(known)
    rig.knows_everybody = False
    for index, pid in enumerate(range(1, 700)):
        if rig.ring.room < 200:
            rig.drain()
        rig.ring.write(call(1, base + index, pid=pid, id=1000 + pid))
    rig.drain()
    told = {one.event.process_pid: one.event.process_id for one in rig.events(rig.all)}
    assert told == known


# --- processes


def test_an_unknown_process_is_asked_for_once_and_its_record_waits(rig: Calls) -> None:
    when = now()
    rig.ring.write(call(1, when, pid=5), call(2, when + 1, pid=5), call(3, when + 2, pid=6))
    stops = rig.drain()
    assert [(one.why, one.pid, one.time) for one in stops] == [("UNKNOWN", 5, when), ("UNKNOWN", 6, when + 2)]
    assert [(one.event.process_pid, one.event.syscall.id) for one in rig.events(rig.all)] == [
        (5, 1),
        (5, 2),
        (6, 3),
    ]
    assert rig.counters["records"] == 3


def test_records_of_no_process_have_none(rig: Calls) -> None:
    """The idle task is 0; a task that is being taken down, or of another pid namespace, is -1 or 0."""
    when = now()
    rig.ring.write(call(1, when, pid=0, tid=0), call(2, when + 1, pid=-1, tid=-1))
    assert rig.drain() == []
    told = [one.event for one in rig.events(rig.all)]
    assert [(one.process_pid, one.process_id, one.process_tid) for one in told] == [(0, "", 0)] * 2


def test_a_new_context_counts_from_there_on(rig: Calls) -> None:
    when = now()
    rig.engine.set_process(1000, 1)
    rig.ring.write(call(1, when))
    rig.drain()
    rig.engine.set_process(1000, 2)
    rig.ring.write(call(2, when + 1))
    rig.drain()
    told = [one.event.process_id for one in rig.events(rig.all)]
    assert told == [process_id(1000, 1), process_id(1000, 2)]


@pytest.mark.parametrize("pid", [0, -1, -(2**31)])
def test_a_context_for_nobody_is_refused(rig: Calls, pid: int) -> None:
    with pytest.raises(KernelError, match="process: Invalid argument"):
        rig.engine.set_process(pid)


def test_only_foreign_processes_where_numbers_are_theirs(rig: Calls) -> None:
    foreign = rig.source(ENTER, ENTER_TABLE, "id", lib.RS_ALIEN)
    rig.event(9, foreign)
    rig.engine.route(foreign, [Route(rig.all)])
    rig.engine.set_process(5, flags=lib.RS_ALIVE | lib.RS_FOREIGN)
    rig.engine.set_process(6)
    for pid in (5, 6):
        rig.ring.write(sample(9, now(), raw_of(ENTER, id=pid), pid=pid))
    rig.drain()
    assert [one.event.syscall.id for one in rig.events(rig.all)] == [5]


def test_what_a_sample_brings_behind_the_record(rig: Calls) -> None:
    table = [When(Side(8, 4), 3, [("syscall", {"id": Kernel("id")})])]
    source = rig.source(LEAVE, table, flags=lib.RS_BEHIND)
    rig.event(9, source)
    rig.engine.route(source, [Route(rig.all)])
    for at, more in enumerate((struct.pack("=QQ", 1, 3), struct.pack("=QQ", 1, 4), bytes(8))):
        rig.ring.write(sample(9, now(), raw_of(LEAVE, id=at + 1), more=more))
    rig.drain()
    assert [one.event.syscall.id for one in rig.events(rig.all)] == [1, 0, 0]


def test_foreign_processes_are_left_out_where_numbers_are_native(rig: Calls) -> None:
    native = rig.source(ENTER, ENTER_TABLE, "id", lib.RS_NATIVE)
    rig.event(9, native)
    rig.engine.route(native, [Route(rig.all)])
    rig.engine.set_process(5, flags=lib.RS_ALIVE | lib.RS_FOREIGN)
    when = now()
    rig.ring.write(call(1, when, pid=5, id=9), call(2, when + 1, pid=6, id=9), call(3, when + 2, pid=5))
    rig.drain()
    assert rig.numbers() == [2, 3]


def test_the_sensor_itself_is_left_out_unless_asked_for(rig: Calls) -> None:
    curious = rig.engine.open_output(64 << 10, include_self=True)
    rig.engine.route(rig.enter, [Route(rig.all), Route(curious)])
    when = now()
    rig.ring.write(call(1, when, pid=rig.self_pid, tid=1001), call(2, when + 1))
    rig.drain()
    assert rig.numbers() == [2]
    assert rig.numbers(curious) == [1, 2]
    assert rig.counters["self"] == 0
    rig.engine.route(rig.enter, [Route(rig.all)])
    rig.ring.write(call(1, when + 2, pid=rig.self_pid))
    rig.drain()
    assert rig.counters["self"] == 1


# --- lifecycle records


def test_a_lifecycle_record_stops_the_drain_in_its_place(pair: Calls) -> None:
    """What comes before it belongs to the old program, what comes after to the new one."""
    life = pair.engine.open_source(lib.RS_LIFECYCLE)
    pair.event(LIFE, life)
    pair.engine.set_process(1000, 1)
    base = now() - 10**6
    pair.rings[0].write(call(1, base), call(3, base + 20))
    pair.rings[1].write(sample(LIFE, base + 10, b"exec" * 3, pid=1000, tid=1007))
    stop = pair.step()
    assert (stop.why, stop.cpu, stop.source, stop.pid, stop.tid, stop.time, stop.raw) == (
        "RECORD", 1, life, 1000, 1007, base + 10, b"exec" * 3,
    )  # fmt: skip
    pair.engine.set_process(1000, 2)
    pair.drain()
    told = [(one.event.syscall.id, one.event.process_id) for one in pair.events(pair.all)]
    assert told == [(1, process_id(1000, 1)), (3, process_id(1000, 2))]


def test_a_lifecycle_record_that_must_wait_comes_again(pair: Calls) -> None:
    life = pair.engine.open_source(lib.RS_LIFECYCLE)
    pair.event(LIFE, life)
    base = now() - 10**6
    pair.rings[0].write(call(1, base), call(2, base + 20))
    pair.rings[1].write(sample(LIFE, base + 10, b"wait" * 3))
    pair.engine.set_process(1000)
    for _ in range(3):
        stop = pair.step()
        assert (stop.why, stop.raw) == ("RECORD", b"wait" * 3)
        assert pair.numbers() in ([1], [])
        lib.rs_again(pair.engine.handle)
        lib.rs_again(pair.engine.handle)
    assert pair.counters["records"] == 1
    assert pair.step().why == "RECORD"
    assert pair.step().why == "DONE"
    assert pair.numbers() == [2]
    assert pair.counters["records"] == 3


def test_the_memory_that_the_courier_brought(rig: Calls) -> None:
    life = rig.engine.open_source(lib.RS_LIFECYCLE | lib.RS_FETCHED)
    rig.event(LIFE, life)
    words = struct.pack("=6Q", 2, 3, 0x7FFF0000, 1, 77, 11) + b"sh\0-c\0true\0".ljust(16, b"\0")
    rig.ring.write(sample(LIFE, now(), b"r" * 12, more=words))
    stop = rig.step()
    told = rig.engine.stop
    assert (told.abi, told.argc, told.address, told.complete, told.cgroup) == (2, 3, 0x7FFF0000, 1, 77)
    assert (stop.raw, stop.memory) == (b"r" * 12, b"sh\0-c\0true\0")


def test_a_length_of_memory_is_not_believed(rig: Calls) -> None:
    life = rig.engine.open_source(lib.RS_LIFECYCLE | lib.RS_FETCHED)
    rig.event(LIFE, life)
    for length in (17, 1 << 40, (1 << 64) - 1):
        rig.ring.write(
            sample(LIFE, now(), b"r" * 12, more=struct.pack("=6Q", 1, 1, 1, 1, 1, length) + b"x" * 16)
        )
        assert [stop.memory for stop in rig.drain()] == [b"x" * 16]
    rig.ring.write(sample(LIFE, now(), b"r" * 12, more=b"x" * 40))
    assert [stop.memory for stop in rig.drain()] == [b""]


# --- outputs


def test_a_batch_is_ready_at_its_size(rig: Calls) -> None:
    small = rig.engine.open_output(500)
    rig.engine.route(rig.enter, [Route(small)])
    base = now() - 10**6
    rig.ring.write(*(call(index, base + index) for index in range(40)))
    whys = [stop.index for stop in rig.drain() if stop.why == "FULL"]
    assert set(whys) == {small}
    sizes = [len(batch.data) for batch in rig.batches[small]]
    assert all(500 <= size < 700 for size in sizes)
    assert rig.numbers(small) == list(range(40))


def test_an_event_larger_than_a_batch(rig: Calls) -> None:
    """A command line may have two megabytes."""
    for length in (65_000, 300_000, 3_000_000):
        assert rig.engine.emit([rig.all], 5, chargen("x" * length)) > 0
        rig.take(rig.all)
    assert [len(one.event.chargen.characters) for one in rig.events(rig.all)] == [65_000, 300_000, 3_000_000]


def test_an_output_may_fill_and_be_taken_any_number_of_times_between_drains(rig: Calls) -> None:
    small = rig.engine.open_output(100)
    body = chargen("x" * 200)
    for number in range(1, 2000):
        assert rig.engine.emit([small], 5, body) == number
        rig.take(small)
    assert rig.step().why == "DONE"
    assert len(rig.events(small)) == 1999


def test_an_event_goes_once_to_an_output_named_twice(rig: Calls) -> None:
    """Two filters of one subscription may both want it."""
    other = rig.engine.open_output(64 << 10)
    for index in range(2000):
        assert rig.engine.emit([rig.all, rig.all, other, rig.all, other], 5, chargen(str(index)))
    for output in (rig.all, other):
        told = [one.event.chargen.characters for one in rig.events(output)]
        assert told == [str(index) for index in range(2000)]
    assert rig.counters["delivered"] == 4000
    rig.engine.route(
        rig.enter, [Route(rig.all), Route(rig.all, 3), Route(rig.all), Route(rig.all, 3), Route(other)]
    )
    rig.ring.write(call(3, now()))
    rig.drain()
    assert rig.numbers() == [3]
    assert rig.numbers(other) == [3]


def test_outputs_that_are_none_get_nothing(rig: Calls) -> None:
    gone = rig.engine.open_output(1000)
    rig.engine.close_output(gone)
    assert rig.engine.emit([gone, 12345, 2**31], 5, chargen("x")) == 0
    assert rig.engine.emit([], 5, chargen("x")) == 0
    assert rig.counters["events"] == 0


def test_emitted_events_are_attributed(rig: Calls) -> None:
    rig.engine.set_process(70, 7)
    number = rig.engine.emit([rig.all], 123, chargen("x"), cpu=3, pid=70, tid=71)
    (told,) = rig.events(rig.all)
    assert told.event.sensor_sequence_number == number
    assert (told.event.process_id, told.event.process_tid, told.event.cpu) == (process_id(70, 7), 71, 3)
    assert told.event.sensor_monotime_nanos == 123


def test_many_outputs_get_the_same_bytes(rig: Calls) -> None:
    outputs = [rig.engine.open_output(3000 + 10 * index) for index in range(300)]
    rig.engine.route(rig.enter, [Route(output) for output in outputs])
    base = now() - 10**6
    rig.ring.write(*(call(index, base + index, 1, 2, 3) for index in range(60)))
    rig.drain()
    for output in outputs:
        rig.take(output)
    streams = {b"".join(batch.data for batch in rig.batches[output]) for output in outputs}
    assert len(streams) == 1
    assert len(decode(streams.pop()).events) == 60
    assert (rig.counters["events"], rig.counters["delivered"]) == (60, 60 * 300)


KEYS = (0, 1, 59, 255, 1023, 1024, 5000, 0x400001F6, 2**31, 2**63 - 1, -1, -(2**63))


@given(st.lists(st.tuples(st.integers(0, 4), st.one_of(st.none(), st.sampled_from(KEYS))), max_size=25))
def test_each_output_gets_the_keys_that_it_asked_for(wanted: list[tuple[int, int | None]]) -> None:
    with calls() as rig:
        outputs = [rig.engine.open_output(64 << 10) for _ in range(5)]
        rig.engine.route(rig.enter, [Route(outputs[which], key) for which, key in wanted])
        base = now() - 10**6
        rig.ring.write(*(call(key, base + index) for index, key in enumerate(KEYS)))
        rig.drain()
        for which, output in enumerate(outputs):
            asked = {key for one, key in wanted if one == which}
            assert rig.numbers(output) == [key for key in KEYS if key in asked or None in asked]
        counted = rig.counters
        assert counted["records"] == counted["events"] + counted["unwanted"] == len(KEYS)


def test_tests_decide_in_each_output_for_itself(rig: Calls) -> None:
    def arg0(cmp: Cmp, value: int) -> Test:
        return Test(TestKind.INT, cmp, ENTER["args"].offset, 8, TestFlag(0), value, b"", -1, -2)

    small, large = rig.engine.open_output(1 << 16), rig.engine.open_output(1 << 16)
    either = (
        Test(TestKind.INT, Cmp.LT, ENTER["args"].offset, 8, TestFlag(0), 3, b"", -1, 1),
        arg0(Cmp.GE, 8),
    )
    rig.engine.route(
        rig.enter,
        [
            Route(large, 1, (arg0(Cmp.GE, 5),)),
            Route(rig.all, None, either),
            Route(small, 1, (arg0(Cmp.LT, 5),)),
        ],
    )
    base = now() - 10**6
    rig.ring.write(*(call(1, base + index, index) for index in range(10)))
    rig.drain()
    told = [[one.event.syscall.arg0 for one in rig.events(output)] for output in (small, large, rig.all)]
    assert told == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 8, 9]]


def test_a_limit_ends_exactly_there(rig: Calls) -> None:
    few = rig.engine.open_output(1 << 16, limit=3)
    rig.engine.route(rig.enter, [Route(few), Route(rig.all)])
    base = now() - 10**6
    rig.ring.write(*(call(index, base + index) for index in range(10)))
    assert ("FULL", few) in [(stop.why, stop.index) for stop in rig.drain()]
    assert rig.numbers(few) == [0, 1, 2]
    assert rig.engine.limit_left(few) == 0
    assert rig.numbers() == list(range(10))
    assert rig.engine.emit([few], 5, chargen("x")) == 0


def test_an_interval_lets_one_event_through_each_time(rig: Calls) -> None:
    slow = rig.engine.open_output(1 << 16, interval=1000)
    rig.engine.route(rig.enter, [Route(slow)])
    base = now() - 10**6
    offsets = (0, 1, 999, 1000, 1001, 1999, 5000, 5999, 6000)
    rig.ring.write(*(call(offset, base + offset) for offset in offsets))
    rig.drain()
    assert rig.numbers(slow) == [0, 1000, 5000, 6000]


def test_only_events_from_since_and_before_until(rig: Calls) -> None:
    base = now() - 10**6
    window = rig.engine.open_output(1 << 16, since=base + 3, until=base + 7)
    rig.engine.route(rig.enter, [Route(window)])
    rig.ring.write(*(call(index, base + index) for index in range(10)))
    rig.drain()
    assert rig.numbers(window) == [3, 4, 5, 6]
    assert rig.counters["unwanted"] == 6


def test_only_containers_whose_bit_is_set(rig: Calls) -> None:
    for container in range(20):
        rig.engine.set_process(100 + container, container=container)
    rig.engine.set_process(200, container=1000)
    chosen = rig.engine.open_output(1 << 16)
    rig.engine.set_containers(chosen, bytes([0b0000_0101, 0b1000_0000]))
    rig.engine.route(rig.enter, [Route(chosen)])
    base = now() - 10**6
    for pid in (*range(100, 120), 200, 0):
        rig.ring.write(call(1, base + pid, pid=pid))
    rig.drain()
    assert sorted(one.event.process_pid for one in rig.events(chosen)) == [0, 100, 102, 115]
    rig.engine.set_containers(chosen, b"")
    rig.ring.write(call(1, base + 300, pid=100))
    rig.drain()
    assert rig.events(chosen) == []


def test_an_output_that_is_used_again_remembers_nothing(rig: Calls) -> None:
    old = rig.engine.open_output(100, limit=1, interval=10**9)
    rig.engine.set_containers(old, b"\0")
    rig.engine.emit([old], 5, chargen("x" * 200))
    rig.engine.close_output(old)
    new = rig.engine.open_output(1 << 16)
    assert new == old
    assert rig.step().why == "DONE"
    rig.engine.route(rig.enter, [Route(new)])
    base = now() - 10**6
    rig.ring.write(call(1, base, pid=5), call(2, base + 1, pid=5))
    rig.drain()
    assert rig.numbers(new) == [1, 2]


# --- events that wait for their container


def test_events_of_a_held_process_wait_and_then_have_the_names(rig: Calls) -> None:
    name = wire.fields(Event)["container_name"]
    rig.engine.set_process(5, container=3)
    rig.engine.set_container(3, hold=True)
    base = now() - 10**6
    rig.ring.write(call(1, base, pid=5), call(2, base + 1, pid=6), call(3, base + 2, pid=5))
    rig.drain()
    opened = wire.nest(Event, "file", wire.encode(FileEvent, filename="four"))
    assert rig.engine.emit([rig.all], base + 3, opened, pid=5, tid=5) == 0
    assert rig.numbers() == [2]
    assert rig.counters["held"] == 3
    assert lib.rs_release(rig.engine.handle, 4) == 0
    rig.engine.set_container(3, tail=name.encode("/web"))
    assert lib.rs_release(rig.engine.handle, 3) == 3
    assert lib.rs_release(rig.engine.handle, 3) == 0
    told = [one.event for one in rig.events(rig.all)]
    assert [one.syscall.id or one.file.filename for one in told] == [1, 3, "four"]
    assert [one.container_name for one in told] == ["/web"] * 3
    assert [one.sensor_monotime_nanos for one in told] == [base, base + 2, base + 3]


def test_what_cannot_wait_goes_out_without_names(rig: Calls) -> None:
    """The buffer is bounded; nothing is lost when it is full."""
    rig.engine.set_process(5, container=3)
    rig.engine.set_container(3, hold=True)
    body = chargen("x" * 60_000)
    sent = 200
    for _ in range(sent):
        rig.engine.emit([rig.all], 1, body, pid=5)
        rig.take(rig.all)
    counted = rig.counters
    assert 0 < counted["held"] < sent
    assert counted["held"] + counted["hold_full"] == sent
    assert len(rig.events(rig.all)) == counted["hold_full"]
    lib.rs_release(rig.engine.handle, 3)
    assert len(rig.events(rig.all)) == counted["held"]


def test_what_waits_for_several_containers_is_let_go_by_each(rig: Calls) -> None:
    rolls = random.Random(2)
    for container in (1, 2, 3):
        rig.engine.set_process(container, container=container)
        rig.engine.set_container(container, hold=True)
    base = now() - 10**6
    order = [rolls.randrange(1, 4) for _ in range(60)]
    for index, pid in enumerate(order):
        rig.ring.write(call(index, base + index, pid=pid))
    rig.drain()
    for container in (2, 3, 1):
        assert lib.rs_release(rig.engine.handle, container) == order.count(container)
        assert rig.numbers() == [index for index, pid in enumerate(order) if pid == container]


def test_a_held_event_of_an_output_that_has_gone(rig: Calls) -> None:
    rig.engine.set_process(5, container=3)
    rig.engine.set_container(3, hold=True)
    gone = rig.engine.open_output(1 << 16)
    rig.engine.emit([gone, rig.all], 1, chargen("x"), pid=5)
    rig.engine.close_output(gone)
    another = rig.engine.open_output(1 << 16)
    assert another == gone
    lib.rs_release(rig.engine.handle, 3)
    assert rig.events(another) == []
    assert len(rig.events(rig.all)) == 1


def test_a_held_event_of_an_output_that_is_emptied_meanwhile(rig: Calls) -> None:
    """Emptied while it stands on the list of the full ones, which the drain has yet to tell of."""
    rig.engine.set_process(5, container=3)
    rig.engine.set_container(3, hold=True)
    full = rig.engine.open_output(100)
    rig.engine.emit([full], 1, chargen("held"), pid=5)
    rig.engine.emit([full], 2, chargen("x" * 200))
    assert len(rig.events(full)) == 1
    lib.rs_release(rig.engine.handle, 3)
    (told,) = rig.events(full)
    assert told.event.chargen.characters == "held"


# --- numbers


@pytest.mark.parametrize("first", [1, 8, 95, 9_995, 2**32 - 3, 2**53 - 2, 10**18 - 4])
def test_sequence_numbers_and_ids_go_up_by_one(first: int) -> None:
    with calls(first_sequence=first) as rig:
        base = now() - 10**6
        rig.ring.write(*(call(1, base + index) for index in range(12)))
        rig.drain()
        told = [one.event for one in rig.events(rig.all)]
        assert [one.sensor_sequence_number for one in told] == list(range(first, first + 12))
        assert [one.id for one in told] == [f"test-sen-{number}" for number in range(first, first + 12)]
        assert lib.rs_sequence(rig.engine.handle) == first + 12


@given(
    st.integers(1, 2**63 - 1),
    st.integers(1, 2**63 - 1),
    st.integers(0, 4095),
    st.integers(1, 2**22),
    st.integers(1, 2**22),
)
def test_numbers_of_every_size_are_encoded_right(
    when: int, publish: int, cpu: int, pid: int, tid: int
) -> None:
    rig = Rig()
    try:
        output = rig.engine.open_output(1 << 16)
        rig.engine.set_publish_time(publish)
        rig.engine.set_process(pid)
        rig.engine.emit([output], when, chargen("x"), cpu, pid, tid)
        (told,) = rig.events(output)
        event = told.event
        assert (told.publish_time_micros, event.sensor_monotime_nanos, event.cpu) == (publish, when, cpu)
        assert (event.process_pid, event.process_tid) == (pid, tid)
    finally:
        rig.close()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from([7, 9, 30])), max_size=60))
def test_the_books_close(drawn: list[tuple[int, int, int]]) -> None:
    """Every record is an event, held, or counted as one of the kinds that are none."""
    with calls(cpus=4) as rig:
        rig.engine.route(rig.enter, [Route(rig.all, 1), Route(rig.all, 2)])
        rig.event(9, rig.engine.open_source(lib.RS_LIFECYCLE))
        rig.engine.set_process(3, container=1)
        rig.engine.set_container(1, hold=True)
        base = now() - 10**6
        for index, (cpu, number, event) in enumerate(drawn):
            pid = rig.self_pid if number == 4 else 3 if number == 5 else 1000
            rig.rings[cpu].write(call(number, base + index, pid=pid, id=event))
        stops = rig.drain()
        lib.rs_release(rig.engine.handle, 1)
        c = rig.counters
        life = [stop for stop in stops if stop.why == "RECORD"]
        assert c["records"] == len(drawn)
        assert c["records"] == c["events"] + c["unwanted"] + c["self"] + c["stale"] + len(life)
        assert c["delivered"] == len(rig.events(rig.all))


# --- what Python may ask for


def test_impossible_requests_are_refused(rig: Calls) -> None:
    handle = rig.engine.handle
    op = ffi.new("rs_op *", {"op": lib.RS_OP_UINT, "size": 3})
    assert lib.rs_source_set(handle, 0, 0, op, 1, b"", 0, 0, 0) < 0
    back = ffi.new("rs_op *", {"op": lib.RS_OP_UNLESS, "size": 4, "jump": 0})
    assert lib.rs_source_set(handle, 0, 0, back, 1, b"", 0, 0, 0) < 0
    wide = ffi.new("rs_op *", {"op": lib.RS_OP_CONST, "tag_length": 5})
    assert lib.rs_source_set(handle, 0, 0, wide, 1, b"", 0, 0, 0) < 0
    assert lib.rs_source_set(handle, 1 << 20, 0, op, 0, b"", 0, 0, 0) < 0
    entry = ffi.new("rs_entry *", {"output": 1 << 19, "any": 1, "first_test": lib.RS_ACCEPT})
    assert lib.rs_source_route(handle, rig.enter, entry, 1, ffi.NULL, 0, b"", 0) < 0
    assert lib.rs_source_route(handle, 4711, ffi.NULL, 0, ffi.NULL, 0, b"", 0) < 0
    assert lib.rs_event_set(handle, 1, 4711, 0, 0, 0) < 0
    assert lib.rs_source_view(handle, 4711, 0, 0, 0) < 0
    assert lib.rs_output_set(handle, 1 << 20, 1, 0, 0, 0, 0, 0) < 0
    assert lib.rs_output_set(handle, 0, 0, 0, 0, 0, 0, 0) < 0
    assert lib.rs_output_containers(handle, 4711, b"", 0) < 0
    assert lib.rs_ring_attach(handle, ffi.NULL, 3, PAGE, 0) < 0
    assert lib.rs_ring_attach(handle, ffi.NULL, 0, PAGE, 0) < 0
    lib.rs_output_clear(handle, 4711)
    lib.rs_output_reset(handle, 4711)
    assert lib.rs_output_next(handle, 4711) == -1
    lib.rs_ring_close(handle, 4711)
    lib.rs_ring_close(handle, -1)
    assert lib.rs_output_left(handle, 4711) == 0
    assert lib.rs_ring_waiting(handle, 4711) == lib.rs_ring_lost(handle, -1) == 0
    assert rig.engine.take(4711) is None
    rig.ring.write(call(1, now()))
    rig.drain()
    assert rig.numbers() == [1]


def test_a_ring_that_is_closed_and_another_in_its_place(rig: Calls) -> None:
    second = FakeRing()
    number = second.attach(rig.engine, 1)
    second.write(call(1, now()))
    assert lib.rs_ring_waiting(rig.engine.handle, number) == second.head
    lib.rs_ring_close(rig.engine.handle, number)
    third = FakeRing(start=1 << 20)
    assert third.attach(rig.engine, 5) == number
    third.write(call(2, now()))
    rig.drain()
    (told,) = rig.events(rig.all)
    assert (told.event.syscall.id, told.event.cpu) == (2, 5)


def test_a_ring_closed_while_its_record_is_being_looked_at(rig: Calls) -> None:
    rig.event(LIFE, rig.engine.open_source(lib.RS_LIFECYCLE))
    second = FakeRing()
    number = second.attach(rig.engine, 1)
    second.write(sample(LIFE, now(), b"x" * 12))
    assert rig.step().why == "RECORD"
    lib.rs_ring_close(rig.engine.handle, number)
    rig.ring.write(call(1, now()))
    rig.drain()
    rig.drain()
    assert rig.numbers() == [1]


def test_the_stub_has_what_the_module_has() -> None:
    stub = Path(compiled.__file__).with_name("_perf.pyi")
    if not stub.exists():
        stub = Path(__file__).parent.parent / "sensor" / "_perf.pyi"
    told: dict[str, int | None] = {}
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "_Lib":
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    told[item.name] = len(item.args.posonlyargs) - 1
                elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    told[item.target.id] = None
    have: dict[str, int | None] = {
        name: len(ffi.typeof(getattr(lib, name)).args) if callable(getattr(lib, name)) else None
        for name in dir(lib)
        if re.match("rs_|RS_", name)
    }
    assert told == have


# --- sending


def received(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Frames: length, type and flags, stream, content (RFC 9113, 4.1)."""
    found = []
    while data:
        size, kind = int.from_bytes(data[:3], "big"), int.from_bytes(data[3:5], "big")
        found.append((size, kind, int.from_bytes(data[5:9], "big"), data[9 : 9 + size]))
        data = data[9 + size :]
    return found


@given(st.integers(0, 2000), st.integers(5, 700), st.integers(1, 2**31 - 1))
def test_a_message_goes_out_in_frames(length: int, frame: int, stream: int) -> None:
    message = random.Random(length).randbytes(length)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sent = lib.rs_send_message(ours.fileno(), ffi.new("uint8_t[]", message), length, stream, frame)
        if -(-(length + 5) // frame) > 16:
            assert sent == -errno.EMSGSIZE
            return
        frames = received(theirs.recv(1 << 16))
    assert sent == sum(9 + size for size, *_ in frames)
    assert all((kind, to) == (0, stream) for _, kind, to, _ in frames)
    assert all(size == frame for size, *_ in frames[:-1])
    assert 0 < frames[-1][0] <= frame
    whole = b"".join(content for *_, content in frames)
    assert whole == b"\0" + length.to_bytes(4, "big") + message


def test_what_a_socket_does_not_take_is_not_waited_for() -> None:
    message = ffi.new("uint8_t[]", 1 << 20)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            sent = lib.rs_send_message(ours.fileno(), message, 1 << 20, 1, 1 << 18)
            assert 0 < sent < 1 << 20
            assert lib.rs_send_message(ours.fileno(), message, 1 << 20, 1, 1 << 18) == -errno.EAGAIN
        assert lib.rs_send_message(ours.fileno(), message, 10, 1, 1 << 14) == -errno.EPIPE


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
