"""Docker and a kubelet's containerd on cgroup v2 under AppArmor, in one emulated machine.

containers.py and pods.py say what is tried there.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from . import kernels, machine, run

INSIDE = ("tests/vm/containers.py", "tests/vm/pods.py")
KERNEL = "6.12"
TIMEOUT = 1200.0  # four minutes on an idle machine


def test_engines_on_unified_cgroups(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A container's whole life beside the sensor, exec, kill; the sensor as a container, and as a pod."""
    try:
        machine.check()
        chosen = run.selected((KERNEL,))
    except (machine.NotBooted, kernels.NoKernel) as error:
        pytest.skip(str(error))
    if shutil.which("dockerd", path="/usr/sbin:/usr/local/sbin:/usr/bin") is None:
        pytest.skip("no dockerd: install Debian's docker.io")
    if shutil.which("apparmor_parser", path="/usr/sbin:/sbin") is None:
        pytest.skip("no apparmor_parser: install Debian's apparmor")

    def told(line: str) -> None:
        with capfd.disabled():
            print(f"\n{line}", end="", file=sys.stderr, flush=True)

    (turn,) = run.run_all(chosen, run.guest_tests(INSIDE, TIMEOUT), tmp_path, told)
    if failures := turn.failures:
        pytest.fail("\n\n".join(failures), pytrace=False)
    assert len(turn.results) >= 10
