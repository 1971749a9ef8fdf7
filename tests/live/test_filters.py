"""The real kernel's filters decide as the expressions mean: counted by perf events of our own thread."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ringside.sensor.expression import And, Expression, Op, Or, Predicate, all_of, any_of, evaluate
from ringside.sensor.program import Fields, fields_of, split
from ringside.sensor.tracefs.filter import ALWAYS, NEVER
from ringside.sensor.tracefs.format import parse_format

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="system call numbers of x86_64"),
]

LIBC = ctypes.CDLL(None, use_errno=True)
SYS_PERF_EVENT_OPEN, SYS_RT_SIGQUEUEINFO, SYS_MADVISE = 298, 129, 28
PERF_TYPE_TRACEPOINT, PERF_FLAG_FD_CLOEXEC = 2, 8
PERF_EVENT_IOC_SET_FILTER = 0x40082406
PR_SET_NAME = 15
TRACING = Path("/sys/kernel/tracing")

SLOW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def fields_of_event(event: str) -> tuple[Fields, int]:
    path = TRACING / "events" / event
    if not path.is_dir():
        pytest.skip(f"this kernel has no {event}")
    record = parse_format((path / "format").read_text())
    return fields_of(record), record.id


@contextmanager
def counter(event_id: int, text: str) -> Iterator[Callable[[], int]]:
    """How often our own thread has met an event that the kernel's filter lets through."""
    attributes = struct.pack("=IIQQQQQ", PERF_TYPE_TRACEPOINT, 112, event_id, 0, 0, 0, 0).ljust(112, b"\0")
    fd = LIBC.syscall(SYS_PERF_EVENT_OPEN, attributes, 0, -1, -1, PERF_FLAG_FD_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "perf_event_open")
    try:
        if text and LIBC.ioctl(fd, ctypes.c_ulong(PERF_EVENT_IOC_SET_FILTER), os.fsencode(text)):
            pytest.fail(f"the kernel refuses the filter {text!r}: {os.strerror(ctypes.get_errno())}")

        def count() -> int:
            return int.from_bytes(os.read(fd, 8), "little")

        yield count
    finally:
        os.close(fd)


def compare(
    expression: Expression,
    fields: Fields,
    event_id: int,
    cause: Callable[[int], dict[str, int | bytes]],
    times: int,
) -> None:
    """Cause the event so many times; the kernel's filter and the residual must together say what is meant."""
    parts = split(expression, fields)
    if parts.kernel == NEVER:
        parts = split(all_of([]), fields)
    with counter(event_id, "" if parts.kernel == ALWAYS else parts.kernel.text) as count:
        for index in range(times):
            before = count()
            values = cause(index)
            let_through = count() - before == 1
            wanted = evaluate(expression, values)
            assert (let_through and evaluate(split(expression, fields).residual, values)) == wanted, (
                parts.kernel.text,
                values,
            )


def joined(leaves: st.SearchStrategy[Predicate]) -> st.SearchStrategy[Expression]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3).map(all_of)
            | st.lists(inner, min_size=1, max_size=3).map(any_of)
        ),
        max_leaves=6,
    )


S32 = st.sampled_from([-(1 << 31), -2, -1, 0, 1, 2, 255, 256, (1 << 31) - 1])
INT_OPS = st.sampled_from([Op.EQ, Op.NE, Op.LT, Op.LE, Op.GT, Op.GE, Op.BITS])


@SLOW
@given(
    joined(
        st.builds(
            Predicate,
            INT_OPS,
            st.sampled_from(["errno", "code"]),
            S32
            | st.sampled_from([-(1 << 63), -(1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 64) - 1]),
        )
    ),
    st.lists(st.tuples(S32, S32), min_size=1, max_size=6),
)
def test_signed_numbers(expression: Expression, values: list[tuple[int, int]]) -> None:
    fields, event_id = fields_of_event("signal/signal_generate")

    def cause(index: int) -> dict[str, int | bytes]:
        errno, code = values[index]
        info = struct.pack("=iii", signal.SIGUSR1, errno, code).ljust(128, b"\0")
        assert LIBC.syscall(SYS_RT_SIGQUEUEINFO, os.getpid(), signal.SIGUSR1, info) == 0
        return {"errno": errno, "code": code}

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        compare(expression, fields, event_id, cause, len(values))
    finally:
        while signal.sigtimedwait({signal.SIGUSR1}, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


U64 = st.sampled_from([0, 1, 2, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])


@SLOW
@given(
    joined(
        st.builds(Predicate, INT_OPS, st.just("start"), U64 | S32)
        | st.builds(Predicate, INT_OPS, st.just("behavior"), S32)
    ),
    st.lists(st.tuples(U64, S32), min_size=1, max_size=6),
)
def test_unsigned_numbers_and_narrow_ones_in_wide_slots(
    expression: Expression, values: list[tuple[int, int]]
) -> None:
    fields, event_id = fields_of_event("syscalls/sys_enter_madvise")

    def cause(index: int) -> dict[str, int | bytes]:
        start, behavior = values[index]
        # above the int there is what a caller's register happened to hold; nothing is so advised
        LIBC.syscall(
            SYS_MADVISE, ctypes.c_uint64(start), 0, ctypes.c_uint64(behavior & 0xFFFFFFFF | 0xABCD << 32)
        )
        return {"start": start, "behavior": behavior}

    compare(expression, fields, event_id, cause, len(values))


# mostly a, so that patterns meet texts that they match
ALPHABET = "aaab0!*?[]^-\\\"'é"
TEXTS = st.text("ab", max_size=3) | st.lists(st.sampled_from(ALPHABET), max_size=5).map("".join)
PATTERNS = st.lists(
    st.sampled_from([*ALPHABET, "a", "a", "*", "*", "?", "[ab]", "[!a]", "[]!]", "[^0]", "[!-^]", "[\"']"]),
    max_size=6,
).map("".join)


def texts_of(name: str) -> st.SearchStrategy[Expression]:
    ends = st.sampled_from(["", "*"])
    wild = st.tuples(ends, TEXTS, ends).map("".join)
    return joined(
        st.builds(Predicate, st.sampled_from([Op.EQ, Op.NE]), st.just(name), TEXTS)
        | st.builds(Predicate, st.just(Op.GLOB), st.just(name), wild)
        | st.builds(Predicate, st.just(Op.MATCH), st.just(name), PATTERNS)
    )


@SLOW
@given(texts_of("newcomm"), st.lists(TEXTS, min_size=1, max_size=12))
def test_texts_in_fixed_arrays(expression: Expression, names: list[str]) -> None:
    fields, event_id = fields_of_event("task/task_rename")

    def cause(index: int) -> dict[str, int | bytes]:
        LIBC.prctl(PR_SET_NAME, names[index].encode(), 0, 0, 0)
        return {"newcomm": names[index].encode()}

    own = Path("/proc/thread-self/comm").read_bytes()[:-1]
    try:
        compare(expression, fields, event_id, cause, len(names))
    finally:
        LIBC.prctl(PR_SET_NAME, own, 0, 0, 0)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A new cgroup of our own, and its path as the kernel tells it."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    root = next((Path(line[1]) for line in mounts if line[2] in ("cgroup2", "cgroup")), None)
    if root is None:
        pytest.skip("no cgroup hierarchy is mounted")
    folder = root / f"ringside-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    yield folder
    folder.rmdir()


@SLOW
@given(
    texts_of("path"),
    st.lists(TEXTS.filter(bool), min_size=1, max_size=5, unique=True),
)
def test_texts_behind_the_record(cgroup: Path, expression: Expression, names: list[str]) -> None:
    fields, event_id = fields_of_event("cgroup/cgroup_mkdir")
    prefix = f"/{cgroup.name}/"

    def below(part: Expression) -> Expression:
        # every pattern is about the name, which comes after a folder
        if isinstance(part, Predicate):
            return Predicate(part.op, part.field, prefix + str(part.value))
        return type(part)(tuple(below(term) for term in part.terms)) if isinstance(part, And | Or) else part

    with ExitStack() as made:

        def cause(index: int) -> dict[str, int | bytes]:
            (cgroup / names[index]).mkdir()
            made.callback((cgroup / names[index]).rmdir)
            return {"path": (prefix + names[index]).encode()}

        compare(any_of([expression, below(expression)]), fields, event_id, cause, len(names))


@pytest.mark.parametrize(
    "text", ["x" * 255, "x" * 300, 'a"b', "a'b", "a\"b'c", "", " ", "a\nb", "&& ||", "\udcff"]
)
@pytest.mark.parametrize("op", [Op.EQ, Op.NE, Op.GLOB, Op.MATCH])
def test_the_kernel_takes_every_text(op: Op, text: str) -> None:
    fields, event_id = fields_of_event("cgroup/cgroup_mkdir")
    for around in (text, f"*{text}", f"{text}*", f"*{text}*"):
        parts = split(Predicate(op, "path", around), fields)
        with counter(event_id, parts.kernel.text):
            pass


def test_the_kernel_takes_the_longest_filter() -> None:
    fields, event_id = fields_of_event("signal/signal_generate")
    parts = split(all_of(Predicate(Op.NE, "errno", number) for number in range(1000)), fields)
    assert len(parts.kernel.text) > 4000
    with counter(event_id, parts.kernel.text):
        pass


def test_precedence_is_the_kernels() -> None:
    fields, event_id = fields_of_event("task/task_rename")
    a, b, c = (Predicate(Op.GLOB, "newcomm", f"*{name}*") for name in "abc")
    names = ["", "a", "b", "c", "ab", "bc", "ac", "abc"]

    def cause(index: int) -> dict[str, int | bytes]:
        LIBC.prctl(PR_SET_NAME, names[index].encode(), 0, 0, 0)
        return {"newcomm": names[index].encode()}

    own = Path("/proc/thread-self/comm").read_bytes()[:-1]
    try:
        for expression in (
            any_of([a, all_of([b, c])]),
            all_of([any_of([a, b]), c]),
            any_of([all_of([a, b]), c]),
        ):
            compare(expression, fields, event_id, cause, len(names))
    finally:
        LIBC.prctl(PR_SET_NAME, own, 0, 0, 0)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("*b", "ab"),
        ("*b*", "abc"),
        ("0*", "0a"),
        ("!a*", "!ab"),
        ("a[!b]", "ac"),
        ("a[^b]", "ac"),
        ("a[!b]", "a"),
    ],
)
def test_traps_of_the_kernels_globs(pattern: str, name: str) -> None:
    fields, event_id = fields_of_event("task/task_rename")

    def cause(_: int) -> dict[str, int | bytes]:
        LIBC.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
        return {"newcomm": name.encode()}

    own = Path("/proc/thread-self/comm").read_bytes()[:-1]
    try:
        compare(Predicate(Op.MATCH, "newcomm", pattern), fields, event_id, cause, 1)
    finally:
        LIBC.prctl(PR_SET_NAME, own, 0, 0, 0)
