"""The `ringside` command on the real kernel."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

pytestmark = pytest.mark.live

COMMAND = (sys.executable, "-m", "ringside.sensor.cli")
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("RINGSIDE_")}
DEADLINE = 60
UNPRIVILEGED = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")


def run(*arguments: str, prefix: Sequence[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [*prefix, *COMMAND, *arguments],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=DEADLINE, check=False, **options,
    )  # fmt: skip


class Running:
    """A command that runs, and its lines of standard output as they come."""

    def __init__(self, process: subprocess.Popen[str], stderr: IO[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.lines: list[str] = []
        self.errors = ""
        self._stdout = process.stdout
        self._stderr = stderr

    def line(self, wanted: Callable[[str], Any]) -> str:
        """The next line that is wanted; fails if the command ends before."""
        for line in self._stdout:
            self.lines.append(line)
            if wanted(line):
                return line
        pytest.fail(f"ended without it: {self.lines[-3:]}, {self.end()}")

    def end(self, number: int | None = None) -> int:
        """Send a signal if there is one; the exit status, when all output has been read."""
        if number is not None:
            self.process.send_signal(number)
        self.lines += self._stdout.readlines()
        status = self.process.wait(DEADLINE)
        self._stderr.seek(0)
        self.errors = self._stderr.read()
        return status


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[Running]:
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE, stderr=stderr, text=True, env={**ENVIRONMENT, **environment},
        )  # fmt: skip
        watchdog = threading.Timer(DEADLINE, process.kill)  # a line that never comes is a failure, not a wait
        watchdog.start()
        try:
            with process:  # closes standard output, waits
                try:
                    yield Running(process, stderr)
                finally:
                    process.kill()
        finally:
            watchdog.cancel()
            watchdog.join()


def is_header(line: str) -> bool:
    """Printed when the subscription is live: what happens from here on is seen."""
    return line.startswith("TIME ")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A sensor that serves."""
    where = f"unix:{tmp_path}/run/sensor.sock"
    with running("serve", "--listen", where) as served:
        served.line(lambda line: line == f"listening at {where}\n")
        yield where
        assert served.end(signal.SIGTERM) == 0
        assert served.errors == ""


# --- watch


@pytest.mark.parametrize("by_service", [False, True])
def test_a_program_with_its_arguments_and_exit_status(
    by_service: bool, request: pytest.FixtureRequest
) -> None:
    connect = ["--connect", request.getfixturevalue("address")] if by_service else []
    with running("watch", "process", *connect) as watched:
        watched.line(is_header)
        status = subprocess.run(["sh", "-c", "exit 3", "ringside test", "$it's"], check=False).returncode
        assert status == 3
        executed = watched.line(lambda line: "'ringside test'" in line)
        pid = executed.split()[1]
        assert re.search(r""" exec \S*/sh -c 'exit 3' 'ringside test' '\$it'"'"'s' ← """, executed)
        ended = watched.line(lambda line: line.split()[1] == pid)
        assert re.search(rf" +{pid} sh +exit 3 ← ", ended)
        assert watched.end(signal.SIGINT) == 0
    assert re.fullmatch(r"[\d,]+ events in \d+\.\d s, [\d.,]+ a second, none lost\n", watched.errors)


def test_a_program_that_is_killed() -> None:
    with running("watch", "process:exit") as watched:
        watched.line(is_header)
        with subprocess.Popen(["sleep", "1000"]) as process:
            process.kill()
        watched.line(lambda line: line.split()[1] == str(process.pid) and "killed by SIGKILL" in line)


def test_json_has_the_names_of_the_api() -> None:
    # a tick tells that the subscription is live
    with running("watch", "process", "ticker:50ms", "--json") as watched:
        watched.line(lambda line: "ticker" in json.loads(line)["event"])
        process = subprocess.run(["sh", "-c", "exit 300"], check=False)
        assert process.returncode == 300 & 0xFF
        found: list[dict[str, Any]] = []

        def ended(line: str) -> bool:
            event = json.loads(line)["event"]
            found.append(event)
            return bool(event.get("process", {}).get("exit_status") == 300 & 0xFF)

        watched.line(ended)
        assert watched.end(signal.SIGTERM) == 0
    exited = found[-1]
    executed = next(
        event
        for event in found
        if event.get("process_id") == exited["process_id"]
        and event["process"]["type"] == "PROCESS_EVENT_TYPE_EXEC"
    )
    assert executed["process"]["exec_command_line"] == ["sh", "-c", "exit 300"]
    assert exited["process"] == {
        "type": "PROCESS_EVENT_TYPE_EXIT",
        "exit_code": (300 & 0xFF) << 8,
        "exit_status": 300 & 0xFF,
        "exit_signal": 0,
        "exit_core_dumped": False,
    }
    assert exited["process_lineage"][0] == {"pid": exited["process_pid"], "command": "sh"}
    assert exited["process_lineage"][1]["pid"] == os.getpid()
    numbers = [event["sensor_sequence_number"] for event in found]
    assert numbers == sorted(set(numbers))


def test_limit() -> None:
    result = run("watch", "ticker:10ms", "--limit", "5", "--json")
    assert result.returncode == 0
    assert result.stdout.count("\n") == 5
    assert result.stderr.startswith("5 events in ")


def test_for_a_time() -> None:
    result = run("watch", "ticker:10ms", "--for", "500ms", "--quiet")
    assert (result.returncode, result.stdout) == (0, "")
    closing = re.match(r"(\d+) events in (\d+\.\d) s", result.stderr)
    assert closing is not None
    assert 1 <= int(closing[1]) <= 50
    assert float(closing[2]) >= 0.5


def test_system_calls_by_name_with_their_process() -> None:
    with running("watch", "syscall:getppid", "syscall:getppid:exit") as watched:
        watched.line(is_header)
        with subprocess.Popen([sys.executable, "-c", "import os; os.getppid()"]) as process:
            pass
        mine = [watched.line(lambda line: line.split()[1] == str(process.pid)) for _ in range(2)]
        assert watched.end(signal.SIGINT) == 0
    command = Path(sys.executable).name[:15]
    assert re.search(rf" {process.pid} +{re.escape(command)} +getppid\(", mine[0])
    assert mine[1].endswith(f" getppid = {os.getpid()}\n")


def test_the_arguments_of_a_system_call_have_names() -> None:
    with running("watch", "syscall:dup2") as watched:
        watched.line(is_header)
        subprocess.run([sys.executable, "-c", "import os; os.dup2(1, 77)"], check=True)
        watched.line(lambda line: line.endswith(" dup2(oldfd=0x1, newfd=0x4d)\n"))


def test_a_filter_is_applied() -> None:
    with running("watch", "process", "--filter", "exit_code == 1792", "--limit", "1") as watched:
        watched.line(is_header)
        for status in (6, 7, 8):
            subprocess.run(["sh", "-c", f"exit {status}"], check=False)
        watched.line(lambda line: " exit 7 " in line)
        assert watched.end() == 0
    assert len(watched.lines) == 2


def test_the_command_does_not_see_itself() -> None:
    with running("watch", "syscall:write", "ticker:10ms", "--json") as watched:
        for _ in range(20):
            watched.line(lambda line: "ticker" in json.loads(line)["event"])
        watched.end(signal.SIGINT)
    seen = {json.loads(line)["event"].get("process_pid") for line in watched.lines}
    assert watched.process.pid not in seen


def test_the_command_sees_itself_if_that_is_wanted() -> None:
    with running("watch", "syscall:write", "ticker:10ms", "--json", "--include-self") as watched:
        watched.line(lambda line: json.loads(line)["event"].get("process_pid") == watched.process.pid)


@pytest.mark.parametrize("by_service", [False, True])
def test_a_burst_is_shown_to_the_last_event(by_service: bool, request: pytest.FixtureRequest) -> None:
    connect = ["--connect", request.getfixturevalue("address")] if by_service else []
    count = 20_000
    code = f"import os\nfor _ in range({count}): os.getppid()"
    mine = ["--filter", f"ret == {os.getpid()}"]  # calls of our children only
    with running("watch", "syscall:getppid:exit", *mine, "--limit", str(count), *connect) as watched:
        watched.line(is_header)
        subprocess.run([sys.executable, "-c", code], check=True)
        assert watched.end() == 0
    assert len(watched.lines) == 1 + count
    assert re.match(r"20,000 events in .*, none lost\n", watched.errors)


def test_what_the_sensor_refuses_is_a_line() -> None:
    for arguments in (["chargen:70000"], ["syscall:99999999999"]):
        result = run("watch", *arguments)
        assert (result.returncode, result.stdout) == (1, "")
        assert re.fullmatch(r"ringside: subscription\.event_filter\.\S+: .*\n", result.stderr)


def test_what_the_sensor_refuses_by_a_service_is_a_line(address: str) -> None:
    result = run("watch", "chargen:70000", "--connect", address)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"ringside: INVALID_ARGUMENT: subscription\.event_filter\.\S+: .*\n", result.stderr)


def test_a_pipe_that_is_closed_ends_it_quietly() -> None:
    script = f'{" ".join(COMMAND)} watch ticker:10ms | head -n 2; echo "${{PIPESTATUS[@]}}"'
    result = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=DEADLINE, check=False
    )
    header, tick, status = result.stdout.splitlines()
    assert is_header(header)
    assert " tick " in tick
    assert status == "0 0"
    assert result.stderr == ""


# --- serve


def test_a_served_socket_is_its_owner_s_and_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "sensor.sock"
    with running("serve", "--listen", f"unix:{path}") as served:
        served.line(lambda line: line == f"listening at unix:{path}\n")
        assert stat.filemode(path.stat().st_mode) == "srw-------"
        assert served.end(signal.SIGINT) == 0
    assert not path.exists()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "sensor.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    before = path.stat().st_ino
    with running("serve", "--listen", f"unix:{path}") as served:
        served.line(lambda line: line.startswith("listening"))
        assert path.stat().st_ino != before or path.stat().st_mtime > 0
        assert run("watch", "ticker:10ms", "--limit", "1", "--connect", f"unix:{path}").returncode == 0
        assert served.end(signal.SIGTERM) == 0


def test_a_live_socket_is_refused_and_left_alone(address: str) -> None:
    result = run("serve", "--listen", address)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"ringside: another sensor listens at {address}; ")
    assert run("watch", "ticker:10ms", "--limit", "1", "--connect", address).returncode == 0


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    result = run("serve", "--listen", f"unix:{path}")
    assert result.returncode == 1
    assert "is no socket" in result.stderr
    assert path.read_text() == "data"


def test_tcp(tmp_path: Path) -> None:
    with running("serve", "--listen", "127.0.0.1:0", "--listen", f"unix:{tmp_path}/s") as served:
        where = served.line(lambda line: "127.0.0.1" in line).removeprefix("listening at ").strip()
        assert run("watch", "ticker:10ms", "--limit", "1", "--connect", where).returncode == 0
        taken = run("serve", "--listen", where)
        assert taken.returncode == 1
        assert taken.stderr.startswith(f"ringside: can't listen at {where}: Address already in use")
        assert served.end(signal.SIGTERM) == 0


def test_tcp_that_others_reach_is_refused() -> None:
    for where in ("0.0.0.0:0", "[::]:0"):
        result = run("serve", "--listen", where)
        assert result.returncode == 1
        assert result.stderr.startswith("ringside: plain TCP at ")
    with running("serve", "--listen", "0.0.0.0:0", "--insecure") as served:
        served.line(lambda line: line.startswith("listening at 0.0.0.0:"))
        assert served.end(signal.SIGTERM) == 0


def test_a_stream_ends_when_the_sensor_stops(tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/s"
    with running("serve", "--listen", where) as served:
        served.line(lambda line: line.startswith("listening"))
        with running("watch", "ticker:10ms", "--connect", where) as watched:
            watched.line(lambda line: "tick" in line)
            assert served.end(signal.SIGTERM) == 0
            assert watched.end() == 1
    closing, complaint = watched.errors.splitlines()
    assert " none lost" in closing
    assert complaint.startswith("ringside: ")
    assert "shutting down" in complaint


def test_settings_from_variables_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ringside.toml"
    file.write_text(f'listen = ["unix:{tmp_path}/file"]\nsensor-id = "from-the-file"\nlineage = "all"\n')
    with running("serve", "--config", str(file), RINGSIDE_SENSOR_ID="from-a-variable") as served:
        served.line(lambda line: line == f"listening at unix:{tmp_path}/file\n")
        result = run("watch", "ticker:10ms", "--limit", "1", "--json", "--connect", f"unix:{tmp_path}/file")
        assert json.loads(result.stdout)["event"]["sensor_id"] == "from-a-variable"
        assert served.end(signal.SIGTERM) == 0


def test_systemd_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(DEADLINE)
        where = f"unix:{tmp_path}/s"
        with running("serve", "--listen", where, NOTIFY_SOCKET=str(tmp_path / "notify")) as served:
            assert manager.recv(100) == b"READY=1"
            assert Path(tmp_path, "s").is_socket()
            served.process.terminate()
            assert manager.recv(100) == b"STOPPING=1"
            assert served.end() == 0


# --- check, and too few privileges


def test_check() -> None:
    result = run("check", "--json")
    found = json.loads(result.stdout)
    rows = {row["family"]: row for row in found["mechanisms"]}
    assert rows["system calls"]["served"]
    assert rows["processes"]["served"]
    assert found["everything_served"] is all(row["served"] for row in rows.values())
    assert result.returncode == (0 if found["everything_served"] else 1)
    for row in rows.values():
        assert row["served"] or row["hint"]
    table = run("check")
    assert table.returncode == result.returncode
    for family in rows:
        assert family in table.stdout
    assert "\x1b" not in table.stdout


def test_without_privileges() -> None:
    result = run("check", "--json", prefix=UNPRIVILEGED)
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert found["everything_served"] is False
    assert not any(row["served"] for row in found["mechanisms"])
    assert found["mechanisms"][0]["note"]
    assert found["mechanisms"][0]["hint"]
    for arguments in (["watch", "process"], ["serve", "--listen", "127.0.0.1:0"]):
        result = run(*arguments, prefix=UNPRIVILEGED)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("ringside: ")
        assert result.stderr.count("\n") == 1
        assert found["mechanisms"][0]["hint"] in result.stderr


def test_with_little_memory_to_lock(tmp_path: Path) -> None:
    """Rings are smaller then, and somebody says so."""
    address = f"unix:{tmp_path}/sensor.sock"
    # enough for four rings of 256 KiB, also if other sensors have taken what all of root's may lock besides
    prefix = ("prlimit", f"--memlock={3 << 19}", "setpriv", "--bounding-set=-ipc_lock")
    with (
        subprocess.Popen(
            [*prefix, *COMMAND, "serve", "--listen", address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            text=True,
        ) as server,
    ):
        try:
            assert server.stdout is not None
            assert server.stdout.readline()
            told = run("watch", "--connect", address, "syscall", "--limit", "5")
            assert (told.returncode, told.stderr[:8]) == (0, "5 events"), told.stderr
        finally:
            server.terminate()
            _, said = server.communicate(timeout=DEADLINE)
    smaller = re.findall(r"^ringside: (\w+) rings of (\d+) KiB instead of (\d+)", said, re.MULTILINE)
    assert {"lifecycle", "bulk"} <= {lane for lane, _, _ in smaller}
    assert all(256 <= int(new) < int(old) for _, new, old in smaller)


def test_in_another_pid_namespace() -> None:
    result = run("watch", "process", prefix=("unshare", "--pid", "--fork"))
    assert result.returncode == 1
    assert result.stderr.startswith("ringside: this is not the host's pid namespace")
    assert "--pid=host" in result.stderr
