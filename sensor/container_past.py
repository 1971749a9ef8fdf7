"""What happened to containers in the last while, for subscriptions that look back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .container import Document, Transition

_STEP = 1024  # bytes that a step takes, about, without documents


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a container's life, as it is told."""

    when: int  # CLOCK_MONOTONIC_RAW, ns
    transition: Transition
    lineage: bytes  # Event's field, encoded, of its first process


class Past:
    """The latest steps, as many as there is room for."""

    def __init__(self, room: int) -> None:
        """`room`: bytes."""
        self._room = room
        self._taken = 0
        self._steps: deque[Step] = deque()
        self.since = 0  # nothing older is remembered

    def remember(self, step: Step) -> None:
        """One more; the oldest go."""
        self._steps.append(step)
        self._taken += _size(step)
        while self._taken > self._room:
            oldest = self._steps.popleft()
            self._taken -= _size(oldest)
            self.since = max(self.since, oldest.when)

    def after(self, when: int) -> list[Step]:
        """What is remembered from then on, in the order of time."""
        return sorted((step for step in self._steps if step.when >= when), key=attrgetter("when"))


def _size(step: Step) -> int:
    documents: tuple[Document | None, ...] = (
        step.transition.container.docker_config,
        step.transition.container.oci_config,
    )
    return _STEP + len(step.lineage) + sum(len(one.packed) for one in documents if one is not None)
