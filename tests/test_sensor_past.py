"""Subscriptions that look back: what has happened, once, in its order, and then what happens."""

from __future__ import annotations

from typing import Any

import pytest
from ringside.api.v0 import (
    ContainerEventFilter,
    ContainerEventType,
    ContainerEventView,
    ContainerFilter,
    EventFilter,
    ProcessEventFilter,
    ProcessEventType,
    Subscription,
    SyscallEventFilter,
    SyscallEventType,
)
from ringside.sensor.container import Container, ContainerState, Document, Transition
from ringside.sensor.container_past import Past, Step

from .support.fakekernel import FakeKernel, reading
from .support.whole import kernel

EXEC = ProcessEventFilter(type=ProcessEventType.EXEC)
CONTAINERS = [ContainerEventFilter(type=one) for one in list(ContainerEventType)[1:]]
FULL = [ContainerEventFilter(type=one.type, view=ContainerEventView.FULL) for one in CONTAINERS]
MINUTE = 60 * 10**9
A, B = "a" * 64, "b" * 64


def back(*, only: str = "", **filters: Any) -> Subscription:
    """To these filters, from a minute ago on."""
    return Subscription(
        event_filter=EventFilter(**filters),
        container_filter=ContainerFilter(ids=[only]) if only else None,
        since_duration=MINUTE,
    )


def told(events: list[Any]) -> list[str]:
    return [one.process.exec_filename or ContainerEventType(one.container.type).name for one in events]


async def test_what_was_read_and_what_waits_in_the_rings_comes_once(kernel: FakeKernel) -> None:
    async with kernel.sensor() as sensor:
        kernel.exec(50, b"/bin/read", b"read")
        sensor.drain_once()
        kernel.exec(50, b"/bin/waits", b"waits")
        async with reading(sensor, back(process_events=[EXEC])) as reader:
            kernel.exec(50, b"/bin/new", b"new")
            assert told(await reader.take(3)) == ["/bin/read", "/bin/waits", "/bin/new"]
            assert not reader.statuses


async def test_containers_and_processes_in_the_order_of_time(kernel: FakeKernel) -> None:
    async with kernel.sensor() as sensor:
        kernel.exec(50, b"/bin/before", b"before")
        sensor.drain_once()
        start(kernel, 60, A)
        sensor.drain_once()
        kernel.exec(60, b"/bin/inside", b"inside")
        kernel.exit(60)
        sensor.drain_once()
        kernel.exec(50, b"/bin/after", b"after")
        sensor.drain_once()
        async with reading(sensor, back(process_events=[EXEC], container_events=CONTAINERS)) as reader:
            events = await reader.take(6)
            assert told(events) == [
                "/bin/before",
                "CREATED",
                "RUNNING",
                "/bin/inside",
                "EXITED",
                "/bin/after",
            ]
            times = [one.sensor_monotime_nanos for one in events]
            assert times == sorted(times)
            numbers = [one.sensor_sequence_number for one in events]
            assert numbers == sorted(set(numbers))
            assert {one.container_id for one in events[1:5]} == {A}
            start(kernel, 70, B)
            assert told(await reader.take(2)) == ["CREATED", "RUNNING"], "and live ones"
            assert not reader.statuses


async def test_of_certain_containers(kernel: FakeKernel) -> None:
    async with kernel.sensor() as sensor:
        for pid, one in ((60, A), (70, B)):
            start(kernel, pid, one)
            kernel.exec(pid, b"/bin/inside", b"inside")
        sensor.drain_once()
        wanted = back(only=B, process_events=[EXEC], container_events=CONTAINERS)
        async with reading(sensor, wanted) as reader:
            events = await reader.take(3)
            assert told(events) == ["CREATED", "RUNNING", "/bin/inside"]
            assert {one.container_id for one in events} == {B}


async def test_what_is_not_remembered_is_said(kernel: FakeKernel) -> None:
    async with kernel.sensor(history_size=0) as sensor:
        start(kernel, 60, A)
        sensor.drain_once()
        call = SyscallEventFilter(type=SyscallEventType.ENTER, id=1)
        wanted = back(container_events=CONTAINERS, syscall_events=[call])
        async with reading(sensor, wanted) as reader:
            others, older = (await reader.status()).message, (await reader.status()).message
            assert "only process and container events are remembered" in others
            assert "nothing older than" in older
            start(kernel, 70, B)
            assert told(await reader.take(2)) == ["CREATED", "RUNNING"]


def start(kernel: FakeKernel, pid: int, container_id: str) -> None:
    """A process begins and is moved into a container."""
    kernel.proc.add(pid, 50)
    kernel.fork(50, pid)
    path = f"/docker/{container_id}"
    (kernel.proc.root / str(pid) / "cgroup").write_text(f"0::{path}\n")
    kernel.happen("cgroup/cgroup_attach_task", {"pid": pid, "dst_path": path.encode()}, pid=50)


def stop(kernel: FakeKernel, pid: int, container_id: str) -> None:
    """The container's last process ends, and its cgroup goes."""
    kernel.exit(pid)
    kernel.proc.remove(pid)
    kernel.happen("cgroup/cgroup_rmdir", {"path": f"/docker/{container_id}".encode()}, pid=50)


@pytest.mark.parametrize("only", ["", A])
async def test_a_container_that_is_gone_for_long(kernel: FakeKernel, only: str) -> None:
    async with kernel.sensor() as sensor:
        start(kernel, 60, A)
        kernel.exec(60, b"/bin/inside", b"inside")
        stop(kernel, 60, A)
        sensor.drain_once()
        start(kernel, 70, B)
        sensor.drain_once()
        sensor.container_family._end(A)  # what is done 10 s later
        wanted = back(only=only, process_events=[EXEC], container_events=CONTAINERS)
        async with reading(sensor, wanted) as reader:
            events = [one for one in await reader.take(5) if one.container_id == A]
            assert told(events) == ["CREATED", "RUNNING", "/bin/inside", "EXITED", "DESTROYED"]


async def test_its_number_is_free_when_nothing_of_it_is_remembered(kernel: FakeKernel) -> None:
    async with kernel.sensor(history_size=64 << 10) as sensor:
        family = sensor.container_family
        for number in range(40):
            one = f"{number:064x}"
            start(kernel, 60, one)
            stop(kernel, 60, one)
            sensor.drain_once()
            family._end(one)
        assert len(family._members) == 4
        assert max(family._numbers) <= 5


async def test_no_message_of_what_has_happened_is_too_long(kernel: FakeKernel) -> None:
    """gRPC's clients take 4 MiB."""
    async with kernel.sensor() as sensor:
        for number in range(200):
            kernel.exec(50, f"/bin/{number}".encode(), b"x" * 2000)
            if number % 50 == 0:
                start(kernel, 60 + number, f"{number:064x}")
            sensor.drain_once()
        async with reading(sensor, back(process_events=[EXEC], container_events=CONTAINERS)) as reader:
            sizes = []
            while len(reader.events) < 208:
                sizes.append((await reader.message()).ByteSize())
            assert len(sizes) > 4
            assert max(sizes) < 70_000
            names = [one for one in told(reader.events) if one.startswith("/bin")]
            assert names == [f"/bin/{number}" for number in range(200)]


# --- how much


def step(when: int, *documents: str, name: str = A) -> Step:
    first, second = ([Document.of(text) for text in documents] + [None, None])[:2]
    container = Container(name, docker_config=first, oci_config=second)
    return Step(when, Transition(ContainerState.RUNNING, container, when), b"")


def test_the_latest_steps_are_remembered() -> None:
    past = Past(64 << 10)
    gone = [one for when in range(1, 1000) for one in past.remember(step(when, name=str(when // 10)))]
    left = [one.when for one in past.after(0)]
    assert 40 < len(left) <= 64
    assert left == list(range(past.since + 1, 1000))
    assert [one.when for one in past.after(990)] == list(range(990, 1000))
    kept = {str(when // 10) for when in left}
    assert gone == [str(number) for number in range(100) if str(number) not in kept]
    assert all(name in past for name in kept)
    assert not any(name in past for name in gone)


def test_the_documents_of_the_latest_are_kept() -> None:
    """As they are told, however well they pack."""
    past = Past(64 << 10)
    for when in range(1, 11):
        past.remember(step(when, "x" * 10_000, "y" * 5_000))
    steps = past.after(0)
    assert [one.when for one in steps] == list(range(1, 11))
    assert [one.when for one in steps if one.transition.container.docker_config_json] == [7, 8, 9, 10]
    past.remember(step(11, "z" * 70_000))
    assert not any(one.transition.container.docker_config_json for one in past.after(0))


def test_steps_are_told_in_the_order_of_time() -> None:
    past = Past(64 << 10)
    for when in (3, 1, 2):
        past.remember(step(when))
    assert [one.when for one in past.after(2)] == [2, 3]


@pytest.mark.parametrize("room", [0, 1])
def test_no_room(room: int) -> None:
    past = Past(room)
    assert past.remember(step(7, "x")) == [A]
    assert past.after(0) == []
    assert past.since == 7
    assert A not in past
