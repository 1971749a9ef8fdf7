"""Plans: C and the Python interpreter make the same of any record, protobuf reads what was in it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringside.api.descriptors import message_class
from ringside.api.v0 import (
    Event,
    FileEventType,
    NetworkEventType,
    SyscallEventType,
)
from ringside.sensor._perf import ffi, lib
from ringside.sensor.engine import Route, pack_plan
from ringside.sensor.errors import UnservableError
from ringside.sensor.events.file import open_table
from ringside.sensor.events.kernel_call import call_table
from ringside.sensor.events.network import ADDRESS
from ringside.sensor.events.syscall import TABLES
from ringside.sensor.plan import (
    Fetch,
    FetchKind,
    Kernel,
    Map,
    Op,
    OpCode,
    Plan,
    Side,
    Table,
    View,
    When,
    compile_plan,
)
from ringside.sensor.tracefs.format import Format, parse_format

from .support.fakering import HERE, KERNELS, FakeRing, Rig, canned, now, raw_of, sample

pytestmark = pytest.mark.asan

EventMessage = message_class("capsule8.api.v0.Event")
VERSIONS = sorted(path.name for path in KERNELS.iterdir())
ROOM = 1 << 18

COMMON = """\
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;
"""
INTEGERS = {
    "u8": ("unsigned char", 1, 0),
    "s8": ("signed char", 1, 1),
    "u16": ("unsigned short", 2, 0),
    "s16": ("short", 2, 1),
    "u32": ("unsigned int", 4, 0),
    "s32": ("int", 4, 1),
    "u64": ("unsigned long", 8, 0),
    "s64": ("long", 8, 1),
}


def form_of(*fields: tuple[str, str, int, int]) -> Format:
    """A format of fields: declaration with %, name, size, signed."""
    at, lines = 8, []
    for declaration, name, size, signed in fields:
        lines.append(
            f"\tfield:{declaration.replace('%', name)};\toffset:{at};\tsize:{size};\tsigned:{signed};\n"
        )
        at += size
    return parse_format(f'name: it\nID: 7\nformat:\n{COMMON}\n{"".join(lines)}\nprint fmt: ""\n')


ONE_OF_EACH = form_of(
    *((f"{ctype} %", name, size, signed) for name, (ctype, size, signed) in INTEGERS.items()),
    ("bool %", "flag", 1, 0),
    ("char %[16]", "comm", 16, 0),
    ("__data_loc char[] %", "text", 4, 0),
    ("__data_loc u8[] %", "block", 4, 0),
    ("u8 %[12]", "bytes", 12, 0),
    ("unsigned long args[6]".replace("args", "%"), "args", 48, 0),
    ("int %[4]", "ints", 16, 1),
)
EXTENT = max(one.offset + one.size for one in ONE_OF_EACH.fields)


def run_c(plan: Plan, raw: bytes, side: bytes = b"", room: int = ROOM) -> bytes | int:
    """What C makes of a record; a negative errno if it refuses."""
    ops, count, pool = pack_plan(plan)
    out = ffi.new("uint8_t[]", room)
    # buffers of exactly this size, so that the sanitizer sees every byte too far
    own_raw, own_side = ffi.new("uint8_t[]", raw), ffi.new("uint8_t[]", side)
    length = lib.rs_plan_run(ops, count, pool, len(pool), own_raw, len(raw), own_side, len(side), out, room)
    return int(length) if length < 0 else bytes(ffi.buffer(out, length))


def same(plan: Plan, raw: bytes, side: bytes = b"", *, canonical: bool = True) -> Any:
    """The event, which C and Python must agree on, and which must be canonical protobuf."""
    made = plan.run(raw, side)
    assert run_c(plan, raw, side) == made
    event = EventMessage.FromString(made)
    assert event.SerializeToString(deterministic=True) == made or not canonical
    return event


# --- every field of every type


# where a value may go in an Event, by the target's protobuf type
TARGETS: dict[str, Callable[[Any], Table]] = {
    "uint64": lambda source: {"syscall": {"arg0": source}},
    "int64": lambda source: {"syscall": {"ret": source}},
    "int32": lambda source: [("cpu", source)],
    "uint32": lambda source: {"process": {"exit_status": source}},
    "sint32": lambda source: {"process": {"exit_code": source}},
    "sint64": lambda source: {"network": {"result": source}},
    "bool": lambda source: {"process": {"exit_core_dumped": source}},
    "bytes": lambda source: {"kernel_call": {"arguments": Map([("x", {"bytes_value": source})])}},
}


def told(event: Any, target: str) -> Any:
    """The value that went there."""
    return {
        "uint64": lambda: event.syscall.arg0,
        "int64": lambda: event.syscall.ret,
        "int32": lambda: event.cpu,
        "uint32": lambda: event.process.exit_status,
        "sint32": lambda: event.process.exit_code,
        "sint64": lambda: event.network.result,
        "bool": lambda: event.process.exit_core_dumped,
        "string": lambda: event.file.filename,
        "bytes": lambda: event.kernel_call.arguments["x"].bytes_value,
    }[target]()


WIDTH = {"uint64": 64, "int64": 64, "sint64": 64, "int32": 32, "uint32": 32, "sint32": 32}


def as_target(value: int, target: str) -> int | bool:
    """A number as a field of that type holds it: C's conversion."""
    if target == "bool":
        return bool(value)
    width = WIDTH[target]
    value &= (1 << width) - 1
    return value - (1 << width) if target[0] in "is" and value >> width - 1 else value


@pytest.mark.parametrize("target", list(TARGETS)[:-1])
@pytest.mark.parametrize("source", list(INTEGERS))
@given(data=st.data())
def test_every_integer_in_every_field(source: str, target: str, data: st.DataObject) -> None:
    _, size, signed = INTEGERS[source]
    low, high = (-(1 << 8 * size - 1), (1 << 8 * size - 1) - 1) if signed else (0, (1 << 8 * size) - 1)
    value = data.draw(
        st.one_of(st.integers(low, high), st.sampled_from([0, 1, low, high, high // 2, high // 2 + 1]))
    )
    plan = compile_plan(Event, TARGETS[target](Kernel(source)), ONE_OF_EACH)
    # a negative one of fewer bytes has more of a varint than need be; receivers cut it
    canonical = not (target == "uint32" and value < 0)
    event = same(plan, raw_of(ONE_OF_EACH, **{source: value}), canonical=canonical)
    assert told(event, target) == as_target(value, target)
    swapped = compile_plan(Event, TARGETS[target](Kernel(source, swap=True)), ONE_OF_EACH)
    there = value.to_bytes(size, "big", signed=bool(signed))
    raw = bytearray(raw_of(ONE_OF_EACH))
    offset = ONE_OF_EACH[source].offset
    raw[offset : offset + size] = there
    assert told(same(swapped, bytes(raw), canonical=canonical), target) == as_target(value, target)


@given(st.tuples(*[st.integers(0, 2**64 - 1)] * 6), st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 4))
def test_elements_of_arrays(args: tuple[int, ...], ints: tuple[int, ...]) -> None:
    for index in range(6):
        plan = compile_plan(Event, {"syscall": {"arg0": Kernel("args", index)}}, ONE_OF_EACH)
        assert same(plan, raw_of(ONE_OF_EACH, args=args)).syscall.arg0 == args[index]
    for index in range(4):
        plan = compile_plan(Event, {"network": {"result": Kernel("ints", index)}}, ONE_OF_EACH)
        assert same(plan, raw_of(ONE_OF_EACH, ints=ints)).network.result == ints[index]


text = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=200).map(str.encode),
    st.lists(
        st.sampled_from(
            [
                b"\xff",
                b"\xc3",
                b"\xe2\x82",
                b"\xed\xa0\x80",
                b"\xf4\x90\x80\x80",
                b"a",
                b"\xf0\x9f\x98\x80",
                b"\0",
            ]
        ),
        max_size=80,
    ).map(b"".join),
    st.integers(0, 9000).map(lambda length: b"x" * length),
)


@given(text)
def test_text_is_made_valid_as_python_does(value: bytes) -> None:
    """A string that is not UTF-8 would make receivers refuse the whole message."""
    plan = compile_plan(Event, {"file": {"filename": Kernel("text")}}, ONE_OF_EACH)
    raw = bytearray(raw_of(ONE_OF_EACH)) + value
    struct.pack_into("=HH", raw, ONE_OF_EACH["text"].offset, EXTENT, len(value))
    want = value.split(b"\0")[0].decode("utf-8", "replace")
    assert same(plan, bytes(raw)).file.filename == want


@given(st.binary(max_size=20))
def test_character_arrays_end_at_their_nul(value: bytes) -> None:
    plan = compile_plan(Event, {"file": {"filename": Kernel("comm")}}, ONE_OF_EACH)
    want = value[:16].split(b"\0")[0].decode("utf-8", "replace")
    assert same(plan, raw_of(ONE_OF_EACH, comm=value)).file.filename == want


@given(text)
def test_bytes_are_taken_as_they_are(value: bytes) -> None:
    table = TARGETS["bytes"](Kernel("block"))
    raw = bytearray(raw_of(ONE_OF_EACH, bytes=tuple(range(12)))) + value
    struct.pack_into("=HH", raw, ONE_OF_EACH["block"].offset, EXTENT, len(value))
    assert told(same(compile_plan(Event, table, ONE_OF_EACH), bytes(raw)), "bytes") == value
    table = TARGETS["bytes"](Kernel("bytes"))
    assert told(same(compile_plan(Event, table, ONE_OF_EACH), bytes(raw)), "bytes") == bytes(range(12))


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=64))
def test_a_data_loc_word_is_not_believed(offset: int, length: int, behind: bytes) -> None:
    plan = compile_plan(Event, {"file": {"filename": Kernel("text")}}, ONE_OF_EACH)
    raw = bytearray(raw_of(ONE_OF_EACH)) + behind
    struct.pack_into("=HH", raw, ONE_OF_EACH["text"].offset, offset, length)
    same(plan, bytes(raw))


def test_what_a_probe_could_not_read_is_left_out() -> None:
    table = {"file": {"filename": Kernel("text", faulty=True)}}
    plan = compile_plan(Event, table, ONE_OF_EACH)
    for value, want in ((b"(fault)", ""), (b"(fault", "(fault"), (b"(fault)x", "(fault)x"), (b"/x", "/x")):
        assert same(plan, raw_of(ONE_OF_EACH, text=value)).file.filename == want


def test_zero_is_left_out_but_kept_where_it_says_which_it_is() -> None:
    plan = compile_plan(Event, {"syscall": {"arg0": Kernel("u64")}}, ONE_OF_EACH)
    assert same(plan, raw_of(ONE_OF_EACH)).SerializeToString() == b"\x52\x00"
    for arm, source in (
        ("unsigned_value", "u64"),
        ("signed_value", "s64"),
        ("string_value", "comm"),
        ("bytes_value", "block"),
    ):
        table = {"kernel_call": {"arguments": Map([("x", {arm: Kernel(source)})])}}
        event = same(compile_plan(Event, table, ONE_OF_EACH), raw_of(ONE_OF_EACH))
        assert event.kernel_call.arguments["x"].WhichOneof("value") == arm


# --- parts


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**31 - 1))
def test_fields_only_when(have: int, value: int, mask: int) -> None:
    for wanted in (have, value):
        table = {
            "syscall": [
                ("id", 5),
                When(Kernel("s32"), wanted, [("arg0", 1), ("arg1", Kernel("u8"))]),
                ("ret", 7),
            ]
        }
        event = same(compile_plan(Event, table, ONE_OF_EACH), raw_of(ONE_OF_EACH, s32=have, u8=3)).syscall
        want = (1, 3) if wanted == have else (0, 0)
        assert (event.id, event.arg0, event.arg1, event.ret) == (5, *want, 7)
    masked = {"syscall": [When(Kernel("s32"), 0, [("arg0", 1)], mask), ("ret", 7)]}
    event = same(compile_plan(Event, masked, ONE_OF_EACH), raw_of(ONE_OF_EACH, s32=have)).syscall
    if mask:
        assert event.arg0 == bool(have & mask)


def test_constants_are_joined_but_not_over_a_landing() -> None:
    table = {
        "syscall": [
            ("type", SyscallEventType.ENTER),
            ("id", 3),
            When(Kernel("u8"), 1, [("arg0", 4), When(Kernel("u16"), 1, [("arg1", 5)]), ("arg2", 6)]),
            ("arg3", 7),
            ("arg4", 8),
        ]
    }
    plan = compile_plan(Event, table, ONE_OF_EACH)
    assert sum(op.op is OpCode.CONST for op in plan.ops) == 5
    for one, two in ((0, 0), (0, 1), (1, 0), (1, 1)):
        event = same(plan, raw_of(ONE_OF_EACH, u8=one, u16=two)).syscall
        args = [getattr(event, f"arg{n}") for n in range(5)]
        assert args == [4 * one, 5 * one * two, 6 * one, 7, 8]


@given(st.integers(0, 70000))
def test_lengths_of_nested_messages(length: int) -> None:
    """One, two and three bytes of length, inside each other."""
    table = {
        "kernel_call": {
            "arguments": Map([("k" * 60, {"bytes_value": Kernel("block")}), ("z", {"unsigned_value": 1})])
        }
    }
    raw = bytearray(raw_of(ONE_OF_EACH)) + b"b" * min(length, 0xFFFF)
    struct.pack_into("=HH", raw, ONE_OF_EACH["block"].offset, EXTENT, min(length, 0xFFFF))
    event = same(compile_plan(Event, table, ONE_OF_EACH), bytes(raw))
    assert len(event.kernel_call.arguments["k" * 60].bytes_value) == min(length, 0xFFFF)
    assert event.kernel_call.arguments["z"].unsigned_value == 1


def sockaddr(family: int, rest: bytes) -> bytes:
    return struct.pack("=H", family) + rest


@pytest.mark.parametrize(
    ("side", "want"),
    [
        (
            sockaddr(2, struct.pack("!H4s8x", 443, bytes([10, 1, 2, 3]))),
            ("ipv4_address", 443, bytes([10, 1, 2, 3])),
        ),
        (sockaddr(2, struct.pack("!H4s", 0, bytes(4))), ("ipv4_address", 0, bytes(4))),
        (
            sockaddr(10, struct.pack("!HI16sI", 8080, 0, bytes(range(1, 17)), 0)),
            ("ipv6_address", 8080, bytes(range(1, 17))),
        ),
        (sockaddr(1, b"/run/some.sock\0"), ("local_address", "/run/some.sock", b"")),
        (sockaddr(1, b"/not/ended"), ("local_address", "/not/ended", b"")),
        (sockaddr(1, b"\0abstract\0with nul"), ("local_address", "@abstract\0with nul", b"")),
        (sockaddr(1, b"\0" + b"x" * 107), ("local_address", "@" + "x" * 107, b"")),
        (sockaddr(1, b"\0\xff"), ("local_address", "@\ufffd", b"")),
        (sockaddr(1, b"x" * 108), ("local_address", "x" * 108, b"")),
        (sockaddr(16, bytes(10)), None),
        (b"\x02", None),
    ],
)
def test_socket_addresses(side: bytes, want: tuple[str, Any, bytes] | None) -> None:
    table = {"network": [("type", NetworkEventType.CONNECT_ATTEMPT), Fetch("u64", [("address", ADDRESS)])]}
    address = same(compile_plan(Event, table, ONE_OF_EACH), raw_of(ONE_OF_EACH), side).network.address
    arm = address.WhichOneof("address")
    if want is None:
        assert arm is None
        return
    assert arm == want[0]
    if arm == "local_address":
        assert address.local_address == want[1]
        return
    inner = getattr(address, arm)
    assert inner.port == want[1]
    if arm == "ipv4_address":
        assert inner.address.address.to_bytes(4, "little") == want[2]
    else:
        assert inner.address.high.to_bytes(8, "little") + inner.address.low.to_bytes(8, "little") == want[2]


def test_memory_that_could_not_be_read_leaves_its_fields_out() -> None:
    table = {
        "file": [("type", FileEventType.OPEN), Fetch("u64", [("filename", Side(0, 4096))], FetchKind.TEXT)]
    }
    plan = compile_plan(Event, table, ONE_OF_EACH)
    (fetch,) = plan.fetches
    assert (fetch.offset, fetch.kind) == (ONE_OF_EACH["u64"].offset, FetchKind.TEXT)
    assert same(plan, raw_of(ONE_OF_EACH), b"").file.filename == ""
    assert same(plan, raw_of(ONE_OF_EACH), b"/x\0").file.filename == "/x"


# --- any plan, any record


@st.composite
def sources(draw: st.DrawFn) -> Kernel | Side:
    if draw(st.booleans()):
        name = draw(st.sampled_from([*INTEGERS, "flag"]))
        return Kernel(name, swap=draw(st.booleans()), signed=draw(st.sampled_from([None, True, False])))
    size = draw(st.sampled_from([1, 2, 4, 8]))
    return Side(draw(st.integers(0, 120)), size, draw(st.booleans()), draw(st.booleans()))


@st.composite
def texts(draw: st.DrawFn) -> Kernel | Side:
    if draw(st.booleans()):
        return Kernel(draw(st.sampled_from(["comm", "text"])), faulty=draw(st.booleans()))
    return Side(draw(st.integers(0, 120)), draw(st.integers(0, 200)), abstract=draw(st.booleans()))


@st.composite
def tables(draw: st.DrawFn, depth: int = 0) -> list[Any]:
    """A table of a SyscallEvent's or, nested, an Event's fields, in the order of their numbers."""
    names = ["id", *(f"arg{n}" for n in range(6)), "ret"]
    found: list[Any] = []
    for name in names:
        what = draw(st.integers(0, 5))
        if what == 0:
            found.append((name, draw(st.integers(0, 2**63 - 1))))
        elif what == 1:
            found.append((name, draw(sources())))
        elif what == 2 and depth < 3:
            value = draw(st.integers(-3, 3))
            then = draw(sources())
            found.append(
                When(then, value, [(name, draw(sources()))], draw(st.sampled_from([0, 0, 1, 0x80000000])))
            )
    return found


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    arm = draw(st.integers(0, 3))
    if arm == 0:
        table: Any = {"syscall": draw(tables())}
    elif arm == 1:
        fields: list[Any] = [("type", 1), ("filename", draw(texts())), ("open_flags", draw(sources()))]
        table = {"file": [fields[0], Fetch("u64", fields[1:])] if draw(st.booleans()) else fields}
    elif arm == 2:
        entries = [
            (f"k{at}", {draw(st.sampled_from(["string_value", "bytes_value"])): draw(texts())})
            for at in range(draw(st.integers(0, 3)))
        ]
        entries += [(f"n{at}", {"signed_value": draw(sources())}) for at in range(draw(st.integers(0, 2)))]
        table = {"kernel_call": {"arguments": Map(entries)}}
    else:
        then = [("sockfd", draw(sources())), ("address", ADDRESS), ("result", draw(sources()))]
        table = {"network": [View("bytes", then, 12)] if draw(st.booleans()) else then}
    return compile_plan(Event, table, ONE_OF_EACH)


@st.composite
def records(draw: st.DrawFn) -> bytes:
    values = {name: draw(st.integers(-4, 4)) for name in INTEGERS}
    raw = bytearray(raw_of(ONE_OF_EACH, **values, comm=draw(st.binary(max_size=16))))
    raw += draw(text)
    if draw(st.booleans()):
        struct.pack_into("=HH", raw, ONE_OF_EACH["text"].offset, EXTENT, len(raw) - EXTENT)
    if draw(st.booleans()):
        return bytes(raw[: draw(st.integers(0, len(raw)))])
    if draw(st.booleans()):
        return draw(st.binary(max_size=EXTENT + 20))
    return bytes(raw)


@settings(max_examples=400)
@given(plans(), records(), st.binary(max_size=200))
def test_c_does_what_the_interpreter_does(plan: Plan, raw: bytes, side: bytes) -> None:
    assert run_c(plan, raw, side) == plan.run(raw, side)
    EventMessage.FromString(plan.run(raw, side))


ops = st.builds(
    Op,
    op=st.sampled_from([one for one in OpCode if one not in (OpCode.BEGIN, OpCode.END)]),
    tag=st.sampled_from([b"", b"\x0a", b"\x80\x01", b"\x80\x80\x80\x01"]),
    offset=st.one_of(st.integers(0, 64), st.sampled_from([2**31, 2**32 - 1, 2**32 - 4])),
    size=st.sampled_from([1, 2, 4, 8]),
    flags=st.integers(0, 127),
    length=st.sampled_from([1, 4, 8, 16]),
    jump=st.just(0),
    value=st.integers(0, 3),
)


@settings(max_examples=300)
@given(st.lists(ops, max_size=12), st.binary(max_size=64), st.binary(max_size=40), st.data())
def test_any_operations_on_any_bytes(made: list[Op], raw: bytes, side: bytes, data: st.DataObject) -> None:
    """Also such as no table makes: nothing is read beyond the record, and C and Python agree."""
    from dataclasses import replace

    placed = tuple(
        replace(
            op,
            jump=data.draw(st.integers(at + 1, len(made))) if op.op in (OpCode.UNLESS, OpCode.FETCHED) else 0,
            text=b"const" if op.op is OpCode.CONST else b"",
            length=0 if op.op is OpCode.CONST else op.length,
        )
        for at, op in enumerate(made)
    )
    plan = Plan(placed)
    assert run_c(plan, raw, side) == plan.run(raw, side)


def test_c_refuses_what_is_no_plan() -> None:
    begin, end = Op(OpCode.BEGIN, b"\x0a"), Op(OpCode.END)
    for broken in ([begin], [end], [begin, end, end], [begin] * 9 + [end] * 9):
        assert run_c(Plan(tuple(broken)), b"") == -22
    assert run_c(Plan(tuple([begin] * 8 + [end] * 8)), b"") == Plan(tuple([begin] * 8 + [end] * 8)).run(b"")
    unknown = ffi.new("rs_op *", {"op": 77})
    assert lib.rs_plan_run(unknown, 1, b"", 0, b"", 0, b"", 0, ffi.new("uint8_t[]", 500), 500) == -22
    beyond = ffi.new("rs_op *", {"op": lib.RS_OP_CONST, "text": 4, "length": 3})
    assert lib.rs_plan_run(beyond, 1, b"12345", 5, b"", 0, b"", 0, ffi.new("uint8_t[]", 500), 500) == -22


@given(st.integers(0, 900), st.integers(0, 300))
def test_c_never_writes_more_than_there_is_room(room: int, length: int) -> None:
    table = {"file": {"filename": Kernel("text"), "open_flags": Kernel("u32")}}
    plan = compile_plan(Event, table, ONE_OF_EACH)
    raw = raw_of(ONE_OF_EACH, text=b"\xff" * length, u32=7)
    made = run_c(plan, raw, room=max(1, room))
    assert made in (plan.run(raw), -28)
    if room >= 3 * length + 32 * len(plan.ops) + 400:
        assert made == plan.run(raw)


# --- through the engine, which has a faster way for plain integers


@settings(max_examples=60)
@given(st.lists(st.tuples(plans(), records()), min_size=1, max_size=4))
def test_the_engine_encodes_what_the_plan_says(cases: list[tuple[Plan, bytes]]) -> None:
    rig = Rig()
    try:
        output = rig.engine.open_output(1 << 16)
        ring = FakeRing(16)
        ring.attach(rig.engine)
        when = now()
        wanted = []
        for at, (plan, raw) in enumerate(cases):
            source = rig.engine.open_source(0, Plan(plan.ops))
            rig.event(100 + at, source)
            rig.engine.route(source, [Route(output)])
            ring.write(sample(100 + at, when + at, raw, pid=0, tid=0))
            padded = raw + bytes(-(len(raw) + 4) % 8)
            wanted.append(EventMessage.FromString(plan.run(padded)))
        rig.drain()
        for one, want in zip(rig.events(output), wanted, strict=True):
            assert one.event.WhichOneof("event") == want.WhichOneof("event")
            arm = want.WhichOneof("event")
            if arm:
                assert getattr(one.event, arm) == getattr(want, arm)
    finally:
        rig.close()


# --- the tables of the event families, on every kernel there is a format of


@pytest.mark.parametrize("version", VERSIONS)
@given(data=st.data())
def test_system_calls_on_every_kernel(version: str, data: st.DataObject) -> None:
    enter, leave = canned(version, "raw_syscalls/sys_enter"), canned(version, "raw_syscalls/sys_exit")
    number = data.draw(st.integers(-(2**63), 2**63 - 1))
    args = data.draw(st.tuples(*[st.integers(0, 2**64 - 1)] * 6))
    event = same(
        compile_plan(Event, TABLES[SyscallEventType.ENTER][1], enter), raw_of(enter, id=number, args=args)
    )
    assert (event.syscall.type, event.syscall.id) == (1, number)
    assert tuple(getattr(event.syscall, f"arg{n}") for n in range(6)) == args
    ret = data.draw(st.integers(-(2**63), 2**63 - 1))
    event = same(
        compile_plan(Event, TABLES[SyscallEventType.EXIT][1], leave), raw_of(leave, id=number, ret=ret)
    )
    assert (event.syscall.type, event.syscall.id, event.syscall.ret) == (2, number, ret)


OPENS = sorted(
    path for path in KERNELS.rglob("sys_enter_*") if path.name[10:] in ("open", "openat", "openat2", "creat")
)


@pytest.mark.parametrize("path", OPENS, ids=lambda path: f"{path.parts[-3]}-{path.name}")
def test_opens_on_every_kernel(path: Path) -> None:
    call = path.name.removeprefix("sys_enter_")
    form = parse_format(path.read_text())
    pointer = "pathname" if "pathname" in form else "filename"
    table = open_table(call, form, Fetch(pointer, [("filename", Side(0, 4096))], FetchKind.TEXT))
    plan = compile_plan(Event, table, form)
    values = {name: value for name, value in (("flags", 0o2101), ("mode", 0o640)) if name in form}
    event = same(plan, raw_of(form, **values), b"/etc/passwd\0").file
    assert event.filename == "/etc/passwd"
    assert event.open_flags == (0o1101 if call == "creat" else values.get("flags", 0))
    assert event.open_mode == values.get("mode", 0)


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*/kprobe_open")), ids=lambda path: path.parts[-2])
@given(data=st.data())
def test_probes_on_every_kernel(path: Any, data: st.DataObject) -> None:
    form = parse_format(path.read_text())
    plan = compile_plan(Event, call_table(form), form)
    size = max(one.offset + one.size for one in form.fields)
    same(plan, data.draw(st.binary(min_size=size, max_size=size + 50)))


def test_a_field_that_the_kernel_does_not_have() -> None:
    with pytest.raises(UnservableError, match="no field 'nonsense'"):
        compile_plan(Event, {"syscall": {"arg0": Kernel("nonsense")}}, canned(HERE, "raw_syscalls/sys_enter"))


@pytest.mark.parametrize(
    "table",
    [
        {"syscall": {"arg0": Kernel("comm")}},
        {"syscall": {"arg0": Kernel("args")}},
        {"syscall": {"arg0": Kernel("u64", 3)}},
        {"syscall": {"arg0": {"arg1": 1}}},
        {"process": {"exit_code": Map([])}},
        [Fetch("u64", []), Fetch("u32", [])],
    ],
)
def test_tables_that_make_no_sense(table: Table) -> None:
    with pytest.raises(TypeError):
        compile_plan(Event, table, ONE_OF_EACH)


def test_the_numbers_are_those_of_the_header() -> None:
    for name, value in OpCode.__members__.items():
        assert getattr(lib, f"RS_OP_{name}") == value
    for name, kind in FetchKind.__members__.items():
        assert getattr(lib, f"RS_FETCH_{name}") == kind
