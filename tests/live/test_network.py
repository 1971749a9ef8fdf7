"""Connect, bind, listen, accept, send, receive: attempts by each rung of the ladder, results, filters."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
from ringside.api.v0 import Event, NetworkAddress, NetworkAddressFamily, NetworkEventFilter, NetworkEventType
from ringside.sensor.errors import RequestError
from ringside.sensor.expression import parse, to_message

from ..support.stream import LIBC, RUNGS, Stream, Told, is_missing, own_sensor, watching

T = NetworkEventType
ATTEMPTS = tuple(kind for kind in T if kind.name.endswith("ATTEMPT"))
RESULTS = tuple(kind for kind in T if kind.name.endswith("RESULT"))
END = 987_654_321  # no file descriptor, but a number that comes back
ABSENT = "-"

IPV4 = struct.pack("=H", socket.AF_INET) + struct.pack("!H", 40_443) + bytes([127, 1, 2, 3]) + bytes(8)
IPV6_ADDRESS = bytes.fromhex("fd00000000000000000000000000abcd")
IPV6 = struct.pack("=H", socket.AF_INET6) + struct.pack("!H", 443) + bytes(4) + IPV6_ADDRESS + bytes(4)
UNIX = struct.pack("=H", socket.AF_UNIX)
PATH = UNIX + b"/ringside-test/none.sock\0"
LONGEST = UNIX + b"/ringside-test/".ljust(108, b"l")  # fills sun_path, without a NUL
ABSTRACT = UNIX + b"\0ringside-test"
BINARY = UNIX + b"\0ringside\0\xff."
NETLINK = struct.pack("=HHII", socket.AF_NETLINK, 0, 0, 0)


def told_address(address: NetworkAddress | None) -> object:
    """In short: what is there of an address."""
    if address is None:
        return ABSENT
    if address.ipv4_address is not None:
        inner = address.ipv4_address.address
        assert address.family == NetworkAddressFamily.INET
        return (inner.address if inner else 0, address.ipv4_address.port)
    if address.ipv6_address is not None:
        six = address.ipv6_address.address
        assert address.family == NetworkAddressFamily.INET6
        return (six.high if six else 0, six.low if six else 0, address.ipv6_address.port)
    if address.family == NetworkAddressFamily.LOCAL:
        return address.local_address or ""
    return "" if address.family else ABSENT


def in_memory(data: bytes) -> int:
    """As such bytes are read as an integer: addresses are told as they lie in memory."""
    return int.from_bytes(data, "little")


ADDRESSES: Sequence[tuple[bytes, object]] = (
    (IPV4, (in_memory(bytes([127, 1, 2, 3])), 40_443)),
    (IPV6, (in_memory(IPV6_ADDRESS[:8]), in_memory(IPV6_ADDRESS[8:]), 443)),
    (PATH, "/ringside-test/none.sock"),
    (LONGEST, LONGEST[2:].decode()),
    (ABSTRACT, "@ringside-test"),
    (BINARY, "@ringside\0\ufffd."),
    (UNIX, ""),
    (NETLINK, ABSENT),
)


@dataclass(frozen=True)
class Message:
    """A struct msghdr with this address; its memory lives as long as this."""

    address: ctypes.Array[ctypes.c_char] | None
    length: int

    @property
    def raw(self) -> ctypes.Array[ctypes.c_char]:
        at = ctypes.addressof(self.address) if self.address is not None else 0
        return ctypes.create_string_buffer(struct.pack("=QIIQQQQQ", at, self.length, 0, 0, 0, 0, 0, 0), 56)


class Caller:
    """Calls the kernel, and keeps what it pointed at, as real callers do for long enough."""

    def __init__(self) -> None:
        self._kept: list[object] = []

    def keep(self, data: bytes) -> ctypes.Array[ctypes.c_char]:
        buffer = ctypes.create_string_buffer(data, max(len(data), 1))
        self._kept.append(buffer)
        return buffer

    def call(self, name: str, *arguments: object) -> int:
        """The result, negative errno if it failed."""
        result: int = getattr(LIBC, name)(*arguments)
        return -ctypes.get_errno() if result < 0 else result

    def message(self, address: bytes) -> ctypes.Array[ctypes.c_char]:
        raw = Message(self.keep(address) if address else None, len(address)).raw
        self._kept.append(raw)
        return raw

    def end(self) -> None:
        """What every stream of these tests sees last."""
        self.call("listen", END, 1)


def is_end(event: Event) -> bool:
    return event.network is not None and event.network.sockfd == END


LAST = NetworkEventFilter(type=T.LISTEN_ATTEMPT, filter=to_message(parse(f"fd == {END}")))


async def rest(stream: Stream, caller: Caller) -> list[tuple[NetworkEventType, int, object, int, int]]:
    """Type, descriptor, address, backlog and result of what comes up to the end."""
    caller.end()
    found = []
    for event in await stream.until(is_end):
        assert event.network is not None
        n = event.network
        found.append((n.type, n.sockfd, told_address(n.address), n.backlog, n.result))
    return found[:-1]


@contextmanager
def sockets(count: int = 2) -> Iterator[list[int]]:
    """Datagram sockets of the local kind that don't block."""
    with ExitStack() as stack:
        made = [stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) for _ in range(count)]
        for one in made:
            one.setblocking(False)
        yield [one.fileno() for one in made]


@pytest.mark.parametrize("rung", RUNGS)
async def test_attempts(rung: str, record_property: Told) -> None:
    """Every call, with every kind of address; none where none was given or it can't be read."""
    if is_missing(rung, record_property):
        return
    caller = Caller()
    wanted = [NetworkEventFilter(type=kind) for kind in ATTEMPTS]
    async with own_sensor(rung) as sensor, watching(sensor, network_events=wanted) as stream:
        with sockets(1) as (fd,):
            expected: list[tuple[NetworkEventType, int, object, int, int]] = []
            for address, told in ADDRESSES:
                kept, length = caller.keep(address), len(address)
                caller.call("connect", fd, kept, length)
                caller.call("bind", 1000, kept, length)
                caller.call("sendto", fd, b"x", 1, 0, kept, length)
                caller.call("sendmsg", fd, caller.message(address), 0)
                expected += [
                    (T.CONNECT_ATTEMPT, fd, told, 0, 0),
                    (T.BIND_ATTEMPT, 1000, told, 0, 0),
                    (T.SENDTO_ATTEMPT, fd, told, 0, 0),
                    (T.SENDTO_ATTEMPT, fd, told, 0, 0),
                ]
            caller.call("sendto", fd, b"x", 1, 0, None, 0)
            caller.call("sendmsg", fd, caller.message(b""), 0)
            caller.call("connect", fd, ctypes.c_void_p(16), 16)
            caller.call("sendmsg", fd, ctypes.c_void_p(16), 0)
            expected += [(T.SENDTO_ATTEMPT, fd, ABSENT, 0, 0)] * 2
            expected += [(T.CONNECT_ATTEMPT, fd, ABSENT, 0, 0), (T.SENDTO_ATTEMPT, fd, ABSENT, 0, 0)]
            caller.call("listen", fd, 77)
            caller.call("accept", fd, None, None)
            caller.call("accept4", fd, None, None, 0)
            caller.call("recvfrom", fd, caller.keep(bytes(9)), 9, 0, None, None)
            caller.call("recvmsg", fd, caller.message(b""), 0)
            expected += [
                (T.LISTEN_ATTEMPT, fd, ABSENT, 77, 0),
                (T.ACCEPT_ATTEMPT, fd, ABSENT, 0, 0),
                (T.ACCEPT_ATTEMPT, fd, ABSENT, 0, 0),
                (T.RECVFROM_ATTEMPT, fd, ABSENT, 0, 0),
                (T.RECVFROM_ATTEMPT, fd, ABSENT, 0, 0),
            ]
            assert [one for one in await rest(stream, caller) if one[1] in (fd, 1000)] == expected


async def test_results() -> None:
    """What each call gave, errors too."""
    caller = Caller()
    wanted = [NetworkEventFilter(type=kind) for kind in RESULTS]
    async with own_sensor() as sensor, watching(sensor, network_events=[*wanted, LAST]) as stream:
        with ExitStack() as stack:
            server, client = (
                stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).fileno()
                for _ in range(2)
            )
            name = caller.keep(UNIX + f"\0ringside-test-{os.getpid()}".encode())
            expected = []

            def call(kind: NetworkEventType, name: str, *arguments: object) -> int:
                result = caller.call(name, *arguments)
                expected.append((kind, 0, ABSENT, 0, result))
                return result

            assert call(T.BIND_RESULT, "bind", server, name, len(name)) == 0
            assert call(T.LISTEN_RESULT, "listen", server, 5) == 0
            assert call(T.CONNECT_RESULT, "connect", client, name, len(name)) == 0
            accepted = call(T.ACCEPT_RESULT, "accept", server, None, None)
            stack.callback(os.close, accepted)
            assert accepted > 0
            assert call(T.CONNECT_RESULT, "connect", client, name, len(name)) == -errno.EISCONN
            assert call(T.ACCEPT_RESULT, "accept4", server, None, None, -1) == -errno.EINVAL
            assert call(T.SENDTO_RESULT, "sendto", client, b"four", 4, 0, None, 0) == 4
            assert call(T.SENDTO_RESULT, "sendmsg", client, caller.message(b""), 0) == 0
            assert call(T.RECVFROM_RESULT, "recvfrom", accepted, caller.keep(bytes(9)), 9, 0, None, None) == 4
            assert call(T.RECVFROM_RESULT, "recvmsg", accepted, caller.message(b""), 64) in (0, -errno.EAGAIN)
            assert call(T.BIND_RESULT, "bind", 9999, name, len(name)) == -errno.EBADF
            assert call(T.LISTEN_RESULT, "listen", 9999, 5) == -errno.EBADF
            assert await rest(stream, caller) == expected
        for text, results in (
            ("ret < 0", [-errno.EBADF, -errno.EBADF]),
            (f"ret == -{errno.EBADF}", [-errno.EBADF, -errno.EBADF]),
            ("ret >= 0", [0]),
            ("ret != 0 && ret != -88", [-errno.EBADF, -errno.EBADF]),
            ("ret > 0", []),
        ):
            where = to_message(parse(text))
            some = [NetworkEventFilter(type=kind, filter=where) for kind in (T.LISTEN_RESULT, T.BIND_RESULT)]
            async with watching(sensor, network_events=[*some, LAST]) as picked:
                with socket.socket(socket.AF_UNIX) as one:
                    caller.call("listen", 9999, 5)
                    caller.call("bind", one.fileno(), UNIX, 2)
                    caller.call("bind", 9999, UNIX, 2)
                found = [one[4] for one in await rest(picked, caller)]
                assert found == results, text


FILTERS: Sequence[tuple[str, set[int]]] = (
    ("sin_port == 40443", {0}),
    ("sin_port != 40443", set()),
    ("sin_port > 40000 && sin_port < 41000", {0}),
    ("sin_port < 40443 || sin6_port <= 443", {1}),
    (f"sin_addr == {in_memory(bytes([127, 1, 2, 3]))}", {0}),
    ("sin_addr == 127.1.2.3", {0}),
    ("sin6_port == 443", {1}),
    ("sin6_port == 40443", set()),
    ("sin6_addr == fd00::abcd", {1}),
    (f"sin6_addr_high == {in_memory(IPV6_ADDRESS[:8])}", {1}),
    (f"sin6_addr_low == {in_memory(IPV6_ADDRESS[8:])}", {1}),
    ("sa_family == AF_INET", {0}),
    ("sa_family == AF_UNIX", {2, 3, 4, 5, 6}),
    ("sa_family > AF_INET", {1, 7}),
    ('sun_path == "/ringside-test/none.sock"', {2}),
    ('sun_path ~ "/ringside-test/*"', {2, 3}),
    ('sun_path ~ "@ringside*"', {4, 5}),
    ('sun_path == "@ringside-test"', {4}),
    ('sun_path ~ "*none*"', {2}),
    ('sun_path != "/ringside-test/none.sock"', {3, 4, 5, 6}),
    ("fd == 1000", set(range(8))),
    ("fd != 1000", set()),
    ('(sa_family == 2 || sun_path ~ "@*") && fd == 1000', {0, 4, 5}),
)


@pytest.mark.parametrize("rung", RUNGS)
async def test_filters(rung: str, record_property: Told) -> None:
    """Each field that a filter may name, on each rung."""
    if is_missing(rung, record_property):
        return
    caller = Caller()
    async with own_sensor(rung) as sensor:
        for text, which in FILTERS:
            wanted = NetworkEventFilter(type=T.BIND_ATTEMPT, filter=to_message(parse(text)))
            async with watching(sensor, network_events=[wanted, LAST]) as stream:
                for address, _ in ADDRESSES:
                    caller.call("bind", 1000, caller.keep(address), len(address))
                found = [one[2] for one in await rest(stream, caller)]
                assert found == [ADDRESSES[at][1] for at in sorted(which)], text
        for text, backlogs in (
            ("backlog == 7", [7]),
            ("backlog > 7 && fd == 1000", [9]),
            ("backlog < 0", []),
        ):
            wanted = NetworkEventFilter(type=T.LISTEN_ATTEMPT, filter=to_message(parse(text)))
            async with watching(sensor, network_events=[wanted, LAST]) as stream:
                for backlog in (7, 9):
                    caller.call("listen", 1000, backlog)
                assert [one[3] for one in await rest(stream, caller)] == backlogs, text
        wanted = NetworkEventFilter(type=T.SENDTO_ATTEMPT, filter=to_message(parse('sun_path ~ "@*"')))
        async with watching(sensor, network_events=[wanted, LAST]) as stream:
            for address, _ in ADDRESSES:
                caller.call("sendmsg", 1000, caller.message(address), 0)
            assert [one[2] for one in await rest(stream, caller)] == [ADDRESSES[4][1], ADDRESSES[5][1]]


@pytest.mark.parametrize(
    ("kind", "text", "field"),
    [
        (T.UNKNOWN, "fd == 1", "type"),
        (T.CONNECT_RESULT, "fd == 1", "filter"),
        (T.CONNECT_ATTEMPT, "ret == 1", "filter"),
        (T.LISTEN_ATTEMPT, "sin_port == 1", "filter"),
        (T.CONNECT_ATTEMPT, "sun_path == 1", "filter"),
        (T.CONNECT_ATTEMPT, 'sin_port == "x"', "filter"),
    ],
)
async def test_bad_requests(kind: NetworkEventType, text: str, field: str) -> None:
    async with own_sensor() as sensor:
        with pytest.raises(RequestError) as caught:
            async with watching(
                sensor, network_events=[NetworkEventFilter(type=kind, filter=to_message(parse(text)))]
            ):
                pass
    assert caught.value.field.startswith(f"subscription.event_filter.network_events[0].{field}")
