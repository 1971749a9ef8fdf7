"""Whose an event is, who gets it, and what waits."""

from __future__ import annotations

import errno
import random
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.api.v0 import Event, FileEvent
from ringside.sensor import wire
from ringside.sensor._perf import ffi, lib
from ringside.sensor.engine import Route
from ringside.sensor.errors import KernelError
from ringside.sensor.plan import Kernel, Side, When
from ringside.sensor.program import Cmp, Test, TestFlag, TestKind

from .support.calls import ENTER, ENTER_TABLE, LEAVE, LIFE, Calls, call, calls, chargen, pair, rig
from .support.fakering import (
    decode,
    now,
    process_id,
    raw_of,
    sample,
)

pytestmark = pytest.mark.asan


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
    count = -(-(length + 5) // frame)
    room = length + 5 + 9 * count
    rest = ffi.new("uint8_t[]", room)
    with ours, theirs:
        held = ffi.new("uint8_t[]", message)
        sent = lib.rs_send_message(ours.fileno(), held, length, stream, frame, rest, room - 1)
        assert sent == -errno.EMSGSIZE, "what it may not take would have no room"
        sent = lib.rs_send_message(ours.fileno(), held, length, stream, frame, rest, room)
        if count > 16:
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
    length, room = 1 << 20, (1 << 20) + 100
    content = random.Random(1).randbytes(length)
    message, rest = ffi.new("uint8_t[]", content), ffi.new("uint8_t[]", room)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            sent = lib.rs_send_message(ours.fileno(), message, length, 1, 1 << 18, rest, room)
            frames = 5
            whole = length + 5 + 9 * frames
            assert 0 < sent < length
            data = theirs.recv(1 << 21) + ffi.buffer(rest, whole - sent)[:]
            assert b"".join(one for *_, one in received(data))[5:] == content
            while lib.rs_send_message(ours.fileno(), message, length, 1, 1 << 18, rest, room):
                pass
            data = ffi.buffer(rest, whole)[:]
            assert b"".join(one for *_, one in received(data))[5:] == content, "it took nothing more"
        assert lib.rs_send_message(ours.fileno(), message, 10, 1, 1 << 14, rest, room) == -errno.EPIPE
