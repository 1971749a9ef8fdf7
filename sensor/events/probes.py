"""Bulk events on probes: made when first wanted, removed when no longer, named with their owner.

A probe can be removed only when no perf event is open on it, and a perf event is closed only when its
records have been read; so removal waits for the next drain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ..errors import KernelError
from ..plan import Table
from ..tracefs.filter import ALWAYS, Filter
from ..tracefs.format import Format
from ..tracefs.owner import Owner
from ..tracefs.probe import Fetchargs, KprobeSpec, Probe, create, read_profile, unique_name
from .bulk import BulkEvent

if TYPE_CHECKING:
    from ..program import Fields
    from ..sensor import Sensor

log = logging.getLogger(__name__)


class Probes:
    """The probes of one sensor, each shared by all who want the same."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor
        self._made: dict[object, tuple[Probe, BulkEvent]] = {}
        self._misses: dict[str, int] = {}

    def get(
        self,
        spec: KprobeSpec,
        table: Callable[[Format], Table],
        *,
        fields: Callable[[Format], Fields] | None = None,
        fixed_filter: str | None = None,
        exclude: Filter = ALWAYS,
        may_miss: bool = False,
    ) -> BulkEvent:
        """The bulk event on this probe, made now if need be. What `create` raises, if it can't be.

        Probes are the same if all but their names are. `may_miss`: calls that the kernel says it missed are
        loss. (Not so where none can be, as the function calls nothing probed: 5.10 counts as missed what
        was recorded with memory that could not be read.)
        """
        key = (
            type(spec),
            spec.definition().split(" ", 1)[1],
            getattr(spec, "is_return", False),
            fixed_filter,
        )
        if key not in self._made:
            probe = create(self._sensor.tracefs, spec, proc=self._sensor.config.proc)
            try:
                record = probe.read_format()
                event = BulkEvent(
                    self._sensor.rings,
                    record,
                    record.id,
                    table(record),
                    exclude=exclude,
                    flags=self._sensor.lineage_flag(),
                    fields=fields(record) if fields else None,
                    fixed_filter=fixed_filter,
                )
            except BaseException:
                probe.close()
                raise
            self._made[key] = probe, event
            if may_miss:
                self._misses[probe.spec.name] = 0
        return self._made[key][1]

    def kprobe(self, stem: str, symbol: str, fetchargs: Fetchargs, *, is_return: bool = False) -> KprobeSpec:
        """A spec with a name of its own."""
        return KprobeSpec(
            self.group,
            unique_name(stem),
            symbol,
            is_return=is_return,
            fetchargs=fetchargs,
        )

    @property
    def group(self) -> str:
        """The group that all of them are in."""
        return Owner.current(self._sensor.config.proc).group

    def tidy(self) -> None:
        """Remove the probes that nobody wants."""
        for key, (probe, event) in list(self._made.items()):
            if not event.is_wanted:
                del self._made[key]
                self._misses.pop(probe.spec.name, None)
                event.close()
                self._sensor.rings.later(partial(self._remove, probe))

    def close(self) -> None:
        """Remove all."""
        made, self._made = list(self._made.values()), {}
        for _, event in made:
            event.kernel.close()
        self._sensor.rings.settle(wait=True)
        for probe, _ in made:
            self._remove(probe)

    def _remove(self, probe: Probe) -> None:
        try:
            probe.close()
        except KernelError as error:
            log.warning("%s could not be removed, the next start will: %s", probe, error)

    def misses(self) -> list[tuple[BulkEvent, int]]:
        """Calls that probes have missed since the last time."""
        found: list[tuple[BulkEvent, int]] = []
        if self._made:
            profile = read_profile(self._sensor.tracefs)
            for probe, event in self._made.values():
                before = self._misses.get(probe.spec.name)
                if before is None or probe.spec.name not in profile:
                    continue
                now = profile[probe.spec.name].misses
                self._misses[probe.spec.name] = now
                if now > before:
                    found.append((event, now - before))
        return found
