"""What happened to containers in the last while, for subscriptions that look back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .container import Container, Transition

_STEP = 1024  # bytes that a step takes, about, without documents


@dataclass(slots=True)
class Step:
    """A step of a container's life, as it is told."""

    when: int  # CLOCK_MONOTONIC_RAW, ns
    transition: Transition
    lineage: bytes  # Event's field, encoded, of its first process


class Past:
    """The latest steps, as many as there is room for; the documents of the latest among them."""

    def __init__(self, room: int) -> None:
        """`room`: bytes, of steps, and of documents as they are told."""
        self._most = room // _STEP
        self._room = room
        self._documents = 0
        self._steps: deque[Step] = deque()
        self._full: deque[Step] = deque()  # those with documents
        # how many steps of it, and what was known at the last
        self._containers: dict[str, tuple[int, Container]] = {}
        self.since = 0  # nothing older is remembered

    def __contains__(self, container_id: str) -> bool:
        return container_id in self._containers

    def container(self, container_id: str) -> Container | None:
        """What was known of a container when its last step was told."""
        return self._containers[container_id][1] if container_id in self._containers else None

    def remember(self, step: Step) -> list[str]:
        """One more. The oldest go; the containers of which nothing is remembered any more."""
        container = step.transition.container
        self._steps.append(step)
        count, _ = self._containers.get(container.id, (0, None))
        self._containers[container.id] = (count + 1, _bare(container))
        if size := _documents(container):
            self._full.append(step)
            self._documents += size
        while self._documents > self._room:
            self._strip(self._full.popleft())
        gone = []
        while len(self._steps) > self._most:
            oldest = self._steps.popleft()
            self.since = max(self.since, oldest.when)
            if self._full and self._full[0] is oldest:
                self._strip(self._full.popleft())
            name = oldest.transition.container.id
            count, last = self._containers.pop(name)
            if count > 1:
                self._containers[name] = (count - 1, last)
            else:
                gone.append(name)
        return gone

    def after(self, when: int) -> list[Step]:
        """What is remembered from then on, in the order of time."""
        return sorted((step for step in self._steps if step.when >= when), key=attrgetter("when"))

    def _strip(self, step: Step) -> None:
        self._documents -= _documents(step.transition.container)
        step.transition = replace(step.transition, container=_bare(step.transition.container))


def _documents(container: Container) -> int:
    documents = (container.docker_config, container.oci_config)
    return sum(one.length for one in documents if one is not None)


def _bare(container: Container) -> Container:
    return replace(container, docker_config=None, oci_config=None)
