"""When events may be limited to containers' cgroups, from canned /proc trees."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ringside.sensor.cgroup import owner_of_cgroup
from ringside.sensor.container import ContainerTable
from ringside.sensor.container_filter import ContainerMatcher
from ringside.sensor.errors import SetupError
from ringside.sensor.procfs import Procfs
from ringside.sensor.scope import MOST_CONTAINERS, MOST_EVENTS, Scope

A, B = "a" * 64, "b" * 64


class Event:
    """Counts how often it is opened anew."""

    def __init__(self) -> None:
        self.times = 0

    def rescope(self) -> None:
        self.times += 1


class Machine:
    """A procfs, a unified hierarchy, and the scope over them."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.proc, self.mount = folder / "proc", folder / "cgroup"
        self.event = Event()
        rings: Any = SimpleNamespace(cpus=list(range(cpus)), open_events=[self.event])
        self.rings = rings
        self.scope = Scope(rings, Procfs(str(self.proc)), str(self.mount), owner_of_cgroup)

    def process(self, pid: int, path: str, v1: str = "", *, listed: bool = True) -> None:
        """A process in this cgroup of the unified hierarchy, with these lines for others."""
        folder, cgroup = self.proc / str(pid), self.mount / path.strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup").write_text(f"{v1}0::{path}\n")
        if listed:
            cgroup.mkdir(parents=True, exist_ok=True)
            with (cgroup / "cgroup.procs").open("a") as file:
                file.write(f"{pid}\n")

    def cgroups(self, *outputs: int) -> list[str]:
        return [path.removeprefix(str(self.mount)) for path in self.rings.scope(outputs)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_outermost_cgroup_of_a_container(machine: Machine) -> None:
    machine.process(10, f"/system.slice/docker-{A}.scope/init")
    machine.process(11, f"/system.slice/docker-{A}.scope/unit/deep")
    assert machine.scope.limit(1, {A: [10, 11]})
    assert machine.cgroups(1) == [f"/system.slice/docker-{A}.scope"]
    assert machine.event.times == 1


def test_everybody_who_wants_the_event_has_to_be_limited(machine: Machine) -> None:
    machine.process(10, f"/docker/{A}")
    machine.process(20, f"/docker/{B}")
    assert machine.cgroups(1) == []
    machine.scope.limit(1, {A: [10]})
    machine.scope.limit(2, {B: [20]})
    assert machine.cgroups(1) == [f"/docker/{A}"]
    assert machine.cgroups(1, 2) == [f"/docker/{A}", f"/docker/{B}"]
    assert machine.cgroups(1, 2, 3) == []
    machine.scope.forget(2)
    assert machine.cgroups(1, 2) == []


def test_a_container_in_a_container_is_not_told_of_twice(machine: Machine) -> None:
    machine.process(10, f"/docker/{A}")
    machine.process(20, f"/docker/{A}/docker/{B}")
    machine.scope.limit(1, {A: [10], B: [20]})
    assert machine.cgroups(1) == [f"/docker/{A}"]
    machine.scope.limit(2, {B: [20]})
    assert machine.cgroups(2) == [f"/docker/{A}/docker/{B}"]


@pytest.mark.parametrize(
    ("path", "v1"),
    [
        (f"/docker/{A}", f"4:memory:/docker/{A}\n"),  # moved in each by itself
        (f"/docker/{A}", f"4:memory:/docker/{B}\n"),
        (f"/docker/{A}", "6:perf_event:/\n"),
        ("/", ""),
        (f"/../{A}", ""),  # as a sensor in a cgroup namespace of its own sees it
        (f"/docker/{A} (deleted)", ""),
    ],
)
def test_what_forbids_it(machine: Machine, path: str, v1: str) -> None:
    machine.process(10, path, v1)
    assert not machine.scope.limit(1, {A: [10]})
    assert machine.cgroups(1) == []


def test_a_path_that_means_something_else_below_this_mount(machine: Machine) -> None:
    machine.process(10, f"/docker/{A}", listed=False)
    assert not machine.scope.limit(1, {A: [10]})
    (machine.mount / "docker" / A).mkdir(parents=True)
    (machine.mount / "docker" / A / "cgroup.procs").write_text("100\n")
    assert not machine.scope.limit(1, {A: [10]})


def test_v1_hierarchies_that_containers_are_not_in_do_not_matter(machine: Machine) -> None:
    machine.process(10, f"/docker/{A}", "4:memory:/\n1:name=systemd:/user.slice\n")
    assert machine.scope.limit(1, {A: [10]})


def test_a_container_with_two_cgroups_or_no_process(machine: Machine) -> None:
    machine.process(10, f"/docker/{A}")
    machine.process(11, f"/elsewhere/{A}")
    assert not machine.scope.limit(1, {A: [10, 11]})
    assert not machine.scope.limit(1, {A: []})
    assert not machine.scope.limit(1, {A: [99]})  # gone
    assert not machine.scope.limit(1, {})


def test_few_containers_and_few_cpus(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    ids = [f"{number:064x}" for number in range(MOST_CONTAINERS + 1)]
    for number, one in enumerate(ids, 10):
        machine.process(number, f"/docker/{one}")
    assert not machine.scope.limit(1, {one: [number] for number, one in enumerate(ids, 10)})
    for output, one in enumerate(ids):
        assert machine.scope.limit(output, {one: [10 + output]})
    assert len(machine.cgroups(*range(MOST_CONTAINERS))) == MOST_CONTAINERS
    assert machine.cgroups(*range(MOST_CONTAINERS + 1)) == []
    machine.rings.cpus = list(range(MOST_EVENTS))
    assert len(machine.cgroups(0)) == 1
    assert machine.cgroups(0, 1) == []


def test_widening(machine: Machine) -> None:
    machine.process(10, f"/docker/{A}")
    machine.process(20, f"/docker/{B}")
    machine.scope.limit(1, {A: [10]})
    machine.scope.limit(2, {A: [10], B: [20]})
    assert machine.scope.limited_to(B) == [2]
    assert machine.scope.limited_to_cgroup(f"/docker/{A}") == [1, 2]
    before = machine.event.times
    machine.scope.widen([2, 3])
    assert machine.event.times == before + 1
    machine.scope.widen([2])
    assert machine.event.times == before + 1, "nothing to do"
    assert (machine.cgroups(1), machine.cgroups(2)) == ([f"/docker/{A}"], [])
    assert machine.scope.has(1, A)
    assert not machine.scope.has(1, B)
    assert machine.scope.has(2, B)


def test_an_event_that_cannot_be_opened_anew_keeps_none_of_the_others(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    class Refused(Event):
        name = "refused"

        def rescope(self) -> None:
            raise SetupError("too few file descriptors", "more")

    machine.rings.open_events.insert(0, Refused())
    machine.process(10, f"/docker/{A}")
    assert machine.scope.limit(1, {A: [10]})
    machine.scope.widen([1])
    assert machine.event.times == 2
    assert "refused" in caplog.text


def test_a_process_that_came_by_another_cgroup(machine: Machine) -> None:
    machine.process(10, f"/docker/{A}")
    machine.scope.limit(1, {A: [10]})
    machine.process(11, f"/docker/{A}/below")
    machine.process(12, f"/elsewhere/{A}")
    machine.process(20, f"/elsewhere/{B}")
    assert not machine.scope.is_outside(11, A)
    assert machine.scope.is_outside(12, A)
    assert not machine.scope.is_outside(20, B), "nobody is limited to that"
    assert not machine.scope.is_outside(99, A), "gone"


def test_without_a_unified_hierarchy(machine: Machine) -> None:
    machine.process(10, f"/docker/{A}")
    scope = Scope(machine.rings, Procfs(str(machine.proc)), None, owner_of_cgroup)
    assert not scope.limit(1, {A: [10]})
    assert scope.cgroups([1]) == ()


def test_filters_that_no_other_container_can_come_to_fit() -> None:
    table = ContainerTable()
    table.seen(A, 1)
    for ids, meant in (([A], {A}), ([A.upper()], {A}), ([A[:12]], {A}), ([A, "mine_"], {A, "mine_"})):
        matcher = ContainerMatcher(ids)
        matcher.bind(table)
        assert matcher.definite() == meant
    unbound = ContainerMatcher([B[:12]])
    unbound.bind(table)
    assert unbound.definite() is None
    assert ContainerMatcher([A], names=["x"]).definite() is None
    assert ContainerMatcher([A], image_ids=[A]).definite() is None
    assert ContainerMatcher([A], image_names=["*"]).definite() is None
