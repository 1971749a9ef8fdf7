"""Filters as bpf instructions: they refuse nothing that is wanted, and most of what is not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringside.sensor.bpf import R7, R8
from ringside.sensor.bpf_filter import condition
from ringside.sensor.events.call_programs import (
    CALLED,
    CALLED_SIZE,
    OPENED,
    OPENED_SIZE,
    PATH_MAX,
    address_program,
    open_program,
)
from ringside.sensor.events.network import address_fields
from ringside.sensor.expression import FALSE, TRUE, And, Expression, Op, Or, Predicate, all_of, any_of
from ringside.sensor.program import compile_program, fields_of, run_program

from .support.bpfmachine import run

FILE_FIELDS = fields_of(OPENED)
CALL_FIELDS = {"fd": fields_of(CALLED)["fd"], **address_fields()}


def passes_open(
    expression: Expression, name: bytes | None, flags: int = 0, mode: int = 0
) -> tuple[bool, bool]:
    """What the instructions say of an open, and what is so."""
    text = b"" if name is None else name + b"\0"
    head = (
        (flags & 0xFFFFFFFF).to_bytes(4, "little")
        + mode.to_bytes(4, "little")
        + (OPENED_SIZE | len(text) << 16).to_bytes(4, "little")
    ).ljust(OPENED_SIZE, b"\0")
    memory = (head + text).ljust(OPENED_SIZE + PATH_MAX + 8, b"#")  # what was there before
    code = condition(expression, FILE_FIELDS, OPENED_SIZE, "refused")
    said = bool(run(code, {R7: 0, R8: len(text)}, memory))
    return said, run_program(compile_program(expression, FILE_FIELDS), head + text)


def passes_call(expression: Expression, fd: int, address: bytes) -> tuple[bool, bool]:
    """The same of a call with an address."""
    head = (fd & 0xFFFFFFFF).to_bytes(4, "little") + len(address).to_bytes(4, "little")
    memory = (head + address).ljust(CALLED_SIZE + 120, b"\0")
    code = condition(expression, CALL_FIELDS, CALLED_SIZE, "refused")
    said = bool(run(code, {R7: 0, R8: len(address)}, memory))
    return said, run_program(compile_program(expression, CALL_FIELDS), head, address)


NAMES = st.one_of(
    st.sampled_from(
        [b"", b"/", b"/etc/passwd", b"/etc/passwd2", b"/a.conf", b"x" * 63, b"x" * 64 + b"/y" * 90]
    ),
    st.binary(max_size=20).map(lambda name: name.replace(b"\0", b"n")),
)
TEXTS = st.sampled_from(
    [
        "/etc/passwd",
        "/etc/*",
        "*.conf",
        "*/passwd*",
        "/?tc/[p-r]asswd",
        "*",
        "",
        "x" * 63,
        "x" * 64 + "/y" * 90,
        "x" * 64 + "*" + "/y" * 80,
        "\\*",
        "/*/*",
    ]
)
NUMBERS = st.one_of(st.integers(-(2**33), 2**33), st.sampled_from([0, 1, 2**31, 2**32 - 1, -1]))
ORDERED = st.sampled_from([Op.EQ, Op.NE, Op.LT, Op.LE, Op.GT, Op.GE])


def trees(leaves: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=2, max_size=3).map(all_of),
            st.lists(inner, min_size=2, max_size=3).map(any_of),
        ),
        max_leaves=6,
    )


OPENS = trees(
    st.one_of(
        st.builds(Predicate, st.sampled_from([Op.EQ, Op.NE, Op.MATCH, Op.GLOB]), st.just("filename"), TEXTS),
        st.builds(Predicate, ORDERED, st.sampled_from(["flags", "mode"]), NUMBERS),
        st.builds(Predicate, st.just(Op.BITS), st.sampled_from(["flags", "mode"]), st.integers(1, 2**32 - 1)),
    )
)
CALLS = trees(
    st.one_of(
        st.builds(
            Predicate,
            ORDERED,
            st.sampled_from([name for name, info in CALL_FIELDS.items() if info.holds is int]),
            st.one_of(NUMBERS, st.sampled_from([2, 10, 443, 40443])),
        ),
        st.builds(
            Predicate,
            st.sampled_from([Op.EQ, Op.NE, Op.GLOB]),
            st.just("sun_path"),
            st.sampled_from(["@name", "@*", "*", "/run/x", "/run/*", "*x", ""]),
        ),
    )
)
ADDRESSES = st.one_of(
    st.sampled_from(
        [
            b"",
            b"\x02",
            b"\x02\0\x9d\xfb\x7f\1\2\3",
            b"\x0a\0\x01\xbb" + bytes(24),
            b"\1\0\0name",
            b"\1\0/run/x\0",
        ]
    ),
    st.binary(max_size=110),
)


@settings(max_examples=400)
@given(OPENS, NAMES, NUMBERS, st.integers(0, 2**32 - 1))
def test_no_open_that_is_wanted_is_refused(
    expression: Expression, name: bytes, flags: int, mode: int
) -> None:
    said, wanted = passes_open(expression, name, flags, mode)
    assert said or not wanted


@settings(max_examples=400)
@given(CALLS, NUMBERS, ADDRESSES)
def test_no_call_that_is_wanted_is_refused(expression: Expression, fd: int, address: bytes) -> None:
    said, wanted = passes_call(expression, fd, address)
    assert said or not wanted


@given(NUMBERS, NUMBERS, ORDERED)
def test_numbers_are_decided(have: int, want: int, op: Op) -> None:
    for field in ("flags", "mode"):
        said, wanted = passes_open(Predicate(op, field, want), b"x", have, have & 0xFFFFFFFF)
        assert said == wanted


@pytest.mark.parametrize(
    ("op", "text", "name"),
    [
        (Op.EQ, "/etc/passwd", b"/etc/passwe"),
        (Op.EQ, "/etc/passwd", b"/etc/passwd2"),
        (Op.EQ, "/etc/passwd", b"/etc/passw"),
        (Op.EQ, "/etc/passwd", b""),
        (Op.EQ, "a" * 300, b"a" * 299 + b"b"),
        (Op.MATCH, "/etc/*", b"/usr/passwd"),
        (Op.MATCH, "*.conf", b"/etc/passwd"),
        (Op.MATCH, "/etc/*.conf", b"/etc/x.cong"),
        (Op.MATCH, "/etc/*.conf", b"/etc.conf"),
        (Op.MATCH, "?tc", b"/td"),
        (Op.MATCH, "*/nowhere", b"/where"),
    ],
)
def test_names_that_are_refused(op: Op, text: str, name: bytes) -> None:
    assert passes_open(Predicate(op, "filename", text), name) == (False, False)


@pytest.mark.parametrize("text", ["/etc/passwd", "/etc/*", "*wd", "*"])
def test_a_name_that_is_missing(text: str) -> None:
    assert passes_open(Predicate(Op.MATCH, "filename", text), None)[0] == (text == "*")


@pytest.mark.parametrize(
    "expression",
    [
        Predicate(Op.EQ, "sin_port", 40444),
        Predicate(Op.GT, "sin_port", 40443),
        Predicate(Op.EQ, "sin6_port", 40443),
        Predicate(Op.EQ, "sa_family", 10),
        Predicate(Op.EQ, "fd", 4),
        Predicate(Op.GLOB, "sun_path", "/run/*"),
        And((Predicate(Op.EQ, "fd", 3), Predicate(Op.EQ, "sin_addr", 1))),
        Or((Predicate(Op.LT, "fd", 3), Predicate(Op.NE, "sa_family", 2))),
    ],
)
def test_calls_that_are_refused(expression: Expression) -> None:
    assert passes_call(expression, 3, b"\x02\0\x9d\xfb\x7f\1\2\3") == (False, False)


def test_what_says_nothing_takes_no_instructions() -> None:
    assert condition(TRUE, FILE_FIELDS, OPENED_SIZE, "refused") == ()
    assert passes_open(FALSE, b"/x") == (False, False)
    many = any_of(Predicate(Op.EQ, "filename", f"/{number:0200}") for number in range(500))
    assert condition(many, FILE_FIELDS, OPENED_SIZE, "refused") == ()


def test_the_programs_of_calls() -> None:
    """Each renders, with a filter and without."""
    address = address_program(1, 2)
    message = address_program(0, 0, 1)
    wanted = condition(Predicate(Op.EQ, "filename", "/x"), FILE_FIELDS, OPENED_SIZE, "out")
    for call, refuse in (
        (open_program(0, 1, 2), wanted),
        (open_program(1, how=2), ()),
        (address, ()),
        (message, ()),
    ):
        for program in (
            call.enter("enter_openat2", refuse, 7),
            call.enter("e", refuse, 0),
            call.exit("x", refuse),
        ):
            code = program.render({one: at for at, one in enumerate(program.maps)})
            assert len(code) % 8 == 0
            assert len(program.name) <= 15
