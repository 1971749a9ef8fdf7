"""Perf events that come, go and take each other's place, and whose each record then is."""

from __future__ import annotations

import random

import pytest
from ringside.sensor._perf import ffi, lib

from .support.calls import SYS, Calls, call, calls, pair, rig
from .support.fakering import (
    now,
    process_id,
)

pytestmark = pytest.mark.asan


# --- perf events that come, go and are replaced


@pytest.mark.parametrize(
    ("newer_first", "order"),
    [(True, lib.RS_LATEST_FIRST), (False, lib.RS_LATEST_LAST)],
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


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("order", [lib.RS_LATEST_FIRST, lib.RS_LATEST_LAST])
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
            for nth, at in enumerate(there):
                when = base + index * gap + nth * 200
                rig.ring.write(call(0 if alike else index, when, id=SYS + at))
        rig.drain()
        assert rig.numbers() == [0 if alike else index for index in range(500)]


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("order", [lib.RS_LATEST_FIRST, lib.RS_LATEST_LAST])
def test_an_interrupt_between_the_two_records_of_a_call(order: int, alike: bool) -> None:
    """However long it takes."""
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


@pytest.mark.parametrize("order", [lib.RS_LATEST_FIRST, lib.RS_LATEST_LAST])
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
