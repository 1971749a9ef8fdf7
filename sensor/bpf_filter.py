"""An expression as instructions of a bpf program: what nobody wants is not even written to a ring.

As with the kernel's filters (program.py), the instructions are a necessary condition: they never refuse a
record that the expression accepts, and C decides who gets it. Left to C are texts beyond their first and
last bytes, sets and stars in the middle of a pattern, and texts that must differ.

The record is complete by then, at R7; R8 says how many bytes there are of what comes behind its fixed part,
at `behind`. The code uses R0 to R2 and keeps the others.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from . import bpf
from .bpf import R1, R2, R7, R8, Code, Label, Reg
from .expression import FALSE, And, Const, Op, Or, Predicate, glob_of, predicates
from .glob import STAR, literal
from .program import Kind, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .expression import Expression
    from .glob import Glob, Place
    from .program import FieldInfo, Fields

MOST_PREDICATES = (
    256  # beyond that C decides alone: 5.2 is the first kernel that takes more than 4096 instructions
)
_MOST_CODE = 3000
_MOST_TEXT = 64  # bytes that are compared at each end
_OTHERWISE = {Op.LT: ">=", Op.LE: ">", Op.GT: "<=", Op.GE: "<", Op.EQ: "!=", Op.NE: "=="}


def condition(expression: Expression, fields: Fields, behind: int, refused: str) -> tuple[Code, ...]:
    """Code that goes on at `refused` where the expression is surely false; none if it says nothing."""
    if len(predicates(expression)) > MOST_PREDICATES:  # guards, too, count among them, or it is surely false
        return ()
    resolved = resolve(expression, fields)
    if resolved == FALSE:
        # no plain jump, behind which nothing could be reached
        return (bpf.alu(R1, "=", 0), bpf.jump_if(R1, "==", 0, refused))
    compiler = _Compiler(fields, behind)
    code = compiler.emit(resolved, "wanted", refused)
    if compiler.predicates > MOST_PREDICATES or len(code) > _MOST_CODE or not compiler.predicates:
        return ()
    return (*code, Label("wanted"))


class _Compiler:
    def __init__(self, fields: Fields, behind: int) -> None:
        self.fields = fields
        self.behind = behind
        self.labels = 0
        self.predicates = 0

    def label(self) -> str:
        self.labels += 1
        return f"filter{self.labels}"

    def emit(self, expression: Expression, yes: str, no: str) -> tuple[Code, ...]:
        """Always ends in a jump to one of both."""
        match expression:
            case Const(value):
                return (bpf.jump(yes if value else no),)
            case And(terms) | Or(terms):
                code: list[Code] = []
                for term in terms[:-1]:
                    label = self.label()
                    code += (
                        self.emit(term, label, no)
                        if isinstance(expression, And)
                        else self.emit(term, yes, label)
                    )
                    code.append(Label(label))
                return (*code, *self.emit(terms[-1], yes, no))
            case Predicate():
                self.predicates += 1
                info = self.fields[expression.field]
                said = self.integer if info.kind is Kind.INT else self.text
                return (*said(expression, info, no), bpf.jump(yes))

    def integer(self, predicate: Predicate, info: FieldInfo, no: str) -> Sequence[Code]:
        """Falls through if it may be so."""
        code: list[Code] = []
        offset = info.offset
        if info.side:  # only if it came along
            code.append(bpf.jump_if(R8, "<", offset + info.size, no))
            offset += self.behind
        if info.swapped:
            order = range(info.size) if sys.byteorder == "little" else reversed(range(info.size))
            code.append(bpf.alu(R1, "=", 0))
            for at in order:
                code += [
                    bpf.load(R2, 1, R7, offset + at),
                    bpf.alu(R1, "<<=", 8),
                    bpf.alu(R1, "|=", Reg(R2)),
                ]
        else:
            code.append(bpf.load(R1, info.size, R7, offset))
        if info.signed and info.size < 8:
            code += [bpf.alu(R1, "<<=", 64 - 8 * info.size), bpf.alu(R1, "s>>=", 64 - 8 * info.size)]
        code.append(bpf.load_constant(R2, predicate.number))
        if predicate.op is Op.BITS:
            if info.signed and info.size < 8:  # the mask is of the field's own bits
                code[-1] = bpf.load_constant(R2, predicate.number & (1 << 8 * info.size) - 1)
            label = self.label()
            return [*code, bpf.jump_if(R1, "&", Reg(R2), label), bpf.jump(no), Label(label)]
        otherwise = _OTHERWISE[predicate.op]
        if info.signed and otherwise not in ("==", "!="):
            otherwise = "s" + otherwise
        return [*code, bpf.jump_if(R1, otherwise, Reg(R2), no)]

    def text(self, predicate: Predicate, info: FieldInfo, no: str) -> Sequence[Code]:
        if predicate.op is Op.NE:
            return []
        glob = glob_of(predicate)
        head: Glob = glob[: glob.index(STAR)] if STAR in glob else glob
        at = self.behind
        code: list[Code] = []
        if info.kind is not Kind.DATA_LOC:  # in a block, which may end without a NUL
            if info.abstract and head and head[0] is not None and ord("@") in head[0]:
                head = (None, *head[1:])  # a NUL there
            if head:
                code.append(bpf.jump_if(R8, "<", info.offset + len(head), no))
            return [*code, *_compare(head, R7, at + info.offset, no)]
        tail: Glob = glob[len(glob) - glob[::-1].index(STAR) :] if STAR in glob else ()
        least = sum(place is not STAR for place in glob) + 1  # with the NUL
        code.append(bpf.jump_if(R8, "<", least, no) if STAR in glob else bpf.jump_if(R8, "!=", least, no))
        if literal(glob) is not None and len(glob) > 2 * _MOST_TEXT:
            head, tail = glob[:_MOST_TEXT], glob[-_MOST_TEXT:]
        code += _compare(head[:_MOST_TEXT], R7, at, no)
        tail = tail[-_MOST_TEXT:]
        if tail:
            # R1 = where the tail begins: R7 + what there is - tail and NUL
            code += [
                bpf.alu(R1, "=", Reg(R8)),
                bpf.alu(R1, "-=", len(tail) + 1),
                bpf.alu(R1, "+=", Reg(R7)),
                *_compare(tail, R1, at, no),
            ]
        return code


def _compare(glob: Glob, base: int, at: int, no: str) -> Sequence[Code]:
    """The bytes at base + at against places of which those that are one byte count."""
    code: list[Code] = []
    index = 0
    while index < len(glob):
        if not _is_byte(glob[index]):
            index += 1
            continue
        run = 1
        while index + run < len(glob) and _is_byte(glob[index + run]):
            run += 1
        size = next(size for size in (8, 4, 2, 1) if size <= run)
        want = bytes(next(iter(place)) for place in glob[index : index + size] if place)
        code.append(bpf.load(R2, size, base, at + index))
        value = int.from_bytes(want, sys.byteorder)
        if size == 8:
            code += [bpf.load_constant(0, value), bpf.jump_if(R2, "!=", Reg(0), no)]
        elif value >> 31:
            code += [bpf.alu32(0, "=", value - (1 << 32)), bpf.jump_if(R2, "!=", Reg(0), no)]
        else:
            code.append(bpf.jump_if(R2, "!=", value, no))
        index += size
    return code


def _is_byte(place: Place) -> bool:
    return place is not None and len(place) == 1
