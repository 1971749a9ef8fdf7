"""The container table: each transition once and in order, whatever the witnesses say and when."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import signal
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringside.sensor import container as container_module
from ringside.sensor.container import (
    DOCUMENT_LIMIT,
    Container,
    ContainerExit,
    ContainerState,
    ContainerTable,
    Document,
    Facts,
    Listing,
    Transition,
    exit_of,
    image_id_of,
)

UNKNOWN, CREATED, RUNNING, EXITED, DESTROYED = ContainerState
A, B, C = (digit * 64 for digit in "abc")
IMAGE = "d" * 64
NAMED = Facts(name="/web", image_name="nginx:1.27", image_id=IMAGE)
BORN = 1_000


class Watched(ContainerTable):
    """A table that writes down what it told."""

    def __init__(self, **options: Any) -> None:
        super().__init__(born_ns=BORN, **options)
        self.told: list[Transition] = []
        self.changed: list[Container] = []
        self.settled_ones: list[Container] = []
        self.on_transition.append(self.told.append)
        self.on_change.append(self.changed.append)
        self.on_settled.append(self.settled_ones.append)

    def kinds(self, container_id: str = A) -> list[ContainerState]:
        return [step.kind for step in self.told if step.container.id == container_id]


@pytest.fixture
def table() -> Watched:
    return Watched()


def test_a_whole_life(table: Watched) -> None:
    table.claim(A, "docker", Facts(name="/web", image_name="nginx:1.27"))
    table.created(A, "docker", 2_000, NAMED)
    table.running(A, "docker", 3_000, Facts(host_pid=42))
    table.exited(A, "docker", 4_000, Facts(exit_code=137))
    table.destroyed(A, "docker", 5_000)
    assert [(step.kind, step.time_ns, step.synthesized) for step in table.told] == [
        (CREATED, 2_000, False),
        (RUNNING, 3_000, False),
        (EXITED, 4_000, False),
        (DESTROYED, 5_000, False),
    ]
    created, running, exited, destroyed = (step.container for step in table.told)
    assert (created.name, created.image_id, created.image_name) == ("/web", IMAGE, "nginx:1.27")
    assert created.host_pid == 0
    assert running.host_pid == exited.host_pid == 42
    assert running.exit is None
    assert exited.exit == destroyed.exit == ContainerExit(137, 0, signal.SIGKILL, core_dumped=False)
    assert exited.name == destroyed.name == "/web"
    assert len(table) == 0
    gone = table.get(A)
    assert gone is not None
    assert gone.state is DESTROYED


def test_every_step_is_told_once(table: Watched) -> None:
    for _ in range(2):
        table.created(A, "docker", 2_000, NAMED)
    for _ in range(2):
        table.running(A, "docker", 3_000, Facts(host_pid=42))
    table.created(A, "docker", 3_500, NAMED)
    for _ in range(2):
        table.exited(A, "docker", 4_000, Facts(exit_code=0))
    for _ in range(2):
        table.destroyed(A, "docker", 5_000)
    table.running(A, "docker", 6_000)
    table.seen(A, 7_000)
    assert table.kinds() == [CREATED, RUNNING, EXITED, DESTROYED]
    assert A not in table


def test_a_restart_is_running_again(table: Watched) -> None:
    table.created(A, "docker", 2_000, NAMED)
    table.running(A, "docker", 3_000, Facts(host_pid=42))
    table.exited(A, "docker", 4_000, Facts(exit_code=1))
    table.running(A, "docker", 5_000)
    assert table.told[-1].container.host_pid == 0, "the old run's pid is not the new one's"
    assert table.told[-1].container.exit is None
    table.exited(A, "docker", 6_000, Facts(exit_code=2))
    assert table.kinds() == [CREATED, RUNNING, EXITED, RUNNING, EXITED]


def test_news_of_an_earlier_run_is_old_news(table: Watched) -> None:
    table.created(A, "docker", 2_000, NAMED)
    table.exited(A, "docker", 4_000, Facts(exit_code=0))
    table.running(A, "docker", 3_000)  # overtaken by its own end
    assert table.kinds() == [CREATED, RUNNING, EXITED]
    assert [step.synthesized for step in table.told] == [False, True, False]
    table.running(A, "docker", 6_000)
    table.exited(A, "docker", 5_000, Facts(exit_code=9))
    assert table.kinds() == [CREATED, RUNNING, EXITED, RUNNING]
    assert table.counts.stale == 2


def test_an_unheard_restart_shows_in_the_pid(table: Watched) -> None:
    table.created(A, "docker", 2_000, NAMED)
    table.running(A, "docker", 3_000, Facts(host_pid=42))
    table.running(A, "docker", 5_000, Facts(host_pid=43))
    assert table.kinds() == [CREATED, RUNNING, EXITED, RUNNING]
    assert table.told[2].synthesized
    assert table.told[2].container.exit is None, "nobody said how it ended"
    assert table.told[3].container.host_pid == 43


def test_what_never_ran_is_not_said_to_have_run(table: Watched) -> None:
    table.created(A, "docker", 2_000, NAMED)
    table.exited(A, "docker", 4_000, Facts(exit_code=127), ran=False)
    table.destroyed(A, "docker", 5_000)
    assert table.kinds() == [CREATED, EXITED, DESTROYED]


def test_a_life_of_which_only_the_end_was_heard(table: Watched) -> None:
    table.destroyed(A, "docker", 5_000, NAMED)
    table.exited(B, "docker", 5_000, NAMED)
    table.created(C, "docker", 5_000, NAMED)
    table.running(C, "docker", 6_000)
    table.destroyed(C, "docker", 7_000)
    assert table.kinds(A) == [CREATED, DESTROYED]
    assert table.kinds(B) == [CREATED, RUNNING, EXITED]
    assert table.kinds(C) == [CREATED, RUNNING, EXITED, DESTROYED]
    assert table.told[-2].synthesized


def test_what_was_there_before_the_sensor_is_known_without_events(table: Watched) -> None:
    table.listed(
        "docker",
        [
            Listing(A, RUNNING, Facts(name="/web", image_name="nginx", host_pid=42), created_ns=10),
            Listing(B, EXITED, Facts(name="/job", image_name="job", exit_code=3), created_ns=20),
            Listing(C, CREATED, Facts(name="/new", image_name="new"), created_ns=30),
        ],
        2_000,
    )
    assert table.told == []
    web, job = table.get(A), table.get(B)
    assert web is not None
    assert (web.state, web.host_pid) == (RUNNING, 42)
    assert job is not None
    assert job.exit == ContainerExit(3, 3, 0, core_dumped=False)
    assert table.settled(A)
    table.exited(A, "docker", 3_000, Facts(exit_code=0))
    table.running(C, "docker", 3_000)
    assert (table.kinds(A), table.kinds(C)) == ([EXITED], [RUNNING])


def test_a_new_list_brings_what_was_missed(table: Watched) -> None:
    restarted, stopped, removed, new, same = (digit * 64 for digit in "12345")
    table.listed(
        "docker",
        [
            Listing(each, RUNNING, Facts(name="/x", host_pid=pid), created_ns=10)
            for pid, each in enumerate((restarted, stopped, removed, same), start=40)
        ],
        2_000,
    )
    table.source_down("docker")
    table.listed(
        "docker",
        [
            Listing(restarted, RUNNING, Facts(host_pid=99), created_ns=10),
            Listing(stopped, EXITED, Facts(exit_code=137), created_ns=10),
            Listing(new, EXITED, Facts(exit_code=0), created_ns=2_500),
            Listing(same, RUNNING, Facts(host_pid=43), created_ns=10),
        ],
        3_000,
    )
    assert table.kinds(restarted) == [EXITED, RUNNING]
    assert table.kinds(stopped) == [EXITED]
    assert table.kinds(removed) == [EXITED, DESTROYED]
    assert table.kinds(new) == [CREATED, RUNNING, EXITED]
    assert table.kinds(same) == []
    assert all(step.synthesized for step in table.told)
    table.listed("docker", [Listing(same, RUNNING, Facts(host_pid=43), created_ns=10)], 4_000)
    table.listed("docker", [Listing(same, RUNNING, Facts(host_pid=43), created_ns=10)], 5_000)
    assert table.kinds(new) == [CREATED, RUNNING, EXITED, DESTROYED]


def test_a_list_does_not_explain_what_events_in_hand_will(table: Watched) -> None:
    for each in (A, B, C):
        table.created(each, "docker", 2_000, NAMED)
        table.running(each, "docker", 2_100, Facts(host_pid=5))
    table.destroyed(C, "docker", 2_200)
    table.listed(
        "docker",
        [Listing(C, RUNNING, Facts(host_pid=5), created_ns=2_000)],  # made before C was gone
        2_300,
        following=[A],
    )
    table.exited(A, "docker", 2_250, Facts(exit_code=7))
    table.destroyed(A, "docker", 2_260)
    assert table.kinds(A) == [CREATED, RUNNING, EXITED, DESTROYED]
    ended = table.told[-1].container.exit
    assert ended is not None
    assert ended.code == 7
    assert table.kinds(B) == [CREATED, RUNNING, EXITED, DESTROYED]
    assert table.kinds(C) == [CREATED, RUNNING, EXITED, DESTROYED]


def test_the_kernel_drives_what_no_engine_knows(table: Watched) -> None:
    table.seen(A, 2_000)
    table.seen(A, 2_001)
    assert table.settled(A)
    table.process_exited(77, 0x0B | 0x80, A)  # SIGSEGV, core dumped
    table.emptied(A, 3_000)
    table.seen(A, 4_000)
    table.emptied(A, 5_000)
    table.removed(A, 5_001)
    assert table.kinds() == [CREATED, RUNNING, EXITED, RUNNING, EXITED, DESTROYED]


def test_the_kernel_shows_a_container_before_its_engine_tells(table: Watched) -> None:
    asked: list[str] = []
    table.source_up("docker", asked.append)
    table.seen(A, 2_000)
    assert asked == [A]
    assert table.told == []
    assert not table.settled(A)
    table.created(A, "docker", 1_900, NAMED)
    assert table.settled(A)
    table.running(A, "docker", 2_100, Facts(host_pid=42))
    table.emptied(A, 2_200)
    table.removed(A, 2_300)
    assert table.kinds() == [CREATED, RUNNING], "the engine drives, and has not said that it ended"
    table.exited(A, "docker", 2_250, Facts(exit_code=0))
    assert table.kinds() == [CREATED, RUNNING, EXITED]


def test_a_container_waits_for_everybody_who_was_asked(table: Watched) -> None:
    table.source_up("docker", lambda _: None)
    table.source_up("podman", lambda _: None)
    table.seen(A, 2_000)
    table.seen(B, 2_000)
    table.disclaim(A, "docker")
    assert table.told == []
    table.disclaim(A, "podman")
    assert table.kinds(A) == [CREATED, RUNNING]
    table.disclaim(B, "podman")
    table.source_down("docker")
    assert table.kinds(B) == [CREATED, RUNNING]


def test_a_container_that_came_and_went_while_its_engine_was_asked(table: Watched) -> None:
    table.source_up("docker", lambda _: None)
    table.seen(A, 2_000)
    table.emptied(A, 2_100)
    table.removed(A, 2_200)
    assert table.told == []
    table.disclaim(A, "docker")
    assert table.kinds() == [CREATED, RUNNING, EXITED, DESTROYED]


def test_containers_found_at_start_are_no_events(table: Watched) -> None:
    table.seen(A, 2_000, existing=True)
    assert table.told == []
    table.emptied(A, 3_000)
    assert table.kinds() == [EXITED]


def test_begun_again_without_an_engine(table: Watched) -> None:
    """Each run's pid is asked for, and none is taken for the next one's; news come when it is known."""
    asked: list[str] = []
    table.source_up("disk", asked.append)
    for number, pid in enumerate((42, 43), start=1):
        table.seen(A, number * 2_000)
        assert asked == [A] * number
        assert RUNNING not in table.kinds()[3 * (number - 1) :]
        table.learn(A, "disk", Facts(host_pid=pid))
        table.disclaim(A, "disk")
        assert (table.told[-1].kind, table.told[-1].container.host_pid) == (RUNNING, pid)
        table.process_exited(pid, number << 8, A)
        table.process_exited(99, 9, A)
        table.emptied(A, number * 2_000 + 1_000)
        ended = table.told[-1].container.exit
        assert ended is not None
        assert ended.code == number
    assert table.kinds() == [CREATED, RUNNING, EXITED, RUNNING, EXITED]


def test_over_before_its_pid_was_found(table: Watched) -> None:
    asked: list[str] = []
    table.source_up("disk", asked.append)
    for run in range(2):
        table.seen(A, run * 1_000 + 2_000)
        table.process_exited(42, 3 << 8, A)
        table.emptied(A, run * 1_000 + 2_500)
        table.disclaim(A, "disk")
        assert table.kinds()[-2:] == [RUNNING, EXITED]
        assert table.told[-1].container.exit == ContainerExit(3, 3, 0, False)
    assert table.kinds() == [CREATED, RUNNING, EXITED, RUNNING, EXITED]


def test_an_engine_that_comes_later_takes_over(table: Watched) -> None:
    table.seen(A, 2_000, existing=True)
    table.seen(B, 2_000)
    table.listed(
        "docker",
        [
            Listing(A, RUNNING, Facts(name="/old", host_pid=5), created_ns=10),
            Listing(B, RUNNING, Facts(name="/new", host_pid=6), created_ns=1_900),
        ],
        3_000,
    )
    assert (table.kinds(A), table.kinds(B)) == ([], [CREATED, RUNNING])
    assert [(each.id, each.name, each.host_pid) for each in table] == [(A, "/old", 5), (B, "/new", 6)]
    table.emptied(A, 4_000)
    assert table.kinds(A) == []
    table.exited(A, "docker", 4_000, Facts(exit_code=1))
    assert table.kinds(A) == [EXITED]


def test_an_old_container_started_while_its_engine_was_asked_is_running_now(table: Watched) -> None:
    table.source_up("docker", lambda _: None)
    table.seen(A, 2_000)
    table.listed("docker", [Listing(A, RUNNING, Facts(name="/old", host_pid=5), created_ns=10)], 3_000)
    assert table.kinds() == [RUNNING]


def test_an_engine_given_up_leaves_its_containers_to_the_kernel(table: Watched) -> None:
    for each in (A, B):
        table.seen(each, 2_000)
        table.created(each, "docker", 2_000, NAMED)
        table.running(each, "docker", 2_100)
    table.source_down("docker")
    table.emptied(A, 3_000)
    assert table.kinds(A) == [CREATED, RUNNING]
    table.release("docker", 4_000)
    assert table.kinds(A) == [CREATED, RUNNING, EXITED]
    assert table.kinds(B) == [CREATED, RUNNING]
    table.emptied(B, 5_000)
    assert table.kinds(B) == [CREATED, RUNNING, EXITED]


def test_what_is_kept_on_disk_outlives_its_cgroup(table: Watched) -> None:
    table.source_up("disk", lambda each: table.learn(each, "disk", NAMED, persistent=True))
    table.seen(A, 2_000)
    table.disclaim(A, "disk")
    table.removed(A, 3_000)
    assert table.kinds() == [CREATED, RUNNING, EXITED]
    assert table.told[-1].container.name == "/web"
    table.gone(A, 4_000)
    assert table.kinds() == [CREATED, RUNNING, EXITED, DESTROYED]


def test_a_witness_that_does_not_drive_only_fills_gaps(table: Watched) -> None:
    table.created(A, "docker", 2_000, Facts(name="/web"))
    table.learn(A, "disk", Facts(name="moby/web", image_name="nginx", runtime="containerd"))
    web = table.get(A)
    assert web is not None
    assert (web.name, web.image_name, web.runtime) == ("/web", "nginx", "containerd")
    table.learn(A, "docker", Facts(name="/renamed"))
    assert [each.name for each in table.changed] == ["/web", "/web", "/renamed"]
    table.learn(B, "disk", NAMED)
    assert B not in table


def test_names_used_again_by_a_runtime_without_ids(table: Watched) -> None:
    for start in (2_000, 4_000):
        table.seen("web", start)
        table.removed("web", start + 500)
    assert table.kinds("web") == [CREATED, RUNNING, EXITED, DESTROYED] * 2


@pytest.mark.parametrize(
    ("code", "wait_status", "expected"),
    [
        (None, None, None),
        (0, None, (0, 0, 0, False)),
        (3, None, (3, 3, 0, False)),
        (128, None, (128, 128, 0, False)),
        (137, None, (137, 0, 9, False)),
        (143, None, (143, 0, 15, False)),
        (255, None, (255, 255, 0, False)),
        (-1, None, (-1, 0, 0, False)),
        (None, 9, (137, 0, 9, False)),
        (None, 3 << 8, (3, 3, 0, False)),
        (139, 11 | 0x80, (139, 0, 11, True)),
        (137, 137 << 8, (137, 137, 0, False)),  # the program itself exited with 137
        (0, 11, (0, 0, 0, False)),  # of another process: the engine counts
    ],
)
def test_how_a_container_ended(
    code: int | None, wait_status: int | None, expected: tuple[int, int, int, bool] | None
) -> None:
    assert exit_of(code, wait_status) == (None if expected is None else ContainerExit(*expected))


@pytest.mark.parametrize("pid_told", [True, False])
def test_core_dumps_come_from_the_kernel(table: Watched, pid_told: bool) -> None:
    table.created(A, "docker", 2_000, NAMED)
    table.process_exited(41, 9, A)
    table.process_exited(42, 11 | 0x80, A)  # all over before the engine says that it began
    table.running(A, "docker", 2_100, Facts(host_pid=42 if pid_told else 0))
    table.exited(A, "docker", 2_200, Facts(exit_code=139))
    ended = table.told[-1].container.exit
    assert ended is not None
    assert ended.core_dumped


def test_a_container_that_was_over_before_anybody_could_be_asked() -> None:
    """Engine and disk have no pid any more; the kernel has told of every process that ended in it."""

    def catch_up() -> None:
        for pid, status in ((40, 0), (41, 9), (42, 7 << 8)):  # the runtime's, another's, the first
            watched.process_exited(pid, status, A)

    watched = Watched(catch_up=catch_up)
    watched.created(A, "docker", 2_000, NAMED)
    watched.running(A, "docker", 2_100, NAMED)
    watched.exited(A, "docker", 2_200, Facts(exit_code=7))
    assert [step.container.host_pid for step in watched.told] == [0, 42, 42]
    assert watched.told[-1].container.exit == ContainerExit(7, 7, 0, False)


@pytest.mark.parametrize("occupied", [True, False])
def test_of_whom_it_is_not_sure_no_pid_is_told(table: Watched, occupied: bool) -> None:
    table.created(A, "docker", 2_000, NAMED)
    table.running(A, "docker", 2_100, NAMED)
    if occupied:
        table.seen(A, 2_050)
    table.process_exited(42, (7 if occupied else 8) << 8, A)
    table.exited(A, "docker", 2_200, Facts(exit_code=7))
    assert [step.container.host_pid for step in table.told] == [0, 0, 0]


def test_pids_find_their_container(table: Watched) -> None:
    table.created(A, "docker", 2_000, NAMED)
    table.running(A, "docker", 2_100, Facts(host_pid=42))
    table.process_exited(42, 11 | 0x80)
    table.process_exited(43, 0)
    table.exited(A, "docker", 2_200, Facts(exit_code=139))
    ended = table.told[-1].container.exit
    assert ended is not None
    assert ended.core_dumped


def test_documents_are_kept_small_and_bounded(table: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"Id": A, "Env": ["PATH=/bin"] * 1000, "Name": "/ü"}, ensure_ascii=False)
    document = Document.of(text)
    assert document is not None
    assert document.text() == text
    assert len(document.packed) < len(text) / 10
    assert Document.of(b"x" * (DOCUMENT_LIMIT + 1)) is None
    broken = Document.of(b"\xff{}")
    assert broken is not None
    assert broken.text() == "\N{REPLACEMENT CHARACTER}{}"

    monkeypatch.setattr(container_module, "DOCUMENTS_LIMIT", len(document.packed) + 1)
    table.created(A, "docker", 2_000, Facts(docker_config=document))
    table.created(B, "docker", 2_000, Facts(oci_config=document))
    assert [step.container.docker_config_json for step in table.told] == [text, ""]
    assert table.counts.documents_dropped == 1
    table.destroyed(A, "docker", 3_000)
    assert table.told[-1].container.docker_config_json == text
    table.learn(B, "docker", Facts(oci_config=document))
    told = table.get(B)
    assert told is not None
    assert told.oci_config_json == text, "there is room again"


def test_the_table_is_bounded() -> None:
    table = Watched(limit=10, remembered_destroyed=5)
    for number in range(50):
        table.created(f"{number:064x}", "docker", 2_000, NAMED)
    assert len(table) == 10
    assert table.counts.evicted == 40
    for number in range(40, 50):
        table.destroyed(f"{number:064x}", "docker", 3_000)
    assert len(table) == 0
    assert table.get(f"{44:064x}") is None
    assert table.get(f"{45:064x}") is not None
    for number in range(100):
        table.process_exited(number, 0, f"{number:064x}")


async def test_waiting_for_a_name(table: Watched) -> None:
    table.source_up("docker", lambda _: None)
    table.seen(A, 2_000)
    waiting = asyncio.ensure_future(table.named(A, within=60))
    await asyncio.sleep(0)
    assert not waiting.done()
    table.claim(A, "docker", Facts(name="/web", image_name="nginx"))
    await asyncio.sleep(0)
    assert not waiting.done(), "the image's id is still to come"
    table.created(A, "docker", 2_000, NAMED)
    found = await waiting
    assert found is not None
    assert found.name == "/web"
    assert [each.id for each in table.settled_ones] == [A]


async def test_waiting_ends(table: Watched) -> None:
    table.source_up("docker", lambda _: None)
    table.seen(A, 2_000)
    began = time.monotonic()
    found = await table.named(A, within=0.02)
    assert found is not None
    assert found.name == ""
    assert time.monotonic() - began < 5
    assert table._waiting == {}
    assert await table.named(C) is None
    waiting = asyncio.ensure_future(table.named(A, within=60))
    await asyncio.sleep(0)
    table.destroyed(A, "docker", 3_000)
    assert await waiting is not None


def test_prefixes(table: Watched) -> None:
    table.created("ab" + "0" * 62, "docker", 2_000)
    table.created("ab" + "1" * 62, "docker", 2_000)
    table.seen("abba", 2_000)
    assert len(table.with_prefix("ab")) == 2
    assert len(table.with_prefix("ab0")) == 1
    assert [each.id for each in table.with_prefix("abba")] == ["abba"]
    assert image_id_of("sha256:" + A) == image_id_of(A) == A


NEXT = {
    None: {CREATED},
    CREATED: {RUNNING, EXITED, DESTROYED},
    RUNNING: {EXITED},
    EXITED: {RUNNING, DESTROYED},
    DESTROYED: set[ContainerState](),
}
IDS = [A, B, C, "web"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3), st.integers(0, 40)), max_size=60))
def test_whatever_is_told_a_life_is_a_life(steps: list[tuple[int, int, int]]) -> None:
    table = Watched()
    now = BORN
    for what, which, jitter in steps:
        now += 10
        at = now - jitter  # news may be late
        each = IDS[which]
        facts = Facts(name=f"/{which}", host_pid=jitter % 3, exit_code=jitter)
        match what:
            case 0:
                table.created(each, "docker", at, facts)
            case 1 | 2:
                table.running(each, "docker", at, facts)
            case 3 | 4:
                table.exited(each, "docker", at, facts, ran=bool(jitter % 2))
            case 5:
                table.destroyed(each, "docker", at, facts)
            case 6 | 7:
                table.seen(each, at, existing=not jitter)
            case 8:
                table.emptied(each, at)
            case 9:
                table.removed(each, at)
            case 10:
                table.disclaim(each, "docker")
            case 11:
                table.source_up("docker", lambda _: None)
            case 12:
                table.source_down("docker")
            case 13:
                table.release("docker", at)
            case 14:
                table.learn(each, "disk", facts, persistent=bool(jitter % 2))
                table.gone(each, at)
            case 15:
                some = random.Random(jitter).sample(IDS[:3], which)
                states = (CREATED, RUNNING, EXITED)
                table.listed(
                    "docker",
                    [Listing(one, states[jitter % 3], facts, created_ns=BORN - 5 + jitter) for one in some],
                    at,
                )
    for each in IDS:
        told = [step for step in table.told if step.container.id == each]
        if not told:
            continue
        # A container from before may begin anywhere; names (not ids) live again.
        before = told[0].kind
        for step in told[1:]:
            again = before is DESTROYED and each == "web"
            assert step.kind in (NEXT[None] if again else NEXT[before]), [one.kind for one in told]
            before = step.kind
        for earlier, later in itertools.pairwise(told):
            assert earlier.time_ns <= later.time_ns or earlier.kind is DESTROYED
        for step in told:
            assert step.container.state is step.kind
            assert (step.container.exit is None) or step.kind in (EXITED, DESTROYED)
        now_known = table.get(each)
        assert now_known is not None
        if told[-1].kind is not DESTROYED:  # a name may be found again without an event
            assert now_known.state is told[-1].kind
    assert all(table.get(each_id) is not None for each_id in table._by_pid.values())
