"""The kernel matrix: the live tests on each of Debian's kernels, and a table of what works where.

    python -m tests.vm.run                              smoke tests and live tests on all kernels
    python -m tests.vm.run -k 6.1 -k 5.10 -- CMD...     CMD on these, its output shown
    python -m tests.vm.run -k 6.1 --shell 'uname -a; dmesg | tail'
    python -m tests.vm.run --tests tests/live/test_file.py::test_open

The exit status is 1 if anything failed. Each kernel's results (output, JUnit XML, `ringside check --json`,
kernel messages) stay in a folder that the end names.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from xml.etree import ElementTree as ET

from . import kernels, machine

PROJECT = Path(__file__).parents[2]
SMOKE = "tests/vm/smoke.py"
LIVE = "tests/live"
COMMAND_LINE = "tests/live/test_cli.py"
# emulated Python is some fifteen times slower
TIMEOUT = float(os.environ.get("RINGSIDE_VM_TIMEOUT", "1800"))
# how `ringside check` calls the lowest rung of its ladders
LAST_RESORT = "the caller's memory"
# seconds in one test after which it says where it stands
HANGING = 300
JOBS = int(os.environ.get("RINGSIDE_VM_JOBS", "2"))


class Verdict(Enum):
    OK = "ok"
    FAILED = "failed"
    NOT_THERE = "not there"


@dataclass(frozen=True)
class Result:
    """One test in one guest. `feature` is the module it stands in: test_file.py tests `file`."""

    feature: str
    test: str
    verdict: Verdict
    detail: str = ""


@dataclass(frozen=True)
class Run:
    """One kernel's turn. `problem` is what kept it from ending well, apart from tests that failed."""

    kernel: kernels.Kernel
    outcome: machine.Outcome | None
    problem: str = ""
    results: tuple[Result, ...] = ()
    mechanisms: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """Everything that is wrong, told in full."""
        found = [f"{r.test}\n{r.detail}" for r in self.results if r.verdict is Verdict.FAILED]
        if self.problem:
            found.append(self.problem)
        if self.outcome and self.outcome.complaints:
            found.append("the kernel complained:\n" + "\n".join(self.outcome.complaints))
        return found

    def times(self) -> str:
        if not self.outcome:
            return "did not boot"
        return f"up in {self.outcome.boot_seconds:.0f} s, done in {self.outcome.seconds:.0f} s"


def selected(names: Sequence[str] = ()) -> list[kernels.Kernel]:
    """The kernels named, else those of RINGSIDE_VM_KERNELS, else all."""
    default = os.environ.get("RINGSIDE_VM_KERNELS", "").replace(",", " ").split()
    return kernels.get(tuple(names or default))


# a kernel's turn: kernel, folder for the results, image of this Python
Turn = Callable[[kernels.Kernel, Path, Path | None], Run]


def run_all(
    chosen: Iterable[kernels.Kernel], turn: Turn, folder: Path, told: Callable[[str], None]
) -> list[Run]:
    """Each kernel's turn, JOBS side by side, results in folders of their names; its end is told at once."""

    def one(kernel: kernels.Kernel) -> Run:
        run = turn(kernel, folder / kernel.name, image)
        told(f"{kernel.release}: {run.times()}{', FAILED' if run.failures else ''}")
        return run

    image = machine.python_image(folder / "python.img")
    try:
        with ThreadPoolExecutor(JOBS) as pool:
            return list(pool.map(one, chosen))
    finally:
        if image:
            image.unlink()


def commands(script: str, timeout: float, cgroup: str) -> Turn:
    """A shell script in the guest; it fails by its exit status."""

    def turn(kernel: kernels.Kernel, results: Path, image: Path | None) -> Run:
        try:
            outcome = machine.boot(
                kernel, script, results, timeout=timeout, cwd=PROJECT, cgroup=cgroup, image=image
            )
        except machine.NotBooted as error:
            return Run(kernel, None, str(error))
        return Run(kernel, outcome, _end(outcome, timeout))

    return turn


def guest_tests(
    names: Sequence[str] = (), timeout: float = TIMEOUT, cgroup: str = "v2", *, systemd: bool = False
) -> Turn:
    """These tests in the guest, all that are meant for it if none is named, and `ringside check`."""
    chosen = names or [name for name in (SMOKE, LIVE) if (PROJECT / name).exists()]
    return lambda kernel, results, image: run_tests(kernel, chosen, results, timeout, cgroup, image, systemd)


def run_tests(
    kernel: kernels.Kernel,
    names: Sequence[str],
    results: Path,
    timeout: float,
    cgroup: str,
    image: Path | None,
    systemd: bool = False,
) -> Run:
    """These tests in the guest, with this Python and this checkout."""
    (results / "junit.xml").unlink(missing_ok=True)
    (results / "check.json").unlink(missing_ok=True)
    pytest = [
        *(sys.executable, "-m", "pytest", *names, "-v", "--color=no", "--durations=10"),
        # the command line is the same on every kernel, and starts Python for each test
        *(() if any(name.startswith(COMMAND_LINE) for name in names) else (f"--ignore={COMMAND_LINE}",)),
        # a test that hangs shows where, before the whole run is out of time
        *("-p", "no:cacheprovider", "-o", f"faulthandler_timeout={HANGING:.0f}"),
        *("--junit-xml=/run/results/junit.xml", "-o", "junit_logging=no"),
    ]
    check = Path(sys.executable).with_name("ringside")
    script = f"""
if [ -x {shlex.quote(str(check))} ]; then
    {shlex.quote(str(check))} check --json >/run/results/check.json 2>/run/results/check.err
fi
{shlex.join(pytest)}
"""
    # whoever skips a live test here hides that something is missing
    env = {"RINGSIDE_REQUIRE": "live", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        outcome = machine.boot(
            kernel,
            script,
            results,
            timeout=timeout,
            cwd=PROJECT,
            env=env,
            cgroup=cgroup,
            image=image,
            systemd=systemd,
        )
    except machine.NotBooted as error:
        return Run(kernel, None, str(error))
    found = tuple(read_junit(results / "junit.xml") or read_progress(outcome.output))
    problem = _end(outcome, timeout)
    if outcome.code == 1 and any(r.verdict is Verdict.FAILED for r in found):
        problem = ""  # said better by the tests themselves
    elif not found and not problem:
        problem = "no test ran"
    mechanisms: dict[str, str] = {}
    if check.exists() and not problem:
        try:
            mechanisms = read_check((results / "check.json").read_text())
        except (ValueError, KeyError, TypeError) as error:
            said = (results / "check.err").read_text(errors="replace")[-2000:]
            problem = f"ringside check --json: {error!r}\n{said}"
        else:
            problem = "\n".join(below_its_means(mechanisms, kernel.config()))
    return Run(kernel, outcome, problem, found, mechanisms)


def _end(outcome: machine.Outcome, timeout: float) -> str:
    tail = "\n".join(outcome.output.splitlines()[-40:])
    if outcome.code is None:
        how = "not done" if outcome.seconds >= timeout else "the guest died"
        return f"{how} after {outcome.seconds:.0f} s; at the end:\n{tail}"
    return f"exit status {outcome.code}:\n{tail}" if outcome.code else ""


def read_junit(path: Path) -> list[Result]:
    """pytest's JUnit XML. A feature is not there if the test says so by record_property("not_there", WHY)."""
    if not path.exists():
        return []
    found = []
    for case in ET.parse(path).iter("testcase"):
        # a module that can't be collected has its name as the test's
        module = (case.get("classname") or case.get("name") or "").split(".")
        feature = next((p.removeprefix("test_") for p in module if p.startswith("test_")), module[-1])
        name = f"{feature}::{case.get('name', '')}"
        missing = case.find("properties/property[@name='not_there']")
        bad = [part for part in case if part.tag in ("failure", "error", "skipped")]
        if bad:
            verdict, detail = Verdict.FAILED, f"{bad[0].tag}: {bad[0].text or bad[0].get('message')}"
        elif missing is not None:
            verdict, detail = Verdict.NOT_THERE, missing.get("value", "")
        else:
            verdict, detail = Verdict.OK, ""
        found.append(Result(feature, name, verdict, detail))
    return found


def read_progress(output: str) -> list[Result]:
    """`pytest -v` as far as it came: what there is when the guest was stopped or died in the middle."""
    found = []
    line = r"^\S*?(\w+)\.py::([^\s\[]+(?:\[.*?\](?= |$))?)(?: (PASSED|FAILED|ERROR)\b)?"
    for module, test, said in re.findall(line, output, re.MULTILINE):
        feature = module.removeprefix("test_")
        if said == "PASSED":
            verdict, detail = Verdict.OK, ""
        else:
            verdict, detail = Verdict.FAILED, "no report was written" if said else "running at the end"
        found.append(Result(feature, f"{feature}::{test}", verdict, detail))
    return found


def read_check(text: str) -> dict[str, str]:
    """What `ringside check --json` says: each family of events and what serves it here; empty if nothing."""
    rows = json.loads(text)["mechanisms"]
    return {row["family"]: row["mechanism"] if row["served"] else "" for row in rows}


def below_its_means(mechanisms: dict[str, str], config: dict[str, str]) -> list[str]:
    """Families that a kernel of this configuration serves worse than it could."""
    found = [
        f"ringside check: {family} not served" for family, mechanism in mechanisms.items() if not mechanism
    ]
    if config.get("CONFIG_KPROBE_EVENTS") == "y":
        found += [
            f"ringside check: {family} served by {mechanism}, though this kernel has kprobes"
            for family, mechanism in mechanisms.items()
            if LAST_RESORT in mechanism
        ]
    return found


# --- tables


def cell(results: Sequence[Result]) -> str:
    """How one feature did on one kernel, in a few words."""
    if not results:
        return ""
    number = {verdict: sum(r.verdict is verdict for r in results) for verdict in Verdict}
    if number[Verdict.FAILED]:
        return f"{number[Verdict.FAILED]} of {len(results)} FAILED"
    if number[Verdict.NOT_THERE] == len(results):
        return Verdict.NOT_THERE.value
    missing = f", {number[Verdict.NOT_THERE]} not there" if number[Verdict.NOT_THERE] else ""
    return f"{number[Verdict.OK]} ok{missing}"


def tables(runs: Sequence[Run], *, each_test: bool = False) -> str:
    """Markdown: features by kernels, then what `ringside check` says that serves each family of events."""
    head = [run.kernel.name for run in runs]

    def row_of(result: Result) -> str:
        return result.test if each_test else result.feature

    def verdicts(bad: Callable[[Run], object]) -> list[str]:
        return ["FAILED" if bad(run) else "ok" for run in runs]

    names = dict.fromkeys(row_of(result) for run in runs for result in run.results)
    rows = [["boot", *verdicts(lambda run: not run.outcome)]]
    rows += [[name, *(cell([r for r in run.results if row_of(r) == name]) for run in runs)] for name in names]
    rows += [["kernel's messages", *verdicts(lambda run: run.outcome and run.outcome.complaints)]]
    rows += [["end", *verdicts(lambda run: run.problem)]]
    text = _markdown(["", *head], rows)
    served: dict[tuple[str, str], list[str]] = {}
    for family in dict.fromkeys(family for run in runs for family in run.mechanisms):
        for run in (run for run in runs if run.mechanisms):
            mechanism = run.mechanisms.get(family, "") or "nothing"
            served.setdefault((family, mechanism), []).append(run.kernel.name)
    if served:
        text += "\n" + _markdown(
            ["events", "served by", "on"], [[*k, ", ".join(v)] for k, v in served.items()]
        )
    return text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def tell(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.vm.run", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("-k", "--kernel", action="append", default=[], help="6.1, or a suite; again for more")
    parser.add_argument("--cgroup", choices=("v2", "v1"), default="v2", help="what /sys/fs/cgroup is inside")
    parser.add_argument("--results", type=Path, help="where the results go")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for each kernel")
    parser.add_argument(
        "--tests", action="append", default=[], metavar="TEST", help="instead of all live tests"
    )
    parser.add_argument("--each", action="store_true", help="a row for each test")
    parser.add_argument("--shell", metavar="SCRIPT", help="run this instead of tests")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- CMD", help="run this instead of tests"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.results or Path(tempfile.mkdtemp(prefix="ringside-vm-"))
    script = arguments.shell or shlex.join(arguments.command[1 if arguments.command[:1] == ["--"] else 0 :])

    folder.mkdir(parents=True, exist_ok=True)
    machine.check()
    chosen = selected(arguments.kernel)
    limits = (arguments.timeout, arguments.cgroup)
    turn = commands(script, *limits) if script else guest_tests(arguments.tests, *limits)
    runs = run_all(chosen, turn, folder, tell)
    for run in runs:
        if script and run.outcome:
            print(f"\n--- {run.kernel.release}\n{run.outcome.output}", end="")
        for failure in run.failures:
            print(f"\n--- {run.kernel.release}: {failure}")
    if not script:
        print(f"\n{tables(runs, each_test=arguments.each)}")
    print(f"results: {folder}")
    raise SystemExit(any(run.failures for run in runs))


if __name__ == "__main__":
    try:
        main()
    except (kernels.NoKernel, machine.NotBooted) as error:
        raise SystemExit(f"vm: {error}") from None
