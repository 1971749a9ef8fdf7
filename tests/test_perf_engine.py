"""The C engine on rings that no kernel writes to: what an event has in it, order, garbage."""

from __future__ import annotations

import ast
import re
import struct
from pathlib import Path

import pytest
import ringside.sensor._perf as compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from ringside.api.v0 import Event
from ringside.sensor import wire
from ringside.sensor._perf import ffi, lib
from ringside.sensor.engine import Route, clock
from ringside.sensor.plan import Fetch, Kernel, Side

from .support.calls import (
    ENTER,
    ENTER_TABLE,
    EXEC,
    LEAVE,
    LEAVE_TABLE,
    LIFE,
    SYS,
    Calls,
    call,
    calls,
    chargen,
    pair,
    rig,
)
from .support.fakering import (
    EXIT,
    PAGE,
    SAMPLE,
    FakeRing,
    Rig,
    lost,
    now,
    process_id,
    raw_of,
    record,
    sample,
)

pytestmark = pytest.mark.asan


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
