"""Containers whose cgroups systemd makes: a kubelet's and Podman's, in a guest whose first process it is.

Not named test_*.py, for it belongs inside a guest: test_unit.py hands it to pytest there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ringside.sensor.config import Config
from ringside.sensor.sensor import Sensor

from tests.docker.containerd import Containerd
from tests.docker.engine import image_archive
from tests.docker.podman import CONFIG, IMAGE, Podman
from tests.docker.test_containerd import test_a_pods_whole_life, test_exec_and_kill
from tests.docker.test_podman import assert_named, sensing
from tests.docker.test_stream import LIFE, RUNNING, describe, subscribed, subscription

__all__ = ["test_a_pods_whole_life", "test_exec_and_kill"]


def folder_of(name: str) -> Path:
    """Of memory: overlayfs doesn't go on top of overlayfs, which the guest's root is."""
    folder = Path("/run", name)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", name, str(folder)], check=True)
    return folder / "own"


@pytest.fixture(scope="module")
def containerd() -> Iterator[Containerd]:
    with Containerd(folder_of("tried-containerd"), systemd=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with Podman(folder_of("tried-podman"), systemd=True) as engine:
        yield engine


async def test_systemd_makes_the_cgroups(containerd: Containerd) -> None:
    pod = await containerd.pod("sliced")
    one = await containerd.run(pod, "app", "sleep", "1000")
    parent = pod.config["linux"]["cgroup_parent"]
    assert parent.endswith(".slice")
    assert Path(f"/sys/fs/cgroup/{parent}/cri-containerd-{one}.scope/cgroup.procs").read_text()
    await containerd.end(pod)


async def test_podman(podman: Podman, tmp_path: Path) -> None:
    async with sensing(podman, tmp_path) as sensor, subscribed(sensor, subscription()) as stream:
        one = await asyncio.to_thread(podman.run, "web", "sleep", "1000")
        await stream.until_life(one, LIFE[:2])
        assert Path(f"/sys/fs/cgroup/machine.slice/libpod-{one}.scope").is_dir()
        await asyncio.to_thread(podman.podman, "kill", one)
        _, running, exited = await stream.until_life(one, LIFE[:3])
        assert exited.container.exit_signal == signal.SIGKILL
        assert exited.container.host_pid == running.container.host_pid > 0
        await asyncio.to_thread(podman.remove, one)
        await stream.until_life(one, LIFE)
        assert_named(podman, stream.of(one), "web")


USER = 65534
PLACES = {"HOME": "/run/tried-rootless", "XDG_RUNTIME_DIR": f"/run/user/{USER}"}
CONTAINERS_CONF = "/run/tried-rootless/containers.conf"


def as_user(*words: str) -> str:
    """What a command of a user's Podman prints."""
    places = (f"{key}={value}" for key, value in {**PLACES, "CONTAINERS_CONF": CONTAINERS_CONF}.items())
    become = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "env", *places)
    command = [*become, "podman", *words]
    said = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return said.stdout.strip()


async def test_rootless_podman() -> None:
    """A user's container in a service, as Quadlet has it: there the user may make cgroups."""
    for folder in map(Path, PLACES.values()):
        folder.mkdir(parents=True)
        os.chown(folder, USER, USER)
    Path(CONTAINERS_CONF).write_text(CONFIG.format(manager="cgroupfs"))
    archive = Path(CONTAINERS_CONF).with_name("image.tar")
    archive.write_bytes(image_archive(IMAGE, "sh"))
    as_user("load", "--quiet", "--input", str(archive))
    unit = f"""[Service]
User={USER}
Delegate=yes
Environment={" ".join(f"{key}={value}" for key, value in PLACES.items())} CONTAINERS_CONF={CONTAINERS_CONF}
ExecStart=/usr/bin/podman run --network=host --cgroups=split --name=mine {IMAGE} sleep 1000
StandardError=file:/run/results/rootless
"""
    Path("/run/systemd/system/mine.service").write_text(unit)
    # what leads to the names is written with the pid, which takes longer than 100 ms in an emulator
    config = Config(engine="none", hold=10 * 10**9)
    async with Sensor(config) as sensor, subscribed(sensor, subscription()) as stream:
        await asyncio.to_thread(subprocess.run, ["systemctl", "start", "mine"], check=True)

        def running() -> list[str]:
            return [one.container_id for one in stream.events if one.container.type == RUNNING]

        await stream.until(lambda: bool(running()), "that it runs")
        (one,) = running()
        assert one == await asyncio.to_thread(as_user, "inspect", "--format", "{{.Id}}", "mine")
        assert Path(f"/sys/fs/cgroup/system.slice/mine.service/libpod-payload-{one}").is_dir()
        await asyncio.to_thread(as_user, "kill", "mine")
        *_, exited = await stream.until_life(one, LIFE[:3])
        assert exited.container.exit_signal == signal.SIGKILL
        await asyncio.to_thread(as_user, "rm", "mine")
        await stream.until_life(one, LIFE)
        for event in stream.of(one):
            assert (event.container_name, event.image_name) == ("/mine", IMAGE), describe(event)
