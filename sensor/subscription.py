"""From a request to a stream: wants, an output of the engine, a bounded queue for each subscriber.

Subscribers who ask for the same share an output: their events are decoded, encoded and copied once,
and each one's queue holds the same bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from ringside.api import ErrorInfo, Status
from ringside.api.google.protobuf import Any as AnyMessage
from ringside.api.v0 import (
    ContainerFilter,
    GetEventsResponse,
    Subscription,
    ThrottleModifierIntervalType,
)

from .engine import Batch, clock, copy
from .errors import RequestError, RingsideError, UnservableError
from .events import Want
from .events.bulk import attach_all, detach_all

if TYPE_CHECKING:
    from ._perf import CData
    from .sensor import Sensor

log = logging.getLogger(__name__)

FLUSH_AT = 60 << 10  # bytes of a message, which so fits the window that a gRPC client has by default
DOMAIN = "ringside"
_MOST_FILTERS = 4096
_SLICE = 2 * 10**6  # ns of checking filters between two turns for others
_INTERVALS = {
    ThrottleModifierIntervalType.MILLISECOND: 10**6,
    ThrottleModifierIntervalType.SECOND: 10**9,
    ThrottleModifierIntervalType.MINUTE: 60 * 10**9,
    ThrottleModifierIntervalType.HOUR: 3600 * 10**9,
}


class Code(IntEnum):
    """google.rpc.Code, those that are used."""

    OK = 0
    INVALID_ARGUMENT = 3
    FAILED_PRECONDITION = 9
    UNAVAILABLE = 14
    DATA_LOSS = 15


def make_status(code: Code, message: str, reason: str = "", **metadata: object) -> Status:
    """A Status, with one ErrorInfo in its details if a reason is given."""
    details = []
    if reason:
        info = ErrorInfo(
            reason=reason, domain=DOMAIN, metadata={key: str(value) for key, value in metadata.items()}
        )
        details.append(AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=bytes(info)))
    return Status(code=int(code), message=message, details=details)


@dataclass(slots=True)
class Loss:
    """Events that a subscriber did not get: how many, why, and between which times.

    `at_most`: which of the records lost its filter would have let through, nobody knows.
    """

    cause: str
    count: int
    since: int
    until: int
    at_most: bool = False

    def status(self) -> Status:
        """As it is told in the stream."""
        return make_status(
            Code.DATA_LOSS,
            f"{self.count} events lost{' at most' if self.at_most else ''}: {self.cause}",
            "EVENTS_LOST",
            count=self.count,
            cause=self.cause,
            **{"from": self.since, "to": self.until},
            **({"at_most": "true"} if self.at_most else {}),
        )


class Subscriber:
    """One stream's end: what waits to be sent, in order, and bounded.

    Iterating gives encoded GetEventsResponse messages, each with events or with statuses.
    """

    def __init__(self, sensor: Sensor, queue_size: int) -> None:
        self._sensor = sensor
        self._size = queue_size
        self._queue: deque[Batch | Loss | bytes] = deque()
        self._waiting = 0  # bytes in the queue
        self._waiter: asyncio.Future[None] | None = None  # while nothing is there to be taken
        self.send_now: Callable[[CData], bool] | None = None  # an rs_batch past the queue, if it can be
        self._room = asyncio.Event()
        self._ended = False
        self._error: RingsideError | None = None
        self.output: Output | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self.dropped = 0
        self.lost = 0
        self.sent = 0

    # -- filling it --------------------------------------------------------------------------------

    def pass_on(self, batch: CData) -> bool:
        """Send an rs_batch right now; False if that can't be: others are before it, or nobody takes them."""
        if self.send_now is None or self._waiter is None or self._waiter.done() or not self.send_now(batch):
            return False
        self.sent += batch.events  # whoever iterates waits for more, and need not wake up for these
        return True

    def offer(self, batch: Batch) -> None:
        """Events for this subscriber; counted and dropped if too much is waiting already."""
        if self._ended:
            return
        if self._waiting and self._waiting + len(batch.data) > self._size:
            self.dropped += batch.events
            self._sensor.metrics.dropped.inc(batch.events)
            self.report(
                Loss("this subscriber reads too slowly", batch.events, batch.first_time, batch.last_time)
            )
            return
        self._queue.append(batch)
        self._waiting += len(batch.data)
        self._wake()

    def report(self, loss: Loss) -> None:
        """Tell of lost events, in its place in the stream."""
        self.lost += loss.count
        for last in reversed(self._queue):
            if not isinstance(last, Loss):
                self._queue.append(loss)
                break
            if last.cause == loss.cause:  # no more than one of each cause behind the last events
                last.count += loss.count
                last.since = min(last.since, loss.since)
                last.until = max(last.until, loss.until)
                break
        else:
            self._queue.append(loss)
        self._wake()

    def tell(self, *statuses: Status) -> None:
        """A message of statuses."""
        self._queue.append(bytes(GetEventsResponse(statuses=list(statuses))))
        self._wake()

    def end(self, error: RingsideError | None = None) -> None:
        """Nothing more comes; what waits is still delivered, then `error` raised if there is one."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- emptying it -------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._queue:
            if self._ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        item = self._queue.popleft()
        if isinstance(item, Loss):
            return bytes(GetEventsResponse(statuses=[item.status()]))
        if isinstance(item, bytes):
            return item
        self._waiting -= len(item.data)
        self.sent += item.events
        self._room.set()
        return item.data

    async def room(self, ahead: int) -> None:
        """Wait until less than so many bytes are waiting."""
        while self._waiting >= ahead:
            self._room.clear()
            await self._room.wait()

    @property
    def waiting(self) -> int:
        """Bytes of events that wait to be sent."""
        return self._waiting


@dataclass(frozen=True)
class Request:
    """A Subscription, checked: what is wanted, what can't be served, and the modifiers. Times are ns."""

    wants: tuple[Want, ...]
    refused: tuple[tuple[str, UnservableError], ...]
    containers: ContainerFilter | None
    since: int | None
    duration: int | None
    limit: int
    interval: int
    key: tuple[bytes, ...] | None  # equal for requests that can share an output; None if this one can't


class Output:
    """An output of the engine, its wants attached, and the subscribers that share it."""

    def __init__(self, sensor: Sensor, request: Request) -> None:
        self.sensor = sensor
        self.request = request
        self.subscribers: list[Subscriber] = []
        self.number = -1
        self.refused: list[tuple[str, UnservableError]] = list(request.refused)
        self.attached: list[Want] = []
        self.until = 0

    def open(self) -> None:
        """Attach all wants. UnservableError if not one could be."""
        request, engine = self.request, self.sensor.engine
        until = 0
        if request.duration is not None:
            until = max(1, clock() - (request.since or 0) + request.duration)  # 0 would be: without end
        self.until = until
        self.number = engine.open_output(
            FLUSH_AT,
            until=until,
            limit=request.limit,
            interval=request.interval,
            include_self=self.sensor.config.include_self,
        )
        self.sensor.outputs[self.number] = self
        try:
            if request.containers is not None:
                self.sensor.container_family.filter(self, request.containers)
            for want, error in attach_all(request.wants, self.number):
                if error is None:
                    self.attached.append(want)
                else:
                    self.refused.append((want.family, error))
            if not self.attached:
                raise self.refused[0][1]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Detach everything."""
        if self.number >= 0:
            detach_all(self.attached, self.number)
            self.attached.clear()
            self.sensor.engine.close_output(self.number)
            self.sensor.container_family.unfilter(self)
            del self.sensor.outputs[self.number]
            self.number = -1

    def flush(self) -> None:
        """Hand what the engine gathered to the subscribers."""
        engine = self.sensor.engine
        batch = engine.look(self.number)
        if not batch.events:
            return
        left = [one for one in self.subscribers if not one.pass_on(batch)]
        if left:
            kept = copy(batch)
            for one in left:
                one.offer(kept)
        engine.drop(self.number)

    async def room(self, ahead: int) -> None:
        """Wait until every subscriber has less than so many bytes waiting."""
        for subscriber in self.subscribers:
            await subscriber.room(ahead)

    def notes(self) -> list[tuple[str, str]]:
        """Family and what its subscribers should know of how it is served here, each once."""
        notes = ((want.family, getattr(want, "note", "")) for want in self.attached)
        return list(dict.fromkeys(one for one in notes if one[1]))

    @property
    def has_bulk(self) -> bool:
        """True if a full bulk ring loses events of this output."""
        return any(hasattr(want, "event") for want in self.attached)


def _positive(value: int | None, path: str) -> int | None:
    if value is not None and value <= 0:
        raise RequestError(path, f"{value} is not a positive number of nanoseconds")
    return value


async def check_request(sensor: Sensor, subscription: Subscription | None) -> Request:
    """Turn a Subscription into wants, others going on. RequestError names the field that makes no sense."""
    if subscription is None:
        raise RequestError("subscription", "is missing")
    events = subscription.event_filter
    count = 0 if events is None else sum(len(getattr(events, name)) for name in sensor.families)
    if events is None or not count:
        raise RequestError("subscription.event_filter", "is empty: ask for one kind of event at least")
    if count > _MOST_FILTERS:
        raise RequestError("subscription.event_filter", f"{count} filters; the most is {_MOST_FILTERS}")
    since = _positive(subscription.since_duration, "subscription.since_duration")
    duration = _positive(subscription.for_duration, "subscription.for_duration")
    limit, interval = _modifiers(subscription)
    wants: list[Want] = []
    refused: list[tuple[str, UnservableError]] = []
    key: list[bytes] = []
    began = clock()
    for name, make in sensor.families.items():
        key.append(name.encode())
        for at, one in enumerate(getattr(events, name)):
            if clock() - began > _SLICE:
                await asyncio.sleep(0)
                began = clock()
            key.append(bytes(one))
            path = f"subscription.event_filter.{name}[{at}]"
            try:
                wants.extend(make(one, path))
            except UnservableError as error:
                refused.append((path, error))
    containers = subscription.container_filter
    if containers is not None:
        sensor.container_family.check(containers)
    alone = limit or interval or since or duration or any(getattr(want, "private", False) for want in wants)
    key.append(b"" if containers is None else b"only " + bytes(containers))
    shared = None if alone else tuple(key)
    return Request(tuple(wants), tuple(refused), containers, since, duration, limit, interval, shared)


def _modifiers(subscription: Subscription) -> tuple[int, int]:
    modifier = subscription.modifier
    limit = interval = 0
    if modifier is not None and modifier.limit is not None:
        limit = modifier.limit.limit
        if limit <= 0:
            raise RequestError(
                "subscription.modifier.limit.limit", f"{limit} is not a positive number of events"
            )
    if modifier is not None and modifier.throttle is not None:
        throttle = modifier.throttle
        if throttle.interval <= 0:
            raise RequestError(
                "subscription.modifier.throttle.interval", f"{throttle.interval} is not positive"
            )
        if throttle.interval_type not in _INTERVALS:
            raise RequestError(
                "subscription.modifier.throttle.interval_type", "must be MILLISECOND, SECOND, MINUTE or HOUR"
            )
        interval = throttle.interval * _INTERVALS[throttle.interval_type]
        if interval >= 1 << 63:
            raise RequestError("subscription.modifier.throttle.interval", "is longer than 292 years")
    return limit, interval
