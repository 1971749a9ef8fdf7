"""Containers whose cgroups systemd makes: a kubelet's and Podman's, in a guest whose first process it is.

Not named test_*.py, for it belongs inside a guest: test_unit.py hands it to pytest there.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.containerd import Containerd
from tests.docker.podman import Podman
from tests.docker.test_containerd import test_a_pods_whole_life, test_exec_and_kill
from tests.docker.test_podman import assert_named, sensing
from tests.docker.test_stream import LIFE, subscribed, subscription

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
