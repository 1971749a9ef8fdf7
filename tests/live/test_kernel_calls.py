"""Kernel functions: probes of the caller's choice, every type of argument, and what the kernel refuses."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from ringside.api.v0 import (
    Event,
    KernelFunctionCallEventFieldType,
    KernelFunctionCallEventFieldValue,
    KernelFunctionCallEventType,
    KernelFunctionCallFilter,
)
from ringside.sensor.errors import RequestError, UnservableError

from ..support.stream import LIBC, Told, has_kprobes, is_missing, own_sensor, probes, watching

F = KernelFunctionCallEventFieldType
ENTER, EXIT = KernelFunctionCallEventType.ENTER, KernelFunctionCallEventType.EXIT
OPEN, OPENAT = 2, 257
END = 987_654_321


def called(
    symbol: str,
    more: Mapping[str, str] | None = None,
    *,
    on: KernelFunctionCallEventType = ENTER,
    where: str = "",
    **arguments: str,
) -> KernelFunctionCallFilter:
    return KernelFunctionCallFilter(
        type=on, symbol=symbol, arguments={**(more or {}), **arguments}, filter=where
    )


# what every stream of these tests sees last
LAST = called("__sys_listen", where=f"end == {END}", end="$arg1:s32")


def is_end(event: Event) -> bool:
    return event.kernel_call is not None and "end" in event.kernel_call.arguments


def end() -> None:
    LIBC.listen(END, 1)


def value_of(value: KernelFunctionCallEventFieldValue) -> tuple[F, object]:
    """The type and whichever value is set, which must be one."""
    values = (value.bytes_value, value.string_value, value.signed_value, value.unsigned_value)
    (found,) = (one for one in values if one is not None)
    return F(value.field_type), found


def told(event: Event) -> dict[str, tuple[F, object]]:
    assert event.kernel_call is not None
    assert event.process_pid == os.getpid()
    return {name: value_of(value) for name, value in event.kernel_call.arguments.items()}


def open_at(memory: ctypes.Array[ctypes.c_char]) -> None:
    """Open what can't be: the kernel's function sees the address of this memory."""
    LIBC.syscall(OPENAT, -100, memory, os.O_DIRECTORY | os.O_NOFOLLOW, 0)


RAW = bytes.fromhex("8182838485868788") + b"ringside-kernel-call"
TYPES: dict[str, tuple[str, tuple[F, object]]] = {
    "s8": ("+u0($arg2):s8", (F.SINT8, struct.unpack_from("<b", RAW)[0])),
    "s16": ("+u0($arg2):s16", (F.SINT16, struct.unpack_from("<h", RAW)[0])),
    "s32": ("+u0($arg2):s32", (F.SINT32, struct.unpack_from("<i", RAW)[0])),
    "s64": ("+u0($arg2):s64", (F.SINT64, struct.unpack_from("<q", RAW)[0])),
    "u8": ("+u0($arg2):u8", (F.UINT8, RAW[0])),
    "u16": ("+u0($arg2):u16", (F.UINT16, struct.unpack_from("<H", RAW)[0])),
    "u32": ("+u0($arg2):u32", (F.UINT32, struct.unpack_from("<I", RAW)[0])),
    "u64": ("+u0($arg2):u64", (F.UINT64, struct.unpack_from("<Q", RAW)[0])),
    "x8": ("+u0($arg2):x8", (F.UINT8, RAW[0])),
    "x64": ("+u0($arg2):x64", (F.UINT64, struct.unpack_from("<Q", RAW)[0])),
    "ustring": ("+u8($arg2):ustring", (F.STRING, "ringside-kernel-call")),
    "later": ("+u17($arg2):ustring", (F.STRING, "kernel-call")),
    "bytes": ("+0($arg2):u8[8]", (F.BYTES, RAW[:8])),
    "shorts": ("+0($arg2):u16[3]", (F.BYTES, RAW[:6])),
    "longs": ("+0($arg2):x64[2]", (F.BYTES, RAW[:16])),
    "dfd": ("$arg1:s32", (F.SINT32, -100)),
    "unsigned": ("$arg1:u32", (F.UINT32, (1 << 32) - 100)),
    "register": ("%di:s32", (F.SINT32, -100)),
    "how": ("+0($arg3):u64", (F.UINT64, os.O_DIRECTORY | os.O_NOFOLLOW | 0o100000)),
    "comm": ("$comm", (F.STRING, "")),
}


async def test_every_type(record_property: Told) -> None:
    """Each FieldType with its value, strings and arrays of them too."""
    if is_missing("kprobe", record_property):
        return
    memory = ctypes.create_string_buffer(RAW)
    texts = [ctypes.create_string_buffer(text) for text in (b"first", b"second")]
    pointers = ctypes.create_string_buffer(struct.pack("=QQ", *map(ctypes.addressof, texts)))
    own_name = Path("/proc/thread-self/comm").read_text()[:-1]
    fetch = {name: what for name, (what, _) in TYPES.items()}
    both = called("do_sys_openat2", fetch, where="marker == 0x8887868584838281", marker="+u0($arg2):x64")
    two = called(
        "do_sys_openat2",
        where=f"marker == {ctypes.addressof(texts[0])}",
        marker="+u0($arg2):x64",
        text="+u0($arg2):ustring[2]",
    )
    async with own_sensor() as sensor, watching(sensor, kernel_events=[both, two, LAST]) as stream:
        open_at(memory)
        open_at(pointers)
        end()
        first, second, _ = map(told, await stream.until(is_end))
    expected = {name: value for name, (_, value) in TYPES.items()}
    expected["comm"] = (F.STRING, own_name)
    assert first.pop("marker") == expected["x64"]
    assert first == expected
    assert second.pop("marker")
    assert second == {"text[0]": (F.STRING, "first"), "text[1]": (F.STRING, "second")}


async def test_exit(record_property: Told) -> None:
    """$retval, of calls that a filter in the kernel's own language picks."""
    if is_missing("kprobe", record_property):
        return
    bad = called("__sys_bind", on=EXIT, where=f"ret == -{errno.EBADF} || ret == 77", ret="$retval:s32")
    wide = called("ksys_read", on=EXIT, where=f"whole < 0 && whole == -{errno.EBADF}", whole="$retval:s64")
    async with own_sensor() as sensor, watching(sensor, kernel_events=[bad, wide, LAST]) as stream:
        LIBC.bind(9999, b"\1\0", 2)
        LIBC.read(9999, None, 0)
        end()
        events = [told(event) for event in await stream.until(is_end)]
    assert sorted(events[:-1], key=str) == [
        {"ret": (F.SINT32, -errno.EBADF)},
        {"whole": (F.SINT64, -errno.EBADF)},
    ]


REFUSED: Sequence[tuple[KernelFunctionCallFilter, str, str]] = (
    (called("ringside_no_such_function"), "symbol", "no function"),
    (called("no_such_module:function"), "symbol", "not loaded"),
    (called("notifier_call_chain; reboot"), "symbol", "no kernel symbol"),
    (called(""), "symbol", "missing"),
    (called("asm_exc_page_fault"), "symbol", ""),  # on every x86 kernel's blacklist
    (called("__sys_listen", a="$arg1 b=$arg2"), "arguments[a]", "' ' at character 6"),
    (called("__sys_listen", a="$arg1\nr:x y"), "arguments[a]", "at character 6"),
    (called("__sys_listen", a="$arg1;"), "arguments[a]", "';'"),
    (called("__sys_listen", a=""), "arguments[a]", "nothing"),
    (called("__sys_listen", a="$arg1:nosuch"), "arguments[a]", ""),
    (called("__sys_listen", a="$nosuch"), "arguments[a]", ""),
    (called("__sys_listen", a="$retval"), "arguments[a]", ""),
    (called("__sys_listen", {"9a": "$arg1"}), "arguments['9a']", "identifier"),
    (called("__sys_listen", common_pid="$arg1"), "arguments[common_pid]", "kernel's"),
    (called("__sys_listen", {f"a{n}": "$arg1" for n in range(129)}), "arguments", "128"),
    (called("__sys_listen", {f"a{n}": "+0($arg1):x64[64]" for n in range(20)}), "arguments", "bytes"),
    (called("__sys_listen", where="nosuch == 1", fd="$arg1:s32"), "filter", "at"),
    (called("__sys_listen", where="fd == ", fd="$arg1:s32"), "filter", ""),
    (called("__sys_listen", where="(fd == 1", fd="$arg1:s32"), "filter", ""),
    (called("__sys_listen", where="fd == 1\0", fd="$arg1:s32"), "filter", "NUL"),
    (called("__sys_listen", where="fd == 1 || " * 1000 + "fd == 2", fd="$arg1:s32"), "filter", "4095"),
)


async def test_refused(record_property: Told) -> None:
    """A request that the kernel can't serve names the field and the cause, and leaves nothing."""
    if is_missing("kprobe", record_property):
        return
    async with own_sensor() as sensor:
        before = probes()
        for request, field, problem in REFUSED:
            with pytest.raises(RequestError) as caught:
                async with watching(sensor, kernel_events=[request]):
                    pass
            assert caught.value.field == f"subscription.event_filter.kernel_events[0].{field}", request
            assert problem in caught.value.problem, (request, caught.value.problem)
        sensor.probes.tidy()
        sensor.rings.settle(wait=True)
        assert probes() == before


async def test_without_kprobes(record_property: Told) -> None:
    """Said at once, and how it could be had; a nonsensical request is still nonsense."""
    async with own_sensor() as sensor:
        if has_kprobes():
            record_property("not_there", "this kernel has kprobes")
            return
        with pytest.raises(UnservableError) as caught:
            async with watching(sensor, kernel_events=[called("__sys_listen")]):
                pass
        assert "no kprobes" in caught.value.cause
        assert "CONFIG_KPROBE" in caught.value.hint
        for request in (called(""), called("__sys_listen", a="$arg1 $arg2"), called("a b")):
            with pytest.raises(RequestError):
                async with watching(sensor, kernel_events=[request]):
                    pass


async def test_missed_returns_are_loss(record_property: Told) -> None:
    """More calls at once than a return probe can follow: those missed are counted and told."""
    if is_missing("kprobe", record_property):
        return
    callers = 200
    reader, writer = os.pipe()
    pending = called("do_sys_poll", on=EXIT, ret="$retval:s32")

    def wait() -> None:
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        poll.poll()

    threads = [threading.Thread(target=wait) for _ in range(callers)]
    try:
        async with own_sensor() as sensor, watching(sensor, kernel_events=[pending, LAST]) as stream:
            for thread in threads:
                thread.start()
            wait_until_blocked(callers)
            os.write(writer, b"x")
            for thread in threads:
                thread.join()
            lost = await stream.status("EVENTS_LOST")
            end()
            came = len(await stream.until(is_end)) - 1
        assert "missed" in lost["cause"]
        assert int(lost["count"]) > 0
        assert came + int(lost["count"]) >= callers
    finally:
        os.close(reader)
        os.close(writer)


def wait_until_blocked(callers: int) -> None:
    """Wait until so many threads of ours sleep in poll(2)."""
    own = f"/proc/{os.getpid()}/task"
    while True:
        found = 0
        for tid in os.listdir(own):
            try:
                with open(f"{own}/{tid}/syscall") as file:
                    found += file.read().split()[0] == "7"
            except OSError:
                pass
        if found >= callers:
            return
