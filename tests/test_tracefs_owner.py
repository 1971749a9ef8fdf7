"""Owners: told by their group, alive or dead as seen from one pid namespace or another."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.sensor.tracefs.owner import Life, Owner

FIRST = 0xEFFFFFFC
INNER = 4026532500


def process(
    proc: Path,
    pid: int,
    start: int,
    *,
    namespace: int | None = FIRST,
    inner_pid: int | None = None,
    state: str = "S",
    threads: int = 1,
    clock: int = 4026531834,
) -> Path:
    """A process in a fake /proc."""
    directory = proc / str(pid)
    (directory / "ns").mkdir(parents=True)
    if namespace is not None:
        (directory / "ns" / "pid").symlink_to(f"pid:[{namespace}]")
    (directory / "ns" / "time").symlink_to(f"time:[{clock}]")
    for thread in range(threads):
        (directory / "task" / str(pid + thread)).mkdir(parents=True)
    (directory / "stat").write_text(f"{pid} (a) b (c) {state} " + "0 " * 18 + f"{start} 0 0\n")
    (directory / "status").write_text(
        f"Name:\ta) b\nNSpid:\t{pid}" + (f"\t{inner_pid}" if inner_pid else "") + "\n"
    )
    return directory


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Ours is process 50, in the first pid namespace."""
    process(tmp_path, 1, 5)
    process(tmp_path, 50, 600)
    (tmp_path / "self").symlink_to("50")
    return tmp_path


def test_this_process() -> None:
    owner = Owner.current()
    assert owner.pid == os.getpid()
    assert owner.start > 0
    assert owner.namespace > 0
    assert owner.life() is Life.ALIVE
    assert Owner(owner.namespace, owner.pid, owner.start - 1).life() is Life.DEAD
    assert Owner.of_group(owner.group) == owner


@given(st.integers(0, 2**32), st.integers(1, 2**22), st.integers(0, 2**53))
def test_group_tells_the_owner(namespace: int, pid: int, start: int) -> None:
    owner = Owner(namespace, pid, start)
    assert re.fullmatch("[a-z][a-z0-9_]{0,62}", owner.group)
    assert Owner.of_group(owner.group) == owner
    assert Owner.of_group(owner.group + "_12") == owner  # an instance's name
    assert len(owner.name("accept_result", 10**9)) <= 63


@pytest.mark.parametrize(
    "group", ["kprobes", "ringside", "ringside_1_2", "ringside_x_1_2", "my_ringside_1_2_3", ""]
)
def test_groups_of_others(group: str) -> None:
    assert Owner.of_group(group) is None


def test_names_of_two_sensors_differ() -> None:
    """Two containers' sensors may both be process 1, started in the same tick."""
    assert Owner(1, 1, 1).name("open", 0) != Owner(2, 1, 1).name("open", 0)


def test_alive_and_dead(proc: Path) -> None:
    assert Owner(FIRST, 50, 600).life(proc) is Life.ALIVE
    assert Owner(FIRST, 50, 601).life(proc) is Life.DEAD
    assert Owner(FIRST, 51, 600).life(proc) is Life.DEAD


def test_a_zombie_is_dead_unless_threads_of_it_run(proc: Path) -> None:
    process(proc, 70, 700, state="Z")
    process(proc, 80, 800, state="Z", threads=2)
    assert Owner(FIRST, 70, 700).life(proc) is Life.DEAD
    assert Owner(FIRST, 80, 800).life(proc) is Life.ALIVE


def test_in_a_container_below(proc: Path) -> None:
    process(proc, 300, 900, namespace=INNER, inner_pid=1)
    assert Owner(INNER, 1, 900).life(proc) is Life.ALIVE
    assert Owner(INNER, 1, 901).life(proc) is Life.DEAD
    assert Owner(INNER, 2, 900).life(proc) is Life.DEAD
    assert Owner(INNER + 1, 1, 900).life(proc) is Life.DEAD


def test_a_process_that_may_be_it_but_cannot_be_looked_at(proc: Path) -> None:
    process(proc, 300, 900, namespace=None, inner_pid=1)
    assert Owner(INNER, 1, 900).life(proc) is Life.UNKNOWN


def test_seen_from_a_container(tmp_path: Path) -> None:
    """Who is not seen there may live outside."""
    process(tmp_path, 1, 900, namespace=INNER)
    assert Owner(INNER, 1, 900).life(tmp_path) is Life.ALIVE
    assert Owner(INNER, 2, 900).life(tmp_path) is Life.DEAD
    assert Owner(FIRST, 1, 900).life(tmp_path) is Life.UNKNOWN
    assert Owner(INNER + 1, 1, 900).life(tmp_path) is Life.UNKNOWN


def test_another_time_namespace_shifts_the_start_time(proc: Path) -> None:
    process(proc, 90, 12345, clock=4026539999)
    assert Owner(FIRST, 90, 600).life(proc) is Life.ALIVE


def test_without_a_namespace_nothing_is_known(proc: Path, tmp_path: Path) -> None:
    assert Owner(0, 50, 600).life(proc) is Life.UNKNOWN
    assert Owner(FIRST, 50, 600).life(tmp_path / "nothing") is Life.UNKNOWN


def test_a_stat_of_another_shape(proc: Path) -> None:
    (process(proc, 60, 1) / "stat").write_text("60 (x) S 1\n")
    assert Owner(FIRST, 60, 1).life(proc) is Life.UNKNOWN
