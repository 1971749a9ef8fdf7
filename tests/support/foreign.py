"""A 32-bit program that makes the calls a test wants."""

from __future__ import annotations

import errno
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("caller32.c")
FLAGS = "-m32 -O1 -static -nostdlib -ffreestanding -fno-pie -no-pie -fno-stack-protector"


def build(folder: Path) -> Path:
    """The program, compiled; it needs no 32-bit libraries."""
    path = folder / "caller32"
    subprocess.run(["gcc", *FLAGS.split(), "-o", str(path), str(SOURCE)], check=True)
    return path


@dataclass(frozen=True)
class At:
    """A place in the program's memory."""

    offset: int


class Caller32:
    """The program, running."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process
        self._begin()

    def _begin(self) -> None:
        self._data = bytearray(16)  # an offset is never 0, which means no pointer
        self._places: list[int] = []
        self._calls: list[bytes] = []

    def keep(self, data: bytes | list[Any]) -> At:
        """Bytes, or words and pointers to what was kept, in the program's memory."""
        at = len(self._data)
        if isinstance(data, bytes):
            self._data += data + bytes(4 - len(data) % 4)
            return At(at)
        for word in data:
            if isinstance(word, At):
                self._places.append(len(self._data))
            self._data += struct.pack("=I", (word.offset if isinstance(word, At) else word) & 0xFFFFFFFF)
        return At(at)

    def call(self, number: int, *arguments: int | At) -> None:
        """A call to make with the next run()."""
        padded = [*arguments, *[0] * (6 - len(arguments))]
        words = [one.offset if isinstance(one, At) else one & 0xFFFFFFFF for one in padded]
        mask = sum(isinstance(one, At) << at for at, one in enumerate(padded))
        self._calls.append(struct.pack("=8I", number, *words, mask))

    def run(self) -> list[int]:
        """Make the calls; what they gave."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(
            struct.pack("=3I", len(self._calls), len(self._data), len(self._places))
            + self._data
            + struct.pack(f"={len(self._places)}I", *self._places)
            + b"".join(self._calls)
        )
        self._process.stdin.flush()
        count = len(self._calls)
        self._begin()
        answer = self._process.stdout.read(4 * count)
        return list(struct.unpack(f"={count}i", answer))


@contextmanager
def running(program: Path) -> Iterator[Caller32]:
    """The program, until it is left."""
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Caller32(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
    assert process.returncode == 0


def is_run(program: Path) -> bool:
    """True if the kernel runs 32-bit programs: it says so itself."""
    try:
        with running(program):
            return True
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        return False
