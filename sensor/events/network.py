"""Network: attempts of connect, bind, listen, accept, sendto, recvfrom, and their results.

Attempts come from kprobes on the functions behind the system calls (net/socket.c), which every caller
passes, else from programs at the system calls (call_programs.py), else from the caller's memory, as for file
names. Each brings the socket address as a block of bytes, so that one table decodes it whatever the rung.
Results come from the system calls' exit tracepoints, which miss nothing however many callers are blocked;
return probes would. 32-bit callers (foreign.py) have some of these calls behind one number, socketcall(2),
its arguments in memory: the first register tells which, at the exit too. Requests of io_uring pass none of
these; they have ladders of their own (uring.py).
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ringside.api.v0 import NetworkAddressFamily, NetworkEventFilter, NetworkEventType

from .._perf import lib
from ..errors import KernelError, RequestError, UnservableError
from ..expression import TRUE, Op, Predicate, all_of, from_message
from ..plan import Came, Fetch, FetchKind, Front, Kernel, Side, Table, View, When
from ..program import FieldInfo, fields_of
from ..program import Kind as FieldKind
from ..tracefs.format import Format
from . import Mechanism, uring
from .bulk import BulkEvent, BulkWant
from .call_programs import CALLED, address_program, program_event
from .foreign import SOCKETCALL, ForeignCalls, argument, argument_field
from .foreign import want as foreign_want
from .ladder import Ladder, Rung
from .uring import ADDRESS as AT_ADDRESS
from .uring import MORE, REQUESTED, Opcode, RingRequests

if TYPE_CHECKING:
    from ..expression import Expression
    from ..program import Fields
    from ..sensor import Sensor

FAMILY = "network attempts"
RESULTS = "network results"
BY_RING = "network attempts by io_uring"
RING_RESULTS = "network results by io_uring"
_SOCKADDR = 112  # bytes that are fetched: struct sockaddr_un has 110
_INET, _INET6, _UNIX = int(socket.AF_INET), int(socket.AF_INET6), int(socket.AF_UNIX)
_Type = NetworkEventType
_NARROW = "32-bit "
# of the entry of a request of io_uring: where `len` is, and `addr_len` as an integer of 4 bytes, for a View
_LEN = 24
_ADDR_LEN = "+44($arg2):b16@0/32"


@dataclass(frozen=True)
class Call:
    """A system call: the function behind it, and where its arguments are.

    Numbers are those of the function's arguments. `address` and `length` are the tracepoint's field names,
    `message` that of a struct msghdr. 32-bit callers have it as `number`, or as the `sub`call of socketcall
    with so many `words` of arguments; no `symbol`: only as that.
    """

    name: str
    symbol: str
    address: int = 0
    length: int = 0
    address_field: str = ""
    length_field: str = ""
    message: int = 0
    backlog: int = 0
    number: int = 0
    sub: int = 0
    words: int = 0


@dataclass(frozen=True)
class Request:
    """How io_uring does it: what reads such requests, and where in their entries things are.

    `address` is that of a pointer, `message` that of one to a struct msghdr; `length` is a fetcharg.
    """

    symbol: str
    opcodes: tuple[Opcode, ...]
    address: int = 0
    length: str = ""
    message: int = 0
    backlog: int = 0


@dataclass(frozen=True)
class Action:
    """What the API calls an attempt and a result, and the calls and requests that do it."""

    attempt: NetworkEventType
    result: NetworkEventType
    calls: tuple[Call, ...]
    requests: tuple[Request, ...]
    has_address: bool = False

    @property
    def opcodes(self) -> tuple[Opcode, ...]:
        """The operations of all its requests."""
        return tuple(dict.fromkeys(opcode for one in self.requests for opcode in one.opcodes))


ACTIONS = (
    Action(
        _Type.CONNECT_ATTEMPT,
        _Type.CONNECT_RESULT,
        (Call("connect", "__sys_connect", 2, 3, "uservaddr", "addrlen", number=362, sub=3, words=3),),
        (Request("io_connect_prep", (Opcode.CONNECT,), AT_ADDRESS, f"+{MORE}($arg2):s32"),),
        True,
    ),
    Action(
        _Type.BIND_ATTEMPT,
        _Type.BIND_RESULT,
        (Call("bind", "__sys_bind", 2, 3, "umyaddr", "addrlen", number=361, sub=2, words=3),),
        (Request("io_bind_prep", (Opcode.BIND,), AT_ADDRESS, f"+{MORE}($arg2):s32"),),
        True,
    ),
    Action(
        _Type.LISTEN_ATTEMPT,
        _Type.LISTEN_RESULT,
        (Call("listen", "__sys_listen", backlog=2, number=363, sub=4, words=2),),
        (Request("io_listen_prep", (Opcode.LISTEN,), backlog=_LEN),),
    ),
    Action(
        _Type.ACCEPT_ATTEMPT,
        _Type.ACCEPT_RESULT,
        (
            Call("accept", "__sys_accept4", sub=5, words=3),
            Call("accept4", "__sys_accept4", number=364, sub=18, words=4),
        ),
        (Request("io_accept_prep", (Opcode.ACCEPT,)),),
    ),
    Action(
        _Type.SENDTO_ATTEMPT,
        _Type.SENDTO_RESULT,
        (
            Call("sendto", "__sys_sendto", 5, 6, "addr", "addr_len", number=369, sub=11, words=6),
            Call("sendmsg", "__sys_sendmsg", address_field="msg", message=2, number=370, sub=16, words=3),
            Call("send", "", sub=9, words=4),
        ),
        (
            Request("io_sendmsg_prep", (Opcode.SEND,), MORE, _ADDR_LEN),
            Request("io_sendmsg_prep", (Opcode.SENDMSG,), message=AT_ADDRESS),
            Request("io_send_zc_prep", (Opcode.SEND_ZC,), MORE, _ADDR_LEN),
            Request("io_send_zc_prep", (Opcode.SENDMSG_ZC,), message=AT_ADDRESS),
        ),
        True,
    ),
    Action(
        _Type.RECVFROM_ATTEMPT,
        _Type.RECVFROM_RESULT,
        (
            Call("recvfrom", "__sys_recvfrom", number=371, sub=12, words=6),
            Call("recvmsg", "__sys_recvmsg", number=372, sub=17, words=3),
            Call("recv", "", sub=10, words=4),
        ),
        (
            Request("io_recvmsg_prep", (Opcode.RECV, Opcode.RECVMSG)),
            Request("io_recvzc_prep", (Opcode.RECV_ZC,)),
        ),
    ),
)


def address_table(at: int = 0) -> Table:
    """What an event tells of the address that lies there in the memory that came with the record."""
    port = Side(at + 2, 2, swap=True)
    inet = {"address": {"address": Side(at + 4, 4)}, "port": port}
    inet6 = {"address": {"high": Side(at + 8, 8), "low": Side(at + 16, 8)}, "port": port}
    local = Side(at + 2, 108, abstract=True)
    family = Side(at, 2)
    return [
        When(family, _INET, [("family", NetworkAddressFamily.INET), ("ipv4_address", inet)]),
        When(family, _INET6, [("family", NetworkAddressFamily.INET6), ("ipv6_address", inet6)]),
        When(family, _UNIX, [("family", NetworkAddressFamily.LOCAL), ("local_address", local)]),
    ]


ADDRESS = address_table()


def _guard(family: int) -> Any:
    return Predicate(Op.EQ, "sa_family", family)


def address_fields(at: int = 0) -> dict[str, FieldInfo]:
    """What a filter may compare of an address that lies there in the memory that came with the record."""
    inet, inet6, local = _guard(_INET), _guard(_INET6), _guard(_UNIX)
    whole = FieldKind.INT
    return {
        "sa_family": FieldInfo(whole, at, 2, side=True),
        "sin_port": FieldInfo(whole, at + 2, 2, swapped=True, side=True, guard=inet),
        "sin_addr": FieldInfo(whole, at + 4, 4, side=True, guard=inet),
        "sin6_port": FieldInfo(whole, at + 2, 2, swapped=True, side=True, guard=inet6),
        "sin6_addr_high": FieldInfo(whole, at + 8, 8, side=True, guard=inet6),
        "sin6_addr_low": FieldInfo(whole, at + 16, 8, side=True, guard=inet6),
        "sun_path": FieldInfo(FieldKind.CHARS, at + 2, 108, side=True, guard=local, abstract=True),
    }


# ---- 32-bit callers


@dataclass(frozen=True)
class ForeignCall:
    """How a 32-bit caller does an action: by a call of its own, or through socketcall."""

    action: Action
    call: Call
    through: bool

    @property
    def number(self) -> int:
        """The system call's."""
        return SOCKETCALL if self.through else self.call.number

    @property
    def _words(self) -> int:
        return 4 * self.call.words if self.through else 0  # bytes

    def _argument(self, number: int) -> Kernel | Side:
        """The integer that is argument `number`, from 1."""
        if self.through:
            return Side(4 * number - 4, 4, signed=True)
        return argument(number - 1, signed=True)

    def attempt(self) -> Any:
        """The case of the table for its attempts."""
        call = self.call
        own: list[Any] = [("sockfd", self._argument(1))]
        if call.backlog:
            own.append(("backlog", self._argument(call.backlog)))
        body: list[Any] = [("type", self.action.attempt), *([Came(own)] if self.through else own)]
        pointer = call.message or call.address
        if pointer or self.through:
            body.append(
                Fetch(
                    self._argument(pointer or 1),
                    [("address", address_table(self._words))] if pointer else [],
                    kind=FetchKind.NAME if call.message else FetchKind.BLOCK,
                    length=_SOCKADDR - 2 if pointer else 0,
                    count=self._argument(call.length) if call.length else None,
                    front=Front(argument(1, 8), self._words) if self.through else None,
                    narrow=True,
                )
            )
        event = [("network", body)]
        return When(
            Kernel("id"), self.number, [When(argument(0), call.sub, event)] if self.through else event
        )

    def result(self) -> Any:
        """The case of the table for its results."""
        event = [("network", [("type", self.action.result), ("result", Kernel("ret", size=4, signed=True))])]
        return When(
            Kernel("id"), self.number, [When(_EXIT_SUB, self.call.sub, event)] if self.through else event
        )

    def fields(self, record: Format) -> dict[str, FieldInfo]:
        """What a filter may compare of its attempts."""
        fields = address_fields(self._words) if self.action.has_address else {}
        for name, number in (("fd", 1), ("backlog", self.call.backlog)):
            if number and self.through:
                fields[name] = FieldInfo(FieldKind.INT, 4 * number - 4, 4, signed=True, side=True)
            elif number:
                fields[name] = argument_field(record, number - 1, signed=True)
        return {**fields, _SUB: argument_field(record, 0)}

    def result_fields(self, record: Format) -> dict[str, FieldInfo]:
        """What a filter may compare of its results."""
        sub = FieldInfo(FieldKind.INT, _EXIT_SUB.offset, _EXIT_SUB.size, side=True)
        return {"ret": FieldInfo(FieldKind.INT, record["ret"].offset, 4, signed=True), _SUB: sub}

    def chosen(self, expression: Expression) -> Expression:
        """The expression, of this call only."""
        return all_of([Predicate(Op.EQ, _SUB, self.call.sub), expression]) if self.through else expression


_SUB = "socketcall"
_EXIT_SUB = Side(8, 4)  # behind the record: the ABI, the register of the first argument
_FOREIGN = tuple(
    ForeignCall(action, call, through)
    for action in ACTIONS
    for call in action.calls
    for through in (False, True)
    if (call.sub if through else call.number)
)
FOREIGN_ATTEMPTS: Table = [one.attempt() for one in _FOREIGN]
FOREIGN_RESULTS: Table = [one.result() for one in _FOREIGN]

_NOT_FIXED = Predicate(Op.EQ, "fixed", 0)
_OPCODES = tuple(opcode for action in ACTIONS for opcode in action.opcodes)


def _ring_table(body: Callable[[Action], list[Any]]) -> Table:
    """What is to be told of each operation of io_uring."""
    return [
        When(Kernel("opcode"), opcode, [("network", body(action))])
        for action in ACTIONS
        for opcode in action.opcodes
    ]


def _ring_descriptor() -> When:
    """The socket, unless it is the number of one that the ring keeps."""
    return When(Kernel("fixed"), 0, [("sockfd", Kernel("fd"))])


# What the kernel can decide itself: fetched beside the block, under these names.
_SCALARS = (("family", 0, "u16"), ("port", 2, "u16"), ("addr", 4, "u32"))


class NetworkFamily:
    """Wants for NetworkEventFilter."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor
        self._tracepoints: dict[tuple[str, str], BulkEvent] = {}
        self._foreign = ForeignCalls(sensor)
        self._by_type = {
            kind: (action, kind == action.result)
            for action in ACTIONS
            for kind in (action.attempt, action.result)
        }
        self.ladder = Ladder(
            sensor,
            FAMILY,
            (
                Rung("kprobe", "kprobes on __sys_connect and the like", partial(self._attempts, "kprobe")),
                Rung("program", "bpf programs at the system calls", partial(self._attempts, "program")),
                Rung(
                    "memory",
                    "the caller's memory, read at once",
                    partial(self._attempts, "memory"),
                    "an address may be missing if the caller is quicker",
                ),
            ),
            _connect_nowhere,
        )
        self._ring = RingRequests(
            sensor,
            BY_RING,
            (
                Rung("program", "bpf program at the request", partial(self._ring_attempts, "program")),
                Rung(
                    "kprobe",
                    "kprobes on io_connect_prep and the like",
                    partial(self._ring_attempts, "kprobe"),
                ),
                Rung(
                    "memory",
                    "the request's tracepoint",
                    partial(self._ring_attempts, "memory"),
                    "without socket and address, and not where there is a filter",
                ),
            ),
            _request_nowhere,
        )
        self._ring_results = RingRequests(
            sensor,
            RING_RESULTS,
            (Rung("program", "bpf program at the completion", self._ring_completions),),
            _request_nowhere,
        )

    def mechanisms(self) -> list[Mechanism]:
        """How this kernel serves network events."""
        rows = []
        try:
            rung = self.ladder.reached()
            rows.append(Mechanism(FAMILY, True, rung.mechanism, rung.best_effort))
            rows += self._ring.mechanisms()
        except UnservableError as error:
            rows.append(Mechanism(FAMILY, False, "none", error.cause))
        served = self._sensor.tracefs.has_event("syscalls", "sys_exit_connect")
        rows.append(
            Mechanism(
                RESULTS,
                served,
                "system calls' exit tracepoints" if served else "none",
                self._ring_results.note() if served else "",
                hint="" if served else "a kernel with CONFIG_FTRACE_SYSCALLS",
            )
        )
        return rows

    def wants(self, request: NetworkEventFilter, path: str) -> list[BulkWant]:
        """What a filter asks for. RequestError if it makes no sense, UnservableError if no rung works."""
        if request.type not in self._by_type:
            raise RequestError(f"{path}.type", "must be one of NETWORK_EVENT_TYPE_CONNECT_ATTEMPT and so on")
        action, is_result = self._by_type[request.type]
        names: dict[str, type[int | str]] = {"ret": int} if is_result else {"fd": int}
        if not is_result and action.has_address:
            names.update({name: info.holds for name, info in address_fields().items()})
        if action.attempt is _Type.LISTEN_ATTEMPT and not is_result:
            names["backlog"] = int
        expression = TRUE if request.filter is None else from_message(request.filter, f"{path}.filter", names)
        ring = self._ring_results if is_result else self._ring
        if is_result:
            note = ring.note()
            own = [
                BulkWant.of(RESULTS, event, expression, note=note) for event in self._results(action).values()
            ]
            wants = own + self._foreign_wants(action, expression, note, is_result=True)
        else:
            rung = self.ladder.reached()
            note = ring.note(rung.best_effort if action.has_address else "")
            events = self._attempts(rung.name, action)
            wants = [
                BulkWant.of(FAMILY, event, _of_width(name, event, expression), note=note)
                for name, event in events.items()
            ]
            if rung.name != "kprobe":
                wants += self._foreign_wants(action, expression, note)

        def by_ring(rung: Rung) -> list[tuple[BulkEvent, Sequence[Opcode]]]:
            if not is_result and rung.name == "kprobe":
                return self._ring_probes(action)
            return [(event, action.opcodes) for event in rung.events().values()]

        return wants + ring.wants(by_ring, lambda _: expression)

    def _foreign_wants(
        self, action: Action, expression: Expression, note: str = "", *, is_result: bool = False
    ) -> list[BulkWant]:
        if is_result:
            event = self._foreign.event("sys_exit", FOREIGN_RESULTS, lib.RS_BEHIND)
        else:
            event = self._foreign.event("sys_enter", FOREIGN_ATTEMPTS)
        if event is None:
            return []
        return [
            foreign_want(
                RESULTS if is_result else FAMILY,
                event,
                one.number,
                one.chosen(expression),
                one.result_fields(event.record) if is_result else one.fields(event.record),
                note,
            )
            for one in _FOREIGN
            if one.action is action
        ]

    # -- results -----------------------------------------------------------------------------------

    def _results(self, action: Action) -> dict[str, BulkEvent]:
        events = {}
        for call in action.calls:
            record = self._record(f"sys_exit_{call.name}")
            if record is not None:
                table = {"network": {"type": action.result, "result": Kernel("ret", signed=True)}}
                events[call.name] = self._tracepoint("exit", call.name, record, table, None)
        if not events:
            raise UnservableError(
                RESULTS, "no tracepoints of system calls", "a kernel with CONFIG_FTRACE_SYSCALLS"
            )
        return events

    # -- attempts ----------------------------------------------------------------------------------

    def _attempts(self, rung: str, action: Action = ACTIONS[0]) -> dict[str, BulkEvent]:
        events = {}
        seen = set()
        if rung == "program" and action.has_address:
            return {"program": self._by_program(action)}
        for call in action.calls:
            if rung == "kprobe":
                if call.symbol and call.symbol not in seen:  # accept and accept4 meet in one function
                    seen.add(call.symbol)
                    events[call.name] = self._by_kprobe(action, call)
                    if call.message:
                        events[_NARROW + call.name] = self._by_kprobe(action, call, narrow=True)
            else:
                record = self._record(f"sys_enter_{call.name}")
                if record is not None:
                    events[call.name] = self._by_memory(action, call, record)
        if not events:
            raise UnservableError(
                FAMILY, "no tracepoints of system calls", "a kernel with CONFIG_FTRACE_SYSCALLS"
            )
        return events

    def _by_kprobe(self, action: Action, call: Call, *, narrow: bool = False) -> BulkEvent:
        """`narrow`: for 32-bit callers, whose pointers in memory no fetcharg follows. The courier does."""
        arguments = [("fd", "$arg1:s32")]
        if call.backlog:
            arguments.append(("backlog", f"$arg{call.backlog}:s32"))
        if call.message:
            arguments.append(("narrow", f"$arg{call.message + 1}:b1@31/32"))  # MSG_CMSG_COMPAT of the flags
        if narrow:
            arguments.append(("message", f"$arg{call.message}:u64"))
        elif call.message:
            pointer = f"+u0($arg{call.message})"
            arguments += _address_arguments(pointer, f"+u8($arg{call.message}):s32")
        elif call.address:
            arguments += _address_arguments(f"$arg{call.address}", f"$arg{call.length}:s32")
        return self._probe(action, call.name, call.symbol, arguments)

    def _probe(
        self, action: Action, stem: str, symbol: str, arguments: Sequence[tuple[str, str]]
    ) -> BulkEvent:
        if not self._sensor.features.kprobes or not self._sensor.tracefs.writable:
            raise UnservableError(FAMILY, "no kprobes")
        probes = self._sensor.probes
        try:
            return probes.get(
                probes.kprobe(stem, symbol, tuple(arguments)),
                lambda record: _attempt_table(action, record),
                fields=_probe_fields,
                exclude=self._sensor.exclude_self(),
            )
        except RequestError as error:
            raise UnservableError(FAMILY, str(error)) from error

    def _by_program(self, action: Action) -> BulkEvent:
        if ("program", action.attempt.name) not in self._tracepoints:
            programs = {
                # arguments are counted from 0 there
                call.name: address_program(call.address - 1, call.length - 1, max(0, call.message - 1))
                for call in action.calls
                if call.symbol
            }
            view = View("block", [("address", ADDRESS)], _SOCKADDR, count="length")
            table = {"network": [("type", action.attempt), ("sockfd", Kernel("fd")), view]}
            fields = {"fd": fields_of(CALLED)["fd"], **address_fields()}
            self._tracepoints["program", action.attempt.name] = program_event(
                self._sensor, FAMILY, CALLED, programs, table, fields
            )
        return self._tracepoints["program", action.attempt.name]

    def _by_memory(self, action: Action, call: Call, record: Format) -> BulkEvent:
        fields: dict[str, FieldInfo] = {}
        for name in ("fd", "backlog"):
            if name in record and (info := FieldInfo.of(record[name])) is not None:
                fields[name] = info
        body: list[Any] = [("type", action.attempt), ("sockfd", Kernel("fd"))]
        if action.has_address:
            fields.update(address_fields())
            body.append(
                Fetch(
                    call.address_field,
                    [("address", ADDRESS)],
                    kind=FetchKind.NAME if call.message else FetchKind.BLOCK,
                    length=_SOCKADDR - 2,
                    count=call.length_field or None,
                )
            )
        if call.backlog:
            body.append(("backlog", Kernel("backlog")))
        return self._tracepoint("memory", call.name, record, {"network": body}, fields)

    def _record(self, name: str) -> Format | None:
        with suppress(KernelError):
            return self._sensor.tracefs.read_format("syscalls", name)
        return None

    def _tracepoint(
        self, rung: str, call: str, record: Format, table: Table, fields: Fields | None
    ) -> BulkEvent:
        if (rung, call) not in self._tracepoints:
            self._tracepoints[rung, call] = BulkEvent(
                self._sensor.rings,
                record,
                record.id,
                table,
                exclude=self._sensor.exclude_self(),
                flags=self._sensor.lineage_flag(),
                fields=fields,
            )
        return self._tracepoints[rung, call]

    # -- io_uring ----------------------------------------------------------------------------------

    def _ring_attempts(self, rung: str) -> dict[str, BulkEvent]:
        if rung == "kprobe":
            probed = self._ring_probes(ACTIONS[0])
            if not probed:
                raise UnservableError(BY_RING, "no kprobes on what reads requests")
            return {"connect": probed[0][0]}
        make = self._ring_program if rung == "program" else self._ring_tracepoint
        return self._ring_event(rung, make)

    def _ring_event(self, rung: str, make: Callable[[], BulkEvent]) -> dict[str, BulkEvent]:
        if (rung, "io_uring") not in self._tracepoints:
            self._tracepoints[rung, "io_uring"] = make()
        return {"requests": self._tracepoints[rung, "io_uring"]}

    def _ring_program(self) -> BulkEvent:
        view = View("block", [("address", ADDRESS)], _SOCKADDR, count="length")
        cases = _ring_table(
            lambda action: [
                ("type", action.attempt),
                _ring_descriptor(),
                *([view] if action.has_address else []),
                *([("backlog", Kernel("backlog"))] if action.attempt is _Type.LISTEN_ATTEMPT else []),
            ]
        )
        own = {name: info for name, info in fields_of(REQUESTED).items() if name not in ("length", "block")}
        fields = {**own, "fd": replace(own["fd"], guard=_NOT_FIXED), **address_fields()}
        build = partial(uring.network_request, opcodes=_OPCODES)
        return uring.request_event(self._sensor, build, cases, fields)

    def _ring_tracepoint(self) -> BulkEvent:
        return uring.bare_event(self._sensor, _ring_table(lambda action: [("type", action.attempt)]))

    def _ring_completions(self) -> dict[str, BulkEvent]:
        cases = _ring_table(lambda action: [("type", action.result), ("result", Kernel("ret"))])
        return self._ring_event("exit", lambda: uring.completion_event(self._sensor, _OPCODES, cases))

    def _ring_probes(self, action: Action) -> list[tuple[BulkEvent, Sequence[Opcode]]]:
        """Kprobes on what reads the action's requests, those that this kernel has."""
        found: list[tuple[BulkEvent, Sequence[Opcode]]] = []
        for request in action.requests:
            arguments = [
                ("opcode", "+0($arg2):u8"),
                ("fixed", "+1($arg2):b1@0/8"),
                ("fd", f"+{uring.FD}($arg2):s32"),
            ]
            if request.backlog:
                arguments.append(("backlog", f"+{request.backlog}($arg2):s32"))
            if request.message:
                message = f"+{request.message}($arg2)"
                arguments += _address_arguments(f"+u0({message})", f"+u8({message}):s32")
            elif request.address:
                arguments += _address_arguments(f"+{request.address}($arg2)", request.length)
            with suppress(UnservableError):
                found.append((self._probe(action, "uring", request.symbol, arguments), request.opcodes))
        return found


def _address_arguments(pointer: str, length: str) -> list[tuple[str, str]]:
    scalars = [(name, f"+u{offset}({pointer}):{kind}") for name, offset, kind in _SCALARS]
    # an array of user memory would be one word here, but 5.10 takes none
    words = [(f"block{at}", f"+u{at}({pointer}):x64") for at in range(0, _SOCKADDR, 8)]
    return [*scalars, ("length", length), *words]


def _attempt_table(action: Action, record: Format) -> Table:
    fd = _ring_descriptor() if "fixed" in record else ("sockfd", Kernel("fd"))
    body: list[Any] = [("type", action.attempt), fd]
    if "block0" in record:
        body.append(View("block0", [("address", ADDRESS)], _SOCKADDR, count="length"))
    if "message" in record:
        then = [("address", ADDRESS)]
        body.append(Fetch("message", then, kind=FetchKind.NAME, length=_SOCKADDR - 2, narrow=True))
    if "backlog" in record:
        body.append(("backlog", Kernel("backlog")))
    return {"network": body}


def _of_width(name: str, event: BulkEvent, expression: Expression) -> Expression:
    """The expression, of 32-bit callers only or of others, where two probes see both."""
    if "narrow" not in event.fields:
        return expression
    return all_of([Predicate(Op.EQ, "narrow", int(name.startswith(_NARROW))), expression])


def _probe_fields(record: Format) -> Fields:
    fields: dict[str, FieldInfo] = {}
    for name in ("fd", "backlog", "opcode", "fixed", "narrow"):
        if name in record and (info := FieldInfo.of(record[name])) is not None:
            fields[name] = info
    if "fixed" in fields:
        fields["fd"] = replace(fields["fd"], guard=_NOT_FIXED)
    if "message" in record:
        fields.update(address_fields())
    if "block0" in record:
        fields.update(address_fields())
        for name, scalar, swapped, guard in (
            ("sa_family", "family", False, TRUE),
            ("sin_port", "port", True, _guard(_INET)),
            ("sin_addr", "addr", False, _guard(_INET)),
            ("sin6_port", "port", True, _guard(_INET6)),
        ):
            field = record[scalar]
            fields[name] = FieldInfo(
                FieldKind.INT, field.offset, field.size, swapped=swapped, kernel=field, guard=guard
            )
    return fields


def _connect_nowhere() -> None:
    """Cause a connect that fails: to a local socket that is not there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as nobody, suppress(OSError):
        nobody.connect("\0ringside-proof")


def _request_nowhere() -> bool:
    """The same through io_uring."""
    address = _UNIX.to_bytes(2, sys.byteorder) + b"\0ringside-proof"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as nobody:
        return uring.make_request(Opcode.CONNECT, nobody.fileno(), address, len(address))
