"""An expression made ready for one kernel event: a filter for the kernel, tests for C.

The kernel decides what its filter language can say (tracefs/filter.py). What it can't say, or
can't be trusted with, is the residual: user space decides it. The kernel's part is then a
necessary condition, it never refuses a record that the expression accepts:

- a string too long for the kernel is cut to a pattern that begins like it, and where both kinds
  of quotation marks occur, any byte may stand for one of them;
- integers in network byte order compare by == and != only, with the value swapped;
- an int in the 8-byte slot of a system call argument has anything above it: only single bits
  can be asked for;
- a term of an AND that can't be said is left out, an OR with such a term is left out whole.

Constants that decide nothing are folded here, so every test that C gets can go either way, and
a field that only some records have (a port, if the address is an IPv4 one) brings its guard.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from enum import Enum, IntEnum, IntFlag
from typing import TYPE_CHECKING, TypeAlias

from .expression import (
    FALSE,
    TRUE,
    And,
    Const,
    Expression,
    Op,
    Or,
    Predicate,
    all_of,
    any_of,
    evaluate,
    glob_of,
)
from .glob import ANY, STAR, Glob, glob_match, impossible, literal, render, render_place
from .tracefs.filter import ALWAYS, MAX_FILTER_STRING, MAX_FILTER_TEXT, NEVER, CannotSay, compare, equals
from .tracefs.filter import all_of as all_of_filters
from .tracefs.filter import any_of as any_of_filters
from .tracefs.filter import glob as kernel_glob
from .tracefs.format import Kind as FormatKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .tracefs.filter import Filter
    from .tracefs.format import Field, Format


class Kind(Enum):
    """How a record holds a field."""

    INT = "int"  # 1, 2, 4 or 8 bytes
    CHARS = "chars"  # text of at most `size` bytes, ends at NUL
    DATA_LOC = "data_loc"  # u32 length << 16 | offset of a text behind the record


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """Where a record holds a field that callers may compare, and how.

    `kernel` is the field that the kernel's filter compares, None where it sees none. Records have the field
    only where `guard` holds. `may_fault`: a fetcharg that can fail to read its text; what the
    kernel's filter makes of such a record is chance. `abstract`: a leading NUL reads as `@`.
    `side`: the field is in the side buffer (memory read after the record), not in the record.
    """

    kind: Kind
    offset: int
    size: int
    signed: bool = False
    swapped: bool = False
    kernel: Field | None = None
    guard: Expression = TRUE
    may_fault: bool = False
    abstract: bool = False
    side: bool = False

    @property
    def holds(self) -> type[int | str]:
        """The type of the field's values, as from_message() wants to know it."""
        return int if self.kind is Kind.INT else str

    @property
    def range(self) -> tuple[int, int]:
        """The least and the greatest integer that the field can hold."""
        bits = 8 * self.size
        return (-(1 << bits - 1), (1 << bits - 1) - 1) if self.signed else (0, (1 << bits) - 1)

    @classmethod
    def of(cls, field: Field) -> FieldInfo | None:
        """What a format file says of a field; None for arrays and structs, which don't compare."""
        if field.kind in (FormatKind.INTEGER, FormatKind.POINTER, FormatKind.BOOL):
            # On little-endian machines the narrow part of a wide slot comes first.
            size = field.natural_size
            offset = field.offset if sys.byteorder == "little" else field.offset + field.size - size
            return cls(Kind.INT, offset, size, field.natural_signed, kernel=field)
        if field.kind is FormatKind.CHARS:
            return cls(Kind.CHARS, field.offset, field.size, kernel=field)
        if field.kind is FormatKind.DATA_LOC and field.is_string:
            return cls(Kind.DATA_LOC, field.offset, field.size, kernel=field)
        return None


Fields: TypeAlias = "Mapping[str, FieldInfo]"


def fields_of(record: Format) -> dict[str, FieldInfo]:
    """All comparable fields of an event, under the names of its format file."""
    found = ((field.name, FieldInfo.of(field)) for field in record.fields)
    return {name: info for name, info in found if info is not None}


# ---- what every record of the event decides alike


def resolve(expression: Expression, fields: Fields) -> Expression:
    """The same expression for records with these fields: guards joined, constants folded.

    KeyError for a field that the event does not have: from_message() checks that.
    """
    match expression:
        case Const():
            return expression
        case And(terms):
            return all_of(resolve(term, fields) for term in terms)
        case Or(terms):
            return any_of(resolve(term, fields) for term in terms)
        case Predicate():
            info = fields[expression.field]
            fold = _fold_int if info.kind is Kind.INT else _fold_text
            return all_of([resolve(info.guard, fields), fold(expression, info)])


def _fold_int(predicate: Predicate, info: FieldInfo) -> Expression:
    value = predicate.number
    low, high = info.range
    if predicate.op is Op.BITS:
        bits = 8 * info.size
        mask = value & ((1 << bits) - 1)
        if info.signed and value >> bits:  # bits above the field are copies of its sign
            mask |= 1 << bits - 1
        return Predicate(Op.BITS, predicate.field, mask) if mask else FALSE
    always, never = {
        Op.EQ: (False, not low <= value <= high),
        Op.NE: (not low <= value <= high, False),
        Op.LT: (value > high, value <= low),
        Op.LE: (value >= high, value < low),
        Op.GT: (value < low, value >= high),
        Op.GE: (value <= low, value > high),
    }[predicate.op]
    return TRUE if always else FALSE if never else predicate


def _fold_text(predicate: Predicate, info: FieldInfo) -> Expression:
    glob = glob_of(predicate)
    # A text of the record has no NUL and, in a fixed array, no more bytes than that.
    never = impossible(glob) or (info.kind is Kind.CHARS and sum(p is not STAR for p in glob) > info.size)
    if predicate.op is Op.NE:
        return TRUE if never else predicate
    if never or glob == (STAR,):
        return FALSE if never else TRUE
    text = literal(glob)
    return predicate if text is None else Predicate(Op.EQ, predicate.field, _to_str(text))


def _to_str(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


# ---- for the kernel


@dataclass(frozen=True, slots=True)
class Split:
    """An expression in two parts: a record is wanted if both say so.

    `kernel` is ALWAYS where the kernel can't decide anything, `residual` is TRUE where nothing is
    left to decide. NEVER and FALSE come together: no record can be wanted.
    """

    kernel: Filter
    residual: Expression


def split(expression: Expression, fields: Fields, max_text: int = MAX_FILTER_TEXT) -> Split:
    """The expression as far as the kernel can say it in a text of `max_text` bytes, and the rest."""
    resolved = resolve(expression, fields)
    if resolved == FALSE:
        return Split(NEVER, FALSE)
    said, exact = _say(resolved, fields)
    if _fits(said, max_text):
        return Split(said, TRUE if exact else _rest(resolved, fields))
    if not isinstance(resolved, And):
        return Split(ALWAYS, resolved)
    # Of what is too long together, the shortest terms: that's most of them.
    kept: list[Filter] = []
    certain: set[Expression] = set()
    for term in sorted(resolved.terms, key=lambda term: len(str(term))):
        said, exact = _say(term, fields)
        if _fits(all_of_filters([*kept, said]), max_text):
            kept.append(said)
            certain.update([term] if exact else [])
    return Split(all_of_filters(kept), all_of(term for term in resolved.terms if term not in certain))


def _fits(said: Filter, max_text: int) -> bool:
    try:
        return len(os.fsencode(said.text)) <= max_text
    except CannotSay:
        return False


def _say(expression: Expression, fields: Fields) -> tuple[Filter, bool]:
    """A necessary condition in the kernel's words, ALWAYS if there is none, and whether it is exact."""
    match expression:
        case And(terms) | Or(terms):
            said = [_say(term, fields) for term in terms]
            join = all_of_filters if isinstance(expression, And) else any_of_filters
            return join(text for text, _ in said), all(exact for _, exact in said)
        case Predicate():
            info = fields[expression.field]
            if info.kernel is None or info.side:
                return ALWAYS, False
            say = _say_int if info.kind is Kind.INT else _say_text
            try:
                return say(expression, info, info.kernel)
            except CannotSay:
                return ALWAYS, False
        case Const():
            return (ALWAYS if expression.value else NEVER), True


def _rest(expression: Expression, fields: Fields) -> Expression:
    """What the kernel's words for the expression leave open."""
    if _say(expression, fields)[1]:
        return TRUE
    if isinstance(expression, And):
        return all_of(_rest(term, fields) for term in expression.terms)
    return expression


def _say_int(predicate: Predicate, info: FieldInfo, kernel: Field) -> tuple[Filter, bool]:
    ordered = predicate.op not in (Op.EQ, Op.NE, Op.BITS)
    if kernel.size != info.size and (predicate.op is not Op.BITS or info.swapped):
        return ALWAYS, False
    if ordered and (info.swapped or kernel.signed != info.signed):
        return ALWAYS, False
    value = predicate.number & ((1 << 8 * info.size) - 1)
    if info.swapped:
        value = int.from_bytes(value.to_bytes(info.size, "little"), "big")
    if kernel.signed and value >> 8 * kernel.size - 1:
        value -= 1 << 8 * kernel.size
    return compare(kernel, predicate.op.value, value), True


def _say_text(predicate: Predicate, info: FieldInfo, kernel: Field) -> tuple[Filter, bool]:
    exact = not info.may_fault
    glob = glob_of(predicate)
    if info.abstract and (not glob or glob[0] is STAR or ord("@") in glob[0]):
        # The kernel sees an abstract name as the empty string.
        if predicate.op is Op.NE:
            return ALWAYS, False
        return any_of_filters([_say_glob(kernel, glob)[0], equals(kernel, b"")]), False
    if predicate.op in (Op.EQ, Op.NE):
        try:
            return equals(kernel, predicate.text, negated=predicate.op is Op.NE), exact
        except CannotSay:
            if predicate.op is Op.NE:
                raise
    said, complete = _say_glob(kernel, glob)
    return said, exact and complete


def _say_glob(kernel: Field, glob: Glob) -> tuple[Filter, bool]:
    """The glob for the kernel, and False if it had to be made weaker."""
    complete = True
    pattern = render(glob)
    if b'"' in pattern and b"'" in pattern:
        glob = tuple(ANY if place is not STAR and b'"' in render_place(place) else place for place in glob)
        complete, pattern = False, render(glob)
    # one byte less than the kernel takes: an escape may be put in front
    while len(pattern) >= MAX_FILTER_STRING:
        glob = (*glob[: -2 if glob[-1] is STAR else -1], STAR)
        complete, pattern = False, render(glob)
    return kernel_glob(kernel, pattern), complete


# ---- for C


class TestKind(IntEnum):
    """RS_TEST_*: what is compared."""

    __test__ = False  # not for pytest

    INT = 0
    TEXT = 1


class Cmp(IntEnum):
    """RS_EQ and so on: how."""

    EQ = 0
    NE = 1
    LT = 2
    LE = 3
    GT = 4
    GE = 5
    GLOB = 6
    BITS = 7


class TestFlag(IntFlag):
    """RS_SWAP and so on: what the field is like. The numbers are those of _perf.h."""

    __test__ = False

    SWAP = 2
    SIDE = 4
    ABSTRACT = 16
    SIGNED = 32
    DATA_LOC = 128


ACCEPT, REJECT = -1, -2


@dataclass(frozen=True, slots=True)
class Test:
    """One comparison: rs_test of _perf.h. `yes` and `no` are later tests, ACCEPT or REJECT.

    `value` is the integer as 64 bits, `text` the text or the pattern for glob_match(). An
    integer that reaches beyond the record compares false; such a text is cut at its end.
    """

    __test__ = False

    kind: TestKind
    cmp: Cmp
    offset: int
    size: int
    flags: TestFlag
    value: int
    text: bytes
    yes: int
    no: int


_CMP = {
    Op.EQ: Cmp.EQ,
    Op.NE: Cmp.NE,
    Op.LT: Cmp.LT,
    Op.LE: Cmp.LE,
    Op.GT: Cmp.GT,
    Op.GE: Cmp.GE,
    Op.GLOB: Cmp.GLOB,
    Op.MATCH: Cmp.GLOB,
    Op.BITS: Cmp.BITS,
}


def compile_program(expression: Expression, fields: Fields) -> tuple[Test, ...]:
    """The tests that decide the expression, in an order in which every jump goes forward.

    Empty if every record is accepted. `fields` as for split(); also takes its residual.
    """
    resolved = resolve(expression, fields)
    if resolved == TRUE:
        return ()
    if resolved == FALSE:
        flags = TestFlag(0)
        return (Test(TestKind.INT, Cmp.EQ, 0, 1, flags, 0, b"", REJECT, REJECT),)
    compiler = _Compiler(fields)
    compiler.emit(resolved, ACCEPT, REJECT)
    return compiler.finish()


class _Compiler:
    """Emits tests whose jumps are labels, then puts indexes for them."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.tests: list[Test] = []
        self.index_of = {ACCEPT: ACCEPT, REJECT: REJECT}
        self.labels = 0

    def emit(self, expression: Expression, yes: int, no: int) -> None:
        match expression:
            case Predicate():
                self.tests.append(_test(expression, self.fields[expression.field], yes, no))
            case And((*terms, last)) | Or((*terms, last)):
                for term in terms:
                    label = self.labels
                    self.labels += 1
                    if isinstance(expression, And):
                        self.emit(term, label, no)
                    else:
                        self.emit(term, yes, label)
                    self.index_of[label] = len(self.tests)
                self.emit(last, yes, no)

    def finish(self) -> tuple[Test, ...]:
        return tuple(
            replace(test, yes=self.index_of[test.yes], no=self.index_of[test.no]) for test in self.tests
        )


def _test(predicate: Predicate, info: FieldInfo, yes: int, no: int) -> Test:
    flags = TestFlag(0)
    for flag, wanted in (
        (TestFlag.SWAP, info.swapped),
        (TestFlag.SIDE, info.side),
        (TestFlag.ABSTRACT, info.abstract),
        (TestFlag.SIGNED, info.signed),
        (TestFlag.DATA_LOC, info.kind is Kind.DATA_LOC),
    ):
        if wanted:
            flags |= flag
    cmp = _CMP[predicate.op]
    if isinstance(predicate.value, int):
        value = predicate.value & ((1 << 64) - 1)
        return Test(TestKind.INT, cmp, info.offset, info.size, flags, value, b"", yes, no)
    text = render(glob_of(predicate)) if cmp is Cmp.GLOB else predicate.text
    return Test(TestKind.TEXT, cmp, info.offset, info.size, flags, 0, text, yes, no)


def run_program(tests: Sequence[Test], record: bytes, side: bytes = b"") -> bool:
    """What C's rs_tests_run() decides: the oracle of its tests."""
    at = 0 if tests else ACCEPT
    while at >= 0:
        test = tests[at]
        data = side if test.flags & TestFlag.SIDE else record
        if test.kind is TestKind.INT:
            holds = _int_holds(test, data)
        else:
            text = _text_at(data, test.offset, test.size, test.flags)
            if test.cmp is Cmp.GLOB:
                holds = glob_match(test.text, text)
            else:
                holds = (text == test.text) is (test.cmp is Cmp.EQ)
        at = test.yes if holds else test.no
    return at == ACCEPT


def _int_holds(test: Test, data: bytes) -> bool:
    have = _int_at(data, test.offset, test.size, test.flags)
    if have is None:
        return False
    want = test.value
    if test.flags & TestFlag.SIGNED and want >> 63:
        want -= 1 << 64
    match test.cmp:
        case Cmp.EQ:
            return have == want
        case Cmp.NE:
            return have != want
        case Cmp.LT:
            return have < want
        case Cmp.LE:
            return have <= want
        case Cmp.GT:
            return have > want
        case Cmp.GE:
            return have >= want
        case Cmp.BITS:
            return have & want != 0
    return False


def _int_at(data: bytes, offset: int, size: int, flags: TestFlag) -> int | None:
    own = data[offset : offset + size]
    if len(own) < size:
        return None
    if flags & TestFlag.SWAP:
        own = own[::-1]
    return int.from_bytes(own, sys.byteorder, signed=bool(flags & TestFlag.SIGNED))


def _text_at(data: bytes, offset: int, size: int, flags: TestFlag) -> bytes:
    if flags & TestFlag.DATA_LOC:
        word = _int_at(data, offset, 4, TestFlag(0)) or 0
        offset, size = word & 0xFFFF, word >> 16
    own = data[offset : offset + size]
    if flags & TestFlag.ABSTRACT and own[:1] == b"\0":
        own = b"@" + own[1:]
    return own.split(b"\0", 1)[0]


def read_fields(fields: Fields, record: bytes, side: bytes = b"") -> dict[str, int | bytes | None]:
    """The values of a record's fields for evaluate(); None for one whose guard does not hold."""
    values: dict[str, int | bytes | None] = {}
    for name, info in fields.items():
        flags = _test(Predicate(Op.EQ, name, info.holds()), info, 0, 0).flags
        data = side if info.side else record
        read = _int_at if info.kind is Kind.INT else _text_at
        values[name] = read(data, info.offset, info.size, flags)
    present = {name: evaluate(info.guard, values) for name, info in fields.items()}
    return {name: value if present[name] else None for name, value in values.items()}
