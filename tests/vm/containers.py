"""Containers on cgroup v2 alone, with a real Docker engine, inside a guest, where there is no v1.

Not named test_*.py, for it belongs inside a guest: test_containers.py hands it to pytest there.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.docker.engine import Dockerd
from tests.docker.test_stream import test_a_whole_life_event_by_event, test_exec_and_kill

ENGINE = Path(__file__).with_name("docker.sh")

__all__ = ["test_a_whole_life_event_by_event", "test_exec_and_kill"]


@pytest.fixture(scope="session")
def dockerd(tmp_path_factory: pytest.TempPathFactory) -> Dockerd:
    """The guest's engine, which ends with the guest; its files where a test's own engine has them."""
    subprocess.run(["sh", str(ENGINE)], check=True)
    folder = tmp_path_factory.mktemp("dockerd")
    for name, place in (
        ("docker.sock", "/run/docker.sock"),
        ("data", "/var/lib/docker"),
        ("exec", "/run/docker"),
    ):
        (folder / name).symlink_to(place)
    engine = Dockerd(folder)
    engine.import_image()
    return engine


def test_these_are_unified_cgroups() -> None:
    assert Path("/sys/fs/cgroup/cgroup.controllers").exists()
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2] == "cgroup"]
