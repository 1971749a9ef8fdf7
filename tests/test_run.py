"""What run.py makes of a suite's output: CI's verdict hangs on it."""

from __future__ import annotations

import importlib
import os
import select
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    module = importlib.import_module("run")
    # these tests may run under RINGSIDE_REQUIRE themselves
    monkeypatch.setattr(module, "REQUIRED", set())
    return module


NO_TESTS = "===== 5 deselected in 0.9s ====="


@pytest.mark.parametrize(
    ("output", "status", "failed", "counts"),
    [
        ("===== 7 passed, 2 skipped, 1 xfailed in 0.5s =====", 0, False, {"passed": 8, "skipped": 2}),
        ("===== 7 passed in 65.01s (0:01:05) =====", 0, False, {"passed": 7}),
        ("===== 1 failed, 7 passed, 1 error in 0.5s =====", 1, True, {"passed": 7, "failed": 2}),
        ("===== 7 passed in 0.5s =====\nthen a crash", 1, True, {"passed": 7, "failed": 1}),
        ("no such program", 1, True, {"failed": 1}),
        (NO_TESTS, 5, False, {}),
        (NO_TESTS, 1, True, {"failed": 1}),
    ],
)
def test_read(run: Any, output: str, status: int, failed: bool, counts: dict[str, int]) -> None:
    result = run.read("vm", status, 1.0, output)
    assert (result.failed, dict(+result.counts)) == (failed, counts)


def test_no_tests_where_they_are_required(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "REQUIRED", {"vm"})
    assert run.read("vm", 5, 1.0, NO_TESTS).failed


async def test_nothing_outlives_its_suite(run: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert await run.command(log, "sh", "-c", "sleep 1000 & echo $!") == 0
    try:
        orphan = os.pidfd_open(int(log.read_text()))
    except ProcessLookupError:
        return
    try:
        assert select.select([orphan], [], [], 10)[0], "still running"
    finally:
        os.close(orphan)


async def test_a_suite_that_hangs_is_stopped(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "LIMIT", 0.1)
    assert await run.command(tmp_path / "log", "sleep", "1000") == 124
