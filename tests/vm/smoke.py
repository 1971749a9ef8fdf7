"""What the matrix must find in each guest before any other result counts: the kernel's side works as it says.

Not named test_*.py, for it belongs inside a guest: run.py hands it to pytest there. A feature that a kernel
does not have is told by record_property("not_there", WHY), and WHY must come from the kernel's own word.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TRACEFS = Path("/sys/kernel/tracing")
GROUP = "ringside_smoke"
LIBC = ctypes.CDLL(None, use_errno=True)
Record = Callable[[str, object], None]

# what the design says that all these kernels take
PROBES = {
    "open": "do_sys_openat2 path=+0($arg2):ustring flags=+0($arg3):u64 mode=+8($arg3):u64",
    "connect": "__sys_connect fd=$arg1:s32 family=+u0($arg2):u16",
    "bind": "__sys_bind fd=$arg1:s32 family=+u0($arg2):u16",
    "sendto": "__sys_sendto fd=$arg1:s32 family=+u0($arg5):u16",
    "recvfrom": "__sys_recvfrom fd=$arg1:s32",
    "listen": "__sys_listen fd=$arg1:s32 backlog=$arg2:s32",
    "accept": "__sys_accept4 fd=$arg1:s32",
    "sendmsg": "__sys_sendmsg fd=$arg1:s32",
    "recvmsg": "__sys_recvmsg fd=$arg1:s32",
    "exit": "do_exit code=$arg1:s64",
    "exec": "finalize_exec",
    "start": "start_thread ip=$arg2:x64 sp=$arg3:x64",
}


def write_event(command: str) -> None:
    # Python's mode "a" seeks to the end, which this file refuses; without O_APPEND all other events go
    fd = os.open(TRACEFS / "dynamic_events", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, command.encode())
    finally:
        os.close(fd)


@pytest.fixture
def probe() -> Iterator[Callable[[str, str], Path]]:
    """Defines a dynamic event and gives its folder; takes it away at the end."""
    made: list[str] = []

    def define(kind: str, text: str) -> Path:
        name = f"probe{len(made)}"
        write_event(f"{kind}:{GROUP}/{name} {text}")
        made.append(name)
        return TRACEFS / "events" / GROUP / name

    yield define
    for name in made:
        write_event(f"-:{GROUP}/{name}")
    assert GROUP not in (TRACEFS / "dynamic_events").read_text()


@pytest.fixture
def trace() -> Iterator[Path]:
    """A trace buffer of our own."""
    folder = TRACEFS / "instances" / GROUP
    folder.mkdir()
    yield folder
    folder.rmdir()


def test_two_cpus() -> None:
    assert os.cpu_count() == 2


def test_root_is_not_the_hosts() -> None:
    """What a test writes must not reach the machine that runs the matrix."""
    assert any(
        line.split()[1:3] == ["/", "overlay"] for line in Path("/proc/mounts").read_text().splitlines()
    )


@pytest.mark.parametrize("name", PROBES)
def test_kprobe_defined(probe: Callable[[str, str], Path], name: str) -> None:
    assert (probe("p", PROBES[name]) / "format").read_text().startswith("name: probe0")


def test_kprobe_fires(probe: Callable[[str, str], Path], trace: Path) -> None:
    event = trace / "events" / GROUP / probe("p", PROBES["open"]).name
    (event / "enable").write_text("1")
    Path("/dev/null").read_bytes()
    (event / "enable").write_text("0")
    assert 'path="/dev/null"' in (trace / "trace").read_text()


def test_kretprobe_fires(probe: Callable[[str, str], Path], trace: Path) -> None:
    event = trace / "events" / GROUP / probe("r", "do_sys_openat2 ret=$retval:s32").name
    (event / "enable").write_text("1")
    assert not Path("/nothing/here").exists()
    with pytest.raises(FileNotFoundError):
        os.open("/nothing/here", os.O_RDONLY)
    (event / "enable").write_text("0")
    assert "ret=-2" in (trace / "trace").read_text()


def has_event_probes() -> bool:
    # "e[:[<group>/][<event>]] <attached-group>.<attached-event> [<args>] [if <filter>]"
    return "<attached-group>" in (TRACEFS / "README").read_text()


def test_event_probe_reads_an_address(
    probe: Callable[[str, str], Path], trace: Path, record_property: Record
) -> None:
    wanted = "syscalls/sys_enter_connect family=+u0($uservaddr):u16"
    if not has_event_probes():
        record_property("not_there", "tracefs README names no event probes")
        with pytest.raises(OSError, match="Invalid argument"):
            write_event(f"e:{GROUP}/probe0 {wanted}")
        return
    event = trace / "events" / GROUP / probe("e", wanted).name
    (event / "enable").write_text("1")
    with socket.socket(socket.AF_UNIX) as unix, pytest.raises(FileNotFoundError):
        unix.connect("/nothing/here")
    (event / "enable").write_text("0")
    assert f"family={socket.AF_UNIX.value}" in (trace / "trace").read_text()


def test_event_probe_reads_a_file_name(
    probe: Callable[[str, str], Path], trace: Path, record_property: Record
) -> None:
    if not has_event_probes():
        record_property("not_there", "tracefs README names no event probes")
        return
    wanted = "syscalls/sys_enter_openat path=+0($filename):ustring pointer=$filename:x64"
    event = trace / "events" / GROUP / probe("e", wanted).name
    (event / "enable").write_text("1")
    Path("/dev/null").read_bytes()
    (event / "enable").write_text("0")
    lines = [line for line in (trace / "trace").read_text().splitlines() if "pointer=" in line]
    assert lines
    pointers = [ctypes.c_int64(int(line.rpartition("pointer=")[2], 16)).value for line in lines]
    if all(-128 <= pointer < 128 for pointer in pointers):
        # 6.1: get_event_field() of trace_eprobe.c reads a char where it should read a char *
        record_property("not_there", "event probes read one byte of a string's pointer")
        return
    assert any('path="/dev/null"' in line for line in lines)


def test_open_tracepoint_has_the_name(trace: Path, record_property: Record) -> None:
    event = trace / "events/syscalls/sys_enter_openat"
    if "__filename_val" not in (event / "format").read_text():
        record_property("not_there", "sys_enter_openat has no field __filename_val")
        return
    (event / "enable").write_text("1")
    Path("/dev/null").read_bytes()
    (event / "enable").write_text("0")
    assert '"/dev/null"' in (trace / "trace").read_text()


def test_perf_counts_and_samples() -> None:
    """perf_event_open(2) on raw_syscalls:sys_enter, by hand: a counter, and a record in its ring."""
    identity = int((TRACEFS / "events/raw_syscalls/sys_enter/id").read_text())
    # type size config sample_period sample_type read_format flags wakeup_events bp_type bp_addr bp_len
    raw = 1 << 10
    attributes = struct.pack("=IIQQQQQIIQQ", 2, 72, identity, 1, raw, 0, 1, 1, 0, 0, 0) + bytes(8)
    fd = LIBC.syscall(298, attributes, os.getpid(), -1, -1, 8)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    ring = mmap.mmap(fd, mmap.PAGESIZE * 9)
    try:
        assert LIBC.ioctl(fd, 0x2400, 0) == 0
        os.getppid()
        assert LIBC.ioctl(fd, 0x2401, 0) == 0
        assert struct.unpack("=Q", os.read(fd, 8))[0] > 0
        assert struct.unpack_from("=Q", ring, 1024)[0] > 0  # data_head
    finally:
        ring.close()
        os.close(fd)


def test_cgroup_has_processes_moved() -> None:
    root = next(
        Path(line.split()[1])
        for line in Path("/proc/mounts").read_text().splitlines()
        if line.split()[2] == "cgroup2"
    )
    group = root / GROUP
    group.mkdir()
    with subprocess.Popen(["sleep", "1000"]) as child:
        (group / "cgroup.procs").write_text(str(child.pid))
        assert f"0::/{GROUP}" in Path(f"/proc/{child.pid}/cgroup").read_text()
        child.kill()
    group.rmdir()


def test_proc_connector_tells_exit() -> None:
    """CN_PROC: netlink connector, NLMSG_DONE, idx 1 val 1, PROC_CN_MCAST_LISTEN."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 11) as connector:
        connector.bind((0, 1))
        body = struct.pack("=IIIIHHI", 1, 1, 0, 0, 4, 0, 1)
        connector.send(struct.pack("=IHHII", 16 + len(body), 3, 0, 0, 0) + body)
        child = subprocess.Popen(["sh", "-c", "exit 7"])
        child.wait()
        deadline = 30
        while select.select([connector], [], [], deadline)[0]:
            # nlmsghdr 16, cn_msg 20, then what cpu timestamp, then pid tgid code signal
            what, _, _, pid, _, code = struct.unpack_from("=IIQIII", connector.recv(4096), 36)
            if what == 0x80000000 and pid == child.pid:
                assert os.waitstatus_to_exitcode(code) == 7
                return
        pytest.fail("no exit told")
