"""Where tracefs is found, what it is taken for, and its files."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import tempfile
from pathlib import Path

import pytest
from ringside.sensor.errors import KernelError, SetupError
from ringside.sensor.tracefs import mount
from ringside.sensor.tracefs.mount import Mount, Tracefs, candidates, open_tracefs, parse_mountinfo

USUAL = "42 23 0:13 / /sys/kernel/tracing rw,relatime shared:5 master:2 - tracefs nodev rw\n"


def tree(root: Path) -> Path:
    """Something of the shape of tracefs."""
    (root / "events" / "sched" / "sched_process_exec").mkdir(parents=True)
    (root / "set_event").touch()
    return root


def proc_with(tmp_path: Path, *lines: str) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "mountinfo").write_text("".join(f"{line}\n" for line in lines))
    return tmp_path / "proc"


# Mountinfo


def test_mountinfo() -> None:
    text = USUAL + (
        "24 30 0:22 / /proc rw,nosuid - proc proc rw\n"
        "43 23 0:7 / /sys/kernel/debug ro,relatime - debugfs debugfs rw\n"
        "44 23 0:7 / /mnt/a\\040b\\134c rw - tracefs tracefs ro,mode=700\n"
        "45 23 0:7 / /other rw - ext4\n"
        "cut off\n\n"
    )
    assert parse_mountinfo(text) == [
        Mount(Path("/sys/kernel/tracing"), "tracefs", False),
        Mount(Path("/proc"), "proc", False),
        Mount(Path("/sys/kernel/debug"), "debugfs", True),
        Mount(Path("/mnt/a b\\c"), "tracefs", True),
        Mount(Path("/other"), "ext4", False),
    ]


def test_candidates_best_first() -> None:
    mounts = [
        Mount(Path("/host/tracing"), "tracefs", True),
        Mount(Path("/sys/kernel/debug"), "debugfs", False),
        Mount(Path("/old"), "tracefs", False),
        Mount(Path("/sys/kernel/tracing"), "tracefs", False),
        Mount(Path("/proc"), "proc", False),
        Mount(Path("/new"), "tracefs", False),
        Mount(Path("/new"), "tracefs", True),
    ]
    assert list(candidates(mounts)) == [
        (Path("/sys/kernel/tracing"), False),
        (Path("/new"), False),
        (Path("/old"), False),
        (Path("/sys/kernel/debug/tracing"), False),
        (Path("/host/tracing"), True),
    ]


# Finding


def test_found_at_another_path(tmp_path: Path) -> None:
    """As in a container, and beside one that shows no events."""
    (tmp_path / "empty" / "events").mkdir(parents=True)
    tree(tmp_path / "host")
    proc = proc_with(
        tmp_path,
        "1 2 0:1 / /nowhere rw - tracefs x rw",
        f"1 2 0:1 / {tmp_path}/host rw - tracefs x rw",
        f"1 2 0:1 / {tmp_path}/empty rw - tracefs x rw",
    )
    tracefs = open_tracefs(proc)
    assert tracefs.root == tmp_path / "host"
    assert tracefs.writable


def test_found_under_debugfs(tmp_path: Path) -> None:
    tree(tmp_path / "debug" / "tracing")
    proc = proc_with(tmp_path, f"1 2 0:1 / {tmp_path}/debug rw - debugfs x rw")
    assert open_tracefs(proc).root == tmp_path / "debug" / "tracing"


def test_read_only_is_recognised(tmp_path: Path) -> None:
    tree(tmp_path / "t")
    proc = proc_with(tmp_path, f"1 2 0:1 / {tmp_path}/t ro - tracefs x rw")
    assert not open_tracefs(proc).writable


def test_a_writable_one_is_preferred(tmp_path: Path) -> None:
    tree(tmp_path / "a")
    tree(tmp_path / "b" / "tracing")
    proc = proc_with(
        tmp_path,
        f"1 2 0:1 / {tmp_path}/b rw - debugfs x rw",
        f"1 2 0:1 / {tmp_path}/a ro - tracefs x rw",
    )
    tracefs = open_tracefs(proc)
    assert tracefs.root == tmp_path / "b" / "tracing"
    assert tracefs.writable


def test_none_and_not_allowed_to_mount(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="mount -t tracefs"):
        open_tracefs(proc_with(tmp_path), may_mount=False)


def test_no_proc(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="mountinfo can't be read"):
        open_tracefs(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("code", "uid", "lockdown", "words"),
    [
        (errno.ENODEV, 0, "", "CONFIG_FTRACE"),
        (errno.EPERM, 1000, "", "run as root"),
        (errno.EPERM, 0, "none integrity [confidentiality]\n", "lockdown"),
        (errno.EPERM, 0, "[none] integrity confidentiality\n", "CAP_SYS_ADMIN"),
        (errno.EIO, 0, "", "no usable tracefs"),
    ],
)
def test_why_none_can_be_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, uid: int, lockdown: str, words: str
) -> None:
    def refuse(target: Path) -> None:
        raise OSError(code, os.strerror(code), str(target))

    monkeypatch.setattr(mount, "_mount", refuse)
    monkeypatch.setattr(mount, "_lockdown", lambda: lockdown)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(mount, "STANDARD_PATH", tmp_path / "nothing")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SetupError, match=words):
        open_tracefs(proc_with(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["proc"]


# Files


def test_files(tmp_path: Path) -> None:
    tracefs = Tracefs(tree(tmp_path))
    (tmp_path / "filter").write_text("a long text before")
    tracefs.write("1", "filter")
    assert tracefs.read("filter") == "1"
    tracefs.append("2", "filter")
    assert tracefs.read("filter") == "12"
    assert tracefs.exists("filter")
    assert not tracefs.exists("other")
    assert tracefs.events("sched") == ["sched_process_exec"]
    assert tracefs.events("nosuch") == []


def test_the_kernels_refusal_is_told(tmp_path: Path) -> None:
    tracefs = Tracefs(tmp_path)
    for refused in (
        lambda: tracefs.read("events", "nosuch", "format"),
        lambda: tracefs.write("1", "events", "nosuch", "enable"),
        lambda: tracefs.append("1", "kprobe_events"),
        lambda: tracefs.read_format("sched", "nosuch"),
        lambda: tracefs.event_id("sched", "nosuch"),
        lambda: tracefs.make_instance("x"),
    ):
        with pytest.raises(KernelError) as error:
            refused()
        assert error.value.errno == errno.ENOENT
    tracefs.remove_instance("nosuch")


def test_what_others_have_is_never_truncated(tmp_path: Path) -> None:
    (tmp_path / "kprobe_events").write_text("p:a/b c\n")
    with pytest.raises(ValueError, match="others"):
        Tracefs(tmp_path).write("p:d/e f\n", "kprobe_events")
    assert (tmp_path / "kprobe_events").read_text() == "p:a/b c\n"


@pytest.mark.parametrize(
    ("system", "name"), [("..", "set_event"), ("a/b", "c"), ("", "x"), ("x", "."), ("x", "a\0")]
)
def test_names_stay_inside(tmp_path: Path, system: str, name: str) -> None:
    tracefs = Tracefs(tree(tmp_path))
    assert not tracefs.has_event(system, name)
    with pytest.raises(KernelError):
        tracefs.read_format(system, name)
    assert ".." in system or tracefs.events(system) == []


def test_size_of_a_long(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    page = tmp_path / "events" / "header_page"
    page.write_text(
        "\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n\tfield: local_t commit;\toffset:8;\tsize:4;"
    )
    assert Tracefs(tmp_path).long_size == 4
    page.unlink()
    assert Tracefs(tmp_path).long_size == ctypes.sizeof(ctypes.c_long)


# The kernel


@pytest.mark.live
def test_of_the_running_kernel() -> None:
    with open_tracefs() as tracefs:
        assert tracefs.has_event("sched", "sched_process_exec")
        assert not tracefs.has_event("sched", "nosuch")
        assert "sys_enter" in tracefs.events("raw_syscalls")
        assert tracefs.writable
        assert tracefs.long_size == (8 if sys.maxsize > 2**32 else tracefs.long_size)
        tracefs.close()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A proc whose mountinfo shows no tracefs, and no standard place: one has to be mounted."""
    return proc_with(tmp_path)


@pytest.mark.live
def test_own_mount_is_private_and_goes(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mount, "STANDARD_PATH", tmp_path / "nothing")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tracefs = open_tracefs(elsewhere)
    try:
        assert tracefs.root.parent == tmp_path
        assert tracefs.writable
        assert tracefs.read_format("sched", "sched_process_exec").id > 0
    finally:
        tracefs.close()
        tracefs.close()
    assert not tracefs.root.exists()
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.live
def test_a_read_only_mount(tmp_path: Path) -> None:
    """As a container gets it: tracepoints can be read, probes not defined, and that is seen."""
    mount._mount(tmp_path)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        remount_bind_ro = 32 | 4096 | 1
        flags = ctypes.c_ulong(remount_bind_ro)
        assert libc.mount(b"none", os.fsencode(tmp_path), None, flags, None) == 0, os.strerror(
            ctypes.get_errno()
        )
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        mine = [line for line in lines if str(tmp_path) in line]
        proc = tmp_path.parent / "fake-proc"
        (proc / "self").mkdir(parents=True)
        (proc / "self" / "mountinfo").write_text("\n".join(mine) + "\n")
        tracefs = open_tracefs(proc)
        assert tracefs.root == tmp_path
        assert not tracefs.writable
        assert not mount._accepts_writes(tmp_path)  # by itself too, without the mount's options
        assert tracefs.read_format("sched", "sched_process_exec").fields
        with pytest.raises(KernelError, match="read-only"):
            tracefs.append("p:a/b /bin/true:0x10\n", "uprobe_events")
    finally:
        ctypes.CDLL(None).umount2(os.fsencode(tmp_path), 2)
