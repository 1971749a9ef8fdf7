"""What the benchmarks share: the load program, a sensor process, a client that only counts, CPU clocks."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ringside.api.v0 import TelemetryEvent

HERE = Path(__file__).resolve().parent
SENSOR_CPU, LOAD_CPU = 0, 1


@cache
def load_program() -> str:
    """The load program, compiled."""
    path = Path(tempfile.mkdtemp(prefix="ringside-bench-")) / "load"
    subprocess.run(["gcc", "-O2", "-o", str(path), str(HERE / "load.c")], check=True)
    return str(path)


def pinned(cpu: int, *command: str) -> list[str]:
    """A command that runs on one CPU only."""
    return ["taskset", "-c", str(cpu), *command]


def load(what: str, seconds: float, rate: float) -> tuple[int, float]:
    """Run a load on its own CPU; how many it issued, and how many a second."""
    command = pinned(LOAD_CPU, load_program(), what, str(seconds), str(rate))
    issued, pace = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(issued), float(pace)


def cpu_time(pid: int) -> float:
    """Seconds of CPU that a process has used, all threads, to the microsecond."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:
            continue
    return total / 1e9


def resident(pid: int) -> float:
    """MB of memory that a process has resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1000
    return 0.0


@contextmanager
def sensor(*options: str) -> Iterator[tuple[int, str]]:
    """`ringside serve` on its CPU: pid and address."""
    with tempfile.TemporaryDirectory(prefix="ringside-bench-") as folder:
        address = f"unix:{folder}/sensor.sock"
        command = [sys.executable, "-m", "ringside.sensor.cli", "serve", "--listen", address, *options]
        process = subprocess.Popen(pinned(SENSOR_CPU, *command), stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SystemExit("the sensor did not start")
            yield process.pid, address
        finally:
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def perf_record(event: str, only: str, what: str, seconds: float, rate: float) -> dict[str, float]:
    """A load under `perf record` of an event, filtered: issued, pace, and perf's CPU for each, µs.

    It writes to memory. Its CPU is all until its end, for what is still in the rings then is copied then,
    without what it takes with no load.
    """
    at_rest, _, _ = _under_perf(event, only, what, seconds, None)
    used, issued, pace = _under_perf(event, only, what, seconds, rate)
    return {"issued": issued, "pace": pace, "cpu": (used - at_rest) / issued * 1e6}


def _under_perf(
    event: str, only: str, what: str, seconds: float, rate: float | None
) -> tuple[float, int, float]:
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        command = ["perf", "record", "-q", "-B", "-a", "-e", event, "--filter", only, "-m", "2048"]
        process = subprocess.Popen(
            pinned(SENSOR_CPU, *command, "-o", f"{folder}/perf.data"), stderr=subprocess.DEVNULL
        )
        while not Path(folder, "perf.data").exists():
            time.sleep(0.05)
        time.sleep(1.0)
        used = cpu_time(process.pid)
        issued, pace = 0, 0.0
        if rate is None:
            time.sleep(seconds)
        else:
            issued, pace = load(what, seconds, rate)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_utime + usage.ru_stime - used, issued, pace


@contextmanager
def counting_client(address: str, *what: str) -> Iterator[subprocess.Popen[str]]:
    """A gRPC client process that subscribes to WHAT and only counts; see count.py."""
    command = pinned(SENSOR_CPU, sys.executable, str(HERE / "count.py"), address, *what)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if "live" not in process.stdout.readline():
            raise SystemExit("the client did not subscribe")
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(client: subprocess.Popen[str]) -> tuple[int, int]:
    """How many events the client has counted, and how many it was told are lost."""
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write("count\n")
    client.stdin.flush()
    events, lost = client.stdout.readline().split()
    return int(events), int(lost)


def settle(client: subprocess.Popen[str], expected: int, patience: float = 5.0) -> tuple[int, int]:
    """The counts once nothing more comes, or all that is expected is there."""
    deadline = time.monotonic() + patience
    events, lost = ask(client)
    while events + lost < expected and time.monotonic() < deadline:
        time.sleep(0.05)
        events, lost = ask(client)
    return events, lost


class Arrivals:
    """An event stream that can be asked with patience: a time-out does not end it."""

    def __init__(self, stream: AsyncIterator[TelemetryEvent]) -> None:
        self._stream = stream
        self._next: asyncio.Task[TelemetryEvent] | None = None

    async def get(self, patience: float) -> TelemetryEvent | None:
        """The next event; None if there is none for so many seconds."""
        if self._next is None:
            self._next = asyncio.ensure_future(anext(self._stream))
        if not (await asyncio.wait({self._next}, timeout=patience))[0]:
            return None
        done, self._next = self._next, None
        return done.result()

    async def close(self) -> None:
        """Ask no more."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait({self._next})


def machine() -> str:
    """This machine in a few words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown CPU")
    kernel, python = os.uname().release.split("-")[0], sys.version.split()[0]
    return f"{model}, {os.cpu_count()} CPUs, Linux {kernel}, Python {python}"
