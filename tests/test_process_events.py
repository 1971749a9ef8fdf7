"""What process events say, and the ways to what they say: without a kernel."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.api.v0 import Event, ProcessEvent, ProcessEventFilter, ProcessEventType
from ringside.sensor._perf import ffi
from ringside.sensor.bpf import Program
from ringside.sensor.btf import Btf
from ringside.sensor.errors import KernelError, RequestError, SetupError, UnservableError
from ringside.sensor.events.process_facts import EXEC, EXIT, FACTS, FORK, TABLES
from ringside.sensor.events.process_programs import exec_program, exit_program
from ringside.sensor.events.process_ways import Proof, Reached, Way
from ringside.sensor.plan import compile_plan

from .support.fakekernel import FakeKernel, reading
from .support.fakering import HERE, KERNELS, canned, raw_of
from .test_btf import INT, PTR, Maker
from .test_plan import run_c

ARGUMENTS = st.lists(st.binary(max_size=200).filter(lambda one: b"\0" not in one), max_size=8)


def process_of(kind: ProcessEventType, side: bytes = b"", **facts: int | bytes) -> ProcessEvent:
    """What is said of facts, by C and by Python alike."""
    raw = raw_of(FACTS, **facts)
    plan = compile_plan(Event, TABLES[kind], FACTS)
    body = run_c(plan, raw, side)
    assert body == plan.run(raw, side)
    event = Event.parse(body)
    assert event.process is not None
    assert bytes(event) == body  # in the order of the fields, and nothing twice
    return event.process


def test_facts_lie_where_c_puts_them() -> None:
    fields = ffi.typeof("rs_facts").fields
    assert [(name, one.offset) for name, one in fields] == [(one.name, one.offset) for one in FACTS.fields]
    assert all(ffi.sizeof(one.type) == FACTS[name].size for name, one in fields)


@given(filename=st.binary(max_size=300).filter(lambda one: b"\0" not in one), arguments=ARGUMENTS)
def test_an_exec_is_told_argument_by_argument(filename: bytes, arguments: list[bytes]) -> None:
    process = process_of(EXEC, b"".join(one + b"\0" for one in arguments), filename=filename)
    assert process.type == EXEC
    assert process.exec_filename == filename.decode("utf-8", "replace")
    assert process.exec_command_line == [one.decode("utf-8", "replace") for one in arguments]


def test_a_part_of_an_argument_is_no_argument() -> None:
    assert process_of(EXEC, b"x\0whole\0par", filename=b"/bin/x").exec_command_line == ["x", "whole"]


def test_a_fork_tells_of_the_child() -> None:
    process = process_of(FORK, child=4_194_303, child_id=b"b-3fffff-9")
    assert (process.type, process.fork_child_pid, process.fork_child_id) == (FORK, 4_194_303, "b-3fffff-9")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (0, (0, 0, 0, False)),
        (7 << 8, (7 << 8, 7, 0, False)),
        (11 | 0x80, (139, 0, 11, True)),
        (None, (0, 0, 0, False)),
    ],
)
def test_an_exit_tells_how(code: int | None, told: tuple[object, ...]) -> None:
    """The status is taken apart in C; tests of the whole sensor see that."""
    status = code or 0
    process = process_of(
        EXIT,
        known=int(code is not None),
        code=status,
        status=status >> 8,
        signal=status & 0x7F,
        core=status >> 7 & 1,
    )
    assert process.type == EXIT
    assert told == (process.exit_code, process.exit_status, process.exit_signal, process.exit_core_dumped)


def way(name: str, error: Exception | None = None) -> Way:
    def start() -> None:
        if error is not None:
            raise error

    return Way(name, f"the {name}", start)


@pytest.mark.parametrize(
    ("ways", "wanted", "reached", "note"),
    [
        ([way("a"), way("b")], "auto", "a", ""),
        ([way("a", UnservableError("f", "no a")), way("b")], "auto", "b", "no a"),
        ([way("a", SetupError("no fds")), way("b", KernelError("b", errno.EIO))], "auto", "", "no fds; b: "),
        ([way("a"), way("b"), way("c")], "b", "b", ""),
        ([way("a"), way("b", RequestError("b", "bad")), way("c")], "b", "c", "b: bad"),
        ([way("a"), way("b"), way("c")], "none of them", "c", ""),
    ],
)
def test_the_best_way_that_works_is_taken(ways: list[Way], wanted: str, reached: str, note: str) -> None:
    """And what the better ones lack is said. The last is taken whatever is wanted."""
    got = Reached(ways, wanted)
    assert (got.name, got.mechanism) == (reached, f"the {reached}" if reached else "")
    assert got.note.startswith(note)
    assert bool(got.note) == bool(note)


def test_a_proof_is_a_program_that_fails() -> None:
    proof = Proof.run()
    assert proof.pid > 0
    assert proof.status != 0  # so that a status of 0 for want of a better is seen through
    assert b"" in proof.arguments


def types() -> Btf:
    maker = Maker()
    number, pointer = maker.add(INT, "int", 4, 32), maker.add(PTR, "", 0)
    members = [("arg_start", number, 64), ("arg_end", number, 128)]
    maker.record("mm_struct", *members)
    names = ("mm", "signal", "group_leader", "exit_code")
    maker.record("task_struct", *((name, pointer, 64 * at) for at, name in enumerate(names, 10)))
    maker.record("signal_struct", ("flags", number, 96), ("group_exit_code", number, 128))
    return Btf(maker.blob())


@pytest.mark.parametrize("version", [path.name for path in KERNELS.iterdir()])
def test_programs_are_made_for_every_kernel(version: str) -> None:
    """The same each time, and loop-free by their making; whether they are right only a kernel can say."""

    def made() -> list[Program]:
        btf = types()
        return [
            exec_program(btf, canned(version, "sched/sched_process_exec")),
            exit_program(btf, canned(version, "sched/sched_process_exit")),
        ]

    for one, again in zip(made(), made(), strict=True):
        code = one.render(dict.fromkeys(one.maps, 3))
        assert code == again.render(dict.fromkeys(again.maps, 3))
        assert len(code) // 8 < 200
        assert one.name.startswith("ringside_")


async def test_where_programs_are_refused_it_is_said(tmp_path: object) -> None:
    """And the other ways serve."""
    kernel = FakeKernel(tmp_path, HERE)  # type: ignore[arg-type]
    kernel.proc.add(1, 0, "init")
    kernel.proc.add(50, 1)
    async with kernel.sensor() as sensor:
        rows = {row.family: row for row in sensor.process_family.mechanisms()}
        for name in ("command lines", "exit status"):
            assert rows[name].served
            assert "bpf" not in rows[name].mechanism
            assert "this kernel is a fake" in rows[name].note
        async with reading(sensor, process_events=[ProcessEventFilter(type=EXEC)]) as reader:
            kernel.exec(50, b"/bin/x", b"x", b"y")
            (event,) = await reader.take(1)
    assert list(event.process.exec_command_line) == ["x", "y"]
