"""A sensor without subscribers: CPU and memory; and from start to ready with 500 processes."""

from __future__ import annotations

import argparse
import subprocess
import time

from common import cpu_time, machine, resident, sensor


def main() -> None:
    """Start some sleepers, then a sensor, and watch it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--processes", type=int, default=500)
    options = parser.parse_args()
    sleepers = [subprocess.Popen(["sleep", "1000"]) for _ in range(options.processes)]
    try:
        start = time.monotonic()
        with sensor() as (pid, _):
            ready = time.monotonic() - start
            time.sleep(1)
            used = cpu_time(pid)
            time.sleep(options.seconds)
            used = cpu_time(pid) - used
            print(f"# {machine()}")
            print(f"ready after {ready:.2f} s with {options.processes} processes more than usual")
            print(f"idle: {used / options.seconds:.2%} of a core, {resident(pid):.0f} MB resident")
    finally:
        for one in sleepers:
            one.kill()
        for one in sleepers:
            one.wait()


if __name__ == "__main__":
    main()
