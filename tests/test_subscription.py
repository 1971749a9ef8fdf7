"""Requests that make sense and others; what waits for a subscriber, and what it is told of the rest."""

from __future__ import annotations

import asyncio
import itertools
import string
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.api.v0 import (
    ChargenEventFilter,
    ContainerFilter,
    EventFilter,
    FileEventFilter,
    LimitModifier,
    Modifier,
    ProcessEventFilter,
    ProcessEventType,
    Subscription,
    SyscallEventFilter,
    SyscallEventType,
    ThrottleModifier,
    ThrottleModifierIntervalType,
    TickerEventFilter,
)
from ringside.sensor.engine import Batch
from ringside.sensor.errors import RequestError, UnservableError
from ringside.sensor.events import process as process_events
from ringside.sensor.sensor import Sensor
from ringside.sensor.subscription import Code, Loss, Subscriber, check_request, make_status

from .support.fakekernel import ErrorInfo, FakeKernel, Reader, loss, reading
from .support.fakering import Response

ENTER = SyscallEventFilter(type=SyscallEventType.ENTER)
TICKER = TickerEventFilter(interval=10**9)


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    made = FakeKernel(tmp_path)
    made.proc.add(1, 0, "init", 1)
    return made


@pytest.fixture
async def sensor(kernel: FakeKernel) -> AsyncIterator[Sensor]:
    async with kernel.sensor(mechanism="kprobe") as made:
        yield made


def with_modifier(**modifier: Any) -> Subscription:
    return Subscription(event_filter=EventFilter(ticker_events=[TICKER]), modifier=Modifier(**modifier))


def events(**filters: Any) -> Subscription:
    return Subscription(event_filter=EventFilter(**filters))


def throttle(interval: int, interval_type: int = 0) -> Subscription:
    kind = ThrottleModifierIntervalType(interval_type)
    return with_modifier(throttle=ThrottleModifier(interval=interval, interval_type=kind))


EXEC, EXIT = ProcessEventType.EXEC, ProcessEventType.EXIT
FILTER = "subscription.event_filter"
BAD = {
    "missing": (None, "subscription"),
    "empty": (Subscription(), FILTER),
    "no filters": (events(), FILTER),
    "negative since": (
        Subscription(event_filter=EventFilter(ticker_events=[TICKER]), since_duration=-1),
        "subscription.since_duration",
    ),
    "zero since": (
        Subscription(event_filter=EventFilter(ticker_events=[TICKER]), since_duration=0),
        "subscription.since_duration",
    ),
    "negative duration": (
        Subscription(event_filter=EventFilter(ticker_events=[TICKER]), for_duration=-5),
        "subscription.for_duration",
    ),
    "zero duration": (
        Subscription(event_filter=EventFilter(ticker_events=[TICKER]), for_duration=0),
        "subscription.for_duration",
    ),
    "zero limit": (with_modifier(limit=LimitModifier(limit=0)), "subscription.modifier.limit.limit"),
    "negative limit": (with_modifier(limit=LimitModifier(limit=-3)), "subscription.modifier.limit.limit"),
    "zero throttle": (throttle(0), "subscription.modifier.throttle.interval"),
    "negative throttle": (throttle(-1), "subscription.modifier.throttle.interval"),
    "endless throttle": (throttle(2**62, 3), "subscription.modifier.throttle.interval"),
    "unknown throttle": (throttle(1, 9), "subscription.modifier.throttle.interval_type"),
    "no ticker": (events(ticker_events=[TICKER, TickerEventFilter()]), f"{FILTER}.ticker_events[1].interval"),
    "negative ticker": (
        events(ticker_events=[TickerEventFilter(interval=-1)]),
        f"{FILTER}.ticker_events[0].interval",
    ),
    "no chargen": (events(chargen_events=[ChargenEventFilter()]), f"{FILTER}.chargen_events[0].length"),
    "long chargen": (
        events(chargen_events=[ChargenEventFilter(length=65537)]),
        f"{FILTER}.chargen_events[0].length",
    ),
    "endless chargen": (
        events(chargen_events=[ChargenEventFilter(length=2**64 - 1)]),
        f"{FILTER}.chargen_events[0].length",
    ),
    "no call type": (events(syscall_events=[SyscallEventFilter()]), f"{FILTER}.syscall_events[0].type"),
    "unknown call type": (
        events(syscall_events=[ENTER, SyscallEventFilter(type=SyscallEventType(77))]),
        f"{FILTER}.syscall_events[1].type",
    ),
    "negative call": (
        events(syscall_events=[SyscallEventFilter(type=SyscallEventType.ENTER, id=-1)]),
        f"{FILTER}.syscall_events[0].id",
    ),
    "huge call": (
        events(syscall_events=[SyscallEventFilter(type=SyscallEventType.EXIT, id=2**40)]),
        f"{FILTER}.syscall_events[0].id",
    ),
    "result of a beginning": (
        events(syscall_events=[SyscallEventFilter(type=SyscallEventType.ENTER, ret=0)]),
        f"{FILTER}.syscall_events[0].ret",
    ),
    "no process type": (events(process_events=[ProcessEventFilter()]), f"{FILTER}.process_events[0].type"),
    "unknown process type": (
        events(process_events=[ProcessEventFilter(type=ProcessEventType(9))]),
        f"{FILTER}.process_events[0].type",
    ),
    "file of an exit": (
        events(process_events=[ProcessEventFilter(type=EXIT, exec_filename="/x")]),
        f"{FILTER}.process_events[0].exec_filename",
    ),
    "pattern of an exit": (
        events(process_events=[ProcessEventFilter(type=EXIT, exec_filename_pattern="*")]),
        f"{FILTER}.process_events[0].exec_filename_pattern",
    ),
    "status of an exec": (
        events(process_events=[ProcessEventFilter(type=EXEC, exit_code=0)]),
        f"{FILTER}.process_events[0].exit_code",
    ),
    "long file": (
        events(process_events=[ProcessEventFilter(type=EXEC, exec_filename="x" * 5000)]),
        f"{FILTER}.process_events[0].exec_filename",
    ),
    "long pattern": (
        events(process_events=[ProcessEventFilter(type=EXEC, exec_filename_pattern="?" * 5000)]),
        f"{FILTER}.process_events[0].exec_filename_pattern",
    ),
    "too many": (events(syscall_events=[ENTER] * 5000), FILTER),
    "no file type": (events(file_events=[FileEventFilter()]), f"{FILTER}.file_events[0].type"),
}


@pytest.mark.parametrize("case", list(BAD))
async def test_what_makes_no_sense_is_refused_by_the_name_of_the_field(sensor: Sensor, case: str) -> None:
    subscription, field = BAD[case]
    with pytest.raises(RequestError) as caught:
        await check_request(sensor, subscription)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert len(caught.value.problem) > 8
    assert not sensor.outputs


@pytest.mark.parametrize(
    "subscription",
    [
        events(ticker_events=[TickerEventFilter(interval=1)]),
        events(chargen_events=[ChargenEventFilter(length=1)]),
        events(chargen_events=[ChargenEventFilter(length=65536)]),
        events(syscall_events=[SyscallEventFilter(type=SyscallEventType.ENTER, id=0)]),
        events(syscall_events=[SyscallEventFilter(type=SyscallEventType.ENTER, id=0x40000000 + 520)]),
        events(syscall_events=[SyscallEventFilter(type=SyscallEventType.EXIT, ret=-(2**63))]),
        events(syscall_events=[SyscallEventFilter(type=SyscallEventType.EXIT, ret=0, id=1)]),
        events(process_events=[ProcessEventFilter(type=EXIT, exit_code=-1)]),
        events(process_events=[ProcessEventFilter(type=EXEC, exec_filename="")]),
        Subscription(event_filter=EventFilter(syscall_events=[ENTER]), for_duration=2**63 - 1),
        Subscription(event_filter=EventFilter(syscall_events=[ENTER]), since_duration=2**63 - 1),
        Subscription(event_filter=EventFilter(syscall_events=[ENTER]), container_filter=ContainerFilter()),
        with_modifier(limit=LimitModifier(limit=2**63 - 1)),
        throttle(1, 3),
    ],
)
async def test_the_outermost_that_makes_sense_is_served(sensor: Sensor, subscription: Subscription) -> None:
    async with reading(sensor, subscription):
        assert len(sensor.outputs) == 1
    assert not sensor.outputs


# --- what can't be served here


async def test_the_servable_part_is_served_and_the_rest_told(sensor: Sensor, kernel: FakeKernel) -> None:
    wanted = events(syscall_events=[ENTER], file_events=[FileEventFilter(type=1)])  # type: ignore[arg-type]
    async with sensor.subscribe(wanted) as subscriber:
        message = Response.FromString(await anext(subscriber))
        assert [one.code for one in message.statuses] == [Code.OK, Code.FAILED_PRECONDITION]
        assert not message.events
        refused = message.statuses[1]
        assert refused.message.startswith("subscription.event_filter.file_events[0]: ")
        (detail,) = refused.details
        assert b"FILTER_NOT_SERVED" in detail.value
        kernel.enter(1)
        assert (await Reader(subscriber).take(1))[0].syscall.id == 1


async def test_nothing_servable_is_an_error(sensor: Sensor) -> None:
    wanted = events(file_events=[FileEventFilter(type=1)])  # type: ignore[arg-type]
    with pytest.raises(UnservableError):
        async with sensor.subscribe(wanted):
            pass
    assert not sensor.outputs


async def test_a_mistake_anywhere_refuses_all(sensor: Sensor) -> None:
    wanted = events(syscall_events=[ENTER], ticker_events=[TickerEventFilter()])
    with pytest.raises(RequestError):
        async with sensor.subscribe(wanted):
            pass
    assert not sensor.outputs


async def test_the_exit_status_where_nobody_tells_it(kernel: FakeKernel) -> None:
    refusing = mock.Mock(side_effect=UnservableError("process exit status", "no proc connector"))
    with kernel.installed(), mock.patch.object(process_events, "ExitConnector", refusing):
        async with Sensor(kernel.config()) as made:
            with pytest.raises(UnservableError, match="no proc connector"):
                made.families["process_events"](ProcessEventFilter(type=EXIT, exit_code=0), "x")
            async with reading(made, process_events=[ProcessEventFilter(type=EXIT)]) as reader:
                kernel.exit(1, None)
                assert len((await reader.take(1))[0].process.ListFields()) == 1


# --- the queue


class Metered:
    """What a Subscriber needs of a sensor."""

    def __init__(self) -> None:
        self.metrics = self
        self.dropped = self
        self.count = 0

    def inc(self, by: int) -> None:
        self.count += by


def batch(first: int, count: int, size: int = 100) -> Batch:
    return Batch(b"e" * (size * count), count, first, first + count - 1)


def subscriber(size: int = 1000) -> tuple[Subscriber, Metered]:
    meter = Metered()
    return Subscriber(meter, size), meter  # type: ignore[arg-type]


async def drained(one: Subscriber) -> list[tuple[str, int]]:
    """What can be read now: events' bytes and losses' counts."""
    found = []
    while one._queue:
        data = await anext(one)
        if data[:1] == b"e":
            found.append(("events", len(data) // 100))
        else:
            (status,) = Response.FromString(data).statuses
            found.append(("loss", loss(status)[0]))
    return found


async def test_batches_come_in_order_and_losses_in_their_place() -> None:
    one, _ = subscriber()
    one.offer(batch(0, 5))
    one.report(Loss("x", 3, 5, 7))
    one.offer(batch(8, 2))
    one.report(Loss("x", 1, 10, 10))
    one.report(Loss("x", 2, 11, 13))
    assert await drained(one) == [("events", 5), ("loss", 3), ("events", 2), ("loss", 3)]
    assert (one.sent, one.lost, one.dropped) == (7, 6, 0)


async def test_what_does_not_fit_is_counted_and_told_where_it_is_missing() -> None:
    one, meter = subscriber(1000)
    for first in range(0, 40, 4):
        one.offer(batch(first, 4))
    assert one.waiting == 800
    assert await drained(one) == [("events", 4), ("events", 4), ("loss", 32)]
    one.offer(batch(40, 4))
    assert await drained(one) == [("events", 4)]
    assert (one.sent, one.dropped, one.lost, meter.count) == (12, 32, 32, 32)


async def test_a_loss_says_between_which_times() -> None:
    one, _ = subscriber(400)
    one.offer(batch(0, 4))
    one.offer(batch(10, 4))
    one.offer(batch(20, 4))
    await anext(one)
    (status,) = Response.FromString(await anext(one)).statuses
    (detail,) = status.details
    metadata = dict(ErrorInfo.FromString(detail.value).metadata)
    assert metadata == {"count": "8", "cause": "this subscriber reads too slowly", "from": "10", "to": "23"}
    assert (status.code, status.message) == (15, "8 events lost: this subscriber reads too slowly")


async def test_an_event_larger_than_the_queue_is_sent_if_nothing_else_waits() -> None:
    """A command line may have two megabytes."""
    one, _ = subscriber(1000)
    one.offer(batch(0, 50))
    one.offer(batch(50, 1))
    assert await drained(one) == [("events", 50), ("loss", 1)]


async def test_losses_that_nobody_fetches_are_few() -> None:
    one, _ = subscriber(400)
    one.offer(batch(0, 4))
    for at in range(10_000):
        one.report(Loss(f"ring {at % 4}", 1, at, at))
        one.offer(batch(at, 1))
    assert len(one._queue) <= 1 + 4 + 1
    assert sum(count for what, count in await drained(one) if what == "loss") == 20_000


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("offer"), st.integers(1, 12)),
            st.tuples(st.just("read"), st.integers(1, 5)),
            st.tuples(st.just("lose"), st.integers(1, 9)),
        ),
        max_size=60,
    )
)
def test_the_books_close_however_it_reads(steps: list[tuple[str, int]]) -> None:
    """Issued = delivered + told as lost; never more waiting than allowed, or one batch."""

    async def run() -> None:
        one, _ = subscriber(1000)
        issued = delivered = lost = at = 0
        last = -1

        async def read() -> None:
            nonlocal delivered, lost
            data = await anext(one)
            if data[:1] == b"e":
                delivered += len(data) // 100
            else:
                (status,) = Response.FromString(data).statuses
                lost += loss(status)[0]

        for what, number in steps:
            if what == "offer":
                one.offer(batch(at, number))
                issued += number
                at += number
            elif what == "lose":
                one.report(Loss(string.ascii_letters[number], number, at, at))
                issued += number
            else:
                for _ in range(min(number, len(one._queue))):
                    await read()
            assert one.waiting <= 1200
            assert last < at or not at
        one.end()
        while one._queue:
            await read()
        with pytest.raises(StopAsyncIteration):
            await anext(one)
        assert issued == delivered + lost
        assert (one.sent, one.lost) == (delivered, lost)

    asyncio.run(run())


async def test_a_reader_waits_for_what_comes() -> None:
    one, _ = subscriber()
    reading_on = asyncio.ensure_future(anext(one))
    await asyncio.sleep(0)
    assert not reading_on.done()
    one.offer(batch(0, 1))
    assert await reading_on == b"e" * 100


async def test_what_waits_is_delivered_before_the_end() -> None:
    one, _ = subscriber()
    one.offer(batch(0, 1))
    one.end(UnservableError("sensor", "gone"))
    one.end()
    one.offer(batch(1, 1))
    assert await anext(one) == b"e" * 100
    for _ in range(2):
        with pytest.raises(UnservableError):
            await anext(one)


async def test_room_is_made_by_reading() -> None:
    one, _ = subscriber()
    one.offer(batch(0, 5))
    one.offer(batch(5, 5))
    waiting = asyncio.ensure_future(one.room(600))
    await asyncio.sleep(0)
    assert not waiting.done()
    await anext(one)
    await waiting
    await one.room(600)


def test_statuses_carry_what_a_program_needs() -> None:
    plain = Response.FromString(
        b"\x12" + bytes([len(bytes(make_status(Code.OK, "fine")))]) + bytes(make_status(Code.OK, "fine"))
    )
    assert [(one.code, one.message, len(one.details)) for one in plain.statuses] == [(0, "fine", 0)]


# --- ticker and chargen


async def test_the_ticker_tells_the_time(sensor: Sensor) -> None:
    begin = time.time_ns()
    async with reading(sensor, ticker_events=[TickerEventFilter(interval=5_000_000)]) as reader:
        told = await reader.take(5)
    end = time.time_ns()
    stamps = [one.ticker.nanoseconds for one in told]
    assert all(begin <= one <= end for one in stamps)
    # none before its beat; a late one is not followed by those that it delayed
    assert all(stamp >= begin + 5_000_000 * beat - 1_000_000 for beat, stamp in enumerate(stamps, 1))
    assert all(one.ticker.seconds == one.ticker.nanoseconds // 10**9 for one in told)
    assert all(one.process_pid == 0 and one.process_id == "" for one in told)


@pytest.mark.parametrize("length", [1, 64, 95, 96, 1000, 65536])
async def test_chargen_rotates_over_the_printable_characters(sensor: Sensor, length: int) -> None:
    """RFC 864."""
    async with reading(sensor, chargen_events=[ChargenEventFilter(length=length)]) as reader:
        told = [one.chargen for one in await reader.take(150 if length < 65536 else 10)]
    pattern = "".join(map(chr, range(32, 127)))
    for number, one in enumerate(told):
        assert one.index == number * length
        assert one.characters == "".join(pattern[(one.index + at) % 95] for at in range(length))


async def test_chargen_stops_while_nobody_reads(sensor: Sensor, kernel: FakeKernel) -> None:
    """And goes on where it was, without a hole; others are not kept waiting."""
    async with (
        reading(sensor, chargen_events=[ChargenEventFilter(length=1000)]) as reader,
        reading(sensor, syscall_events=[ENTER]) as other,
    ):
        before = -1
        while (made := sensor.engine.counters()["events"]) != before:
            before = made
            await asyncio.sleep(0.02)
        assert reader.subscriber.waiting < 1 << 20
        for number in range(5):
            kernel.enter(number)
            assert (await other.take(1))[0].syscall.id == number
        told = await reader.take(2000)
        assert [one.chargen.index for one in told] == list(range(0, 2_000_000, 1000))
        assert not reader.statuses


@pytest.mark.parametrize(
    "modifier", [{"limit": LimitModifier(limit=5)}, {"throttle": ThrottleModifier(interval=10)}]
)
async def test_a_modified_chargen_does_not_spin(sensor: Sensor, modifier: Any) -> None:
    wanted = Subscription(
        event_filter=EventFilter(chargen_events=[ChargenEventFilter(length=10)]),
        modifier=Modifier(**modifier),
    )
    async with reading(sensor, wanted) as reader:
        told = await reader.take(5)
        assert [one.chargen.index for one in told] == [0, 10, 20, 30, 40]
        if "throttle" in modifier:
            stamps = [one.sensor_monotime_nanos for one in told]
            assert min(b - a for a, b in itertools.pairwise(stamps)) >= 10_000_000
        with mock.patch.object(sensor, "publish", wraps=sensor.publish) as publish:
            for _ in range(200):
                await asyncio.sleep(0)
        assert publish.call_count < 20
