"""What every test gets: markers, skips that prove themselves, and a check that nothing is left behind.

A test marked `live`, `docker` or `vm` (all tests of tests/live/, tests/docker/, tests/vm/ are) may skip where
that isn't to be had. RINGSIDE_REQUIRE=live,docker,vm says that it is: then such a skip is a failure.
"""

from __future__ import annotations

import asyncio
import asyncio.runners
import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

# how long an example takes says more about what else runs; CI tries the same examples each time
hypothesis.settings.register_profile("ringside", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("ringside")

TESTS = Path(__file__).parent
NEEDS = ("live", "docker", "vm")
REQUIRED = {name for name in os.environ.get("RINGSIDE_REQUIRE", "").replace(",", " ").split() if name}

if REQUIRED - set(NEEDS):
    raise pytest.UsageError(f"RINGSIDE_REQUIRE: {REQUIRED} must be of {', '.join(NEEDS)}")


def is_root() -> bool:
    return os.geteuid() == 0


# --- markers and skips


def need_of_path(path: Path) -> str | None:
    """The marker that a test gets from the folder it is in."""
    parts = path.relative_to(TESTS).parts if path.is_relative_to(TESTS) else ()
    return parts[0] if len(parts) > 1 and parts[0] in NEEDS else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        need = need_of_path(item.path)
        if need:
            item.add_marker(need)
        if not is_root() and (item.get_closest_marker("live") or item.get_closest_marker("docker")):
            item.add_marker(pytest.mark.skip(reason="needs root"))


def fail_required_skip(report: pytest.TestReport | pytest.CollectReport, needs: set[str]) -> None:
    """Turn a skip that RINGSIDE_REQUIRE rules out into a failure that shows the skip's reason."""
    broken = sorted(needs & REQUIRED)
    if report.outcome != "skipped" or hasattr(report, "wasxfail") or not broken:
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"RINGSIDE_REQUIRE={','.join(broken)} allows no skip here. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fail_required_skip(report, {name for name in NEEDS if item.get_closest_marker(name)})
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    need = need_of_path(collector.path)
    # a module that skips itself never gets as far as having tests
    fail_required_skip(report, {need} if need else set())
    return report


# --- leaks

_abandoned: list[str] = []
_told: set[str] = set()  # once is enough, the session need not repeat it
_cancel_all_tasks = asyncio.runners._cancel_all_tasks  # type: ignore[attr-defined]


def _note_and_cancel_all_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """What a loop does with its tasks as it closes, told to whoever looks for leaks."""
    _abandoned.extend(repr(task) for task in asyncio.all_tasks(loop))
    _cancel_all_tasks(loop)


# asyncio.Runner cancels what a test left running without a word; there is no public place to look in between
asyncio.runners._cancel_all_tasks = _note_and_cancel_all_tasks  # type: ignore[attr-defined]


def open_files() -> dict[int, str]:
    """This process's file descriptors and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the descriptor of the listing itself
    return found


def _text(path: Path) -> str | None:
    """What procfs says; None if the thread or process has ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None


def children() -> dict[int, str]:
    """This process's children, the dead ones that nobody waited for too, and their names."""
    found = {}
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in (_text(path) or "").split():
            stat = _text(Path(f"/proc/{pid}/stat"))
            found[int(pid)] = stat.rpartition(")")[0].partition("(")[2] if stat else "?"
    return found


class Leaks:
    """What is there when this is made must be all that is there when check() is called."""

    def __init__(self) -> None:
        _abandoned.clear()
        self.files = open_files()
        self.children = children()

    def found(self) -> list[str]:
        new_files = {fd: what for fd, what in open_files().items() if self.files.get(fd) != what}
        new_children = {pid: name for pid, name in children().items() if pid not in self.children}
        lines = [f"file descriptor {fd}: {what}" for fd, what in new_files.items()]
        lines += [f"child process {pid}: {name}" for pid, name in new_children.items()]
        lines += [f"asyncio task: {task}" for task in _abandoned]
        return lines

    def check(self) -> None:
        found = self.found()
        if found and not _abandoned:
            gc.collect()  # what only waits for the collector has been reported as a ResourceWarning
            found = self.found()
        found = [line for line in found if line not in _told]
        _abandoned.clear()
        _told.update(found)
        if found:
            pytest.fail("left behind: " + "; ".join(found), pytrace=False)


@pytest.fixture(autouse=True, scope="session")
def _nothing_left_by_the_session() -> Iterator[None]:
    leaks = Leaks()
    yield
    leaks.check()


@pytest.fixture(autouse=True)
def _nothing_left_by_the_test() -> Iterator[None]:
    leaks = Leaks()
    yield
    leaks.check()
