"""Events as people read them, a line each; and as JSON, an object a line.

What a line says comes from programs that need not be friends: everything is made printable first, so
that no file name or argument can steer the terminal.
"""

from __future__ import annotations

import base64
import dataclasses
import errno
import ipaddress
import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import betterproto2
from ringside.api.v0 import (
    ContainerEvent,
    ContainerEventType,
    Event,
    FileEvent,
    FileEventType,
    KernelFunctionCallEvent,
    KernelFunctionCallEventFieldValue,
    NetworkAddress,
    NetworkEvent,
    NetworkEventType,
    ProcessEvent,
    ProcessEventType,
    SyscallEvent,
    SyscallEventType,
    TelemetryEvent,
)

# -- parts of a line -----------------------------------------------------------------------------------


def clean(text: str) -> str:
    """The text with everything escaped that could do more to a terminal than show itself."""
    if text.isprintable():
        return text
    return "".join([char if char.isprintable() else _escape(char) for char in text])


def _escape(char: str) -> str:
    code = ord(char)
    if char in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[char]
    return f"\\x{code:02x}" if code < 128 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def shell_word(argument: str) -> str:
    """An argument as one would type it into a shell."""
    if argument.isprintable():
        return shlex.quote(argument)
    return "$'" + clean(argument.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def signal_name(number: int) -> str:
    """SIGKILL for 9, SIGRTMIN+3 for 37."""
    try:
        return signal.Signals(number).name
    except ValueError:
        if signal.SIGRTMIN < number < signal.SIGRTMAX:
            return f"SIGRTMIN+{number - signal.SIGRTMIN}"
        return f"signal {number}"


# what the kernel returns to itself, and a tracer sees: include/linux/errno.h
_RESTARTS = {512: "ERESTARTSYS", 513: "ERESTARTNOINTR", 514: "ERESTARTNOHAND", 516: "ERESTART_RESTARTBLOCK"}
_LARGEST_ERRNO = 4095


def result(value: int) -> str:
    """A system call's result: 3, 0x7f1200000000, -2 ENOENT (No such file or directory)."""
    if -_LARGEST_ERRNO <= value < 0:
        name = errno.errorcode.get(-value)
        if name is not None:
            return f"{value} {name} ({os.strerror(-value)})"
        return f"{value} {_RESTARTS[-value]}" if -value in _RESTARTS else str(value)
    return str(value) if -(1 << 31) <= value < 1 << 31 else f"{value & (1 << 64) - 1:#x}"


def ending(status: int, number: int, core_dumped: bool) -> str:
    """How a process or container ended: exit 3; killed by SIGSEGV, core dumped."""
    if number:
        return f"killed by {signal_name(number)}" + (", core dumped" if core_dumped else "")
    return f"exit {status}"


# several bits each, so tried first
_OPEN_COMPOSITES = ("O_TMPFILE", "O_SYNC")
_OPEN_FLAGS = (
    "O_CREAT", "O_EXCL", "O_NOCTTY", "O_TRUNC", "O_APPEND", "O_NONBLOCK", "O_DSYNC", "O_ASYNC", "O_DIRECT",
    "O_DIRECTORY", "O_NOFOLLOW", "O_NOATIME", "O_CLOEXEC", "O_PATH",
)  # fmt: skip
# set by the kernel itself on each open of a 64-bit program, so it tells nothing; os.O_LARGEFILE is 0 there
_O_LARGEFILE = {"aarch64": 0o400000}.get(os.uname().machine, 0o100000)


@cache
def open_flags(flags: int) -> str:
    """O_RDONLY|O_CLOEXEC"""
    access = ("O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE")[flags & 3]
    rest = flags & 0xFFFFFFFF & ~3 & ~_O_LARGEFILE
    names = [access]
    for name in (*_OPEN_COMPOSITES, *_OPEN_FLAGS):
        bits = getattr(os, name, 0)
        if bits and rest & bits == bits:
            names.append(name)
            rest &= ~bits
    if rest:
        names.append(f"{rest:#x}")
    return "|".join(names)


_CREATES = os.O_CREAT | (os.O_TMPFILE & ~os.O_DIRECTORY)


def address(of: NetworkAddress) -> str:
    """10.0.0.1:443, [fe80::1]:443, /run/some.sock, @abstract; empty if the family is none of these."""
    if of.ipv4_address is not None:
        inner = of.ipv4_address.address
        packed = (0 if inner is None else inner.address).to_bytes(4, "little")  # fixed32 holds network order
        return f"{ipaddress.IPv4Address(packed)}:{of.ipv4_address.port}"
    if of.ipv6_address is not None:
        halves = of.ipv6_address.address
        high, low = (0, 0) if halves is None else (halves.high, halves.low)
        packed = high.to_bytes(8, "little") + low.to_bytes(8, "little")
        return f"[{ipaddress.IPv6Address(packed)}]:{of.ipv6_address.port}"
    if of.local_address is not None:
        path = of.local_address
        if not path:
            return "(unnamed)"
        return "@" + clean(path[1:]) if path.startswith("\0") else clean(path)
    return ""


def field_value(of: KernelFunctionCallEventFieldValue) -> str:
    """A fetched value: numbers in decimal, what looks like an address in hex, text quoted, bytes in hex."""
    if of.string_value is not None:
        return json.dumps(of.string_value)
    if of.bytes_value is not None:
        return of.bytes_value.hex() or "(empty)"
    if of.signed_value is not None:
        return str(of.signed_value)
    if of.unsigned_value is not None:
        value = of.unsigned_value
        return f"{value:#x}" if value >= 1 << 32 else str(value)
    return "?"


# -- what happened ---------------------------------------------------------------------------------------

SyscallNames = Callable[[int], str]
ArgumentNames = Callable[[str], Sequence[str] | None]


def no_arguments(_: str) -> None:
    """The names of a system call's arguments, when nobody knows them."""


class Teller:
    """Says in words what an event is.

    `name` gives a system call's name by its number, `arguments` the names of its arguments (None:
    unknown), `symbols` what kernel functions were asked for: an event does not carry its function's name.
    """

    def __init__(
        self,
        name: SyscallNames,
        arguments: ArgumentNames = no_arguments,
        symbols: Sequence[str] = (),
        paint: Paint | None = None,
    ) -> None:
        self._name = name
        self._arguments = cache(arguments)
        self._symbol = symbols[0] if len(set(symbols)) == 1 else "kernel"
        self._paint = paint or Paint(False)

    def tell(self, event: Event) -> str:
        """The text, made printable."""
        if event.syscall is not None:
            return self.syscall(event.syscall)
        if event.process is not None:
            return self.process(event.process)
        if event.file is not None:
            return self.file(event.file)
        if event.network is not None:
            return self.network(event.network)
        if event.kernel_call is not None:
            return self.kernel_call(event.kernel_call)
        if event.container is not None:
            return self.container(event.container)
        if event.ticker is not None:
            return f"tick {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(event.ticker.seconds))}"
        if event.chargen is not None:
            return clean(event.chargen.characters)
        return "(an event of a kind that this version does not know)"

    def syscall(self, of: SyscallEvent) -> str:
        """openat(dfd=0xffffff9c, ...) or openat = -2 ENOENT (No such file or directory)"""
        name = self._name(of.id)
        if of.type is SyscallEventType.EXIT:
            text = f"{self._paint.name(name)} = {result(of.ret)}"
            return self._paint.bad(text) if -_LARGEST_ERRNO <= of.ret < 0 else text
        values = (of.arg0, of.arg1, of.arg2, of.arg3, of.arg4, of.arg5)
        names = self._arguments(name)
        if names is None:
            inner = ", ".join([f"{value:#x}" for value in values])
        else:
            inner = ", ".join([f"{key}={value:#x}" for key, value in zip(names, values, strict=False)])
        return f"{self._paint.name(name)}({inner})"

    def process(self, of: ProcessEvent) -> str:
        """fork child 4711; exec /bin/ls -l; exit 3; killed by SIGKILL"""
        paint = self._paint
        if of.type is ProcessEventType.FORK:
            return f"fork child {of.fork_child_pid}"
        if of.type is ProcessEventType.EXEC:
            return f"{paint.name('exec')} {command(of.exec_filename, of.exec_command_line)}"
        if of.type is ProcessEventType.EXIT:
            text = ending(of.exit_status, of.exit_signal, of.exit_core_dumped)
            return paint.bad(text) if of.exit_code else text
        return f"process event {int(of.type)}"

    def file(self, of: FileEvent) -> str:
        """open /etc/passwd O_RDONLY|O_CLOEXEC"""
        if of.type is not FileEventType.OPEN:
            return f"file event {int(of.type)}"
        name = shell_word(of.filename) if of.filename else "(unknown file)"
        mode = f" {of.open_mode & 0o7777:04o}" if of.open_flags & _CREATES else ""
        return f"{self._paint.name('open')} {name} {open_flags(of.open_flags)}{mode}"

    def network(self, of: NetworkEvent) -> str:
        """connect fd 3 to 10.0.0.1:443; connect = 0"""
        verb, _, step = (of.type.name or f"network event {int(of.type)}").lower().rpartition("_")
        name = self._paint.name(verb)
        if step == "result":
            text = f"{name} = {result(of.result)}"
            return self._paint.bad(text) if of.result < 0 else text
        text = f"{name} fd {of.sockfd}"
        if of.type is NetworkEventType.LISTEN_ATTEMPT:
            return f"{text} backlog {of.backlog}"
        where = address(of.address) if of.address is not None else ""
        return f"{text} to {where}" if where else text

    def kernel_call(self, of: KernelFunctionCallEvent) -> str:
        """do_exit(code=0)"""
        inner = ", ".join([f"{clean(name)}={field_value(value)}" for name, value in of.arguments.items()])
        return f"{self._paint.name(self._symbol)}({inner})"

    def container(self, of: ContainerEvent) -> str:
        """container running web (nginx:1.27) pid 4711"""
        what = (of.type.name or str(int(of.type))).lower()
        parts = [self._paint.name(f"container {what}"), clean(of.name.removeprefix("/"))]
        if of.image_name:
            parts.append(f"({clean(of.image_name)})")
        if of.host_pid and of.type is ContainerEventType.RUNNING:
            parts.append(f"pid {of.host_pid}")
        # without an engine, which also gives the name, nobody knows
        if of.type is ContainerEventType.EXITED and (of.name or of.exit_code):
            parts.append(ending(of.exit_status, of.exit_signal, of.exit_core_dumped))
        return " ".join(filter(None, parts))


def command(filename: str, arguments: Sequence[str]) -> str:
    """A program's file and arguments, as for a shell; also its argv[0] where that is not the file's name."""
    words = [shell_word(filename)] + [shell_word(argument) for argument in arguments[1:]]
    called = arguments[0] if arguments else ""
    if called and os.path.basename(called.removeprefix("-")) != os.path.basename(filename):
        words.append(f"(as {shell_word(called)})")
    return " ".join(words)


# -- lines -----------------------------------------------------------------------------------------------


class Paint:
    """Colours, or none."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def _wrap(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.on and text else text

    def dim(self, text: str) -> str:
        """What matters less."""
        return self._wrap(text, "2")

    def name(self, text: str) -> str:
        """What it is."""
        return self._wrap(text, "1")

    def bad(self, text: str) -> str:
        """What failed."""
        return self._wrap(text, "31")

    def where(self, text: str) -> str:
        """Containers."""
        return self._wrap(text, "36")


class WallClock:
    """The time of day of events, from clocks of the sensor's own.

    On the sensor's machine both clocks can be compared directly. Elsewhere the shortest way that an
    event ever took to be published is taken for zero, so times are a few milliseconds late at first.
    """

    def __init__(self) -> None:
        self._here = time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        self._offset: int | None = None

    def learn(self, events: Iterable[TelemetryEvent]) -> None:
        """Look at what came together."""
        shortest = min(
            (
                one.publish_time_micros * 1000 - one.event.sensor_monotime_nanos
                for one in events
                if one.event is not None and one.event.sensor_monotime_nanos and one.publish_time_micros
            ),
            default=None,
        )
        if shortest is None:
            return
        if -(10**9) < shortest - self._here < 60 * 10**9:
            self._offset = self._here
        elif self._offset is None or shortest < self._offset:
            self._offset = shortest

    def text(self, telemetry: TelemetryEvent) -> str:
        """HH:MM:SS.micros, local time."""
        event = telemetry.event
        if event is not None and event.sensor_monotime_nanos and self._offset is not None:
            micros = (event.sensor_monotime_nanos + self._offset) // 1000
        else:
            micros = telemetry.publish_time_micros
        return f"{_clock_of(micros // 10**6)}.{micros % 10**6:06}"


@cache
def _clock_of(seconds: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


_COLOUR = re.compile(r"\x1b\[\d+m")
Commands = Callable[[Event], str]


class Lines:
    """Aligned columns: time, pid, process, container when there are any, what happened, lineage."""

    def __init__(
        self,
        teller: Teller,
        *,
        paint: Paint,
        width: Callable[[], int | None] = lambda: None,
        containers: bool = False,
        commands: Commands = lambda _: "",
        arrow: str = "←",
    ) -> None:
        """`width` tells how wide the terminal is, None if there is none; `commands` names the others."""
        self._teller = teller
        self._paint = paint
        self._ask_width = width
        self._width: int | None = None
        self._containers = containers
        self._commands = commands
        self._arrow = f" {arrow} "
        self._clock = WallClock()

    def header(self) -> str:
        """The columns' names."""
        container = f"{'CONTAINER':20} " if self._containers else ""
        return self._paint.dim(f"{'TIME':15} {'PID':>7} {'PROCESS':15} {container}EVENT") + "\n"

    def text(self, events: Sequence[TelemetryEvent]) -> str:
        """A line each."""
        self._width = self._ask_width()
        self._clock.learn(events)
        lines = []
        for telemetry in events:
            event = telemetry.event
            if event is None:
                continue
            if not self._containers and (event.container_id or event.container is not None):
                self._containers = True
                lines.append(self.header())
            lines.append(self._line(telemetry, event))
        return "".join(lines)

    def _line(self, telemetry: TelemetryEvent, event: Event) -> str:
        lineage = event.process_lineage
        name = clean(lineage[0].command if lineage else self._commands(event))
        pid = event.process_pid or ""
        line = f"{self._clock.text(telemetry)} {pid:>7} {name:15} "
        room = None if self._width is None else self._width - len(line)
        if self._containers:
            where = clean(event.container_name.removeprefix("/") or event.container_id[:12])
            where = where if len(where) <= 20 else where[:19] + "…"
            line += self._paint.where(f"{where:20}") + " "
            room = None if room is None else room - 21
        text = self._teller.tell(event)
        if event.process is None or len(lineage) < 2:
            return f"{line}{text}\n"
        room = None if room is None else room - len(_COLOUR.sub("", text))
        ancestors = self._lineage([clean(one.command) for one in lineage[1:]], room)
        return f"{line}{text}{self._paint.dim(ancestors)}\n"

    def _lineage(self, names: list[str], room: int | None) -> str:
        """Parent, grandparent and so on; on a terminal only as many as fit."""
        arrow = self._arrow
        if room is None:
            return arrow + arrow.join(names)
        out = ""
        for at, name in enumerate(names):
            rest = 0 if at == len(names) - 1 else len(arrow) + 1
            if len(out) + len(arrow) + len(name) + rest > room:
                return f"{out}{arrow}…" if len(out) + len(arrow) < room else out
            out += arrow + name
        return out


# -- JSON ------------------------------------------------------------------------------------------------

# What an event of this type always tells, so that a zero is said and not left out like what is absent.
_TELLS: dict[type[betterproto2.Message], Mapping[int, str]] = {
    SyscallEvent: {
        SyscallEventType.ENTER: "id arg0 arg1 arg2 arg3 arg4 arg5",
        SyscallEventType.EXIT: "id ret",
    },
    ProcessEvent: {
        ProcessEventType.EXEC: "exec_filename exec_command_line",
        ProcessEventType.EXIT: "exit_code exit_status exit_signal exit_core_dumped",
    },
    FileEvent: {FileEventType.OPEN: "open_flags open_mode"},
    NetworkEvent: {
        kind: "result"
        if kind.name.endswith("_RESULT")
        else "sockfd backlog"
        if kind is NetworkEventType.LISTEN_ATTEMPT
        else "sockfd"
        for kind in NetworkEventType
        if kind
    },
    ContainerEvent: {ContainerEventType.EXITED: "exit_code exit_status exit_signal exit_core_dumped"},
}


Convert = Callable[[Any], Any]


@cache
def _fields_of(message: type[betterproto2.Message], kind: int) -> list[tuple[str, bool, Convert | None]]:
    """For each field its name, whether it's told though it is empty, and how to make it plain."""
    told = _TELLS.get(message, {}).get(kind, "").split()
    found = []
    for field in dataclasses.fields(message):  # type: ignore[arg-type]
        meta = betterproto2.FieldMetadata.get(field)
        convert = _CONVERT.get(meta.proto_type) if meta.unwrap is None else None
        if meta.map_meta is not None:
            convert = _plain_map
        elif meta.repeated and convert is not None:
            convert = partial(_plain_list, convert)
        # what may be None is told if it isn't, though it be 0 or empty; and betterproto2 is slow to say
        # whether a message is empty
        optional = bool(meta.optional or meta.group) and not meta.repeated
        found.append((field.name, field.name in told or optional, convert))
    return found


def plain(message: betterproto2.Message) -> dict[str, Any]:
    """A message for json: the API's names, enums by name, bytes as base64, nothing that is absent."""
    out: dict[str, Any] = {}
    for name, told, convert in _fields_of(type(message), getattr(message, "type", 0)):
        value = getattr(message, name)
        if value is not None if told else value:
            out[name] = value if convert is None else convert(value)
    return out


def _plain_enum(value: betterproto2.Enum) -> str | int:
    if not value.name:  # a number that this version has no name for
        return int(value)
    return value.proto_name or value.name


def _plain_list(convert: Convert, values: Iterable[Any]) -> list[Any]:
    return [convert(value) for value in values]


def _plain_map(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: plain(value) for key, value in values.items()}


_CONVERT: dict[str, Convert] = {
    betterproto2.TYPE_ENUM: _plain_enum,
    betterproto2.TYPE_BYTES: lambda value: base64.b64encode(value).decode(),
    betterproto2.TYPE_MESSAGE: plain,
}
_ENCODER = json.JSONEncoder(separators=(",", ":"))  # ASCII only, so a terminal is safe from it too


def json_line(telemetry: TelemetryEvent) -> str:
    """A TelemetryEvent on one line."""
    found = plain(telemetry)
    event = found.get("event")
    if event is not None and "process_pid" in event:
        event.setdefault("cpu", 0)  # there is a CPU 0, and no event of a process without a CPU
    return _ENCODER.encode(found) + "\n"
