"""deploy/ringside.service under a real systemd, in a guest whose first process that is.

Not named test_*.py, for it belongs inside a guest: test_unit.py hands it to pytest there.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ringside.api.v0 import ProcessEventType, Subscription
from ringside.client import connect, events, files, kernel, network, processes, syscalls

TOP = Path(__file__).parents[2]
UNITS = Path("/etc/systemd/system")
SOCKET = Path("/run/ringside/sensor.sock")
PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
PATIENCE = 120.0


def systemctl(*words: str, check: bool = True) -> str:
    return subprocess.run(["systemctl", *words], check=check, capture_output=True, text=True).stdout.strip()


def written(name: str, text: str) -> None:
    """A unit, or a part of one."""
    (UNITS / name).parent.mkdir(exist_ok=True)
    (UNITS / name).write_text(text)
    systemctl("daemon-reload")


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """As the unit says: in /opt/ringside. What it says on its standard error is kept."""
    Path("/opt/ringside/bin").mkdir(parents=True, exist_ok=True)
    Path("/opt/ringside/bin/ringside").symlink_to(Path(sys.executable).with_name("ringside"))
    written("ringside.service", (TOP / "deploy/ringside.service").read_text())
    written("ringside.service.d/said.conf", "[Service]\nStandardError=file:/run/said\nRestart=no\n")


@pytest.fixture
def pid() -> Iterator[int]:
    """The running service's; it is stopped at the end, and has left nothing."""
    PARANOID.write_text("2")
    systemctl("start", "ringside")
    try:
        yield int(systemctl("show", "-P", "MainPID", "ringside"))
    finally:
        systemctl("stop", "ringside")
    assert systemctl("show", "-P", "Result", "ringside") == "success"
    assert systemctl("show", "-P", "ActiveState", "ringside") == "inactive"
    assert not SOCKET.parent.exists()
    assert Path("/sys/kernel/tracing/dynamic_events").read_text() == ""
    assert not Path("/sys/fs/cgroup/system.slice/ringside.service").exists()


def test_systemd_finds_nothing_to_say_of_it() -> None:
    said = subprocess.run(
        ["systemd-analyze", "verify", str(UNITS / "ringside.service")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


async def test_subscribed_to_and_restricted(pid: int) -> None:
    assert stat.S_IMODE(SOCKET.parent.stat().st_mode) == 0o750
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    mark = Path("/tmp/ringside-unit-mark")
    wanted: Subscription = events(
        syscalls("getppid"),
        processes("exec", "exit"),
        files(str(mark)),
        network("connect:attempt", where=f"sin_port == {port}"),
        kernel("do_unlinkat"),
    )
    script = f"import os, socket; os.getppid(); open({str(mark)!r}, 'w').close(); os.unlink({str(mark)!r})"
    script += f"; socket.create_connection(('127.0.0.1', {port})); os._exit(3)"
    told: set[str] = set()
    async with (
        connect(f"unix:{SOCKET}") as sensor,
        sensor.events(wanted) as stream,
        asyncio.timeout(PATIENCE),
    ):
        child = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", script)
        async for one in stream:
            event = one.event
            if event is None or event.process_pid != child.pid:
                continue
            found = (event.syscall, event.process, event.file, event.network, event.kernel_call)
            told.add(next(name for name, there in zip(FAMILIES, found, strict=True) if there is not None))
            if event.process is not None and event.process.type == ProcessEventType.EXIT:
                assert event.process.exit_status == 3
                break
        assert await child.wait() == 3
    listener.close()
    assert told == set(FAMILIES)

    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapPrm", "CapEff", "CapBnd")} == {f"{mask():016x}"}
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    assert int(fields["Seccomp_filters"]) > 0
    root = f"/proc/{pid}/root"
    inside = {
        place: os.statvfs(f"{root}{place}").f_flag & os.ST_RDONLY
        for place in ("/", "/usr", "/etc", "/sys/kernel/tracing", "/run/ringside")
    }
    writable = {"/sys/kernel/tracing", "/run/ringside"}
    assert inside == {place: 0 if place in writable else os.ST_RDONLY for place in inside}
    assert os.listdir(f"{root}/usr/lib/modules") == [], "ProtectKernelModules"


FAMILIES = ("syscall", "process", "file", "network", "kernel_call")


def mask() -> int:
    """The capabilities that the unit has, one bit each."""
    text = (TOP / "deploy/ringside.service").read_text()
    (names,) = re.findall(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)
    header = Path("/usr/include/linux/capability.h").read_text()
    numbers = dict(re.findall(r"#define (CAP_\w+)\s+(\d+)$", header, re.MULTILINE))
    return sum(1 << int(numbers[name]) for name in names.split())


def test_everything_is_served_under_these_restrictions() -> None:
    """`ringside check` as a unit that has the service's every line, but for how it runs."""
    PARANOID.write_text("2")
    text = (TOP / "deploy/ringside.service").read_text()
    text = re.sub(r"^(Type|ExecStart|Restart|RuntimeDirectory\w*)=.*\n", "", text, flags=re.MULTILINE)
    check = (
        "Type=oneshot\nExecStart=/opt/ringside/bin/ringside check --json\nStandardOutput=file:/run/checked\n"
    )
    written("check.service", text.replace("[Service]\n", f"[Service]\n{check}"))
    systemctl("start", "check", check=False)
    said = json.loads(Path("/run/checked").read_text())
    assert [row for row in said["mechanisms"] if not row["served"]] == []
    assert said["everything_served"]
    served = {row["family"]: row["mechanism"] for row in said["mechanisms"]}
    assert "kprobes" in served["kernel functions"]
    assert "memory" not in served["file opens"]


def test_where_perf_events_take_more() -> None:
    """Debian's and Ubuntu's setting: it says so, and the drop-in is what it takes."""
    PARANOID.write_text("3")
    assert systemctl("is-active", "ringside", check=False) == "inactive"
    assert subprocess.run(["systemctl", "start", "ringside"], check=False, capture_output=True).returncode
    assert "CAP_SYS_ADMIN, as kernel.perf_event_paranoid is 3" in Path("/run/said").read_text()
    systemctl("reset-failed", "ringside")
    written("ringside.service.d/paranoid.conf", (TOP / "deploy/ringside-paranoid.conf").read_text())
    systemctl("start", "ringside")
    assert SOCKET.is_socket()
    systemctl("stop", "ringside")
    assert systemctl("show", "-P", "Result", "ringside") == "success"
