"""Runs all suites, some side by side, and says at the end how many tests passed, failed and were skipped.

A suite is a tox environment. Its output goes to build/report/NAME.log; shown is what matters: all of it if
the suite failed, else the skips and pytest's closing line.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
REPORT = TOP / "build" / "report"
TOX = [sys.executable, "-m", "tox", "run"]
CHECKS = ("lint", "types", "api")  # no tests to count
# What is in one line runs one after the other. live measures times and docker shares the kernel with it: they
# aren't disturbed by more than one other suite.
LINES = (("live", "docker"), ("lint", "types", "api", "py", "asan", "vm"))
LIMIT = 40 * 60  # seconds for a suite; a hang is a failure
REQUIRED = set(os.environ.get("RINGSIDE_REQUIRE", "").replace(",", " ").split())
NO_TESTS = 5  # pytest's exit status, which tox passes on


@dataclass
class Result:
    name: str
    failed: bool
    seconds: float
    closing: str = ""
    counts: Counter[str] = field(default_factory=Counter)


def read(name: str, status: int, seconds: float, output: str) -> Result:
    """What a suite's output says; pytest's closing line has the counts."""
    result = Result(name, status != 0, seconds)
    closings = re.findall(r"^=+ (.+ in [\d.]+s.*?) =+$", output, re.MULTILINE)
    if name in CHECKS:
        result.counts["failed" if status else "passed"] = 1
        result.closing = "failed" if status else "ok"
        return result
    if closings:
        result.closing = closings[-1]
        for number, what in re.findall(
            r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed)\b", closings[-1]
        ):
            result.counts[{"error": "failed", "errors": "failed", "xfailed": "passed"}.get(what, what)] += (
                int(number)
            )
    if status == NO_TESTS:
        # nothing marked with this name: right only where nobody asked for it
        result.failed = name in REQUIRED
    if result.failed and not result.counts["failed"]:
        result.counts["failed"] = 1  # it didn't get as far as a test
        result.closing = result.closing or f"ended with status {status}"
    return result


async def command(log: Path, *arguments: str) -> int:
    """Run to the end or to the time limit, output into `log`; nothing that it started outlives it."""
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            cwd=TOP,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(LIMIT):
                return await process.wait()
        except TimeoutError:
            file.write(f"\nstopped after {LIMIT} seconds\n".encode())
            return 124
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            await process.wait()


def show(result: Result, output: str) -> None:
    """Print what matters of a suite that has ended."""
    print(f"\n--- {result.name}: {'FAILED' if result.failed else 'ok'}, {result.seconds:.0f} s")
    if result.failed:
        print(output)
    else:
        skips = [line for line in output.splitlines() if line.startswith("SKIPPED")]
        print("\n".join([*skips, f"{result.name}: {result.closing or 'no tests'}"]))
    sys.stdout.flush()


async def line(names: tuple[str, ...], results: list[Result]) -> None:
    for name in names:
        begin = time.monotonic()
        log = REPORT / f"{name}.log"
        status = await command(log, *TOX, "--skip-pkg-install", "-e", name)
        output = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
        result = read(name, status, time.monotonic() - begin, output)
        results.append(result)
        show(result, output)


async def main() -> int:
    names = sys.argv[1:] or [name for names in LINES for name in names]
    REPORT.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    log = REPORT / "setup.log"
    print(f"preparing {', '.join(names)}", flush=True)
    if status := await command(log, *TOX, "--notest", "-e", ",".join(names)):
        print(log.read_text(errors="replace"))
        print(f"0 passed, 1 failed, 0 skipped: the suites could not be set up (status {status})")
        return 1
    print(f"prepared in {time.monotonic() - begin:.0f} s", flush=True)
    results: list[Result] = []
    async with asyncio.TaskGroup() as group:
        for each in LINES:
            group.create_task(line(tuple(name for name in each if name in names), results))
    total: Counter[str] = Counter()
    print("\n=== suites")
    for result in results:
        total.update(result.counts)
        print(f"{'FAILED' if result.failed else 'ok':6}  {result.name:6}  {result.closing or 'no tests'}")
    print(f"\n{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", end="")
    print(f" in {time.monotonic() - begin:.0f} s, {len(results)} suites")
    return 1 if any(result.failed for result in results) else 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
