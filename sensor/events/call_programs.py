"""bpf programs at system calls: they read the file name or address at the call, in the kernel.

A program runs at the call's tracepoint, makes a record of the arguments and of what they point at, and hands
it to the ring of its CPU. Where memory of the caller is not present at that moment, which a name in a program
that has just begun often is not, no program can bring it in; the kernel does, in the course of the call. So
the arguments are kept, and a second program reads again at the call's exit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import bpf
from ..bpf import R0, R1, R2, R3, R4, R6, R7, R8, R9, R10, Code, Helper, Label, Program, Reg
from ..bpf_filter import condition
from ..errors import KernelError, UnservableError
from ..program import fields_of
from .bulk import BulkEvent

if TYPE_CHECKING:
    from ..expression import Expression
    from ..plan import Table
    from ..program import Fields
    from ..sensor import Sensor
    from ..tracefs.format import Format

PATH_MAX = 4096
SOCKADDR = 110  # bytes that are read: struct sockaddr_un has as many
_ARGUMENTS = 16  # where they are in the tracepoint's record, 8 bytes each
_WAYS = ("enter", "exit")
_SIX = 48  # bytes of them
_PENDING = bpf.Map("pending", bpf.MapType.LRU_HASH, 8, _SIX, 4096, kept=True)  # by thread

# what is behind the fixed part is there as far as it could be read
OPENED, OPENED_SIZE = bpf.record_format("open", flags="s32", mode="u32", filename="char")
CALLED, _ = bpf.record_format("call", fd="s32", length="s32", block="u8[112]")
CALLED_SIZE = CALLED["block"].offset


@dataclass(frozen=True)
class CallProgram:
    """How a call's record is made, from arguments at a register and an offset.

    `gather` fills the fixed part at R7 and reads behind it. R8 says then how many bytes, 0 if the caller has
    given nothing to read; it goes on at `unread` if memory is not present. `finish` tells R8 in the record.
    """

    gather: Callable[[int, int], tuple[Code, ...]]
    finish: tuple[Code, ...]
    size: int  # of the fixed part
    most: int  # bytes behind it
    arguments: int  # how many of them are used

    def enter(self, name: str, refuse: tuple[Code, ...], self_pid: int) -> Program:
        """At the call's beginning. `refuse` goes on at `out` with what nobody wants."""
        return Program(
            name,
            (
                bpf.alu(R6, "=", Reg(R1)),
                *leave_out(self_pid),
                *bpf.find_scratch(self._scratch, "out"),
                bpf.alu(R7, "=", Reg(R0)),
                *self.gather(R6, _ARGUMENTS),
                bpf.jump("read"),
                Label("unread"),
                *_keep(self.arguments),
                bpf.jump_if(R0, "==", 0, "out"),
                bpf.alu(R8, "=", 0),
                Label("read"),
                *emit_record(self.finish, refuse, self.size),
            ),
        )

    def exit(self, name: str, refuse: tuple[Code, ...]) -> Program:
        """At its end, if something could not be read."""
        return Program(
            name,
            (
                bpf.alu(R6, "=", Reg(R1)),
                bpf.call(Helper.GET_CURRENT_PID_TGID),
                bpf.store(R10, -16, 8, Reg(R0)),
                *bpf.find(_PENDING, -16, "out"),
                bpf.alu(R9, "=", Reg(R0)),
                *bpf.find_scratch(self._scratch, "out"),
                bpf.alu(R7, "=", Reg(R0)),
                *self.gather(R9, 0),
                bpf.jump("read"),
                Label("unread"),
                bpf.alu(R8, "=", 0),
                Label("read"),
                bpf.load_map(R1, _PENDING),
                bpf.alu(R2, "=", Reg(R10)),
                bpf.alu(R2, "+=", -16),
                bpf.call(Helper.MAP_DELETE_ELEM),
                *emit_record(self.finish, refuse, self.size),
            ),
        )

    @property
    def _scratch(self) -> bpf.Map:
        return room(self.size + self.most)


def room(size: int) -> bpf.Map:
    """The scratch map for a record of so many bytes at most."""
    return bpf.scratch(size + 8 & ~7)


def emit_record(finish: tuple[Code, ...], refuse: tuple[Code, ...], size: int) -> tuple[Code, ...]:
    """A program's end: the record at R7, R8 bytes behind the `size` that are fixed, unless it is refused."""
    return (
        *finish,
        *refuse,
        bpf.alu(R8, "+=", size),
        *bpf.emit(R6, R7, Reg(R8)),
        Label("out"),
        *bpf.leave(),
    )


def leave_out(self_pid: int) -> tuple[Code, ...]:
    """Not what the sensor does itself; 0: that too."""
    if not self_pid:
        return ()
    return (
        bpf.call(Helper.GET_CURRENT_PID_TGID),
        bpf.alu(R0, ">>=", 32),
        bpf.jump_if(R0, "==", self_pid, "out"),
    )


def _keep(arguments: int) -> tuple[Code, ...]:
    """Keep this thread's first arguments, from R6; R0 is 0 if that was possible."""
    copy: list[Code] = []
    for at in range(0, _SIX, 8):
        if at < 8 * arguments:  # a program that reads behind the call's own is not attached
            copy += [bpf.load(R1, 8, R6, _ARGUMENTS + at), bpf.store(R10, -80 + at, 8, Reg(R1))]
        else:
            copy.append(bpf.store(R10, -80 + at, 8, 0))
    return (
        *copy,
        bpf.call(Helper.GET_CURRENT_PID_TGID),
        bpf.store(R10, -16, 8, Reg(R0)),
        bpf.load_map(R1, _PENDING),
        bpf.alu(R2, "=", Reg(R10)),
        bpf.alu(R2, "+=", -16),
        bpf.alu(R3, "=", Reg(R10)),
        bpf.alu(R3, "+=", -80),
        bpf.alu(R4, "=", 0),
        bpf.call(Helper.MAP_UPDATE_ELEM),
    )


def _user(to: int, size: int, base: int, offset: int) -> tuple[Code, ...]:
    """`size` bytes of the caller's memory, at the pointer at base + offset, to R10 + to."""
    return (
        bpf.load(R3, 8, base, offset),
        bpf.alu(R2, "=", size),
        bpf.alu(R1, "=", Reg(R10)),
        bpf.alu(R1, "+=", to),
        bpf.call(Helper.PROBE_READ_USER),
    )


# ---- opens ---------------------------------------------------------------------------------------

# with R8, what reading at most PATH_MAX + 1 bytes of a name gave
NAME_READ: tuple[Code, ...] = (
    bpf.jump_if(R8, "<=", PATH_MAX, "whole"),
    bpf.alu(R8, "=", 0),  # a part of a name is not the name
    Label("whole"),
    bpf.alu(R1, "=", Reg(R8)),
    bpf.alu(R1, "<<=", 16),
    bpf.alu(R1, "|=", OPENED_SIZE),
    bpf.store(R7, OPENED["filename"].offset, 4, Reg(R1)),
)


def open_program(
    name: int, flags: int | None = None, mode: int | None = None, how: int | None = None, fixed: int = 0
) -> CallProgram:
    """An open's: which argument is what. `fixed`: flags of a call that has none; `how`: a struct open_how."""

    def gather(base: int, offset: int) -> tuple[Code, ...]:
        def argument(number: int | None, to: str) -> tuple[Code, ...]:
            if number is None:
                return (bpf.store(R7, OPENED[to].offset, 4, fixed if to == "flags" else 0),)
            return (
                bpf.load(R1, 8, base, offset + 8 * number),
                bpf.store(R7, OPENED[to].offset, 4, Reg(R1)),
            )

        if how is None:
            access = (*argument(flags, "flags"), *argument(mode, "mode"))
        else:
            access = (
                *_user(-32, 16, base, offset + 8 * how),
                bpf.jump_if(R0, "!=", 0, "unread"),
                *(
                    code
                    for to, at in (("flags", -32), ("mode", -24))
                    for code in (
                        bpf.load(R1, 8, R10, at),
                        bpf.store(R7, OPENED[to].offset, 4, Reg(R1)),
                    )
                ),
            )
        return (
            *argument(None, "flags"),
            *argument(None, "mode"),
            *access,
            bpf.load(R3, 8, base, offset + 8 * name),
            bpf.alu(R2, "=", PATH_MAX + 1),
            bpf.alu(R1, "=", Reg(R7)),
            bpf.alu(R1, "+=", OPENED_SIZE),
            bpf.call(Helper.PROBE_READ_USER_STR),
            bpf.alu(R8, "=", Reg(R0)),
            bpf.jump_if(R8, ">", PATH_MAX + 1, "unread"),
        )

    used = 1 + max(one for one in (name, flags, mode, how) if one is not None)
    return CallProgram(gather, NAME_READ, OPENED_SIZE, PATH_MAX + 1, used)


# ---- addresses -----------------------------------------------------------------------------------


def address_program(address: int, length: int, message: int = 0) -> CallProgram:
    """Of a call with a descriptor first, and an address in these arguments or in a struct msghdr."""

    def gather(base: int, offset: int) -> tuple[Code, ...]:
        descriptor = (
            bpf.load(R1, 8, base, offset),
            bpf.store(R7, CALLED["fd"].offset, 4, Reg(R1)),
        )
        where: tuple[Code, ...]
        if message:
            where = (
                *_user(-32, 16, base, offset + 8 * message),
                bpf.jump_if(R0, "!=", 0, "unread"),
                bpf.load(R3, 8, R10, -32),
                bpf.load(R8, 8, R10, -24),
            )
        else:
            where = (
                bpf.load(R3, 8, base, offset + 8 * address),
                bpf.load(R8, 8, base, offset + 8 * length),
            )
        return (
            *descriptor,
            *where,
            # an int; R8 = 0 if there is no address, or one of no length
            bpf.alu(R8, "<<=", 32),
            bpf.alu(R8, "s>>=", 32),
            bpf.jump_if(R8, "s<=", 0, "none"),
            bpf.jump_if(R3, "==", 0, "none"),
            bpf.jump_if(R8, "<=", SOCKADDR, "fits"),
            bpf.alu(R8, "=", SOCKADDR),
            Label("fits"),
            bpf.alu(R2, "=", Reg(R8)),
            bpf.alu(R1, "=", Reg(R7)),
            bpf.alu(R1, "+=", CALLED_SIZE),
            bpf.call(Helper.PROBE_READ_USER),
            bpf.jump_if(R0, "!=", 0, "unread"),
            bpf.jump("read"),
            Label("none"),
            bpf.alu(R8, "=", 0),
        )

    finish = (bpf.store(R7, CALLED["length"].offset, 4, Reg(R8)),)
    used = 1 + max(address, length, message)
    return CallProgram(gather, finish, CALLED_SIZE, CALLED["block"].size, used)


# ---- events --------------------------------------------------------------------------------------


def program_event(
    sensor: Sensor,
    family: str,
    record: Format,
    calls: Mapping[str, CallProgram],
    table: Table,
    fields: Fields | None = None,
) -> BulkEvent:
    """An event of these calls, as far as the kernel has them, whose records are `record`s."""
    there: list[tuple[str, int, int, CallProgram]] = []
    for name, program in calls.items():
        with suppress(KernelError):
            entered, left = (sensor.tracefs.read_format("syscalls", f"sys_{way}_{name}").id for way in _WAYS)
            there.append((name, entered, left, program))
    if not there:
        raise UnservableError(
            family, "no tracepoints of system calls", "a kernel with CONFIG_FTRACE_SYSCALLS"
        )
    compared = fields_of(record) if fields is None else fields

    def build(wanted: Expression, everybodys: bool) -> list[bpf.Attachment]:
        made = []
        for name, entered, left, program in there:
            refuse = condition(wanted, compared, program.size, "out")
            self_pid = 0 if everybodys else sensor.pid
            # the second one first: what is kept must find somebody to fetch it
            made.append(bpf.Attachment(left, program.exit(f"exit_{name}", refuse)))
            made.append(bpf.Attachment(entered, program.enter(f"enter_{name}", refuse, self_pid)))
        return made

    return emitted(sensor, record, table, compared, build)


def emitted(
    sensor: Sensor,
    record: Format,
    table: Table,
    fields: Fields,
    programs: Callable[[Expression, bool], Sequence[bpf.Attachment]],
) -> BulkEvent:
    """An event whose `record`s programs emit: those made for what is wanted, and whether of everybody."""
    return BulkEvent(
        sensor.rings,
        record,
        0,
        table,
        exclude=sensor.exclude_self(),
        flags=sensor.lineage_flag(),
        fields=fields,
        programs=programs,
    )
