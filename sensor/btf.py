"""Where the members of the running kernel's structs are, from its BTF.

    header    u16 magic 0xeb9f, u8 version, u8 flags, u32 hdr_len, type_off, type_len, str_off, str_len
    type      u32 name_off, u32 info (vlen: bits 0-15, kind: 24-28, kind_flag: 31), u32 size or type
    member    u32 name_off, u32 type, u32 offset in bits (with kind_flag: bits 0-23, above the field's width)

(Documentation/bpf/btf.rst.) Types have no index: to find one by its id, those before it are stepped over.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import UnservableError

VMLINUX = Path("/sys/kernel/btf/vmlinux")
FAMILY = "kernel types"
_HEADER = struct.Struct("=HBBIIIII")
_MAGIC = 0xEB9F
_STRUCT, _UNION = 4, 5
_SEE_THROUGH = frozenset({8, 9, 10, 11, 18})  # typedef, volatile, const, restrict, type tag
# words behind a type's three, by its kind: so many, and so many for each of vlen
_MORE = {
    **dict.fromkeys((2, 7, 8, 9, 10, 11, 12, 16, 18), (0, 0)),
    **dict.fromkeys((1, 14, 17), (1, 0)),  # int, var, decl tag
    3: (3, 0),  # array
    **dict.fromkeys((_STRUCT, _UNION, 15, 19), (0, 3)),  # and datasec, enum64
    **dict.fromkeys((6, 13), (0, 2)),  # enum, function prototype
}


@dataclass(frozen=True)
class Member:
    """Where a member is, counted from the outermost struct's begin, and the id of its type."""

    offset: int
    type: int


class Btf:
    """The types in a BTF blob. UnservableError if it is none that can be read."""

    def __init__(self, data: bytes) -> None:
        try:
            magic, version, _, length, types, size, strings, room = _HEADER.unpack_from(data)
        except struct.error as error:
            raise UnservableError(FAMILY, "the kernel's BTF is cut short") from error
        start = length + types
        if magic != _MAGIC or version != 1 or start % 4 or size % 4 or start + size > len(data):
            raise UnservableError(FAMILY, "the kernel's BTF is of a form that is not known here")
        self._words = memoryview(data)[start : start + size].cast("I")
        self._strings = data[length + strings : length + strings + room]
        self._at: list[int] = []

    def offset(self, name: str, *path: str) -> int:
        """Where in struct `name` a member is, in bytes; with more names, a member of that member.

        Members of unnamed structs and unions are found as in C. UnservableError if there is none.
        """
        at = self._struct(name)
        offset = 0
        for index, step in enumerate(path):
            found = self._member(at, step, 0)
            if found is None:
                raise UnservableError(FAMILY, f"this kernel's struct {name} has no {'.'.join(path)}")
            offset += found.offset
            if index + 1 < len(path):
                at = self._resolve(found.type)
        return offset

    def _struct(self, name: str) -> int:
        """The index of the first word of a struct."""
        there = self._strings.find(b"\0" + name.encode() + b"\0") + 1
        if there:
            words = self._words
            for at in self._all():
                if words[at] == there and words[at + 1] >> 24 & 31 == _STRUCT:
                    return at
        raise UnservableError(FAMILY, f"this kernel tells of no struct {name}")

    def _all(self) -> list[int]:
        """Where each type begins; type ids count from 1."""
        if not self._at:
            words, end, at = self._words, len(self._words), 0
            found: list[int] = []
            fixed = [_MORE.get(kind, (0, 0))[0] + 3 for kind in range(32)]
            each = [_MORE.get(kind, (0, 0))[1] for kind in range(32)]
            known = [kind in _MORE for kind in range(32)]
            add = found.append
            while at + 2 < end:
                info = words[at + 1]
                kind = info >> 24 & 31
                if not known[kind]:
                    raise UnservableError(FAMILY, f"the kernel's BTF has types of kind {kind}, unknown here")
                add(at)
                at += fixed[kind]
                if each[kind]:
                    at += each[kind] * (info & 0xFFFF)
            self._at = found
        return self._at

    def _resolve(self, number: int) -> int:
        """Where the struct or union is that a type's id stands for, behind typedefs and qualifiers."""
        types = self._all()
        for _ in range(32):
            if not 0 < number <= len(types):
                break
            at = types[number - 1]
            if self._words[at + 1] >> 24 & 31 not in _SEE_THROUGH:
                return at
            number = self._words[at + 2]
        raise UnservableError(FAMILY, f"the kernel's BTF has no type {number}")

    def _members(self, at: int) -> Iterator[tuple[int, int, int]]:
        info = self._words[at + 1]
        if info >> 24 & 31 not in (_STRUCT, _UNION):
            return
        mask = 0xFFFFFF if info >> 31 else 0xFFFFFFFF
        for member in range(at + 3, min(at + 3 + 3 * (info & 0xFFFF), len(self._words) - 2), 3):
            name, number, bits = self._words[member : member + 3]
            if not info >> 31 or not bits >> 24:  # no bit field
                yield name, number, (bits & mask) // 8

    def _member(self, at: int, name: str, depth: int) -> Member | None:
        wanted = name.encode() + b"\0"
        unnamed = []
        for text, number, offset in self._members(at):
            if not text:
                unnamed.append((number, offset))
            elif self._strings.startswith(wanted, text):
                return Member(offset, number)
        for number, offset in unnamed if depth < 8 else ():
            found = self._member(self._resolve(number), name, depth + 1)
            if found is not None:
                return Member(offset + found.offset, found.type)
        return None


def read_btf(path: Path = VMLINUX) -> Btf:
    """The running kernel's types. UnservableError if it does not tell them."""
    try:
        return Btf(path.read_bytes())
    except OSError as error:
        raise UnservableError(
            FAMILY, f"no {path}: {error.strerror}", "a kernel with CONFIG_DEBUG_INFO_BTF"
        ) from error
