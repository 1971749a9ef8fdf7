"""A stream of the sensor in this process, for live tests: what comes is kept, and can be waited for."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from ringside.api import ErrorInfo, Status
from ringside.api.descriptors import message_class
from ringside.api.v0 import Event, EventFilter, Subscription
from ringside.sensor._perf import lib
from ringside.sensor.bpf import MapType
from ringside.sensor.btf import VMLINUX
from ringside.sensor.config import Config
from ringside.sensor.sensor import Sensor
from ringside.sensor.subscription import Subscriber

RESPONSE = message_class("capsule8.api.v0.GetEventsResponse")
LIBC = ctypes.CDLL(None, use_errno=True)
TRACEFS = Path("/sys/kernel/tracing")
RUNGS = ("kprobe", "program", "memory")
PATIENCE = float(os.environ.get("RINGSIDE_PATIENCE", "30"))  # s; emulated kernels are slow
Told = Callable[[str, object], None]  # pytest's record_property


class Stream:
    """What a subscriber got so far."""

    def __init__(self, subscriber: Subscriber, wanted: Callable[[Any], bool]) -> None:
        self._subscriber = subscriber
        self._wanted = wanted
        self.events: list[Event] = []
        self.statuses: list[Status] = []
        self._seen = 0

    async def more(self) -> None:
        """Take one more message."""
        message = RESPONSE.FromString(await anext(self._subscriber))
        for one in message.events:  # a busy machine's events are many, and dataclasses are slow
            if self._wanted(one.event):
                self.events.append(Event.parse(one.event.SerializeToString()))
        self.statuses += [Status.parse(one.SerializeToString()) for one in message.statuses]

    async def until(self, wanted: Callable[[Event], object]) -> list[Event]:
        """All events since the last time, up to the first that is wanted, which is the last."""
        start = at = self._seen
        try:
            async with asyncio.timeout(PATIENCE):  # for all: some event always comes
                while True:
                    while at < len(self.events):
                        at += 1
                        if wanted(self.events[at - 1]):
                            self._seen = at
                            return self.events[start:at]
                    await self.more()
        except TimeoutError:
            pytest.fail(f"did not come; but {self.events[start:]}, {self.statuses}")

    async def status(self, reason: str) -> dict[str, str]:
        """The metadata of the next status of this reason."""
        async with asyncio.timeout(PATIENCE):
            while True:
                while self.statuses:
                    for detail in self.statuses.pop(0).details:
                        info = detail.unpack()
                        if isinstance(info, ErrorInfo) and info.reason == reason:
                            return info.metadata
                await self.more()


@asynccontextmanager
async def watching(
    sensor: Sensor,
    keep: Callable[[Any], bool] = lambda event: event.process_pid == os.getpid(),
    **filters: object,
) -> AsyncIterator[Stream]:
    """A subscription to these filters, live. Only what to `keep` stays, by default our own."""
    wanted = EventFilter(**filters)  # type: ignore[arg-type]
    async with sensor.subscribe(Subscription(event_filter=wanted)) as subscriber:
        stream = Stream(subscriber, keep)
        await stream.more()
        yield stream


def own_sensor(mechanism: str = "auto") -> Sensor:
    """A sensor that sees this process too, where the tests cause their events."""
    return Sensor(Config(mechanism=mechanism, include_self=True, engine="none"))


def has_kprobes() -> bool:
    return (TRACEFS / "kprobe_events").exists()


def takes_maps() -> bool:
    """True if the kernel lets us make bpf maps."""
    made = lib.rs_bpf_map(MapType.ARRAY, 4, 8, 1)
    if made < 0:
        return False
    os.close(made)
    return True


def takes_programs() -> bool:
    """The same, and it tells of its types."""
    return takes_maps() and VMLINUX.exists()


def write_tracefs(name: str, line: str) -> None:
    """Append a line to a file of tracefs."""
    fd = os.open(TRACEFS / name, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)


THERE: dict[str, tuple[Callable[[], bool], str]] = {
    "kprobe": (has_kprobes, "tracefs has no kprobe_events"),
    "program": (takes_maps, "bpf(2) makes no maps"),
    "memory": (lambda: True, ""),
}


def is_missing(rung: str, told: Told) -> bool:
    """True, and told, if this kernel has not what a rung needs, by the kernel's own word."""
    there, why = THERE[rung]
    if there():
        return False
    told("not_there", why)
    return True


def probes() -> str:
    """All probes that the kernel has."""
    return "".join(
        (TRACEFS / name).read_text()
        for name in ("dynamic_events", "kprobe_events")
        if (TRACEFS / name).exists()
    )
