"""Opens and network calls made through io_uring(7), which are no system calls of their own.

Whatever way a request goes later - at once, as a link in a chain, by a worker - it passes one tracepoint
first, in the thread that submits it (or the ring's own, which is of the same process): io_uring_submit_req,
io_uring_submit_sqe before 6.4. By then the kernel has read the request. The ladder:

1. A bpf program there reads the request as the kernel has it. A name is the kernel's copy; an address that of
   the caller, which the kernel reads a moment earlier or later, but for what is sent since 6.10.
2. kprobes on what reads requests (io_uring/openclose.c, net.c) see them as the caller gave them.
3. The tracepoint says which operation it is, and no more: what a filter asks for can't be told from the rest.

Results come by a program at io_uring_complete, where that tells of which request (since 5.17). Of a request
that completes again and again (multishot) only the last is told; the others do not say whose they are.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from .. import bpf
from .._perf import ffi, lib
from ..bpf import R0, R1, R2, R3, R6, R7, R8, R9, R10, Code, Helper, Label, Program, Reg
from ..bpf_filter import condition
from ..btf import read_btf
from ..errors import KernelError, UnservableError
from ..expression import FALSE, Op, Predicate, all_of, any_of, predicates
from ..program import fields_of
from . import Mechanism
from .bulk import BulkEvent, BulkWant
from .call_programs import (
    NAME_READ,
    OPENED,
    OPENED_SIZE,
    PATH_MAX,
    SOCKADDR,
    emit_record,
    emitted,
    leave_out,
    room,
)
from .ladder import Ladder, Rung

if TYPE_CHECKING:
    from ..btf import Btf
    from ..expression import Expression
    from ..plan import Table
    from ..program import Fields
    from ..sensor import Sensor
    from ..tracefs.format import Format

_SUBMISSIONS = ("io_uring_submit_req", "io_uring_submit_sqe")
_COMPLETION = "io_uring_complete"
_REQUEST = struct.Struct("=BBHiQQIIQHHiQQ")  # struct io_uring_sqe
# what a sysctl, seccomp, a security module, a limit on locked memory say
_NOT_OURS = frozenset({errno.EPERM, errno.ENOSYS, errno.EACCES, errno.ENOMEM})
_FIXED_FILE = 1  # REQ_F_FIXED_FILE: its descriptor is an index among the ring's files, which is none
_ENTRY_SHIFT = 6  # 64 bytes
_LARGE_ENTRIES = 1 << 10  # IORING_SETUP_SQE128: twice as many
FD = 4  # where they have the descriptor
ADDRESS, MORE = 16, 8  # and what points at a name or an address; the length of that or an address of its own
_POINTER, _LENGTH, _MESSAGE = -16, -24, -40  # places on the stack


class Opcode(IntEnum):
    """The operations that are events here, IORING_OP_*."""

    SENDMSG = 9
    RECVMSG = 10
    ACCEPT = 13
    CONNECT = 16
    OPENAT = 18
    SEND = 26
    RECV = 27
    OPENAT2 = 28
    SEND_ZC = 47
    SENDMSG_ZC = 48
    BIND = 56
    LISTEN = 57
    RECV_ZC = 58


OPENS = (Opcode.OPENAT, Opcode.OPENAT2)
_SENDS = (Opcode.SEND, Opcode.SEND_ZC)
_MESSAGES = (Opcode.SENDMSG, Opcode.SENDMSG_ZC)

# `fixed`: the descriptor is none; what is behind the fixed part is there as far as it could be read
REQUESTED, _ = bpf.record_format(
    "request", fd="s32", length="s32", backlog="s32", opcode="u8", fixed="u8", block="u8[112]"
)
_REQUESTED_SIZE = REQUESTED["block"].offset
COMPLETED, _COMPLETED_SIZE = bpf.record_format("completed", ret="s32", opcode="u8")


def submissions(sensor: Sensor) -> Format:
    """The tracepoint that requests pass. UnservableError if there is none."""
    for name in _SUBMISSIONS:
        with suppress(KernelError):
            return sensor.tracefs.read_format("io_uring", name)
    raise UnservableError("io_uring", "no tracepoint of its requests")


def make_request(opcode: Opcode, fd: int, address: bytes, more: int = 0) -> bool:
    """Have the kernel do something through a ring of ours; False if we may have none."""
    memory = ffi.new("char[]", address)
    pointer = int(ffi.cast("uintptr_t", memory))
    flags = os.O_CLOEXEC if opcode in OPENS else 0
    entry = _REQUEST.pack(opcode, 0, 0, fd, more, pointer, 0, flags, 0, 0, 0, 0, 0, 0)
    result = lib.rs_uring_request(entry)
    if -result in _NOT_OURS:
        return False
    if result < 0:
        raise KernelError("a request of io_uring", -result)
    return True


class RingRequests:
    """A family's events of io_uring, by the best way there is; none where the kernel has no io_uring."""

    def __init__(
        self, sensor: Sensor, family: str, rungs: Sequence[Rung], cause: Callable[[], object]
    ) -> None:
        self._family = family
        self._there = any(sensor.tracefs.has_event("io_uring", name) for name in _SUBMISSIONS)
        self._ladder = Ladder(sensor, family, rungs, cause)

    def wants(
        self,
        events: Callable[[Rung], Sequence[tuple[BulkEvent, Sequence[Opcode]]]],
        expression: Callable[[BulkEvent], Expression],
    ) -> list[BulkWant]:
        """The requests, of events that bring them, that an expression accepts, as far as that can be told."""
        rung, _ = self._reached()
        wants = []
        for event, opcodes in events(rung) if rung else ():
            asked = expression(event)
            if "opcode" in event.fields:
                asked = all_of([any_of(Predicate(Op.EQ, "opcode", int(one)) for one in opcodes), asked])
            if asked != FALSE and all(one.field in event.fields for one in predicates(asked)):
                wants.append(BulkWant.of(self._family, event, asked))
        return wants

    def note(self, *others: str) -> str:
        """What a subscriber should know, these with it."""
        _, note = self._reached()
        return "; ".join(one for one in (*others, note and f"{self._family}: {note}") if one)

    def mechanisms(self) -> list[Mechanism]:
        """Its row of `ringside check`."""
        rung, note = self._reached()
        if rung is not None:
            return [Mechanism(self._family, True, rung.mechanism, note)]
        return [Mechanism(self._family, False, "none", note)] if self._there else []

    def _reached(self) -> tuple[Rung | None, str]:
        """The way, if there is one, and what can be missing."""
        if not self._there:
            return None, ""
        try:
            rung = self._ladder.reached()
        except UnservableError as error:
            return None, f"not seen: {error.cause}"
        return rung, rung.best_effort


# ---- programs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestProgram:
    """How the record of some requests is made.

    `gather` fills the fixed part at R7, and reads behind it, from the request at R9 with the tracepoint's
    record at R6 and the operation in R8. R8 says then how many bytes; `finish` tells them in the record.
    """

    record: Format
    opcodes: tuple[Opcode, ...]
    gather: tuple[Code, ...]
    finish: tuple[Code, ...]
    size: int  # of the fixed part
    most: int  # bytes behind it

    def program(self, tracepoint: Format, name: str, refuse: tuple[Code, ...], self_pid: int) -> Program:
        """At the tracepoint of requests. `refuse` goes on at `out` with what nobody wants."""
        return Program(
            name,
            (
                bpf.load(R8, 1, R1, tracepoint["opcode"].offset),
                *(bpf.jump_if(R8, "==", opcode, "ours") for opcode in self.opcodes),
                bpf.jump("out"),
                Label("ours"),
                bpf.alu(R6, "=", Reg(R1)),
                *leave_out(self_pid),
                *bpf.find_scratch(room(self.size + self.most), "out"),
                bpf.alu(R7, "=", Reg(R0)),
                bpf.load(R9, 8, R6, tracepoint["req"].offset),
                *self.gather,
                *emit_record(self.finish, refuse, self.size),
            ),
        )


def _kernel(base: int, offset: int, size: int, to: int, at: int = R10) -> tuple[Code, ...]:
    """`size` bytes of the kernel's memory at base + offset to at + to."""
    return bpf.read(Helper.PROBE_READ_KERNEL, at, to, size, base, offset)


def open_request(btf: Btf, tracepoint: Format) -> RequestProgram:
    """Of opens: the name that the kernel has copied, its struct open_how."""
    _need(tracepoint, "req", "opcode")
    how, name = btf.offset("io_open", "how"), btf.offset("io_open", "filename")
    gather = (
        *_kernel(R9, how, 16, _MESSAGE),
        bpf.load(R1, 8, R10, _MESSAGE),
        bpf.store(R7, OPENED["flags"].offset, 4, Reg(R1)),
        bpf.load(R1, 8, R10, _MESSAGE + 8),
        bpf.store(R7, OPENED["mode"].offset, 4, Reg(R1)),
        *_kernel(R9, name, 8, _POINTER),
        bpf.load(R8, 8, R10, _POINTER),
        *_kernel(R8, btf.offset("filename", "name"), 8, _POINTER),
        bpf.load(R8, 8, R10, _POINTER),
        *bpf.read(Helper.PROBE_READ_KERNEL_STR, R7, OPENED_SIZE, PATH_MAX + 1, R8),
        bpf.alu(R8, "=", Reg(R0)),
        bpf.jump_if(R8, "<=", PATH_MAX + 1, "named"),
        bpf.alu(R8, "=", 0),
        Label("named"),
    )
    return RequestProgram(OPENED, OPENS, gather, NAME_READ, OPENED_SIZE, PATH_MAX + 1)


def network_request(btf: Btf, tracepoint: Format, opcodes: Sequence[Opcode]) -> RequestProgram:
    """Of what is done to sockets: descriptor, address, backlog."""
    _need(tracepoint, "req", "opcode", "flags")

    def length(base: int, offset: int, size: int = 4) -> tuple[Code, ...]:
        return (*_kernel(base, offset, size, _LENGTH), bpf.load(R8, size, R10, _LENGTH))

    def connect() -> tuple[Code, ...]:
        return (
            *_kernel(R9, btf.offset("io_connect", "addr"), 8, _POINTER),
            *length(R9, btf.offset("io_connect", "addr_len")),
            bpf.jump("user"),
        )

    def bind() -> tuple[Code, ...]:
        return (
            *_entry(btf, tracepoint),
            bpf.load(R8, 8, R10, _POINTER),
            *_kernel(R8, ADDRESS, 8, _POINTER),
            *length(R9, btf.offset("io_bind", "addr_len")),
            bpf.jump("user"),
        )

    def listen() -> tuple[Code, ...]:
        return (
            *_kernel(R9, btf.offset("io_listen", "backlog"), 4, REQUESTED["backlog"].offset, R7),
            bpf.jump("none"),
        )

    def named(otherwise: str) -> tuple[Code, ...]:
        """As the kernel has copied it, if it has: into a struct io_async_msghdr."""
        return (
            *_kernel(R9, btf.offset("io_kiocb", "async_data"), 8, _POINTER),
            bpf.load(R8, 8, R10, _POINTER),
            bpf.jump_if(R8, "==", 0, otherwise),
            *_kernel(R8, btf.offset("io_async_msghdr", "msg", "msg_name"), 8, _POINTER),
            *length(R8, btf.offset("io_async_msghdr", "msg", "msg_namelen")),
            bpf.jump("kernel"),
        )

    def message() -> tuple[Code, ...]:
        return (
            *named("message_user"),
            Label("message_user"),
            *_kernel(R9, btf.offset("io_sr_msg", "umsg"), 8, _POINTER),
            bpf.load(R3, 8, R10, _POINTER),
            *bpf.read(Helper.PROBE_READ_USER, R10, _MESSAGE, 16, R3),
            bpf.jump_if(R0, "!=", 0, "none"),
            bpf.load(R1, 8, R10, _MESSAGE),
            bpf.store(R10, _POINTER, 8, Reg(R1)),
            bpf.load(R8, 4, R10, _MESSAGE + 8),
            bpf.jump("user"),
        )

    def send() -> tuple[Code, ...]:
        try:
            address, size = btf.offset("io_sr_msg", "addr"), btf.offset("io_sr_msg", "addr_len")
        except UnservableError:  # the kernel's copy has it; before 6.0 there is none
            return named("none")
        return (
            *named("send_user"),
            Label("send_user"),
            *_kernel(R9, address, 8, _POINTER),
            *length(R9, size, 2),
            bpf.jump("user"),
        )

    kinds: Mapping[Callable[[], tuple[Code, ...]], Sequence[Opcode]] = {
        connect: (Opcode.CONNECT,),
        bind: (Opcode.BIND,),
        listen: (Opcode.LISTEN,),
        message: _MESSAGES,
        send: _SENDS,
    }
    chosen: list[Code] = []
    bodies: list[Code] = []
    for kind, which in kinds.items():
        ours = [one for one in which if one in opcodes]
        try:
            body = kind() if ours else ()
        except UnservableError:  # a kernel without it
            continue
        label = f"is_{kind.__name__}"
        chosen += [bpf.jump_if(R8, "==", one, label) for one in ours]
        bodies += [Label(label), *body] if ours else []
    gather = (
        bpf.store(R7, REQUESTED["opcode"].offset, 1, Reg(R8)),
        bpf.store(R7, REQUESTED["backlog"].offset, 4, 0),
        bpf.load(R1, tracepoint["flags"].size, R6, tracepoint["flags"].offset),
        bpf.alu(R1, "&=", _FIXED_FILE),
        bpf.store(R7, REQUESTED["fixed"].offset, 1, Reg(R1)),
        *_descriptor(btf, tracepoint),
        bpf.load(R8, 1, R7, REQUESTED["opcode"].offset),
        *chosen,
        bpf.jump("none"),
        *bodies,
        Label("kernel"),
        *_address(Helper.PROBE_READ_KERNEL),
        Label("user"),
        *_address(Helper.PROBE_READ_USER),
        Label("none"),
        bpf.alu(R8, "=", 0),
        Label("read"),
    )
    finish = (bpf.store(R7, REQUESTED["length"].offset, 4, Reg(R8)),)
    return RequestProgram(REQUESTED, tuple(opcodes), gather, finish, _REQUESTED_SIZE, REQUESTED["block"].size)


def _address(helper: Helper) -> tuple[Code, ...]:
    """R8 bytes, an int, at the pointer that was found, behind the record; on to `read`, or `none`."""
    return (
        bpf.alu(R8, "<<=", 32),
        bpf.alu(R8, "s>>=", 32),
        bpf.jump_if(R8, "s<=", 0, "none"),
        bpf.jump_if(R8, "<=", SOCKADDR, f"fits{helper}"),
        bpf.alu(R8, "=", SOCKADDR),
        Label(f"fits{helper}"),
        bpf.load(R3, 8, R10, _POINTER),
        bpf.jump_if(R3, "==", 0, "none"),
        *bpf.read(helper, R7, _REQUESTED_SIZE, Reg(R8), R3),
        bpf.jump_if(R0, "!=", 0, "none"),
        bpf.jump("read"),
    )


def _descriptor(btf: Btf, tracepoint: Format) -> tuple[Code, ...]:
    """The request's descriptor, into the record; before 5.18 the kernel keeps the file only."""
    to = REQUESTED["fd"].offset
    with suppress(UnservableError):
        return _kernel(R9, btf.offset("io_kiocb", "cqe", "fd"), 4, to, R7)
    return (
        *_entry(btf, tracepoint),
        bpf.load(R8, 8, R10, _POINTER),
        *_kernel(R8, FD, 4, to, R7),
    )


def _entry(btf: Btf, tracepoint: Format) -> tuple[Code, ...]:
    """Where the request's entry in its ring is, which the kernel has just read: to _POINTER. Uses R8."""
    _need(tracepoint, "ctx")

    def ring(member: str, size: int, place: int) -> tuple[Code, ...]:
        return _kernel(R8, btf.offset("io_ring_ctx", member), size, place)

    return (
        bpf.load(R8, 8, R6, tracepoint["ctx"].offset),
        *ring("sq_entries", 4, _LENGTH),
        *ring("cached_sq_head", 4, _MESSAGE),
        # head - 1 & size - 1, and what stands there in the array, if there is one
        bpf.load(R1, 4, R10, _MESSAGE),
        bpf.alu(R1, "-=", 1),
        bpf.load(R2, 4, R10, _LENGTH),
        bpf.alu(R2, "-=", 1),
        bpf.alu(R1, "&=", Reg(R2)),
        bpf.store(R10, _MESSAGE, 8, Reg(R1)),
        *ring("sq_array", 8, _POINTER),
        bpf.load(R3, 8, R10, _POINTER),
        bpf.jump_if(R3, "==", 0, "indexed"),
        bpf.load(R1, 8, R10, _MESSAGE),
        bpf.alu(R1, "<<=", 2),
        bpf.alu(R3, "+=", Reg(R1)),
        bpf.store(R10, _MESSAGE, 8, 0),
        *_kernel(R3, 0, 4, _MESSAGE),
        Label("indexed"),
        *ring("flags", 4, _LENGTH),
        *ring("sq_sqes", 8, _POINTER),
        bpf.load(R1, 8, R10, _MESSAGE),
        bpf.alu(R1, "<<=", _ENTRY_SHIFT),
        bpf.load(R2, 4, R10, _LENGTH),
        bpf.alu(R2, "&=", _LARGE_ENTRIES),
        bpf.jump_if(R2, "==", 0, "sized"),
        bpf.alu(R1, "<<=", 1),
        Label("sized"),
        bpf.load(R2, 8, R10, _POINTER),
        bpf.alu(R2, "+=", Reg(R1)),
        bpf.store(R10, _POINTER, 8, Reg(R2)),
    )


def completion_program(
    btf: Btf, tracepoint: Format, opcodes: Sequence[Opcode], name: str, refuse: tuple[Code, ...]
) -> Program:
    """At the tracepoint of completions: the result, and of which operation it is."""
    return Program(
        name,
        (
            bpf.alu(R6, "=", Reg(R1)),
            bpf.load(R9, 8, R6, tracepoint["req"].offset),
            bpf.jump_if(R9, "==", 0, "out"),
            bpf.store(R10, _POINTER, 8, 0),
            *_kernel(R9, btf.offset("io_kiocb", "opcode"), 1, _POINTER),
            bpf.load(R8, 1, R10, _POINTER),
            *(bpf.jump_if(R8, "==", opcode, "ours") for opcode in opcodes),
            bpf.jump("out"),
            Label("ours"),
            bpf.store(R10, _POINTER + COMPLETED["opcode"].offset, 1, Reg(R8)),
            bpf.load(R1, 4, R6, tracepoint["res"].offset),
            bpf.store(R10, _POINTER + COMPLETED["ret"].offset, 4, Reg(R1)),
            bpf.alu(R7, "=", Reg(R10)),
            bpf.alu(R7, "+=", _POINTER),
            bpf.alu(R8, "=", 0),
            *emit_record((), refuse, _COMPLETED_SIZE),
        ),
    )


def _need(tracepoint: Format, *fields: str) -> None:
    missing = [field for field in fields if field not in tracepoint]
    if missing:
        raise UnservableError("io_uring", f"this kernel's {tracepoint.name} has no {missing[0]}")


# ---- events --------------------------------------------------------------------------------------


def request_event(
    sensor: Sensor, build: Callable[[Btf, Format], RequestProgram], table: Table, fields: Fields | None = None
) -> BulkEvent:
    """Requests, as a program tells them."""
    tracepoint = submissions(sensor)
    made = build(read_btf(), tracepoint)
    compared = fields_of(made.record) if fields is None else fields

    def attach(wanted: Expression, everybodys: bool) -> list[bpf.Attachment]:
        refuse = condition(wanted, compared, made.size, "out")
        program = made.program(tracepoint, "uring_request", refuse, 0 if everybodys else sensor.pid)
        return [bpf.Attachment(tracepoint.id, program)]

    return emitted(sensor, made.record, table, compared, attach)


def completion_event(sensor: Sensor, opcodes: Sequence[Opcode], table: Table) -> BulkEvent:
    """Completions of such requests."""
    try:
        tracepoint = sensor.tracefs.read_format("io_uring", _COMPLETION)
    except KernelError as error:
        raise UnservableError("io_uring", "no tracepoint of its completions") from error
    _need(tracepoint, "req", "res")
    btf, compared = read_btf(), fields_of(COMPLETED)

    def attach(wanted: Expression, everybodys: bool) -> list[bpf.Attachment]:  # noqa: ARG001
        refuse = condition(wanted, compared, _COMPLETED_SIZE, "out")
        program = completion_program(btf, tracepoint, opcodes, "uring_done", refuse)
        return [bpf.Attachment(tracepoint.id, program)]

    return emitted(sensor, COMPLETED, table, compared, attach)


def bare_event(sensor: Sensor, table: Table) -> BulkEvent:
    """Requests, as the tracepoint tells them: which operation."""
    tracepoint = submissions(sensor)
    _need(tracepoint, "opcode")
    return BulkEvent(
        sensor.rings,
        tracepoint,
        tracepoint.id,
        table,
        exclude=sensor.exclude_self(),
        flags=sensor.lineage_flag(),
        fields={"opcode": fields_of(tracepoint)["opcode"]},
    )
