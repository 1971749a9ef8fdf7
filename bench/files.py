"""Opens and connects, at a rate and flat out: how many arrive, and what each costs the sensor.

At a rate, most of the cost is that the sensor wakes up a hundred times a second; `more than at rest` is
without what a sensor with the same subscriber and no load costs. Yardsticks in the same run: system calls at
the same rate, and `perf record` of the same calls, which copies arguments, not what they point at, and wakes
up when a ring is half full.
"""

from __future__ import annotations

import argparse
import time

from common import ask, counting_client, cpu_time, load, machine, perf_record, sensor, settle

LOADS = (  # label, what is subscribed to, load, rate (0: flat out), whether anything should arrive
    ("system calls, 10,000/s", "syscall:getppid", "syscalls", 10000, True),
    ("opens, 10,000/s", "file:/etc/hostname", "opens", 10000, True),
    ("opens, a filter that fits nothing", "file:/nowhere/*", "opens", 10000, False),
    ("opens, flat out", "file:/etc/hostname", "opens", 0, True),
    ("system calls, 5,000/s", "syscall:getppid", "syscalls", 5000, True),
    ("connects, 5,000/s", "network:connect:attempt", "connects", 5000, True),
    ("connects, flat out", "network:connect:attempt", "connects", 0, True),
)


CALLS = {"opens": "syscalls:sys_enter_openat", "connects": "syscalls:sys_enter_connect"}


def measure(label: str, what: str, kind: str, seconds: float, rate: float, arrives: bool) -> None:
    """One load against one subscription."""
    with sensor() as (pid, address), counting_client(address, what) as client:
        load(kind, 0.2, rate or 10000)
        time.sleep(1)
        at_rest = cpu_time(pid)
        time.sleep(seconds)
        at_rest = cpu_time(pid) - at_rest
        before, lost_before = ask(client)
        used = cpu_time(pid)
        issued, pace = load(kind, seconds, rate)
        if arrives:
            events, lost = settle(client, before + issued)
        else:
            time.sleep(0.1)
            events, lost = ask(client)
        used = cpu_time(pid) - used
    print(
        f"{label:34} {pace:8,.0f}/s  issued {issued:9,}  arrived {events - before:9,}  "
        f"lost {lost - lost_before:5,}  {used / issued * 1e6:6.2f} µs each, "
        f"{(used - at_rest) / issued * 1e6:6.2f} more than at rest"
    )
    if arrives and kind in CALLS:
        perf = perf_record(CALLS[kind], 'comm == "load"', kind, seconds, rate)
        print(f"{'  perf record':34} {perf['pace']:8,.0f}/s  {perf['cpu']:49.2f} µs each")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4)
    options = parser.parse_args()
    print(f"# {machine()}")
    for label, what, kind, rate, arrives in LOADS:
        measure(label, what, kind, options.seconds, rate, arrives)
