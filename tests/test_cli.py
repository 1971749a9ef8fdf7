"""The command line, what `check` prints, what systemd is told."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ringside.sensor import check, systemd
from ringside.sensor.cli import main
from ringside.sensor.config import Config
from ringside.sensor.events import Mechanism

from .support.told import run_process


def run(*arguments: str, **environment: str) -> Result:
    unset: dict[str, str | None] = dict.fromkeys(key for key in os.environ if key.startswith("RINGSIDE_"))
    return CliRunner().invoke(main, arguments, prog_name="ringside", env={**unset, **environment})


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
