"""What this kernel and these privileges allow: the rows of `ringside check`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence

from .config import Config
from .errors import KernelError, SetupError, UnservableError
from .events import Mechanism
from .privileges import missing
from .procfs import Procfs

_WIDE = 1000


async def mechanisms(config: Config) -> list[Mechanism]:
    """Start a sensor and ask it; where none can be started, a row that says why, and what that rules out."""
    from .sensor import Sensor

    try:
        async with Sensor(config) as sensor:
            rows = sensor.mechanisms()
    except SetupError as error:
        rows = cannot_start(error.missing, error.hint)
    except UnservableError as error:
        rows = cannot_start(error.cause, error.hint)
    except KernelError as error:
        rows = cannot_start(str(error), "" if os.geteuid() == 0 else "run it as root")
    return rows + missing(Procfs(config.proc))


def cannot_start(cause: str, hint: str) -> list[Mechanism]:
    """The rows for a machine where no sensor runs."""
    from .events import container, debug, file, kernel_call, network, process, syscall

    families = [module.FAMILY for module in (syscall, process, file, network, kernel_call, container)]
    families.append(f"{debug.TICKER}, {debug.CHARGEN}")
    return [
        Mechanism("sensor", False, "none", cause, hint),
        *(Mechanism(family, False, "none", "the sensor can't start") for family in families),
    ]


def as_json(rows: Sequence[Mechanism]) -> str:
    """The rows for programs."""
    everything = all(row.served for row in rows)
    return json.dumps(
        {
            "kernel": os.uname().release,
            "everything_served": everything,
            "mechanisms": [dataclasses.asdict(row) for row in rows],
        },
        indent=2,
    )


def table(rows: Sequence[Mechanism]) -> str:
    """The rows for people; in colour and folded to its width if standard output is a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("events", "served", "by way of", "remarks", "to have it"):
        made.add_column(name, no_wrap=name in ("events", "served"))
    for row in rows:
        made.add_row(
            Text(row.family, style="bold"),
            Text("yes", style="green") if row.served else Text("no", style="red"),
            Text(row.mechanism if row.served else ""),
            Text(row.note),
            Text(row.hint),
        )
    console = Console(highlight=False)
    if not console.is_terminal:  # who reads it may want to search it
        console = Console(highlight=False, width=_WIDE)
    with console.capture() as capture:
        console.print(made)
    return "\n".join([line.rstrip() for line in capture.get().strip("\n").split("\n") if line.strip()])
