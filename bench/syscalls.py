"""Every getppid() of one core, at the sensor's client, against `perf record` of the same, in one run."""

from __future__ import annotations

import argparse
import time

from common import ask, counting_client, cpu_time, load, machine, perf_record, sensor, settle


def with_sensor(seconds: float, rate: float) -> dict[str, float]:
    """Issued, delivered, lost, pace, and the sensor's CPU for each event, µs."""
    with sensor() as (pid, address), counting_client(address, "syscall:getppid") as client:
        load("syscalls", 0.2, rate)
        time.sleep(0.2)
        before, _ = ask(client)
        used, client_used = cpu_time(pid), cpu_time(client.pid)
        issued, pace = load("syscalls", seconds, rate)
        events, lost = settle(client, before + issued)
        used, client_used = cpu_time(pid) - used, cpu_time(client.pid) - client_used
        events -= before
    return {
        "issued": issued,
        "delivered": events,
        "lost": lost,
        "pace": pace,
        "cpu": used / max(1, events) * 1e6,
        "client": client_used / max(1, events) * 1e6,
    }


def main() -> None:
    """Alternate both, print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rate", type=float, default=0, help="calls a second; 0: flat out")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ours, perfs, bare = [], [], []
    for _ in range(options.rounds):
        bare.append(load("syscalls", 1, options.rate)[1])
        ours.append(with_sensor(options.seconds, options.rate))
        perfs.append(
            perf_record("raw_syscalls:sys_enter", "id==110", "syscalls", options.seconds, options.rate)
        )
    mine = sorted(ours, key=lambda one: one["cpu"])[len(ours) // 2]
    perf = sorted(perfs, key=lambda one: one["cpu"])[len(perfs) // 2]
    issued, delivered = sum(one["issued"] for one in ours), sum(one["delivered"] for one in ours)
    pace, perf_pace = (max(one["pace"] for one in rows) for rows in (ours, perfs))
    print(f"# {machine()}")
    print(f"issued {issued:,.0f}, delivered {delivered:,.0f}, lost {sum(one['lost'] for one in ours):,.0f}")
    print(f"calls a second: alone {max(bare):,.0f}, sensor {pace:,.0f}, perf record {perf_pace:,.0f}")
    print(f"the load runs at {pace / perf_pace:.0%} of its pace under perf record")
    print(f"CPU for each event: sensor {mine['cpu']:.3f} µs, perf record {perf['cpu']:.3f} µs")
    print(f"sensor / perf record: {mine['cpu'] / perf['cpu']:.2f}   (the client: {mine['client']:.3f} µs)")


if __name__ == "__main__":
    main()
