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


# --- how much


def step(when: int, *documents: str) -> Step:
    packed = [Document.of(text) for text in (*documents, "", "")]
    container = Container(A, docker_config=packed[0], oci_config=packed[1])
    return Step(when, Transition(ContainerState.RUNNING, container, when), b"")


def test_the_latest_steps_are_remembered() -> None:
    past = Past(64 << 10)
    for when in range(1, 1000):
        past.remember(step(when))
    left = [one.when for one in past.after(0)]
    assert 40 < len(left) <= 64
    assert left == list(range(past.since + 1, 1000))
    assert [one.when for one in past.after(990)] == list(range(990, 1000))


def test_documents_take_their_room() -> None:
    past = Past(64 << 10)
    past.remember(step(1))
    past.remember(step(2, "".join(map(str, range(100_000)))))
    assert past.after(0) == []
    assert past.since == 2


def test_steps_are_told_in_the_order_of_time() -> None:
    past = Past(64 << 10)
    for when in (3, 1, 2):
        past.remember(step(when))
    assert [one.when for one in past.after(2)] == [2, 3]


@pytest.mark.parametrize("room", [0, 1])
def test_no_room(room: int) -> None:
    past = Past(room)
    past.remember(step(7))
    assert past.after(0) == []
    assert past.since == 7
