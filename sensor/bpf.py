"""Small bpf programs, assembled here: no compiler, no headers, no library.

A `Program` is a list of instructions and labels. It renders to the same bytes each time and needs no kernel
for that; only `load` makes maps and hands the programs to the kernel.

    u8 opcode, u8 registers (destination in the low half, source in the high), s16 offset, s32 constant

(Documentation/bpf/standardization/instruction-set.rst.) What a program may rely on:

- It runs with a tracepoint's record as its context, R1. Of a system call's tracepoint that is the number at 8
  and the arguments, or the result, from 16 on, 8 bytes each; of others the record as its format file has it.
  The first 8 bytes are not readable.
- 512 bytes of stack below R10; what is larger is built in an element of a PERCPU_ARRAY, of 32 KiB at most.
- R0 to R5 are gone after a call, R6 to R9 stay. What a comparison told of a register, the verifier forgets
  when it is kept on the stack (before 5.16): a size is compared and used in one of R6 to R9.
- No page is brought in: where a caller's memory is not present the helpers fail, and the record must tell.
- It returns 1. With 0 the tracepoint's record would be kept from everybody else who traces it.
"""

from __future__ import annotations

import errno
import os
import resource
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path

from ._perf import ffi, lib
from .errors import KernelError, UnservableError
from .tracefs.format import Field, Format, Kind

_POSSIBLE = Path("/sys/devices/system/cpu/possible")
_LOG = 256 << 10  # bytes that the verifier may write
_LOG_KEPT = 3  # lines of them that tell why
_INSTRUCTION = struct.Struct("=BBhi")
LARGEST_ELEMENT = 32 << 10  # bytes of a per-CPU map's (PCPU_MIN_UNIT_SIZE)


class MapType(IntEnum):
    """Kinds of maps, enum bpf_map_type."""

    ARRAY = 2
    PERF_EVENT_ARRAY = 4
    PERCPU_ARRAY = 6
    LRU_HASH = 9


class Helper(IntEnum):
    """Functions of the kernel that a program may call, enum bpf_func_id."""

    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    GET_CURRENT_PID_TGID = 14
    GET_CURRENT_COMM = 16
    PERF_EVENT_OUTPUT = 25
    GET_CURRENT_TASK = 35
    PROBE_READ_USER = 112
    PROBE_READ_KERNEL = 113
    PROBE_READ_USER_STR = 114
    PROBE_READ_KERNEL_STR = 115


@dataclass(frozen=True)
class Map:
    """A map to be made: sizes of keys and values in bytes, and the most entries.

    `kept`: programs that take the place of others go on with what these have put there.
    """

    name: str
    type: MapType
    key_size: int
    value_size: int
    entries: int
    kept: bool = False


# entries: one for each CPU there may be, known when it is made
OUTPUT = Map("output", MapType.PERF_EVENT_ARRAY, 4, 4, 0)


def scratch(size: int) -> Map:
    """Room to build a record in: one element for each CPU."""
    return Map("scratch", MapType.PERCPU_ARRAY, 4, size, 1)


# ---- instructions --------------------------------------------------------------------------------

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = range(11)

_ALU = {
    "+=": 0x00, "-=": 0x10, "*=": 0x20, "/=": 0x30, "|=": 0x40, "&=": 0x50,
    "<<=": 0x60, ">>=": 0x70, "%=": 0x90, "^=": 0xA0, "=": 0xB0, "s>>=": 0xC0,
}  # fmt: skip
_JUMP = {
    "==": 0x10, ">": 0x20, ">=": 0x30, "&": 0x40, "!=": 0x50, "s>": 0x60,
    "s>=": 0x70, "<": 0xA0, "<=": 0xB0, "s<": 0xC0, "s<=": 0xD0,
}  # fmt: skip
_SIZE = {4: 0x00, 2: 0x08, 1: 0x10, 8: 0x18}
_BY_REGISTER = 0x08
_CALL, _EXIT, _JA, _LOAD_64 = 0x85, 0x95, 0x05, 0x18
_MAP_FD = 1  # BPF_PSEUDO_MAP_FD


@dataclass(frozen=True)
class Instruction:
    """One instruction. `label` is where it jumps to, `map` whose descriptor it loads."""

    opcode: int
    destination: int = 0
    source: int = 0
    offset: int = 0
    constant: int = 0
    label: str = ""
    map: Map | None = None
    wide: bool = False  # takes the place of two: a constant of 64 bits


@dataclass(frozen=True)
class Label:
    """A place to jump to, from above only."""

    name: str


Code = Instruction | Label


@dataclass(frozen=True)
class Reg:
    """A register as an operand, where a number would be a constant."""

    number: int


def alu(destination: int, operation: str, operand: int | Reg) -> Instruction:
    """destination OPERATION operand, on 64 bits: "=", "+=", "&=" and so on; a constant has 32, signed."""
    return _operate(0x07, destination, operation, operand)


def alu32(destination: int, operation: str, operand: int | Reg) -> Instruction:
    """The same on the low 32 bits; the high ones become 0."""
    return _operate(0x04, destination, operation, operand)


def _operate(kind: int, destination: int, operation: str, operand: int | Reg) -> Instruction:
    opcode = kind | _ALU[operation]
    if isinstance(operand, Reg):
        return Instruction(opcode | _BY_REGISTER, destination, operand.number)
    return Instruction(opcode, destination, constant=operand)


def load(destination: int, size: int, base: int, offset: int) -> Instruction:
    """destination = the integer of `size` bytes at base + offset, unsigned."""
    return Instruction(0x61 | _SIZE[size], destination, base, offset)


def store(base: int, offset: int, size: int, operand: int | Reg) -> Instruction:
    """The integer of `size` bytes at base + offset = operand."""
    if isinstance(operand, Reg):
        return Instruction(0x63 | _SIZE[size], base, operand.number, offset)
    return Instruction(0x62 | _SIZE[size], base, 0, offset, operand)


def jump(label: str) -> Instruction:
    """Go on at the label."""
    return Instruction(_JA, label=label)


def jump_if(register: int, comparison: str, operand: int | Reg, label: str) -> Instruction:
    """Go on at the label if it is so; "s>" and the like compare signed, "&" is true of any common bit."""
    opcode = 0x05 | _JUMP[comparison]
    if isinstance(operand, Reg):
        return Instruction(opcode | _BY_REGISTER, register, operand.number, label=label)
    return Instruction(opcode, register, constant=operand, label=label)


def call(helper: Helper) -> Instruction:
    """R0 = helper(R1, R2, ...)."""
    return Instruction(_CALL, constant=helper)


def load_map(register: int, of: Map) -> Instruction:
    """register = the map, for a helper."""
    return Instruction(_LOAD_64, register, _MAP_FD, map=of, wide=True)


def load_constant(register: int, value: int) -> Instruction:
    """register = a value of 64 bits."""
    return Instruction(_LOAD_64, register, constant=value, wide=True)


def leave() -> tuple[Code, ...]:
    """End, and let the tracepoint's record pass to others."""
    return alu(R0, "=", 1), Instruction(_EXIT)


# ---- what many programs do -----------------------------------------------------------------------


def find(of: Map, key: int, missing: str) -> tuple[Code, ...]:
    """R0 = the element whose key is on the stack, at R10 + key; go to `missing` if there is none."""
    return (
        load_map(R1, of),
        alu(R2, "=", Reg(R10)),
        alu(R2, "+=", key),
        call(Helper.MAP_LOOKUP_ELEM),
        jump_if(R0, "==", 0, missing),
    )


def find_scratch(of: Map, missing: str) -> tuple[Code, ...]:
    """R0 = this CPU's element of a scratch map. Uses the topmost 4 bytes of the stack."""
    return store(R10, -4, 4, 0), *find(of, -4, missing)


def read(
    helper: Helper, base: int, offset: int, size: int | Reg, source: int, at: int = 0
) -> tuple[Code, ...]:
    """R0 = helper(base + offset, size, source + at), one of the PROBE_READ helpers."""
    return (
        alu(R3, "=", Reg(source)),
        *((alu(R3, "+=", at),) if at else ()),
        alu(R2, "=", size),
        alu(R1, "=", Reg(base)),
        *((alu(R1, "+=", offset),) if offset else ()),
        call(helper),
    )


def emit(context: int, data: int, size: int | Reg) -> tuple[Code, ...]:
    """Hand `size` bytes at `data` to this CPU's perf event of OUTPUT."""
    return (
        alu(R5, "=", size),
        alu(R4, "=", Reg(data)),
        alu32(R3, "=", -1),  # BPF_F_CURRENT_CPU: all 32 bits
        load_map(R2, OUTPUT),
        alu(R1, "=", Reg(context)),
        call(Helper.PERF_EVENT_OUTPUT),
    )


# ---- a program -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A program for a tracepoint; `name` is what bpftool shows: 15 letters, digits, underscores at most."""

    name: str
    code: tuple[Code, ...]

    @property
    def maps(self) -> tuple[Map, ...]:
        """The maps it uses, each once."""
        used = (one.map for one in self.code if isinstance(one, Instruction) and one.map is not None)
        return tuple(dict.fromkeys(used))

    def render(self, descriptors: Mapping[Map, int]) -> bytes:
        """The instructions as the kernel takes them. ValueError if it jumps nowhere, backwards or too far."""
        places: dict[str, int] = {}
        at = 0
        for one in self.code:
            if isinstance(one, Label):
                if one.name in places:
                    raise ValueError(f"{self.name}: two labels {one.name!r}")
                places[one.name] = at
            else:
                at += 2 if one.wide else 1
        out = bytearray()
        for one in self.code:
            if isinstance(one, Label):
                continue
            if one.label:
                distance = places.get(one.label, -1) - len(out) // 8 - 1
                if not 0 <= distance < 1 << 15:
                    raise ValueError(f"{self.name}: no label {one.label!r} further down")
                out += self._encode(replace(one, offset=distance), descriptors)
            else:
                out += self._encode(one, descriptors)
        return bytes(out)

    def _encode(self, one: Instruction, descriptors: Mapping[Map, int]) -> bytes:
        low, high = one.destination, one.source
        registers = low | high << 4 if sys.byteorder == "little" else high | low << 4
        constant = one.constant if one.map is None else descriptors[one.map]
        if one.wide:
            first, second = struct.unpack("=ii", struct.pack("=Q", constant & (1 << 64) - 1))
            if sys.byteorder == "big":
                first, second = second, first
            return _INSTRUCTION.pack(one.opcode, registers, 0, first) + _INSTRUCTION.pack(0, 0, 0, second)
        return _INSTRUCTION.pack(one.opcode, registers, one.offset, constant)


def record_format(name: str, /, **fields: str) -> tuple[Format, int]:
    """The format of a record that a program makes, and its size: its fields in order, by name.

    A field is "s32", "u64" and so on, "char" for text behind the record, where the program writes its place
    as in __data_loc: offset | length << 16, the NUL included; or "u8" with a number, as in "u8[110]", for a
    block of bytes. Each is aligned to its size.
    """
    made = []
    at = 0
    for field_name, what in fields.items():
        if what == "char":
            at = at + 3 & ~3
            made.append(Field(field_name, "char", at, 4, False, Kind.DATA_LOC, 1, False, 0))
            at += 4
        elif what.endswith("]"):
            count = int(what.removesuffix("]").removeprefix("u8["))
            made.append(Field(field_name, "u8", at, count, False, Kind.ARRAY, 1, False, count))
            at += count
        else:
            size, signed = int(what[1:]) // 8, what[0] == "s"
            at = at + size - 1 & -size
            made.append(Field(field_name, what, at, size, signed, Kind.INTEGER, size, signed, 0))
            at += size
    return Format(name, 0, tuple(made)), at + 7 & ~7


# ---- in the kernel -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attachment:
    """A program, and the id of the tracepoint it is to run at."""

    tracepoint: int
    program: Program


@dataclass
class Loaded:
    """Programs in the kernel, and the maps that they share. Close it; close is idempotent."""

    family: str
    maps: dict[Map, int] = field(default_factory=dict)
    programs: list[tuple[int, int]] = field(default_factory=list)  # tracepoint, descriptor

    def set_output(self, cpu: int, fd: int | None) -> None:
        """What is emitted on this CPU goes to this perf event from now on; None: nowhere."""
        key = cpu.to_bytes(4, sys.byteorder)
        value = ffi.NULL if fd is None else fd.to_bytes(4, sys.byteorder)
        result = lib.rs_bpf_map_set(self.maps[OUTPUT], key, value)
        if result < 0 and fd is not None:
            raise KernelError(f"output of {self.family} on CPU {cpu}", -result)

    def inherit(self, other: Loaded) -> None:
        """Take over what others, whose place these take, have kept; both may use it from now on."""
        for one, from_ in other.maps.items():
            if not one.kept or one not in self.maps:
                continue
            value = ffi.new("uint8_t[]", one.value_size)
            for key in _keys(one, from_):
                if lib.rs_bpf_map_get(from_, key, value) == 0:
                    lib.rs_bpf_map_set(self.maps[one], key, value)
                    if lib.rs_bpf_map_get(from_, key, value) != 0:  # it was used up meanwhile
                        lib.rs_bpf_map_set(self.maps[one], key, ffi.NULL)

    def missed(self) -> int:
        """How often a program did not run, another running on that CPU; 0 where the kernel does not count."""
        return sum(max(0, lib.rs_bpf_missed(fd)) for _, fd in self.programs)

    def close(self) -> None:
        """Give up all descriptors: what is attached runs on, but has nowhere to write to."""
        for fd in (*self.maps.values(), *(fd for _, fd in self.programs)):
            os.close(fd)
        self.maps.clear()
        self.programs.clear()


def load_programs(family: str, attachments: Sequence[Attachment]) -> Loaded:
    """Hand programs to the kernel; maps that several use are one. UnservableError if it refuses."""
    loaded = Loaded(family)
    try:
        for one in dict.fromkeys((OUTPUT, *(used for each in attachments for used in each.program.maps))):
            loaded.maps[one] = _create(family, one)
        for each in attachments:
            fd = _load(family, each.program.name, each.program.render(loaded.maps))
            loaded.programs.append((each.tracepoint, fd))
    except BaseException:
        loaded.close()
        raise
    return loaded


def _keys(one: Map, fd: int) -> list[bytes]:
    """The keys in a map that others are changing."""
    found: list[bytes] = []
    key = ffi.new("uint8_t[]", one.key_size)
    result = lib.rs_bpf_map_next(fd, ffi.NULL, key)
    while result == 0 and len(found) < one.entries:
        found.append(bytes(ffi.buffer(key)))
        result = lib.rs_bpf_map_next(fd, found[-1], key)
    return found


def possible_cpus(path: Path = _POSSIBLE) -> int:
    """How many CPUs there may ever be: one more than the highest number, from a list such as "0-3,8"."""
    return int(path.read_text().strip().replace(",", "-").rsplit("-", 1)[-1]) + 1


def _create(family: str, one: Map) -> int:
    entries = one.entries or possible_cpus()
    result = lib.rs_bpf_map(one.type, one.key_size, one.value_size, entries)
    if result == -errno.EPERM:  # before 5.11 a map counts as locked memory
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        result = lib.rs_bpf_map(one.type, one.key_size, one.value_size, entries)
    if result < 0:
        raise _refused(family, f"a bpf map ({one.name})", -result)
    return int(result)


def _load(family: str, name: str, code: bytes) -> int:
    result = lib.rs_bpf_program(name.encode(), code, len(code) // 8, ffi.NULL, 0)
    if result >= 0:
        return int(result)
    log = ffi.new("uint8_t[]", _LOG)
    again = lib.rs_bpf_program(name.encode(), code, len(code) // 8, log, _LOG)
    if again >= 0:  # it was short of memory, or interrupted
        return int(again)
    said = bytes(ffi.buffer(log)).split(b"\0", 1)[0].decode("utf-8", "replace")
    raise _refused(family, f"the bpf program {name}", -again, said.splitlines())


def _refused(family: str, what: str, number: int, said: Iterable[str] = ()) -> UnservableError:
    if number == errno.EPERM:  # the verifier's own no is EACCES
        return UnservableError(
            family,
            "bpf(2) is not permitted",
            "CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, and a seccomp profile that lets bpf pass",
        )
    lines = [line.strip() for line in said if line.strip() and not line.startswith("processed ")]
    why = "; ".join(lines[-_LOG_KEPT:])
    return UnservableError(
        family, f"the kernel refuses {what}: {os.strerror(number)}" + (f": {why}" if why else "")
    )
