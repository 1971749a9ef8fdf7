"""The kernel matrix: booted once, before the first test that asks, and its table at the end of the run."""

from __future__ import annotations

import sys

import pytest

from . import kernels, machine, run

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if runs := config.stash.get(RUNS, None):
        terminalreporter.section("kernel matrix")
        terminalreporter.write(run.tables(runs))
