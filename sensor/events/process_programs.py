"""The bpf programs that tell of execs and exits what their tracepoints do not: command line and status."""

from __future__ import annotations

from .. import bpf
from ..bpf import R0, R1, R2, R3, R6, R7, R8, R9, R10, Helper, Label, Program, Reg
from ..btf import Btf
from ..tracefs.format import Format

PATH_MAX = 4096
LONGEST = bpf.LARGEST_ELEMENT - PATH_MAX - 64  # bytes of a command line that come with the record
_GROUP_EXIT = 4  # SIGNAL_GROUP_EXIT, include/linux/sched/signal.h: one status for all threads

# `length` is what the command line has at `address`; of `arguments` nothing is there if it could not be read
EXECUTED, _EXECUTED_SIZE = bpf.record_format(
    "bpf_exec", address="u64", length="u64", filename="char", arguments="char"
)
EXITED, _EXITED_SIZE = bpf.record_format("bpf_exit", code="s32")


def exec_program(btf: Btf, record: Format) -> Program:
    """At sched:sched_process_exec, whose format this is: the new program's file name and command line."""
    scratch = bpf.scratch(bpf.LARGEST_ELEMENT)
    at = {name: EXECUTED[name].offset for name in ("address", "length", "filename", "arguments")}

    def member(base: int, offset: int, to: int) -> tuple[bpf.Code, ...]:
        """The 8 bytes at base + offset, a kernel address, to R10 + to."""
        return bpf.read(Helper.PROBE_READ_KERNEL, R10, to, 8, base, offset)

    arg_start, arg_end = (btf.offset("mm_struct", name) for name in ("arg_start", "arg_end"))
    return Program(
        "ringside_exec",
        (
            bpf.alu(R6, "=", Reg(R1)),
            *bpf.find_scratch(scratch, "out"),
            bpf.alu(R7, "=", Reg(R0)),
            # current->mm, its arg_start and arg_end
            bpf.call(Helper.GET_CURRENT_TASK),
            bpf.alu(R8, "=", Reg(R0)),
            *member(R8, btf.offset("task_struct", "mm"), -16),
            bpf.load(R8, 8, R10, -16),
            *member(R8, arg_start, -24),
            *member(R8, arg_end, -32),
            bpf.load(R9, 8, R10, -32),
            bpf.load(R1, 8, R10, -24),
            bpf.alu(R9, "-=", Reg(R1)),
            bpf.store(R7, at["address"], 8, Reg(R1)),
            bpf.store(R7, at["length"], 8, Reg(R9)),
            # the file name, right behind the fixed part; R8: its length
            bpf.load(R8, 4, R6, record["filename"].offset),
            bpf.alu(R8, "&=", 0xFFFF),
            bpf.alu(R9, "=", Reg(R6)),
            bpf.alu(R9, "+=", Reg(R8)),
            *bpf.read(Helper.PROBE_READ_KERNEL_STR, R7, _EXECUTED_SIZE, PATH_MAX, R9),
            bpf.alu(R8, "=", Reg(R0)),
            bpf.jump_if(R8, "<=", PATH_MAX, "named"),
            bpf.alu(R8, "=", 0),
            Label("named"),
            bpf.alu(R1, "=", Reg(R8)),
            bpf.alu(R1, "<<=", 16),
            bpf.alu(R1, "|=", _EXECUTED_SIZE),
            bpf.store(R7, at["filename"], 4, Reg(R1)),
            # the command line behind it; R9: as much as fits
            bpf.load(R9, 8, R7, at["length"]),
            bpf.jump_if(R9, "<=", LONGEST, "fits"),
            bpf.alu(R9, "=", LONGEST),
            Label("fits"),
            bpf.alu(R1, "=", Reg(R7)),
            bpf.alu(R1, "+=", Reg(R8)),
            bpf.alu(R1, "+=", _EXECUTED_SIZE),
            bpf.alu(R2, "=", Reg(R9)),
            bpf.load(R3, 8, R7, at["address"]),
            bpf.call(Helper.PROBE_READ_USER),
            bpf.jump_if(R0, "==", 0, "read"),
            bpf.alu(R9, "=", 0),
            Label("read"),
            bpf.alu(R1, "=", Reg(R9)),
            bpf.alu(R1, "<<=", 16),
            bpf.alu(R1, "|=", Reg(R8)),
            bpf.alu(R1, "+=", _EXECUTED_SIZE),
            bpf.store(R7, at["arguments"], 4, Reg(R1)),
            bpf.alu(R8, "+=", Reg(R9)),
            bpf.alu(R8, "+=", _EXECUTED_SIZE),
            *bpf.emit(R6, R7, Reg(R8)),
            Label("out"),
            *bpf.leave(),
        ),
    )


def exit_program(btf: Btf, record: Format) -> Program:
    """At sched:sched_process_exit, whose format this is: of the last thread, what wait(2) will tell.

    As the kernel's wait_task_zombie() has it: that of the whole process where all its threads were told to
    end, else what its first thread, perhaps long gone, has left. A thread that is not the last comes too
    where the tracepoint does not tell which it is.
    """
    signal, leader = (btf.offset("task_struct", name) for name in ("signal", "group_leader"))
    threads: tuple[bpf.Code, ...] = ()
    if "group_dead" in record:
        threads = (
            bpf.load(R1, 1, R1, record["group_dead"].offset),
            bpf.jump_if(R1, "==", 0, "out"),
        )

    def member(base: int, offset: int, size: int) -> tuple[bpf.Code, ...]:
        return bpf.read(Helper.PROBE_READ_KERNEL, R10, -8, size, base, offset)

    return Program(
        "ringside_exit",
        (
            bpf.alu(R6, "=", Reg(R1)),
            *threads,
            bpf.store(R10, -16, 8, 0),
            bpf.call(Helper.GET_CURRENT_TASK),
            bpf.alu(R7, "=", Reg(R0)),
            *member(R7, signal, 8),
            bpf.load(R8, 8, R10, -8),
            *member(R8, btf.offset("signal_struct", "flags"), 4),
            bpf.load(R9, 4, R10, -8),
            bpf.jump_if(R9, "&", _GROUP_EXIT, "group"),
            *member(R7, leader, 8),
            bpf.load(R8, 8, R10, -8),
            *member(R8, btf.offset("task_struct", "exit_code"), 4),
            bpf.jump("told"),
            Label("group"),
            *member(R8, btf.offset("signal_struct", "group_exit_code"), 4),
            Label("told"),
            bpf.load(R1, 4, R10, -8),
            bpf.store(R10, -16 + EXITED["code"].offset, 4, Reg(R1)),
            bpf.alu(R7, "=", Reg(R10)),
            bpf.alu(R7, "+=", -16),
            *bpf.emit(R6, R7, _EXITED_SIZE),
            Label("out"),
            *bpf.leave(),
        ),
    )
