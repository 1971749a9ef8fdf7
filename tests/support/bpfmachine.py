"""Runs bpf instructions, as far as filters use them: registers and one stretch of memory."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable

from ringside.sensor import bpf

MASK = (1 << 64) - 1
LOADS = {0x61: 4, 0x69: 2, 0x71: 1, 0x79: 8}


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


COMPARE: dict[int, Callable[[int, int], bool]] = {
    0x10: lambda a, b: a == b,
    0x20: lambda a, b: a > b,
    0x30: lambda a, b: a >= b,
    0x40: lambda a, b: a & b != 0,
    0x50: lambda a, b: a != b,
    0x60: lambda a, b: signed(a) > signed(b),
    0x70: lambda a, b: signed(a) >= signed(b),
    0xA0: lambda a, b: a < b,
    0xB0: lambda a, b: a <= b,
    0xC0: lambda a, b: signed(a) < signed(b),
    0xD0: lambda a, b: signed(a) <= signed(b),
}
OPERATE: dict[int, Callable[[int, int], int]] = {
    0x00: lambda a, b: a + b,
    0x10: lambda a, b: a - b,
    0x40: lambda a, b: a | b,
    0x50: lambda a, b: a & b,
    0x60: lambda a, b: a << (b & 63),
    0x70: lambda a, b: a >> (b & 63),
    0xB0: lambda _, b: b,
    0xC0: lambda a, b: signed(a) >> (b & 63),
}


def run(code: tuple[bpf.Code, ...], registers: dict[int, int], memory: bytes) -> int:
    """R0 at the end of code that is followed by `R0 = 1; exit; refused: R0 = 0; exit`."""
    end = (
        *bpf.leave(),
        bpf.Label("refused"),
        bpf.alu(bpf.R0, "=", 0),
        bpf.Instruction(0x95),
    )
    raw = bpf.Program("test", (*code, *end)).render({})
    program = list(struct.iter_unpack("=BBhi", raw))
    values = dict(registers)
    at = 0
    while True:
        opcode, numbers, offset, constant = program[at]
        to, source = numbers & 15, numbers >> 4
        at += 1
        operand = values.get(source, 0) if opcode & 0x08 else constant & MASK
        match opcode & 7:
            case _ if opcode == 0x95:
                return values[0]
            case _ if opcode == 0x18:
                low, high = constant & 0xFFFFFFFF, program[at][3] & 0xFFFFFFFF
                values[to] = low | high << 32
                at += 1
            case 1:
                size = LOADS[opcode]
                place = signed(values[source]) + offset
                assert 0 <= place <= len(memory) - size, "reads beyond the record"
                values[to] = int.from_bytes(memory[place : place + size], sys.byteorder)
            case 4:
                values[to] = OPERATE[opcode & 0xF0](values.get(to, 0), operand) & 0xFFFFFFFF
            case 7:
                values[to] = OPERATE[opcode & 0xF0](values.get(to, 0), operand) & MASK
            case 5 if opcode == 0x05:
                at += offset
            case 5:
                if COMPARE[opcode & 0xF0](values[to], operand):
                    at += offset
            case _:
                raise AssertionError(f"opcode {opcode:#x}")
