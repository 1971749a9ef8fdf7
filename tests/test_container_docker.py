"""The engine source against an engine that does as the test says: well-behaved, broken, hanging, flooding."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from ringside.sensor.container import ContainerState, ContainerTable, Document, Facts, Transition
from ringside.sensor.docker import (
    DockerLimits,
    DockerSource,
    _event,
    _json,
    _listing,
    _text,
    _time_ns,
    engine_sockets,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

UNKNOWN, CREATED, RUNNING, EXITED, DESTROYED = ContainerState
A, B, C = (digit * 64 for digit in "abc")
IMAGE = "d" * 64
SECOND = 10**9

QUICK = DockerLimits(
    look=0.01,
    backoff_least=0.01,
    backoff_most=0.05,
    answer=2,
    patience=0.2,
    ping=60,
    drain=1,
    inspect_bytes=100_000,
)


def rfc3339(time_ns: int) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time_ns // SECOND))
    return f"{stamp}.{time_ns % SECOND:09}Z"


class Engine:
    """A stand-in for dockerd with the five requests that the source makes."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.containers: dict[str, dict[str, Any]] = {}
        self.log: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.filters = ""
        self.answers: dict[str, Callable[[web.Request], Any]] = {}
        self.subscribed = asyncio.Event()
        self.go_on = asyncio.Event()  # cleared, the stream of events stays silent
        self.go_on.set()
        self._stopping = asyncio.Event()
        self._streams: list[asyncio.Queue[bytes | None]] = []
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        self._stopping.clear()
        app = web.Application()
        app.router.add_get("/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.socket)).start()

    async def stop(self) -> None:
        self._stopping.set()
        for stream in self._streams:
            stream.put_nowait(None)
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.socket.unlink(missing_ok=True)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path.strip("/")
        self.requests.append(path)
        for key, answer in self.answers.items():
            if path == key or (key.endswith("*") and path.startswith(key[:-1])):
                response = answer(request)
                made: web.StreamResponse = await response if asyncio.iscoroutine(response) else response
                return made
        if path == "events":
            return await self._events(request)
        if path == "containers/json":
            wanted = json.loads(request.query.get("filters", "{}")).get("id")
            found = [self._summary(one) for one in self.containers if not wanted or one in wanted]
            return web.json_response(found)
        if path.startswith("containers/"):
            container = self.containers.get(path.split("/")[1])
            if container is None:
                return web.json_response({"message": "No such container"}, status=404)
            return web.json_response(container)
        return web.Response(text="OK")

    async def _events(self, request: web.Request) -> web.StreamResponse:
        self.filters = request.query.get("filters", "")
        response = web.StreamResponse()
        await response.prepare(request)
        stream: asyncio.Queue[bytes | None] = asyncio.Queue()
        since, until = (
            int(seconds) * SECOND + int(rest)
            for seconds, _, rest in (
                request.query.get(which, f"{1 << 62}.0").partition(".") for which in ("since", "until")
            )
        )
        if "until" not in request.query:
            await asyncio.sleep(0)
            await self.go_on.wait()
        for event in self.log:
            if since <= event["timeNano"] <= until:
                stream.put_nowait(json.dumps(event).encode() + b"\n")
        if "until" in request.query:
            stream.put_nowait(None)
        if "until" not in request.query:
            self._streams.append(stream)
            self.subscribed.set()
        with suppress(ConnectionResetError):
            while (line := await stream.get()) is not None:
                await response.write(line)
        if stream in self._streams:
            self._streams.remove(stream)
        return response

    async def hang(self, request: web.Request) -> web.Response:
        del request
        await self._stopping.wait()
        return web.Response()

    def send(self, raw: bytes) -> None:
        for stream in self._streams:
            stream.put_nowait(raw)

    def hang_up(self) -> None:
        for stream in self._streams:
            stream.put_nowait(None)

    def event(self, action: str, container_id: str, time_ns: int | None = None, **attributes: str) -> None:
        container = self.containers.get(container_id)
        if container:
            attributes = {"name": container["Name"][1:], "image": container["Config"]["Image"]} | attributes
        document = {
            "Type": "container",
            "Action": action,
            "Actor": {"ID": container_id, "Attributes": attributes},
            "timeNano": time_ns or time.time_ns(),
        }
        self.log.append(document)
        self.send(json.dumps(document).encode() + b"\n")

    def _summary(self, container_id: str) -> dict[str, Any]:
        container = self.containers[container_id]
        state = container["State"]
        return {
            "Id": container_id,
            "Names": [container["Name"]],
            "Image": container["Config"]["Image"],
            "ImageID": container["Image"],
            "Created": container["created_ns"] // SECOND,
            "State": state["Status"],
            "Status": f"Exited ({state['ExitCode']}) 3 seconds ago" if state["Status"] == "exited" else "Up",
        }

    # What a user of the engine does

    def create(self, container_id: str, name: str = "web", *, quiet: bool = False, old: bool = False) -> None:
        created = 1_600_000_000 * SECOND if old else time.time_ns()
        self.containers[container_id] = {
            "Id": container_id,
            "created_ns": created,
            "Created": rfc3339(created),
            "Name": f"/{name}",
            "Image": f"sha256:{IMAGE}",
            "Config": {"Image": "nginx:1.27"},
            "State": {"Status": "created", "Pid": 0, "ExitCode": 0, "StartedAt": "0001-01-01T00:00:00Z"},
        }
        if not quiet:
            self.event("create", container_id)

    def run(self, container_id: str, pid: int = 42, *, quiet: bool = False) -> None:
        state = self.containers[container_id]["State"]
        state |= {"Status": "running", "Pid": pid, "StartedAt": rfc3339(time.time_ns())}
        if not quiet:
            self.event("start", container_id)

    def end(self, container_id: str, code: int = 0, *, quiet: bool = False) -> None:
        self.containers[container_id]["State"] |= {"Status": "exited", "Pid": 0, "ExitCode": code}
        if not quiet:
            self.event("die", container_id, exitCode=str(code))

    def remove(self, container_id: str, *, quiet: bool = False) -> None:
        if not quiet:
            self.event("destroy", container_id)
        del self.containers[container_id]


class Watch:
    """The table's transitions, and a way to wait for them."""

    def __init__(self, table: ContainerTable) -> None:
        self.table = table
        self.told: list[Transition] = []
        self._news = asyncio.Event()
        table.on_transition.append(self._note)
        table.on_change.append(lambda _: self._news.set())
        table.on_settled.append(lambda _: self._news.set())

    def _note(self, transition: Transition) -> None:
        self.told.append(transition)
        self._news.set()

    def kinds(self, container_id: str = A) -> list[ContainerState]:
        return [step.kind for step in self.told if step.container.id == container_id]

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not done():
                self._news.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.01):  # some conditions are not the table's
                        await self._news.wait()

    async def until_kinds(self, kinds: list[ContainerState], container_id: str = A) -> None:
        try:
            await self.until(lambda: len(self.kinds(container_id)) >= len(kinds))
        finally:
            assert self.kinds(container_id) == kinds


@asynccontextmanager
async def running(source: DockerSource) -> AsyncIterator[None]:
    task = asyncio.create_task(source.run())
    try:
        yield
    finally:
        assert not task.done(), "the source never ends by itself"
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path / "docker.sock")


@pytest.fixture
def table() -> ContainerTable:
    return ContainerTable()


@pytest.fixture
async def started(engine: Engine) -> AsyncIterator[Engine]:
    await engine.start()
    yield engine
    await engine.stop()


def source_of(engine: Engine, table: ContainerTable, limits: DockerLimits = QUICK) -> DockerSource:
    return DockerSource(
        table,
        engine.socket,
        limits=limits,
        running_facts=lambda _: Facts(oci_config=Document.of('{"ociVersion":"1"}')),
    )


async def test_a_whole_life(started: Engine, table: ContainerTable) -> None:
    source, watch = source_of(started, table), Watch(table)
    async with running(source):
        await watch.until(lambda: source.connected)
        assert json.loads(started.filters)["type"] == ["container"]
        started.create(A)
        await watch.until_kinds([CREATED])
        started.run(A)
        await watch.until_kinds([CREATED, RUNNING])
        started.end(A, 137)
        started.remove(A)
        await watch.until_kinds([CREATED, RUNNING, EXITED, DESTROYED])
    created, ran, exited, destroyed = (step.container for step in watch.told)
    assert (created.name, created.image_name, created.image_id) == ("/web", "nginx:1.27", IMAGE)
    assert ran.host_pid == 42
    assert json.loads(ran.docker_config_json)["Id"] == A
    assert ran.oci_config_json == '{"ociVersion":"1"}'
    assert exited.exit is not None
    assert (exited.exit.code, exited.exit.signal) == (137, 9)
    assert destroyed.name == "/web"
    assert [step.time_ns for step in watch.told] == [event["timeNano"] for event in started.log]
    assert not any(step.synthesized for step in watch.told)


async def test_containers_from_before_are_known_without_events(
    started: Engine, table: ContainerTable
) -> None:
    source, watch = source_of(started, table), Watch(table)
    started.create(A, old=True, quiet=True)
    started.run(A, quiet=True)
    started.create(B, "job", old=True, quiet=True)
    async with running(source):
        await watch.until(lambda: bool((one := table.get(A)) and one.host_pid))
        assert watch.told == []
        started.end(A)
        await watch.until_kinds([EXITED])
        known = table.get(B)
        assert known is not None
        assert known.state is CREATED


async def test_a_socket_that_appears_later(engine: Engine, table: ContainerTable) -> None:
    source, watch = source_of(engine, table), Watch(table)
    async with running(source):
        table.seen(A, time.time_ns())
        await watch.until_kinds([CREATED, RUNNING])
        assert source.counts.failures == 0, "no engine is normal"
        engine.create(A, quiet=True)
        engine.run(A, quiet=True)
        await engine.start()
        await watch.until(lambda: source.connected)
        known = table.get(A)
        assert known is not None
        assert known.name == "/web"
        assert watch.kinds() == [CREATED, RUNNING]
    await engine.stop()


async def test_what_is_missed_while_the_engine_is_away(
    engine: Engine, table: ContainerTable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ringside.sensor.docker")
    source, watch = source_of(engine, table), Watch(table)
    await engine.start()
    async with running(source):
        await watch.until(lambda: source.connected)
        for each in (A, B, C):
            engine.create(each)
            engine.run(each)
        for each in (A, B, C):
            await watch.until_kinds([CREATED, RUNNING], each)
        await engine.stop()
        await watch.until(lambda: not source.connected)
        engine.log.clear()
        engine.end(A, 3, quiet=True)
        engine.remove(B, quiet=True)
        engine.run(C, pid=99, quiet=True)
        engine.create("e" * 64, "new", quiet=True)
        await engine.start()
        await watch.until_kinds([CREATED, RUNNING, EXITED])
        await watch.until_kinds([CREATED, RUNNING, EXITED, DESTROYED], B)
        await watch.until_kinds([CREATED, RUNNING, EXITED, RUNNING], C)
        await watch.until_kinds([CREATED], "e" * 64)
        ended = table.get(A)
        assert ended is not None
        assert ended.exit is not None
        assert ended.exit.code == 3
        engine.run("e" * 64)
        await watch.until_kinds([CREATED, RUNNING], "e" * 64)
    await engine.stop()
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1, [record.getMessage() for record in caplog.records]


async def test_events_missed_by_a_broken_connection_are_replayed(
    started: Engine, table: ContainerTable
) -> None:
    source, watch = source_of(started, table), Watch(table)
    async with running(source):
        await watch.until(lambda: source.connected)
        started.create(A)
        started.run(A)
        await watch.until_kinds([CREATED, RUNNING])
        started.hang_up()  # nothing that follows reaches this connection
        started.end(A, 1)
        started.run(A, pid=43)
        started.end(A, 2)
        await watch.until_kinds([CREATED, RUNNING, EXITED, RUNNING, EXITED])
        exits = [step.container.exit.code for step in watch.told if step.container.exit]
        assert exits == [1, 2]
        assert source.counts.connects == 2


async def test_events_that_come_after_the_list_they_came_before(
    started: Engine, table: ContainerTable
) -> None:
    source, watch = source_of(started, table), Watch(table)
    async with running(source):
        await watch.until(lambda: source.connected)
        started.create(A)
        await watch.until_kinds([CREATED])
        started.go_on.clear()
        started.hang_up()
        started.run(A)
        started.end(A, 1)
        started.run(A, pid=43)
        started.end(A, 2)
        await watch.until_kinds([CREATED, RUNNING, EXITED, RUNNING, EXITED])
        assert not any(step.synthesized for step in watch.told)
        started.go_on.set()
        started.remove(A)
        await watch.until_kinds([CREATED, RUNNING, EXITED, RUNNING, EXITED, DESTROYED])


async def test_a_list_younger_than_the_events_in_hand(started: Engine, table: ContainerTable) -> None:
    """All of it happens between the subscription and the list, which shows only the end."""
    source, watch = source_of(started, table), Watch(table)
    started.create(A, old=True, quiet=True)
    started.run(A, quiet=True)
    started.create(C, old=True, quiet=True)
    started.run(C, quiet=True)

    async def late(request: web.Request) -> web.Response:
        del request
        await started.subscribed.wait()
        del started.answers["containers/json"]
        started.end(A, 5)
        started.create(B)
        started.run(B)
        started.end(B, 6)
        started.end(C, 7)
        started.remove(C)
        return web.json_response([started._summary(one) for one in started.containers])

    started.answers["containers/json"] = late
    async with running(source):
        await watch.until_kinds([EXITED])
        await watch.until_kinds([CREATED, RUNNING, EXITED], B)
    codes = {step.container.id: step.container.exit.code for step in watch.told if step.container.exit}
    assert (codes[A], codes[B], codes[C]) == (5, 6, 7)


async def test_the_kernel_is_faster_than_the_engine(started: Engine, table: ContainerTable) -> None:
    source, watch = source_of(started, table), Watch(table)
    async with running(source):
        await watch.until(lambda: source.connected)
        started.create(A, quiet=True)
        started.run(A, quiet=True)
        table.seen(A, time.time_ns())
        found = await table.named(A, within=10)
        assert found is not None
        assert (found.name, found.image_id) == ("/web", IMAGE)
        table.seen(B, time.time_ns())
        table.seen("bare", time.time_ns())
        await watch.until_kinds([CREATED, RUNNING], B)
        assert watch.kinds("bare") == [CREATED, RUNNING]
        await watch.until_kinds([CREATED, RUNNING])
        started.event("create", A)
        started.event("start", A)
        started.end(A)
        await watch.until_kinds([CREATED, RUNNING, EXITED])


async def test_asked_while_connecting(engine: Engine, table: ContainerTable) -> None:
    source, watch = source_of(engine, table), Watch(table)
    engine.create(A, quiet=True)
    engine.run(A, quiet=True)
    go_on = asyncio.Event()

    async def late(request: web.Request) -> web.Response:
        del request
        await go_on.wait()
        del engine.answers["containers/json"]
        return web.json_response([engine._summary(A)])

    engine.answers["containers/json"] = late
    await engine.start()
    async with running(source):
        await watch.until(lambda: "containers/json" in engine.requests)
        table.seen(A, time.time_ns())
        table.seen(B, time.time_ns())
        assert not table.settled(A)
        go_on.set()
        await watch.until_kinds([CREATED, RUNNING])
        await watch.until_kinds([CREATED, RUNNING], B)
        first = next(step.container for step in watch.told if step.container.id == A)
        assert first.name == "/web"
    await engine.stop()


async def test_a_container_gone_before_it_is_looked_at(started: Engine, table: ContainerTable) -> None:
    source, watch = source_of(started, table), Watch(table)
    async with running(source):
        await watch.until(lambda: source.connected)
        for action in ("create", "start"):
            started.event(action, A, name="blink", image="busybox")
        started.event("die", A, name="blink", image="busybox", exitCode="0")
        started.event("destroy", A, name="blink", image="busybox")
        await watch.until_kinds([CREATED, RUNNING, EXITED, DESTROYED])
        assert {step.container.name for step in watch.told} == {"/blink"}
        assert {step.container.image_name for step in watch.told} == {"busybox"}


async def test_a_container_that_could_not_be_started(started: Engine, table: ContainerTable) -> None:
    source, watch = source_of(started, table), Watch(table)
    async with running(source):
        await watch.until(lambda: source.connected)
        started.create(A)
        started.end(A, 127)
        await watch.until_kinds([CREATED, EXITED])


async def test_a_rename(started: Engine, table: ContainerTable) -> None:
    source, watch = source_of(started, table), Watch(table)
    async with running(source):
        await watch.until(lambda: source.connected)
        started.create(A)
        started.event("rename", A, name="shop", oldName="/web")
        await watch.until(lambda: bool((one := table.get(A)) and one.name == "/shop"))


async def test_documents_of_ten_megabytes(started: Engine, table: ContainerTable) -> None:
    source, watch = source_of(started, table), Watch(table)
    huge = json.dumps({"Id": A, "Labels": "x" * 10_000_000}).encode()
    started.answers[f"containers/{A}/json"] = lambda _: web.Response(
        body=huge, content_type="application/json"
    )
    started.create(B, "other", quiet=True)
    async with running(source):
        await watch.until(lambda: source.connected)
        started.create(A)
        started.run(A)
        await watch.until_kinds([CREATED, RUNNING])
        known = table.get(A)
        assert known is not None
        assert (known.name, known.image_id, known.docker_config_json) == ("/web", IMAGE, "")
        assert source.counts.oversized == 2
        started.send(b'{"x":"' + b"y" * 3_000_000)
        started.send(b'"}\n')
        started.end(A)
        await watch.until_kinds([CREATED, RUNNING, EXITED])
        assert source.counts.oversized == 3
        assert source.counts.connects == 1


async def test_an_endless_answer(started: Engine, table: ContainerTable) -> None:
    source, watch = source_of(started, table), Watch(table)

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with suppress(ConnectionResetError):
            while True:
                await response.write(b"x" * 65536)
        return response

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started.answers["containers/json"] = endless
    async with running(source):
        await watch.until(lambda: source.counts.failures >= 2)
        del started.answers["containers/json"]
        await watch.until(lambda: source.connected)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


NONSENSE = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b'"text"',
    b"[" * 100_000,
    b'[{"Id": 5}, null, {"Id": "zz"}]',
    b"\xff\xfe\x00",
    b'{"message":"what"}',
]


@pytest.mark.parametrize("body", NONSENSE)
@pytest.mark.parametrize("path", ["containers/json", f"containers/{A}/json", "events"])
async def test_an_engine_that_talks_nonsense(
    started: Engine, table: ContainerTable, path: str, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    source, watch = source_of(started, table), Watch(table)
    started.answers[path] = lambda _: web.Response(body=body)
    async with running(source):
        await watch.until(lambda: source.connected or source.counts.failures > 3)
        started.create(A)
        await watch.until(lambda: bool(watch.told) or source.counts.failures > 3)
        del started.answers[path]
        await watch.until(lambda: source.connected)
        started.create(B)
        await watch.until_kinds([CREATED], B)
        await watch.until_kinds([CREATED], A)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) <= 1, [record.getMessage() for record in warnings]
    assert not any(record.exc_info for record in warnings)


@pytest.mark.parametrize("status", [400, 404, 500])
async def test_an_engine_that_refuses(started: Engine, table: ContainerTable, status: int) -> None:
    source, watch = source_of(started, table), Watch(table)
    started.answers["*"] = lambda _: web.Response(status=status, body=b"no" * 100_000)
    async with running(source):
        await watch.until(lambda: source.counts.failures > 2)
        table.seen(A, time.time_ns())
        assert watch.kinds() == [CREATED, RUNNING], "an engine that failed is not waited for"


@pytest.mark.parametrize("path", ["events", "containers/json", "*"])
async def test_an_engine_that_hangs(
    started: Engine, table: ContainerTable, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    limits = DockerLimits(look=0.01, backoff_least=0.01, backoff_most=0.02, answer=0.1, patience=0.1)
    source, watch = source_of(started, table, limits), Watch(table)

    started.answers[path] = started.hang
    async with running(source):
        table.seen(A, time.time_ns())
        await watch.until_kinds([CREATED, RUNNING])
        await watch.until(lambda: source.counts.failures > 1)
        started.answers.clear()
        await watch.until(lambda: source.connected)
    assert len(caplog.records) == 1
    assert "no answer within 0.1 s" in caplog.text


async def test_an_engine_that_hangs_later_is_found_out(started: Engine, table: ContainerTable) -> None:
    limits = DockerLimits(look=0.01, backoff_least=0.01, answer=0.1, ping=0.05)
    source, watch = source_of(started, table, limits), Watch(table)

    async with running(source):
        await watch.until(lambda: source.connected)
        started.answers["_ping"] = started.hang
        await watch.until(lambda: source.counts.failures == 1)
        del started.answers["_ping"]
        await watch.until(lambda: source.connected)


async def test_a_container_whose_inspection_hangs_delays_nobody_else(
    started: Engine, table: ContainerTable
) -> None:
    source, watch = source_of(started, table), Watch(table)
    go_on = asyncio.Event()

    async def late(request: web.Request) -> web.Response:
        del request
        await go_on.wait()
        return web.json_response(started.containers[A])

    started.answers[f"containers/{A}/json"] = late
    async with running(source):
        await watch.until(lambda: source.connected)
        started.create(A)
        started.run(A)
        started.create(B)
        started.run(B)
        await watch.until_kinds([CREATED, RUNNING], B)
        assert watch.kinds(A) == []
        waiting = table.get(A)
        assert waiting is not None
        assert waiting.name == "/web", "known from the event"
        go_on.set()
        await watch.until_kinds([CREATED, RUNNING], A)


async def test_a_flood_of_events_is_bounded(started: Engine, table: ContainerTable) -> None:
    limits = DockerLimits(look=0.01, backoff_least=0.01, answer=5, events=100)
    source, watch = source_of(started, table, limits), Watch(table)
    hold = asyncio.Event()

    async def late(request: web.Request) -> web.Response:
        await hold.wait()
        return web.json_response(started.containers[request.path.split("/")[2]])

    async with running(source):
        await watch.until(lambda: source.connected)
        started.answers["containers/*"] = late
        ids = [f"{number:064x}" for number in range(150)]
        for each in ids:
            started.create(each)
        await watch.until(lambda: source.counts.overflows == 1)
        assert source._in_hand_count <= 101
        started.answers.clear()
        hold.set()
        started.log.clear()
        for each in ids:
            await watch.until_kinds([CREATED], each)


async def test_a_socket_that_is_no_socket(tmp_path: Path, table: ContainerTable) -> None:
    path = tmp_path / "docker.sock"
    path.write_text("not a socket")
    source, watch = DockerSource(table, path, limits=QUICK), Watch(table)
    async with running(source):
        await watch.until(lambda: source.counts.failures > 1)


async def test_an_engine_given_up(engine: Engine, table: ContainerTable) -> None:
    source, watch = source_of(engine, table), Watch(table)
    await engine.start()
    async with running(source):
        await watch.until(lambda: source.connected)
        engine.create(A)
        engine.run(A)
        await watch.until_kinds([CREATED, RUNNING])
        table.seen(A, time.time_ns())
        await engine.stop()
        await watch.until(lambda: not source.connected)
        table.emptied(A, time.time_ns())
        await watch.until_kinds([CREATED, RUNNING, EXITED])
    await engine.stop()


def test_where_engines_listen(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "var").mkdir()
    (tmp_path / "var/run").symlink_to(tmp_path / "run")
    assert engine_sockets(tmp_path) == [
        ("docker", tmp_path / "run/docker.sock"),
        ("podman", tmp_path / "run/podman/podman.sock"),
    ]
    (tmp_path / "var/run").unlink()
    assert ("docker", tmp_path / "var/run/docker.sock") in engine_sockets(tmp_path)


def test_names_of_any_characters() -> None:
    assert _text({"a": "\ud800x"}, "a") == "?x"
    assert _text({"a": "n" * 10_000}, "a") == "n" * 4096
    assert _text({"a": 5}, "a") == _text([], "a") == _text({"a": []}, "a", "b") == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-02T03:04:05.000000006Z", 1767323045000000006),
        ("2026-01-02T03:04:05Z", 1767323045000000000),
        ("2026-01-02T04:04:05.5+01:00", 1767323045500000000),
        ("0001-01-01T00:00:00Z", 0),
        ("", 0),
        ("yesterday", 0),
        ("2026-13-02T03:04:05Z", 0),
    ],
)
def test_times(text: str, expected: int) -> None:
    assert _time_ns(text) == expected


def test_events() -> None:
    actor = {"ID": A, "Attributes": {"name": "x", "image": "y", "exitCode": "12345678901"}}
    good = {"Type": "container", "Action": "die", "Actor": actor, "timeNano": 5}
    event = _event(good)
    assert event is not None
    assert event.facts == Facts(name="/x", image_name="y")
    assert (other := _event(good | {"Action": "exec_start: ls"})) is not None
    assert other.action == ""
    unfit: tuple[object, ...] = (
        None,
        [],
        {},
        *(good | one for one in ({"timeNano": "5"}, {"timeNano": True})),
    )
    for bad in (*unfit, good | {"Actor": []}):
        assert _event(bad) is None
    assert _json(b"[" * 100_000) is None


def test_listings() -> None:
    entry = {"Id": A, "Names": ["/other/alias", "/web"], "State": "exited", "Status": "Exited (3) 2 days ago"}
    listing = _listing(entry)
    assert listing is not None
    assert (listing.facts.name, listing.facts.exit_code, listing.state) == ("/web", 3, EXITED)
    assert _listing(entry | {"State": "confused"}) is None
    assert _listing(entry | {"Names": None}) is not None
    assert _listing(entry | {"Names": [5]}) is not None
