"""Event families, one module each: which kernel events serve it on this kernel, how their fields map.

A family turns the filters of a request into wants. A want, attached to an output of the engine, makes
the events it asks for arrive there, and detached, no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Want(Protocol):
    """Something a subscriber wants. Attaching may raise UnservableError."""

    @property
    def family(self) -> str:
        """The event family, for messages: "system calls", "processes"."""

    def attach(self, output: int) -> int:
        """Begin; the time from which on nothing is missed (CLOCK_MONOTONIC_RAW ns)."""

    def detach(self, output: int) -> None:
        """End."""


class Family(Protocol):
    """An event family."""

    def mechanisms(self) -> list[Mechanism]:
        """How it is served on this kernel, with these privileges."""


@dataclass(frozen=True, slots=True)
class Mechanism:
    """One row of `ringside check`: how an event family is served here, or why not."""

    family: str
    served: bool
    mechanism: str
    note: str = ""
    hint: str = ""
