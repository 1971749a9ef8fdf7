"""Ladders: several ways to the same events, the best that works is taken.

Each rung is tried by using it: what it needs is made, an event of ours is caused, and it must arrive.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine import clock
from ..errors import KernelError, RequestError, SetupError, UnservableError
from .bulk import BulkEvent, BulkWant

if TYPE_CHECKING:
    from ..sensor import Sensor

log = logging.getLogger(__name__)
_PATIENCE = 2 * 10**9  # ns that an event of our own may take to arrive
_AGAIN = 10 * 10**9  # ns until what did not work is tried again: trying takes its time, and others wait


@dataclass(frozen=True)
class Rung:
    """One way. `events` makes what it needs, by name; UnservableError if it can't be had here.

    `best_effort` says why it may miss something; empty if it doesn't.
    """

    name: str
    mechanism: str
    events: Callable[[], dict[str, BulkEvent]]
    best_effort: str = ""


class Ladder:
    """The rungs to an event family, and the one that was reached.

    `cause` makes an event of ours happen; False if this process may not: a rung counts once it is set up.
    """

    def __init__(
        self, sensor: Sensor, family: str, rungs: Sequence[Rung], cause: Callable[[], object]
    ) -> None:
        self._sensor = sensor
        self._family = family
        self._rungs = rungs
        self._cause = cause
        self._reached: Rung | None = None
        self._failed: list[tuple[str, str]] = []
        self._again = 0  # CLOCK_MONOTONIC_RAW ns: not tried before then

    def reached(self) -> Rung:
        """The best rung that works. UnservableError if none does, with what each lacks."""
        if self._reached is None:
            if clock() < self._again:
                raise self._refusal()
            self._failed.clear()
            wanted = self._sensor.config.mechanism
            for rung in self._rungs:
                if wanted not in ("auto", rung.name):
                    continue
                try:
                    self._prove(rung)
                except (UnservableError, KernelError, RequestError, SetupError) as error:
                    problem = error.cause if isinstance(error, UnservableError) else str(error)
                    self._failed.append((rung.mechanism, problem))
                    log.info("%s: not by %s: %s", self._family, rung.mechanism, problem)
                    continue
                self._reached = rung
                break
            else:
                self._again = clock() + _AGAIN
                raise self._refusal()
        return self._reached

    def _refusal(self) -> UnservableError:
        why = "; ".join(f"{mechanism}: {problem}" for mechanism, problem in self._failed)
        return UnservableError(self._family, f"no way works here: {why or self._sensor.config.mechanism}")

    @property
    def missing(self) -> list[tuple[str, str]]:
        """The better rungs that did not work, and why."""
        return list(self._failed)

    def _prove(self, rung: Rung) -> None:
        event = next(iter(rung.events().values()))
        engine = self._sensor.engine
        output = engine.open_output(1 << 16, include_self=True)
        want = BulkWant(self._family, event)
        try:
            event.include_self(True)
            event.add(output, want)
            deadline = clock() + _PATIENCE
            if self._cause() is False:
                log.info(
                    "%s: %s is not proved: it is not permitted to cause one", self._family, rung.mechanism
                )
                return
            while engine.take(output) is None:
                if clock() > deadline:
                    raise UnservableError(
                        self._family, "it was set up, but an event of our own did not arrive"
                    )
                self._sensor.drain_once()
        finally:
            event.remove(output, want)
            event.include_self(False)
            engine.close_output(output)


def touch_nothing() -> None:
    """Cause an open that fails."""
    try:
        os.close(os.open("/.ringside-proof", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        pass
