"""Cgroups that look like a container's, without an engine."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def unified() -> Path:
    """Where the unified hierarchy is mounted."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next(Path(fields[1]) for fields in mounts if fields[2] == "cgroup2")


@contextmanager
def container_cgroup(container_id: str = "") -> Iterator[Path]:
    """A container's cgroup as Docker's cgroupfs driver names it; what is left in it at the end is killed."""
    parent = unified() / "docker"
    made = not parent.exists()
    parent.mkdir(exist_ok=True)
    cgroup = parent / (container_id or secrets.token_hex(32))
    cgroup.mkdir()
    try:
        yield cgroup
    finally:
        folders = [folder for folder, _, _ in os.walk(cgroup, topdown=False)]
        for folder in folders:
            for pid in Path(folder, "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        while any(Path(folder, "cgroup.procs").read_text() for folder in folders):
            time.sleep(0.01)
        for folder in folders:
            os.rmdir(folder)
        if made:
            with suppress(OSError):  # others' containers are there now
                parent.rmdir()
