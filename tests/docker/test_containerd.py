"""Events as a subscriber gets them, of pods that a real containerd runs, as a kubelet has it do."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from ringside.api.v0 import ContainerEventView, ContainerFilter
from ringside.sensor.config import Config
from ringside.sensor.sensor import Sensor

from .containerd import IMAGE, PAUSE, Containerd, Pod
from .cri import NODE
from .test_stream import (
    CREATED,
    DESTROYED,
    EXEC,
    EXITED,
    LIFE,
    RUNNING,
    describe,
    root_with,
    subscribed,
    subscription,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

# Nothing is left of a container that has ended but its id: who is to name it needs a moment before that.
BRIEF = ("sleep", "0.3")
SHELL = ("sh", "-c", "/bin/ls /; /bin/sleep 0.3; exit 7")


def root_of(engine: Containerd, folder: Path) -> Path:
    """A root directory as a node with this containerd has it."""
    return root_with(folder, {"run/containerd": engine.state})


@asynccontextmanager
async def sensing(engine: Containerd, folder: Path) -> AsyncIterator[Sensor]:
    async with Sensor(Config(host_root=str(root_of(engine, folder)), engine="none")) as sensor:
        yield sensor


def assert_named(events: list[Any], pod: Pod, container: str) -> None:
    """Every event says which container it is of; what a sandbox is made of is said since containerd 2."""
    images = ("", PAUSE) if container == "POD" else (IMAGE,)
    assert events
    for event in events:
        assert event.container_name == f"/{pod.namespace}/{pod.name}/{container}", describe(event)
        assert event.image_name in images, describe(event)


async def test_a_pods_whole_life(containerd: Containerd, tmp_path: Path) -> None:
    wanted = subscription(view=ContainerEventView.FULL)
    async with sensing(containerd, tmp_path) as sensor, subscribed(sensor, wanted) as stream:
        pod = await containerd.pod("web-0")
        await stream.until_life(pod.id, [CREATED, RUNNING])
        one = await containerd.create(pod, "app", *SHELL)
        await containerd.start_container(one)
        _, running, exited = await stream.until_life(one, LIFE[:3])
        assert await containerd.wait(one) == 7
        await containerd.remove(one)
        await stream.until_life(one, LIFE)
        await containerd.end(pod)
        *_, ended, _ = await stream.until_life(pod.id, LIFE)
    assert stream.losses() == []
    assert_named(stream.of(one), pod, "app")
    assert_named(stream.of(pod.id), pod, "POD")
    for step in stream.of(one, "container"):
        assert (step.container.name, step.container.image_name) == ("/shop/web-0/app", IMAGE)
    pid = running.container.host_pid
    assert pid == exited.container.host_pid > 0
    told = exited.container
    assert (told.exit_code, told.exit_status, told.exit_signal) == (7, 7, 0)
    assert ended.container.exit_signal == signal.SIGKILL
    assert json.loads(running.container.oci_config_json)["process"]["args"] == list(SHELL)
    assert stream.executed(one)[-3:] == [" ".join(SHELL), "/bin/ls /", "/bin/sleep 0.3"]
    assert stream.executed(pod.id)[-1] == "sleep 2147483647"
    first = [event.process.type for event in stream.of(one, "process") if event.process_pid == pid]
    assert EXEC in first


async def test_exec_and_kill(containerd: Containerd, tmp_path: Path) -> None:
    async with sensing(containerd, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        pod = await containerd.pod("entered")
        one = await containerd.run(pod, "app", "sleep", "1000")
        assert await containerd.execute(one, "sh", "-c", "echo entered; exit 3") == ("entered\n", 3)

        def ended() -> bool:
            told = stream.of(one, "process")
            shells = {
                event.process_pid
                for event in told
                if "echo entered; exit 3" in event.process.exec_command_line
            }
            return any(event.process_pid in shells and event.process.exit_status == 3 for event in told)

        await stream.until(ended, "the end of what was executed")
        await containerd.kill(one)
        *_, exited = await stream.until_life(one, LIFE[:3])
        assert (exited.container.exit_code, exited.container.exit_signal) == (137, signal.SIGKILL)
        await containerd.end(pod)
        await stream.until_life(one, LIFE)
        assert_named(stream.of(one), pod, "app")


async def test_the_first_process_tells_how_it_ended(containerd: Containerd, tmp_path: Path) -> None:
    """In the host's pid namespace others of the container outlive it, until they are killed."""
    async with sensing(containerd, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        pod = await containerd.pod("on-the-node", pid=NODE)
        one = await containerd.run(pod, "app", "sh", "-c", "/bin/sleep 1000 & /bin/sleep 0.3; exit 5")
        _, running, exited = await stream.until_life(one, LIFE[:3])
        assert exited.container.exit_code == await containerd.wait(one) == 5
        assert exited.container.host_pid == running.container.host_pid > 0
        await containerd.end(pod)
        await stream.until_life(one, LIFE)


async def test_short_lived_ones_in_several_pods_at_once(containerd: Containerd, tmp_path: Path) -> None:
    """Each has its life and its programs; those that are gone before the sensor looks have no name."""
    async with sensing(containerd, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        pods = await asyncio.gather(*(containerd.pod(f"many-{number}") for number in range(4)))
        made = [(pod, f"job-{number}") for pod in pods for number in range(6)]
        ids = await asyncio.gather(*(containerd.run(pod, name, "sleep", "0.01") for pod, name in made))
        named = 0
        for (pod, name), one in zip(made, ids, strict=True):
            *_, exited = await stream.until_life(one, LIFE[:3])
            assert exited.container.exit_code == 0
            assert stream.executed(one)[-1] == "sleep 0.01"
            names = {event.container_name for event in stream.of(one)}
            assert names in ({""}, {f"/{pod.namespace}/{pod.name}/{name}"})
            named += names != {""}
        assert named >= len(ids) // 2
        await asyncio.gather(*(containerd.end(pod) for pod in pods))
        for one in (*ids, *(pod.id for pod in pods)):
            await stream.until_life(one, LIFE)
        assert stream.losses() == []


async def test_cgroups_named_as_systemd_does(containerd: Containerd, tmp_path: Path) -> None:
    """The kubelet's driver is systemd, containerd's is not: the cgroup is SLICE:cri-containerd:ID."""
    async with sensing(containerd, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        pod = await containerd.pod("sliced", slices=True)
        one = await containerd.run(pod, "app", *BRIEF)
        await stream.until_life(one, LIFE[:3])
        await containerd.end(pod)
        await stream.until_life(one, LIFE)
        assert_named(stream.of(one), pod, "app")
        assert_named(stream.of(pod.id), pod, "POD")


async def test_by_name_before_it_is_there(containerd: Containerd, tmp_path: Path) -> None:
    wanted = subscription(ContainerFilter(names=["/shop/picked/app"]))
    async with sensing(containerd, tmp_path) as sensor, subscribed(sensor, wanted) as stream:
        pod = await containerd.pod("picked")
        other = await containerd.run(pod, "other", *BRIEF)
        one = await containerd.run(pod, "app", *BRIEF)
        await stream.until_life(one, LIFE[:3])
        await containerd.end(pod)
        await stream.until_life(one, LIFE)
        assert " ".join(BRIEF) in stream.executed(one)
        assert stream.of(other) == stream.of(pod.id) == []


async def test_the_sensor_restarts(containerd: Containerd, tmp_path: Path) -> None:
    pod = await containerd.pod("lasting")
    one = await containerd.run(pod, "app", "sh", "-c", "while /bin/sleep 0.05; do :; done")
    done = await containerd.run(pod, "done", "true")
    for _ in range(2):
        async with sensing(containerd, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
            await stream.until(lambda: "/bin/sleep 0.05" in stream.executed(one), "what it runs")
            assert stream.life(one) == stream.life(pod.id) == stream.life(done) == []
            assert_named(stream.of(one), pod, "app")
    async with sensing(containerd, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        await containerd.end(pod)
        for each in (one, pod.id):
            exited, _ = await stream.until_life(each, [EXITED, DESTROYED])
            assert exited.container.exit_signal == signal.SIGKILL
            assert exited.container.host_pid > 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_containerd_restarts(own_containerd: Containerd, tmp_path: Path, how: signal.Signals) -> None:
    engine = own_containerd
    async with sensing(engine, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        pod = await engine.pod("web-0")
        lives = await engine.run(pod, "lives", "sleep", "1000")
        ends = await engine.run(
            pod, "ends", "sh", "-c", "while ! [ -e /end ]; do /bin/sleep 0.05; done; exit 4"
        )
        await stream.until_life(lives, [CREATED, RUNNING])
        await stream.until_life(ends, [CREATED, RUNNING])
        await asyncio.to_thread(engine.stop, how)
        (engine.state / f"io.containerd.runtime.v2.task/k8s.io/{ends}/rootfs/end").touch()
        *_, exited = await stream.until_life(ends, LIFE[:3])
        assert exited.container.exit_code == 4
        await asyncio.to_thread(engine.start)
        new = await engine.run(pod, "new", *BRIEF)
        await stream.until_life(new, LIFE[:3])
        assert stream.life(lives) == LIFE[:2]
        await engine.end(pod)
        for one, name in ((lives, "lives"), (ends, "ends"), (new, "new"), (pod.id, "POD")):
            await stream.until_life(one, LIFE)
            assert_named(stream.of(one), pod, name)
        assert stream.losses() == []
