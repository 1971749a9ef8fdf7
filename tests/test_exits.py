"""What the proc connector tells, from messages made up here."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from ringside.sensor.engine import clock
from ringside.sensor.errors import UnservableError
from ringside.sensor.exits import ExitConnector

PROC_EVENT_EXIT, PROC_EVENT_FORK = 0x80000000, 1


def message(tid: int, code: int, what: int = PROC_EVENT_EXIT, when: int | None = None) -> bytes:
    """struct nlmsghdr, struct cn_msg and struct proc_event (linux/cn_proc.h)."""
    when = time.monotonic_ns() if when is None else when
    event = struct.pack("=IIQiiIIII", what, 0, when, tid, tid, code, 17, 0, 0)
    header = struct.pack("=IIIIHH", 1, 1, 0, 0, len(event), 0)
    return struct.pack("=IHHII", 16 + len(header) + len(event), 3, 0, 0, 0) + header + event


class Pair:
    """A connector whose other end is here."""

    def __init__(self) -> None:
        here, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.connector = ExitConnector.__new__(ExitConnector)
        self.connector.socket = here
        self.connector.lost = 0
        self.connector._codes = OrderedDict()

    def tell(self, *messages: bytes) -> None:
        for one in messages:
            self.kernel.send(one)
        self.connector.read()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.connector.close()
    made.connector.close()
    made.kernel.close()


def test_a_status_is_had_once(pair: Pair) -> None:
    begin = clock()
    pair.tell(message(7, 3 << 8), message(8, 9))
    assert pair.connector.take(9, begin) is None
    assert pair.connector.take(7, begin) == 3 << 8
    assert pair.connector.take(7, begin) is None
    assert pair.connector.take(8, begin) == 9


def test_what_an_earlier_thread_of_that_id_ended_with_is_not_told(pair: Pair) -> None:
    pair.tell(message(7, 3 << 8, when=time.monotonic_ns() - 10**9))
    assert pair.connector.take(7, clock()) is None
    pair.tell(message(7, 4 << 8))
    assert pair.connector.take(7, clock()) == 4 << 8


def test_the_latest_of_two_counts(pair: Pair) -> None:
    pair.tell(message(7, 3 << 8), message(7, 4 << 8))
    assert pair.connector.take(7, clock()) == 4 << 8


def test_other_messages_and_garbage_are_passed_over(pair: Pair) -> None:
    pair.tell(b"", b"x", message(7, 1)[:-30], message(7, 3 << 8, PROC_EVENT_FORK), b"\xff" * 200)
    assert pair.connector.take(7, 0) is None
    pair.tell(message(7, 5))
    assert pair.connector.take(7, clock()) == 5


def test_only_so_many_are_kept(pair: Pair) -> None:
    begin = clock()
    for first in range(0, 6000, 100):
        pair.tell(*(message(tid, tid) for tid in range(first, first + 100)))
    assert pair.connector.take(5999, begin) == 5999
    assert pair.connector.take(100, begin) is None
    assert len(pair.connector._codes) <= 4096


def test_an_overflow_is_counted_and_the_rest_read(pair: Pair) -> None:
    real = pair.connector.socket

    class Overflowing:
        left = 1

        def recv(self, size: int) -> bytes:
            if self.left:
                self.left = 0
                raise OSError(errno.ENOBUFS, "too much")
            return real.recv(size)

    pair.kernel.send(message(7, 3))
    with mock.patch.object(pair.connector, "socket", Overflowing()):
        pair.connector.read()
    assert pair.connector.lost == 1
    assert pair.connector.take(7, clock()) == 3


@pytest.mark.parametrize("step", ["socket", "bind", "send"])
def test_where_there_is_none_the_cause_is_told(step: str) -> None:
    class Refusing:
        def __init__(self, *_: Any) -> None:
            self.refuse("socket")

        def refuse(self, here: str) -> None:
            if step == here:
                raise OSError(errno.EPERM, "not permitted")

        def setsockopt(self, *_: Any) -> None:
            pass

        def bind(self, _: object) -> None:
            self.refuse("bind")

        def send(self, _: bytes) -> None:
            self.refuse("send")

        def close(self) -> None:
            closed.append(self)

    closed: list[Refusing] = []
    with (
        mock.patch("ringside.sensor.exits.socket.socket", Refusing),
        pytest.raises(UnservableError, match="proc connector"),
    ):
        ExitConnector()
    assert len(closed) == (step != "socket")
