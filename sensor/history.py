"""What happened lately: process and container events, kept for subscriptions that look back.

These are always followed, whoever subscribes, so they can be told again. They are kept as the facts they
came from and encoded only when asked for; the oldest go when the space is used up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .events.process_facts import Facts, text_in

if TYPE_CHECKING:
    from .process import Process

_COST = 400  # bytes that one event takes, about, besides its texts


# one event as it was: when (CLOCK_MONOTONIC_RAW ns), CPU, thread, whose, and what its body is made of
Past = tuple[int, int, int, "Process", "Facts"]


class History:
    """The events of the last while, oldest first; `size` is about how many bytes they may take."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._events: deque[Past] = deque()
        self._used = 0
        self.since = 0  # nothing older is known

    def add(self, past: Past, text: int) -> None:
        """Keep one; `text` is how many bytes of text it holds."""
        self._events.append(past)
        self._used += _COST + text
        while self._used > self._size and self._events:
            gone = self._events.popleft()
            self._used -= _COST + text_in(gone[4])
            self.since = gone[0]

    def since_time(self, time: int) -> Iterator[Past]:
        """Those that happened at that time (CLOCK_MONOTONIC_RAW ns) or later."""
        return (past for past in list(self._events) if past[0] >= time)

    def __len__(self) -> int:
        return len(self._events)
