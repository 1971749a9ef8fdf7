"""The sensor's own image: built as `make image` does, run with the least privileges, asked from outside."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ringside.api.v0 import EventFilter, FileEventFilter, FileEventType, Subscription
from ringside.client import connect

from .engine import IMAGE, Dockerd, wait_until
from .test_stream import ALL_PROCESS, EXEC, EXIT, all_container

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
NAME = "ringside:test"
# Docker before 23 knows no CAP_PERFMON; SYS_ADMIN stands for it.
LEAST = ("SYS_ADMIN", "SYS_PTRACE", "DAC_READ_SEARCH")


@pytest.fixture(scope="module")
def image(dockerd: Dockerd) -> str:
    if shutil.which("docker") is None or shutil.which("debootstrap") is None:
        pytest.skip("no docker command, or no debootstrap")
    environment = {**os.environ, "DOCKER_HOST": f"unix://{dockerd.socket}", "PYTHON": sys.executable}
    made = subprocess.run(
        ["deploy/image.sh", NAME], cwd=ROOT, env=environment, check=False, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return NAME


def arguments(dockerd: Dockerd, folder: Path, capabilities: tuple[str, ...]) -> list[str]:
    """`docker run`'s, but for the name of the image."""
    return [
        *("docker", "--host", f"unix://{dockerd.socket}", "run", "--rm", "--cap-drop=ALL", "--read-only"),
        *(f"--cap-add={name}" for name in capabilities),
        *("--security-opt=no-new-privileges", "--pid=host"),
        *("--volume=/sys/kernel/tracing:/sys/kernel/tracing:ro", f"--volume={folder}:/run/ringside"),
        *(
            "--volume=/sys/fs/cgroup:/host/sys/fs/cgroup:ro",
            f"--volume={dockerd.folder}/data:/host/var/lib/docker:ro",
        ),
        f"--volume={dockerd.socket}:/host/run/docker.sock",
    ]


@contextmanager
def serving(command: list[str], socket: Path) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        wait_until(lambda: socket.exists() or process.poll() is not None, "the sensor's socket")
        assert process.poll() is None, process.stdout.read()
        yield
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


async def test_from_outside_with_the_least_privileges(dockerd: Dockerd, image: str, tmp_path: Path) -> None:
    command = [*arguments(dockerd, tmp_path, LEAST), "--network=host", image]
    socket = tmp_path / "sensor.sock"
    with serving(command, socket):
        wanted = Subscription(
            event_filter=EventFilter(
                process_events=ALL_PROCESS,
                container_events=all_container(),
                file_events=[FileEventFilter(type=FileEventType.OPEN)],
            )
        )
        async with (
            connect(f"unix:{socket}") as client,
            asyncio.timeout(60),
            client.events(wanted) as stream,
        ):
            task = asyncio.create_task(
                asyncio.to_thread(dockerd.run, "sh", "-c", "/bin/cat /bin/ls; exit 3", name="seen")
            )
            told: list[str] = []
            async for one in stream:
                event = one.event
                assert event is not None
                if event.container_name != "/seen":
                    continue
                assert event.image_name == IMAGE
                process, file, container = event.process, event.file, event.container
                if process is not None and process.type == EXEC:
                    told.append(" ".join(process.exec_command_line))
                elif process is not None and process.type == EXIT and process.exit_status == 3:
                    told.append("exit")
                elif file is not None and file.filename:
                    told.append(file.filename)
                elif container is not None:
                    told.append(container.type.name)
                    if container.type.name == "EXITED":
                        assert container.exit_code == 3
                        break
            await dockerd_remove(dockerd, await task)
    for text in ("/bin/cat /bin/ls", "exit", "CREATED", "RUNNING", "EXITED"):
        assert text in told, told


async def dockerd_remove(dockerd: Dockerd, container_id: str) -> None:
    await asyncio.to_thread(dockerd.remove, container_id)


def test_check_says_what_is_missing(dockerd: Dockerd, image: str, tmp_path: Path) -> None:
    command = [*arguments(dockerd, tmp_path, ("SYS_PTRACE",)), "--network=none", image, "check", "--json"]
    said = subprocess.run(command, check=False, capture_output=True, text=True)
    rows = {row["family"]: row for row in json.loads(said.stdout)["mechanisms"] if not row["served"]}
    assert said.returncode == 1
    assert {"sensor", "CAP_PERFMON", "CAP_DAC_READ_SEARCH"} <= rows.keys()
    assert "CAP_SYS_PTRACE" not in rows
    assert "PERFMON" in rows["CAP_PERFMON"]["hint"]


def test_no_compiler_inside(dockerd: Dockerd, image: str) -> None:
    command = ["docker", "--host", f"unix://{dockerd.socket}", "run", "--rm", "--network=none"]
    said = subprocess.run(
        [*command, "--entrypoint=sh", image, "-c", "command -v cc gcc clang tcc pip; ls /wheels"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert said.stdout == ""
    size = int(dockerd.api("GET", f"/images/{image}/json")["Size"])
    assert size < 250 << 20
