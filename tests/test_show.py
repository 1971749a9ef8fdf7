"""What is printed of events: for people, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import time
from typing import Any

import pytest
from ringside.api.v0 import (
    ChargenEvent,
    ContainerEvent,
    ContainerEventType,
    Event,
    FileEvent,
    FileEventType,
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
    TelemetryEvent,
    TickerEvent,
)
from ringside.client.syscalls import name_of
from ringside.sensor import show
from ringside.sensor.subscription import Code, make_status
from ringside.sensor.watch import open_envelope

from .support.told import OPENAT, enter, executed, leave, telemetry

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


def network(kind: NetworkEventType, **fields: Any) -> Event:
    return Event(network=NetworkEvent(type=kind, **fields))


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
