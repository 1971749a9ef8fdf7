"""A 32-bit program that makes the calls a test wants."""

from __future__ import annotations

import errno
import struct
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .program import At, Program, compile_program

SOURCE = Path(__file__).with_name("caller32.c")
FLAGS = "-m32 -O1 -static -nostdlib -ffreestanding -fno-pie -no-pie -fno-stack-protector"


def build(folder: Path) -> Path:
    """The program, compiled; it needs no 32-bit libraries."""
    return compile_program(SOURCE, folder, *FLAGS.split())


class Caller32(Program):
    """The program, running."""

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
        self._steps.append(struct.pack("=8I", number, *words, mask))


def running(program: Path) -> AbstractContextManager[Caller32]:
    """The program, until it is left."""
    return Caller32.running(program)


def is_run(program: Path) -> bool:
    """True if the kernel runs 32-bit programs: it says so itself."""
    try:
        with running(program):
            return True
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        return False
