"""The whole sensor on a fake kernel: CPUs, cgroups, what can not be, the end."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ringside.api.v0 import (
    ContainerFilter,
    EventFilter,
    Subscription,
    SyscallEventFilter,
    TickerEventFilter,
)
from ringside.sensor._perf import lib
from ringside.sensor.engine import clock
from ringside.sensor.errors import KernelError, SetupError
from ringside.sensor.sensor import Sensor

from .support.fakekernel import FakeKernel, Reader, loss, reading
from .support.whole import ALL, ENTER, FORK, SYS_ENTER, kernel, make, until

# --- CPUs that come and go


async def test_cpus_are_followed(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)], process_events=ALL) as reader,
    ):
        kernel.cpus.append(7)
        sensor._cpus_changed()
        kernel.enter(1, cpu=7)
        kernel.fork(50, 60, cpu=7)
        kernel.exec(60, b"/bin/true", b"true", cpu=7)
        assert [one.cpu for one in await reader.take(3)] == [7, 7, 7]
        kernel.enter(2, cpu=1)
        kernel.cpus.remove(1)
        sensor._cpus_changed()
        kernel.enter(3, cpu=1)
        kernel.enter(4, cpu=0)
        assert [one.syscall.id for one in await reader.take(2)] == [2, 4]
        await until(lambda: not any(kernel.is_open(fd) for fd, one in kernel.perfs.items() if one.cpu == 1))
        kernel.cpus.append(1)
        sensor._cpus_changed()
        kernel.enter(5, cpu=1)
        assert [one.syscall.id for one in await reader.take(1)] == [5]
        assert len(kernel.open_perfs(SYS_ENTER)) == 3


# --- events limited to containers in the kernel


def only(*ids: str) -> Subscription:
    """The system calls in these containers."""
    return Subscription(
        event_filter=EventFilter(syscall_events=[SyscallEventFilter(type=ENTER)]),
        container_filter=ContainerFilter(ids=list(ids)),
    )


def places(kernel: FakeKernel) -> list[tuple[int, str]]:
    """On which CPUs and in which cgroups system calls are looked at; "" is everywhere."""
    return sorted((one.cpu, one.cgroup) for one in kernel.open_perfs(SYS_ENTER))


async def test_limited_events_follow_the_cpus(kernel: FakeKernel) -> None:
    kernel.proc.add(60, 50)
    cgroup = str(kernel.container("a" * 64, 60))
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 12)) as reader:
        await until(lambda: places(kernel) == [(0, cgroup), (1, cgroup)])
        kernel.cpus[:] = [0, 7]
        sensor._cpus_changed()
        await until(lambda: places(kernel) == [(0, cgroup), (7, cgroup)])
        kernel.enter(1, pid=50, cpu=7)
        kernel.enter(2, pid=60, cpu=7)
        assert [one.syscall.id for one in await reader.take(1)] == [2]
        assert sensor.engine.counters()["unwanted"] == 0


async def test_limited_while_all_who_want_the_event_are(kernel: FakeKernel) -> None:
    kernel.proc.add(60, 50)
    kernel.proc.add(70, 50)
    first, second = str(kernel.container("a" * 64, 60)), str(kernel.container("b" * 64, 70))
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 64)) as reader:
        async with reading(sensor, only("a" * 64, "b" * 64)):
            await until(lambda: places(kernel) == [(0, first), (0, second), (1, first), (1, second)])
            async with reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]):
                await until(lambda: places(kernel) == [(0, ""), (1, "")])
            kernel.enter(1, pid=70)
        await until(lambda: places(kernel) == [(0, first), (1, first)])
        async with reading(sensor, only("c" * 64)):
            await until(lambda: places(kernel) == [(0, ""), (1, "")])
        kernel.enter(2, pid=60)
        assert [one.syscall.id for one in await reader.take(1)] == [2]
        assert not reader.statuses


async def test_limited_once_it_can_be_proved_where_the_container_is(kernel: FakeKernel) -> None:
    kernel.proc.add(60, 50)
    cgroup = kernel.container("a" * 64, 60)
    (cgroup / "cgroup.procs").write_text("")
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 64)):
        assert places(kernel) == [(0, ""), (1, "")]
        (cgroup / "cgroup.procs").write_text("60\n")
        await until(lambda: places(kernel) == [(0, str(cgroup)), (1, str(cgroup))])


async def test_limited_by_itself_if_others_make_many_in_vain(
    kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ringside")
    kernel.proc.add(60, 50)
    cgroup = str(kernel.container("a" * 64, 60))
    everywhere, inside = [(0, ""), (1, "")], [(0, cgroup), (1, cgroup)]
    async with kernel.sensor(scope="auto") as sensor:
        family = sensor.container_family
        assert family._gain is not None

        def looks(count: int, pid: int, switches: int = 0) -> None:
            """The sensor looks so many times. Before each, a process makes 200 calls within a millisecond."""
            kernel.switches = switches
            for _ in range(count):
                for _ in range(200):
                    kernel.enter(1, pid=pid)
                sensor.drain_once()
                assert family._gain is not None
                family._gain._looked = clock() - 10**6
                family.weigh()

        async with reading(sensor, only("a" * 64)) as reader:
            looks(5, 60)
            assert places(kernel) == everywhere, "all that is made is wanted"
            looks(5, 50, 1000)
            assert places(kernel) == everywhere, "it would cost more"
            looks(3, 50)
            assert inside == [one for one in places(kernel) if one[1]]
            await until(lambda: places(kernel) == inside)
            kernel.enter(2, pid=50)
            kernel.enter(3, pid=60)
            assert [one.syscall.id for one in await reader.take(1001)] == [1] * 1000 + [3]
            looks(1, 60, 1000)
            await until(lambda: places(kernel) == everywhere)
            said = [one.message for one in caplog.records if "kernel events are made" in one.message]
            assert [line.split(":")[0] for line in said] == [
                "kernel events are made in the cgroups of the containers that are wanted",
                "kernel events are made everywhere",
            ]
            assert not reader.statuses


async def test_limited_no_more_when_the_container_ends(kernel: FakeKernel) -> None:
    kernel.proc.add(60, 50)
    kernel.container("a" * 64, 60)
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 64)) as reader:
        kernel.exit(60)
        await until(lambda: places(kernel) == [(0, ""), (1, "")])
        kernel.proc.add(61, 50, cgroup=f"0::/docker/{'a' * 64}\n")
        when = kernel.fork(50, 61)
        (kernel.folder / "root/sys/fs/cgroup/docker" / ("a" * 64) / "cgroup.procs").write_text("61\n")
        path = f"/docker/{'a' * 64}"
        kernel.happen("cgroup/cgroup_attach_task", {"pid": 61, "dst_path": path.encode()}, pid=50)
        kernel.enter(3, pid=61)
        (told,) = await reader.take(1)
        assert (told.syscall.id, told.container_id) == (3, "a" * 64)
        assert told.sensor_monotime_nanos > when
        await until(lambda: all(place for _, place in places(kernel)))
        assert not reader.statuses


async def test_a_container_that_begins_again_before_its_end_was_read_of(kernel: FakeKernel) -> None:
    """Its events since may be missing, and the stream says so."""
    kernel.proc.add(60, 50)
    kernel.proc.add(61, 50)
    kernel.container("a" * 64, 60)
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 64)) as reader:
        kernel.exit(60)
        path = f"/docker/{'a' * 64}"
        (kernel.proc.root / "61/cgroup").write_text(f"0::{path}\n")
        kernel.happen("cgroup/cgroup_attach_task", {"pid": 61, "dst_path": path.encode()}, pid=50)
        assert "began again" in loss(await reader.status())[1]


async def test_limited_no_more_when_the_container_gets_another_cgroup(kernel: FakeKernel) -> None:
    kernel.proc.add(60, 50)
    kernel.proc.add(61, 50)
    kernel.container("a" * 64, 60)
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 64)) as reader:
        path = f"/elsewhere/{'a' * 64}"
        (kernel.proc.root / "61/cgroup").write_text(f"0::{path}\n")
        kernel.happen("cgroup/cgroup_attach_task", {"pid": 61, "dst_path": path.encode()}, pid=50)
        assert "another cgroup" in loss(await reader.status())[1]
        await until(lambda: places(kernel) == [(0, ""), (1, "")])


async def test_limited_no_more_after_lost_process_records(kernel: FakeKernel) -> None:
    kernel.proc.add(60, 50)
    kernel.container("a" * 64, 60)
    async with kernel.sensor(scope="cgroup") as sensor, reading(sensor, only("a" * 64)) as reader:
        kernel.lose("task/task_newtask", 1)
        await reader.status()
        await until(lambda: places(kernel) == [(0, ""), (1, "")])
        await until(lambda: all(place for _, place in places(kernel)))  # and again, since all is well


# --- what can't be


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errno.EACCES, "not permitted; run as root"),
        (errno.EPERM, "not permitted; run as root"),
        (errno.ENOSYS, "no perf events"),
        (errno.EMFILE, "too few file descriptors"),
    ],
)
@pytest.mark.parametrize("after", [0, 3, 9])
async def test_perf_events_that_are_refused(kernel: FakeKernel, error: int, words: str, after: int) -> None:
    left = [after]
    real = FakeKernel.rs_perf_open

    def refusing(self: FakeKernel, asked: Any, cpu: int, cgroup: int) -> int:
        left[0] -= 1
        return real(self, asked, cpu, cgroup) if left[0] >= 0 else -error

    with mock.patch.object(FakeKernel, "rs_perf_open", refusing), pytest.raises(SetupError, match=words):
        async with kernel.sensor():
            pass
    assert not any(kernel.is_open(fd) for fd in kernel.perfs)


async def test_rings_that_there_is_no_memory_for(kernel: FakeKernel) -> None:
    with (
        mock.patch.object(FakeKernel, "rs_ring_open", return_value=-errno.EPERM),
        pytest.raises(SetupError, match="no memory may be locked for a ring of 256 KiB"),
    ):
        async with kernel.sensor():
            pass
    assert not any(kernel.is_open(fd) for fd in kernel.perfs)


async def test_rings_that_there_is_less_memory_for(
    kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    """They are halved, on all CPUs, until they fit; what was opened in vain is closed."""
    opened: list[tuple[int, int]] = []
    original = FakeKernel.rs_ring_open

    def open_ring(self: FakeKernel, engine: Any, fd: int, cpu: int, pages: int) -> int:
        if pages > (64 if cpu else 128):
            return -errno.EPERM
        opened.append((cpu, pages))
        return original(self, engine, fd, cpu, pages)

    with mock.patch.object(FakeKernel, "rs_ring_open", open_ring):
        async with (
            kernel.sensor(ring_size=8 << 20, lifecycle_ring_size=256 << 10) as sensor,
            reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader,
        ):
            kernel.enter(3)
            assert (await reader.take(1))[0].syscall.id == 3
    assert opened == [(0, 64), (1, 64), (0, 128), (0, 64), (1, 64)]
    assert "bulk rings of 256 KiB instead of 8192" in caplog.text
    assert not any(kernel.is_open(fd) for fd in kernel.perfs)


async def test_rings_leave_memory_for_those_of_the_other_lanes(kernel: FakeKernel) -> None:
    """Of 3 MiB, lifecycle records' take not what they can get, so that system calls' have some."""
    taken: dict[int, int] = {}
    open_ring, close_ring = FakeKernel.rs_ring_open, lib.rs_ring_close

    def opens(self: FakeKernel, engine: Any, fd: int, cpu: int, pages: int) -> int:
        if sum(taken.values()) + pages * 4096 > 3 << 20:
            return -errno.EPERM
        ring = open_ring(self, engine, fd, cpu, pages)
        taken[ring] = pages * 4096
        return ring

    def closes(_: FakeKernel, engine: Any, ring: int) -> None:
        taken.pop(ring, None)
        close_ring(engine, ring)

    with (
        mock.patch.object(FakeKernel, "rs_ring_open", opens),
        mock.patch.object(FakeKernel, "rs_ring_close", closes, create=True),
    ):
        async with (
            kernel.sensor(ring_size=8 << 20, lifecycle_ring_size=8 << 20) as sensor,
            reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader,
        ):
            assert sorted(taken.values()) == [512 << 10] * 4
            kernel.enter(3)
            assert (await reader.take(1))[0].syscall.id == 3


async def test_an_error_while_a_kernel_event_is_opened_leaves_nothing_behind(kernel: FakeKernel) -> None:
    async with kernel.sensor() as sensor:
        before = {fd for fd in kernel.perfs if kernel.is_open(fd)}
        with (
            mock.patch.object(FakeKernel, "rs_perf_enable", return_value=-errno.EIO),
            pytest.raises(KernelError, match="enable sys_enter"),
        ):
            async with reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]):
                pass
        await until(lambda: {fd for fd in kernel.perfs if kernel.is_open(fd)} == before)
        async with reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader:
            kernel.enter(3)
            assert (await reader.take(1))[0].syscall.id == 3


async def test_many_cpus_get_smaller_rings(kernel: FakeKernel) -> None:
    kernel.cpus = list(range(64))
    async with kernel.sensor(ring_size=8 << 20, lifecycle_ring_size=1 << 20, ring_total=64 << 20) as sensor:
        async with reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]) as reader:
            kernel.enter(1, cpu=63)
            await reader.take(1)
        assert sum(ring.size for ring in kernel.rings.values()) <= 64 << 20


async def test_the_figures_add_up(kernel: FakeKernel) -> None:
    async with (
        kernel.sensor() as sensor,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER, id=1)]) as reader,
        reading(sensor, syscall_events=[SyscallEventFilter(type=ENTER)]),
        reading(sensor, ticker_events=[TickerEventFilter(interval=10**15)]),
    ):
        await until(lambda: len(kernel.open_perfs(SYS_ENTER)) == 2)  # the one that was replaced has ended
        for number in (1, 1, 2):
            kernel.enter(number)
        await reader.take(2)
        figures = sensor.metrics.figures()
        assert (figures["engine_records"], figures["engine_events"], figures["engine_delivered"]) == (3, 3, 5)
        assert (figures["subscribers"], figures["subscribers_ever"], figures["outputs"]) == (3, 3, 3)
        assert figures["cpus"] == 2
        assert figures["processes"] == 2


async def test_a_sensor_that_closes_ends_its_streams(kernel: FakeKernel) -> None:
    with kernel.installed():
        sensor = await Sensor(kernel.config()).__aenter__()
        async with sensor.subscribe(
            Subscription(event_filter=EventFilter(process_events=[FORK]))
        ) as subscriber:
            reader = Reader(subscriber)
            kernel.fork(50, 60)
            await reader.take(1)
            await sensor.close()
            assert await reader.rest() == []
            assert "shutting down" in str(reader.ended)
        await sensor.close()
        assert not any(kernel.is_open(fd) for fd in kernel.perfs)
