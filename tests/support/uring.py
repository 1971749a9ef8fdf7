"""A program that makes requests through io_uring, those that a test wants."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ringside.sensor.events.uring import Opcode

SOURCE = Path(__file__).with_name("uring.c")
STREAM, LOCAL, DATAGRAM = 100, 101, 102  # sockets of the program
KEPT = 0  # the number of the first one among the files that the ring keeps
FIXED_FILE, LINK, ASYNC = 1, 4, 16  # IOSQE_*
SQPOLL = 2  # IORING_SETUP_SQPOLL


def build(folder: Path) -> Path:
    """The program, compiled."""
    path = folder / "uring"
    subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(path), str(SOURCE)], check=True)
    return path


@dataclass(frozen=True)
class At:
    """A place in the program's memory."""

    offset: int


class Requester:
    """The program, running."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process
        self._begin()

    def _begin(self) -> None:
        self._data = bytearray(16)  # an offset is never 0, which means no pointer
        self._places: list[int] = []
        self._requests: list[bytes] = []

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
        self._requests.append(
            struct.pack(
                "=BBHiQQIIQHHHHQQQ",
                *(opcode, flags, 0, fd, off, addr, length, how, 0, 0, 0, address_length, 0, 0, 0),
                mask,
            )
        )

    def run(self) -> list[int]:
        """Make the requests, all with one call; what they gave."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(
            struct.pack("=3I", len(self._requests), len(self._data), len(self._places))
            + self._data
            + struct.pack(f"={len(self._places)}I", *self._places)
            + b"".join(self._requests)
        )
        self._process.stdin.flush()
        count = len(self._requests)
        self._begin()
        return list(struct.unpack(f"={count}i", self._process.stdout.read(4 * count)))


@contextmanager
def running(program: Path, setup: int = 0) -> Iterator[Requester]:
    """The program, until it is left."""
    with subprocess.Popen([program, str(setup)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Requester(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
    assert process.returncode == 0
