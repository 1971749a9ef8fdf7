"""Opens at 10,000 and connects at 5,000 a second: how many arrive, and what each costs the sensor."""

from __future__ import annotations

import argparse
import time

from common import ask, counting_client, cpu_time, load, machine, sensor, settle


def measure(label: str, what: str, kind: str, seconds: float, rate: float) -> None:
    """One load against one subscription."""
    with sensor() as (pid, address), counting_client(address, what) as client:
        load(kind, 0.2, rate)
        time.sleep(0.2)
        before, lost_before = ask(client)
        used = cpu_time(pid)
        issued, pace = load(kind, seconds, rate)
        if "nothing" in label:
            time.sleep(0.1)
            events, lost = ask(client)
        else:
            events, lost = settle(client, before + issued)
        used = cpu_time(pid) - used
    print(
        f"{label:34} {pace:8,.0f}/s  issued {issued:8,}  arrived {events - before:8,}  "
        f"lost {lost - lost_before:5,}  {used / issued * 1e6:6.2f} µs each"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4)
    options = parser.parse_args()
    print(f"# {machine()}")
    measure("opens", "file:/etc/hostname", "opens", options.seconds, 10000)
    measure("opens, a filter that fits nothing", "file:/nowhere/*", "opens", options.seconds, 10000)
    measure("connects", "network:connect:attempt", "connects", options.seconds, 5000)
