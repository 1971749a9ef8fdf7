"""A perf ring buffer without a kernel, records as the kernel writes them, and what became of them.

What comes out is read by Google's protobuf runtime, never by the code that wrote it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import betterproto2
from ringside.api.descriptors import message_class
from ringside.api.v0 import Event
from ringside.sensor._perf import ffi, lib
from ringside.sensor.engine import Batch, Engine, clock
from ringside.sensor.plan import Plan, compile_plan
from ringside.sensor.tracefs.format import Format, Kind, parse_format

KERNELS = Path(__file__).parent.parent / "data" / "kernels"
BOOT = "b00t"
HERE, OLDEST, NEWEST = "6.18-no-kprobes", "5.10.0-32-amd64", "7.3.4+deb13-amd64"

PAGE = 4096
_HEAD, _TAIL = 1024, 1032  # of struct perf_event_mmap_page
SAMPLE, LOST, EXIT = 9, 2, 4  # PERF_RECORD_*

REASONS = {
    getattr(lib, name): name.removeprefix("RS_")
    for name in [
        "RS_DONE",
        "RS_RECORD",
        "RS_FULL",
        "RS_LOST",
        "RS_UNKNOWN",
        "RS_CORRUPT",
        "RS_YIELD",
        "RS_CGROUP",
    ]
}

Response = message_class("capsule8.api.v0.GetEventsResponse")


def canned(kernel: str, event: str) -> Format:
    """A real kernel's format."""
    return parse_format((KERNELS / kernel / event).read_text())


def now() -> int:
    """A time that a drain which begins after this call takes in: the drain leaves alone what is younger."""
    moment = clock()
    while clock() - moment < 50_000:
        pass
    return moment


class FakeRing:
    """The memory of a ring, written to as the kernel would."""

    def __init__(self, pages: int = 2, start: int = 0, memory: Any = None) -> None:
        """`start` is where in its endless stream of bytes the ring begins."""
        self.pages = pages
        self.size = pages * PAGE
        self.memory = ffi.new("uint8_t[]", (pages + 1) * PAGE) if memory is None else ffi.from_buffer(memory)
        self.bytes = ffi.buffer(self.memory)
        self.head = self.tail = start

    def _get(self, at: int) -> int:
        return int(struct.unpack_from("=Q", self.bytes, at)[0])

    def _set(self, at: int, value: int) -> None:
        self.bytes[at : at + 8] = struct.pack("=Q", value & (1 << 64) - 1)

    @property
    def head(self) -> int:
        """Up to where the kernel has written."""
        return self._get(_HEAD)

    @head.setter
    def head(self, value: int) -> None:
        self._set(_HEAD, value)

    @property
    def tail(self) -> int:
        """Up to where the reader has read."""
        return self._get(_TAIL)

    @tail.setter
    def tail(self, value: int) -> None:
        self._set(_TAIL, value)

    @property
    def room(self) -> int:
        """How much the kernel may still write."""
        return self.size - (self.head - self.tail & (1 << 64) - 1)

    def put(self, at: int, data: bytes) -> None:
        """Bytes into the ring's data, wrapping, head as it was."""
        while data:
            offset = at % self.size
            piece, data = data[: self.size - offset], data[self.size - offset :]
            self.bytes[PAGE + offset : PAGE + offset + len(piece)] = piece
            at += len(piece)

    def write(self, *records: bytes) -> None:
        """Records, each followed by the head."""
        for record in records:
            assert len(record) <= self.room, "the kernel never writes over what was not read"
            self.put(self.head, record)
            self.head += len(record)

    def scribble(self) -> None:
        """Make everything that the reader has given back unreadable, as the kernel might at any moment."""
        self.put(self.head, b"\xa5" * self.room)

    def attach(self, engine: Engine, cpu: int = 0) -> int:
        """Have an engine read it; the ring's number."""
        number = lib.rs_ring_attach(engine.handle, self.memory, self.pages, PAGE, cpu)
        assert number >= 0
        return number


def record(kind: int, body: bytes, misc: int = 0) -> bytes:
    """struct perf_event_header and what follows."""
    assert len(body) % 8 == 0
    return struct.pack("=IHH", kind, misc, len(body) + 8) + body


def sample(
    event: int, when: int, raw: bytes, pid: int = 1000, tid: int | None = None, more: bytes = b""
) -> bytes:
    """PERF_RECORD_SAMPLE with IDENTIFIER, TID, TIME and RAW; the kernel pads raw data so that 8 divides."""
    raw += bytes(-(len(raw) + 4) % 8)
    head = struct.pack("=QiiQI", event, pid, pid if tid is None else tid, when, len(raw))
    return record(SAMPLE, head + raw + more)


def lost(event: int, count: int, when: int) -> bytes:
    """PERF_RECORD_LOST with sample_id_all."""
    return record(LOST, struct.pack("=QQiiQQ", event, count, 0, 0, when, event))


def raw_of(form: Format, **values: Any) -> bytes:
    """A record's raw data with these fields; texts go behind it, by __data_loc."""
    out = bytearray(max(one.offset + one.size for one in form.fields))
    for name, value in values.items():
        there = form[name]
        if there.kind is Kind.DATA_LOC:
            out[there.offset : there.offset + 4] = struct.pack("=HH", len(out), len(value) + 1)
            out += value + b"\0"
        elif there.kind is Kind.CHARS:
            out[there.offset : there.offset + there.size] = value[: there.size].ljust(there.size, b"\0")
        else:
            ones = value if isinstance(value, tuple) else (value,)
            width = there.size // len(ones)
            for index, one in enumerate(ones):
                at = there.offset + index * width
                out[at : at + width] = (one & (1 << 8 * width) - 1).to_bytes(width, "little")
    return bytes(out)


def decode(data: bytes) -> Any:
    """A GetEventsResponse that must be canonical: encoding it again gives the same bytes."""
    response = Response.FromString(data)
    again = response.SerializeToString(deterministic=True)
    assert again == data, f"not canonical:\n{data[:500].hex()}\n{again[:500].hex()}"
    return response


def process_id(pid: int, start: int) -> str:
    """What a process of a Rig's is called."""
    return f"{BOOT}-{pid:x}-{start:x}"


@dataclass(frozen=True)
class Stop:
    """Why a drain stopped, by name, and the fields of rs_stop that go with it."""

    why: str
    index: int
    cpu: int
    source: int
    pid: int
    tid: int
    time: int
    since: int
    count: int
    raw: bytes
    memory: bytes


@dataclass
class Rig:
    """An engine with its stops written down and its batches decoded."""

    sensor_id: str = "test-sensor"
    self_pid: int = 999
    first_sequence: int = 1
    knows_everybody: bool = True
    stops: list[Stop] = field(default_factory=list)
    batches: dict[int, list[Batch]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine = Engine(self.sensor_id, self.self_pid, self.first_sequence)
        self.engine.set_life(boot=BOOT, history=1 << 20)

    def close(self) -> None:
        self.engine.close()

    def source(
        self,
        form: Format,
        table: Any,
        key: str | None = None,
        flags: int = 0,
        message: type[betterproto2.Message] = Event,
    ) -> int:
        """A source of records of this format."""
        plan = compile_plan(message, table, form) if table is not None else Plan()
        there = form[key] if key else None
        return self.engine.open_source(flags, plan, there.offset if there else 0, there.size if there else 0)

    def event(
        self,
        id: int,
        source: int,
        since: int = 0,
        until: int = 0,
        order: int = lib.RS_LATEST_FIRST,
        end: int | None = None,
    ) -> None:
        """Have a perf event's records feed a source; `end`: none are written from then on."""
        assert lib.rs_event_set(self.engine.handle, id, source, order, since, until) == 0
        if end is not None:
            lib.rs_event_end(self.engine.handle, id, end)

    def drain(self, budget: int = 0, limit: int = 10_000) -> list[Stop]:
        """Drain to the end as the sensor does; where it stopped on the way, without DONE."""
        stops = []
        for _ in range(limit):
            stop = self.step(budget)
            if stop.why == "DONE":
                break
            stops.append(stop)
            if stop.why == "FULL":
                self.take(stop.index)
            elif stop.why == "UNKNOWN":
                assert self.knows_everybody, f"who is {stop.pid}?"
                self.engine.set_process(stop.pid)
        else:
            raise AssertionError("the drain does not end")
        return stops

    def step(self, budget: int = 0) -> Stop:
        """One rs_drain()."""
        why = REASONS[self.engine.drain(budget)]
        told = self.engine.stop
        numbers = ("index", "cpu", "source", "pid", "tid", "time", "since", "count")
        stop = Stop(
            why=why,
            raw=bytes(ffi.buffer(told.raw, told.raw_length)) if told.raw_length else b"",
            memory=bytes(ffi.buffer(told.memory, told.memory_length)) if told.memory_length else b"",
            **{name: getattr(told, name) for name in numbers},
        )
        self.stops.append(stop)
        return stop

    def take(self, output: int) -> None:
        """What an output has gathered, into `batches`."""
        batch = self.engine.take(output)
        if batch is not None:
            self.batches.setdefault(output, []).append(batch)

    def events(self, output: int) -> list[Any]:
        """All TelemetryEvents of an output since the last call, decoded."""
        self.take(output)
        found = []
        for batch in self.batches.pop(output, []):
            response = decode(batch.data)
            assert len(response.events) == batch.events
            times = [one.event.sensor_monotime_nanos for one in response.events]
            assert (batch.first_time, batch.last_time) == (times[0], times[-1])
            found.extend(response.events)
        numbers = [one.event.sensor_sequence_number for one in found]
        assert numbers == sorted(set(numbers)), "sequence numbers must rise"
        return found

    @property
    def counters(self) -> dict[str, int]:
        return self.engine.counters()
