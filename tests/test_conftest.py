"""The checks of conftest.py fail when they should, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = (Path(__file__).parent / "conftest.py").read_text()
SETTINGS = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
markers =
    live
    docker
    vm
"""
LEAKS = """
import asyncio, os, select, subprocess
kept = []
def test_file():
    os.open("/dev/null", os.O_RDONLY)
def test_epoll():
    kept.append(select.epoll())
def test_child():
    kept.append(subprocess.Popen(["sleep", "1000"]))
def test_zombie():
    if not (pid := os.fork()):
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
async def test_task():
    kept.append(asyncio.create_task(asyncio.sleep(1000)))
def teardown_module():
    kept[1].kill()
    kept[1].wait()
"""
CLEAN = """
import asyncio, os, subprocess, sys
def test_file():
    os.close(os.open("/dev/null", os.O_RDONLY))
def test_child():
    subprocess.run(["true"], check=True)
async def test_task():
    task = asyncio.create_task(asyncio.sleep(1000))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
async def test_child_of_a_loop():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "", stdout=asyncio.subprocess.PIPE)
    await process.communicate()
async def test_thread():
    await asyncio.to_thread(sum, [1])
"""
SKIPS = """
import pytest
@pytest.fixture
def missing():
    pytest.skip("no such luck")
def test_by_hand():
    pytest.skip("no such luck")
@pytest.mark.skip(reason="no such luck")
def test_by_mark():
    pass
def test_by_fixture(missing):
    pass
@pytest.mark.xfail
def test_expected_failure():
    assert False
"""
SKIPPED_MODULE = "import pytest\npytest.skip('no such luck', allow_module_level=True)\ndef test_it(): pass"


def run(pytester: pytest.Pytester, **tests: str) -> pytest.RunResult:
    """Run tests under conftest.py: folder__name="source"."""
    pytester.makeini(SETTINGS)
    pytester.makeconftest(CONFTEST)
    for name, source in tests.items():
        path = pytester.path / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rA")


def test_leaks_fail(pytester: pytest.Pytester) -> None:
    result = run(pytester, test_it=LEAKS)
    assert result.parseoutcomes() == {"passed": 5, "errors": 5}
    result.stdout.fnmatch_lines(
        [
            "left behind: file descriptor *: /dev/null",
            "left behind: file descriptor *eventpoll*",
            "left behind: child process *: sleep",
            "left behind: child process *",
            "left behind: asyncio task: <Task *>",
        ]
    )


def test_no_leak_passes(pytester: pytest.Pytester) -> None:
    assert run(pytester, test_it=CLEAN).parseoutcomes() == {"passed": 5}


def test_skips(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    # vm: the one that never skips for want of root
    monkeypatch.setenv("RINGSIDE_REQUIRE", "live,docker")
    outcomes = run(pytester, vm__test_it=SKIPS, vm__test_module=SKIPPED_MODULE).parseoutcomes()
    assert outcomes == {"skipped": 4, "xfailed": 1}


def test_required_tests_may_not_skip(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGSIDE_REQUIRE", "docker,vm")
    result = run(pytester, vm__test_it=SKIPS)
    assert result.parseoutcomes() == {"failed": 1, "errors": 2, "xfailed": 1}
    result.stdout.fnmatch_lines(["*RINGSIDE_REQUIRE=vm allows no skip here. Skipped: no such luck"])
    assert run(pytester, vm__test_module=SKIPPED_MODULE).ret != 0
