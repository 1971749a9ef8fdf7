"""bpf programs in this kernel: loaded, attached, heard; refused where that is not permitted."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ringside.client.syscalls import number_of
from ringside.sensor import bpf
from ringside.sensor._perf import ffi, lib
from ringside.sensor.bpf import R0, R1, R2, R6, R7, R8, R9, R10, Attachment, Code, Helper, Label, Program, Reg
from ringside.sensor.btf import read_btf
from ringside.sensor.engine import Engine, clock
from ringside.sensor.errors import UnservableError
from ringside.sensor.perf import KernelEvent, Lane, ProgramEvent, Rings
from ringside.sensor.tracefs.format import Format
from ringside.sensor.tracefs.mount import open_tracefs

from tests.support.stream import LIBC, PATIENCE, Told

ONLINE = Path("/sys/devices/system/cpu/cpu1/online")
EXITED_AT = ("sched", "sched_process_exit")
CAP_SYS_ADMIN, CAP_BPF = 21, 39
COMM, COMM_SIZE = bpf.record_format("comm", pid="s32", tid="s32", stamp="u64", comm="char")


_made = lib.rs_bpf_map(bpf.MapType.ARRAY, 4, 8, 1)
if _made >= 0:
    os.close(_made)
elif -_made in (errno.ENOSYS, errno.EPERM):
    pytest.skip(f"bpf(2): {os.strerror(-_made)}", allow_module_level=True)


class Kernel:
    """Rings and an engine, without a sensor around them."""

    def __init__(self) -> None:
        self.tracefs = open_tracefs("/proc")
        self.engine = Engine("test", 0)
        self.rings = Rings(self.engine, 256 << 10, 256 << 10, 64 << 20)

    def close(self) -> None:
        self.rings.close()
        self.engine.close()
        self.tracefs.close()

    def format(self, system: str, name: str) -> Format:
        return self.tracefs.read_format(system, name)

    def event(self, *attachments: Attachment, caller: bool = False) -> ProgramEvent:
        source = self.engine.open_source(lib.RS_LIFECYCLE | (lib.RS_CALLER if caller else 0))
        return ProgramEvent(self.rings, "test", lambda _: attachments, source, Lane.LIFECYCLE, caller=caller)

    def records(self, event: KernelEvent) -> Iterator[tuple[int, int, bytes]]:
        """Process, thread and raw data of each record there is by now."""
        deadline = clock() + 100_000  # the youngest records are left for the next drain
        while clock() < deadline:
            pass
        while (why := self.engine.drain(0)) != lib.RS_DONE:
            stop = self.engine.stop
            if why == lib.RS_RECORD and stop.source == event.source:
                yield stop.pid, stop.tid, bytes(ffi.buffer(stop.raw, stop.raw_length))

    def until(self, event: KernelEvent, tid: int) -> bytes:
        """The raw data of that thread's record."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            for _, found, raw in self.records(event):
                if found == tid:
                    return raw
        pytest.fail(f"nothing came of thread {tid}")


@contextmanager
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    try:
        yield made
    finally:
        made.close()


def comm_program() -> Program:
    """Emits pid, tid, a stamp and the comm of whoever runs into the tracepoint."""
    return Program(
        "test_comm",
        (
            bpf.alu(R6, "=", Reg(R1)),
            bpf.call(Helper.GET_CURRENT_PID_TGID),
            bpf.store(R10, -40, 4, Reg(R0)),
            bpf.alu(R7, "=", Reg(R0)),
            bpf.alu(R7, ">>=", 32),
            bpf.load(R8, 4, R10, -40),
            bpf.store(R10, -40, 4, Reg(R7)),
            bpf.store(R10, -36, 4, Reg(R8)),
            bpf.load_constant(R2, 0x0123456789ABCDEF),
            bpf.store(R10, -32, 8, Reg(R2)),
            bpf.store(R10, -24, 4, COMM_SIZE | 16 << 16),
            bpf.store(R10, -20, 4, 0),
            bpf.alu(R1, "=", Reg(R10)),
            bpf.alu(R1, "+=", -16),
            bpf.alu(R2, "=", 16),
            bpf.call(Helper.GET_CURRENT_COMM),
            bpf.alu(R9, "=", Reg(R10)),
            bpf.alu(R9, "+=", -40),
            *bpf.emit(R6, R9, COMM_SIZE + 16),
            *bpf.leave(),
        ),
    )


def run_true(cpu: int | None = None) -> int:
    """A program that ran and is gone; its pid."""
    process = subprocess.Popen(
        [shutil.which("true") or "/bin/true"],
        preexec_fn=None if cpu is None else lambda: os.sched_setaffinity(0, {cpu}),  # noqa: PLW1509
    )
    process.wait()
    return process.pid


def test_an_event_of_ones_own_arrives_as_it_was() -> None:
    with kernel() as made:
        event = made.event(Attachment(made.format(*EXITED_AT).id, comm_program()))
        event.open()
        pid = run_true()
        assert COMM.decode(made.until(event, pid)) == {
            "pid": pid, "tid": pid, "stamp": 0x0123456789ABCDEF, "comm": "true",
        }  # fmt: skip
        assert event.lost() in (0, None)
        event.close()
        pid = run_true()
        assert pid not in [found for _, found, _ in made.records(event)]


def test_others_who_trace_it_lose_nothing() -> None:
    """A program that returned 0 would keep the records from every perf event on the tracepoint."""
    with kernel() as made:
        record = made.format(*EXITED_AT)
        event = made.event(Attachment(record.id, comm_program()))
        event.open()
        source = made.engine.open_source(lib.RS_LIFECYCLE)
        other = KernelEvent(made.rings, "other", record.id, source, Lane.LIFECYCLE)
        other.open()
        pid = run_true()
        assert record.decode(made.until(other, pid))["pid"] == pid
        event.close()
        other.close()


def test_records_of_a_new_program_follow_those_of_the_old() -> None:
    """Each is told once, by the old one or by the new, however the filter changes meanwhile."""
    with kernel() as made:
        event = made.event(Attachment(made.format(*EXITED_AT).id, comm_program()))
        event.open()
        pids = []
        for number in range(20):
            pids.append(run_true())
            event.open(str(number))
            pids.append(run_true())
        told = [pid for pid, _, _ in made.records(event) if pid in pids]
        assert told == pids
        event.close()


def test_a_record_brings_the_callers_abi() -> None:
    with kernel() as made:
        record = made.format("sched", "sched_process_exec")
        event = made.event(Attachment(record.id, comm_program()), caller=True)
        event.open()
        pid = run_true()
        found = [made.engine.stop.abi for known, _, _ in made.records(event) if known == pid]
        assert found == [2]  # PERF_SAMPLE_REGS_ABI_64
        event.close()


def test_a_full_ring_is_counted() -> None:
    """What was emitted and what came differ by what the kernel says was lost."""
    with kernel() as made:
        record = made.format("syscalls", "sys_enter_getpriority")
        large = 16 << 10
        program = Program(
            "test_large",
            (
                bpf.alu(R6, "=", Reg(R1)),
                bpf.call(Helper.GET_CURRENT_PID_TGID),
                bpf.alu(R0, ">>=", 32),
                bpf.jump_if(R0, "!=", os.getpid(), "out"),
                *bpf.find_scratch(bpf.scratch(large), "out"),
                bpf.alu(R7, "=", Reg(R0)),
                *bpf.emit(R6, R7, large),
                Label("out"),
                *bpf.leave(),
            ),
        )
        event = made.event(Attachment(record.id, program))
        event.open()
        for _ in range(100):
            os.getpriority(os.PRIO_PROCESS, 0)
        came = sum(1 for _ in made.records(event))
        lost = event.lost()
        assert came < 100
        assert lost is None or came + lost == 100
        event.close()


def reading(mark: int) -> tuple[Code, ...]:
    """Emits what the second argument of such a call points at, 8 bytes, and what reading it returned."""
    return (
        bpf.alu(R6, "=", Reg(R1)),
        bpf.load(R8, 8, R6, 16),
        bpf.jump_if(R8, "!=", mark, "out"),
        bpf.load(R8, 8, R6, 24),
        *bpf.read(Helper.PROBE_READ_USER, R10, -8, 8, R8),
        bpf.store(R10, -16, 8, Reg(R0)),
        bpf.alu(R7, "=", Reg(R10)),
        bpf.alu(R7, "+=", -16),
        *bpf.emit(R6, R7, 16),
        Label("out"),
        *bpf.leave(),
    )


def test_memory_that_is_not_present_is_told() -> None:
    mark = 0x7EADBEEF
    with kernel() as made:
        record = made.format("syscalls", "sys_enter_getpriority")
        event = made.event(Attachment(record.id, Program("test_read", reading(mark))))
        event.open()
        with mmap.mmap(-1, 4096) as page:
            address = ctypes.addressof(ctypes.c_char.from_buffer(page))
            for value in (b"", b"ringside"):
                page[: len(value)] = value
                LIBC.syscall(number_of("getpriority"), ctypes.c_ulong(mark), ctypes.c_ulong(address))
                result, got = struct.unpack("=q8s", made.until(event, threading.get_native_id())[:16])
                assert (result, got) == ((0, value) if value else (-errno.EFAULT, bytes(8)))
        event.close()


def test_cpus_that_come_and_go_are_followed(record_property: Told) -> None:
    if not ONLINE.exists():
        record_property("not_there", "no CPU that can be switched off")
        return
    with kernel() as made:
        event = made.event(Attachment(made.format(*EXITED_AT).id, comm_program()))
        event.open()
        for up in ("0", "1"):
            ONLINE.write_text(up)
            made.rings.follow_cpus()
        pid = run_true(cpu=1)
        assert COMM.decode(made.until(event, pid))["comm"] == "true"
        event.close()


def test_the_verifiers_word_is_passed_on() -> None:
    bad = Program("test_bad", (bpf.load(R0, 8, R1, 0), *bpf.leave()))
    with pytest.raises(UnservableError, match=r"refuses the bpf program test_bad: .*(ctx|context)"):
        bpf.load_programs("tests", [Attachment(0, bad)])


def test_without_the_capability_it_is_refused() -> None:
    """In a process that has lost CAP_BPF and CAP_SYS_ADMIN and has kept the others."""
    code = f"""
        import ctypes
        from ringside.sensor import bpf
        from ringside.sensor.errors import UnservableError
        header, data = (ctypes.c_uint * 2)(0x20080522, 0), (ctypes.c_uint * 6)()
        libc = ctypes.CDLL(None)
        assert libc.capget(header, data) == 0
        for capability in {CAP_SYS_ADMIN}, {CAP_BPF}:
            data[capability // 32 * 3] &= ~(1 << capability % 32)
        assert libc.capset(header, data) == 0
        try:
            bpf.load_programs("tests", [bpf.Attachment(0, bpf.Program("test", bpf.leave()))])
        except UnservableError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    )
    assert "bpf(2) is not permitted (CAP_BPF and CAP_PERFMON" in done.stdout


def test_the_kernels_types_are_read() -> None:
    """Where a pid is: the offset is asked of the kernel's types, the value of the kernel itself."""
    btf = read_btf()
    program = Program(
        "test_types",
        (
            bpf.alu(R6, "=", Reg(R1)),
            bpf.call(Helper.GET_CURRENT_TASK),
            bpf.alu(R7, "=", Reg(R0)),
            *bpf.read(Helper.PROBE_READ_KERNEL, R10, -8, 4, R7, btf.offset("task_struct", "pid")),
            *bpf.read(Helper.PROBE_READ_KERNEL, R10, -4, 4, R7, btf.offset("task_struct", "tgid")),
            bpf.alu(R7, "=", Reg(R10)),
            bpf.alu(R7, "+=", -8),
            *bpf.emit(R6, R7, 8),
            *bpf.leave(),
        ),
    )
    with kernel() as made:
        event = made.event(Attachment(made.format(*EXITED_AT).id, program))
        event.open()
        run_true()
        told = [(tid, pid) == struct.unpack("=ii", raw[:8]) for pid, tid, raw in made.records(event)]
        assert told
        assert all(told)
        event.close()
