"""Ticker and chargen: events that no kernel makes, to try a client with."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ringside.api.v0 import ChargenEvent, ChargenEventFilter, Event, TickerEvent, TickerEventFilter

from .. import wire
from ..engine import clock
from ..errors import RequestError
from . import Mechanism

if TYPE_CHECKING:
    from ..sensor import Sensor
    from ..subscription import Output

TICKER = "ticker"
CHARGEN = "chargen"
_LONGEST = 65536
_CHARACTERS = "".join(map(chr, range(32, 127)))  # RFC 864: the 95 printable ones, in order
_AHEAD = 128 << 10  # bytes of chargen that may wait for the subscriber
_BURST = 64  # events before others have a turn
_REFUSED = 0.01  # s until the next try


@dataclass(eq=False)
class TickerWant:
    """An event each `interval` nanoseconds."""

    sensor: Sensor
    interval: int
    family: str = field(default=TICKER)
    private: bool = field(default=True)  # each subscriber has its own beat
    _task: asyncio.Task[None] | None = None

    def attach(self, output: int) -> int:
        """Start ticking."""
        self._task = self.sensor.spawn(self._run(output), "ticker")
        return 0

    def detach(self, output: int) -> None:  # noqa: ARG002
        """Stop."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self, output: int) -> None:
        loop = asyncio.get_running_loop()
        beat = loop.time()
        while True:
            beat += self.interval / 1e9
            late = loop.time() - beat
            if late > 0:  # skip the beats that were missed, as a clock would
                beat += late // (self.interval / 1e9) * (self.interval / 1e9)
            await asyncio.sleep(max(0.0, beat - loop.time()))
            now = time.time_ns()
            body = wire.encode(TickerEvent, seconds=now // 10**9, nanoseconds=now)
            self.sensor.publish([output], clock(), wire.nest(Event, "ticker", body))


@dataclass(eq=False)
class ChargenWant:
    """Events of `length` characters each, as fast as the subscriber reads."""

    sensor: Sensor
    length: int
    family: str = field(default=CHARGEN)
    private: bool = field(default=True)
    _task: asyncio.Task[None] | None = None

    def attach(self, output: int) -> int:
        """Start generating."""
        self._task = self.sensor.spawn(self._run(self.sensor.output(output)), "chargen")
        return 0

    def detach(self, output: int) -> None:  # noqa: ARG002
        """Stop."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self, output: Output) -> None:
        index = 0
        cycle = _CHARACTERS * (self.length // len(_CHARACTERS) + 2)
        while True:
            await output.room(_AHEAD)
            pause = 0.0
            for _ in range(max(1, min(_BURST, _AHEAD // self.length))):
                at = index % len(_CHARACTERS)
                body = wire.encode(ChargenEvent, index=index, characters=cycle[at : at + self.length])
                if not self.sensor.publish([output.number], clock(), wire.nest(Event, "chargen", body)):
                    pause = max(output.request.interval / 1e9, _REFUSED)  # throttled, or at its end
                    break
                index = (index + self.length) & (1 << 64) - 1
            self.sensor.flush(output)
            await asyncio.sleep(pause)


class DebugFamily:
    """Wants for TickerEventFilter and ChargenEventFilter."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor

    def mechanisms(self) -> list[Mechanism]:
        """They need nothing."""
        return [Mechanism("ticker, chargen", True, "the sensor itself")]

    def ticker(self, request: TickerEventFilter, path: str) -> list[TickerWant]:
        """What a filter asks for. RequestError if it makes no sense."""
        if request.interval <= 0:
            raise RequestError(
                f"{path}.interval", f"{request.interval} is not a positive number of nanoseconds"
            )
        return [TickerWant(self._sensor, request.interval)]

    def chargen(self, request: ChargenEventFilter, path: str) -> list[ChargenWant]:
        """What a filter asks for. RequestError if it makes no sense."""
        if not 1 <= request.length <= _LONGEST:
            raise RequestError(f"{path}.length", f"{request.length} is not from 1 to {_LONGEST}")
        return [ChargenWant(self._sensor, request.length)]
