"""Containers on cgroup v2 alone, with a real Docker engine and AppArmor, inside a guest.

Not named test_*.py, for it belongs inside a guest: test_containers.py hands it to pytest there.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ringside.api.v0 import ProcessEventType
from ringside.client import connect, events, files, kernel, processes, syscalls

from tests.docker.engine import Dockerd, wait_until
from tests.docker.test_stream import test_a_whole_life_event_by_event, test_exec_and_kill

TOP = Path(__file__).parents[2]
SOCKET = Path("/run/ringside/sensor.sock")
# Docker before 23 knows no CAP_PERFMON and no CAP_BPF, and Debian's kernel.perf_event_paranoid is 3
LEAST = ("SYS_ADMIN", "SYS_PTRACE", "DAC_READ_SEARCH")
PROFILE = "docker-default (enforce)"
PATIENCE = 120.0

__all__ = ["test_a_whole_life_event_by_event", "test_exec_and_kill"]


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


# Reads a file, makes a call, removes a file and exits with 3.
SCRIPT = "/bin/cat /bin/ls /bin/ls; : >/x; /bin/busybox rm /x; exit 3"


async def told_of(
    name: str, run: Callable[[], Awaitable[str]], *more: Iterable[Any]
) -> tuple[list[str], list[str], str]:
    """What a sensor tells of a container of this name that is to run SCRIPT, what that says it can't serve,
    and the container's id."""
    wanted = events(processes("exec", "exit"), files("/bin/ls"), syscalls("getppid"), *more)
    told: list[str] = []
    async with (
        connect(f"unix:{SOCKET}") as sensor,
        asyncio.timeout(PATIENCE),
        sensor.events(wanted) as stream,
    ):
        task = asyncio.ensure_future(run())
        async for one in stream:
            event = one.event
            if event is None or event.container_name != name:
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
    return told, notes, await task


async def seen(dockerd: Dockerd, *more: Iterable[Any]) -> tuple[list[str], list[str]]:
    """What a sensor tells of a container of Docker's, and what that says it can't serve."""
    told, notes, one = await told_of(
        "/seen", lambda: asyncio.to_thread(dockerd.run, "sh", "-c", SCRIPT, name="seen"), *more
    )
    await asyncio.to_thread(dockerd.remove, one)
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
