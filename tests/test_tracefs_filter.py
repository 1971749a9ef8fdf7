"""Filter text: what it means to the kernel, held against what it was to mean."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.sensor.errors import KernelError
from ringside.sensor.tracefs.filter import (
    ALWAYS,
    MAX_FILTER_TEXT,
    NEVER,
    CannotSay,
    Filter,
    all_of,
    any_of,
    compare,
    equals,
    exclude,
    explain_filter,
    glob,
)
from ringside.sensor.tracefs.format import Field, Kind
from ringside.sensor.tracefs.mount import Tracefs, open_tracefs
from ringside.sensor.tracefs.owner import Owner

OPS = ("==", "!=", "<", "<=", ">", ">=", "&")


def number(size: int, signed: bool, name: str = "n") -> Field:
    return Field(name, f"{'s' if signed else 'u'}{8 * size}", 8, size, signed, Kind.INTEGER, size, signed, 0)


def string(kind: Kind = Kind.DATA_LOC, size: int = 4) -> Field:
    return Field("s", "char", 8, size, False, kind, 1, False, size if kind is Kind.CHARS else 0)


ID = number(8, True, "id")


# Numbers


def wrap(value: int, size: int, signed: bool) -> int:
    return int.from_bytes((value % (1 << 8 * size)).to_bytes(size, "little"), "little", signed=signed)


def kernel_says(condition: Filter, field: Field, have: int) -> bool:
    """What filter_pred_* make of a rendered predicate: the operand is cut to the field's type."""
    text = condition.text
    if not text:
        return True
    if text == NEVER.text:
        return False
    match = re.fullmatch(r"(\w+) (\S+) (-?\d+)", text)
    assert match is not None
    assert match[1] == field.name
    operand = int(match[3])
    # kstrtoll and kstrtoull, by the field's sign
    assert (-(2**63) <= operand < 2**63) if field.signed else (0 <= operand < 2**64)
    operand = wrap(operand, field.size, field.signed)
    return holds(have, match[2], operand)


def holds(have: int, op: str, value: int) -> bool:
    outcomes = {
        "==": have == value,
        "!=": have != value,
        "<": have < value,
        "<=": have <= value,
        ">": have > value,
        ">=": have >= value,
        "&": have & value != 0,
    }
    return outcomes[op]


EDGES = st.sampled_from(
    [s * (1 << b) + d for s in (-1, 1) for b in (0, 7, 8, 15, 16, 31, 32, 63, 64) for d in (-1, 0, 1)]
)
ANY_INT = EDGES | st.integers(-(2**65), 2**65) | st.integers(-300, 300)


@given(st.sampled_from([1, 2, 4, 8]), st.booleans(), st.sampled_from(OPS), ANY_INT, ANY_INT)
def test_numbers_compare_as_numbers(size: int, signed: bool, op: str, have: int, value: int) -> None:
    """Whatever the width and sign of the field and however large the value."""
    field = number(size, signed)
    have = wrap(have, size, signed)
    # a mask counts as far as the field has bits
    wanted = holds(have, op, wrap(value, size, signed) if op == "&" else value)
    assert kernel_says(compare(field, op, value), field, have) is wanted


def test_what_a_field_cannot_be_is_never_asked() -> None:
    assert compare(number(1, False), "==", 257) == NEVER
    assert compare(number(1, False), "!=", 257) == ALWAYS
    assert compare(number(2, False), "<", 100_000) == ALWAYS
    assert compare(number(8, False), "==", -1) == NEVER
    assert compare(number(8, False), ">=", 0) == ALWAYS
    assert compare(number(4, True), "&", 1 << 40) == NEVER
    assert compare(number(4, True), "==", -1).text == "n == -1"
    assert compare(number(8, True), "&", 1 << 63).text == f"n & -{1 << 63}"


@pytest.mark.parametrize(
    "field",
    [
        string(),
        string(Kind.CHARS, 16),
        Field("args", "unsigned long", 16, 48, False, Kind.ARRAY, 8, False, 6),
        Field("name", "const char *", 16, 8, False, Kind.POINTER, 8, False, 0),
        Field("s", "struct x", 16, 24, False, Kind.OPAQUE, 24, False, 0),
    ],
)
def test_what_is_no_number_to_the_kernel(field: Field) -> None:
    with pytest.raises(CannotSay):
        compare(field, "==", 1)


def test_a_pointer_to_anything_but_char_is_a_number() -> None:
    field = Field("addr", "struct sockaddr *", 16, 8, False, Kind.POINTER, 8, False, 0)
    assert compare(field, "!=", 0).text == "addr != 0"


# Joining


def in_set(field: Field, values: Iterable[int]) -> Filter:
    return any_of(compare(field, "==", value) for value in values)


def test_deduplicated_and_ordered_by_value() -> None:
    assert in_set(ID, [110, 3, 20, 3]).text == "id == 3 || id == 20 || id == 110"
    assert in_set(ID, [110, 3]) == in_set(ID, [3, 110, 110])
    assert in_set(ID, []) == NEVER


def test_no_filter_absorbs() -> None:
    three = compare(ID, "==", 3)
    assert any_of([three, ALWAYS]) == ALWAYS
    assert ALWAYS.text == ""
    assert any_of([three, NEVER]) == three
    assert all_of([three, ALWAYS]) == three
    assert all_of([three, NEVER]) == NEVER
    assert any_of([]) == NEVER
    assert all_of([]) == ALWAYS


def test_nested() -> None:
    condition = all_of([in_set(ID, [1, 2]), exclude("common_pid", [20, 10]), any_of([compare(ID, ">", 9)])])
    assert condition.text == "common_pid != 10 && common_pid != 20 && id > 9 && (id == 1 || id == 2)"
    assert all_of([condition, condition]) == condition
    assert any_of([condition, compare(ID, "==", 5)]).text == f"id == 5 || ({condition.text})"


FILTERS = st.recursive(
    st.builds(lambda op, value: compare(ID, op, value), st.sampled_from(OPS), st.integers(-5, 5))
    | st.sampled_from([ALWAYS, NEVER]),
    lambda inner: st.builds(
        lambda join, parts: join(parts), st.sampled_from([any_of, all_of]), st.lists(inner, max_size=4)
    ),
    max_leaves=12,
)


def meaning(condition: Filter, have: int) -> bool:
    """Evaluates the rendered text with C's precedence, as the kernel does."""
    if condition == ALWAYS:
        return True
    text = re.sub(
        r"(\w+) (&|==|!=|<=|>=|<|>) (-?\d+)", lambda m: f"h(v[{m[1]!r}], {m[2]!r}, {m[3]})", condition.text
    )
    values = {"id": have, "common_pid": 4242}
    return bool(eval(text.replace("&&", " and ").replace("||", " or "), {"h": holds, "v": values}))


@given(st.lists(FILTERS, max_size=4), st.integers(-7, 7))
def test_joining_means_what_it_says(parts: list[Filter], have: int) -> None:
    assert meaning(any_of(parts), have) is any(meaning(part, have) for part in parts)
    assert meaning(all_of(parts), have) is all(meaning(part, have) for part in parts)


@given(st.lists(FILTERS, max_size=4), st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(parts: list[Filter], random: object) -> None:
    again = parts + parts[:2]
    random.shuffle(again)  # type: ignore[attr-defined]
    for join in (any_of, all_of):
        assert join(again) == join(parts)
        assert join(again).text == join(parts).text


def test_too_long() -> None:
    fits = in_set(ID, range(270))
    assert len(fits.text) <= MAX_FILTER_TEXT
    with pytest.raises(CannotSay, match="bytes"):
        _ = in_set(ID, range(500)).text


# Strings


def test_quoting() -> None:
    assert equals(string(), "/etc/passwd").text == 's == "/etc/passwd"'
    assert equals(string(), "/etc/passwd", negated=True).text == 's != "/etc/passwd"'
    assert equals(string(), 'a "b"').text == "s == 'a \"b\"'"
    assert equals(string(), "it's").text == 's == "it\'s"'
    assert equals(string(), b"caf\xe9").text.encode("utf-8", "surrogateescape") == b's == "caf\xe9"'
    assert equals(string(), "").text == 's == ""'


@pytest.mark.parametrize("text", ["'\"", "a\0b", "x" * 256, "é" * 128])
def test_what_cannot_be_quoted(text: str) -> None:
    with pytest.raises(CannotSay):
        equals(string(), text)
    with pytest.raises(CannotSay):
        glob(string(), text + "*")
    assert equals(string(), "é" * 127)


def test_longer_than_the_array() -> None:
    comm = string(Kind.CHARS, 16)
    assert equals(comm, "0123456789abcdef").text
    assert equals(comm, "0123456789abcdefg") == NEVER
    assert equals(comm, "0123456789abcdefg", negated=True) == ALWAYS


def test_what_is_no_string_to_the_kernel() -> None:
    for field in (number(4, False), Field("a", "unsigned char", 8, 6, False, Kind.ARRAY, 1, False, 6)):
        with pytest.raises(CannotSay):
            equals(field, "x")
        with pytest.raises(CannotSay):
            glob(field, "x*")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("/etc/*", 's ~ "/etc/*"'),
        ("/etc/passwd", 's == "/etc/passwd"'),  # nothing in it that is special
        ("*", ""),
        ("**", ""),
        ("1*", r's ~ "\1*"'),
        ("!x*", r's ~ "\!x*"'),
        ("1?", r's ~ "\1?"'),
        ("*sh", r's ~ "*\sh"'),
        ("*sh*", r's ~ "*\sh*"'),
        ("**sh", r's ~ "**\sh"'),
        ("*s?", 's ~ "*s?"'),
        ("*[a]", 's ~ "*[a]"'),
        (r"*\*", r's ~ "*\*"'),
        (r"\!x", r's ~ "\!x"'),
        ("?", 's ~ "?"'),
    ],
)
def test_a_glob_is_spelled_so_that_the_kernel_reads_a_glob(pattern: str, text: str) -> None:
    assert glob(string(), pattern).text == text


def test_a_glob_that_ends_in_an_escape() -> None:
    with pytest.raises(CannotSay):
        glob(string(), "a*\\")
    assert glob(string(), "a*\\\\").text == r's ~ "a*\\"'


# The kernel


@pytest.fixture
def instance() -> Iterator[tuple[Tracefs, tuple[str, ...]]]:
    """A tracing instance of our own, gone afterwards."""
    tracefs = open_tracefs()
    parts = ("instances", f"{Owner.current().group}_999")
    tracefs.path(*parts).mkdir()
    try:
        yield tracefs, parts
    finally:
        tracefs.path(*parts).rmdir()


def names_recorded(
    tracefs: Tracefs, instance: tuple[str, ...], condition: Filter, names: list[str]
) -> list[str]:
    """Which of the names the kernel records under the filter, when this thread takes each in turn."""
    event = (*instance, "events", "task", "task_rename")
    tid = threading.get_native_id()
    tracefs.write(all_of([condition, compare(number(4, True, "pid"), "==", tid)]).text, *event, "filter")
    tracefs.write("1", *event, "enable")
    comm = Path(f"/proc/self/task/{tid}/comm")
    before = comm.read_text()
    try:
        for name in names:
            comm.write_text(name)
    finally:
        tracefs.write("0", *event, "enable")
        comm.write_text(before.rstrip("\n"))
    lines = tracefs.read(*instance, "trace").splitlines()
    tracefs.write("", *instance, "trace")
    return [match[1] for line in lines if (match := re.search(r" newcomm=(.*) oom_score_adj=", line))]


NAMES = ["a-very-long-name", "sh", "dash", "1abc", "!abc", "abc1", "it's", "x", "0", "[x]", "a*b"]


@pytest.mark.live
@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*sh", {"sh", "dash"}),
        ("*long*", {"a-very-long-nam"}),
        ("1*", {"1abc"}),
        ("!abc*", {"!abc"}),
        ("!abc", {"!abc"}),
        ("*abc*", {"1abc", "!abc", "abc1"}),
        ("?", {"x", "0"}),
        ("[!]*", set()),  # never closed: itself
        ("[0-9]*", {"1abc", "0"}),
        (r"\[x]", {"[x]"}),
        (r"a\*b", {"a*b"}),
        ("a*", {"a-very-long-nam", "abc1", "a*b"}),
        ("*", {name[:15] for name in NAMES}),
        ("it's", {"it's"}),
        ("it's*", {"it's"}),
    ],
)
def test_the_kernel_reads_globs_as_meant(
    instance: tuple[Tracefs, tuple[str, ...]], pattern: str, wanted: set[str]
) -> None:
    """In a fixed array, behind whose NUL remains of longer names stand: the hard case."""
    tracefs, parts = instance
    field = tracefs.read_format("task", "task_rename")["newcomm"]
    assert set(names_recorded(tracefs, parts, glob(field, pattern), NAMES)) == wanted


@pytest.mark.live
def test_the_kernel_compares_strings(instance: tuple[Tracefs, tuple[str, ...]]) -> None:
    tracefs, parts = instance
    field = tracefs.read_format("task", "task_rename")["newcomm"]
    assert names_recorded(tracefs, parts, equals(field, "dash"), NAMES) == ["dash"]
    others = names_recorded(tracefs, parts, equals(field, "dash", negated=True), NAMES)
    assert others == [name[:15] for name in NAMES if name != "dash"]
    assert names_recorded(tracefs, parts, NEVER, NAMES) == []
    assert names_recorded(tracefs, parts, any_of([equals(field, "x"), equals(field, "sh")]), NAMES) == [
        "sh",
        "x",
    ]


@pytest.mark.live
def test_the_kernel_takes_every_number_it_is_given(instance: tuple[Tracefs, tuple[str, ...]]) -> None:
    """Edges of every width and sign are accepted, in an event that has such fields."""
    tracefs, parts = instance
    for system, event in (
        ("task", "task_rename"),
        ("sched", "sched_process_exit"),
        ("raw_syscalls", "sys_exit"),
    ):
        file = (*parts, "events", system, event, "filter")
        for field in tracefs.read_format(system, event).fields:
            if field.kind is not Kind.INTEGER:
                continue
            bits = 8 * field.size
            for op in OPS:
                for value in (-(2**63), -1, 0, 1, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1, 2**64):
                    tracefs.write(compare(field, op, value).text or "0", *file)


@pytest.mark.live
def test_the_limits_are_the_kernels(instance: tuple[Tracefs, tuple[str, ...]]) -> None:
    tracefs, parts = instance
    file = (*parts, "events", "task", "task_rename", "filter")
    field = Field("newcomm", "char", 8, 400, False, Kind.CHARS, 1, False, 400)
    tracefs.write(equals(field, "x" * 255).text, *file)
    with pytest.raises(KernelError, match="EINVAL"):
        tracefs.write(f'newcomm == "{"x" * 256}"', *file)
    tracefs.write(in_set(number(4, True, "pid"), range(280)).text.ljust(MAX_FILTER_TEXT), *file)


@pytest.mark.live
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("id == foo", r"Invalid value .* at character \d+"),
        ("nosuch == 1", r"Field not found at character \d+"),
        ("(id == 1", r"Too many '\(' at character 1"),
        ("id == 1)", r"Too (few|many) '.' at character 8"),
        ('id == "1', r"Missing matching quote at character \d+"),
        ("id == 1", None),
    ],
)
def test_the_kernel_explains_itself(text: str, problem: str | None) -> None:
    tracefs = open_tracefs()
    answer = explain_filter(tracefs, "raw_syscalls", "sys_enter", text)
    assert answer is None if problem is None else re.fullmatch(problem, answer or "")
    assert not [name for name in instances(tracefs) if name.startswith(Owner.current().group)]


def instances(tracefs: Tracefs) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return [path.name for path in tracefs.path("instances").iterdir()]
    return []


def test_no_explanation_without_instances(tmp_path: Path) -> None:
    assert explain_filter(Tracefs(tmp_path), "raw_syscalls", "sys_enter", "id ==") is None
    tmp_path.joinpath("instances").mkdir()
    assert explain_filter(Tracefs(tmp_path), "raw_syscalls", "sys_enter", "id ==") is None
    assert list(tmp_path.joinpath("instances").iterdir()) == []
