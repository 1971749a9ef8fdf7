"""Expressions made ready for an event: the kernel's part, C's part and the meaning must agree."""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringside.sensor._perf import ffi, lib
from ringside.sensor.engine import pack_tests
from ringside.sensor.expression import (
    FALSE,
    TRUE,
    Expression,
    Op,
    Predicate,
    all_of,
    any_of,
    evaluate,
    parse,
    predicates,
)
from ringside.sensor.glob import glob_match
from ringside.sensor.program import (
    ACCEPT,
    REJECT,
    Cmp,
    FieldInfo,
    Kind,
    Test,
    TestFlag,
    TestKind,
    compile_program,
    fields_of,
    read_fields,
    resolve,
    run_program,
    split,
)
from ringside.sensor.tracefs.filter import ALWAYS, MAX_FILTER_TEXT, NEVER
from ringside.sensor.tracefs.format import Field, Format, parse_format
from ringside.sensor.tracefs.format import Kind as FormatKind

RECORD = parse_format(
    """\
name: example
ID: 1
format:
	field:unsigned short common_type;	offset:0;	size:2;	signed:0;
	field:int common_pid;	offset:4;	size:4;	signed:1;

	field:u8 u8;	offset:8;	size:1;	signed:0;
	field:s8 s8;	offset:9;	size:1;	signed:1;
	field:u16 u16;	offset:10;	size:2;	signed:0;
	field:s16 s16;	offset:12;	size:2;	signed:1;
	field:u16 family;	offset:14;	size:2;	signed:0;
	field:u32 u32;	offset:16;	size:4;	signed:0;
	field:s32 s32;	offset:20;	size:4;	signed:1;
	field:u64 u64;	offset:24;	size:8;	signed:0;
	field:long s64;	offset:32;	size:8;	signed:1;
	field:int slot;	offset:40;	size:8;	signed:0;
	field:u16 port;	offset:48;	size:2;	signed:0;
	field:char comm[8];	offset:50;	size:8;	signed:0;
	field:u8 raw[8];	offset:58;	size:8;	signed:0;
	field:__data_loc char[] path;	offset:68;	size:4;	signed:0;
	field:__data_loc char[] sun_path;	offset:72;	size:4;	signed:0;

print fmt: ""
"""
)
FIELDS: dict[str, FieldInfo] = {
    **fields_of(RECORD),
    "port": FieldInfo(Kind.INT, 48, 2, swapped=True, kernel=RECORD["port"], guard=parse("family == 2")),
    "sun_path": FieldInfo(
        Kind.CHARS, 58, 8, abstract=True, kernel=RECORD["sun_path"], guard=parse("family == 1")
    ),
    "hidden": FieldInfo(Kind.INT, 36, 2),
    "faulty": FieldInfo(Kind.DATA_LOC, 68, 4, kernel=RECORD["path"], may_fault=True),
    "memory": FieldInfo(Kind.CHARS, 0, 6, side=True),
}
del FIELDS["common_type"], FIELDS["common_pid"]


# ---- the kernel's filters, after kernel/trace/trace_events_filter.c and lib/glob.c


class KernelFilter:
    """Evaluates a filter text as the kernel would; ValueError where it would refuse it.

    AssertionError where what it says would depend on the kernel's version or on memory behind
    a string: we must never ask that.
    """

    WORDS = re.compile(rb"\s*(?:(&&|\|\||[()])|(\w+)\s*(~|!=|==|<=|<|>=|>|&)\s*(\"[^\"]*\"|'[^']*'|-?\w+))")

    def __init__(self, text: str, record: Format, raw: bytes) -> None:
        self.text, self.at, self.record, self.raw = os.fsencode(text), 0, record, raw
        if len(self.text) >= 4096:
            raise ValueError("too long")

    def run(self) -> bool:
        verdict = self.either()
        if self.text[self.at :].strip():
            raise ValueError(f"rest {self.text[self.at :]!r}")
        return verdict

    def peek(self) -> re.Match[bytes] | None:
        return self.WORDS.match(self.text, self.at)

    def take(self, sign: bytes) -> bool:
        word = self.peek()
        if word and word[1] == sign:
            self.at = word.end()
            return True
        return False

    def either(self) -> bool:
        verdict = self.both()
        while self.take(b"||"):
            verdict |= self.both()
        return verdict

    def both(self) -> bool:
        verdict = self.term()
        while self.take(b"&&"):
            verdict &= self.term()
        return verdict

    def term(self) -> bool:
        if self.take(b"("):
            verdict = self.either()
            if not self.take(b")"):
                raise ValueError("unbalanced")
            return verdict
        word = self.peek()
        if word is None or not word[2]:
            raise ValueError(f"no predicate at {self.text[self.at :]!r}")
        self.at = word.end()
        field = self.record[word[2].decode()]
        if word[4][:1] in (b'"', b"'"):
            return self.string(field, word[3].decode(), word[4][1:-1])
        return self.number(field, word[3].decode(), word[4].decode())

    def number(self, field: Field, op: str, text: str) -> bool:
        if field.kind is not FormatKind.INTEGER or op == "~":
            raise ValueError(f"{field.name} {op} {text}")
        value = int(text, 0)
        low, high = (-(1 << 63), (1 << 63) - 1) if field.signed else (0, (1 << 64) - 1)
        if not low <= value <= high or len(text) > 23:
            raise ValueError(f"{text} for {field.name}")
        # cut to the field's type
        value &= (1 << 8 * field.size) - 1
        value = int.from_bytes(value.to_bytes(field.size, "little"), "little", signed=field.signed)
        own = self.raw[field.offset : field.offset + field.size]
        have = int.from_bytes(own, sys.byteorder, signed=field.signed)
        return {
            "==": have == value,
            "!=": have != value,
            "<": have < value,
            "<=": have <= value,
            ">": have > value,
            ">=": have >= value,
            "&": have & value != 0,
        }[op]

    def string(self, field: Field, op: str, pattern: bytes) -> bool:
        if field.kind not in (FormatKind.CHARS, FormatKind.DATA_LOC) or op not in ("==", "!=", "~"):
            raise ValueError(f"{field.name} {op} {pattern!r}")
        if len(pattern) > 255:
            raise ValueError("operand too long")
        if field.kind is FormatKind.CHARS:
            offset, length = field.offset, field.size
        else:
            offset = int.from_bytes(self.raw[field.offset : field.offset + 2], sys.byteorder)
            length = int.from_bytes(self.raw[field.offset + 2 : field.offset + 4], sys.byteorder)
        own = self.raw[offset : offset + length]
        if op != "~":
            return (own.split(b"\0")[0] == pattern[:length]) is (op == "==")
        assert not pattern.startswith(b"!"), "would be inverted"
        assert not pattern[:1].isdigit(), "would be literal"
        return self.regex(own, pattern)

    @staticmethod
    def regex(own: bytes, pattern: bytes) -> bool:
        kind = "full"
        for at, byte in enumerate(pattern):
            if byte == 0x2A:
                if at == 0:
                    kind = "end"
                elif at == len(pattern) - 1:
                    kind = "middle" if kind == "end" else "front"
                else:
                    return kernel_glob_match(pattern, own)
            elif byte in b"[?\\":
                return kernel_glob_match(pattern, own)
        text = own.split(b"\0")[0]
        match kind:
            case "front":
                return text.startswith(pattern[:-1])
            case "end":
                return own[:-1].endswith(pattern[1:])
            case "middle":
                return pattern[1:-1] in own
        return text == pattern[: len(own)]


def kernel_glob_match(pattern: bytes, own: bytes) -> bool:
    pattern, text = pattern + b"\0", own + b"\0"
    at = position = 0
    back: tuple[int, int] | None = None
    while True:
        byte, place = text[position], pattern[at]
        position, at = position + 1, at + 1
        matched: bool
        if place == 0x3F:
            if byte == 0:
                return False
            matched = True
        elif place == 0x2A:
            if pattern[at] == 0:
                return True
            position -= 1
            back = (at, position)
            continue
        elif place == 0x5B:
            assert pattern[at] not in b"!^", "what it means depends on the kernel"
            matched, first = False, at
            while pattern[at] != 0x5D or at == first:
                low = high = pattern[at]
                assert low, "never closed"
                at += 1
                if pattern[at] == 0x2D and pattern[at + 1] != 0x5D:
                    high = pattern[at + 1]
                    at += 2
                matched |= low <= byte <= high
            at += 1
        else:
            if place == 0x5C:
                place, at = pattern[at], at + 1
            matched = byte == place
            if matched and byte == 0:
                return True
        if not matched:
            if byte == 0 or back is None:
                return False
            back = (back[0], back[1] + 1)
            at, position = back


# ---- records and expressions


class Sample(NamedTuple):
    raw: bytes
    side: bytes


def make_record(values: Mapping[str, object]) -> Sample:
    """A record of the example event; what is not given is zero or empty."""
    raw = bytearray(76)
    for field in RECORD.own_fields:
        value = values.get(field.name, 0)
        if field.kind is FormatKind.INTEGER and isinstance(value, int):
            order = "big" if field.name == "port" else sys.byteorder
            mask = (1 << 8 * field.size) - 1
            raw[field.offset : field.offset + field.size] = (value & mask).to_bytes(field.size, order)
    path, comm, sun = (values.get(name, b"") for name in ("path", "comm", "sun"))
    assert isinstance(path, bytes)
    assert isinstance(comm, bytes)
    assert isinstance(sun, bytes)
    raw[50:58] = comm.ljust(8, b"\0")[:8]
    raw[58:66] = sun.ljust(8, b"\0")[:8]
    for offset, text in ((68, path.split(b"\0")[0]), (72, sun[:8].split(b"\0")[0])):
        raw[offset : offset + 4] = struct.pack("=HH", len(raw), len(text) + 1)
        raw += text + b"\0"
    memory = values.get("memory", b"")
    assert isinstance(memory, bytes)
    return Sample(bytes(raw), memory)


BITS = {
    "u8": 8,
    "s8": 8,
    "u16": 16,
    "s16": 16,
    "u32": 32,
    "s32": 32,
    "u64": 64,
    "s64": 64,
    "slot": 64,
    "port": 16,
}
NEAR = [-(1 << 63), -(1 << 31), -129, -128, -2, -1, 0, 1, 2, 127, 128, 255, 256, 443, 65535, 65536, 1 << 31]
NUMBERS = st.sampled_from(
    [*NEAR, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
) | st.integers(-(1 << 63), (1 << 64) - 1)
ALPHABET = "ab0!*?[]^-\\\"'@"
TEXTS = st.text(ALPHABET, max_size=9)

SAMPLES = st.fixed_dictionaries(
    {
        name: st.sampled_from(NEAR) | st.integers(-(1 << bits - 1), (1 << bits) - 1)
        for name, bits in BITS.items()
    }
    | {"family": st.sampled_from([0, 1, 2, 2, 10])}
    # a terminated string and what an earlier, longer one has left behind its NUL
    | {"comm": st.tuples(TEXTS, TEXTS).map(lambda two: "\0".join(two).encode()[:7] + b"\0")}
    | {
        "sun": st.tuples(st.sampled_from(["", "\0", "\0\0"]), TEXTS).map(
            lambda two: "".join(two).encode()[:7]
        )
    }
    | {"path": TEXTS.map(str.encode), "memory": TEXTS.map(str.encode)}
).map(make_record)

_INT_FIELDS = [*BITS, "family", "hidden"]
_TEXT_FIELDS = ["comm", "path", "sun_path", "memory"]
_INT_OPS = [Op.EQ, Op.NE, Op.LT, Op.LE, Op.GT, Op.GE, Op.BITS]
_GLOBS = st.lists(
    st.sampled_from([*ALPHABET, "*", "*", "?", "[ab]", "[!a]", "[]!]", "[^0]", "[!-^]", "[\"']"]), max_size=6
)
PREDICATES = (
    st.builds(Predicate, st.sampled_from(_INT_OPS), st.sampled_from(_INT_FIELDS), NUMBERS)
    | st.builds(Predicate, st.sampled_from([Op.EQ, Op.NE, Op.GLOB]), st.sampled_from(_TEXT_FIELDS), TEXTS)
    | st.builds(Predicate, st.just(Op.MATCH), st.sampled_from(_TEXT_FIELDS), _GLOBS.map("".join))
)
EXPRESSIONS: st.SearchStrategy[Expression] = st.recursive(
    PREDICATES,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=4).map(all_of)
        | st.lists(inner, min_size=1, max_size=4).map(any_of)
    ),
    max_leaves=8,
)


def kernel_says(expression: Expression, sample: Sample, max_text: int = MAX_FILTER_TEXT) -> bool:
    kernel = split(expression, FIELDS, max_text).kernel
    return kernel == ALWAYS or KernelFilter(kernel.text, RECORD, sample.raw).run()


def check(expression: Expression, sample: Sample) -> None:
    """The three ways to decide an expression, for one record."""
    wanted = evaluate(expression, read_fields(FIELDS, *sample))
    assert run_program(compile_program(expression, FIELDS), *sample) == wanted, expression
    residual = compile_program(split(expression, FIELDS).residual, FIELDS)
    assert (kernel_says(expression, sample) and run_program(residual, *sample)) == wanted, expression


@given(EXPRESSIONS, SAMPLES)
def test_meaning_program_and_kernel_agree(expression: Expression, sample: Sample) -> None:
    check(expression, sample)


@settings(max_examples=40, deadline=None)
@given(SAMPLES, NUMBERS)
def test_every_comparison_of_a_number_agrees(sample: Sample, number: int) -> None:
    values = read_fields(FIELDS, *sample)
    for name in _INT_FIELDS:
        have = values[name]
        near = [have - 1, have, have + 1, have ^ 0x80] if isinstance(have, int) else []
        for op in _INT_OPS:
            for value in (number, number & 0xFFFF, *near):
                check(Predicate(op, name, value), sample)


@settings(max_examples=40, deadline=None)
@given(SAMPLES, st.integers(0, 3), st.integers(0, 3))
def test_every_comparison_of_a_text_agrees(sample: Sample, start: int, end: int) -> None:
    everything = sample.raw + b"\0" + sample.side
    for name in _TEXT_FIELDS:
        have = read_fields(FIELDS, *sample)[name]
        text = have.decode() if isinstance(have, bytes) else "a"
        part = text[start : len(text) - end]
        # also what stands behind the NUL of a fixed array
        stale = everything[55:57].decode("latin-1").replace("\0", "")
        quoted = "".join("\\" + char for char in text)
        for value in (text, part, text + "a", stale, ""):
            for op in (Op.EQ, Op.NE):
                check(Predicate(op, name, value), sample)
            for pattern in (value, f"*{value}", f"{value}*", f"*{value}*"):
                check(Predicate(Op.GLOB, name, pattern), sample)
        for pattern in (
            quoted,
            f"{quoted}*",
            f"*{quoted}",
            f"?{text[1:]}",
            f"[!{text[:1]}]*",
            f"{text}[!a]",
            "*?",
        ):
            check(Predicate(Op.MATCH, name, pattern), sample)


@given(EXPRESSIONS, SAMPLES, st.integers(10, 60))
def test_a_short_filter_refuses_nothing_that_is_wanted(
    expression: Expression, sample: Sample, limit: int
) -> None:
    parts = split(expression, FIELDS, limit)
    assert parts.kernel in (ALWAYS, NEVER) or len(os.fsencode(parts.kernel.text)) <= limit
    wanted = evaluate(expression, read_fields(FIELDS, *sample))
    left = evaluate(parts.residual, read_fields(FIELDS, *sample))
    assert (kernel_says(expression, sample, limit) and left) == wanted


@given(EXPRESSIONS)
def test_programs_only_jump_forward_and_can_go_both_ways(expression: Expression) -> None:
    program = compile_program(expression, FIELDS)
    for index, test in enumerate(program):
        assert all(
            target in (ACCEPT, REJECT) or index < target < len(program) for target in (test.yes, test.no)
        )
        assert test.yes != test.no or resolve(expression, FIELDS) == FALSE


@given(EXPRESSIONS, st.binary(max_size=120), st.binary(max_size=10))
def test_no_record_breaks_a_program(expression: Expression, raw: bytes, side: bytes) -> None:
    run_program(compile_program(expression, FIELDS), raw, side)


# ---- C

GLOB_BYTES = st.lists(
    st.sampled_from([b"a", b"b", b"*", b"?", b"[", b"]", b"!", b"-", b"\\", b"\xff", b"[a-b]", b"[!a]"]),
    max_size=12,
).map(b"".join)


@pytest.mark.asan
@given(GLOB_BYTES, st.lists(st.sampled_from([b"a", b"b", b"[", b"-", b"\xff"]), max_size=12).map(b"".join))
def test_c_matches_globs_alike(pattern: bytes, text: bytes) -> None:
    assert bool(lib.rs_glob(pattern, len(pattern), text, len(text))) == glob_match(pattern, text)


def c_says(program: tuple[Test, ...], raw: bytes, side: bytes) -> bool:
    if not program:
        return True
    array, pool = pack_tests(program)
    # copies of the exact size, for AddressSanitizer to see what is read behind them
    memory = [ffi.new("uint8_t[]", data) if data else ffi.NULL for data in (pool, raw, side)]
    own, record, beside = memory
    said = lib.rs_tests_run(array, len(program), own, len(pool), record, len(raw), beside, len(side))
    return bool(said)


@pytest.mark.asan
@given(EXPRESSIONS, SAMPLES)
def test_c_decides_alike(expression: Expression, sample: Sample) -> None:
    program = compile_program(expression, FIELDS)
    assert c_says(program, *sample) == run_program(program, *sample)


@pytest.mark.asan
@given(EXPRESSIONS, st.binary(max_size=120), st.binary(max_size=10))
def test_c_decides_alike_on_torn_records(expression: Expression, raw: bytes, side: bytes) -> None:
    program = compile_program(expression, FIELDS)
    assert c_says(program, raw, side) == run_program(program, raw, side)


@pytest.mark.asan
@settings(max_examples=40)
@given(SAMPLES)
def test_c_compares_every_number_alike(sample: Sample) -> None:
    values = read_fields(FIELDS, *sample)
    for name in _INT_FIELDS:
        have = values[name]
        for value in [have - 1, have, have + 1, have ^ 0x80, -have] if isinstance(have, int) else []:
            for op in _INT_OPS:
                program = compile_program(Predicate(op, name, value), FIELDS)
                assert c_says(program, *sample) == run_program(program, *sample)


# ---- single cases


def kernel_text(text: str, fields: dict[str, FieldInfo] = FIELDS) -> str:
    return split(parse(text), fields).kernel.text


@pytest.mark.parametrize(
    ("text", "kernel", "residual"),
    [
        ("u8 == 7", "u8 == 7", "true"),
        ("u8 < 300", "", "true"),
        ("u8 > 255 || s8 == 1", "s8 == 1", "true"),
        ("s64 == -5 && hidden == 1", "s64 == -5", "hidden == 1"),
        ("s64 == -5 || hidden == 1", "", "s64 == -5 || hidden == 1"),
        ("port == 443", f"family == 2 && port == {0xBB01}", "true"),
        ("port < 1024", "family == 2", "port < 1024"),
        ("slot == -1", "", "slot == -1"),
        ("comm == 'sh'", 'comm == "sh"', "true"),
        ("comm ~ '*sh'", 'comm ~ "*\\sh"', "true"),
        ("comm ~ '*'", "", "true"),
        ("comm == 'longer than eight'", "common_pid < 0 && common_pid > 0", "false"),
        ("path ~ '0*'", 'path ~ "\\0*"', "true"),
        ("path ~ '!*'", 'path ~ "\\!*"', "true"),
        ("""path == "a'\\"b" """, """path ~ "a'?b\"""", """path == "a'\\"b\""""),
        ("""path != "a'\\"b" """, "", """path != "a'\\"b\""""),
        ("sun_path == '@x'", 'family == 1 && (sun_path == "" || sun_path == "@x")', 'sun_path == "@x"'),
        ("sun_path == '/x'", 'family == 1 && sun_path == "/x"', "true"),
        ("faulty == 'x'", 'path == "x"', 'faulty == "x"'),
        ("memory == 'x'", "", 'memory == "x"'),
    ],
)
def test_what_the_kernel_is_told(text: str, kernel: str, residual: str) -> None:
    parts = split(parse(text), FIELDS)
    assert sorted(re.findall(r"[()]|&&|\|\||[^ ]+ [^ ]+ [^ ]+", parts.kernel.text)) == sorted(
        re.findall(r"[()]|&&|\|\||[^ ]+ [^ ]+ [^ ]+", kernel)
    )
    # guards are part of the residual too
    left = [p for p in predicates(parts.residual) if p.field != "family"]
    assert left == predicates(parse(residual))


def test_bits() -> None:
    wide = Predicate(Op.BITS, "slot", 0x40)
    assert split(wide, FIELDS).kernel.text == "slot & 64"
    assert split(wide, FIELDS).residual == TRUE
    assert split(Predicate(Op.BITS, "u8", 0x100), FIELDS).residual == FALSE
    assert split(Predicate(Op.BITS, "s8", 0x100), FIELDS).kernel.text == "s8 & -128"


def test_a_text_too_long_for_the_kernel_is_cut() -> None:
    parts = split(Predicate(Op.EQ, "path", "x" * 300), FIELDS)
    assert parts.kernel.text.startswith('path ~ "xxx')
    assert parts.kernel.text.endswith('xxx*"')
    assert KernelFilter(parts.kernel.text, RECORD, make_record({"path": b"x" * 300}).raw).run()
    assert not KernelFilter(parts.kernel.text, RECORD, make_record({"path": b"x" * 200}).raw).run()
    assert parts.residual == Predicate(Op.EQ, "path", "x" * 300)


def test_too_many_terms_for_one_filter() -> None:
    numbers = [Predicate(Op.NE, "u32", number) for number in range(500)]
    parts = split(all_of(numbers), FIELDS)
    assert 3000 < len(parts.kernel.text) <= MAX_FILTER_TEXT
    assert 0 < len(predicates(parts.residual)) < 500
    assert (
        split(any_of(numbers[:1] + [Predicate(Op.EQ, "u32", n) for n in range(500)]), FIELDS).kernel == ALWAYS
    )


def test_unknown_fields_and_wrong_types_are_our_mistake() -> None:
    with pytest.raises(KeyError):
        resolve(parse("nothing == 1"), FIELDS)
    for text in ("comm == 1", "u8 == 'x'"):
        with pytest.raises(TypeError):
            compile_program(parse(text), FIELDS)


def test_a_program_is_what_c_expects() -> None:
    program = compile_program(parse("(port == 443 || comm ~ 'a*') && s8 < -1"), FIELDS)
    none = TestFlag(0)
    assert program == (
        Test(TestKind.INT, Cmp.EQ, 14, 2, none, 2, b"", 1, 2),
        Test(TestKind.INT, Cmp.EQ, 48, 2, TestFlag.SWAP, 443, b"", 3, 2),
        Test(TestKind.TEXT, Cmp.GLOB, 50, 8, none, 0, b"a*", 3, REJECT),
        Test(TestKind.INT, Cmp.LT, 9, 1, TestFlag.SIGNED, (1 << 64) - 1, b"", ACCEPT, REJECT),
    )
    assert compile_program(TRUE, FIELDS) == ()
    assert not run_program(compile_program(FALSE, FIELDS), b"")


def test_fields_of_a_format() -> None:
    assert fields_of(RECORD)["slot"] == FieldInfo(Kind.INT, 40, 4, signed=True, kernel=RECORD["slot"])
    assert "raw" not in fields_of(RECORD)
    assert fields_of(RECORD)["comm"].holds is str
    assert replace(fields_of(RECORD)["s8"], signed=False).range == (0, 255)
