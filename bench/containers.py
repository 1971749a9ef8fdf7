"""One container's system calls while the host makes its own flat out: unfiltered, and filtered."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common import LOAD_CPU, counting_client, cpu_time, load_program, machine, pinned, sensor, settle


@contextmanager
def container(name: str) -> Iterator[tuple[Path, str]]:
    """A cgroup as a container's, and a root folder where Docker left its name: the cgroup, the folder."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    docker = next(Path(fields[1]) for fields in mounts if fields[2] == "cgroup2") / "docker"
    made = not docker.exists()
    docker.mkdir(exist_ok=True)
    cgroup = docker / secrets.token_hex(32)
    cgroup.mkdir()
    with tempfile.TemporaryDirectory(prefix="ringside-bench-") as root:
        state = Path(root, "var/lib/docker/containers", cgroup.name)
        state.mkdir(parents=True)
        facts = {
            "ID": cgroup.name,
            "Name": f"/{name}",
            "Image": f"sha256:{'1' * 64}",
            "Config": {"Image": "bench:1"},
        }
        (state / "config.v2.json").write_text(json.dumps(facts))
        Path(root, "sys").symlink_to("/sys")
        try:
            yield cgroup, root
        finally:
            cgroup.rmdir()
            if made:
                docker.rmdir()


class Load:
    """The load program, told to begin: the cgroup it is moved to has it before its first call."""

    def __init__(
        self, seconds: float, rate: float, cgroup: Path | None = None, what: str = "syscalls", **env: str
    ) -> None:
        wait = f"read -r _; exec {load_program()} {what} {seconds} {rate}"
        self.process = subprocess.Popen(
            pinned(LOAD_CPU, "sh", "-c", wait),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(self.process.pid))

    def begin(self) -> None:
        """Let it make its calls."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, float]:
        """How many calls it made, and how many a second."""
        issued, pace = self.process.communicate()[0].split()
        return int(issued), float(pace)


def measure(
    seconds: float, rate: float, options: tuple[str, ...], only: str, before: float
) -> dict[str, float]:
    """Both loads at once; the sensor's options and the client's filter. What arrived, what it cost.

    `before`: seconds that the host alone makes its calls first, for the sensor to see what would be cheaper.
    """
    with (
        container("bench") as (cgroup, root),
        sensor("--host-root", root, "--engine", "none", *options) as served,
    ):
        pid, address = served
        inside, host = Load(seconds, rate, cgroup), Load(seconds, 0)
        words = ["syscall:getppid", *([only.format(id=cgroup.name)] if only else [])]
        time.sleep(0.3)
        with counting_client(address, *words) as client:
            if before:
                first = Load(before, 0)
                first.begin()
                first.end()
            used = cpu_time(pid)
            start = time.monotonic()
            inside.begin()
            host.begin()
            issued, _ = inside.end()
            others, pace = host.end()
            took = time.monotonic() - start
            events, lost = settle(client, issued if only else issued + others)
            used = cpu_time(pid) - used
    return {
        "issued": issued if only else issued + others,
        "delivered": events,
        "lost": lost,
        "pace": pace,
        "cpu": used / took,
    }


def attribution(seconds: float, inside: bool) -> float:
    """The sensor's CPU for each event of a load flat out, in a container with names or on the host, µs."""
    with container("bench") as (cgroup, root), sensor("--host-root", root, "--engine", "none") as served:
        pid, address = served
        load = Load(seconds, 0, cgroup if inside else None)
        time.sleep(0.3)
        with counting_client(address, "syscall:getppid") as client:
            used = cpu_time(pid)
            load.begin()
            issued, _ = load.end()
            events, _ = settle(client, issued)
            return (cpu_time(pid) - used) / max(1, events) * 1e6


def switch(seconds: float, *options: str) -> float:
    """How long a switch takes from a container's task to one outside it and back, half of it, in µs.

    `options`: of a sensor, whose client wants the container's calls; without, there is none.
    """
    with container("bench") as (cgroup, root), ExitStack() as running:
        outside = str(cgroup.parent.parent / "cgroup.procs")
        load = Load(seconds, 0, cgroup, "turns", LOAD_CGROUP=outside)
        if options:
            _, address = running.enter_context(sensor("--host-root", root, "--engine", "none", *options))
            running.enter_context(counting_client(address, "syscall:getppid", f"container_id={cgroup.name}"))
            time.sleep(0.3)
        load.begin()
        return 1e6 / load.end()[1] / 2


WAYS: tuple[tuple[str, tuple[str, ...], str, float], ...] = (
    ("everything", (), "", 0),
    ("by id, decided in C", ("--scope", "system"), "container_id={id}", 0),
    ("by id, the sensor has decided", (), "container_id={id}", 5),
    ("by name", (), "container=ben*", 0),
)


def main() -> None:
    """Each way several times, medians; 1 if an event is missing that nobody told of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rate", type=float, default=1000, help="the container's calls a second")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"# {machine()}")
    print(f"the container makes {options.rate:,.0f} calls a second, the host all it can, on the same CPU")
    wrong = False
    base = Load(1, 0)
    base.begin()
    print(f"{'no sensor':30} the host's calls a second {base.end()[1]:10,.0f}")
    for label, arguments, only, before in WAYS:
        rows = [
            measure(options.seconds, options.rate, arguments, only, before) for _ in range(options.rounds)
        ]
        middle = sorted(rows, key=lambda one: one["cpu"])[len(rows) // 2]
        issued, delivered, lost = (sum(one[key] for one in rows) for key in ("issued", "delivered", "lost"))
        print(
            f"{label:30} the host's calls a second {middle['pace']:10,.0f}"
            f"   sensor {middle['cpu']:6.1%} of a core"
            f"   issued {issued:,.0f}, delivered {delivered:,.0f}, lost {lost:,.0f}"
        )
        if delivered + lost < issued or (only and delivered != issued):
            print(f"{label}: NOT ALL ARRIVED")
            wrong = True
    costs = [
        [attribution(options.seconds, inside) for inside in (False, True)] for _ in range(options.rounds)
    ]
    host, inside = (sorted(column)[len(column) // 2] for column in zip(*costs, strict=True))
    print(f"the sensor's CPU for each event: of the host {host:.3f} µs, of a container {inside:.3f} µs")
    print(f"of a container / of the host: {inside / host:.2f}   (its events are 240 bytes longer)")
    turns = {
        "no sensor": [switch(options.seconds / 3) for _ in range(options.rounds)],
        "a container's calls decided in C": [
            switch(options.seconds / 3, "--scope", "system") for _ in range(options.rounds)
        ],
        "limited in the kernel": [
            switch(options.seconds / 3, "--scope", "cgroup") for _ in range(options.rounds)
        ],
    }
    print("a switch between a container's task and another's, on one CPU:")
    for label, took in turns.items():
        print(f"{label:34} {sorted(took)[len(took) // 2]:5.2f} µs")
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
