"""A program that makes requests through io_uring, those that a test wants."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager
from pathlib import Path

from ringside.sensor.events.uring import Opcode

from .program import At, Program, compile_program

SOURCE = Path(__file__).with_name("uring.c")
STREAM, LOCAL, DATAGRAM = 100, 101, 102  # sockets of the program
KEPT = 0  # the number of the first one among the files that the ring keeps
FIXED_FILE, LINK, ASYNC = 1, 4, 16  # IOSQE_*
SQPOLL = 2  # IORING_SETUP_SQPOLL


def build(folder: Path) -> Path:
    """The program, compiled."""
    return compile_program(SOURCE, folder, "-O1", "-Wall", "-Wextra", "-Werror")


class Requester(Program):
    """The program, running."""

    def keep(self, data: bytes) -> At:
        """Bytes in the program's memory."""
        at = len(self._data)
        self._data += data + bytes(8 - len(data) % 8)
        return At(at)

    def message(self, address: bytes) -> At:
        """A struct msghdr with this address, and nothing to send."""
        name = self.keep(address) if address else None
        at = len(self._data)
        if name is not None:
            self._places.append(at)
        self._data += struct.pack("=QQQQQQQ", name.offset if name else 0, len(address), 0, 0, 0, 0, 0)
        return At(at)

    def request(
        self,
        opcode: Opcode,
        fd: int = -1,
        address: At | None = None,
        more: int | At = 0,
        *,
        length: int = 0,
        how: int = 0,
        address_length: int = 0,
        flags: int = 0,
    ) -> None:
        """A request to make with the next run(); the names are those of struct io_uring_sqe, more or less."""
        off = more.offset if isinstance(more, At) else more
        addr = address.offset if address else 0
        mask = (address is not None) | isinstance(more, At) << 1
        self._steps.append(
            struct.pack(
                "=BBHiQQIIQHHHHQQQ",
                *(opcode, flags, 0, fd, off, addr, length, how, 0, 0, 0, address_length, 0, 0, 0),
                mask,
            )
        )


def running(program: Path, setup: int = 0) -> AbstractContextManager[Requester]:
    """The program, until it is left."""
    return Requester.running(program, str(setup))
