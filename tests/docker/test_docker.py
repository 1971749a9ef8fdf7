"""The container table fed by a real engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ringside.sensor.cgroup import owner_from_proc_cgroup
from ringside.sensor.container import ContainerState, ContainerTable, Transition
from ringside.sensor.container_filter import ContainerMatcher
from ringside.sensor.docker import DockerLimits, DockerSource
from ringside.sensor.runtimes import Runtimes

from .engine import IMAGE, Dockerd, EngineSaysError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

UNKNOWN, CREATED, RUNNING, EXITED, DESTROYED = ContainerState
LIFE = [CREATED, RUNNING, EXITED, DESTROYED]
PATIENT = DockerLimits()
QUICK = DockerLimits(look=0.05, backoff_least=0.05, backoff_most=0.2, patience=120, ping=1, answer=1)


class Watch:
    """A table that a real engine feeds, and what it told."""

    def __init__(self, engine: Dockerd, limits: DockerLimits) -> None:
        self.engine = engine
        self.table = ContainerTable()
        self.told: list[Transition] = []
        runtimes = Runtimes(more=engine.bundles)
        self.source = DockerSource(self.table, engine.socket, running_facts=runtimes.running, limits=limits)
        self._news = asyncio.Event()
        self.table.on_transition.append(self._note)

    def _note(self, transition: Transition) -> None:
        self.told.append(transition)
        self._news.set()

    def of(self, container_id: str) -> list[Transition]:
        return [step for step in self.told if step.container.id == container_id]

    def kinds(self, container_id: str) -> list[ContainerState]:
        return [step.kind for step in self.of(container_id)]

    async def until(self, done: Callable[[], bool], within: float = 60) -> None:
        async with asyncio.timeout(within):
            while not done():
                self._news.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.02):  # some conditions are not the table's
                        await self._news.wait()

    async def until_kinds(self, container_id: str, kinds: list[ContainerState]) -> list[Transition]:
        with suppress(TimeoutError):
            await self.until(lambda: len(self.kinds(container_id)) >= len(kinds))
        assert self.kinds(container_id) == kinds
        return self.of(container_id)


@asynccontextmanager
async def watching(engine: Dockerd, limits: DockerLimits = PATIENT) -> AsyncIterator[Watch]:
    watch = Watch(engine, limits)
    task = asyncio.create_task(watch.source.run())
    try:
        await watch.until(lambda: watch.source.connected)
        yield watch
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_whole_life_event_by_event(dockerd: Dockerd) -> None:
    async with watching(dockerd) as watch:
        one = await asyncio.to_thread(dockerd.create, "sleep", "1000", name="whole-life")
        (created,) = await watch.until_kinds(one, [CREATED])
        await asyncio.to_thread(dockerd.act, one, "start")
        _, running = await watch.until_kinds(one, [CREATED, RUNNING])
        document = dockerd.inspect(one)
        pid = document["State"]["Pid"]
        owner = owner_from_proc_cgroup(Path(f"/proc/{pid}/cgroup").read_text())
        await asyncio.to_thread(dockerd.act, one, "kill")
        *_, exited = await watch.until_kinds(one, LIFE[:3])
        await asyncio.to_thread(dockerd.remove, one)
        *_, destroyed = await watch.until_kinds(one, LIFE)

    assert owner is not None
    assert owner.id == one
    for step in (created, running, exited, destroyed):
        container = step.container
        assert (container.name, container.image_name) == ("/whole-life", IMAGE)
        assert container.image_id == dockerd.image_id()
        assert not step.synthesized
    assert created.container.host_pid == 0
    assert running.container.host_pid == exited.container.host_pid == pid
    assert running.container.exit is None
    assert exited.container.exit is not None
    assert (exited.container.exit.code, exited.container.exit.signal) == (137, signal.SIGKILL)
    assert json.loads(running.container.docker_config_json)["State"]["Pid"] == pid
    assert json.loads(running.container.oci_config_json)["process"]["args"] == ["sleep", "1000"]
    assert created.time_ns < running.time_ns < exited.time_ns < destroyed.time_ns


@pytest.mark.parametrize("code", [0, 3, 255])
async def test_exit_codes(dockerd: Dockerd, code: int) -> None:
    async with watching(dockerd) as watch:
        one = await asyncio.to_thread(dockerd.run, "sh", "-c", f"exit {code}")
        *_, exited = await watch.until_kinds(one, LIFE[:3])
        assert exited.container.exit is not None
        assert (exited.container.exit.code, exited.container.exit.status) == (code, code)
        await asyncio.to_thread(dockerd.remove, one)
        await watch.until_kinds(one, LIFE)


async def test_fifty_started_at_once(dockerd: Dockerd) -> None:
    async with watching(dockerd) as watch:
        names = [f"fifty-{number}" for number in range(50)]
        ids = await asyncio.gather(
            *(asyncio.to_thread(dockerd.run, "sleep", "1000", name=name) for name in names)
        )
        for name, one in zip(names, ids, strict=True):
            _, running = await watch.until_kinds(one, [CREATED, RUNNING])
            assert running.container.name == f"/{name}"
            assert running.container.host_pid > 0
            owner = owner_from_proc_cgroup(Path(f"/proc/{running.container.host_pid}/cgroup").read_text())
            assert owner is not None
            assert owner.id == one
        await asyncio.gather(*(asyncio.to_thread(dockerd.remove, one) for one in ids))
        for one in ids:
            await watch.until_kinds(one, LIFE)
        assert len(watch.told) == 200
        assert watch.source.counts.failures == 0


async def test_a_storm_of_short_lived_ones(dockerd: Dockerd) -> None:
    """200 that run `true` and remove themselves, eight at a time."""
    async with watching(dockerd) as watch:
        gate = asyncio.Semaphore(8)

        async def one_of_them(number: int) -> str:
            async with gate:
                return await asyncio.to_thread(dockerd.run, "true", name=f"storm-{number}", auto_remove=True)

        ids = await asyncio.gather(*(one_of_them(number) for number in range(200)))
        for number, one in enumerate(ids):
            steps = await watch.until_kinds(one, LIFE)
            assert {step.container.name for step in steps} == {f"/storm-{number}"}
            assert {step.container.image_name for step in steps} == {IMAGE}
            assert steps[2].container.exit is not None
            assert steps[2].container.exit.code == 0
        assert Counter(step.kind for step in watch.told) == dict.fromkeys(LIFE, 200)
        assert watch.source.counts.overflows == 0
        pids = sum(step.container.host_pid > 0 for step in watch.told if step.kind is RUNNING)
        assert pids > 100, "the bundle on disk tells it, unless it is gone before the engine says `start`"
        assert len(watch.table) == 0


async def test_a_program_executed_in_a_container(dockerd: Dockerd) -> None:
    async with watching(dockerd) as watch:
        one = await asyncio.to_thread(dockerd.run, "sleep", "1000")
        await watch.until_kinds(one, [CREATED, RUNNING])
        text = await asyncio.to_thread(dockerd.execute, one, "cat", "/proc/self/cgroup")
        owner = owner_from_proc_cgroup(text)
        assert owner is not None
        assert owner.id == one
        await asyncio.to_thread(dockerd.remove, one)
        await watch.until_kinds(one, LIFE)


async def test_a_restart_and_a_rename(dockerd: Dockerd) -> None:
    async with watching(dockerd) as watch:
        one = await asyncio.to_thread(dockerd.run, "sleep", "1000", name="before")
        await watch.until_kinds(one, [CREATED, RUNNING])
        await asyncio.to_thread(dockerd.act, one, "restart?t=0")
        steps = await watch.until_kinds(one, [CREATED, RUNNING, EXITED, RUNNING])
        pids = [step.container.host_pid for step in steps if step.kind is RUNNING]
        assert pids[0] != pids[1] == dockerd.inspect(one)["State"]["Pid"]
        await asyncio.to_thread(dockerd.act, one, "rename?name=after")
        await asyncio.to_thread(dockerd.act, one, "pause")
        await asyncio.to_thread(dockerd.act, one, "unpause")
        await asyncio.to_thread(dockerd.remove, one)
        *_, exited, destroyed = await watch.until_kinds(
            one, [CREATED, RUNNING, EXITED, RUNNING, EXITED, DESTROYED]
        )
        assert exited.container.name == destroyed.container.name == "/after"


async def test_a_container_that_cannot_start(dockerd: Dockerd) -> None:
    async with watching(dockerd) as watch:
        one = await asyncio.to_thread(dockerd.create, "/not/there")
        await watch.until_kinds(one, [CREATED])
        with pytest.raises(EngineSaysError):
            await asyncio.to_thread(dockerd.act, one, "start")
        await asyncio.to_thread(dockerd.remove, one)
        await watch.until(lambda: DESTROYED in watch.kinds(one))
        assert RUNNING not in watch.kinds(one)


async def test_containers_from_before_the_sensor(dockerd: Dockerd) -> None:
    running = await asyncio.to_thread(dockerd.run, "sleep", "1000", name="old-running")
    ended = await asyncio.to_thread(dockerd.run, "sh", "-c", "exit 4", name="old-ended")
    await asyncio.to_thread(dockerd.wait, ended)
    async with watching(dockerd) as watch:
        pid = dockerd.inspect(running)["State"]["Pid"]
        await watch.until(lambda: bool((one := watch.table.get(running)) and one.host_pid == pid))
        known = watch.table.get(ended)
        assert known is not None
        assert known.exit is not None
        assert (known.state, known.exit.code) == (EXITED, 4)
        assert watch.told == []
        await asyncio.to_thread(dockerd.act, ended, "start")
        await watch.until_kinds(ended, [RUNNING, EXITED])
        for one in (running, ended):
            await asyncio.to_thread(dockerd.remove, one)
        await watch.until_kinds(running, [EXITED, DESTROYED])
        await watch.until_kinds(ended, [RUNNING, EXITED, DESTROYED])


async def test_a_name_is_known_as_soon_as_the_kernel_shows_it(dockerd: Dockerd) -> None:
    async with watching(dockerd) as watch:
        one = await asyncio.to_thread(dockerd.create, "sleep", "1000", name="early")
        named = await watch.table.named(one, within=60)
        while named is None or not named.image_id:  # its event may be on its way
            await asyncio.sleep(0)
            named = await watch.table.named(one, within=60)
        assert (named.name, named.image_name, named.image_id) == ("/early", IMAGE, dockerd.image_id())
        await asyncio.to_thread(dockerd.remove, one)
        await watch.until(lambda: DESTROYED in watch.kinds(one))


@pytest.mark.parametrize("own_dockerd", [True], indirect=True)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_the_engine_restarts_and_containers_live_on(own_dockerd: Dockerd, how: signal.Signals) -> None:
    engine = own_dockerd
    async with watching(engine, QUICK) as watch:
        lives = await asyncio.to_thread(engine.run, "sleep", "1000", name="lives")
        dies = await asyncio.to_thread(engine.run, "sleep", "1000", name="dies")
        for one in (lives, dies):
            await watch.until_kinds(one, [CREATED, RUNNING])
        pid = dies_pid = watch.of(dies)[-1].container.host_pid
        await asyncio.to_thread(engine.stop, how)
        await watch.until(lambda: not watch.source.connected)
        os.kill(pid, signal.SIGKILL)
        await watch.until(lambda: not Path(f"/proc/{dies_pid}").exists())
        await asyncio.to_thread(engine.start)
        await watch.until(lambda: watch.source.connected)
        *_, exited = await watch.until_kinds(dies, [CREATED, RUNNING, EXITED])
        assert exited.container.exit is not None
        assert exited.container.exit.code == 137
        assert watch.kinds(lives) == [CREATED, RUNNING]
        new = await asyncio.to_thread(engine.run, "true", name="new")
        await watch.until_kinds(new, LIFE[:3])
        for one in (lives, dies, new):
            await asyncio.to_thread(engine.remove, one)
            await watch.until_kinds(one, LIFE)


async def test_the_engine_restarts_and_containers_end(own_dockerd: Dockerd) -> None:
    engine = own_dockerd
    async with watching(engine, QUICK) as watch:
        one = await asyncio.to_thread(engine.run, "sleep", "1000", name="ends")
        await watch.until_kinds(one, [CREATED, RUNNING])
        await asyncio.to_thread(engine.stop)
        await asyncio.to_thread(engine.start)
        await watch.until(lambda: watch.source.connected and watch.kinds(one) == LIFE[:3])
        await asyncio.to_thread(engine.act, one, "start")
        await watch.until_kinds(one, [*LIFE[:3], RUNNING])
        await asyncio.to_thread(engine.remove, one)
        await watch.until_kinds(one, [*LIFE[:3], RUNNING, EXITED, DESTROYED])


async def test_an_engine_that_hangs(own_dockerd: Dockerd, caplog: pytest.LogCaptureFixture) -> None:
    engine = own_dockerd
    async with watching(engine, QUICK) as watch:
        assert engine.process is not None
        engine.process.send_signal(signal.SIGSTOP)
        await watch.until(lambda: watch.source.counts.failures > 1)
        engine.process.send_signal(signal.SIGCONT)
        await watch.until(lambda: watch.source.connected)
        one = await asyncio.to_thread(engine.run, "true")
        await watch.until_kinds(one, LIFE[:3])
    assert len(caplog.records) == 1, caplog.text


async def test_every_kind_of_filter(dockerd: Dockerd) -> None:
    async with watching(dockerd) as watch:
        web = await asyncio.to_thread(dockerd.run, "sleep", "1000", name="filter-web")
        job = await asyncio.to_thread(dockerd.run, "sleep", "1000", name="filter-job")
        for one in (web, job):
            await watch.until_kinds(one, [CREATED, RUNNING])
        image_id = dockerd.image_id()
        both = {web, job}
        expected = [
            (ContainerMatcher(ids=[web]), {web}),
            (ContainerMatcher(ids=[web[:12]]), {web}),
            (ContainerMatcher(ids=["f" * 64]), set()),
            (ContainerMatcher(names=["/filter-web"]), {web}),
            (ContainerMatcher(names=["filter-job"]), {job}),
            (ContainerMatcher(names=["filter-*"]), both),
            (ContainerMatcher(image_ids=[image_id]), both),
            (ContainerMatcher(image_ids=[f"sha256:{image_id}"]), both),
            (ContainerMatcher(image_names=["ringside/box"]), both),
            (ContainerMatcher(image_names=[IMAGE]), both),
            (ContainerMatcher(image_names=["ringside/*"]), both),
            (ContainerMatcher(image_names=["box"]), set()),
            (ContainerMatcher(image_names=["*:2.*"]), set()),
            (ContainerMatcher(image_names=[f"sha256:{image_id}"]), both),
            (ContainerMatcher(ids=[web], names=["filter-job"]), both),
        ]
        for number, (matcher, ids) in enumerate(expected):
            matcher.bind(watch.table)
            assert {one.id for one in watch.table if matcher.matches(one)} & both == ids, number
        for one in (web, job):
            await asyncio.to_thread(dockerd.remove, one)
