"""The C engine: rings in, batches of encoded events out; the Python side of _perf.c.

What writes to the rings, and on which CPUs, is perf.py's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ringside.api.v0 import Event, GetEventsResponse, TelemetryEvent
from ringside.api.v0 import Process as ProcessMessage

from . import wire
from ._perf import ffi, lib
from .errors import KernelError
from .plan import FetchSpec, Plan

if TYPE_CHECKING:
    from ._perf import CData
    from .program import Test

_TEST = struct.Struct("@BBBHIIIQii")  # rs_test
_ENTRY = struct.Struct("@IiqIi")  # rs_entry
_COURIER_PRIORITY = 1  # SCHED_FIFO: before everything ordinary, and it sleeps nearly always


def check(result: int, operation: str) -> int:
    """The result of a call of the engine; KernelError, naming the operation, if it is a negative errno."""
    if result < 0:
        raise KernelError(operation, -result)
    return result


@dataclass(frozen=True, slots=True)
class Route:
    """An output's interest in an event: everything, or one key, and only what the tests accept."""

    output: int
    key: int | None = None
    tests: tuple[Test, ...] = ()


class Batch(NamedTuple):
    """Events ready to send: a GetEventsResponse's `events`, encoded. Times are CLOCK_MONOTONIC_RAW ns."""

    data: bytes
    events: int
    first_time: int
    last_time: int


class Engine:
    """The C engine: rings in, batches of encoded events out. Close it when done; close is idempotent."""

    def __init__(self, sensor_id: str, self_pid: int, first_sequence: int = 1) -> None:
        event, outer, response = (
            wire.fields(Event),
            wire.fields(TelemetryEvent),
            wire.fields(GetEventsResponse),
        )
        process = wire.fields(ProcessMessage)
        tags = ffi.new("rs_tags *")
        for name, tag in (
            ("events", response["events"].tag),
            ("event", outer["event"].tag),
            ("id", event["id"].tag),
            ("sequence", event["sensor_sequence_number"].tag),
            ("time", event["sensor_monotime_nanos"].tag),
            ("tid", event["process_tid"].tag),
            ("cpu", event["cpu"].tag),
            ("process_id", event["process_id"].tag),
            ("process_pid", event["process_pid"].tag),
            ("lineage", event["process_lineage"].tag),
            ("lineage_pid", process["pid"].tag),
            ("lineage_command", process["command"].tag),
            ("publish", outer["publish_time_micros"].tag),
        ):
            target = getattr(tags, name)
            target.length = len(tag)
            for at, byte in enumerate(tag):
                target.bytes[at] = byte
        prefix = sensor_id[:8].encode() + b"-"
        sensor = event["sensor_id"].encode(sensor_id)
        made = lib.rs_new(self_pid, tags, first_sequence, prefix, len(prefix), sensor, len(sensor))
        if made == ffi.NULL:
            raise MemoryError("no memory for the engine")
        self.handle = made
        self.stop = ffi.new("rs_stop *")
        self._counted = lib.rs_count(made)
        self._batch = ffi.new("rs_batch *")
        self._single = ffi.new("uint32_t[1]")
        self._free_sources: list[int] = []
        self._free_outputs: list[int] = []
        self._sources = 0
        self._outputs = 0
        self._closed = False

    def close(self) -> None:
        """Unmap every ring and free all."""
        if not self._closed:
            self._closed = True
            lib.rs_free(self.handle)

    # -- what happens ------------------------------------------------------------------------------

    def drain(self, budget: int) -> int:
        """Go on with the rings' records; why it stopped (lib.RS_*), the rest in `self.stop`."""
        result: int = lib.rs_drain(self.handle, budget, self.stop)
        return result

    def set_publish_time(self, micros: int) -> None:
        """Stamp events with this wall-clock time (µs since the epoch), not with when they were published."""
        lib.rs_publish_time(self.handle, micros)

    def emit(
        self,
        outputs: Sequence[int],
        time: int,
        body: bytes,
        cpu: int = 0,
        pid: int = 0,
        tid: int = 0,
        container: int = 0,
    ) -> int:
        """Give an event with this body (fields of Event) to outputs; its sequence number, or 0."""
        count = len(outputs)
        if count == 1:
            self._single[0] = outputs[0]
        number: int = lib.rs_emit(
            self.handle,
            self._single if count == 1 else outputs,
            count,
            time,
            cpu,
            pid,
            tid,
            container,
            body,
            len(body),
        )
        return number

    @property
    def records(self) -> int:
        """How many samples were read from the rings."""
        count: int = self._counted.records
        return count

    def counters(self) -> dict[str, int]:
        """The engine's books since its start; see rs_counters in _perf.h."""
        return {name: getattr(self._counted, name) for name, _ in ffi.typeof("rs_counters").fields}

    def start_courier(self) -> int:
        """Start the thread that reads callers' memory; its thread id."""
        return check(lib.rs_courier_start(self.handle, _COURIER_PRIORITY), "starting the courier")

    # -- outputs -----------------------------------------------------------------------------------

    def open_output(
        self,
        flush_at: int,
        *,
        since: int = 0,
        until: int = 0,
        limit: int = 0,
        interval: int = 0,
        include_self: bool = False,
    ) -> int:
        """A new output, its number."""
        output = self._free_outputs.pop() if self._free_outputs else self._outputs
        self._outputs = max(self._outputs, output + 1)
        check(
            lib.rs_output_set(self.handle, output, flush_at, since, until, limit, interval, include_self),
            "output",
        )
        return output

    def set_containers(self, output: int, bits: bytes) -> None:
        """Only the containers whose bit is set may pass."""
        check(lib.rs_output_containers(self.handle, output, bits, len(bits)), "containers")

    def close_output(self, output: int) -> None:
        """Forget an output; no route may name it any more."""
        lib.rs_output_clear(self.handle, output)
        self._free_outputs.append(output)

    def take(self, output: int) -> Batch | None:
        """What an output has gathered, which is then empty; None if that is nothing."""
        batch = self.look(output)
        if not batch.events:
            return None
        taken = copy(batch)
        lib.rs_output_reset(self.handle, output)
        return taken

    def look(self, output: int) -> CData:
        """What an output has gathered, an rs_batch; its bytes stay until there is more, or another look."""
        lib.rs_output_batch(self.handle, output, self._batch)
        return self._batch

    def drop(self, output: int) -> None:
        """Empty an output."""
        lib.rs_output_reset(self.handle, output)

    def gathered(self) -> Iterator[int]:
        """The outputs that have something to take."""
        output = lib.rs_output_next(self.handle, -1)
        while output >= 0:
            yield output
            output = lib.rs_output_next(self.handle, output)

    def limit_left(self, output: int) -> int:
        """How many events the output may still take."""
        left: int = lib.rs_output_left(self.handle, output)
        return left

    # -- sources -----------------------------------------------------------------------------------

    def open_source(
        self, flags: int, plan: Plan | None = None, key_offset: int = 0, key_size: int = 0
    ) -> int:
        """A new source of records, its number."""
        source = self._free_sources.pop() if self._free_sources else self._sources
        self._sources = max(self._sources, source + 1)
        ops, count, pool = pack_plan(plan or Plan())
        check(
            lib.rs_source_set(self.handle, source, flags, ops, count, pool, len(pool), key_offset, key_size),
            "source",
        )
        if plan is not None and plan.view is not None:
            check(lib.rs_source_view(self.handle, source, *plan.view), "view")
        return source

    def close_source(self, source: int) -> None:
        """Forget a source; no event may name it any more."""
        self.route(source, ())
        self._free_sources.append(source)

    def route(self, source: int, routes: Sequence[Route]) -> None:
        """Who gets the source's records, from now on."""
        packed = bytearray()
        tests: list[Test] = []
        for route in sorted(routes, key=lambda one: one.output):
            first = len(tests) if route.tests else lib.RS_ACCEPT
            packed += _ENTRY.pack(route.output, first, route.key or 0, route.key is None, 0)
            tests.extend(route.tests)
        entries = ffi.from_buffer("rs_entry[]", packed or bytes(_ENTRY.size))
        array, pool = pack_tests(tests)
        check(
            lib.rs_source_route(
                self.handle, source, entries, len(routes), array, len(tests), pool, len(pool)
            ),
            "route",
        )

    # -- processes ---------------------------------------------------------------------------------

    def set_life(
        self,
        *,
        boot: str = "boot",
        proc: str = "/proc",
        history: int = 0,
        threads_counted: bool = False,
        cgroups_told: int = lib.RS_CGROUPS_NONE,
        untold: int = 0,
    ) -> None:
        """How processes are told apart and remembered; see rs_life in _perf.h."""
        life = ffi.new("rs_life *")
        texts = [ffi.new("char[]", text.encode("utf-8", "surrogateescape")) for text in (boot, proc)]
        life.boot, life.proc = texts
        life.history, life.threads_counted = history, threads_counted
        life.cgroups_told, life.untold = cgroups_told, untold
        check(lib.rs_life_set(self.handle, life), "processes")

    def set_process(
        self,
        pid: int,
        start: int | None = None,
        *,
        parent: int = 0,
        command: bytes = b"",
        container: int = 0,
        flags: int = lib.RS_ALIVE,
        threads: int = 1,
        counted_at: int = 0,
    ) -> None:
        """A process that began so many clock ticks after boot, or what is new of it; see rs_process_set()."""
        told = ffi.new("rs_process *")
        told.pid, told.container, told.threads, told.counted_at = pid, container, threads, counted_at
        told.flags = flags | (lib.RS_NAMELESS if start is None else 0)
        told.start = start or 0
        told.comm_length = min(len(command), lib.RS_COMM)
        ffi.memmove(told.comm, command, told.comm_length)
        check(lib.rs_process_set(self.handle, told), "process")
        if parent:
            lib.rs_process_adopt(self.handle, pid, parent)

    def follow(self, source: int, what: int, facts: int, offsets: Sequence[int]) -> None:
        """Have a source's lifecycle records handled in C; see RS_ON_* in _perf.h."""
        how = ffi.new("rs_follow *")
        how.what, how.facts = what, facts
        how.at = list(offsets)
        check(lib.rs_source_follow(self.handle, source, how), "follow")

    def set_container(self, number: int, head: bytes = b"", tail: bytes = b"", *, hold: bool = False) -> None:
        """What the events of a container's processes carry, before and behind the event's own fields.

        `hold`: they wait, from now until `release`.
        """
        flags = lib.RS_HOLD if hold else 0
        check(lib.rs_container_set(self.handle, number, flags, head, len(head), tail, len(tail)), "container")

    def release(self, number: int) -> int:
        """Let go the events that wait for this container; how many."""
        released: int = lib.rs_release(self.handle, number)
        return released


def pack_plan(plan: Plan) -> tuple[object, int, bytes]:
    """A plan as C has it: array of rs_op, their number, pool of constants."""
    ops = ffi.new("rs_op[]", max(1, len(plan.ops)))
    pool = bytearray()
    for at, op in enumerate(plan.ops):
        target = ops[at]
        target.op, target.size, target.flags = op.op, op.size, op.flags
        target.tag_length = len(op.tag)
        for index, byte in enumerate(op.tag):
            target.tag[index] = byte
        target.offset, target.jump, target.value = op.offset, op.jump, op.value
        target.length = op.length
        if op.text:
            target.text, target.length = len(pool), len(op.text)
            pool += op.text
    return ops, len(plan.ops), bytes(pool)


def pack_tests(tests: Sequence[Test]) -> tuple[object, bytes]:
    """Tests as C has them: array of rs_test, pool of texts."""
    packed = bytearray()
    pool = bytearray()
    for one in tests:
        kind = one.kind, one.cmp, one.flags, one.size, one.offset
        text = (len(one.text), len(pool)) if one.text else (0, 0)
        packed += _TEST.pack(*kind, *text, one.value & (1 << 64) - 1, one.yes, one.no)
        pool += one.text
    return ffi.from_buffer("rs_test[]", packed or bytes(_TEST.size)), bytes(pool)


def pack_fetches(fetches: Sequence[FetchSpec]) -> object:
    """What the courier is to read, as C has it: array of rs_fetch."""
    array = ffi.new("rs_fetch[]", max(1, len(fetches)))
    for target, one in zip(array, fetches, strict=False):
        target.kind, target.offset, target.count, target.length = one.kind, one.offset, one.count, one.length
        target.flags, target.front, target.front_offset = one.flags, one.front, one.front_offset
        target.n_when = len(one.when)
        for at, when in enumerate(one.when):
            target.when[at].offset, target.when[at].size, target.when[at].value = when
    return array


def copy(batch: CData) -> Batch:
    """An rs_batch that stays."""
    data = ffi.buffer(batch.data, batch.length)[:]
    return Batch(data, batch.events, batch.first_time, batch.last_time)


def clock() -> int:
    """Now, in the events' clock: CLOCK_MONOTONIC_RAW, ns."""
    now: int = lib.rs_clock()
    return now
