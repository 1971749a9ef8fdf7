"""32-bit programs: what they open and whom they call is told as of any other, on each rung."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import struct
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from ringside.api.v0 import Event, FileEventFilter, FileEventType, NetworkEventFilter, NetworkEventType
from ringside.sensor.expression import parse, to_message

from ..support.foreign import Caller32, is_run, running
from ..support.program import At
from ..support.stream import LIBC, PATIENCE, RUNGS, Stream, Told, is_missing, own_sensor, watching
from .test_files import O_LARGEFILE
from .test_network import ADDRESSES, ATTEMPTS, RESULTS, told_address

T = NetworkEventType
OPEN, CREAT, OPENAT, OPENAT2 = 5, 8, 295, 437
SOCKET, SOCKETCALL, BIND, CONNECT, LISTEN, ACCEPT4 = 359, 102, 361, 362, 363, 364
SENDTO, SENDMSG, RECVFROM, RECVMSG = 369, 370, 371, 372
THROUGH = {
    "bind": 2,
    "connect": 3,
    "listen": 4,
    "accept": 5,
    "send": 9,
    "recv": 10,
    "sendto": 11,
    "recvfrom": 12,
    "sendmsg": 16,
    "recvmsg": 17,
    "accept4": 18,
}
WRITE = os.O_CREAT | os.O_WRONLY
END = 987_654_321  # no file descriptor, but a number that comes back


def is_not_there(rung: str, program: Path, told: Told) -> bool:
    if is_missing(rung, told):
        return True
    if is_run(program):
        return False
    told("not_there", "the kernel runs no 32-bit programs")
    return True


def by(caller: Caller32) -> Callable[[Any], bool]:
    """Events of this program, and of this test."""
    return lambda event: event.process_pid in (caller.pid, os.getpid())


def opened(**more: object) -> FileEventFilter:
    return FileEventFilter(type=FileEventType.OPEN, **more)  # type: ignore[arg-type]


async def opens(stream: Stream, caller: Caller32) -> list[tuple[str, int, int]]:
    """Filename, flags and mode of what the program opens, as it is told to now."""
    caller.call(OPEN, caller.keep(b"/ringside-test/end\0"))
    results = caller.run()
    assert {-one for one in results} <= {errno.ENOENT, errno.EFAULT, errno.ENAMETOOLONG}
    events = await stream.until(lambda event: event.file is not None and event.file.filename.endswith("/end"))
    told = []
    for event in events[:-1]:
        assert event.file is not None
        if event.process_pid == caller.pid:
            told.append((event.file.filename, event.file.open_flags & ~O_LARGEFILE, event.file.open_mode))
        else:  # the sensor reads of /proc, but its numbers mean something else: no call of ours below is told
            assert event.file.open_flags & os.O_CLOEXEC, event
    return told


@pytest.mark.parametrize("rung", RUNGS)
async def test_opens(rung: str, program32: Path, record_property: Told) -> None:
    """Each call, by name and by what it asks for; and not what has the same number in 64-bit programs."""
    if is_not_there(rung, program32, record_property):
        return
    with running(program32) as caller:
        name = {at: f"/ringside-test/none/{at}".encode() for at in ("open", "creat", "at", "at2")}
        long = b"/ringside-test/none/" + b"y/" * 2037 + b"z"  # 4,095 bytes
        expected = [
            (name["open"].decode(), os.O_RDWR | os.O_CLOEXEC, 0),
            (name["open"].decode(), WRITE | os.O_EXCL, 0o4751),
            (name["creat"].decode(), WRITE | os.O_TRUNC, 0o640),
            (name["at"].decode(), WRITE | os.O_APPEND, 0o600),
            (name["at2"].decode(), WRITE | os.O_NONBLOCK, 0o1777),
            (long.decode(), os.O_DIRECTORY, 0),
            ("", os.O_NOFOLLOW, 0),
            ("", os.O_NOFOLLOW, 0),
        ]

        def call_all() -> None:
            kept = {at: caller.keep(text + b"\0") for at, text in name.items()}
            how = caller.keep(struct.pack("=QQQ", WRITE | os.O_NONBLOCK, 0o1777, 0))
            caller.call(OPEN, kept["open"], os.O_RDWR | os.O_CLOEXEC, 0o777)
            caller.call(OPEN, kept["open"], WRITE | os.O_EXCL, 0o4751)
            caller.call(CREAT, kept["creat"], 0o640)
            caller.call(OPENAT, -100, kept["at"], WRITE | os.O_APPEND, 0o600)
            caller.call(OPENAT2, -100, kept["at2"], how, 24)
            caller.call(OPENAT, -100, caller.keep(long + b"\0"), os.O_DIRECTORY)
            caller.call(OPEN, 0, os.O_NOFOLLOW)
            caller.call(OPEN, -4096, os.O_NOFOLLOW)

        async with own_sensor(rung) as sensor:
            async with watching(sensor, by(caller), file_events=[opened()]) as stream:
                LIBC.syscall(OPEN, -1, 0)  # fstat, lseek and preadv of ours
                LIBC.syscall(CREAT, -1, 0, 0)
                LIBC.syscall(OPENAT, -1, 0, 0, 0)
                call_all()
                assert await opens(stream, caller) == expected
            end = opened(filename="/ringside-test/end")
            for asked, which in (
                (opened(filename_pattern="*/none/at*"), [3, 4]),
                (opened(filename=name["creat"].decode()), [2]),
                (opened(open_flags_mask=os.O_TRUNC | os.O_APPEND), [2, 3]),
                (opened(create_mode_mask=0o4000 | 0o1000), [1, 4]),
            ):
                async with watching(sensor, by(caller), file_events=[asked, end]) as stream:
                    call_all()
                    assert await opens(stream, caller) == [expected[at] for at in which], asked


async def calls(stream: Stream, caller: Caller32) -> list[tuple[NetworkEventType, int, object, int]]:
    """Type, descriptor, address and backlog of what the program calls, as it is told to now."""
    caller.call(LISTEN, END, 1)
    caller.run()
    events = await stream.until(lambda event: event.network is not None and event.network.sockfd == END)
    told = []
    for event in events[:-1]:
        n = event.network
        assert n is not None
        if event.process_pid == caller.pid:
            told.append((n.type, n.sockfd, told_address(n.address), n.backlog))
        else:  # the sensor's event loop has sockets, but our getuid() is no connect
            assert n.type in (T.SENDTO_ATTEMPT, T.RECVFROM_ATTEMPT), event
    return told


class Through:
    """Calls by number, or through socketcall."""

    def __init__(self, caller: Caller32, through: bool) -> None:
        self.caller = caller
        self.through = through

    def __call__(self, name: str, *arguments: int | At) -> None:
        direct = {
            "bind": BIND,
            "connect": CONNECT,
            "listen": LISTEN,
            "accept4": ACCEPT4,
            "sendto": SENDTO,
            "sendmsg": SENDMSG,
            "recvfrom": RECVFROM,
            "recvmsg": RECVMSG,
        }
        if self.through or name not in direct:
            self.caller.call(SOCKETCALL, THROUGH[name], self.caller.keep(list(arguments)))
        else:
            self.caller.call(direct[name], *arguments)

    def message(self, address: bytes) -> At:
        """A 32-bit struct msghdr."""
        return self.caller.keep([self.caller.keep(address) if address else 0, len(address), 0, 0, 0, 0, 0])


@pytest.mark.parametrize("through", [False, True], ids=["direct", "socketcall"])
@pytest.mark.parametrize("rung", RUNGS)
async def test_attempts(rung: str, through: bool, program32: Path, record_property: Told) -> None:
    """Each call, with each kind of address, by a number of its own and through socketcall."""
    if is_not_there(rung, program32, record_property):
        return
    wanted = [NetworkEventFilter(type=kind) for kind in ATTEMPTS]
    with running(program32) as caller:
        call = Through(caller, through)
        async with own_sensor(rung) as sensor:
            async with watching(sensor, by(caller), network_events=wanted) as stream:
                LIBC.syscall(SOCKETCALL, 3, 0)  # getuid of ours
                expected: list[tuple[NetworkEventType, int, object, int]] = []
                for address, told in ADDRESSES:
                    kept, length = caller.keep(address), len(address)
                    call("connect", 1000, kept, length)
                    call("bind", 1001, kept, length)
                    call("sendto", 1002, kept, 1, 0, kept, length)
                    expected += [
                        (T.CONNECT_ATTEMPT, 1000, told, 0),
                        (T.BIND_ATTEMPT, 1001, told, 0),
                        (T.SENDTO_ATTEMPT, 1002, told, 0),
                    ]
                    call("sendmsg", 1003, call.message(address), 0)
                    expected.append((T.SENDTO_ATTEMPT, 1003, told, 0))
                call("sendto", 1002, 0, 1, 0, 0, 0)
                call("sendmsg", 1003, call.message(b""), 0)
                call("connect", 1000, 16, 16)
                expected += [
                    (T.SENDTO_ATTEMPT, 1002, "-", 0),
                    (T.SENDTO_ATTEMPT, 1003, "-", 0),
                    (T.CONNECT_ATTEMPT, 1000, "-", 0),
                ]
                call("listen", 1004, 77)
                call("accept4", 1005, 0, 0, 0)
                call("recvfrom", 1006, 0, 0, 0, 0, 0)
                call("recvmsg", 1007, call.message(b""), 0)
                expected += [
                    (T.LISTEN_ATTEMPT, 1004, "-", 77),
                    (T.ACCEPT_ATTEMPT, 1005, "-", 0),
                    (T.RECVFROM_ATTEMPT, 1006, "-", 0),
                    (T.RECVFROM_ATTEMPT, 1007, "-", 0),
                ]
                if through:
                    call("accept", 1008, 0, 0)
                    call("send", 1009, 0, 0, 0)
                    call("recv", 1010, 0, 0, 0)
                    expected += [
                        (T.ACCEPT_ATTEMPT, 1008, "-", 0),
                        (T.SENDTO_ATTEMPT, 1009, "-", 0),
                        (T.RECVFROM_ATTEMPT, 1010, "-", 0),
                    ]
                assert await calls(stream, caller) == expected
            last = NetworkEventFilter(type=T.LISTEN_ATTEMPT, filter=to_message(parse(f"fd == {END}")))
            for kind, text, which in (
                (T.BIND_ATTEMPT, "sin_port == 40443", [0]),
                (T.BIND_ATTEMPT, "sin6_addr == fd00::abcd", [1]),
                (T.BIND_ATTEMPT, 'sun_path ~ "@ringside*"', [4, 5]),
                (T.BIND_ATTEMPT, "sa_family == AF_INET && fd == 1000", []),
                (T.BIND_ATTEMPT, "sa_family == AF_INET && fd == 1001", [0]),
                (T.SENDTO_ATTEMPT, "sin_port == 40443 && fd == 1003", [0]),
            ):
                some = NetworkEventFilter(type=kind, filter=to_message(parse(text)))
                async with watching(sensor, by(caller), network_events=[some, last]) as stream:
                    for address, _ in ADDRESSES:
                        call("bind", 1001, caller.keep(address), len(address))
                        call("connect", 1001, caller.keep(address), len(address))
                        call("sendmsg", 1003, call.message(address), 0)
                    found = [one[2] for one in await calls(stream, caller)]
                    assert found == [ADDRESSES[at][1] for at in which], text


@pytest.mark.parametrize("through", [False, True], ids=["direct", "socketcall"])
async def test_results(through: bool, program32: Path, record_property: Told) -> None:
    """What each call gave, whatever the rung of the attempts."""
    if is_not_there("memory", program32, record_property):
        return
    wanted = [NetworkEventFilter(type=kind) for kind in RESULTS]
    with running(program32) as caller:
        call = Through(caller, through)

        def own(event: Any) -> bool:  # what the sensor asks its sockets once a second has results, too
            return bool(event.process_pid == caller.pid)

        caller.call(SOCKET, 1, 1, 0)
        (fd,) = caller.run()
        name = ADDRESSES[4][0] + str(caller.pid).encode()
        async with own_sensor() as sensor:
            async with watching(sensor, own, network_events=wanted) as stream:
                call("bind", fd, caller.keep(name), len(name))
                call("listen", fd, 5)
                call("connect", fd, caller.keep(name), len(name))
                call("accept4", 9999, 0, 0, 0)
                call("sendto", 9999, 0, 0, 0, 0, 0)
                call("sendmsg", 9999, 0, 0)
                call("recvfrom", 9999, 0, 0, 0, 0, 0)
                call("recvmsg", 9999, 0, 0)
                results = caller.run()
                kinds = [
                    T.BIND_RESULT,
                    T.LISTEN_RESULT,
                    T.CONNECT_RESULT,
                    T.ACCEPT_RESULT,
                    *[T.SENDTO_RESULT] * 2,
                    *[T.RECVFROM_RESULT] * 2,
                ]
                assert results == [0, 0, -errno.EINVAL, *[-errno.EBADF] * 5]
                expected = list(zip(kinds, results, strict=True))
                await arrived(stream, len(expected))
                assert [told_result(event) for event in stream.events] == expected
            some = NetworkEventFilter(type=T.BIND_RESULT, filter=to_message(parse(f"ret == -{errno.EBADF}")))
            async with watching(sensor, own, network_events=[some]) as stream:
                call("bind", fd, 16, 16)
                call("listen", 9999, 1)
                call("bind", 9999, caller.keep(name), len(name))
                caller.run()
                (event,) = await stream.until(lambda _: True)
                assert told_result(event) == (T.BIND_RESULT, -errno.EBADF)


async def arrived(stream: Stream, count: int) -> None:
    """Wait for so many events."""
    while len(stream.events) < count:
        async with asyncio.timeout(PATIENCE):
            await stream.more()


def told_result(event: Event) -> tuple[NetworkEventType, int]:
    assert event.network is not None
    return event.network.type, event.network.result


async def test_programs_of_both_kinds(program32: Path, record_property: Told) -> None:
    """In turn, each new: whose a call is does not depend on who was there before."""
    if is_not_there("memory", program32, record_property):
        return
    with running(program32):
        async with own_sensor() as sensor, AsyncExitStack() as stack:
            wanted = opened(filename_pattern="/ringside-test/short/*")
            async with watching(sensor, bool, file_events=[wanted]) as stream:
                pids = []
                names = [ctypes.create_string_buffer(f"/ringside-test/short/{n}".encode()) for n in range(10)]
                for name in names:
                    caller = stack.enter_context(running(program32))
                    caller.call(OPEN, caller.keep(name.raw))
                    assert caller.run() == [-errno.ENOENT]
                    LIBC.open(name, 0)
                    pids += [caller.pid, os.getpid()]
                await arrived(stream, len(pids))
    assert [event.process_pid for event in stream.events] == pids
    told = [event.file.filename for event in stream.events if event.file is not None]
    assert told == [name.value.decode() for name in names for _ in range(2)]


@pytest.mark.parametrize("rung", RUNGS)
async def test_the_first_program(rung: str, program32: Path, record_property: Told) -> None:
    """None is there yet; soon after one came, its opens are told, and those of the next."""
    if is_not_there(rung, program32, record_property):
        return
    async with own_sensor(rung) as sensor:
        name = b"/ringside-test/first"
        wanted = opened(filename=name.decode())
        async with watching(sensor, bool, file_events=[wanted]) as stream:
            for _ in range(2):
                with running(program32) as caller:
                    async with asyncio.timeout(PATIENCE):
                        while not any(event.process_pid == caller.pid for event in stream.events):
                            caller.call(OPEN, caller.keep(name + b"\0"))
                            assert caller.run() == [-errno.ENOENT]
                            LIBC.open(name, 0)  # so that there is a message
                            await stream.more()
