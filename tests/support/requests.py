"""Requests at random: subscriptions that make sense, that almost do, and bytes that are none."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import strategies as st
from ringside.api.v0 import (
    ChargenEventFilter,
    ContainerEventFilter,
    ContainerEventType,
    ContainerEventView,
    ContainerFilter,
    EventFilter,
    FileEventFilter,
    FileEventType,
    FilterExpression,
    FilterExpressionFilterExpressionType,
    FilterPredicate,
    FilterPredicatePredicateType,
    FilterPredicateValueType,
    GetEventsRequest,
    KernelFunctionCallEventType,
    KernelFunctionCallFilter,
    LimitModifier,
    Modifier,
    NetworkEventFilter,
    NetworkEventType,
    ProcessEventFilter,
    ProcessEventType,
    Subscription,
    SyscallEventFilter,
    SyscallEventType,
    ThrottleModifier,
    ThrottleModifierIntervalType,
    TickerEventFilter,
)

from .peer import framed

_Strategy = st.SearchStrategy[Any]
_EDGES = [1 << bits for bits in (7, 16, 31, 32, 62)]
int32 = st.integers(-5, 5) | st.integers(-(1 << 31), (1 << 31) - 1)
int64 = st.integers(1, 500) | st.sampled_from([-1, 0, *_EDGES, (1 << 63) - 1, -(1 << 63)])
uint64 = st.integers(1, 500) | st.sampled_from([0, *_EDGES, (1 << 64) - 1])
text = st.sampled_from(["", "*", "/bin/*", "/etc/passwd", "[a", "\0", "ä\U0001f600", "x" * 5000]) | st.text(
    max_size=8
)


def _maybe(strategy: _Strategy) -> _Strategy:
    return st.none() | strategy


def _kind(enum: Any) -> _Strategy:
    """Mostly a member, never one that there is not: mutations see to that."""
    return st.sampled_from(list(enum)[1:]) | st.sampled_from(list(enum))


_VALUE_TYPES = st.sampled_from(list(FilterPredicateValueType))
_NAMES = ["fd", "sa_family", "sin_port", "sin6_addr_high", "sun_path", "backlog", "ret", "nobody"]


def _predicate(kind: FilterPredicateValueType, **more: Any) -> FilterPredicate:
    value = {
        FilterPredicateValueType.SIGNED: "signed_value",
        FilterPredicateValueType.UNSIGNED: "unsigned_value",
        FilterPredicateValueType.STRING: "string_value",
    }[kind]
    kept = {name: one for name, one in more.items() if not name.endswith("_value") or name == value}
    return FilterPredicate(value_type=kind, **kept)


_PREDICATES = st.builds(
    _predicate,
    _VALUE_TYPES,
    type=st.sampled_from(list(FilterPredicatePredicateType)),
    field_name=st.sampled_from(_NAMES),
    signed_value=int64,
    unsigned_value=uint64,
    string_value=text,
)
expressions: _Strategy = st.recursive(
    st.builds(FilterExpression, predicate=_PREDICATES),
    lambda inner: st.builds(
        FilterExpression,
        type=st.sampled_from(list(FilterExpressionFilterExpressionType)[1:]),
        lhs=inner,
        rhs=inner,
    ),
    max_leaves=8,
)
_FILTERS: dict[str, _Strategy] = {
    "syscall_events": st.builds(
        SyscallEventFilter, type=_kind(SyscallEventType), id=_maybe(int64), ret=_maybe(int64)
    ),
    "process_events": st.builds(
        ProcessEventFilter,
        type=_kind(ProcessEventType),
        exec_filename=_maybe(text),
        exec_filename_pattern=_maybe(text),
        exit_code=_maybe(int32),
    ),
    "file_events": st.builds(
        FileEventFilter,
        type=_kind(FileEventType),
        filename=_maybe(text),
        filename_pattern=_maybe(text),
        open_flags_mask=_maybe(int32),
        create_mode_mask=_maybe(int32),
    ),
    "kernel_events": st.builds(
        KernelFunctionCallFilter,
        type=_kind(KernelFunctionCallEventType),
        symbol=st.sampled_from(["", "do_exit", "a b", "1\n2"]),
        arguments=st.dictionaries(text, text, max_size=2),
        filter=text,
    ),
    "network_events": st.builds(NetworkEventFilter, type=_kind(NetworkEventType), filter=_maybe(expressions)),
    "container_events": st.builds(
        ContainerEventFilter,
        type=_kind(ContainerEventType),
        view=st.sampled_from(list(ContainerEventView)),
    ),
    "chargen_events": st.builds(ChargenEventFilter, length=uint64),
    "ticker_events": st.builds(TickerEventFilter, interval=int64),
}
_CONTAINERS = st.builds(
    ContainerFilter,
    **dict.fromkeys(
        ("ids", "names", "image_ids", "image_names"),
        st.lists(text | st.sampled_from(["ab" * 32, "sha256:" + "0" * 64]), max_size=2),
    ),
)
_MODIFIERS = st.builds(
    Modifier,
    limit=_maybe(st.builds(LimitModifier, limit=int64)),
    throttle=_maybe(
        st.builds(
            ThrottleModifier,
            interval=int64,
            interval_type=st.sampled_from(list(ThrottleModifierIntervalType)),
        )
    ),
)


@st.composite
def subscriptions(draw: Any) -> Subscription:
    """One, two kinds of filters mostly, and now and then what goes with them."""
    names = draw(st.lists(st.sampled_from(list(_FILTERS)), max_size=3, unique=True))
    filters = {name: draw(st.lists(_FILTERS[name], min_size=1, max_size=2)) for name in names}
    rare = st.integers(0, 3).map(lambda number: number == 0)
    more: dict[str, Any] = {
        name: draw(strategy)
        for name, strategy in (
            ("container_filter", _CONTAINERS),
            ("since_duration", int64),
            ("for_duration", int64),
            ("modifier", _MODIFIERS),
        )
        if draw(rare)
    }
    return Subscription(event_filter=EventFilter(**filters), **more)


def encoded(subscription: Subscription) -> bytes:
    """A request for it."""
    return bytes(GetEventsRequest(subscription=subscription))


@st.composite
def mutated(draw: Any) -> bytes:
    """A request's bytes, some of them changed, gone, or there twice."""
    data = bytearray(encoded(draw(subscriptions())))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        size = draw(st.integers(0, 8))
        change = draw(st.sampled_from(["set", "bit", "cut", "insert", "twice", "end"]))
        if change == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif change == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del data[at : at + size]
        elif change == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        elif change == "twice":
            data[at:at] = data[at : at + size]
        else:
            del data[at:]
    return bytes(data)


requests = subscriptions().map(encoded) | mutated() | st.binary(max_size=64)


@st.composite
def frames(draw: Any) -> list[bytes]:
    """DATA frames: mostly a message, in pieces; else whatever."""
    data = framed(draw(requests)) if draw(st.integers(0, 3)) else draw(st.binary(max_size=40))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=3)))
    return [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]
