"""When it is cheaper to have the kernel make events in some cgroups only: by what was counted."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final

from ._perf import ffi, lib
from .engine import clock

if TYPE_CHECKING:
    from .perf import Rings

# A record that nobody wants costs its maker and the sensor some 0.7 us together. While some perf events are
# limited to cgroups, each switch from one's task to another's takes all of them off the CPU's list and puts
# them there again, 0.3 us each.
WORTH: Final = 1.0  # records for a perf event that is switched
NOT_WORTH: Final = 0.5
FEW_RECORDS: Final = 10_000.0  # a second: under 1 % of a CPU, not worth a look
FEW_SWITCHED: Final = 15_000.0
LOOK_AGAIN: Final = 60 * 10**9  # ns: records that are not made can't be counted


class Gain:
    """Whether it is cheaper to limit kernel events, by what is made in vain and what it costs."""

    def __init__(self, counts: Counts, now: Callable[[], int] = clock) -> None:
        self._counts = counts
        self._now = now
        self.pays = False
        self.is_counting_anew = False  # it paid, and is likely to do so in a second
        self.why = ""
        self._looked = self._since = now()
        self._in_vain = 0.0  # records a second that were not wanted when they were last made
        self._once = False  # it would have paid at the last look

    def weigh(self, able: Collection[int]) -> None:
        """Look at what was counted since the last time. `able`: the outputs that are limited or can be."""
        now = self._now()
        seconds, self._looked = max(1, now - self._looked) / 1e9, now
        in_vain = self._counts.made_in_vain(able) / seconds if able else 0.0
        if not able or not (self.pays or in_vain >= FEW_RECORDS):
            self.close()
            return
        count = self._counts.switched()
        if count is None:
            return
        switched = count / seconds
        if not self.pays:
            would, before = in_vain > WORTH * switched, self._once
            self._once, self.is_counting_anew = would, self.is_counting_anew and would
            if would and before:
                self.pays, self._in_vain, self._since = True, in_vain, now
                self.is_counting_anew = False
        elif self._in_vain < NOT_WORTH * switched:
            self.pays = self._once = False
        elif switched > FEW_SWITCHED and now - self._since > LOOK_AGAIN:
            self.pays, self.is_counting_anew = False, True
        self.why = f"{self._in_vain:.0f} a second would be in vain, {switched:.0f} perf events are switched"

    def close(self) -> None:
        """Count no more; idempotent."""
        self._counts.close()
        self.pays = self._once = self.is_counting_anew = False
        self.why = "few would be in vain"


class Counts:
    """What is made in vain, counted by the engine, and what is or would be switched, by the kernel."""

    def __init__(self, rings: Rings) -> None:
        self._rings = rings
        self._elsewhere: dict[int, int] = {}  # source -> its records of others, until the last look
        self._cpus: list[int] = []  # those that are counted on
        self._counters: list[int] = []  # descriptors of what counts there
        self._switches: int | None = None

    def made_in_vain(self, able: Collection[int]) -> int:
        """How many records were others' since the last time, of kernel events that could be limited."""
        sources = set()
        for event in self._rings.open_events:
            outputs = event.outputs() if event.outputs is not None else ()
            if outputs and set(outputs) <= set(able):
                sources.add(event.source)
        counts = {one: lib.rs_source_elsewhere(self._rings.engine.handle, one) for one in sources}
        before, self._elsewhere = self._elsewhere, counts
        return sum(count - before.get(one, count) for one, count in counts.items())

    def switched(self) -> int | None:
        """How many perf events that makes since then, as tasks of different cgroups followed each other.

        None if that is not known.
        """
        if self._cpus != self._rings.cpus:
            self.close()
            self._cpus = list(self._rings.cpus)
            perf = ffi.new("rs_perf *", {"tracepoint": lib.RS_PERF_SWITCHES})
            opened = [lib.rs_perf_open(perf, cpu, -1) for cpu in self._cpus]
            self._counters = [fd for fd in opened if fd >= 0]
            for fd in self._counters:
                lib.rs_perf_enable(fd, 1)
        if len(self._counters) < len(self._cpus):
            return None
        before, self._switches = self._switches, sum(max(0, lib.rs_perf_count(fd)) for fd in self._counters)
        return None if before is None else (self._switches - before) * len(self._rings.open_events)

    def close(self) -> None:
        """Count no more; idempotent."""
        for fd in self._counters:
            os.close(fd)
        self._cpus, self._counters, self._switches = [], [], None
