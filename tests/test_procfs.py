"""What procfs says, from trees made up here and from this machine's own."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.sensor.procfs import Procfs, parse_stat

from .support.fakekernel import BOOT_ID, FakeProc

STAT = b"4711 (%s) S 17 4711 4711 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 9 0 123456 10 11 12\n"


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path / "proc")


@pytest.fixture
def procfs(proc: FakeProc) -> Procfs:
    return Procfs(str(proc.root))


@pytest.mark.parametrize(
    "command",
    [b"sh", b"a b", b"a) S 1 (b", b")", b"(", b"", b") ) )", b"new\nline", b"tab\tand\\", b"0123456789abcde"],
)
def test_a_command_may_be_anything(command: bytes) -> None:
    stat = parse_stat(STAT % command)
    assert stat is not None
    assert stat.command == command.decode()
    assert (stat.pid, stat.parent, stat.state, stat.threads, stat.start) == (4711, 17, "S", 9, 123456)
    assert not stat.is_kernel_thread


def test_a_command_that_is_no_utf8() -> None:
    stat = parse_stat(STAT % b"gr\xfc\xdf")
    assert stat is not None
    assert stat.command == "gr\ufffd\ufffd"


@given(st.binary(max_size=200))
def test_no_content_makes_it_fail(data: bytes) -> None:
    for text in (data, STAT[: len(data)] + data):
        try:
            parse_stat(text)
        except ValueError:
            continue


@pytest.mark.parametrize("data", [b"", b"17", b"17 (sh", b"17 (sh)", b"17 (sh) S 1 2 3", b") ("])
def test_what_is_cut_off_is_nothing(data: bytes) -> None:
    assert parse_stat(data) is None


def test_kernel_threads_are_told_by_their_flag(proc: FakeProc, procfs: Procfs) -> None:
    proc.add(2, 0, "kthreadd", flags=0x208040)
    proc.add(3, 1, "sh", flags=0x400040)
    two, three = procfs.stat(2), procfs.stat(3)
    assert two is not None
    assert three is not None
    assert (two.is_kernel_thread, three.is_kernel_thread) == (True, False)


def test_processes_are_listed_and_nothing_else(proc: FakeProc, procfs: Procfs) -> None:
    for pid in (1, 7, 4194304):
        proc.add(pid, 0, "x", start=pid)
    (proc.root / "meminfo").write_text("")
    (proc.root / "12ab").mkdir()
    assert sorted(procfs.pids()) == [1, 7, 4194304]
    assert sorted(one.start for one in procfs.scan()) == [1, 7, 4194304]


def test_a_process_that_goes_while_it_is_read_is_left_out(proc: FakeProc, procfs: Procfs) -> None:
    proc.add(1, 0)
    proc.add(2, 0)
    (proc.root / "2/stat").unlink()
    assert [one.pid for one in procfs.scan()] == [1]


def test_who_is_gone_gives_none(procfs: Procfs) -> None:
    assert procfs.stat(99) is None
    assert procfs.cgroups(99) is None
    assert procfs.read("nothing") is None
    assert not procfs.is_foreign(99)


def test_long_files_are_read_to_the_end(proc: FakeProc, procfs: Procfs) -> None:
    proc.add(5, 1)
    long = b"x" * 3_000_000
    (proc.root / "5/cmdline").write_bytes(long + b"\0y\0")
    assert procfs.read(5, "cmdline") == long + b"\0y\0"


def test_the_rest(proc: FakeProc, procfs: Procfs) -> None:
    proc.add(5, 1, elf_class=1, cgroup="0::/some\n")
    proc.add(6, 1)
    (proc.root / "6/exe").write_bytes(b"#!/bin/sh\n")
    assert procfs.boot_id() == BOOT_ID
    assert procfs.is_foreign(5)
    assert not procfs.is_foreign(6)
    assert procfs.cgroups(5) == "0::/some\n"


def test_this_very_process() -> None:
    procfs = Procfs()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        stat = procfs.stat(os.getpid())
        assert stat is not None
        assert (stat.pid, stat.parent) == (os.getpid(), os.getppid())
        assert stat.threads == len(os.listdir("/proc/self/task")) >= 2
    finally:
        stop.set()
        thread.join()
    assert os.getpid() in procfs.pids()
    assert not procfs.is_foreign(os.getpid())
