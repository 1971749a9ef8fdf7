"""Requests as bytes: read strictly, refused by name; and of none of them anything is left in the sensor."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from ringside.api.descriptors import message_class
from ringside.api.v0 import (
    ContainerFilter,
    EventFilter,
    FilterExpression,
    FilterPredicate,
    NetworkEventFilter,
    Subscription,
    SyscallEventFilter,
    SyscallEventType,
    TickerEventFilter,
)
from ringside.sensor.errors import RequestError, UnservableError
from ringside.sensor.receiving import decode_request
from ringside.sensor.wire import varint

from .support.fakekernel import FakeKernel, reading
from .support.fakering import Response
from .support.requests import encoded, requests, subscriptions
from .support.served import Served, serving_in_a_loop

REQUEST: Any = message_class("capsule8.api.v0.GetEventsRequest")
ENTER = SyscallEventFilter(type=SyscallEventType.ENTER)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving_in_a_loop(tmp_path) as made:
        yield made


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=requests)
def test_any_request_is_served_or_refused_and_leaves_nothing(
    served: Served, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    caplog.clear()

    async def serve() -> None:
        try:
            async with served.sensor.subscribe(decode_request(data).subscription) as subscriber:
                first = Response.FromString(await anext(subscriber))
                assert first.statuses[0].code == 0
                assert not first.events
        except (RequestError, UnservableError):
            pass
        await served.settled()
        async with reading(served.sensor, syscall_events=[ENTER]) as reader:
            served.kernel.enter(39)
            assert (await reader.take(1))[0].syscall.id == 39
        await served.settled()

    served.run(serve())
    assert not [one for one in caplog.records if one.levelname in ("ERROR", "CRITICAL")]


@given(subscriptions())
def test_what_the_dataclasses_write_is_read_as_it_was(subscription: Subscription) -> None:
    assert decode_request(encoded(subscription)).subscription == subscription


@settings(max_examples=300)
@given(requests)
def test_what_is_read_is_what_protobuf_reads(data: bytes) -> None:
    try:
        read = decode_request(data)
    except RequestError:
        return
    theirs = REQUEST.FromString(data)
    assert REQUEST.FromString(bytes(read)) == theirs
    assert theirs.SerializeToString(deterministic=True) == REQUEST.FromString(bytes(read)).SerializeToString(
        deterministic=True
    )


def nested(*parts: bytes | int) -> bytes:
    """Tags from the outside in, around the last part."""
    *tags, inner = parts
    assert isinstance(inner, bytes)
    for number in reversed(tags):
        assert isinstance(number, int)
        inner = varint(number << 3 | 2) + varint(len(inner)) + inner
    return inner


SYSCALL, FILE, NETWORK, CHARGEN = (1, 1, 1), (1, 1, 3), (1, 1, 5), (1, 1, 100)
PREDICATE = (*NETWORK, 10, 12)
FILTER = "subscription.event_filter"
BAD: dict[str, tuple[bytes, str, str]] = {
    "noise": (b"\xff", "request", "ends in the middle of a number"),
    "nulls": (bytes(64), "request", "has a field with the number 0"),
    "text": (b"GET / HTTP/1.1", "request", "has a field with the number 8"),
    "an unknown field": (
        b"\x10\x01",
        "request",
        "has a field with the number 2, which this sensor's GetEventsRequest does not have",
    ),
    "an unknown field of a subscription": (
        nested(1, 77, b"x"),
        "subscription",
        "has a field with the number 77, which this sensor's Subscription does not have",
    ),
    "an unknown kind of event": (
        nested(1, 1, 6, b""),
        FILTER,
        "has a field with the number 6, which this sensor's EventFilter does not have",
    ),
    "an unknown field of a filter": (
        nested(*SYSCALL, b"\x08\x01") + nested(*SYSCALL, b"\x08\x01\x50\x07"),
        f"{FILTER}.syscall_events[1]",
        "has a field with the number 10, which this sensor's SyscallEventFilter does not have",
    ),
    "an unknown field of a number": (
        nested(*SYSCALL, 2, b"\x10\x01"),
        f"{FILTER}.syscall_events[0].id",
        "has a field with the number 2, which this sensor's Int64Value does not have",
    ),
    "a member that there is not": (
        nested(*SYSCALL, b"\x08\x4d"),
        f"{FILTER}.syscall_events[0].type",
        "is 77, must be SYSCALL_EVENT_TYPE_ENTER or SYSCALL_EVENT_TYPE_EXIT",
    ),
    "a negative member": (
        nested(*SYSCALL, b"\x08" + b"\xff" * 9 + b"\x01"),
        f"{FILTER}.syscall_events[0].type",
        "is -1, must be SYSCALL_EVENT_TYPE_ENTER or SYSCALL_EVENT_TYPE_EXIT",
    ),
    "a member when cut to 32 bits": (
        nested(*SYSCALL, b"\x08" + varint((1 << 32) + 1)),
        f"{FILTER}.syscall_events[0].type",
        "is 4294967297, which does not fit 32 bits",
    ),
    "a mask that is too wide": (
        nested(*FILE, 12, b"\x08" + varint(1 << 33)),
        f"{FILTER}.file_events[0].open_flags_mask.value",
        "is 8589934592, which does not fit 32 bits",
    ),
    "a number of 65 bits": (
        nested(*CHARGEN, b"\x08" + b"\xff" * 9 + b"\x02"),
        f"{FILTER}.chargen_events[0].length",
        "holds a number of more than 64 bits",
    ),
    "a number of eleven bytes": (
        nested(*CHARGEN, b"\x08" + b"\x80" * 10 + b"\x00"),
        f"{FILTER}.chargen_events[0].length",
        "holds a number of more than 64 bits",
    ),
    "a number without an end": (
        nested(*CHARGEN, b"\x08\x80"),
        f"{FILTER}.chargen_events[0].length",
        "ends in the middle of a number",
    ),
    "not a number but NaN": (
        nested(*CHARGEN, b"\x09\0\0\0\0\0\0\xf8\x7f"),
        f"{FILTER}.chargen_events[0].length",
        "is encoded as 8 bytes, must be a number",
    ),
    "a text as a number": (
        nested(1, 1, 4, b"\x50\x01"),
        f"{FILTER}.kernel_events[0].symbol",
        "is encoded as a number, must be a block of bytes",
    ),
    "a number as a text": (
        nested(*SYSCALL, 1, b"ENTER"),
        f"{FILTER}.syscall_events[0].type",
        "is encoded as a block of bytes, must be a number",
    ),
    "a number not wrapped": (
        nested(*SYSCALL, b"\x08\x01\x10\x07"),
        f"{FILTER}.syscall_events[0].id",
        "is encoded as a number, must be a block of bytes",
    ),
    "a group": (b"\x0b\x0c", "subscription", "is encoded as wire type 3, must be a block of bytes"),
    "a message cut short": (
        nested(1, b"\x0a\x05\x0a"),
        FILTER,
        "is 5 bytes long, but only 1 follow",
    ),
    "a text that is no UTF-8": (
        nested(*FILE, 10, 1, b"/\xff"),
        f"{FILTER}.file_events[0].filename.value",
        "is not UTF-8: byte 1 is 0xff; text must be UTF-8",
    ),
    "half a surrogate": (
        nested(1, 2, 2, b"\xed\xa0\x80"),
        "subscription.container_filter.names[0]",
        "is not UTF-8: byte 0 is 0xed; text must be UTF-8",
    ),
    "a key that is no UTF-8": (
        nested(1, 1, 4, 11, 1, b"\xc0"),
        f"{FILTER}.kernel_events[0].arguments[0].key",
        "is not UTF-8: byte 0 is 0xc0; text must be UTF-8",
    ),
    "two values": (
        nested(*PREDICATE, b"\xa8\x01\x02\xb0\x01\x01"),
        f"{FILTER}.network_events[0].filter.predicate",
        "has both signed_value and unsigned_value, must have one value",
    ),
    "nested too deep": (
        nested(*NETWORK, *[10] * 97, b""),
        f"{FILTER}.network_events[0].filter{'.lhs' * 96}",
        "is nested deeper than 100 messages",
    ),
    "nested without end": (
        nested(*NETWORK, 10, *[11] * 10_000, b""),
        f"{FILTER}.network_events[0].filter{'.rhs' * 96}",
        "is nested deeper than 100 messages",
    ),
    "too many fields": (
        nested(1, 1, b"\x0a\x00" * 40_000),
        "request",
        "has more than 32768 fields",
    ),
    "too long": (bytes((4 << 20) + 1), "request", "4194305 bytes; the most is 4194304"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told_and_where(name: str) -> None:
    data, field, words = BAD[name]
    with pytest.raises(RequestError) as told:
        decode_request(data)
    assert (told.value.field, told.value.problem[: len(words)]) == (field, words)


def test_the_largest_request_is_read_in_a_moment() -> None:
    """Four megabytes of one text; of two million fields no more is looked at than is allowed."""
    text = "x" * ((4 << 20) - 100)
    read = decode_request(encoded(Subscription(container_filter=ContainerFilter(names=[text]))))
    assert read.subscription is not None
    assert read.subscription.container_filter == ContainerFilter(names=[text])


def test_what_protobuf_allows_is_allowed() -> None:
    """Fields in any order, numbers longer than need be, the last of a field given twice, pieces."""
    number = b"\x08\x87\x80\x00"
    data = nested(1, 11, b"\x08\x05") + nested(*SYSCALL, nested(2, number) + b"\x08\x02\x08\x01")
    data += nested(1, 11, b"\x08\x06")
    assert decode_request(data).subscription == Subscription(
        event_filter=EventFilter(syscall_events=[SyscallEventFilter(type=SyscallEventType.ENTER, id=7)]),
        for_duration=6,
    )
    pieces = [
        Subscription(event_filter=EventFilter(syscall_events=[ENTER])),
        Subscription(event_filter=EventFilter(ticker_events=[TickerEventFilter(interval=5)])),
    ]
    assert decode_request(b"".join(map(encoded, pieces))).subscription == Subscription(
        event_filter=EventFilter(syscall_events=[ENTER], ticker_events=[TickerEventFilter(interval=5)])
    )


def test_expressions_nested_as_deep_as_can_be() -> None:
    deep = FilterExpression(predicate=FilterPredicate())
    for _ in range(94):
        deep = FilterExpression(lhs=deep)
    wanted = Subscription(event_filter=EventFilter(network_events=[NetworkEventFilter(filter=deep)]))
    assert decode_request(encoded(wanted)).subscription == wanted


def test_a_mask_may_be_written_without_its_sign() -> None:
    read = decode_request(nested(*FILE, b"\x08\x01" + nested(12, b"\x08" + varint(0x80000001))))
    assert read.subscription is not None
    assert read.subscription.event_filter is not None
    assert read.subscription.event_filter.file_events[0].open_flags_mask == 0x80000001 - (1 << 32)


# --- what is left of a subscription


@pytest.mark.parametrize("since", [1, 10**12, (1 << 63) - 1])
@pytest.mark.parametrize("lasting", [1, (1 << 63) - 1])
async def test_times_as_far_away_as_can_be_said(tmp_path: Path, since: int, lasting: int) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.proc.add(1, 0, "init", 1)
    wanted = Subscription(
        event_filter=EventFilter(syscall_events=[ENTER]), since_duration=since, for_duration=lasting
    )
    async with kernel.sensor() as sensor, reading(sensor, wanted) as reader:
        if lasting <= since:  # over as it begins
            assert await reader.rest() == []
            assert isinstance(reader.ended, StopAsyncIteration)
        else:
            kernel.enter(39)
            assert (await reader.take(1))[0].syscall.id == 39


async def test_a_subscriber_who_left_is_not_kept_until_its_time_is_over(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.proc.add(1, 0, "init", 1)
    wanted = Subscription(event_filter=EventFilter(syscall_events=[ENTER]), for_duration=10**18)
    async with kernel.sensor() as sensor:
        async with sensor.subscribe(wanted) as subscriber:
            left = weakref.ref(subscriber)
        del subscriber
        gc.collect()
        assert left() is None
