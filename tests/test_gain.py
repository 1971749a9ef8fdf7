"""When limiting events to cgroups pays: by what was counted, second by second."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from ringside.sensor.gain import FEW_RECORDS, FEW_SWITCHED, LOOK_AGAIN, NOT_WORTH, WORTH, Gain


class Counted:
    """What the test says was counted."""

    def __init__(self) -> None:
        self.time = self.records = self.count = 0
        self.counting = False

    def made_in_vain(self, able: Collection[int]) -> int:
        return self.records if able else 0

    def switched(self) -> int | None:
        before, self.counting = self.counting, True
        return self.count if before else None

    def close(self) -> None:
        self.counting = False


class Scales:
    """Looks once a second."""

    def __init__(self) -> None:
        self.counted = Counted()
        self.gain = Gain(self.counted, lambda: self.counted.time)  # type: ignore[arg-type]

    def second(self, records: float, switched: float, able: Collection[int] = (1,)) -> bool:
        """What was made in vain in it, how many perf events were switched; whether it pays now."""
        self.counted.time += 10**9
        self.counted.records, self.counted.count = int(records), int(switched)
        self.gain.weigh(able)
        return self.gain.pays


MANY = 10 * FEW_RECORDS


def test_it_pays_once_it_has_for_two_seconds_in_a_row() -> None:
    scales = Scales()
    little = 0.9 * MANY / WORTH
    assert [scales.second(MANY, little) for _ in range(3)] == [False, False, True], (
        "the first begins to count"
    )


@pytest.mark.parametrize(
    ("records", "switched"), [(0.9 * FEW_RECORDS, 0), (MANY, 1.1 * MANY / WORTH), (0, 0)]
)
def test_it_does_not_pay(records: float, switched: float) -> None:
    scales = Scales()
    assert not any(scales.second(records, switched) for _ in range(10))


def test_a_second_in_between_in_which_it_would_not() -> None:
    scales = Scales()
    seconds = [MANY, MANY, FEW_RECORDS, MANY, FEW_RECORDS, MANY]
    assert not any(scales.second(records, 0.9 * MANY / WORTH) for records in seconds)


def test_nothing_is_counted_where_little_is_made_in_vain() -> None:
    scales = Scales()
    scales.second(0.9 * FEW_RECORDS, 0)
    assert not scales.counted.counting
    scales.second(1.1 * FEW_RECORDS, 0)
    assert scales.counted.counting
    scales.second(0.9 * FEW_RECORDS, 0)
    assert not scales.counted.counting


def paying() -> Scales:
    scales = Scales()
    while not scales.second(MANY, 0):
        pass
    return scales


def test_it_goes_on_though_nothing_is_made_any_more() -> None:
    scales = paying()
    assert all(scales.second(0, 0.9 * MANY / NOT_WORTH) for _ in range(10))


def test_it_ends_when_it_costs_more_than_it_saves() -> None:
    assert not paying().second(0, 1.1 * MANY / NOT_WORTH)


def test_after_a_while_it_is_counted_anew() -> None:
    """If it costs anything: what is not made now may have ended."""
    scales = paying()
    seconds = LOOK_AGAIN // 10**9
    assert all(scales.second(0, 1.1 * FEW_SWITCHED) for _ in range(seconds))
    assert not scales.second(0, 1.1 * FEW_SWITCHED)
    assert scales.gain.is_counting_anew
    assert scales.second(MANY, 1.1 * FEW_SWITCHED), "as before"
    assert not scales.gain.is_counting_anew
    for _ in range(seconds + 1):
        scales.second(0, 1.1 * FEW_SWITCHED)
    assert not scales.second(0, 1.1 * FEW_SWITCHED)
    assert not scales.counted.counting


def test_it_costs_nothing() -> None:
    scales = paying()
    assert all(scales.second(0, 0.9 * FEW_SWITCHED) for _ in range(2 * LOOK_AGAIN // 10**9))


def test_nobody_wants_certain_containers_any_more() -> None:
    scales = paying()
    assert not scales.second(MANY, 0, able=())
    assert not scales.counted.counting


def test_switches_that_can_not_be_counted() -> None:
    scales = Scales()
    scales.counted.switched = lambda: None  # type: ignore[method-assign]
    assert not any(scales.second(MANY, 0) for _ in range(5))


def test_counting_anew_may_show_that_it_pays_no_more() -> None:
    scales = paying()
    while not scales.gain.is_counting_anew:
        scales.second(0, 1.1 * FEW_SWITCHED)
    assert not scales.second(1.1 * FEW_RECORDS, 2 * FEW_SWITCHED)
    assert not scales.gain.is_counting_anew
    assert scales.counted.counting
