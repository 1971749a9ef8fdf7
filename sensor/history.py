"""What happened lately: process and container events, kept for subscriptions that look back.

These are always followed, whoever subscribes, so they can be told again. They are kept as the facts they
came from and encoded only when asked for; the oldest go when the space is used up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

_COST = 400  # bytes that one event takes, about, besides its texts


class Past(NamedTuple):
    """One event as it was: the listener's kind, when and where, and what its body is made of."""

    kind: Any
    time: int
    cpu: int
    tid: int
    subject: Any
    facts: dict[str, Any]
    size: int


class History:
    """The events of the last while, oldest first; `size` is about how many bytes they may take."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._events: deque[Past] = deque()
        self._used = 0
        self.since = 0  # nothing older is known

    def add(
        self, kind: Any, time: int, cpu: int, tid: int, subject: Any, facts: dict[str, Any], text: int = 0
    ) -> None:
        """Keep one; `text` is how many bytes of text it holds."""
        past = Past(kind, time, cpu, tid, subject, facts, _COST + text)
        self._events.append(past)
        self._used += past.size
        while self._used > self._size and self._events:
            gone = self._events.popleft()
            self._used -= gone.size
            self.since = gone.time

    def since_time(self, time: int) -> Iterator[Past]:
        """Those that happened at that time (CLOCK_MONOTONIC_RAW ns) or later."""
        return (past for past in list(self._events) if past.time >= time)

    def __len__(self) -> int:
        return len(self._events)
