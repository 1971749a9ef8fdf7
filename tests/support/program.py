"""A program that a test tells what to do: bytes for its memory, the places of pointers in them, and steps."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class At:
    """A place in the program's memory."""

    offset: int


class Program:
    """The program, running."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process
        self._begin()

    def _begin(self) -> None:
        self._data = bytearray(16)  # an offset is never 0, which means no pointer
        self._places: list[int] = []
        self._steps: list[bytes] = []

    def run(self) -> list[int]:
        """Do what was asked for; what each step gave."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(
            struct.pack("=3I", len(self._steps), len(self._data), len(self._places))
            + self._data
            + struct.pack(f"={len(self._places)}I", *self._places)
            + b"".join(self._steps)
        )
        self._process.stdin.flush()
        count = len(self._steps)
        self._begin()
        return list(struct.unpack(f"={count}i", self._process.stdout.read(4 * count)))

    @classmethod
    @contextmanager
    def running(cls, program: Path, *arguments: str) -> Iterator[Self]:
        """The program, until it is left."""
        command = [str(program), *arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            try:
                yield cls(process)
            finally:
                assert process.stdin is not None
                process.stdin.close()
        assert process.returncode == 0


def compile_program(source: Path, folder: Path, *flags: str) -> Path:
    """A C program, in this folder."""
    path = folder / source.stem
    subprocess.run(["gcc", *flags, "-o", str(path), str(source)], check=True)
    return path
