"""The command line, what it prints, and `watch` against a service of our own that plays the sensor."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import betterproto2
import pytest
from click.testing import CliRunner, Result
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server
from ringside.api.v0 import (
    ChargenEvent,
    ContainerEvent,
    ContainerEventType,
    Event,
    FileEvent,
    FileEventType,
    GetEventsRequest,
    GetEventsResponse,
    IPv4Address,
    IPv4AddressAndPort,
    IPv6Address,
    IPv6AddressAndPort,
    KernelFunctionCallEvent,
    KernelFunctionCallEventFieldType,
    KernelFunctionCallEventFieldValue,
    NetworkAddress,
    NetworkAddressFamily,
    NetworkEvent,
    NetworkEventType,
    Process,
    ProcessEvent,
    ProcessEventType,
    Subscription,
    SyscallEvent,
    SyscallEventType,
    TelemetryEvent,
    TickerEvent,
)
from ringside.client import builders
from ringside.client.syscalls import name_of, number_of
from ringside.sensor import check, show, systemd
from ringside.sensor.cli import main
from ringside.sensor.config import Config
from ringside.sensor.events import Mechanism
from ringside.sensor.service import SERVICE, BytesCodec
from ringside.sensor.subscription import Code, Loss, make_status
from ringside.sensor.watch import Output, open_envelope
from ringside.sensor.what import WhatError, subscription

COMMAND = (sys.executable, "-m", "ringside.sensor.cli")
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("RINGSIDE_")}
DEADLINE = 60


def run(*arguments: str, **environment: str) -> Result:
    unset: dict[str, str | None] = dict.fromkeys(key for key in os.environ if key.startswith("RINGSIDE_"))
    return CliRunner().invoke(main, arguments, prog_name="ringside", env={**unset, **environment})


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=DEADLINE, check=False
    )


# --- the command line


def test_version() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert run("--version").output == f"ringside {project['version']}\n"


def test_help_of_the_command_and_of_each_subcommand() -> None:
    for arguments in (["--help"], ["watch", "-h"], ["serve", "--help"], ["check", "--help"]):
        result = run(*arguments)
        assert result.exit_code == 0
        assert result.output.startswith("Usage: ringside")


def test_help_imports_nothing_that_takes_time() -> None:
    """What it costs to start: under 0.3 s, most of it click's and Python's own."""
    heavy = "{'rich', 'uvloop', 'grpclib', 'betterproto2', 'google.protobuf', 'asyncio', 'cffi'}"
    code = f"""
import sys
from ringside.sensor.cli import main
try:
    main(["watch", "--help"])
except SystemExit:
    print(sorted(set(sys.modules) & {heavy}), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "[]\n"


def test_every_setting_is_an_option_of_serve() -> None:
    options = {option for parameter in main.commands["serve"].params for option in parameter.opts}
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in options
    text = " ".join(run("serve", "--help").output.split())
    assert "[default: 8M]" in text
    assert "[default: 10ms]" in text
    assert "[default: unix:/run/ringside/sensor.sock]" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bla"], "No such command 'bla'"),
        (["--bla"], "No such option"),
        (["watch", "proces"], "'proces' can't be watched; did you mean process?"),
        (["watch", "everything"], "there are process, syscall, file"),
        (["watch", "process:exe"], "did you mean process:exec?"),
        (["watch", "container:gone"], "there are container:created, container:running"),
        (["watch", "syscall:opnat"], "no system call 'opnat'; did you mean openat"),
        (["watch", "syscall:openat:return"], "on enter, exit or both"),
        (["watch", "network:conect"], "connect, bind"),
        (["watch", "network:connect:begin"], "attempt, result"),
        (["watch", "kernel"], "needs a function"),
        (["watch", "kernel::exit"], "needs a function"),
        (["watch", "ticker:often"], "'often' is no duration"),
        (["watch", "ticker:0s"], "more than 0"),
        (["watch", "chargen:x"], "number of characters"),
        (["watch", "chargen:0"], "more than 0"),
        (["watch", "process", "--filter", "sin_port = 3"], "a comparison is written =="),
        (["watch", "process", "--filter", "sin_port == 3"], "process takes exec_filename =="),
        (["watch", "syscall", "--filter", "ret < 0"], "syscall takes ret =="),
        (["watch", "ticker", "--filter", "ret == 0"], "ticker takes no filter"),
        (["watch", "syscall:openat:enter", "--filter", "ret == 0"], "only calls that return"),
        (["watch", "file:/etc/*", "--filter", 'filename == "/x"'], "names the files already"),
        (["watch", "network", "--filter", "ret == 0 && sin_port == 3"], "use two filters"),
        (["watch", "process", "--arg", "a=$arg1"], "--arg goes with kernel:SYMBOL only"),
        (["watch", "kernel:f", "--arg", "a"], "NAME=FETCHARG"),
        (["watch", "kernel:f", "--arg", "a=$arg1", "--arg", "a=$arg2"], "the same name twice"),
        (["watch", "process", "--limit", "0"], "--limit"),
        (["watch", "process", "--for", "0"], "more than 0"),
        (["watch", "process", "--for", "soon"], "'soon' is no duration"),
        (["watch", "process", "--json", "--quiet"], "exclude each other"),
        (["watch", "process", "--since", "1m"], "--since needs --connect"),
        (["watch", "process", "--connect", "unix:/x", "--include-self"], "--include-self"),
        (["serve", "--ring-size", "3"], "ring-size: 3 is not a power of two"),
        (["serve", "--hold", "soon"], "--hold: 'soon' is no duration"),
        (["serve", "--listen", "nowhere"], "listen: 'nowhere'"),
        (["serve", "--config", "/nonexistent"], "/nonexistent: No such file"),
        (["check", "--config", "/nonexistent"], "/nonexistent: No such file"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_line(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("ringside: ")
    assert says in result.stderr
    if "a comparison" not in says:  # an expression is shown, with the place
        assert result.stderr.count("\n") == 1


def test_nothing_to_watch() -> None:
    result = run("watch")
    assert result.exit_code == 2
    assert "What can be watched" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["watch", "ticker", "--connect", "unix:/nonexistent/socket"],
            "no sensor at unix:/nonexistent/socket",
        ),
        (["watch", "ticker", "--connect", "127.0.0.1:1"], "no sensor at 127.0.0.1:1: Connection refused"),
        (["watch", "ticker", "--connect", "nowhere"], "'nowhere' is neither unix:PATH nor HOST:PORT"),
        (["serve", "--listen", "0.0.0.0:8484"], "plain TCP at 0.0.0.0:8484"),
        (["serve", "--listen", "unix:/proc/x/socket"], "can't listen at unix:/proc/x/socket"),
    ],
)
def test_what_can_not_be_done_is_told_in_a_line(arguments: list[str], says: str) -> None:
    result = run_process(*arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("ringside: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


# --- what is watched


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("process", builders.processes()),
        ("process:exec", builders.processes("exec")),
        ("process:fork,exit", builders.processes("fork", "exit")),
        ("syscall", builders.syscalls()),
        ("syscall:*:exit", builders.syscalls(on="exit")),
        ("syscall:openat", builders.syscalls("openat")),
        ("syscall:connect:exit", builders.syscalls("connect", on="exit")),
        ("syscall:110", builders.syscalls(110)),
        ("syscall:0x6e:both", builders.syscalls(110, on="both")),
        ("syscall:read,write", builders.syscalls("read", "write")),
        ("file", builders.files()),
        ("file:/etc/*", builders.files("/etc/*")),
        ("file:/a:b", builders.files("/a:b")),
        ("network", builders.network()),
        ("network:connect", builders.network("connect")),
        ("network:connect:result", builders.network("connect:result")),
        ("network:bind,listen", builders.network("bind", "listen")),
        ("kernel:do_exit", builders.kernel("do_exit")),
        ("kernel:do_exit:exit", builders.kernel("do_exit", on="exit")),
        ("kernel:ext4:ext4_sync_fs:both", builders.kernel("ext4:ext4_sync_fs", on="both")),
        ("container", builders.containers()),
        ("container:running", builders.containers("running")),
        ("ticker", builders.ticker(1)),
        ("ticker:250ms", builders.ticker(0.25)),
        ("chargen:64", builders.chargen(64)),
    ],
)
def test_what(words: str, expected: Sequence[Any]) -> None:
    assert subscription([words]) == builders.events(expected)


def test_several_whats_are_one_subscription() -> None:
    assert subscription(["process:exec", "ticker:1s"], limit=3, container=["web*"]) == builders.events(
        builders.processes("exec"), builders.ticker(1), limit=3, container=["web*"]
    )


@pytest.mark.parametrize(
    ("word", "where", "expected"),
    [
        ("network", "sin_port == 443", builders.network(where="sin_port == 443")),
        ("network:connect", "ret < 0", builders.network("connect", where="ret < 0")),
        ("syscall:openat:exit", "ret == -2", builders.syscalls("openat", ret=-2)),
        ("syscall", "ret == -13", builders.syscalls(ret=-13)),
        ("process", 'exec_filename == "/bin/sh"', builders.processes(filename="/bin/sh")),
        ("process", 'exec_filename ~ "*/sh"', builders.processes(pattern="*/sh")),
        ("process", "exit_code == 256", builders.processes(exit_code=256)),
        ("file", 'filename ~ "/etc/*"', builders.files("/etc/*")),
        ("kernel:do_exit", "code & 1", builders.kernel("do_exit", where="code & 1")),
    ],
)
def test_filters(word: str, where: str, expected: Sequence[Any]) -> None:
    assert subscription([word], where=where) == builders.events(expected)


def test_arguments_of_kernel_functions() -> None:
    arguments = {"name": "+0($arg2):string", "flags": "+0($arg3):u64"}
    expected = builders.events(builders.kernel("do_sys_openat2", arguments))
    assert subscription(["kernel:do_sys_openat2"], arguments=arguments) == expected


def test_a_filter_goes_with_all_that_is_watched() -> None:
    with pytest.raises(WhatError, match="ticker takes no filter"):
        subscription(["network", "ticker"], where="sin_port == 443")


# --- parts of a line


def test_nothing_reaches_the_terminal_that_could_steer_it() -> None:
    evil = "a\x1b[31mb\rc\nd\x9b\u202e\x00"
    for text in (show.clean(evil), show.shell_word(evil)):
        assert text.isprintable()
    event = Event(
        process_pid=1,
        process_lineage=[Process(pid=1, command=evil)] * 2,
        container_id="ab" * 32,
        container_name=evil,
        process=ProcessEvent(type=ProcessEventType.EXEC, exec_filename=evil, exec_command_line=[evil, evil]),
    )
    lines = show.Lines(show.Teller(str), paint=show.Paint(False))
    text = lines.text([TelemetryEvent(event=event)])
    assert text.count("\n") == 2  # a header, since there is a container now
    assert text.replace("\n", "").isprintable()
    assert show.json_line(TelemetryEvent(event=event)).strip().isprintable()


@pytest.mark.parametrize(
    "argument",
    ["", "a", "a b", "it's", 'a"b', "$HOME", "a\nb", "\x1b[0m", "tab\t'q'", "\\n", "\x9b1", "\u202e1"],
)
def test_arguments_can_be_pasted_into_a_shell(argument: str) -> None:
    script = f"printf %s {show.shell_word(argument)}"
    assert subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode() == argument


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0, "0"),
        (-2, "-2 ENOENT (No such file or directory)"),
        (-512, "-512 ERESTARTSYS"),
        (-4000, "-4000"),
        (0x7F12_0000_0000, "0x7f1200000000"),
        (-5000, "-5000"),
        (-(1 << 40), "0xffffff0000000000"),
    ],
)
def test_results(value: int, text: str) -> None:
    assert show.result(value) == text


@pytest.mark.parametrize(
    ("status", "number", "core", "text"),
    [
        (0, 0, False, "exit 0"),
        (3, 0, False, "exit 3"),
        (0, 9, False, "killed by SIGKILL"),
        (0, 11, True, "killed by SIGSEGV, core dumped"),
        (0, signal.SIGRTMIN + 3, False, "killed by SIGRTMIN+3"),
        (0, 99, False, "killed by signal 99"),
    ],
)
def test_endings(status: int, number: int, core: bool, text: str) -> None:
    assert show.ending(status, number, core) == text


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (0, "O_RDONLY"),
        (os.O_RDONLY | os.O_CLOEXEC, "O_RDONLY|O_CLOEXEC"),
        (os.O_RDWR | os.O_CREAT | os.O_EXCL, "O_RDWR|O_CREAT|O_EXCL"),
        (os.O_WRONLY | os.O_TMPFILE, "O_WRONLY|O_TMPFILE"),
        (os.O_RDONLY | os.O_DIRECTORY, "O_RDONLY|O_DIRECTORY"),
        (os.O_WRONLY | os.O_SYNC, "O_WRONLY|O_SYNC"),
        (os.O_WRONLY | os.O_DSYNC, "O_WRONLY|O_DSYNC"),
        (3, "O_ACCMODE"),
        (1 << 30, "O_RDONLY|0x40000000"),
        (-(1 << 31), "O_RDONLY|0x80000000"),
    ],
)
def test_open_flags(flags: int, text: str) -> None:
    assert show.open_flags(flags) == text


def ipv4(text: str, port: int) -> NetworkAddress:
    packed = int.from_bytes(socket.inet_aton(text), "little")
    return NetworkAddress(
        family=NetworkAddressFamily.INET,
        ipv4_address=IPv4AddressAndPort(address=IPv4Address(address=packed), port=port),
    )


def ipv6(text: str, port: int) -> NetworkAddress:
    packed = socket.inet_pton(socket.AF_INET6, text)
    halves = IPv6Address(high=int.from_bytes(packed[:8], "little"), low=int.from_bytes(packed[8:], "little"))
    return NetworkAddress(
        family=NetworkAddressFamily.INET6, ipv6_address=IPv6AddressAndPort(address=halves, port=port)
    )


def local(path: str) -> NetworkAddress:
    return NetworkAddress(family=NetworkAddressFamily.LOCAL, local_address=path)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (ipv4("10.0.0.1", 443), "10.0.0.1:443"),
        (
            NetworkAddress(family=NetworkAddressFamily.INET, ipv4_address=IPv4AddressAndPort(port=1)),
            "0.0.0.0:1",
        ),
        (ipv6("fe80::1", 80), "[fe80::1]:80"),
        (
            NetworkAddress(family=NetworkAddressFamily.INET6, ipv6_address=IPv6AddressAndPort(port=1)),
            "[::]:1",
        ),
        (local("/run/x.sock"), "/run/x.sock"),
        (local("\0abstract\x1b"), "@abstract\\x1b"),
        (local("@abstract"), "@abstract"),
        (local(""), "(unnamed)"),
        (NetworkAddress(), ""),
    ],
)
def test_addresses(address: NetworkAddress, text: str) -> None:
    assert show.address(address) == text


# --- what happened


def tell(event: Event, **options: Any) -> str:
    def name(number: int) -> str:
        return name_of(number) or f"syscall_{number}"

    return show.Teller(name, **options).tell(event)


def enter(number: int, *arguments: int) -> Event:
    values = {f"arg{index}": value for index, value in enumerate(arguments)}
    return Event(syscall=SyscallEvent(type=SyscallEventType.ENTER, id=number, **values))


def leave(number: int, ret: int) -> Event:
    return Event(syscall=SyscallEvent(type=SyscallEventType.EXIT, id=number, ret=ret))


def executed(filename: str, *arguments: str) -> Event:
    return Event(
        process=ProcessEvent(
            type=ProcessEventType.EXEC, exec_filename=filename, exec_command_line=list(arguments)
        )
    )


def network(kind: NetworkEventType, **fields: Any) -> Event:
    return Event(network=NetworkEvent(type=kind, **fields))


OPENAT = number_of("openat")


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (enter(OPENAT, 0xFFFFFF9C, 0x7F00), "openat(0xffffff9c, 0x7f00, 0x0, 0x0, 0x0, 0x0)"),
        (enter(9999), "syscall_9999(0x0, 0x0, 0x0, 0x0, 0x0, 0x0)"),
        (leave(OPENAT, 3), "openat = 3"),
        (leave(OPENAT, -13), "openat = -13 EACCES (Permission denied)"),
        (executed("/bin/ls", "ls", "-l", "a b"), "exec /bin/ls -l 'a b'"),
        (executed("/bin/bash", "-bash"), "exec /bin/bash"),
        (executed("/bin/busybox", "sh", "-c", "x"), "exec /bin/busybox -c x (as sh)"),
        (executed("/bin/x"), "exec /bin/x"),
        (Event(process=ProcessEvent(type=ProcessEventType.FORK, fork_child_pid=7)), "fork child 7"),
        (Event(process=ProcessEvent(type=ProcessEventType.EXIT, exit_code=768, exit_status=3)), "exit 3"),
        (
            Event(
                process=ProcessEvent(
                    type=ProcessEventType.EXIT, exit_code=139, exit_signal=11, exit_core_dumped=True
                )
            ),
            "killed by SIGSEGV, core dumped",
        ),
        (
            Event(file=FileEvent(type=FileEventType.OPEN, filename="/etc/passwd", open_flags=os.O_CLOEXEC)),
            "open /etc/passwd O_RDONLY|O_CLOEXEC",
        ),
        (
            Event(
                file=FileEvent(
                    type=FileEventType.OPEN,
                    filename="a b",
                    open_flags=os.O_WRONLY | os.O_CREAT,
                    open_mode=0o644,
                )
            ),
            "open 'a b' O_WRONLY|O_CREAT 0644",
        ),
        (Event(file=FileEvent(type=FileEventType.OPEN)), "open (unknown file) O_RDONLY"),
        (
            network(NetworkEventType.CONNECT_ATTEMPT, sockfd=3, address=ipv4("10.0.0.1", 443)),
            "connect fd 3 to 10.0.0.1:443",
        ),
        (network(NetworkEventType.ACCEPT_ATTEMPT, sockfd=3), "accept fd 3"),
        (network(NetworkEventType.LISTEN_ATTEMPT, sockfd=3, backlog=128), "listen fd 3 backlog 128"),
        (network(NetworkEventType.RECVFROM_RESULT, result=100), "recvfrom = 100"),
        (network(NetworkEventType.BIND_RESULT, result=-98), "bind = -98 EADDRINUSE (Address already in use)"),
        (Event(ticker=TickerEvent(seconds=0)), time.strftime("tick %Y-%m-%d %H:%M:%S", time.localtime(0))),
        (Event(chargen=ChargenEvent(characters="abc")), "abc"),
        (
            Event(
                container=ContainerEvent(
                    type=ContainerEventType.RUNNING, name="/web", image_name="nginx:1.27", host_pid=5
                )
            ),
            "container running web (nginx:1.27) pid 5",
        ),
        (
            Event(
                container=ContainerEvent(
                    type=ContainerEventType.EXITED, name="/web", exit_code=137, exit_signal=9
                )
            ),
            "container exited web killed by SIGKILL",
        ),
        (Event(), "(an event of a kind that this version does not know)"),
    ],
)
def test_what_is_told(event: Event, text: str) -> None:
    assert tell(event) == text


def test_names_of_arguments() -> None:
    names = {"openat": ["dfd", "filename", "flags", "mode"]}
    assert (
        tell(enter(OPENAT, 1, 2, 3), arguments=names.get)
        == "openat(dfd=0x1, filename=0x2, flags=0x3, mode=0x0)"
    )


def value(kind: KernelFunctionCallEventFieldType, **fields: Any) -> KernelFunctionCallEventFieldValue:
    return KernelFunctionCallEventFieldValue(field_type=kind, **fields)


KERNEL_CALL = Event(
    kernel_call=KernelFunctionCallEvent(
        arguments={
            "name": value(KernelFunctionCallEventFieldType.STRING, string_value='a"\n'),
            "empty": value(KernelFunctionCallEventFieldType.STRING, string_value=""),
            "count": value(KernelFunctionCallEventFieldType.UINT32, unsigned_value=0),
            "at": value(KernelFunctionCallEventFieldType.UINT64, unsigned_value=0xFFFF888000000000),
            "error": value(KernelFunctionCallEventFieldType.SINT32, signed_value=-2),
            "raw": value(KernelFunctionCallEventFieldType.BYTES, bytes_value=b"\x00\xff"),
        }
    )
)


def test_kernel_functions() -> None:
    inner = r'(name="a\"\n", empty="", count=0, at=0xffff888000000000, error=-2, raw=00ff)'
    assert tell(KERNEL_CALL, symbols=["do_exit", "do_exit"]) == "do_exit" + inner
    assert tell(KERNEL_CALL, symbols=["do_exit", "do_fork"]) == "kernel" + inner


# --- lines


def telemetry(event: Event, at: int = 0) -> TelemetryEvent:
    event.sensor_monotime_nanos = 10**9 + at
    return TelemetryEvent(publish_time_micros=1_700_000_000_000_000 + at // 1000, event=event)


def exec_event(**more: Any) -> Event:
    event = executed("/bin/ls", "ls", "-l")
    event.process_pid = 4711
    event.process_lineage = [
        Process(pid=pid, command=command) for pid, command in enumerate(("ls", "sh", "init"))
    ]
    for name, of in more.items():
        setattr(event, name, of)
    return event


def lines(**options: Any) -> show.Lines:
    return show.Lines(show.Teller(str), paint=show.Paint(False), **options)


def test_lines_are_aligned_with_the_header() -> None:
    made = lines()
    header, first = made.header(), made.text([telemetry(exec_event())])
    assert header.index("EVENT") == first.index("exec /bin/ls")
    assert header.index("PROCESS") == first.index("ls  ")
    assert header.index("PID") + 3 == first.index("4711") + 4
    assert first.endswith("exec /bin/ls -l ← sh ← init\n")


def test_a_column_of_containers_comes_with_the_first_of_them() -> None:
    made = lines()
    host, inside = (
        telemetry(exec_event()),
        telemetry(exec_event(container_id="ab" * 32, container_name="/web")),
    )
    assert "CONTAINER" not in made.header() + made.text([host])
    header, line, again = made.text([inside, host]).splitlines()
    assert header.index("CONTAINER") == line.index("web ")
    assert header.index("EVENT") == line.index("exec") == again.index("exec")
    nameless = made.text([telemetry(exec_event(container_id="ab" * 32))])
    assert "abababababab " in nameless


def test_lineage_is_cut_to_the_terminal() -> None:
    whole = lines().text([telemetry(exec_event())]).rstrip("\n")
    for room in range(len(whole) - 12, len(whole) + 2):
        text = lines(width=lambda room=room: room).text([telemetry(exec_event())]).rstrip("\n")
        assert len(text) <= room
        assert text == whole if room >= len(whole) else whole.startswith(text.rstrip("…"))


def test_a_process_that_is_not_named_may_be_known() -> None:
    event = enter(0)
    event.process_pid = 7
    assert (
        lines(commands=lambda of: f"known-{of.process_pid}").text([telemetry(event)]).split()[2] == "known-7"
    )


def test_colours() -> None:
    paint = show.Paint(True)
    coloured = show.Lines(show.Teller(str, paint=paint), paint=paint).text([telemetry(exec_event())])
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == lines().text([telemetry(exec_event())])


def test_times_of_a_sensor_elsewhere() -> None:
    """Its clock is told from when events were published; what happened first is not shown later."""
    made = lines()
    events = [telemetry(exec_event(), at) for at in (0, 1_500_000, 2_000_000)]
    events[0].publish_time_micros += 5000  # took a while to be published
    times = [line.split()[0] for line in made.text(events).splitlines()]
    expected = time.strftime("%H:%M:%S", time.localtime(1_700_000_000))
    assert times == [f"{expected}.000000", f"{expected}.001500", f"{expected}.002000"]


def test_times_of_a_sensor_here() -> None:
    event = exec_event()
    before = time.time_ns()
    event.sensor_monotime_nanos = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    late = TelemetryEvent(publish_time_micros=before // 1000 + 20_000, event=event)
    text = lines().text([late]).split()[0]
    shown = int(text[6:8]) * 10**6 + int(text[9:])
    assert abs(shown - before // 1000 % (60 * 10**6)) % (60 * 10**6) < 5_000


# --- JSON


def as_json(event: Event) -> Any:
    return json.loads(show.json_line(TelemetryEvent(publish_time_micros=5, event=event)))


def test_json_has_the_api_s_names_and_says_zeros_that_mean_something() -> None:
    event = exec_event(sensor_sequence_number=1 << 63)
    event.process = ProcessEvent(type=ProcessEventType.EXIT)
    assert as_json(event) == {
        "publish_time_micros": 5,
        "event": {
            "process_pid": 4711,
            "sensor_sequence_number": 1 << 63,
            "process_lineage": [
                {"command": "ls"},
                {"pid": 1, "command": "sh"},
                {"pid": 2, "command": "init"},
            ],
            "process": {
                "type": "PROCESS_EVENT_TYPE_EXIT",
                "exit_code": 0,
                "exit_status": 0,
                "exit_signal": 0,
                "exit_core_dumped": False,
            },
            "cpu": 0,
        },
    }


def test_json_of_values() -> None:
    assert as_json(KERNEL_CALL)["event"]["kernel_call"]["arguments"] == {
        "name": {"field_type": "STRING", "string_value": 'a"\n'},
        "empty": {"field_type": "STRING", "string_value": ""},
        "count": {"field_type": "UINT32", "unsigned_value": 0},
        "at": {"field_type": "UINT64", "unsigned_value": 0xFFFF888000000000},
        "error": {"field_type": "SINT32", "signed_value": -2},
        "raw": {"field_type": "BYTES", "bytes_value": "AP8="},
    }


def test_json_of_what_a_newer_sensor_says() -> None:
    event = Event(network=NetworkEvent(type=NetworkEventType(77)))
    assert as_json(event)["event"]["network"] == {"type": 77}


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (enter(0), {"id", "arg0", "arg1", "arg2", "arg3", "arg4", "arg5"}),
        (leave(0, 0), {"id", "ret"}),
        (network(NetworkEventType.CONNECT_ATTEMPT), {"sockfd"}),
        (network(NetworkEventType.LISTEN_ATTEMPT), {"sockfd", "backlog"}),
        (network(NetworkEventType.CONNECT_RESULT), {"result"}),
        (Event(file=FileEvent(type=FileEventType.OPEN)), {"open_flags", "open_mode"}),
    ],
)
def test_json_tells_what_such_an_event_always_has(event: Event, told: set[str]) -> None:
    (message,) = as_json(event)["event"].values()
    assert message.keys() == told | {"type"}


def test_every_name_that_json_always_tells_is_a_field() -> None:
    for message, kinds in show._TELLS.items():
        fields = {field.name for field in dataclasses.fields(message)}  # type: ignore[arg-type]
        for names in kinds.values():
            assert set(names.split()) <= fields


# --- counting


def test_events_are_counted_without_being_decoded() -> None:
    response = GetEventsResponse(
        events=[telemetry(enter(index)) for index in range(300)],
        statuses=[make_status(Code.OK, "subscribed")],
    )
    envelope = open_envelope(bytes(response))
    assert (len(envelope.events), len(envelope.statuses)) == (300, 1)
    assert envelope.events[7] == bytes(response.events[7])


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


# --- check

ROWS = [
    Mechanism("system calls", True, "raw_syscalls tracepoints"),
    Mechanism(
        "kernel functions", False, "none", "this kernel has no kprobes", "a kernel with CONFIG_KPROBE_EVENTS"
    ),
]


def test_the_table() -> None:
    header, _, served, missing = check.table(ROWS).splitlines()
    assert header.split() == ["events", "served", "by", "way", "of", "remarks", "to", "have", "it"]
    assert served.index("yes") == missing.index("no ") == header.index("served")
    assert missing.index("a kernel with CONFIG_KPROBE_EVENTS") == header.index("to have it")


def test_the_rows_for_programs() -> None:
    found = json.loads(check.as_json(ROWS))
    assert found["everything_served"] is False
    assert found["mechanisms"][1]["hint"] == "a kernel with CONFIG_KPROBE_EVENTS"
    assert json.loads(check.as_json(ROWS[:1]))["everything_served"] is True


def test_where_no_sensor_can_start() -> None:
    first, *rest = check.cannot_start("not root", "be root")
    assert (first.served, first.note, first.hint) == (False, "not root", "be root")
    assert {"system calls", "processes", "file opens", "containers"} <= {row.family for row in rest}
    assert not any(row.served for row in rest)


# --- systemd


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"ringside-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        systemd.notify("READY=1")
        assert listening.recv(100) == b"READY=1"


def test_notify_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("", "relative", str(tmp_path / "nobody")):
        monkeypatch.setenv("NOTIFY_SOCKET", where)
        systemd.notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    systemd.notify("READY=1")
