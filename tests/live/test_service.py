"""The service with a sensor on the real kernel, and whatever may be sent to it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringside.api.v0 import EventFilter, Subscription, SyscallEventFilter, SyscallEventType
from ringside.sensor.config import Config
from ringside.sensor.sensor import Sensor

from ..support.peer import Peer, framed, see, send
from ..support.requests import encoded, frames
from ..support.served import Served, listening
from ..support.stream import probes

pytestmark = pytest.mark.live

# landlock_create_ruleset(attr, 0, 0) fails, whatever the address
CALL = 444
CALLER = f"""
import ctypes, sys
for line in sys.stdin:
    ctypes.CDLL(None).syscall({CALL}, ctypes.c_ulong(int(line)), 0, 0)
"""
NUMBERS = itertools.count(1)


@contextmanager
def caller() -> Iterator[IO[str]]:
    """A program that makes the system call, with the argument it is told."""
    with subprocess.Popen([sys.executable, "-c", CALLER], stdin=subprocess.PIPE, text=True) as program:
        assert program.stdin is not None
        yield program.stdin
        program.stdin.close()


@contextmanager
def served_here(folder: Path) -> Iterator[Served]:
    """The real sensor, served in a loop that lasts from one example to the next."""
    path = folder / "socket"
    with asyncio.Runner() as runner:
        sensor = Sensor(Config(engine="none"))
        runner.run(sensor.__aenter__())
        server = listening(sensor, path)
        runner.run(server.__aenter__())
        served = Served(sensor, str(path))
        served.runner = runner
        try:
            yield served
        finally:
            runner.run(server.__aexit__(None, None, None))
            runner.run(sensor.close())


def test_whatever_is_sent_others_are_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = EventFilter(syscall_events=[SyscallEventFilter(type=SyscallEventType.ENTER, id=CALL)])
    before = probes()
    with caller() as program, served_here(tmp_path) as served:
        peer = served.run(Peer.connect(served.path))
        watcher = served.run(peer.call(framed(encoded(Subscription(event_filter=wanted)))).answer())
        served.before = served.there()

        async def then(pieces: list[bytes], end: bool) -> None:
            await send(peer, pieces, end=end)
            number = next(NUMBERS)
            print(number, file=program, flush=True)
            await see(watcher, number)
            await served.settled()

        @settings(max_examples=50)
        @given(frames(), st.booleans())
        def check(pieces: list[bytes], end: bool) -> None:
            served.run(then(pieces, end))

        try:
            check()
        finally:
            served.run(peer.close())
    assert probes() == before
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]
