"""The systemd unit and containers in systemd's cgroups, in one emulated machine that systemd runs.

unit.py and slices.py say what is tried there.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from . import kernels, machine, run

INSIDE = ("tests/vm/unit.py", "tests/vm/slices.py")
KERNEL = "6.12"
TIMEOUT = 900.0  # three minutes on an idle machine


def test_the_unit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It starts, serves with no more privileges than it says, and stops. Containers in slices are found."""
    if not Path(machine.SYSTEMD).exists():
        pytest.skip("this machine has no systemd")
    for program in ("containerd", "podman"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: install Debian's docker.io and podman")
    try:
        machine.check()
        chosen = run.selected((KERNEL,))
    except (machine.NotBooted, kernels.NoKernel) as error:
        pytest.skip(str(error))

    def told(line: str) -> None:
        with capfd.disabled():
            print(f"\n{line}", end="", file=sys.stderr, flush=True)

    (turn,) = run.run_all(chosen, run.guest_tests(INSIDE, TIMEOUT, systemd=True), tmp_path, told)
    if failures := turn.failures:
        pytest.fail("\n\n".join(failures), pytrace=False)
    assert len(turn.results) == 9
