"""The assembler and what becomes of a refusal; the programs themselves are tried live."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
from ringside.api.v0 import FileEvent
from ringside.sensor import bpf, perf
from ringside.sensor._perf import ffi, lib
from ringside.sensor.bpf import R0, R1, R2, R6, R10, Attachment, Helper, Label, Map, MapType, Program, Reg
from ringside.sensor.errors import UnservableError
from ringside.sensor.events.process_programs import EXECUTED
from ringside.sensor.plan import Kernel, View, compile_plan

from .support.fakering import FakeRing, Rig, now, sample

SEEN = Map("seen", MapType.LRU_HASH, 8, 16, 100)


def render(*code: bpf.Code, **maps: int) -> list[tuple[int, int, int, int, int]]:
    """Opcode, destination, source, offset and constant of each instruction."""
    data = Program("test", code).render({SEEN: maps.get("seen", 0), bpf.OUTPUT: maps.get("output", 0)})
    return [
        (opcode, registers & 15, registers >> 4, offset, constant)
        for opcode, registers, offset, constant in struct.iter_unpack("=BBhi", data)
    ]


# as objdump of a compiler's output has them
@pytest.mark.parametrize(
    ("instruction", "encoded"),
    [
        (bpf.alu(R6, "=", Reg(R1)), (0xBF, 6, 1, 0, 0)),
        (bpf.alu(R2, "+=", -8), (0x07, 2, 0, 0, -8)),
        (bpf.alu32(R2, "&=", 0xFFF), (0x54, 2, 0, 0, 0xFFF)),
        (bpf.load(R1, 8, R6, 16), (0x79, 1, 6, 16, 0)),
        (bpf.load(R1, 4, R6, 8), (0x61, 1, 6, 8, 0)),
        (bpf.load(R1, 2, R6, 8), (0x69, 1, 6, 8, 0)),
        (bpf.load(R1, 1, R6, 8), (0x71, 1, 6, 8, 0)),
        (bpf.store(R10, -4, 4, 0), (0x62, 10, 0, -4, 0)),
        (bpf.store(R10, -8, 8, Reg(R1)), (0x7B, 10, 1, -8, 0)),
        (bpf.call(Helper.MAP_LOOKUP_ELEM), (0x85, 0, 0, 0, 1)),
    ],
)
def test_an_instruction_is_encoded(
    instruction: bpf.Instruction, encoded: tuple[int, int, int, int, int]
) -> None:
    assert render(instruction) == [encoded]


def test_jumps_count_the_instructions_between() -> None:
    code = render(
        bpf.jump_if(R0, "==", 0, "out"),
        bpf.load_map(R1, SEEN),  # takes the place of two
        Label("in"),
        bpf.jump_if(R0, "s>", Reg(R1), "out"),
        bpf.jump("out"),
        Label("out"),
        *bpf.leave(),
        seen=77,
    )
    assert [(opcode, offset) for opcode, _, _, offset, _ in code] == [
        (0x15, 4), (0x18, 0), (0x00, 0), (0x6D, 1), (0x05, 0), (0xB7, 0), (0x95, 0),
    ]  # fmt: skip
    assert code[1] == (0x18, 1, 1, 0, 77)
    assert code[-2] == (0xB7, 0, 0, 0, 1)


def test_constants_of_64_bits() -> None:
    assert render(bpf.load_constant(R1, -2)) == [(0x18, 1, 0, 0, -2), (0, 0, 0, 0, -1)]
    assert render(bpf.load_constant(R1, 1 << 32)) == [(0x18, 1, 0, 0, 0), (0, 0, 0, 0, 1)]


@pytest.mark.parametrize(
    "code",
    [
        (bpf.jump("nowhere"), *bpf.leave()),
        (Label("above"), bpf.jump("above"), *bpf.leave()),
        (Label("twice"), *bpf.leave(), Label("twice")),
    ],
)
def test_labels_that_make_no_sense(code: tuple[bpf.Code, ...]) -> None:
    with pytest.raises(ValueError, match="label"):
        render(*code)


def test_a_program_knows_its_maps_and_renders_the_same_twice() -> None:
    program = Program("test", (*bpf.find(SEEN, -8, "out"), *bpf.emit(R6, R0, 8), Label("out"), *bpf.leave()))
    assert program.maps == (SEEN, bpf.OUTPUT)
    maps = {SEEN: 3, bpf.OUTPUT: 4}
    assert program.render(maps) == program.render(maps)
    assert hash(program) == hash(Program("test", program.code))


def test_a_record_is_described_for_plans() -> None:
    record, size = bpf.record_format("mine", pid="s32", address="u64", name="char", block="u8[16]", n="s32")
    assert [(one.name, one.offset) for one in record.fields] == [
        ("pid", 0), ("address", 8), ("name", 16), ("block", 20), ("n", 36),
    ]  # fmt: skip
    assert size == 40
    raw = struct.pack("=iiQHH16si", -5, 0, 1 << 40, size, 4, bytes(range(16)), 3) + b"abc\0"
    assert record.decode(raw) == {
        "pid": -5, "address": 1 << 40, "name": "abc", "block": bytes(range(16)), "n": 3,
    }  # fmt: skip
    view = View("block", {"open_flags": Kernel("n")}, 16, "n")
    plan = compile_plan(FileEvent, [("filename", Kernel("name")), view], record)
    assert plan.view == (20, 16, 36)
    made = FileEvent.parse(plan.run(raw, bytes(3)))
    assert (made.filename, made.open_flags) == ("abc", 3)


def test_a_text_that_is_not_there_is_empty() -> None:
    raw = struct.pack("=QQHHHH", 1, 2, 24, 2, 26, 0) + b"x\0"
    assert EXECUTED.decode(raw) == {"address": 1, "length": 2, "filename": "x", "arguments": ""}


@pytest.mark.parametrize(("text", "count"), [("0-3\n", 4), ("0\n", 1), ("0-1,5\n", 6), ("0,2-9\n", 10)])
def test_the_cpus_that_may_be(tmp_path: Path, text: str, count: int) -> None:
    (tmp_path / "possible").write_text(text)
    assert bpf.possible_cpus(tmp_path / "possible") == count


class Refusing:
    """A kernel that makes maps and takes no programs."""

    def __init__(self, map_errno: int = 0, program_errno: int = 0, log: bytes = b"") -> None:
        self.map_errno, self.program_errno, self.log = map_errno, program_errno, log

    def rs_bpf_map(self, *_: int) -> int:
        return -self.map_errno or os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def rs_bpf_program(self, _name: bytes, _code: bytes, _count: int, log: object, size: int) -> int:
        if size:
            ffi.memmove(log, self.log, len(self.log))
        return -self.program_errno


PROGRAMS = [Attachment(1, Program("test", (*bpf.emit(R6, R0, 8), *bpf.leave())))]


@pytest.mark.parametrize(
    ("kernel", "cause", "hint"),
    [
        (Refusing(map_errno=errno.EPERM), "not permitted", "CAP_BPF"),
        (Refusing(program_errno=errno.EPERM), "not permitted", "CAP_SYS_ADMIN"),
        (Refusing(map_errno=errno.ENOSYS), "a bpf map \\(output\\): Function not implemented", ""),
        (
            Refusing(
                program_errno=errno.EACCES, log=b"0: (85) call\nR6 !read_ok\nprocessed 4 insns\n"
            ),
            "the bpf program test: Permission denied: 0: \\(85\\) call; R6 !read_ok$",
            "",
        ),
    ],
)  # fmt: skip
def test_a_refusal_says_why(kernel: Refusing, cause: str, hint: str) -> None:
    """And nothing stays open."""
    with mock.patch.object(bpf, "lib", kernel), pytest.raises(UnservableError, match=cause) as caught:
        bpf.load_programs("tests", PROGRAMS)
    assert hint in caught.value.hint


@pytest.mark.asan
@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="no registers are sampled there")
@pytest.mark.parametrize(
    ("more", "abi", "cgroup"),
    [
        (struct.pack("=3Q", 2, 0x7FFC0000, 42), 2, 42),
        (struct.pack("=3Q", 1, 0xFFFC0000, 42), 1, 42),
        (struct.pack("=2Q", 2, 0x7FFC0000), 2, 0),  # without CONFIG_CGROUP_PERF
        (struct.pack("=2Q", 0, 42), 0, 42),  # a kernel thread has no registers of a user's
        (struct.pack("=Q", 2), 2, 0),  # garbage, cut short
        (b"", 0, 0),
    ],
)
def test_what_a_record_brings_of_its_caller(more: bytes, abi: int, cgroup: int) -> None:
    rig, ring = Rig(), FakeRing()
    ring.attach(rig.engine)
    rig.event(7, rig.engine.open_source(lib.RS_LIFECYCLE | lib.RS_CALLER))
    ring.write(sample(7, now(), bytes(28), pid=5, more=more))
    assert rig.step().why == "RECORD"
    assert (rig.engine.stop.abi, rig.engine.stop.cgroup) == (abi, cgroup)
    rig.close()


def test_programs_that_did_not_run_are_counted_once_while_others_take_their_place() -> None:
    missed = {"old": 3, "new": 0}

    def opened(name: str) -> Any:
        return perf._Opened(None, programs=cast(Any, SimpleNamespace(missed=lambda: missed[name])))

    replaced: list[Any] = []
    rings: Any = SimpleNamespace(replaced_of=lambda _: replaced)
    event = perf.ProgramEvent(rings, "an event", lambda _: [], 0, perf.Lane.BULK)
    event._opened = opened("old")
    assert event.lost() == 3
    replaced.append(event._opened)
    event._opened = opened("new")
    assert event.lost() == 0
    missed.update(old=4, new=2)
    assert event.lost() == 3
    event._missed += missed["old"]
    replaced.clear()
    assert event.lost() == 0
