"""Events as a subscriber gets them, of a real Podman's containers: with its service, and from the disk."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ringside.api.v0 import ContainerEventView
from ringside.sensor.config import Config
from ringside.sensor.sensor import Sensor

from .podman import IMAGE, Podman
from .test_stream import (
    CREATED,
    DESTROYED,
    EXITED,
    LIFE,
    RUNNING,
    connected,
    root_with,
    subscribed,
    subscription,
)
from .test_stream import assert_named as assert_named_so

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

BOTH = pytest.mark.parametrize("service", [True, False], ids=["service", "disk"], indirect=True)


@pytest.fixture
def service(request: pytest.FixtureRequest, podman: Podman) -> Iterator[bool]:
    """Whether Podman's API is served."""
    if request.param:
        podman.start_service()
    yield request.param
    podman.stop_service()


def root_of(engine: Podman, folder: Path) -> Path:
    """A root directory as a host with this Podman has it."""
    places = {
        "run/podman/podman.sock": engine.socket,
        "run/containers/storage": engine.run_root,
        "run/runc": Path("/run/runc"),
        "run/crun": Path("/run/crun"),
        "var/lib/containers/storage": engine.root,
    }
    return root_with(folder, places)


@asynccontextmanager
async def sensing(engine: Podman, folder: Path) -> AsyncIterator[Sensor]:
    """A sensor that has the service's word, if it is served."""
    async with Sensor(Config(host_root=str(root_of(engine, folder)))) as sensor:
        if engine.process is not None:
            await connected(sensor, lambda: engine.create("marker", "true"), engine.remove)
        yield sensor


def assert_named(engine: Podman, events: list[Any], name: str) -> None:
    """Every event says which container it is of, by id, name and image."""
    assert events
    assert_named_so(events, name, engine.image_id(), IMAGE)


@BOTH
async def test_a_whole_life(podman: Podman, service: bool, tmp_path: Path) -> None:
    wanted = subscription(view=ContainerEventView.FULL)
    async with sensing(podman, tmp_path) as sensor, subscribed(sensor, wanted) as stream:
        one = await asyncio.to_thread(podman.create, "life", "sh", "-c", "/bin/ls /; exit 7")
        if service:
            await stream.until_life(one, [CREATED])
        await asyncio.to_thread(podman.podman, "start", one)
        _, running, exited = await stream.until_life(one, LIFE[:3])
        await asyncio.to_thread(podman.remove, one)
        await stream.until_life(one, LIFE)
    assert stream.losses() == []
    assert_named(podman, stream.of(one), "life")
    told = exited.container
    assert (told.exit_code, told.exit_status, told.exit_signal) == (7, 7, 0)
    assert told.host_pid == running.container.host_pid > 0
    commands = stream.executed(one)
    assert commands[-2:] == ["sh -c /bin/ls /; exit 7", "/bin/ls /"], commands
    document = json.loads(running.container.oci_config_json)
    assert document["process"]["args"] == ["sh", "-c", "/bin/ls /; exit 7"]
    if service:
        assert json.loads(running.container.docker_config_json)["Name"] == "/life"


@BOTH
@pytest.mark.usefixtures("service")
async def test_exec_and_kill(podman: Podman, tmp_path: Path) -> None:
    async with sensing(podman, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        one = await asyncio.to_thread(podman.run, "entered", "sleep", "1000")
        said = await asyncio.to_thread(podman.podman, "exec", one, "sh", "-c", "echo entered; exit 0")
        assert said == "entered"
        await stream.until(lambda: "sh -c echo entered; exit 0" in stream.executed(one), "the exec")
        await asyncio.to_thread(podman.podman, "kill", one)
        *_, exited = await stream.until_life(one, LIFE[:3])
        assert (exited.container.exit_code, exited.container.exit_signal) == (137, signal.SIGKILL)
        await asyncio.to_thread(podman.remove, one)
        await stream.until_life(one, LIFE)
        assert_named(podman, stream.of(one), "entered")


@BOTH
@pytest.mark.usefixtures("service")
async def test_short_lived_ones_that_remove_themselves(podman: Podman, tmp_path: Path) -> None:
    async with sensing(podman, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        names = [f"short-{number}" for number in range(8)]
        gate = asyncio.Semaphore(2)

        async def run(name: str) -> str:
            async with gate:
                return await asyncio.to_thread(podman.run, name, "sleep", "0.01", options=("--rm",))

        ids = await asyncio.gather(*(run(name) for name in names))
        for name, one in zip(names, ids, strict=True):
            *_, exited, _ = await stream.until_life(one, LIFE)
            assert exited.container.exit_code == 0
            assert stream.executed(one)[-1] == "sleep 0.01"
            assert_named(podman, stream.of(one), name)
        assert stream.losses() == []


@BOTH
@pytest.mark.usefixtures("service")
async def test_a_restart(podman: Podman, tmp_path: Path) -> None:
    async with sensing(podman, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        one = await asyncio.to_thread(podman.run, "again", "sleep", "1000")
        await stream.until_life(one, [CREATED, RUNNING])
        await asyncio.to_thread(podman.podman, "restart", "--time", "0", one)
        _, first, _, second = await stream.until_life(one, [*LIFE[:3], RUNNING])
        pid = int(await asyncio.to_thread(podman.podman, "inspect", "--format", "{{.State.Pid}}", one))
        assert first.container.host_pid != second.container.host_pid == pid
        await asyncio.to_thread(podman.remove, one)
        *_, exited, _ = await stream.until_life(one, [*LIFE[:3], RUNNING, EXITED, DESTROYED])
        assert exited.container.exit_signal == signal.SIGKILL
        assert_named(podman, stream.of(one), "again")


@BOTH
@pytest.mark.usefixtures("service")
async def test_pods(podman: Podman, tmp_path: Path) -> None:
    """A pod's cgroup is around its containers'; the one that holds its namespaces is a container, too."""
    async with sensing(podman, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        create = ("pod", "create", "--name", "shop", "--network", "host", "--infra-image", IMAGE)
        pod = await asyncio.to_thread(
            podman.podman, *create, "--infra-name", "shop-infra", "--infra-command", "sleep 1000"
        )
        one = await asyncio.to_thread(podman.run, "web", "sh", "-c", "exit 3", options=("--pod", "shop"))
        *_, exited = await stream.until_life(one, LIFE[:3])
        assert exited.container.exit_code == 3
        listed = await asyncio.to_thread(podman.podman, "pod", "inspect", pod)
        (infra,) = {entry["Id"] for entry in json.loads(listed)["Containers"]} - {one}
        await stream.until_life(infra, [CREATED, RUNNING])
        await asyncio.to_thread(podman.podman, "pod", "rm", "--force", "--time", "0", "shop")
        for container, name in ((one, "web"), (infra, "shop-infra")):
            await stream.until_life(container, LIFE)
            assert_named(podman, stream.of(container), name)
        assert stream.of(pod) == []


@BOTH
@pytest.mark.usefixtures("service")
async def test_the_sensor_restarts(podman: Podman, tmp_path: Path) -> None:
    command = ("sh", "-c", "while /bin/sleep 0.05; do :; done")
    one = await asyncio.to_thread(podman.run, "lasting", *command)
    for _ in range(2):
        async with sensing(podman, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
            await stream.until(lambda: "/bin/sleep 0.05" in stream.executed(one), "what it runs")
            assert stream.life(one) == []
            assert_named(podman, stream.of(one), "lasting")
    async with sensing(podman, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        await asyncio.to_thread(podman.remove, one)
        exited, _ = await stream.until_life(one, [EXITED, DESTROYED])
        assert exited.container.exit_signal == signal.SIGKILL


async def test_the_service_comes_and_goes(podman: Podman, tmp_path: Path) -> None:
    """As it does under systemd, which starts it for who connects. Containers live on meanwhile."""
    podman.start_service()
    try:
        async with sensing(podman, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
            lives = await asyncio.to_thread(podman.run, "lives", "sleep", "1000")
            ends = await asyncio.to_thread(podman.run, "ends", "sleep", "1000")
            for one in (lives, ends):
                await stream.until_life(one, [CREATED, RUNNING])
            await asyncio.to_thread(podman.stop_service)
            await asyncio.to_thread(podman.podman, "kill", ends)
            await asyncio.to_thread(podman.start_service)
            await stream.until_life(ends, LIFE[:3])
            new = await asyncio.to_thread(podman.run, "new", "true")
            await stream.until_life(new, LIFE[:3])
            assert stream.life(lives) == LIFE[:2]
            for one, name in ((lives, "lives"), (ends, "ends"), (new, "new")):
                await asyncio.to_thread(podman.remove, one)
                await stream.until_life(one, LIFE)
                assert_named(podman, stream.of(one), name)
    finally:
        podman.stop_service()
