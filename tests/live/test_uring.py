"""What is opened and called through io_uring is told as if by a system call, on each rung."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ringside.api.v0 import Event, FileEventType, NetworkEventFilter, NetworkEventType
from ringside.sensor.events.uring import Opcode
from ringside.sensor.expression import parse, to_message
from ringside.sensor.sensor import Sensor

from ..support.stream import TRACEFS, Stream, Told, is_missing, own_sensor, takes_programs, watching
from ..support.uring import (
    ASYNC,
    DATAGRAM,
    FIXED_FILE,
    KEPT,
    LINK,
    LOCAL,
    SQPOLL,
    STREAM,
    Requester,
    running,
)
from .test_files import O_LARGEFILE, opened
from .test_network import ADDRESSES, ATTEMPTS, IPV4, RESULTS, told_address

T = NetworkEventType
WRITE = os.O_CREAT | os.O_WRONLY
AT_FDCWD = -100
END = "/ringside-test/end"
RUNGS = ("auto", "program", "kprobe")
SERVED = {"file opens by io_uring", "network attempts by io_uring"}


def has_symbol(name: str) -> bool:
    return any(line.split()[2] == name for line in Path("/proc/kallsyms").read_text().splitlines())


def is_not_there(rung: str, symbol: str, told: Told) -> bool:
    if rung == "auto":
        return False
    if is_missing(rung, told):
        return True
    if rung == "kprobe" and not has_symbol(symbol):
        told("not_there", f"the kernel has no function {symbol}")
        return True
    return False


def by(program: Requester) -> Callable[[Any], bool]:
    return lambda event: event.process_pid == program.pid


def open_(
    program: Requester, name: str, flags: int = 0, mode: int = 0, *, two: bool = False, how: int = 0
) -> tuple[str, int, int]:
    """A request to open it, and what it must be told as."""
    kept = program.keep(name.encode() + b"\0")
    if two:
        asked = program.keep(struct.pack("=QQQ", flags, mode, 0))
        program.request(Opcode.OPENAT2, AT_FDCWD, kept, asked, length=24, flags=how)
    else:
        program.request(Opcode.OPENAT, AT_FDCWD, kept, length=mode, how=flags, flags=how)
    return name, flags, mode


def told(event: Event) -> tuple[str, int, int]:
    assert event.file is not None
    return event.file.filename, event.file.open_flags & ~O_LARGEFILE, event.file.open_mode


async def opens(stream: Stream, program: Requester) -> list[tuple[str, int, int]]:
    """Make the requests; filename, flags and mode of what is told."""
    open_(program, END)
    assert {-one for one in program.run()} <= {errno.ENOENT, errno.ECANCELED}
    events = await stream.until(lambda event: event.file is not None and event.file.filename == END)
    return [told(event) for event in events[:-1]]


@pytest.mark.parametrize("setup", [0, SQPOLL], ids=["submitted", "polled"])
@pytest.mark.parametrize("rung", RUNGS)
async def test_opens(rung: str, setup: int, uring: Path, record_property: Told) -> None:
    """Each once, whether it goes at once, by a worker or behind another, by whoever submits it."""
    if is_not_there(rung, "__io_openat_prep", record_property):
        return
    long = "/ringside-test/none/" + "y/" * 2037 + "z"  # 4,095 bytes
    with running(uring, setup) as program:

        def make() -> list[tuple[str, int, int]]:
            return [
                open_(program, "/ringside-test/none/at", os.O_RDWR | os.O_CLOEXEC),
                open_(program, "/ringside-test/none/created", WRITE | os.O_EXCL, 0o4751),
                open_(program, "/ringside-test/none/at2", WRITE | os.O_APPEND, 0o640, two=True),
                open_(program, "/ringside-test/none/aside", os.O_DIRECTORY, how=ASYNC),
                open_(program, "/ringside-test/none/aside2", WRITE | os.O_TRUNC, 0o600, two=True, how=ASYNC),
                open_(program, "/ringside-test/none/first", how=LINK),
                open_(program, "/ringside-test/none/second", os.O_NOFOLLOW, how=LINK),
                open_(program, "/ringside-test/none/third"),
                open_(program, long),
                open_(program, "relative/ringside \"odd'\n"),
            ]

        async with own_sensor(rung) as sensor:
            async with watching(sensor, by(program), file_events=[opened()]) as stream:
                expected = make()
                assert await opens(stream, program) == expected
            end = opened(filename=END)
            for asked, which in (
                (opened(filename="/ringside-test/none/at"), [0]),
                (opened(filename_pattern="*/none/a*"), [0, 2, 3, 4]),
                (opened(open_flags_mask=os.O_TRUNC | os.O_APPEND), [2, 4]),
                (opened(create_mode_mask=0o4000), [1]),
            ):
                async with watching(sensor, by(program), file_events=[asked, end]) as stream:
                    make()
                    assert await opens(stream, program) == [expected[at] for at in which], asked


Called = tuple[NetworkEventType, int, object, int]  # type, descriptor, address, backlog
FILTERS: Sequence[tuple[NetworkEventType, str, Callable[[Called], bool]]] = (
    (T.CONNECT_ATTEMPT, "sin_port == 40443", lambda one: one[2] == ADDRESSES[0][1]),
    (T.CONNECT_ATTEMPT, "sin6_addr == fd00::abcd", lambda one: one[2] == ADDRESSES[1][1]),
    (T.SENDTO_ATTEMPT, "sun_path ~ '@ring*' && fd == 102", lambda one: str(one[2]).startswith("@ring")),
    (T.SENDTO_ATTEMPT, "fd > 1000000", lambda _: False),
    (T.CONNECT_ATTEMPT, "fd < 3", lambda _: False),  # the number of a file that the ring keeps is none
    (T.ACCEPT_ATTEMPT, "fd == 101", lambda _: True),
)


async def calls(stream: Stream, program: Requester) -> list[Called]:
    """Make the requests; what is told of them."""
    program.run()
    open_(program, END)
    program.run()
    events = await stream.until(lambda event: event.file is not None and event.file.filename == END)
    networks = [event.network for event in events if event.network is not None]
    return [(one.type, one.sockfd, told_address(one.address), one.backlog) for one in networks]


@pytest.mark.parametrize("rung", RUNGS)
async def test_attempts(rung: str, uring: Path, record_property: Told) -> None:
    """Each with each kind of address, and with filters."""
    if is_not_there(rung, "io_connect_prep", record_property):
        return
    names = [NetworkEventFilter(type=kind) for kind in ATTEMPTS]
    end = opened(filename=END)
    with running(uring) as program:
        binds = has_symbol("io_bind_prep")
        sends_to = has_symbol("io_send_zc_prep")

        def make() -> list[Called]:
            made: list[Called] = []
            for address, told in ADDRESSES:
                kept, length = program.keep(address), len(address)
                program.request(Opcode.CONNECT, LOCAL, kept, length)
                made.append((T.CONNECT_ATTEMPT, LOCAL, told, 0))
                program.request(Opcode.SENDMSG, DATAGRAM, program.message(address))
                made.append((T.SENDTO_ATTEMPT, DATAGRAM, told, 0))
                if binds:
                    program.request(Opcode.BIND, DATAGRAM, kept, length)
                    made.append((T.BIND_ATTEMPT, DATAGRAM, told, 0))
                if sends_to:
                    program.request(
                        Opcode.SEND, DATAGRAM, program.keep(b"x"), kept, length=1, address_length=length
                    )
                    made.append((T.SENDTO_ATTEMPT, DATAGRAM, told, 0))
            program.request(Opcode.SENDMSG, DATAGRAM, program.message(b""))
            program.request(Opcode.SEND, DATAGRAM, program.keep(b"x"), length=1)
            made += [(T.SENDTO_ATTEMPT, DATAGRAM, "-", 0)] * 2
            program.request(Opcode.CONNECT, KEPT, program.keep(IPV4), len(IPV4), flags=FIXED_FILE)
            made.append((T.CONNECT_ATTEMPT, 0, ADDRESSES[0][1], 0))
            program.request(Opcode.ACCEPT, LOCAL)
            program.request(Opcode.RECV, LOCAL, program.keep(b"x"), length=1)
            program.request(Opcode.RECVMSG, LOCAL, program.message(b""))
            made.append((T.ACCEPT_ATTEMPT, LOCAL, "-", 0))
            made += [(T.RECVFROM_ATTEMPT, LOCAL, "-", 0)] * 2
            if binds:
                program.request(Opcode.LISTEN, STREAM, length=77)
                made.append((T.LISTEN_ATTEMPT, STREAM, "-", 77))
            return made

        async with own_sensor(rung) as sensor:
            async with watching(sensor, by(program), network_events=names, file_events=[end]) as stream:
                expected = make()
                assert await calls(stream, program) == expected
            for kind, text, which in FILTERS:
                asked = NetworkEventFilter(type=kind, filter=to_message(parse(text)))
                async with watching(sensor, by(program), network_events=[asked], file_events=[end]) as stream:
                    make()
                    wanted = [one for one in expected if one[0] is kind and which(one)]
                    assert await calls(stream, program) == wanted, text


async def notes(sensor: Sensor, **filters: object) -> list[str]:
    """What a subscriber is told that may be missing."""
    async with watching(sensor, **filters) as stream:  # type: ignore[arg-type]
        return [status.message for status in stream.statuses if status.code]


def tells_requests() -> bool:
    """True if the kernel's completions tell of which request."""
    return takes_programs() and "req;" in (TRACEFS / "events/io_uring/io_uring_complete/format").read_text()


async def test_results(uring: Path) -> None:
    """As requests end; where that can't be told it is said."""
    names = [NetworkEventFilter(type=kind) for kind in RESULTS]
    async with own_sensor() as sensor:
        said = await notes(sensor, network_events=names)
        assert bool(said) != tells_requests()
        if said:
            assert "network results by io_uring: not seen" in said[0]
            return
        with running(uring) as program:

            def make() -> None:
                program.request(Opcode.CONNECT, LOCAL, program.keep(b"\1\0\0none"), 7, flags=LINK)
                program.request(Opcode.CONNECT, LOCAL, program.keep(IPV4), len(IPV4))
                program.request(Opcode.SEND, STREAM, program.keep(b"x"), length=1, flags=ASYNC)
                program.request(Opcode.RECVMSG, STREAM, program.message(b""))
                program.request(Opcode.ACCEPT, LOCAL)

            async with watching(sensor, by(program), network_events=names, file_events=[opened()]) as stream:
                make()
                results = program.run()
                kinds = [T.CONNECT_RESULT] * 2 + [T.SENDTO_RESULT, T.RECVFROM_RESULT, T.ACCEPT_RESULT]
                open_(program, END)
                program.run()
                events = await stream.until(
                    lambda event: event.file is not None and event.file.filename == END
                )
            told = sorted((one.network.type, one.network.result) for one in events if one.network)
            assert told == sorted(zip(kinds, results, strict=True))
            refused = NetworkEventFilter(
                type=T.CONNECT_RESULT, filter=to_message(parse(f"ret == {-errno.ECONNREFUSED}"))
            )
            async with watching(
                sensor, by(program), network_events=[refused], file_events=[opened(filename=END)]
            ) as stream:
                make()
                program.run()
                open_(program, END)
                program.run()
                events = await stream.until(lambda event: event.file is not None)
            assert [one.network.result for one in events if one.network] == [-errno.ECONNREFUSED]


async def test_without_programs_and_probes(uring: Path) -> None:
    """It is told that something was opened and called, and that more can't be."""
    names = [NetworkEventFilter(type=T.CONNECT_ATTEMPT)]
    async with own_sensor("memory") as sensor:
        rows = {row.family: row for row in sensor.mechanisms()}
        assert all(rows[name].served and rows[name].note for name in SERVED)
        said = await notes(sensor, file_events=[opened()], network_events=names)
        assert all(any(name in one for one in said) for name in SERVED)
        with running(uring) as program:
            async with watching(sensor, by(program), file_events=[opened()], network_events=names) as stream:
                open_(program, "/ringside-test/none")
                program.request(Opcode.CONNECT, LOCAL, program.keep(IPV4), len(IPV4))
                program.run()
                *_, opening, connect = await stream.until(lambda event: event.network is not None)
                assert opening.file is not None
                assert opening.file.type is FileEventType.OPEN
                assert told(opening) == ("", 0, 0)
                assert connect.network is not None
                assert connect.network.address is None


async def test_where_the_sensor_may_have_no_ring(uring: Path) -> None:
    """Others may: the way is taken that can be set up, though it can't be tried."""
    with mock.patch("ringside.sensor.events.uring.make_request", return_value=False):
        async with own_sensor() as sensor:
            with running(uring) as program:
                async with watching(sensor, by(program), file_events=[opened()]) as stream:
                    expected = [open_(program, "/ringside-test/none/untried")]
                    assert await opens(stream, program) == expected


async def test_a_kernel_without_it_is_not_blamed() -> None:
    """Each row of `ringside check` that is about io_uring is served, or there is none."""
    async with own_sensor() as sensor:
        rows = {row.family for row in sensor.mechanisms() if "io_uring" in row.family}
    assert rows == (SERVED if (TRACEFS / "events/io_uring").exists() else set())


async def test_who_stays_misses_nothing(uring: Path) -> None:
    """While others come and go, and what the kernel lets pass changes."""
    async with own_sensor() as sensor:
        with running(uring) as program:
            steady = opened(filename_pattern="/ringside-test/steady/*")
            async with watching(sensor, by(program), file_events=[steady, opened(filename=END)]) as stream:
                expected = []
                for other in range(20):
                    expected.append(open_(program, f"/ringside-test/steady/{other}"))
                    program.run()
                    async with watching(sensor, file_events=[opened(filename=f"/ringside-test/{other}")]):
                        expected.append(open_(program, f"/ringside-test/steady/{other}+"))
                        program.run()
                assert await opens(stream, program) == expected
