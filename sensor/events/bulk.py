"""Kernel events whose records C turns into API events: one per tracepoint or probe, whoever wants it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ringside.api.v0 import Event

from .._perf import lib
from ..bpf_filter import MOST_PREDICATES
from ..engine import Engine, Route, clock
from ..errors import KernelError, SetupError, UnservableError
from ..expression import TRUE
from ..expression import any_of as any_of_expressions
from ..perf import KernelEvent, Lane, ProgramEvent, Rings
from ..plan import Kernel, Table, compile_plan
from ..program import Test, compile_program, fields_of, split
from ..tracefs.filter import ALWAYS, MAX_FILTER_TEXT, CannotSay, Filter, all_of, any_of
from ..tracefs.format import Format
from . import Want

if TYPE_CHECKING:
    from ..bpf import Attachment
    from ..expression import Expression
    from ..program import Fields

log = logging.getLogger(__name__)
_MOST_FILTERS = MAX_FILTER_TEXT // len("a == 1 ||")  # that different, no more can be said together


class BulkEvent:
    """A kernel event shared by all who want it. Open while anybody does.

    The kernel's filter is the OR of what is wanted, so that a record nobody wants is not even written;
    who gets a record is decided in C, by key and tests, and so does not depend on the kernel's filter.
    """

    def __init__(
        self,
        rings: Rings,
        record: Format,
        event_id: int,
        table: Table,
        *,
        key: str | None = None,
        exclude: Filter = ALWAYS,
        flags: int = 0,
        fields: Fields | None = None,
        fixed_filter: str | None = None,
        programs: Callable[[Expression, bool], Sequence[Attachment]] | None = None,
    ) -> None:
        key_field = record[key] if key else None
        self.name = record.name
        self.record = record
        self.fields = fields_of(record) if fields is None else fields
        self._fixed_filter = fixed_filter
        self.engine: Engine = rings.engine
        self._exclude = self._exclude_self = exclude
        self.constants: dict[str, int] = {}  # fields that this event has not, but whose value is known
        self._wants: list[tuple[int, BulkWant]] = []
        self._resting = False
        self._plan = compile_plan(Event, table, record)
        fetches = self._plan.fetches
        self.source = self.engine.open_source(
            flags | (lib.RS_FETCHED if fetches else 0),
            self._plan,
            key_field.offset if key_field else 0,
            key_field.size if key_field else 0,
        )
        self._conditions: dict[str | None, tuple[Expression, bool]] = {}
        self.kernel = KernelEvent(
            rings,
            record.name,
            event_id,
            self.source,
            Lane.PROMPT if fetches else Lane.BULK,
            fetches=fetches,
            first_argument=bool(flags & lib.RS_BEHIND),
        )
        self._programs = programs
        if programs is not None:
            self.kernel = ProgramEvent(
                rings, record.name, lambda text: programs(*self._conditions[text]), self.source, Lane.BULK
            )
        self.kernel.outputs = lambda: self.outputs

    def prepare(self, want: BulkWant) -> None:
        """Do beforehand what opening it with this want takes."""
        if self._resting:  # perhaps for ever
            return
        _ = want.tests
        if self._programs is None and self._fixed_filter is None:
            _ = want.filter

    def include_self(self, on: bool) -> None:
        """While a rung proves itself, the sensor's own records pass the kernel's filter."""
        self._exclude = ALWAYS if on else self._exclude_self

    @property
    def is_wanted(self) -> bool:
        """True while somebody wants its records."""
        return bool(self._wants)

    @property
    def outputs(self) -> list[int]:
        """The outputs that want its records."""
        return [output for output, _ in self._wants]

    def close(self) -> None:
        """Give up the source; nobody wants it any more."""
        self.kernel.close()
        self.kernel.rings.later(lambda: self.engine.close_source(self.source))

    def add(self, output: int, *wants: BulkWant) -> int:
        """More wants; from which time on their records come."""
        before = list(self._wants)
        self._wants.extend((output, want) for want in wants)
        try:
            since = self._apply()
            self._reroute()
            return since
        except BaseException:
            self._wants = before
            self._reroute()
            raise

    def remove(self, output: int, *wants: BulkWant) -> None:
        """Some wants less; narrows the kernel's filter, or closes the event if they were the last."""
        gone = {(output, want) for want in wants}
        if gone.isdisjoint(self._wants):
            return
        self._wants = [one for one in self._wants if one not in gone]
        self._reroute()
        try:
            self._apply()
        except UnservableError as error:  # the wider filter stays in force; C goes on deciding
            log.warning("%s: could not narrow the filter: %s", self.name, error)

    def rest(self, on: bool) -> None:
        """While this is on, it is closed, whoever wants it."""
        if on == self._resting:
            return
        self._resting = on
        self._reroute()
        try:
            self._apply()
        except (UnservableError, KernelError, SetupError) as error:
            log.warning("%s: could not change the filter: %s", self.name, error)

    def _apply(self) -> int:
        if not self._wants or self._resting:
            self.kernel.close()
            return clock()
        try:
            return self.kernel.open(self.filter())
        except UnservableError as error:
            if self._programs is None:
                raise
            log.warning("%s: all of it instead of what is wanted: %s", self.name, error)
            return self.kernel.open(self._condition(TRUE))

    def filter(self) -> str | None:
        """The kernel's filter for all wants together; None if every record is wanted."""
        if self._fixed_filter is not None:
            return self._fixed_filter
        if self._programs is not None:
            asked = {want.expression: None for _, want in self._wants}
            return self._condition(TRUE if len(asked) > MOST_PREDICATES else any_of_expressions(asked))
        filters = {want.filter for _, want in self._wants}
        wanted = ALWAYS if len(filters) > _MOST_FILTERS else any_of(filters)
        for said in (all_of([self._exclude, wanted]), self._exclude):
            with suppress(CannotSay):  # too long: C decides alone
                return said.text or None
        return None

    def _condition(self, wanted: Expression) -> str | None:
        """The same for programs, which are told by this text what to let pass."""
        everybodys = self._exclude == ALWAYS
        text = (
            None if wanted == TRUE and not everybodys else f"{wanted}{' of everybody' if everybodys else ''}"
        )
        self._conditions = {text: (wanted, everybodys)}
        return text

    def _reroute(self) -> None:
        wants = [] if self._resting else self._wants
        self.engine.route(self.source, [Route(output, want.key, want.tests) for output, want in wants])


@dataclass(frozen=True, eq=False)
class BulkWant:
    """Records of a bulk event: those the kernel's `filter` passes and, in C, `key` and `tests` accept.

    What the filter and the tests are made of: `expression`, over `fields`, and what C has to decide of it,
    `tested`. Both are made when they are needed first: of an event that rests they never may be.
    """

    family: str
    event: BulkEvent
    key: int | None = None
    note: str = ""  # what the subscriber should know of how it is served
    expression: Expression = TRUE
    tested: Expression = TRUE
    fields: Fields = field(default_factory=dict)

    @cached_property
    def filter(self) -> Filter:
        """The kernel's; it may let more through than the tests do, never less."""
        return split(self.expression, self.fields).kernel

    @cached_property
    def tests(self) -> tuple[Test, ...]:
        """C's."""
        return compile_program(self.tested, self.fields)

    @classmethod
    def of(
        cls,
        family: str,
        event: BulkEvent,
        expression: Expression,
        *,
        key: int | None = None,
        tested: Expression | None = None,
        note: str = "",
        fields: Fields | None = None,
    ) -> BulkWant:
        """Records that an expression accepts, as far as the kernel can say it decided there.

        `tested` is what C has to decide for itself, all of it if not given (a key decides some). `fields`
        are those of the records with this key, if they differ from key to key.
        """
        known = event.fields if fields is None else fields
        want = cls(family, event, key, note, expression, expression if tested is None else tested, known)
        event.prepare(want)
        return want

    def attach(self, output: int) -> int:
        """Have the event's records come to the output."""
        return self.event.add(output, self)

    def detach(self, output: int) -> None:
        """No more."""
        self.event.remove(output, self)


def attach_all(wants: Sequence[Want], output: int) -> Iterator[tuple[Want, UnservableError | None]]:
    """Attach them, those of one event at once: each step changes its filter. With what was refused."""
    for event, group in _by_event(wants):
        try:
            if event is None:
                group[0].attach(output)
            else:
                event.add(output, *group)
        except UnservableError as error:
            yield from ((want, error) for want in group)
        else:
            yield from ((want, None) for want in group)


def detach_all(wants: Sequence[Want], output: int) -> None:
    """Detach them, those of one kernel event at once."""
    for event, group in _by_event(wants):
        if event is None:
            group[0].detach(output)
        else:
            event.remove(output, *group)


def _by_event(wants: Sequence[Want]) -> list[tuple[Any, list[Any]]]:
    groups: dict[object, tuple[Any, list[Any]]] = {}
    for want in wants:
        event = getattr(want, "event", None)
        groups.setdefault(want if event is None else event, (event, []))[1].append(want)
    return list(groups.values())


def foreign_flag() -> int:
    """For records whose numbers are those of 32-bit programs, and only theirs."""
    flag: int = lib.RS_ALIEN
    return flag


def native_flag() -> int:
    """For records whose numbers mean something else when a 32-bit program made them."""
    flag: int = lib.RS_NATIVE
    return flag


__all__ = ["BulkEvent", "BulkWant", "Kernel", "native_flag"]
