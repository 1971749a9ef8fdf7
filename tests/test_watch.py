"""`watch`, its standard output, and against a service of our own that plays the sensor."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pty
import re
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import betterproto2
import pytest
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server
from ringside.api.v0 import (
    GetEventsRequest,
    GetEventsResponse,
    Subscription,
)
from ringside.client import builders
from ringside.sensor.service import SERVICE, BytesCodec
from ringside.sensor.subscription import Code, Loss, make_status
from ringside.sensor.watch import Output

from .support.told import COMMAND, DEADLINE, ENVIRONMENT, OPENAT, enter, leave, telemetry

# --- standard output


async def test_a_slow_reader_does_not_stop_the_loop() -> None:
    """The sensor in this process has to read its rings meanwhile."""
    reader, writer = os.pipe()
    data = os.urandom(1 << 20)  # more than a pipe takes
    try:
        writing = asyncio.ensure_future(Output(writer).write(data))
        turns = 0
        while not writing.done() and turns < 100:
            await asyncio.sleep(0)
            turns += 1
        assert not writing.done()
        found = b""
        while len(found) < len(data):
            found += await asyncio.to_thread(os.read, reader, 1 << 16)
        await writing
        assert found == data
    finally:
        os.close(reader)
        os.close(writer)


async def test_no_line_is_left_half_written() -> None:
    """An interrupt comes when it comes."""
    reader, writer = os.pipe()
    line = b"x" * 5000 + b"\n"
    try:
        writing = asyncio.ensure_future(Output(writer).write(line * 100))
        await asyncio.sleep(0)  # the pipe is full now, of lines and a part of one
        os.read(reader, 8192)  # one page is free again
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        os.close(writer)
        writer = -1
        found = b""
        while chunk := os.read(reader, 1 << 16):
            found += chunk
        assert found.endswith(line)
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


async def test_a_closed_reader_breaks_the_pipe() -> None:
    reader, writer = os.pipe()
    output = Output(writer)
    try:
        writing = asyncio.ensure_future(output.write(bytes(1 << 20)))
        await asyncio.sleep(0)
        os.close(reader)
        with pytest.raises(BrokenPipeError):
            await writing
        assert output.broken
    finally:
        os.close(writer)


async def test_files_are_written_at_once(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        await Output(file.fileno()).write(bytes(1 << 20))
    assert (tmp_path / "out").stat().st_size == 1 << 20


# --- a service that plays the sensor

LIVE = GetEventsResponse(statuses=[make_status(Code.OK, "subscribed")])
Answer = betterproto2.Message | bytes


class Played:
    """Answers each subscription with these responses, then with an error if there is one, else the end."""

    def __init__(self, *answers: Answer, error: GRPCError | None = None, endless: bool = False) -> None:
        self.answers = answers
        self.error = error
        self.endless = endless
        self.subscriptions: list[Subscription | None] = []

    async def get_events(self, stream: Any) -> None:
        self.subscriptions.append(GetEventsRequest.parse(await stream.recv_message()).subscription)
        for answer in self.answers:
            await stream.send_message(bytes(answer))
        while self.endless:
            await stream.send_message(bytes(self.answers[-1]))
            await asyncio.sleep(0)  # a lost connection wants to be noticed
        if self.error is not None:
            raise self.error

    def __mapping__(self) -> Mapping[str, Handler]:
        return {f"/{SERVICE}/GetEvents": Handler(self.get_events, Cardinality.UNARY_STREAM, bytes, bytes)}


@asynccontextmanager
async def serving(path: Path, played: Played) -> AsyncIterator[str]:
    server = Server([played], codec=BytesCodec())
    await server.start(path=str(path))
    try:
        yield f"unix:{path}"
    finally:
        server.close()
        await server.wait_closed()


@dataclasses.dataclass
class Ended:
    status: int | None
    out: str
    err: str


async def watch(address: str, *arguments: str) -> Ended:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "watch", "--connect", address, *arguments, stdout=-1, stderr=-1, env=ENVIRONMENT
    )
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    return Ended(process.returncode, out.decode(), err.decode())


SOME = GetEventsResponse(events=[telemetry(enter(OPENAT, 1)), telemetry(leave(OPENAT, 3))])


async def test_watch_by_a_service(tmp_path: Path) -> None:
    played = Played(LIVE, SOME, SOME)
    async with serving(tmp_path / "s", played) as address:
        ended = await watch(
            address, "syscall:openat:both", "--limit", "9", "--for", "1m", "--since", "2s", "--image", "x*"
        )
    assert played.subscriptions == [
        builders.events(builders.syscalls("openat", on="both"), limit=9, duration=60, since=2, image="x*")
    ]
    assert ended.status == 0
    header, *found = ended.out.splitlines()
    assert "CONTAINER" in header  # since containers were asked for
    assert [line.split()[1].partition("(")[0] for line in found] == ["openat"] * 4
    assert re.fullmatch(r"4 events in \d+\.\d s, [\d.,]+ a second, none lost\n", ended.err)


@pytest.mark.parametrize(
    ("word", "container", "container_id"),
    [("web*", "web*", ()), ("c0ffee123456", "c0ffee123456", "c0ffee123456"), ("c0" * 32, (), "c0" * 32)],
)
async def test_watch_a_container(tmp_path: Path, word: str, container: str, container_id: str) -> None:
    """A name, what may be either, and a whole id, which is no name."""
    played = Played(LIVE, SOME)
    async with serving(tmp_path / "s", played) as address:
        assert (await watch(address, "syscall:openat", "--container", word)).status == 0
    wanted = builders.events(builders.syscalls("openat"), container=container, container_id=container_id)
    assert played.subscriptions == [wanted]


async def test_watch_in_json(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", Played(LIVE, SOME)) as address:
        ended = await watch(address, "syscall:openat:both", "--json")
    found = [json.loads(line)["event"]["syscall"] for line in ended.out.splitlines()]
    assert [one["type"] for one in found] == ["SYSCALL_EVENT_TYPE_ENTER", "SYSCALL_EVENT_TYPE_EXIT"]
    assert found[1]["ret"] == 3
    assert ended.status == 0


async def test_watch_quiet(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", Played(LIVE, *[SOME] * 50)) as address:
        ended = await watch(address, "syscall", "--quiet")
    assert (ended.status, ended.out) == (0, "")
    assert ended.err.startswith("100 events in ")


@pytest.mark.parametrize(
    ("at_most", "words"), [(True, "a second, up to 1,234 LOST"), (False, "a second, 1,234 LOST")]
)
async def test_losses_are_counted_and_other_statuses_told(tmp_path: Path, at_most: bool, words: str) -> None:
    lost = [
        GetEventsResponse(statuses=[Loss("the ring was full", count, 1, 2, bound).status()])
        for count, bound in ((1000, False), (234, at_most))
    ]
    refused = make_status(Code.FAILED_PRECONDITION, "no kprobes\x1b[0m here", "FILTER_NOT_SERVED")
    live = GetEventsResponse(statuses=[*LIVE.statuses, refused])
    async with serving(tmp_path / "s", Played(live, lost[0], SOME, lost[1])) as address:
        ended = await watch(address, "syscall", "--quiet")
    warning, closing = ended.err.splitlines()
    assert warning == r"ringside: warning: no kprobes\x1b[0m here"
    assert closing.endswith(words)
    assert ended.status == 0


async def test_a_refusal_is_a_line(tmp_path: Path) -> None:
    error = GRPCError(Status.INVALID_ARGUMENT, "subscription.x: makes no sense")
    async with serving(tmp_path / "s", Played(error=error)) as address:
        ended = await watch(address, "ticker")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err == "ringside: INVALID_ARGUMENT: subscription.x: makes no sense\n"


async def test_a_sensor_that_stops_is_told_after_the_count(tmp_path: Path) -> None:
    error = GRPCError(Status.UNAVAILABLE, "the sensor is shutting down")
    async with serving(tmp_path / "s", Played(LIVE, SOME, error=error)) as address:
        ended = await watch(address, "syscall", "--quiet")
    closing, complaint = ended.err.splitlines()
    assert closing.startswith("2 events in")
    assert complaint == "ringside: the sensor is shutting down"
    assert ended.status == 1


@pytest.mark.parametrize("form", [[], ["--json"], ["--quiet"]])
async def test_what_can_not_be_read_is_a_line(tmp_path: Path, form: list[str]) -> None:
    async with serving(tmp_path / "s", Played(LIVE, b"\x0a\xff\xff")) as address:
        ended = await watch(address, "syscall", *form)
    assert "ringside: the sensor's answer can't be read" in ended.err.splitlines()[-1]
    assert ended.status == 1


async def test_head_has_seen_enough(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", Played(LIVE, SOME, endless=True)) as address:
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            "watch",
            "--connect",
            address,
            "syscall",
            "--json",
            stdout=-1,
            stderr=-1,
            env=ENVIRONMENT,
        )
        assert process.stdout
        assert process.stderr
        await asyncio.wait_for(process.stdout.readline(), DEADLINE)
        process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        assert await asyncio.wait_for(process.stderr.read(), DEADLINE) == b""
        assert await process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupt_ends_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    async with serving(tmp_path / "s", Played(LIVE, SOME, endless=True)) as address:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "watch", "--connect", address, "syscall", stdout=-1, stderr=-1, env=ENVIRONMENT
        )
        assert process.stdout
        await asyncio.wait_for(process.stdout.readline(), DEADLINE)
        process.send_signal(number)
        _, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert process.returncode == 0
    assert re.fullmatch(rb"[\d,]+ events in .*, none lost\n", err)


async def test_on_a_terminal_there_are_colours_unless_they_are_not_wanted(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", Played(LIVE, SOME)) as address:
        for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
            ours, theirs = pty.openpty()
            try:
                process = await asyncio.create_subprocess_exec(
                    *COMMAND, "watch", "--connect", address, "syscall",
                    stdout=theirs, stderr=-1, env={**ENVIRONMENT, "TERM": "xterm", **environment},
                )  # fmt: skip
                await asyncio.wait_for(process.communicate(), DEADLINE)
                assert (b"\x1b[1m" in os.read(ours, 65536)) is coloured
            finally:
                os.close(ours)
                os.close(theirs)


async def test_a_full_disk_is_a_line(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", Played(LIVE, SOME)) as address:
        full = os.open("/dev/full", os.O_WRONLY)
        try:
            process = await asyncio.create_subprocess_exec(
                *COMMAND, "watch", "--connect", address, "syscall", stdout=full, stderr=-1, env=ENVIRONMENT
            )
            _, err = await asyncio.wait_for(process.communicate(), DEADLINE)
        finally:
            os.close(full)
    assert process.returncode == 1
    assert b"No space left on device" in err
    assert b"Traceback" not in err


@pytest.mark.parametrize("closed", [0, 1, 2])
async def test_closed_standard_files(tmp_path: Path, closed: int) -> None:
    """What is opened then must not be taken for standard output."""
    async with serving(tmp_path / "s", Played(LIVE, SOME)) as address:
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", f'exec "$@" {closed}>&-', "sh", *COMMAND, "watch", "--connect", address, "syscall",
            stdin=asyncio.subprocess.DEVNULL, stdout=-1, stderr=-1, env=ENVIRONMENT,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    if closed == 1:
        assert process.returncode == 1
        assert err == b"ringside: standard output is closed; redirect it to /dev/null\n"
    else:
        assert process.returncode == 0
        assert out.count(b"\n") == 3
