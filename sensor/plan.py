"""Plans: how one kernel record becomes the body of one event.

An event family says, in a table, which field of the message comes from where:

    {"syscall": {"type": SyscallEventType.ENTER, "id": Kernel("id"), "arg0": Kernel("args", 0)}}

`compile_plan` joins the table with the record's format (offsets, sizes, signs of this very kernel) and
the message's metadata (numbers and types) into a flat list of operations, which C runs for each record
(rs_plan_run in _perf.c) and `Plan.run` runs in Python, to check the C against.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import betterproto2

from . import wire
from .errors import UnservableError
from .tracefs.format import Field as RecordField
from .tracefs.format import Format, Kind

_INTEGERS = (Kind.INTEGER, Kind.BOOL, Kind.POINTER, Kind.ARRAY)
_NARROW = (
    betterproto2.TYPE_INT32,
    betterproto2.TYPE_UINT32,
    betterproto2.TYPE_SINT32,
    betterproto2.TYPE_ENUM,
)
_MAP_KEY, _MAP_VALUE = b"\x0a", b"\x12"  # fields 1 and 2 of every map entry
SIDE_ROOM = 4096  # PATH_MAX: the most that is fetched of a caller's memory for an event


class OpCode(IntEnum):
    """The operations of a plan, numbered as in _perf.h."""

    CONST = 0
    UINT = 1
    INT = 2
    ZIGZAG = 3
    BOOL = 4
    RAW = 5
    CHARS = 6
    STRING = 7
    BYTES = 8
    BLOCK = 9
    BEGIN = 10
    END = 11
    UNLESS = 12
    TEXTS = 13
    FETCHED = 14


KEEP_ZERO, SWAP, SIDE, ABSTRACT, SIGNED, FAULTY = 1, 2, 4, 16, 32, 64
FETCH_32, FETCH_WITHIN = 1, 2
_FAULT = b"(fault)"


class FetchKind(IntEnum):
    """What the courier reads of the caller's memory: RS_FETCH_* of _perf.h."""

    ARGUMENTS = 0
    TEXT = 1
    BLOCK = 2
    NAME = 3


@dataclass(frozen=True)
class FetchSpec:
    """rs_fetch of _perf.h: what the courier reads behind a pointer in the record.

    `when`: only of records in which these integers (offset, size, value) are so.
    """

    kind: FetchKind
    offset: int = 0
    count: int = 0
    length: int = 0
    flags: int = 0
    front: int = 0
    front_offset: int = 0
    when: tuple[tuple[int, int, int], ...] = ()


# ---- what a table is made of ---------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A field of the kernel's record; `index` picks an element of an array.

    `swap` reads an integer in network byte order. `signed` overrides what the format says.
    """

    name: str
    index: int | None = None
    swap: bool = False
    signed: bool | None = None
    faulty: bool = False  # text that a probe may have failed to read
    size: int | None = None  # so many bytes of the integer, the low ones


@dataclass(frozen=True)
class Side:
    """Bytes of the memory that the enclosing Fetch has read: `size` of them at `offset`."""

    offset: int
    size: int
    swap: bool = False
    signed: bool = False
    abstract: bool = False  # text: a leading NUL is an abstract socket's, shown as '@'


@dataclass(frozen=True)
class Texts:
    """For a repeated string: each text in the memory that came with the record, to its NUL.

    What ends without one is a part of a text, and left out.
    """


@dataclass(frozen=True)
class When:
    """The fields in `then`, only if the integer `source` equals `value`, or has any of the bits in `mask`."""

    source: Kernel | Side
    value: int
    then: Table
    mask: int = 0


@dataclass(frozen=True)
class View:
    """The fields in `then`, of the block of `length` bytes that a probe fetched, from the field `block` on.

    Side() counts in it; `count` is the integer field that says how much of it is there.
    """

    block: str
    then: Table
    length: int
    count: str | None = None


@dataclass(frozen=True)
class Map:
    """A map field's entries: key and the table of each value."""

    entries: Sequence[tuple[str, Table]]


@dataclass(frozen=True)
class Front:
    """`length` bytes at `pointer` in the caller's memory, which a Fetch reads first."""

    pointer: Kernel
    length: int


@dataclass(frozen=True)
class Came:
    """The fields in `then`, only if memory of the caller came with the record: the front, if nothing else."""

    then: Table


@dataclass(frozen=True)
class Fetch:
    """The fields in `then`, only if the caller's memory at `pointer` could be read.

    Reads `length` bytes at most; as many as the integer field `count` says, if given. With a `front`, Side()
    counts from its beginning, there and here, and pointer and count may lie in it. One for each plan, or one
    for each case of the Whens around them.
    """

    pointer: str | Kernel | Side
    then: Table
    kind: FetchKind = FetchKind.BLOCK
    length: int = SIDE_ROOM
    count: str | Kernel | Side | None = None
    front: Front | None = None
    narrow: bool = False  # the caller's pointers have 4 bytes


Source = (
    Kernel | Side | int | str | bytes | Mapping[str, "Source"] | Sequence["When | Fetch | tuple[str, Source]"]
)
Table = Mapping[str, Any] | Sequence[Any]


# ---- the compiled form ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """One operation; the fields are those of rs_op in _perf.h."""

    op: OpCode
    tag: bytes = b""
    offset: int = 0
    size: int = 0
    flags: int = 0
    length: int = 0
    text: bytes = b""
    jump: int = 0
    value: int = 0


@dataclass(frozen=True)
class Plan:
    """Operations that make an event's body of a record."""

    ops: tuple[Op, ...] = field(default=())
    fetches: tuple[FetchSpec, ...] = ()
    view: tuple[int, int, int] | None = None  # offset, length, offset of the count or 0

    def run(self, raw: bytes, side: bytes = b"") -> bytes:
        """What C makes of the record and the memory that came with it."""
        return _Interpreter(raw, side).run(self.ops)


class _Compiler:
    def __init__(self, record: Format) -> None:
        self.record = record
        self.ops: list[Op] = []
        self.fetches: list[FetchSpec] = []
        self.cases: list[tuple[int, int, int]] = []  # of the Whens that we are in
        self.view: tuple[int, int, int] | None = None

    def message(self, message: type[betterproto2.Message], table: Table) -> None:
        known = wire.fields(message)
        for item in table.items() if isinstance(table, Mapping) else table:
            if isinstance(item, When):
                test = self.integer(OpCode.UNLESS, item.source, value=item.value)
                at = self.emit(replace(test, length=item.mask))
                before = list(self.cases)
                if not item.mask and not test.flags & (SIDE | SWAP):
                    self.cases.append((test.offset, test.size, test.value & (1 << 8 * test.size) - 1))
                self.message(message, item.then)
                self.cases = before
                self.land(at)
            elif isinstance(item, Fetch):
                self.add_fetch(item)
                at = self.emit(Op(OpCode.FETCHED, offset=item.front.length if item.front else 0))
                self.message(message, item.then)
                self.land(at)
            elif isinstance(item, Came | View):
                at = self.emit(self.viewed(item) if isinstance(item, View) else Op(OpCode.FETCHED))
                self.message(message, item.then)
                self.land(at)
            else:
                name, source = item
                self.put(known[name], source)

    def emit(self, op: Op) -> int:
        self.ops.append(op)
        return len(self.ops) - 1

    def land(self, at: int) -> None:
        self.ops[at] = replace(self.ops[at], jump=len(self.ops))

    def put(self, target: wire.Field, source: Any) -> None:
        if isinstance(source, Map):
            if target.message is None:
                raise TypeError(f"{target.name} is no map of messages")
            for key, table in source.entries:
                self.emit(Op(OpCode.BEGIN, target.tag))
                self.emit(Op(OpCode.CONST, text=_MAP_KEY + wire.varint(len(key.encode())) + key.encode()))
                self.emit(Op(OpCode.BEGIN, _MAP_VALUE))
                self.message(target.message, table)
                self.emit(Op(OpCode.END))
                self.emit(Op(OpCode.END))
        elif isinstance(source, Mapping | list | tuple):
            if target.message is None:
                raise TypeError(f"{target.name} is no message")
            self.emit(Op(OpCode.BEGIN, target.tag))
            self.message(target.message, source)
            self.emit(Op(OpCode.END))
        elif isinstance(source, Texts):
            self.emit(Op(OpCode.TEXTS, target.tag))
        elif isinstance(source, Kernel | Side):
            self.emit(self.value(target, source))
        else:
            self.emit(Op(OpCode.CONST, text=target.encode(source)))

    def value(self, target: wire.Field, source: Kernel | Side) -> Op:
        flags = KEEP_ZERO if target.in_oneof else 0
        if target.type in (betterproto2.TYPE_STRING, betterproto2.TYPE_BYTES):
            return replace(
                self.text(target, source), tag=target.tag, flags=self.text(target, source).flags | flags
            )
        if target.type in (betterproto2.TYPE_FIXED32, betterproto2.TYPE_FIXED64):
            op = self.integer(OpCode.RAW, source)
            size = 4 if target.type == betterproto2.TYPE_FIXED32 else 8
            return replace(op, tag=target.tag, length=size, flags=op.flags & SIDE | flags)
        code = {
            betterproto2.TYPE_SINT32: OpCode.ZIGZAG,
            betterproto2.TYPE_SINT64: OpCode.ZIGZAG,
            betterproto2.TYPE_INT32: OpCode.INT,
            betterproto2.TYPE_INT64: OpCode.INT,
            betterproto2.TYPE_BOOL: OpCode.BOOL,
        }.get(target.type, OpCode.UINT)
        op = self.integer(code, source)
        width = 4 if target.type in _NARROW else 8
        if op.size > width and code is not OpCode.BOOL:  # as C converts: the low part of it
            low = op.size - width if op.flags & SWAP else 0
            op = replace(op, offset=op.offset + low, size=width)
        if op.size == width:
            signed = SIGNED if code in (OpCode.INT, OpCode.ZIGZAG) else 0
            op = replace(op, flags=op.flags & ~SIGNED | signed)
        if code is OpCode.INT and not op.flags & SIGNED:
            op = replace(op, op=OpCode.UINT)
        return replace(op, tag=target.tag, flags=op.flags | flags)

    def text(self, target: wire.Field, source: Kernel | Side) -> Op:
        is_text = target.type == betterproto2.TYPE_STRING
        if isinstance(source, Side):
            flags = SIDE | (ABSTRACT if source.abstract else 0)
            return Op(
                OpCode.CHARS if is_text else OpCode.BLOCK,
                offset=source.offset,
                length=source.size,
                flags=flags,
            )
        found = self.find(source)
        faulty = FAULTY if source.faulty else 0
        if source.index is not None:  # one of an array of strings: each has a __data_loc word
            return Op(OpCode.STRING, offset=found.offset + 4 * source.index, flags=faulty)
        if found.kind is Kind.DATA_LOC:
            return Op(OpCode.STRING if is_text else OpCode.BYTES, offset=found.offset, flags=faulty)
        code = OpCode.CHARS if is_text else OpCode.BLOCK
        return Op(code, offset=found.offset, length=found.size, flags=faulty)

    def integer(self, code: OpCode, source: Kernel | Side, value: int = 0) -> Op:
        if isinstance(source, Side):
            offset, size, signed, side = source.offset, source.size, source.signed, SIDE
        else:
            found = self.find(source)
            if found.kind not in _INTEGERS or (found.kind is Kind.ARRAY) != (source.index is not None):
                raise TypeError(f"{self.record.name}: {source} is not one integer")
            size = found.element_size if source.index is not None else found.natural_size
            signed = found.element_signed if source.index is not None else found.natural_signed
            if source.signed is not None:
                signed = source.signed
            offset, side = found.offset + (source.index or 0) * size, 0
            if source.size is not None:
                offset += size - source.size if sys.byteorder == "big" else 0
                size = source.size
        flags = side | (SWAP if source.swap else 0) | (SIGNED if signed else 0)
        return Op(code, offset=offset, size=size, flags=flags, value=value & (1 << 64) - 1)

    def add_fetch(self, item: Fetch) -> None:
        when = tuple(self.cases[-2:])
        if any(not one.when or one.when == when for one in self.fetches):
            raise TypeError(f"{self.record.name}: only one Fetch in a plan, or in a case")
        flags = (FETCH_32 if item.narrow else 0) | (FETCH_WITHIN if isinstance(item.pointer, Side) else 0)
        front, front_offset = (item.front.length, self.place(item.front.pointer)) if item.front else (0, 0)
        count = 0 if item.count is None else self.place(item.count)
        pointer = self.place(item.pointer)
        self.fetches.append(
            FetchSpec(item.kind, pointer, count, item.length, flags, front, front_offset, when)
        )

    def place(self, source: str | Kernel | Side) -> int:
        if isinstance(source, Side):
            return source.offset
        one = Kernel(source) if isinstance(source, str) else source
        found = self.find(one)
        return found.offset + (one.index * found.element_size if one.index is not None else 0)

    def viewed(self, item: View) -> Op:
        block = self.find(Kernel(item.block))
        count = 0 if item.count is None else self.find(Kernel(item.count)).offset
        self.view = (block.offset, item.length, count)
        return Op(OpCode.FETCHED)

    def find(self, source: Kernel) -> RecordField:
        found = self.record.get(source.name)
        if found is None:
            raise UnservableError(self.record.name, f"this kernel's event has no field {source.name!r}")
        return found


def compile_plan(message: type[betterproto2.Message], table: Table, record: Format) -> Plan:
    """The plan that makes the fields in `table` of `message` out of a record of this format."""
    compiler = _Compiler(record)
    compiler.message(message, table)
    merged: list[Op] = []
    targets = {op.jump for op in compiler.ops if op.jump}
    moved = []
    for at, op in enumerate(compiler.ops):
        # runs of constants become one, unless something jumps between them
        if op.op is OpCode.CONST and merged and merged[-1].op is OpCode.CONST and at not in targets:
            merged[-1] = replace(merged[-1], text=merged[-1].text + op.text)
            moved.append(len(merged) - 1)
        else:
            moved.append(len(merged))
            merged.append(op)
    moved.append(len(merged))
    ops = tuple(replace(op, jump=moved[op.jump]) if op.jump else op for op in merged)
    return Plan(ops, tuple(compiler.fetches), compiler.view)


class _Interpreter:
    """Runs a plan as rs_plan_run does."""

    def __init__(self, raw: bytes, side: bytes) -> None:
        self.raw = raw
        self.side = side

    def run(self, ops: Iterable[Op]) -> bytes:
        ops = list(ops)
        stack: list[bytearray] = [bytearray()]
        at = 0
        while at < len(ops):
            op = ops[at]
            at += 1
            out = stack[-1]
            match op.op:
                case OpCode.CONST:
                    out += op.text
                case OpCode.BEGIN:
                    out += op.tag
                    stack.append(bytearray())
                case OpCode.END:
                    body = stack.pop()
                    stack[-1] += wire.varint(len(body)) + body
                case OpCode.UNLESS:
                    have = self.integer(op)
                    if have is None or (not have & op.length if op.length else have != op.value):
                        at = op.jump
                case OpCode.TEXTS:
                    for text in map(wire.utf8, self.side.split(b"\0")[:-1]):
                        out += op.tag + wire.varint(len(text)) + text
                case OpCode.FETCHED:
                    if len(self.side) <= op.offset:
                        at = op.jump
                case OpCode.RAW:
                    data = self.base(op)[op.offset : op.offset + op.length]
                    if len(data) == op.length and (any(data) or op.flags & KEEP_ZERO):
                        out += op.tag + data
                case OpCode.CHARS | OpCode.STRING | OpCode.BYTES | OpCode.BLOCK:
                    text = self.text(op)
                    if op.flags & FAULTY and text == _FAULT:
                        continue
                    if text or op.flags & KEEP_ZERO:
                        out += op.tag + wire.varint(len(text)) + text
                case _:
                    value = self.integer(op)
                    if value is not None and (value or op.flags & KEEP_ZERO):
                        if op.op is OpCode.ZIGZAG:
                            value = wire.zigzag(value - (1 << 64) if value >> 63 else value)
                        out += op.tag + wire.varint(int(bool(value)) if op.op is OpCode.BOOL else value)
        return bytes(stack[0])

    def base(self, op: Op) -> bytes:
        return self.side if op.flags & SIDE else self.raw

    def integer(self, op: Op) -> int | None:
        data = self.base(op)[op.offset : op.offset + op.size]
        if len(data) < op.size:
            return None
        signed = op.op is OpCode.INT or bool(op.flags & SIGNED)
        return int.from_bytes(data, "big" if op.flags & SWAP else "little", signed=signed) & (1 << 64) - 1

    def text(self, op: Op) -> bytes:
        base = self.base(op)
        if op.op in (OpCode.STRING, OpCode.BYTES):
            if len(base) < op.offset + 4:
                return b""
            word = int.from_bytes(base[op.offset : op.offset + 4], "little")
            data = base[word & 0xFFFF : (word & 0xFFFF) + (word >> 16)]
        else:
            data = base[op.offset : op.offset + op.length]
        if op.op in (OpCode.BYTES, OpCode.BLOCK):
            return data
        if op.flags & ABSTRACT and data[:1] == b"\0":
            return b"@" + wire.utf8(data[1:])
        return wire.utf8(data.split(b"\0", 1)[0])
