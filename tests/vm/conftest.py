"""The kernel matrix: booted once, before the first test that asks, and its table at the end of the run.

And the engines of a guest, for the tests that are run in it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.containerd import Containerd
from tests.docker.engine import Dockerd

from . import kernels, machine, run

ENGINES = Path(__file__).with_name("docker.sh")
SECURITY = Path("/sys/kernel/security")
# what Debian's containerd makes a pod's sandbox of
PAUSE = "registry.k8s.io/pause:3.6"
RUNS = pytest.StashKey[list[run.Run]]()


@pytest.fixture(scope="session")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, run.Run]:
    """Each suite's run. All kernels in turn take minutes, so each one's end is told at once."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def told(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{line}", end="", file=sys.stderr, flush=True)

    folder = tmp_path_factory.mktemp("vm", numbered=False)
    try:
        machine.check()
        chosen = run.selected()
    except (machine.NotBooted, kernels.NoKernel) as error:
        pytest.skip(str(error))
    runs = run.run_all(chosen, run.guest_tests(), folder, told)
    request.config.stash[RUNS] = runs
    return {one.kernel.suite: one for one in runs}


@pytest.fixture(scope="session")
def dockerd(tmp_path_factory: pytest.TempPathFactory) -> Dockerd:
    """The guest's engine, which ends with the guest; its files where a test's own engine has them."""
    subprocess.run(["mount", "-t", "securityfs", "securityfs", str(SECURITY)], check=True)
    subprocess.run(["sh", str(ENGINES)], check=True)
    folder = tmp_path_factory.mktemp("dockerd")
    for name, place in (
        ("docker.sock", "/run/docker.sock"),
        ("data", "/var/lib/docker"),
        ("exec", "/run/docker"),
    ):
        (folder / name).symlink_to(place)
    engine = Dockerd(folder)
    engine.import_image()
    return engine


@pytest.fixture(scope="session")
def containerd(dockerd: Dockerd, tmp_path_factory: pytest.TempPathFactory) -> Containerd:
    """The guest's containerd, which is its Docker's, and may be a kubelet's too."""
    del dockerd  # it is up
    folder = tmp_path_factory.mktemp("containerd")
    for name, place in (("containerd.sock", "/run/containerd/containerd.sock"), ("state", "/run/containerd")):
        (folder / name).symlink_to(place)
    engine = Containerd(folder, pause=PAUSE)
    engine.import_images()
    return engine


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if runs := config.stash.get(RUNS, None):
        terminalreporter.section("kernel matrix")
        terminalreporter.write(run.tables(runs))
