"""Lifecycle records in C: the process table, process events, what is remembered of them. Without a kernel."""

from __future__ import annotations

import os
import random
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.api.v0 import Event, ProcessEventType
from ringside.sensor import wire
from ringside.sensor._perf import ffi, lib
from ringside.sensor.engine import Route
from ringside.sensor.events.process_facts import EXEC, EXIT, FACTS, FORK, TABLES
from ringside.sensor.events.process_programs import EXECUTED, EXITED
from ringside.sensor.expression import Op, Predicate
from ringside.sensor.program import compile_program, fields_of

from .support.fakering import BOOT, HERE, FakeRing, Rig, canned, now, process_id, raw_of, sample

pytestmark = pytest.mark.asan

FORKED, RENAMED = canned(HERE, "task/task_newtask"), canned(HERE, "task/task_rename")
CLONE_THREAD, CLONE_INTO_CGROUP = 0x10000, 0x200000000
TICK = 10**9 // os.sysconf("SC_CLK_TCK")
KINDS = {1: "fork", 2: "exec", 3: "exit"}


class Life(Rig):
    """An engine that follows processes, with an output for all their events."""

    def __init__(self, pages: int = 64, **life: Any) -> None:
        super().__init__()
        self.engine.set_life(boot=BOOT, **{"history": 1 << 20, **life})
        self.engine.set_publish_time(1_700_000_000_000_000)
        self.ring = FakeRing(pages)
        self.ring.attach(self.engine)
        self.facts = {kind: self.source(FACTS, table, None, lib.RS_LINEAGE) for kind, table in TABLES.items()}
        self.all = self.engine.open_output(64 << 10)
        for source in self.facts.values():
            self.engine.route(source, [Route(self.all)])
        for number, what, kind, form, names in (
            (1, lib.RS_ON_FORK, FORK, FORKED, ("pid", "clone_flags", "comm")),
            (2, lib.RS_ON_RENAME, None, RENAMED, ("pid", "newcomm")),
            (3, lib.RS_ON_EXEC_TOLD, EXEC, EXECUTED, ("filename", "address", "length", "arguments")),
            (4, lib.RS_ON_EXIT_TOLD, EXIT, EXITED, ("code",)),
        ):
            flags = lib.RS_LIFECYCLE | (lib.RS_CALLER if kind is EXEC else 0)
            source = self.engine.open_source(flags)
            offsets = [form[name].offset if name in form else 0 for name in names]
            self.engine.follow(source, what, self.facts[kind] if kind else 0, offsets)
            self.event(number, source)
        self.engine.set_process(1, 1, command=b"init")

    def fork(self, parent: int, pid: int, flags: int = 0, command: bytes = b"sh", when: int = 0) -> None:
        raw = raw_of(FORKED, pid=pid, clone_flags=flags, comm=command)
        self.ring.write(sample(1, when or now(), raw, parent))

    def rename(self, pid: int, command: bytes) -> None:
        fields = {"newcomm": command, **({"pid": pid} if "pid" in RENAMED else {})}
        self.ring.write(sample(2, now(), raw_of(RENAMED, **fields), pid))

    def exec(self, pid: int, filename: bytes, *arguments: bytes, cgroup: int = 0, length: int = 0) -> None:
        text = b"".join(one + b"\0" for one in arguments)
        raw = raw_of(EXECUTED, length=length or len(text), filename=filename)
        at = EXECUTED["arguments"].offset
        raw = raw[:at] + struct.pack("=HH", len(raw), len(text)) + raw[at + 4 :] + text
        self.ring.write(sample(3, now(), raw, pid, more=struct.pack("=QQQ", 2, 0, cgroup)))

    def exit(self, pid: int, code: int = 0, tid: int | None = None) -> None:
        self.ring.write(sample(4, now(), raw_of(EXITED, code=code), pid, tid))

    def told(self) -> list[tuple[str, int]]:
        """Kinds and pids of what came."""
        self.drain()
        return [(KINDS[one.event.process.type], one.event.process_pid) for one in self.events(self.all)]

    def container(self, number: int, name: str = "") -> None:
        fields = wire.fields(Event)
        head, tail = fields["container_id"].encode(f"{name or number}"), fields["container_name"].encode(name)
        self.engine.set_container(number, head, tail)

    def known(self, pid: int) -> Any:
        told = ffi.new("rs_process *")
        return told if lib.rs_process_get(self.engine.handle, pid, told) else None

    def replay(self, since: int = 0) -> list[Any]:
        lib.rs_replay(self.engine.handle, self.all, since, (1 << 64) - 1, ffi.new("rs_place *"))
        return [one.event for one in self.events(self.all)]


@pytest.fixture
def life() -> Iterator[Life]:
    made = Life()
    yield made
    made.close()


def lineage(event: Any) -> list[tuple[int, str]]:
    return [(one.pid, one.command) for one in event.process_lineage]


def test_a_life(life: Life) -> None:
    life.fork(1, 50)
    life.rename(50, b"true")
    life.exec(50, b"/bin/true", b"true", b"", b"-x")
    life.exit(50, 3 << 8)
    life.drain()
    fork, exec, exit = (one.event for one in life.events(life.all))
    assert (fork.process_pid, fork.process_id) == (1, process_id(1, 1))
    assert exec.process_id == exit.process_id == fork.process.fork_child_id
    assert lineage(fork) == [(1, "init")]
    assert lineage(exec) == lineage(exit) == [(50, "true"), (1, "init")]
    assert exec.process.exec_filename == "/bin/true"
    assert list(exec.process.exec_command_line) == ["true", "", "-x"]
    assert (exit.process.exit_code, exit.process.exit_status) == (768, 3)


def test_a_program_longer_than_its_record(life: Life) -> None:
    """The rest is read from its process: here, from this one."""
    line = b"".join(b"%d\0" % n for n in range(30_000))
    held = ffi.from_buffer(line)
    address = int(ffi.cast("uintptr_t", held))
    life.engine.set_process(os.getpid(), 5)
    raw = raw_of(EXECUTED, length=len(line), address=address, filename=b"/bin/x")
    life.ring.write(sample(3, now(), raw, os.getpid(), more=struct.pack("=QQQ", 2, 0, 0)))
    life.drain()
    (exec,) = (one.event.process for one in life.events(life.all))
    assert list(exec.exec_command_line) == [str(n) for n in range(30_000)]


def test_a_program_of_a_million_empty_arguments(life: Life) -> None:
    """More than a body usually has room for."""
    line = bytes(2_000_000)
    held = ffi.from_buffer(line)
    address = int(ffi.cast("uintptr_t", held))
    for pid in (os.getpid(), 1):  # the next one is as always
        life.engine.set_process(pid, 5)
        length = len(line) if pid > 1 else 0
        raw = raw_of(EXECUTED, length=length, address=address, filename=b"/bin/x")
        life.ring.write(sample(3, now(), raw, pid, more=struct.pack("=QQQ", 2, 0, 0)))
    life.drain()
    told = [len(one.event.process.exec_command_line) for one in life.events(life.all)]
    assert told == [2_000_000, 0]


def test_whose_parent_is_unknown_is_asked_for(life: Life) -> None:
    life.knows_everybody = False
    life.fork(70, 71)
    life.exit(71)
    stop = life.step()
    assert (stop.why, stop.pid) == ("UNKNOWN", 70)
    life.engine.set_process(70, 7)
    assert life.told() == [("fork", 70), ("exit", 71)]


def test_threads_are_counted_where_the_kernel_does_not_say() -> None:
    life = Life(threads_counted=True)
    life.fork(1, 50)
    life.fork(50, 51, CLONE_THREAD)
    life.fork(50, 52, CLONE_THREAD)
    life.exit(50, 1)
    life.exit(50, 1, 51)
    assert life.told() == [("fork", 1)]
    assert life.known(50).flags & lib.RS_ALIVE
    life.exit(50, 1, 52)
    life.exit(50, 1, 52)  # of whom nothing is left
    assert life.told() == [("exit", 50)]
    life.close()


def test_a_process_made_in_another_cgroup_is_pythons_to_place(life: Life) -> None:
    life.fork(1, 50, CLONE_INTO_CGROUP)
    life.fork(1, 51)
    stop = life.step()
    assert (stop.why, stop.pid) == ("RECORD", 1)
    assert life.known(50) is not None
    assert life.told() == [("fork", 1), ("fork", 1)]


def test_start_times_near_a_tick_are_read(tmp_path: Any) -> None:
    """A process's start is taken a little before its event: in the tick before, perhaps."""
    life = Life(proc=str(tmp_path))
    life.drain()
    offset = lib.rs_boot_offset(life.engine.handle)
    border = (now() + offset - 2 * TICK) // TICK * TICK - offset
    soon = 200_000  # ns: the clocks' difference is measured again, and not to the nanosecond
    cases = ((soon, -1), (soon, 0), (soon, None), (soon, -7), (TICK // 2, -1))
    for pid, (behind, says) in enumerate(cases, 50):
        at = (border + offset) // TICK
        if says is not None:
            (tmp_path / str(pid)).mkdir()
            stat = f"{pid} (a) b ) c) S " + " ".join(["1"] * 18) + f" {at + says} 9 9\n"
            (tmp_path / str(pid) / "stat").write_text(stat)
        life.fork(1, pid, when=border + behind)
    life.drain()
    told = [one.event.process for one in life.events(life.all)]
    starts = [int(one.fork_child_id.rpartition("-")[2], 16) - at for one in told]
    assert starts == [-1, 0, 0, 0, 0]
    life.close()


def test_nobody_descends_from_himself(life: Life) -> None:
    """Whatever procfs said while pids were used again."""
    for pid in (5, 6, 7):
        life.engine.set_process(pid, pid, parent=pid - 1)
    for pid, parent in ((5, 7), (6, 6), (6, 7), (7, 5)):
        lib.rs_process_adopt(life.engine.handle, pid, parent)
    life.fork(7, 8)
    life.fork(5, 5)
    life.drain()
    (event,) = (one.event for one in life.events(life.all))
    assert [pid for pid, _ in lineage(event)] == [7, 5]


def test_containers_count_who_is_alive_in_them(life: Life) -> None:
    def counts() -> list[int]:
        return [lib.rs_container_processes(life.engine.handle, number) for number in (1, 2)]

    for number in (1, 2):
        life.container(number, f"c{number}")
    life.engine.set_process(50, 5, container=1)
    life.fork(50, 51)
    life.fork(51, 52)
    life.drain()
    assert counts() == [3, 0]
    lib.rs_process_move(life.engine.handle, 51, 2)
    life.exec(51, b"/bin/x", b"x")
    life.fork(51, 53)
    life.drain()
    assert counts() == [2, 2]
    life.container(2, "another name")
    life.engine.set_process(52, 99)  # its pid is another's
    assert counts() == [1, 2]
    life.exit(51)
    life.exit(53)
    stops = [stop for stop in life.drain() if stop.why == "RECORD"]
    assert [stop.pid for stop in stops] == [51, 53]  # Python is told, as it may have been the last
    assert counts() == [1, 0]


def test_a_program_in_a_cgroup_where_its_process_should_not_be() -> None:
    life = Life(cgroups_told=lib.RS_CGROUPS_ALL)
    life.container(1, "one")
    life.engine.set_process(50, 5)

    def asked(pid: int, cgroup: int) -> list[tuple[str, int]]:
        life.exec(pid, b"/bin/x", b"x", cgroup=cgroup)
        return [(one.why, one.pid) for one in life.drain()]

    assert asked(50, 7) == [("CGROUP", 50)]
    assert asked(50, 7) == [("CGROUP", 50)]  # nobody has said that it is right
    lib.rs_cgroup_set(life.engine.handle, 7, 0)
    assert asked(50, 7) == asked(50, 0) == []
    assert asked(50, 8) == [("CGROUP", 50)]
    lib.rs_cgroup_set(life.engine.handle, 8, 1)
    lib.rs_process_move(life.engine.handle, 50, 1)
    assert asked(50, 8) == []
    assert asked(50, 7) == [("CGROUP", 50)]
    lib.rs_cgroups_clear(life.engine.handle)
    assert asked(50, 8) == [("CGROUP", 50)]
    assert life.told() == [("exec", 50)] * 8
    life.close()


def test_the_rest_of_the_world_only_where_a_container_may_be_elsewhere() -> None:
    """In a hybrid hierarchy a container's process need not be in the container's unified cgroup."""
    life = Life(cgroups_told=lib.RS_CGROUPS_HOST)
    life.container(1, "one")
    life.engine.set_process(50, 5, container=1)
    life.engine.set_process(51, 5)
    for pid in (50, 51):
        life.exec(pid, b"/bin/x", b"x", cgroup=7)
    assert [(one.why, one.pid) for one in life.drain()] == [("CGROUP", 51)]
    life.close()


def test_filters_decide_by_the_facts(life: Life) -> None:
    def wanted(kind: ProcessEventType, *terms: Predicate) -> int:
        output = life.engine.open_output(64 << 10)
        tests = [compile_program(term, fields_of(FACTS)) for term in terms]
        life.engine.route(life.facts[kind], [Route(output, None, one) for one in tests])
        return output

    names = wanted(EXEC, Predicate(Op.EQ, "filename", "/bin/b"), Predicate(Op.MATCH, "filename", "/*/c"))
    codes = wanted(EXIT, Predicate(Op.EQ, "code", 0x100))
    for pid, name in enumerate((b"/bin/a", b"/bin/b", b"/x/y/c", b""), 50):
        life.fork(1, pid)
        life.exec(pid, name)
        life.exit(pid, (pid - 50) << 8)
    life.drain()
    assert [one.event.process.exec_filename for one in life.events(names)] == ["/bin/b", "/x/y/c"]
    assert [one.event.process_pid for one in life.events(codes)] == [51]


# --- what is remembered


def test_what_is_remembered_is_told_as_it_was(life: Life) -> None:
    life.container(1, "web")
    life.engine.set_process(50, 5, container=1, command=b"sh")
    life.exec(50, b"/bin/x", b"x", b"y")
    life.rename(50, b"later")
    life.exit(50, 9)
    life.drain()
    first = [one.event for one in life.events(life.all)]
    life.container(1, "web 2")  # the same number, another container
    again = life.replay()
    for one in (*first, *again):
        one.ClearField("sensor_sequence_number")
        one.ClearField("id")
    assert again == first
    assert [lineage(one) for one in again] == [[(50, "sh")], [(50, "later")]]
    assert {one.container_name for one in again} == {"web"}
    assert [one.process.type for one in life.replay(again[1].sensor_monotime_nanos)] == [EXIT]


def test_a_container_that_is_still_there_is_told_by_what_is_known_now(life: Life) -> None:
    fields = wire.fields(Event)
    head = fields["container_id"].encode("1234")
    life.engine.set_container(1, head)
    life.engine.set_process(50, 5, container=1)
    life.exit(50)
    life.drain()
    life.events(life.all)
    life.engine.set_container(1, head, fields["container_name"].encode("/its-name"))
    assert [(one.container_id, one.container_name) for one in life.replay()] == [("1234", "/its-name")]


@pytest.mark.parametrize("listening", [True, False])
def test_what_waits_for_a_containers_names_comes_with_them_and_once(life: Life, listening: bool) -> None:
    """Whether or not somebody was there when it happened, who looks back meanwhile gets it then."""
    life.engine.set_container(1, b"", b"", hold=True)
    life.engine.set_process(50, 5, container=1)
    route = [Route(life.all)] if listening else []
    for source in life.facts.values():
        life.engine.route(source, route)
    life.exec(50, b"/bin/x", b"x")
    life.drain()
    for source in life.facts.values():
        life.engine.route(source, [Route(life.all)])
    assert life.replay() == []
    life.container(1, "web")
    lib.rs_release(life.engine.handle, 1)
    (one,) = life.events(life.all)
    assert (one.event.process.exec_filename, one.event.container_name) == ("/bin/x", "web")
    assert len(life.replay()) == 1


def test_a_replay_goes_on_where_it_was_left(life: Life) -> None:
    for number in range(5):
        life.exec(1, f"/{number}".encode(), b"x")
        life.drain()
    times = [one.event.sensor_monotime_nanos for one in life.events(life.all)]
    place = ffi.new("rs_place *")
    told = []
    for until in (times[0], times[2], times[2], times[4], times[4] + 1):
        lib.rs_replay(life.engine.handle, life.all, times[1], until, place)
        told.append([one.event.process.exec_filename for one in life.events(life.all)])
    assert told == [[], ["/1"], [], ["/2", "/3"], ["/4"]]


def test_a_replay_goes_to_who_wants_it(life: Life) -> None:
    life.container(1, "web")
    life.engine.set_process(50, 5, container=1)
    outputs = [life.engine.open_output(64 << 10, limit=limit) for limit in (0, 0, 2)]
    life.engine.set_containers(outputs[1], bytes([2]))
    for source in life.facts.values():
        life.engine.route(source, [Route(one) for one in outputs])
    for pid in (50, 1):
        life.exec(pid, b"/bin/x", b"x")
        life.exec(pid, b"/bin/y", b"y")
    life.drain()
    seen = [len(life.events(one)) for one in outputs]
    for one in outputs:
        lib.rs_replay(life.engine.handle, one, 0, (1 << 64) - 1, ffi.new("rs_place *"))
    assert seen == [4, 2, 2]
    assert [len(life.events(one)) for one in outputs] == [4, 2, 0]
    lib.rs_replay(life.engine.handle, 4000, 0, (1 << 64) - 1, ffi.new("rs_place *"))


@pytest.mark.parametrize("size", [0, 100, 3000, 4096, 20_000])
def test_the_latest_are_remembered_in_the_space_there_is(size: int) -> None:
    """And from when on all are, is told."""
    rolls = random.Random(size)
    life = Life(history=size)
    names: list[tuple[int, str]] = []
    for _ in range(30):
        for _ in range(rolls.randrange(1, 12)):
            name = "x" * rolls.randrange(1, 60)
            life.exec(1, f"/{len(names)}".encode(), *[name.encode()] * rolls.randrange(0, 20))
            names.append((0, f"/{len(names)}"))
        life.drain()
        told = [one.event for one in life.events(life.all)]
        names[-len(told) :] = [(one.sensor_monotime_nanos, one.process.exec_filename) for one in told]
        again = [(one.sensor_monotime_nanos, one.process.exec_filename) for one in life.replay()]
        since = lib.rs_history_since(life.engine.handle)
        assert again == [one for one in names if one[0] > since]
        assert len(again) >= size // 2500 or len(again) == len(names)
    life.close()


# --- the table, held against a model


@dataclass
class Known:
    start: int
    command: str
    parent: Known | None
    alive: bool = True
    pid: int = 0
    line: list[tuple[int, str]] = field(default_factory=list)

    def lineage(self) -> list[tuple[int, str]]:
        return [(self.pid, self.command)] + (self.parent.lineage() if self.parent else [])


PIDS = st.integers(1, 12)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("fork"), PIDS, PIDS),
        st.tuples(st.just("rename"), PIDS, st.sampled_from([b"a", b"\xff\xfe", b"longest-of-all"])),
        st.tuples(st.just("exit"), PIDS, st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_whoever_forks_dies_and_is_named(steps: list[tuple[str, int, Any]]) -> None:
    life = Life()
    model: dict[int, Known] = {1: Known(1, "init", None, pid=1)}
    expected = []
    start_of_now = (now() + lib.rs_boot_offset(life.engine.handle)) // TICK

    def of(pid: int) -> Known:
        if pid not in model:  # the rig says no more of those that it does not know
            model[pid] = Known(0, "", None, alive=True, pid=pid)
        return model[pid]

    for what, pid, other in steps:
        if what == "fork":
            parent = of(pid)
            life.fork(pid, other, command=b"child")
            expected.append(parent.lineage())
            known = model.get(other)
            if known is None or not known.alive or known.start == 0:
                model[other] = Known(start_of_now, "child", parent, pid=other)
            elif known.start != 1:
                pass  # the same tick: it is taken for the one that is known
            else:
                model[other] = Known(start_of_now, "child", parent, pid=other)
        elif what == "rename":
            life.rename(pid, other)
            if pid in model and model[pid].alive:
                model[pid].command = other.decode("utf-8", "replace")
        else:
            one = of(pid)
            life.exit(pid)
            expected.append(one.lineage())
            one.alive = False
        life.drain()
    told = [lineage(one.event) for one in life.events(life.all)]
    finish = (now() + lib.rs_boot_offset(life.engine.handle)) // TICK
    if finish <= start_of_now + 1:  # else a start is not that of the tick before
        assert told == expected
    life.close()


def test_the_whole_of_memory_is_given_back() -> None:
    """The sanitizer's leak check sees to that; here, deep and wide trees, and pids that come again."""
    life = Life(pages=512)
    for pid in range(2, 2000):
        life.fork(pid - 1 if pid % 3 else 1, pid)
        if pid % 2:
            life.exit(pid)
    life.drain()
    life.events(life.all)
    assert lib.rs_process_pids(life.engine.handle, ffi.NULL, 0) == 1999
    room = ffi.new("int32_t[]", 5)
    assert lib.rs_process_pids(life.engine.handle, room, 5) == 1999
    assert len(set(room)) == 5
    assert sys.getrefcount(room) < 10
    life.close()
