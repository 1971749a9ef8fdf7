"""What the matrix makes of a guest's results, from canned ones: no emulator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import kernels, machine, run
from .run import Result, Run, Verdict

JUNIT = """<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="5">
<testcase classname="tests.live.test_file" name="test_open" time="0.1" />
<testcase classname="tests.live.test_file.TestGlob" name="test_glob[a]">
    <failure message="m">why</failure></testcase>
<testcase classname="tests.vm.smoke" name="test_x">
    <skipped type="pytest.skip" message="no reason" /></testcase>
<testcase classname="tests.vm.smoke" name="test_y"><properties><property name="not_there" value="none" />
</properties></testcase>
<testcase classname="" name="tests.live.test_broken">
    <error message="collection failure">trace</error></testcase>
</testsuite></testsuites>"""


def kernel(name: str = "6.1") -> kernels.Kernel:
    return kernels.Kernel("suite", f"{name}.0-1-amd64", Path("/nowhere"))


def outcome(
    code: int | None = 0, complaints: tuple[str, ...] = (), results: Path = Path()
) -> machine.Outcome:
    return machine.Outcome(kernel(), code, 3.0, 9.0, results, complaints)


def test_junit_gives_features_and_verdicts(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    assert run.read_junit(tmp_path / "junit.xml") == [
        Result("file", "file::test_open", Verdict.OK),
        Result("file", "file::test_glob[a]", Verdict.FAILED, "failure: why"),
        Result("smoke", "smoke::test_x", Verdict.FAILED, "skipped: no reason"),
        Result("smoke", "smoke::test_y", Verdict.NOT_THERE, "none"),
        Result("broken", "broken::tests.live.test_broken", Verdict.FAILED, "error: trace"),
    ]
    assert run.read_junit(tmp_path / "absent.xml") == []


def test_progress_is_read_where_the_guest_never_finished() -> None:
    output = """collecting ... collected 4 items

tests/vm/smoke.py::test_two_cpus PASSED                                  [ 25%]
tests/live/test_files.py::test_open[a b] FAILED                          [ 50%]
tests/live/test_files.py::test_hangs Timeout (0:05:00)!
Thread 0x00007fef551fdb80 (most recent call first):
  File "/x/selectors.py", line 468 in select
"""
    verdicts = {result.test: result.verdict for result in run.read_progress(output)}
    assert verdicts == {
        "smoke::test_two_cpus": Verdict.OK,
        "files::test_open[a b]": Verdict.FAILED,
        "files::test_hangs": Verdict.FAILED,
    }
    assert run.read_progress(output)[-1].detail == "running at the end"


@pytest.mark.parametrize(
    ("verdicts", "text"),
    [
        ([], ""),
        ([Verdict.OK, Verdict.OK], "2 ok"),
        ([Verdict.OK, Verdict.NOT_THERE], "1 ok, 1 not there"),
        ([Verdict.NOT_THERE], "not there"),
        ([Verdict.FAILED, Verdict.OK], "1 of 2 FAILED"),
    ],
)
def test_cell(verdicts: list[Verdict], text: str) -> None:
    assert run.cell([Result("f", "t", verdict) for verdict in verdicts]) == text


def test_every_kind_of_trouble_is_a_failure() -> None:
    assert Run(kernel(), outcome(), results=(Result("f", "t", Verdict.OK),)).failures == []
    assert Run(kernel(), None, "did not boot").failures == ["did not boot"]
    assert Run(kernel(), outcome(complaints=("BUG: x",))).failures == ["the kernel complained:\nBUG: x"]
    assert Run(kernel(), outcome(1), results=(Result("f", "t", Verdict.FAILED, "d"),)).failures == ["t\nd"]


def test_check_is_held_against_the_configuration() -> None:
    def said(mechanism: str, served: bool) -> str:
        return json.dumps({"mechanisms": [{"family": "opens", "mechanism": mechanism, "served": served}]})

    able = {"CONFIG_KPROBE_EVENTS": "y"}
    assert not run.below_its_means(run.read_check(said("kprobe on do_sys_open", True)), able)
    assert run.below_its_means(run.read_check(said("the caller's memory, read at once", True)), able)
    assert not run.below_its_means(run.read_check(said("the caller's memory, read at once", True)), {})
    assert run.below_its_means(run.read_check(said("", False)), {})


def test_tables() -> None:
    runs = [
        Run(
            kernel("5.10"),
            outcome(),
            results=(Result("file", "t", Verdict.OK),),
            mechanisms={"opens": "probe"},
        ),
        Run(
            kernel("6.1"),
            outcome(),
            results=(Result("net", "t", Verdict.FAILED),),
            mechanisms={"opens": "probe"},
        ),
        Run(kernel("7.3"), None, "no"),
    ]
    assert run.tables(runs) == (
        "|                   | 5.10 | 6.1           | 7.3    |\n"
        "| ----------------- | ---- | ------------- | ------ |\n"
        "| boot              | ok   | ok            | FAILED |\n"
        "| file              | 1 ok |               |        |\n"
        "| net               |      | 1 of 1 FAILED |        |\n"
        "| kernel's messages | ok   | ok            | ok     |\n"
        "| end               | ok   | ok            | FAILED |\n"
        "\n"
        "| events | served by | on        |\n"
        "| ------ | --------- | --------- |\n"
        "| opens  | probe     | 5.10, 6.1 |\n"
    )


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    folder = tmp_path / "lib/modules/6.1.0-1-amd64"
    folder.mkdir(parents=True)
    (folder / "modules.dep").write_text(
        "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs.ko.xz\n"
        "kernel/net/9p/9pnet.ko.xz: kernel/fs/netfs.ko.xz\n"
        "kernel/fs/netfs.ko.xz:\n"
        "kernel/fs/overlayfs/overlay.ko.xz:\n"
    )
    found = machine._modules(kernels.Kernel("suite", "6.1.0-1-amd64", tmp_path))
    assert [path.name for path in found] == ["netfs.ko.xz", "9pnet.ko.xz", "9p.ko.xz", "overlay.ko.xz"]


def test_complaints_are_told_from_chatter() -> None:
    assert machine._complains("[    3.2] WARNING: CPU: 1 PID: 9 at kernel/trace/trace.c:1 x+0x1/0x2")
    assert not machine._complains("[    3.2] clocksource: timekeeping watchdog: no problem")


def test_cache_is_the_one_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RINGSIDE_CACHE", str(tmp_path))
    assert kernels.cache_folder() == tmp_path


def test_mirrors_are_whole_archives(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = """http://a.example/debian/ bookworm main
http://a.example/debian/ bookworm-updates main
http://a.example/debian-security/ bookworm-security main
http://b.example/flat/ ./
http://b.example/other/ nodistro contrib
"""
    monkeypatch.setattr(kernels, "_run", lambda *_: targets)
    assert kernels.mirrors() == ["http://a.example/debian/"]


@pytest.mark.parametrize(
    ("release", "name"), [("5.10.0-32-amd64", "5.10"), ("7.3.4+deb13-amd64", "7.3"), ("6.12-amd64", "6.12")]
)
def test_kernels_go_by_their_short_name(release: str, name: str) -> None:
    assert kernels.Kernel("suite", release, Path()).name == name
