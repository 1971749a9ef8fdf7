"""What the sensor may do here, as rows of `ringside check`: only what is missing is said."""

from __future__ import annotations

import os

from .events import Mechanism
from .procfs import Procfs

#: (any of these capabilities, by number in linux/capability.h), its name, what it is for
_NEEDED = (
    ((38, 21), "CAP_PERFMON", "no kernel event can be opened (before 5.8 it takes CAP_SYS_ADMIN)"),
    ((19,), "CAP_SYS_PTRACE", "file names, addresses and long command lines are missing from events"),
    ((2, 1), "CAP_DAC_READ_SEARCH", "runtimes' folders can't be read: names come from engines only"),
)


def capabilities(procfs: Procfs) -> int:
    """The effective capabilities of this process, one bit each."""
    for line in (procfs.read("self", "status") or b"").splitlines():
        if line.startswith(b"CapEff:"):
            return int(line.split()[1], 16)
    return 0


def missing(procfs: Procfs) -> list[Mechanism]:
    """A row for each privilege that is missing."""
    have = capabilities(procfs)
    rows = [
        Mechanism(name, False, "none", note, f"--cap-add {name.removeprefix('CAP_')}, or run it as root")
        for numbers, name, note in _NEEDED
        if not any(have >> number & 1 for number in numbers)
    ]
    if _other_network():
        rows.append(
            Mechanism(
                "host's network",
                False,
                "none",
                "without kprobes, the kernel tells exit statuses in the host's network namespace only",
                "start the container with --network=host (hostNetwork: true in Kubernetes)",
            )
        )
    return rows


def _other_network() -> bool:
    try:
        return os.stat("/proc/self/ns/net").st_ino != os.stat("/proc/1/ns/net").st_ino
    except OSError:
        return False
