"""`ringside watch`: events of a sensor in this process, or of one that runs already, to standard output."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import stat
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from grpclib.const import Status as Code
from ringside.api import Status
from ringside.api.v0 import Event, Subscription
from ringside.client import decode_response, decoder, error_infos
from ringside.client.connection import connect
from ringside.client.syscalls import name_of

from . import show
from .config import Config
from .errors import KernelError, RingsideError, SetupError
from .procfs import Procfs
from .tracefs.mount import Tracefs

_PATIENCE = 500  # ms, for a reader at the end
CHUNK = 4096  # a pipe that polls writable takes so much without blocking (PIPE_BUF)


@dataclass(frozen=True)
class View:
    """How to show events."""

    form: str = "lines"  # or "json", or "count"
    containers: bool = False
    symbols: Sequence[str] = ()


class Watch:
    """One run of the command."""

    def __init__(self, subscription: Subscription, view: View, config: Config, address: str = "") -> None:
        """With an address, that sensor's events; else those of one in this process."""
        self._subscription = subscription
        self._view = view
        self._config = config
        self._address = address
        if sys.stdout is None:
            raise SetupError("standard output is closed", "redirect it to /dev/null")
        self._out = Output(sys.stdout.fileno())
        self._events = 0
        self._lost = 0
        self._lost_at_most = False
        self._began = 0.0
        self._interrupted = False
        self._render: Callable[[bytes], bytes] | None = None
        self._tracefs: Tracefs | None = None

    async def run(self) -> None:
        """Until the stream ends, or a signal or the closed output ends it; then the closing line."""
        # what is made at first use takes a while, and events don't wait
        open_envelope(b"")
        decoder(Status)
        if self._view.form != "count":
            decode_response(b"")
        loop = asyncio.get_running_loop()
        work = loop.create_task(self._work())

        def interrupt() -> None:
            self._interrupted = True
            work.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        try:
            await work
        except asyncio.CancelledError:
            if not self._interrupted:
                raise
        except BrokenPipeError:  # | head has seen enough
            return
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            if self._began and not self._out.broken:
                self._tell(self.closing())

    async def _work(self) -> None:
        async with aclosing(self._stream()) as stream:
            async for data in stream:
                envelope = open_envelope(data)
                if envelope.statuses:
                    await self._statuses(envelope.statuses)
                self._events += len(envelope.events)
                if self._render is not None and envelope.events:
                    try:
                        text = self._render(data)
                    except ValueError as error:
                        raise NonsenseError(str(error)) from error
                    await self._out.write(text)
                # nothing above waits while there is much to show; rings want to be read, signals to be heard
                await asyncio.sleep(0)

    # -- where events come from

    def _stream(self) -> AsyncGenerator[bytes, None]:
        return self._connected() if self._address else self._embedded()

    async def _connected(self) -> AsyncGenerator[bytes, None]:
        if self._address.startswith("unix:"):  # so it's of this kernel, most likely
            self._tracefs = Tracefs("/sys/kernel/tracing", writable=False)
        async with (
            connect(self._address) as sensor,
            aclosing(sensor.responses(self._subscription)) as responses,
        ):
            async for data in responses:
                yield data

    async def _embedded(self) -> AsyncGenerator[bytes, None]:
        from .sensor import Sensor

        async with Sensor(self._config) as sensor:
            self._tracefs = sensor.tracefs
            async with sensor.subscribe(self._subscription) as stream:
                async for data in stream:
                    yield data

    # -- what becomes of them

    async def _statuses(self, encoded: Sequence[bytes]) -> None:
        for status in map(decoder(Status), encoded):
            if status.code == Code.OK.value:
                if not self._began:
                    self._began = time.monotonic()
                    await self._start_output()
            elif status.code == Code.DATA_LOSS.value:
                for info in error_infos(status):
                    self._lost += int(info.metadata.get("count", 0))
                    self._lost_at_most |= info.metadata.get("at_most") == "true"
            else:
                self._tell(f"ringside: warning: {show.clean(status.message)}")

    async def _start_output(self) -> None:
        if self._view.form == "json":
            self._render = render_json
        elif self._view.form == "lines":
            lines = self._lines()
            self._render = lambda data: lines.text(decode_response(data).events).encode("utf-8", "replace")
            await self._out.write(lines.header().encode())

    def _lines(self) -> show.Lines:
        terminal = sys.stdout.isatty()
        paint = show.Paint(terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")
        teller = show.Teller(
            cache(lambda number: name_of(number) or f"syscall_{number}"),
            ArgumentNames(self._tracefs) if self._tracefs else show.no_arguments,
            self._view.symbols,
            paint,
        )
        return show.Lines(
            teller,
            paint=paint,
            width=lambda: os.get_terminal_size(sys.stdout.fileno()).columns if terminal else None,
            containers=self._view.containers,
            commands=Commands(),
            arrow="←" if (sys.stdout.encoding or "").lower().startswith("utf") else "<-",
        )

    # -- what is said besides

    def closing(self) -> str:
        """How it was: 8 events in 2.0 s, 4.0 a second, none lost."""
        seconds = time.monotonic() - self._began
        rate = self._events / seconds if seconds else 0.0
        bound = "up to " if self._lost_at_most else ""
        return (
            f"{self._events:,} event{'' if self._events == 1 else 's'} in {seconds:.1f} s, "
            f"{f'{rate:,.0f}' if rate >= 100 else f'{rate:.1f}'} a second, "
            f"{f'{bound}{self._lost:,} LOST' if self._lost else 'none lost'}"
        )

    def _tell(self, text: str) -> None:
        if sys.stderr is None:  # print() would take standard output
            return
        with suppress(OSError):
            # over the ^C that the terminal has echoed
            start = "\r\x1b[K" if self._interrupted and sys.stderr.isatty() else ""
            print(start + text, file=sys.stderr, flush=True)


def render_json(data: bytes) -> bytes:
    """A response's events as JSON, one a line."""
    return "".join([show.json_line(one) for one in decode_response(data).events]).encode()


class Output:
    """Standard output. While its reader is slow, the event loop goes on."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._blocks = not stat.S_ISREG(os.fstat(descriptor).st_mode)
        self.broken = False

    async def write(self, data: bytes) -> None:
        """All of it; BrokenPipeError if nobody reads any more."""
        rest = memoryview(data)
        try:
            while rest:
                if self._blocks and not self._poll.poll(0):
                    await self._writable(rest)
                rest = rest[os.write(self._fd, rest[:CHUNK] if self._blocks else rest) :]
        except BrokenPipeError:
            self.broken = True
            raise
        except OSError as error:  # no space left, say
            raise SetupError(f"can't write to standard output: {error.strerror}") from error

    async def _writable(self, rest: memoryview) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        def now() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.add_writer(self._fd, now)
        try:
            await ready
        except asyncio.CancelledError:
            self._end_line(rest)
            raise
        finally:
            loop.remove_writer(self._fd)

    def _end_line(self, rest: memoryview) -> None:
        """Write what is missing of a line that was begun, unless the reader doesn't read at all."""
        begun = bytes(rest).partition(b"\n")[0] + b"\n"
        while begun and self._poll.poll(_PATIENCE):
            begun = begun[os.write(self._fd, begun[:CHUNK]) :]


class Commands:
    """Names the process of an event that does not tell it, if that runs on this very machine, and still."""

    def __init__(self) -> None:
        self._procfs = Procfs()
        self._boot = self._procfs.boot_id()[:8]

    def __call__(self, event: Event) -> str:
        """The command as it is now; empty if the id is not that of a process here."""
        found = self._procfs.stat(event.process_pid) if event.process_id.startswith(self._boot) else None
        if found is None or event.process_id != f"{self._boot}-{found.pid:x}-{found.start:x}":
            return ""
        return found.command


# where a tracepoint is named after the function in the kernel and not after the system call
_TRACED_AS = {
    "stat": "newstat", "fstat": "newfstat", "lstat": "newlstat", "uname": "newuname", "umount2": "umount",
    "sendfile": "sendfile64",
}  # fmt: skip


class ArgumentNames:
    """The names of a system call's arguments, from the tracepoints of this kernel."""

    def __init__(self, tracefs: Tracefs) -> None:
        self._tracefs = tracefs

    def __call__(self, name: str) -> list[str] | None:
        """None for one that has no tracepoint."""
        try:
            record = self._tracefs.read_format("syscalls", f"sys_enter_{_TRACED_AS.get(name, name)}")
        except (KernelError, ValueError):
            return None
        return [field.name for field in record.own_fields if field.name != "__syscall_nr"][:6]


@cache
def _envelope() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from ringside.api.v0 import GetEventsResponse

    from . import wire

    file = descriptor_pb2.FileDescriptorProto(name="envelope.proto", syntax="proto3")
    message = file.message_type.add(name="Envelope")
    for name, field in wire.fields(GetEventsResponse).items():
        message.field.add(
            name=name,
            number=field.number,
            label=descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED,
            type=descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Envelope"))


def open_envelope(data: bytes) -> Any:
    """A GetEventsResponse with `events` and `statuses` left encoded: to count them costs next to nothing."""
    try:
        return _envelope().FromString(data)
    except Exception as error:  # protobuf's DecodeError has no other base
        raise NonsenseError(str(error)) from error


class NonsenseError(RingsideError):
    """The sensor sends what can't be read."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"the sensor's answer can't be read: {problem}")
