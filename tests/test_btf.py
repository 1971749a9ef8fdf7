"""The reader of BTF, on blobs made here."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from ringside.sensor.btf import Btf, read_btf
from ringside.sensor.errors import UnservableError

INT, PTR, STRUCT, UNION, TYPEDEF, CONST, PROTO = 1, 2, 4, 5, 8, 10, 13


class Maker:
    """Writes BTF: types are numbered from 1 in the order in which they are added."""

    def __init__(self) -> None:
        self.strings = bytearray(b"\0")
        self.types = bytearray()
        self.count = 0

    def text(self, name: str) -> int:
        if not name:
            return 0
        at = self.strings.find(b"\0" + name.encode() + b"\0")
        if at < 0:
            at = len(self.strings) - 1
            self.strings += name.encode() + b"\0"
        return at + 1

    def add(
        self, kind: int, name: str = "", last: int = 0, *words: int, count: int = 0, flag: bool = False
    ) -> int:
        info = kind << 24 | count | flag << 31
        self.types += struct.pack("=3I", self.text(name), info, last) + struct.pack(f"={len(words)}I", *words)
        self.count += 1
        return self.count

    def record(
        self, name: str, *members: tuple[str, int, int], kind: int = STRUCT, flag: bool = False
    ) -> int:
        """A struct or union: name, type and offset in bits of each member."""
        words = [word for member, number, bits in members for word in (self.text(member), number, bits)]
        return self.add(kind, name, 0, *words, count=len(members), flag=flag)

    def blob(self, magic: int = 0xEB9F, version: int = 1) -> bytes:
        header = struct.pack(
            "=HBBIIIII", magic, version, 0, 24, 0, len(self.types), len(self.types), len(self.strings)
        )
        return header + bytes(self.types) + bytes(self.strings)


@pytest.fixture
def maker() -> Maker:
    """Structs as the kernel has them: nested, unnamed, behind qualifiers, and a bit field."""
    made = Maker()
    number = made.add(INT, "int", 4, 32)
    made.add(PROTO, "", number, 0, number, 0, number, count=2)
    inner = made.record("", ("arg_start", number, 0), ("arg_end", number, 64))
    either = made.record("", ("lock", number, 0), ("", inner, 64), kind=UNION)
    made.record("mm_struct", ("count", number, 0), ("", either, 128))
    info = made.record("thread_info", ("flags", number, 0), ("status", number, 32))
    named = made.add(TYPEDEF, "info_t", info)
    made.record(
        "task_struct", ("thread_info", made.add(CONST, "", named), 64), ("mm", made.add(PTR, "", 5), 1024)
    )
    made.record(
        "signal_struct", ("group_exit_code", number, 96), ("is_child", number, 1 << 24 | 7), flag=True
    )
    made.add(TYPEDEF, "mm", 5)
    return made


@pytest.mark.parametrize(
    ("path", "offset"),
    [
        (("task_struct", "mm"), 128),
        (("task_struct", "thread_info", "status"), 12),
        (("mm_struct", "count"), 0),
        (("mm_struct", "arg_start"), 24),
        (("mm_struct", "arg_end"), 32),
        (("signal_struct", "group_exit_code"), 12),
    ],
)
def test_members_are_found(maker: Maker, path: tuple[str, ...], offset: int) -> None:
    assert Btf(maker.blob()).offset(*path) == offset


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (("task_struct", "nothing"), "struct task_struct has no nothing"),
        (("task_struct", "m"), "struct task_struct has no m"),
        (("task_struct", "mm", "count"), "struct task_struct has no mm.count"),
        (("signal_struct", "is_child"), "struct signal_struct has no is_child"),
        (("mm", "count"), "no struct mm"),
        (("nothing", "count"), "no struct nothing"),
    ],
)
def test_what_is_not_there_is_said(maker: Maker, path: tuple[str, ...], why: str) -> None:
    with pytest.raises(UnservableError, match=why):
        Btf(maker.blob()).offset(*path)


def test_garbage_is_refused(maker: Maker) -> None:
    whole = maker.blob()
    for bad in (b"", whole[:20], maker.blob(magic=1), maker.blob(version=9), whole[: len(whole) // 2]):
        with pytest.raises(UnservableError, match="BTF"):
            Btf(bad)
    maker.add(30, "new")
    with pytest.raises(UnservableError, match="kind 30"):
        Btf(maker.blob()).offset("task_struct", "mm", "count")


def test_types_that_hold_themselves_end(maker: Maker) -> None:
    loop = maker.count + 1
    maker.record("knot", ("", loop, 0))
    maker.add(TYPEDEF, "ring", maker.count + 1)
    maker.record("held", ("", maker.count, 0))
    for name in ("knot", "held"):
        with pytest.raises(UnservableError):
            Btf(maker.blob()).offset(name, "anything")


def test_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnservableError, match="No such file") as caught:
        read_btf(tmp_path / "vmlinux")
    assert "CONFIG_DEBUG_INFO_BTF" in caught.value.hint
