"""Events as a subscriber gets them, while a real engine runs real containers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ringside.api.descriptors import message_class
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
from ringside.sensor.config import Config
from ringside.sensor.container import ContainerState
from ringside.sensor.sensor import Sensor

from .engine import IMAGE, Dockerd, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

Response = message_class("capsule8.api.v0.GetEventsResponse")
CREATED, RUNNING, EXITED, DESTROYED = (kind for kind in ContainerEventType if kind)
LIFE = [CREATED, RUNNING, EXITED, DESTROYED]
FORK, EXEC, EXIT = (kind for kind in ProcessEventType if kind)
GETPPID, NANOSLEEP, CLOCK_NANOSLEEP = (110, 35, 230) if os.uname().machine == "x86_64" else (173, 101, 115)
ALL_PROCESS = [ProcessEventFilter(type=kind) for kind in (FORK, EXEC, EXIT)]


def all_container(view: ContainerEventView = ContainerEventView.BASIC) -> list[ContainerEventFilter]:
    return [ContainerEventFilter(type=kind, view=view) for kind in LIFE]


def syscalls(*numbers: int) -> list[SyscallEventFilter]:
    return [SyscallEventFilter(type=SyscallEventType.ENTER, id=number) for number in numbers]


def subscription(
    containers: ContainerFilter | None = None,
    numbers: tuple[int, ...] = (),
    view: ContainerEventView = ContainerEventView.BASIC,
) -> Subscription:
    """Process and container events, and these system calls."""
    return Subscription(
        event_filter=EventFilter(
            process_events=ALL_PROCESS,
            container_events=all_container(view),
            syscall_events=syscalls(*numbers),
        ),
        container_filter=containers,
    )


class Stream:
    """What one subscriber got."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.statuses: list[Any] = []
        self._news = asyncio.Event()

    async def read(self, subscriber: Any) -> None:
        async for message in subscriber:
            response = Response.FromString(message)
            self.events.extend(one.event for one in response.events)
            self.statuses.extend(response.statuses)
            self._news.set()

    async def until(self, done: Callable[[], bool], what: str, within: float = 60) -> None:
        try:
            async with asyncio.timeout(within):
                while not done():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            tail = "\n".join(describe(event) for event in self.events[-40:])
            pytest.fail(f"never came: {what}; the last that did:\n{tail}")

    def of(self, container_id: str, family: str = "") -> list[Any]:
        found = [event for event in self.events if event.container_id == container_id]
        return [event for event in found if not family or event.WhichOneof("event") == family]

    def life(self, container_id: str) -> list[int]:
        return [event.container.type for event in self.of(container_id, "container")]

    async def until_life(self, container_id: str, kinds: list[ContainerEventType]) -> list[Any]:
        await self.until(lambda: len(self.life(container_id)) >= len(kinds), f"{container_id[:12]}: {kinds}")
        assert self.life(container_id) == kinds
        return self.of(container_id, "container")

    def executed(self, container_id: str) -> list[str]:
        found = [one.process for one in self.of(container_id, "process")]
        return [" ".join(one.exec_command_line) for one in found if one.type == EXEC]

    def losses(self) -> list[str]:
        return [status.message for status in self.statuses if status.code == 15]


def describe(event: Any) -> str:
    kind = event.WhichOneof("event")
    inner = getattr(event, kind)
    where = f"{event.container_id[:12]} {event.container_name} pid {event.process_pid}"
    return f"{where} {kind} {inner!s:.200}".replace("\n", " ")


@asynccontextmanager
async def subscribed(sensor: Sensor, wanted: Subscription) -> AsyncIterator[Stream]:
    stream = Stream()
    async with sensor.subscribe(wanted) as subscriber:
        task = asyncio.create_task(stream.read(subscriber))
        try:
            await stream.until(lambda: bool(stream.statuses), "that the subscription is live")
            assert [status.code for status in stream.statuses] == [0], stream.statuses
            yield stream
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def root_with(folder: Path, places: Mapping[str, Path]) -> Path:
    """A root directory, with links to where these places really are."""
    for place, target in {**places, "sys": Path("/sys")}.items():
        link = folder / place
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target)
    return folder


def host_root(engine: Dockerd, folder: Path) -> Path:
    """A root directory as a host with this engine has it."""
    places = {
        "run/docker.sock": engine.socket,
        "run/docker": engine.exec_root,
        "var/lib/docker": engine.folder / "data",
    }
    return root_with(folder, places)


async def until(done: Callable[[], bool]) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(60):
        while not done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def connected(sensor: Sensor, create: Callable[[], str], remove: Callable[[str], None]) -> None:
    """Wait until the sensor has the engine's word: a container of which only that knows is in the table."""
    marker = await asyncio.to_thread(create)
    table = sensor.container_family.table

    def is_created() -> bool:
        found = table.get(marker)
        return found is not None and found.state is ContainerState.CREATED

    await until(is_created)
    await asyncio.to_thread(remove, marker)
    await until(lambda: marker not in table)


@asynccontextmanager
async def sensing(engine: Dockerd, folder: Path, **settings: Any) -> AsyncIterator[Sensor]:
    config = Config(host_root=str(host_root(engine, folder)), **settings)
    async with Sensor(config) as sensor:
        await connected(sensor, lambda: engine.create("true"), engine.remove)
        yield sensor


def assert_named(events: list[Any], name: str, image_id: str, image: str = IMAGE) -> None:
    """Every event says which container it is of, by id, name and image."""
    for event in events:
        told = (event.container_name, event.image_name, event.image_id)
        assert told == (f"/{name}", image, image_id), describe(event)


async def test_a_whole_life_event_by_event(dockerd: Dockerd, tmp_path: Path) -> None:
    async with sensing(dockerd, tmp_path) as sensor:
        wanted = subscription(numbers=(GETPPID,))
        async with subscribed(sensor, wanted) as stream:
            one = await asyncio.to_thread(dockerd.create, "sh", "-c", "/bin/ls /; exit 7", name="life")
            await stream.until_life(one, [CREATED])
            await asyncio.to_thread(dockerd.act, one, "start")
            _, running, exited = await stream.until_life(one, LIFE[:3])
            await asyncio.to_thread(dockerd.remove, one)
            steps = await stream.until_life(one, LIFE)
        assert stream.losses() == []
        image_id = dockerd.image_id()
        assert_named(stream.of(one), "life", image_id)
        for step in steps:
            told = (step.container.name, step.container.image_id, step.container.image_name)
            assert told == ("/life", image_id, IMAGE)
            assert not step.container.docker_config_json
            assert not step.container.oci_config_json
        pid = running.container.host_pid
        assert steps[0].container.host_pid == 0
        assert pid == exited.container.host_pid > 0
        ended = exited.container
        assert (ended.exit_code, ended.exit_status, ended.exit_signal, ended.exit_core_dumped) == (
            7,
            7,
            0,
            False,
        )
        assert [step.container.exit_code for step in steps if step is not exited] == [0, 0, 0]

        commands = stream.executed(one)
        assert commands[-2:] == ["sh -c /bin/ls /; exit 7", "/bin/ls /"], commands
        first = [event for event in stream.of(one, "process") if event.process_pid == pid]
        assert [event.process.type for event in first][-3:] == [EXEC, FORK, EXIT]
        assert (first[-1].process.exit_code, first[-1].process.exit_status) == (7 << 8, 7)
        child = first[-2].process.fork_child_pid
        kinds = [event.process.type for event in stream.of(one, "process") if event.process_pid == child]
        assert kinds == [EXEC, EXIT]
        assert all(event.process_lineage for event in stream.of(one, "process"))
        numbers = [event.sensor_sequence_number for event in stream.events]
        assert numbers == sorted(set(numbers))


async def test_system_calls_say_where_they_were_made(dockerd: Dockerd, tmp_path: Path) -> None:
    async with sensing(dockerd, tmp_path) as sensor:
        async with subscribed(sensor, subscription(numbers=(GETPPID, NANOSLEEP, CLOCK_NANOSLEEP))) as stream:
            # busybox's shell asks for its parent as it starts
            one = await asyncio.to_thread(dockerd.run, "sh", "-c", "/bin/sleep 0.01; exit 0", name="calls")
            await asyncio.to_thread(dockerd.wait, one)
            await asyncio.to_thread(dockerd.remove, one)
            await stream.until_life(one, LIFE)
        calls = stream.of(one, "syscall")
        assert {GETPPID} < {event.syscall.id for event in calls}
        assert_named(calls, "calls", dockerd.image_id())
        inside = {event.process_pid for event in stream.of(one, "process")}
        assert {event.process_pid for event in calls} <= inside
        outside = [event for event in stream.events if event.process_pid in inside and not event.container_id]
        ran = {event.process_pid for event in calls if event.syscall.id == GETPPID}
        assert not [
            event for event in outside if event.process_pid in ran and event.WhichOneof("event") != "syscall"
        ]


async def test_fifty_started_at_once(dockerd: Dockerd, tmp_path: Path) -> None:
    async with sensing(dockerd, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        names = [f"fifty-{number}" for number in range(50)]
        ids = await asyncio.gather(
            *(asyncio.to_thread(dockerd.run, "sleep", "1000", name=name) for name in names)
        )
        for one in ids:
            await stream.until_life(one, LIFE[:2])
        await asyncio.gather(*(asyncio.to_thread(dockerd.act, one, "kill") for one in ids))
        for one in ids:
            *_, exited = await stream.until_life(one, LIFE[:3])
            assert (exited.container.exit_code, exited.container.exit_signal) == (137, signal.SIGKILL)
        await asyncio.gather(*(asyncio.to_thread(dockerd.remove, one) for one in ids))
        for name, one in zip(names, ids, strict=True):
            _, running, _, _ = await stream.until_life(one, LIFE)
            assert_named(stream.of(one), name, dockerd.image_id())
            assert stream.executed(one)[-1] == "sleep 1000"
            assert running.container.host_pid in {event.process_pid for event in stream.of(one, "process")}
        assert stream.losses() == []


async def test_a_storm_of_short_lived_ones(dockerd: Dockerd, tmp_path: Path) -> None:
    """200 that run `true` and remove themselves, eight at a time: each attributed and named."""
    many = 200
    async with sensing(dockerd, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        gate = asyncio.Semaphore(8)

        async def one_of_them(number: int) -> str:
            async with gate:
                return await asyncio.to_thread(dockerd.run, "true", name=f"storm-{number}", auto_remove=True)

        ids = await asyncio.gather(*(one_of_them(number) for number in range(many)))
        for number, one in enumerate(ids):
            *_, exited, _ = await stream.until_life(one, LIFE)
            assert_named(stream.of(one), f"storm-{number}", dockerd.image_id())
            assert stream.executed(one)[-1] == "true"
            assert exited.container.exit_code == 0
            kinds = Counter(event.process.type for event in stream.of(one, "process"))
            assert kinds[EXIT] >= 1
        assert stream.losses() == []


async def test_exec_and_kill(dockerd: Dockerd, tmp_path: Path) -> None:
    async with sensing(dockerd, tmp_path) as sensor:
        async with subscribed(sensor, subscription()) as stream:
            before = await asyncio.to_thread(dockerd.run, "sleep", "1000", name="entered")
            text = await asyncio.to_thread(dockerd.execute, before, "sh", "-c", "echo entered; exit 3")
            assert text.strip() == "entered"
            await stream.until(
                lambda: any("echo entered" in one for one in stream.executed(before)), "the exec"
            )
            (shell,) = {
                event.process_pid
                for event in stream.of(before, "process")
                if any("echo entered" in argument for argument in event.process.exec_command_line)
            }
            await stream.until(
                lambda: any(
                    event.process_pid == shell and event.process.exit_status == 3
                    for event in stream.of(before, "process")
                ),
                "its end",
            )
            await asyncio.to_thread(dockerd.act, before, "kill")
            *_, exited = await stream.until_life(before, LIFE[:3])
            ended = exited.container
            assert (ended.exit_code, ended.exit_status, ended.exit_signal) == (137, 0, signal.SIGKILL)
            await asyncio.to_thread(dockerd.remove, before)
            await stream.until_life(before, LIFE)
        assert_named(stream.of(before), "entered", dockerd.image_id())


async def test_out_of_memory(dockerd: Dockerd, tmp_path: Path) -> None:
    """The kernel kills a child of the container's first process, and then that."""
    room = 24 << 20
    greedy = "/bin/busybox dd if=/dev/zero of=/dev/null bs=256M count=1"
    script = f"{greedy}; /bin/ls /; exec {greedy}"
    async with sensing(dockerd, tmp_path) as sensor:
        async with subscribed(sensor, subscription()) as stream:
            one = await asyncio.to_thread(
                dockerd.run, "sh", "-c", script, name="greedy", Memory=room, MemorySwap=room
            )
            *_, exited = await stream.until_life(one, LIFE[:3])
            ended = exited.container
            assert (ended.exit_code, ended.exit_status, ended.exit_signal) == (137, 0, signal.SIGKILL)
            assert (await asyncio.to_thread(dockerd.inspect, one))["State"]["OOMKilled"]
            # before them, what brings a container about
            assert stream.executed(one)[-4:] == [f"sh -c {script}", greedy, "/bin/ls /", greedy]
            ends = [event.process for event in stream.of(one, "process") if event.process.type == EXIT]
            assert [(end.exit_signal, end.exit_status) for end in ends][-3:] == [(9, 0), (0, 0), (9, 0)]
            await asyncio.to_thread(dockerd.remove, one)
            await stream.until_life(one, LIFE)
        assert_named(stream.of(one), "greedy", dockerd.image_id())


async def test_containers_from_before_the_sensor(dockerd: Dockerd, tmp_path: Path) -> None:
    old = await asyncio.to_thread(dockerd.run, "sh", "-c", "while /bin/sleep 0.05; do :; done", name="old")
    async with sensing(dockerd, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        await stream.until(lambda: "/bin/sleep 0.05" in stream.executed(old), "what it runs")
        assert stream.life(old) == []
        await asyncio.to_thread(dockerd.remove, old)
        *_, exited, _ = await stream.until_life(old, [EXITED, DESTROYED])
        assert exited.container.exit_code == 137
        assert_named(stream.of(old), "old", dockerd.image_id())


async def test_documents_go_to_those_only_who_ask(dockerd: Dockerd, tmp_path: Path) -> None:
    async with sensing(dockerd, tmp_path) as sensor, AsyncExitStack() as stack:
        basic = await stack.enter_async_context(subscribed(sensor, subscription()))
        full = await stack.enter_async_context(subscribed(sensor, subscription(view=ContainerEventView.FULL)))
        one = await asyncio.to_thread(dockerd.run, "sleep", "1000", name="papers")
        await full.until_life(one, LIFE[:2])
        await asyncio.to_thread(dockerd.remove, one)
        _, running, _, _ = await full.until_life(one, LIFE)
        await basic.until_life(one, LIFE)
        assert json.loads(running.container.docker_config_json)["Id"] == one
        assert json.loads(running.container.oci_config_json)["process"]["args"] == ["sleep", "1000"]
        for event in basic.events:
            assert "docker_config_json" not in str(event)
            assert "oci_config_json" not in str(event)


async def test_a_process_moved_between_cgroups(dockerd: Dockerd, tmp_path: Path) -> None:
    """Into a container and out again, as the kernel's word has it."""
    async with sensing(dockerd, tmp_path) as sensor:
        one = await asyncio.to_thread(dockerd.run, "sleep", "1000", name="moves")
        pid = dockerd.inspect(one)["State"]["Pid"]
        cgroups = [
            line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if one in line
        ]
        places = []
        for _, controllers, path in cgroups:
            mount = Path("/sys/fs/cgroup", controllers.removeprefix("name=") or "unified")
            places.append((mount if mount.is_dir() else Path("/sys/fs/cgroup")) / path.lstrip("/"))
        async with subscribed(sensor, subscription()) as stream:
            process = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE)
            try:
                for place in places:
                    (place / "cgroup.procs").write_text(str(process.pid))
                members = sensor.container_family._numbers

                def container_of() -> str:
                    member = members.get(sensor.processes.get(process.pid).container)
                    return member.id if member else ""

                await until(lambda: container_of() == one)
                for place in places:
                    (place.parent / "cgroup.procs").write_text(str(process.pid))
                await until(lambda: not container_of())
                for place in places:
                    (place / "cgroup.procs").write_text(str(process.pid))
            finally:
                assert process.stdin is not None
                process.stdin.close()
                await process.wait()
            await stream.until(
                lambda: any(
                    event.process_pid == process.pid and event.process.type == EXIT for event in stream.events
                ),
                "its end",
            )
            last = [event for event in stream.events if event.process_pid == process.pid][-1]
            assert last.container_id == one
            assert_named([last], "moves", dockerd.image_id())
        await asyncio.to_thread(dockerd.remove, one)


@pytest.mark.parametrize("own_dockerd", [True], indirect=True)
async def test_the_engine_restarts_mid_stream(own_dockerd: Dockerd, tmp_path: Path) -> None:
    engine = own_dockerd
    async with sensing(engine, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        loop = "while /bin/sleep 0.05; do :; done"
        lives = await asyncio.to_thread(engine.run, "sh", "-c", loop, name="lives")
        dies = await asyncio.to_thread(engine.run, "sleep", "1000", name="dies")
        await stream.until_life(lives, LIFE[:2])
        *_, running = await stream.until_life(dies, LIFE[:2])
        image_id = engine.image_id()
        await asyncio.to_thread(engine.stop)
        os.kill(running.container.host_pid, signal.SIGKILL)
        heard = len(stream.of(lives))
        await stream.until(lambda: len(stream.of(lives)) > heard + 5, "events of what lives on")
        await asyncio.to_thread(engine.start)
        *_, exited = await stream.until_life(dies, LIFE[:3])
        assert (exited.container.exit_code, exited.container.exit_signal) == (137, signal.SIGKILL)
        new = await asyncio.to_thread(engine.run, "true", name="new")
        await stream.until_life(new, LIFE[:3])
        assert stream.life(lives) == LIFE[:2]
        for one, name in ((lives, "lives"), (dies, "dies"), (new, "new")):
            await asyncio.to_thread(engine.remove, one)
            await stream.until_life(one, LIFE)
            assert_named(stream.of(one), name, image_id)
        assert stream.losses() == []


async def test_every_kind_of_filter(dockerd: Dockerd, tmp_path: Path) -> None:
    """Each on process, system call and container events, for a container that was there and one to come."""
    image_id = dockerd.image_id()
    script = "while /bin/sleep 0.05; do /bin/sh -c :; done"
    old = await asyncio.to_thread(dockerd.run, "sh", "-c", script, name="web-old")
    new = await asyncio.to_thread(dockerd.create, "sh", "-c", script, name="web-new")
    job = await asyncio.to_thread(dockerd.create, "sh", "-c", script, name="job")
    everyone = {old, new, job}
    cases = [
        (ContainerFilter(), everyone),
        (ContainerFilter(ids=[new]), {new}),
        (ContainerFilter(ids=[old[:12]]), {old}),
        (ContainerFilter(ids=["f" * 64]), set()),
        (ContainerFilter(names=["web-new"]), {new}),
        (ContainerFilter(names=["/job"]), {job}),
        (ContainerFilter(names=["/web-*"]), {old, new}),
        (ContainerFilter(image_ids=[image_id]), everyone),
        (ContainerFilter(image_ids=[f"sha256:{image_id}"]), everyone),
        (ContainerFilter(image_ids=["f" * 64]), set()),
        (ContainerFilter(image_names=[IMAGE]), everyone),
        (ContainerFilter(image_names=["ringside/*"]), everyone),
        (ContainerFilter(image_names=["*:2.*"]), set()),
        (ContainerFilter(ids=[old], names=["job"]), {old, job}),
        (ContainerFilter(names=["later"]), {"later"}),
    ]
    async with sensing(dockerd, tmp_path) as sensor, AsyncExitStack() as stack:
        everything = await stack.enter_async_context(subscribed(sensor, subscription(None, (GETPPID,))))
        streams = [
            await stack.enter_async_context(subscribed(sensor, subscription(wanted, (GETPPID,))))
            for wanted, _ in cases
        ]
        for one in (new, job):
            await asyncio.to_thread(dockerd.act, one, "start")
        later = await asyncio.to_thread(dockerd.run, "sh", "-c", script, name="later")
        everyone = {old, new, job, later}
        expected = [{later if one == "later" else one for one in ids} for _, ids in cases]
        for ids in expected:
            if {old, new, job} <= ids:  # by image
                ids.add(later)
        for one in everyone:
            await everything.until(
                lambda one=one: (
                    "/bin/sh -c :" in everything.executed(one) and bool(everything.of(one, "syscall"))
                ),  # type: ignore[misc]
                "work in it",
            )
        for one in everyone:
            await asyncio.to_thread(dockerd.remove, one)
            await everything.until(lambda one=one: DESTROYED in everything.life(one), "its end")  # type: ignore[misc]
        for (wanted, _), ids, stream in zip(cases, expected, streams, strict=True):
            if wanted == ContainerFilter():
                continue
            for one in ids:
                await stream.until(lambda s=stream, one=one: DESTROYED in s.life(one), f"{wanted}")  # type: ignore[misc]
                assert stream.life(one) == everything.life(one), wanted
                for family in ("process", "syscall", "container"):
                    got = [event.id for event in stream.of(one, family)]
                    whole = [event.id for event in everything.of(one, family)]
                    assert got, (wanted, family)
                    # what was there already began before this stream did
                    assert got == (whole[-len(got) :] if one == old else whole), (wanted, family)
            assert {event.container_id for event in stream.events} == ids, wanted
        assert any(not event.container_id for event in everything.events), (
            "what the host does passes no filter"
        )


@contextmanager
def bad_engine(path: Path, answer: bytes | None) -> Iterator[None]:
    """A socket that takes every connection and says nothing, or garbage."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    taken: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            taken.append(one)
            if answer is not None:
                with suppress(OSError):
                    one.sendall(answer)
                one.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for one in taken:
            one.close()


@pytest.mark.parametrize("answer", [None, b"\x00garbage\xff" * 1000], ids=["hangs", "garbage"])
async def test_a_bad_engine_leaves_the_rest_alone(
    dockerd: Dockerd, tmp_path: Path, answer: bytes | None
) -> None:
    """Names come from the disk, and the kernel tells of the container's life."""
    path = tmp_path / "bad.sock"
    root = tmp_path / "root"
    root.mkdir()
    with bad_engine(path, answer):
        config = Config(host_root=str(host_root(dockerd, root)), engine=str(path))
        async with Sensor(config) as sensor, subscribed(sensor, subscription()) as stream:
            one = await asyncio.to_thread(
                dockerd.run, "sh", "-c", "/bin/ls /; exit 0", name=f"bad-{answer is None}"
            )
            await asyncio.to_thread(dockerd.wait, one)
            await stream.until(lambda: "/bin/ls /" in stream.executed(one), "what it ran")
            await asyncio.to_thread(dockerd.remove, one)
            await stream.until_life(one, LIFE)
            assert_named(stream.of(one, "container"), f"bad-{answer is None}", dockerd.image_id())
            host = await asyncio.create_subprocess_exec("true")
            await host.wait()
            await stream.until(
                lambda: any(
                    event.process_pid == host.pid and event.process.type == EXIT for event in stream.events
                ),
                "a process of the host",
            )
            assert stream.losses() == []


async def test_a_stopped_container_without_an_engine(dockerd: Dockerd, tmp_path: Path) -> None:
    """The disk tells its name, and that it is gone."""
    config = Config(host_root=str(host_root(dockerd, tmp_path)), engine="none")
    async with Sensor(config) as sensor, subscribed(sensor, subscription()) as stream:
        one = await asyncio.to_thread(dockerd.run, "sh", "-c", "exit 5", name="stopped")
        *_, exited = await stream.until_life(one, LIFE[:3])
        assert exited.container.exit_code == 5
        await asyncio.to_thread(dockerd.wait, one)
        wait_until(lambda: stream.life(one) == LIFE[:3], "no DESTROYED while it is kept")
        await asyncio.to_thread(dockerd.remove, one)
        await stream.until_life(one, LIFE)
        assert_named(stream.of(one, "container"), "stopped", dockerd.image_id())
