"""Containers on cgroup v2 alone, with a real Docker engine and AppArmor, inside a guest.

Not named test_*.py, for it belongs inside a guest: test_containers.py hands it to pytest there.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ringside.api.v0 import ProcessEventType
from ringside.client import connect, events, files, kernel, processes, syscalls

from tests.docker.engine import Dockerd, wait_until
from tests.docker.test_stream import test_a_whole_life_event_by_event, test_exec_and_kill

ENGINE = Path(__file__).with_name("docker.sh")
TOP = Path(__file__).parents[2]
SOCKET = Path("/run/ringside/sensor.sock")
SECURITY = Path("/sys/kernel/security")
# Docker before 23 knows no CAP_PERFMON and no CAP_BPF, and Debian's kernel.perf_event_paranoid is 3
LEAST = ("SYS_ADMIN", "SYS_PTRACE", "DAC_READ_SEARCH")
PROFILE = "docker-default (enforce)"
PATIENCE = 120.0

__all__ = ["test_a_whole_life_event_by_event", "test_exec_and_kill"]


@pytest.fixture(scope="session")
def dockerd(tmp_path_factory: pytest.TempPathFactory) -> Dockerd:
    """The guest's engine, which ends with the guest; its files where a test's own engine has them."""
    subprocess.run(["mount", "-t", "securityfs", "securityfs", str(SECURITY)], check=True)
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


def test_apparmor_is_in_force(dockerd: Dockerd) -> None:
    assert "name=apparmor" in dockerd.api("GET", "/info")["SecurityOptions"]
    one = dockerd.run("sleep", "1000", name="confined")
    assert profile_of(dockerd, one) == PROFILE
    dockerd.remove(one)


def profile_of(dockerd: Dockerd, container_id: str) -> str:
    pid = dockerd.inspect(container_id)["State"]["Pid"]
    return Path(f"/proc/{pid}/attr/current").read_text().strip()


@contextmanager
def sensing(dockerd: Dockerd, tracing: str, *, confined: bool = True) -> Iterator[None]:
    """A sensor in a container, by the docs' command line, under Docker's own profiles.

    Its files are this guest's instead of the image's, which takes minutes to build in an emulator.
    """
    paths = {sys.base_prefix, sys.prefix, str(TOP), *(f"/{name}" for name in ("usr", "lib", "lib64", "etc"))}
    binds = [f"{path}:{path}:ro" for path in sorted(paths)]
    binds += [f"/sys/kernel/tracing:/sys/kernel/tracing:{tracing}", "/run:/host/run:ro"]
    binds += ["/var/lib/docker/containers:/host/var/lib/docker/containers:ro"]
    binds += ["/sys/fs/cgroup:/host/sys/fs/cgroup:ro", f"{SOCKET.parent}:{SOCKET.parent}"]
    SOCKET.parent.mkdir(exist_ok=True)
    program = Path(sys.executable).with_name("ringside")
    command = f"PYTHONDONTWRITEBYTECODE=1 exec {program} serve --host-root=/host"
    one = dockerd.create(
        *("sh", "-c", command),
        name="sensor",
        CapDrop=["ALL"],
        CapAdd=list(LEAST),
        ReadonlyRootfs=True,
        SecurityOpt=["no-new-privileges", *(() if confined else ("apparmor=unconfined",))],
        PidMode="host",
        Binds=binds,
    )
    dockerd.api("POST", f"/containers/{one}/start", timeout=PATIENCE)  # an emulator on a busy machine
    try:
        wait_until(
            lambda: SOCKET.exists() or not dockerd.inspect(one)["State"]["Running"], "its socket", PATIENCE
        )
        assert SOCKET.exists(), dockerd.api("GET", f"/containers/{one}/logs?stderr=1", parse=False)
        assert profile_of(dockerd, one) == (PROFILE if confined else "unconfined")
        yield
    finally:
        dockerd.api("POST", f"/containers/{one}/stop?t=60")
        dockerd.remove(one)
        assert not SOCKET.exists()


async def seen(dockerd: Dockerd, *more: Iterable[Any]) -> tuple[list[str], list[str]]:
    """A container reads a file, makes a call, removes a file and exits with 3: what a sensor tells of it.

    And what that says it can't serve.
    """
    wanted = events(processes("exec", "exit"), files("/bin/ls"), syscalls("getppid"), *more)
    told: list[str] = []
    async with (
        connect(f"unix:{SOCKET}") as sensor,
        asyncio.timeout(PATIENCE),
        sensor.events(wanted) as stream,
    ):
        script = "/bin/cat /bin/ls /bin/ls; : >/x; /bin/busybox rm /x; exit 3"
        task = asyncio.create_task(asyncio.to_thread(dockerd.run, "sh", "-c", script, name="seen"))
        async for one in stream:
            event = one.event
            print(
                "DBG",
                event and (event.container_name, event.process_pid, event.process, event.file, event.syscall),
                flush=True,
            )
            if event is None or event.container_name != "/seen":
                continue
            process = event.process
            if process is not None and process.type == ProcessEventType.EXEC:
                told.append(" ".join(process.exec_command_line))
            elif event.file is not None:
                told.append(event.file.filename)
            elif event.syscall is not None:
                told.append("getppid")
            elif event.kernel_call is not None:
                told.append("do_unlinkat")
            elif process is not None and process.exit_status == 3:
                told.append("exit 3")
                break
        notes = [status.message for status in stream.statuses if status.code]
    await asyncio.to_thread(dockerd.remove, await task)
    return told, notes


async def test_the_least_privileges(dockerd: Dockerd) -> None:
    """tracefs is read-only: no probes, so programs serve what would else be theirs."""
    with sensing(dockerd, "ro"):
        told, _ = await seen(dockerd)
    assert told.count("/bin/ls") >= 2
    assert {"/bin/cat /bin/ls /bin/ls", "getppid", "exit 3"} <= set(told)


async def test_probes_where_apparmor_lets_them_be_made(dockerd: Dockerd) -> None:
    """tracefs is writable. Docker's profile refuses that all the same: it is said, and all else is served."""
    for confined in (True, False):
        with sensing(dockerd, "rw", confined=confined):
            told, notes = await seen(dockerd, kernel("do_unlinkat"))
            assert ("do_unlinkat" in told) is not confined
            assert any("tracefs can't be written to" in note for note in notes) is confined, notes
            assert told.count("/bin/ls") >= 2
    assert Path("/sys/kernel/tracing/dynamic_events").read_text() == ""
