"""An event's `format` file, parsed: where each field of a record is and what it holds.

The kernel writes one line a field (kernel/trace/trace_events.c, f_show):

    field:<type> <name>;            offset:<n>; size:<n>; signed:<0|1>;
    field:<type> <name>[<count>];   offset:<n>; size:<n>; signed:<0|1>;     an array in the record
    field:__data_loc <type>[] <name>;  ... size:4 ...                       an array behind the record
    field:__rel_loc <type>[] <name>;   ... size:4 ...

A `__data_loc` field is a u32, `length << 16 | offset`, the offset counted from the start of the
record; in a `__rel_loc` it is counted from the end of the field itself.

What is trusted: offset and size always. `signed:` only for whole integers; for arrays it is
the signedness of whatever the macro was handed, and for `char` it changed when the kernel
went to -funsigned-char (6.2), so for elements of a known type the type decides.

Nothing here does I/O.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

Value = int | str | bytes | tuple[int, ...] | tuple[str, ...]


class Kind(Enum):
    """What the bytes of a field are."""

    INTEGER = "integer"  # size 1, 2, 4 or 8; enums and typedefs of integers too
    BOOL = "bool"
    POINTER = "pointer"  # a kernel or user address; the pointee is not in the record
    CHARS = "chars"  # char name[16]: a string in the record, ends at NUL or at its size
    ARRAY = "array"  # u8 addr[6], unsigned long args[6]: `count` integers in the record
    DATA_LOC = "data_loc"  # u32 length << 16 | offset from the record's start
    REL_LOC = "rel_loc"  # the same, offset from the end of the field
    DATA_LOCS = "data_locs"  # a probe's string[4]: `count` DATA_LOC words, each a string
    FLEXIBLE = "flexible"  # char buf[]: from the offset to the end of the record
    OPAQUE = "opaque"  # a struct or union by value; only its bytes are known


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a record.

    `ctype` is the C type as the kernel spells it, without name, dimension and __data_loc.
    `element_size` and `element_signed` describe one element of an array or of what a
    DATA_LOC points at (size 1, 2, 4 or 8; 0 if unknown: treat as bytes); for scalars they
    repeat size and signedness. `count` is the number of elements of CHARS, ARRAY and
    DATA_LOCS, otherwise 0.
    """

    name: str
    ctype: str
    offset: int
    size: int
    signed: bool
    kind: Kind
    element_size: int
    element_signed: bool
    count: int

    @property
    def is_common(self) -> bool:
        """True for the header fields that every record has."""
        return self.name.startswith("common_")

    @property
    def is_string(self) -> bool:
        """True if the value is text: a char array, in the record or behind it."""
        if self.kind in (Kind.CHARS, Kind.DATA_LOCS):
            return True
        return self.kind in (Kind.DATA_LOC, Kind.REL_LOC, Kind.FLEXIBLE) and _is_char(self.ctype)

    @property
    def natural_size(self) -> int:
        """Size of the C type itself, where the slot is wider; else the field's size.

        The syscall tracepoints give each argument a whole register (`int dfd; size:8`) and
        copy it raw: above the type's own bytes is whatever the caller left there.
        """
        known = _integer_type(self)
        return min(known[0], self.size) if known else self.size

    @property
    def natural_signed(self) -> bool:
        """Signedness of the C type itself; `signed` is always 0 for syscall arguments."""
        known = _integer_type(self)
        return known[1] if known else self.signed


@dataclass(frozen=True)
class Format:
    """A parsed format file."""

    name: str
    id: int
    fields: tuple[Field, ...]
    print_fmt: str = ""

    @cached_property
    def _by_name(self) -> dict[str, Field]:
        return {field.name: field for field in self.fields}

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Field:
        """The field of that name; KeyError if this kernel's event has none."""
        return self._by_name[name]

    def get(self, name: str) -> Field | None:
        """The field of that name, or None."""
        return self._by_name.get(name)

    @property
    def own_fields(self) -> tuple[Field, ...]:
        """The event's own fields, without the common header."""
        return tuple(field for field in self.fields if not field.is_common)

    def decode(self, raw: bytes) -> dict[str, Value]:
        """All fields of one raw record; ValueError if a field reaches beyond its end.

        Integers and pointers as int, strings as str, arrays of bytes and structs as bytes,
        other arrays as tuple. Bytes after the record (perf pads to 8) do no harm.
        """
        return {field.name: _decode(field, raw) for field in self.fields}


_ID = re.compile(r"^ID:\s*(\d+)\s*$")
_FIELD = re.compile(
    r"^\s*field(?:\s+special)?:(?P<declaration>.*?);\s*offset:(?P<offset>\d+);\s*size:(?P<size>\d+);"
    r"(?:\s*signed:(?P<signed>\d);)?\s*$"
)
_DECLARATION = re.compile(r"^(?P<ctype>.*[\s*\]])(?P<name>[A-Za-z_]\w*)$", re.DOTALL)
_AGGREGATE = re.compile(r"^(const\s+)?(struct|union)\b")


def parse_format(text: str, long_size: int = 8) -> Format:
    """A format file's text, parsed; ValueError if it is not one.

    `long_size` is sizeof(long) of the kernel, needed for `__data_loc unsigned long[]`.
    """
    name, event_id, print_fmt = "", -1, ""
    fields: list[Field] = []
    for line in text.splitlines():
        if line.startswith("name:"):
            name = line[len("name:") :].strip()
        elif match := _ID.match(line):
            event_id = int(match[1])
        elif match := _FIELD.match(line):
            fields.append(_parse_field(match, long_size))
        elif line.lstrip().startswith("field"):
            raise ValueError(f"not a field line: {line!r}")
        elif line.startswith("print fmt:"):
            print_fmt = line[len("print fmt:") :].strip()
    if not name or event_id < 0:
        raise ValueError("not a format file: no name or no ID")
    return Format(name, event_id, tuple(fields), print_fmt)


def _parse_field(match: re.Match[str], long_size: int) -> Field:
    declaration = match["declaration"].strip()
    offset, size, signed = int(match["offset"]), int(match["size"]), match["signed"] == "1"

    declaration, dimension = _split_dimension(declaration)
    parts = _DECLARATION.match(declaration)
    if parts is None:
        raise ValueError(f"not a declaration: {match['declaration']!r}")
    ctype, name = parts["ctype"].strip(), parts["name"]

    for prefix, loc in (("__data_loc", Kind.DATA_LOC), ("__rel_loc", Kind.REL_LOC)):
        if ctype.startswith(prefix):
            return _parse_loc(ctype[len(prefix) :].strip(), name, offset, size, signed, loc, long_size)
    if dimension is not None:
        return _parse_array(ctype, dimension, name, offset, size, signed, long_size)

    if "*" in ctype:
        kind = Kind.POINTER
    elif size not in (1, 2, 4, 8) or _AGGREGATE.match(ctype):
        return Field(name, ctype, offset, size, signed, Kind.OPAQUE, 0, False, 0)
    elif _bare(ctype) in ("bool", "_Bool"):
        kind = Kind.BOOL
    else:
        kind = Kind.INTEGER
    return Field(name, ctype, offset, size, signed, kind, size, signed, 0)


def _parse_loc(
    ctype: str, name: str, offset: int, size: int, signed: bool, kind: Kind, long_size: int
) -> Field:
    # `char[]`; a probe's string array is `char[][4]`; a dynamic cpumask has no brackets at all
    element = ctype.split("[", 1)[0].strip()
    element_size, element_signed = _element(element, long_size, signed)
    if size > 4 and size % 4 == 0 and kind is Kind.DATA_LOC:
        return Field(
            name, element, offset, size, signed, Kind.DATA_LOCS, element_size, element_signed, size // 4
        )
    if size != 4:
        raise ValueError(f"{name}: a location of {size} bytes")
    return Field(name, element, offset, size, signed, kind, element_size, element_signed, 0)


def _parse_array(
    ctype: str, dimension: str, name: str, offset: int, size: int, signed: bool, long_size: int
) -> Field:
    element_size, element_signed = _element(ctype, long_size, signed)
    if size == 0:
        return Field(name, ctype, offset, 0, signed, Kind.FLEXIBLE, element_size, element_signed, 0)
    # The dimension may be an expression in C, sizeof(struct sockaddr_in6): then only size tells.
    count = int(dimension) if dimension.isdecimal() else 0
    if element_size == 0 and not _AGGREGATE.match(ctype) and count and size / count in (1, 2, 4, 8):
        element_size = size // count
    if element_size == 0 or size % element_size:
        return Field(name, ctype, offset, size, signed, Kind.OPAQUE, 0, False, 0)
    kind = Kind.CHARS if _is_char(ctype) else Kind.ARRAY
    return Field(name, ctype, offset, size, signed, kind, element_size, element_signed, size // element_size)


def _split_dimension(declaration: str) -> tuple[str, str | None]:
    """`u8 addr[6]` into `u8 addr` and `6`; None where nothing in brackets ends it."""
    if not declaration.endswith("]"):
        return declaration, None
    depth = 0
    for at in range(len(declaration) - 1, -1, -1):
        depth += {"]": 1, "[": -1}.get(declaration[at], 0)
        if depth == 0:
            # u8 x[2][3] is one array of 6 to us: its size says so
            head = declaration[:at].rstrip()
            return _split_dimension(head)[0], declaration[at + 1 : -1].strip() if head[-1:] != "]" else "?"
    raise ValueError(f"unbalanced brackets: {declaration!r}")


_QUALIFIERS = frozenset({"const", "volatile", "__user", "__rcu", "__percpu"})


def _bare(ctype: str) -> str:
    """The type's words without qualifiers, in one spelling."""
    words = [word for word in ctype.split() if word not in _QUALIFIERS]
    return " ".join(words)


def _is_char(ctype: str) -> bool:
    """Plain `char` is text; `unsigned char`, `u8` and `signed char` are numbers."""
    return _bare(ctype) == "char"


# What the kernel's integer types are, wherever the format gives no size of their own: array
# elements, what a __data_loc points at, and the narrow types in the wide slots of syscall
# arguments. Size 0 stands for sizeof(long).
_NAMED: dict[str, tuple[int, bool]] = {
    "char": (1, False),
    "signed char": (1, True),
    "unsigned char": (1, False),
    "short": (2, True),
    "short int": (2, True),
    "unsigned short": (2, False),
    "unsigned short int": (2, False),
    "short unsigned int": (2, False),
    "int": (4, True),
    "signed int": (4, True),
    "unsigned": (4, False),
    "unsigned int": (4, False),
    "uint": (4, False),
    "long": (0, True),
    "long int": (0, True),
    "unsigned long": (0, False),
    "long unsigned int": (0, False),
    "ulong": (0, False),
    "long long": (8, True),
    "long long int": (8, True),
    "unsigned long long": (8, False),
    "long long unsigned int": (8, False),
    "bool": (1, False),
    "_Bool": (1, False),
    "pid_t": (4, True),
    "uid_t": (4, False),
    "gid_t": (4, False),
    "qid_t": (4, False),
    "key_t": (4, True),
    "key_serial_t": (4, True),
    "mqd_t": (4, True),
    "clockid_t": (4, True),
    "timer_t": (4, True),
    "rwf_t": (4, True),
    "dev_t": (4, False),
    "umode_t": (2, False),
    "mode_t": (2, False),
    "gfp_t": (4, False),
    "loff_t": (8, True),
    "off_t": (0, True),
    "size_t": (0, False),
    "ssize_t": (0, True),
    "uintptr_t": (0, False),
    "cpumask_t": (0, False),
    "dma_addr_t": (8, False),
    "phys_addr_t": (8, False),
    "sector_t": (8, False),
    **{f"{p}{s}{bits}": (bits // 8, s == "s") for p in ("", "__") for s in "us" for bits in (8, 16, 32, 64)},
    **{f"{s}int{bits}_t": (bits // 8, s == "") for s in ("u", "") for bits in (8, 16, 32, 64)},
    **{f"__{e}{bits}": (bits // 8, False) for e in ("le", "be") for bits in (16, 32, 64)},
    **{f"x{bits}": (bits // 8, False) for bits in (8, 16, 32, 64)},
}


def _integer_type(field: Field) -> tuple[int, bool] | None:
    """Size and signedness of an integer field's C type, if known; a long is as wide as its slot."""
    if field.kind is not Kind.INTEGER:
        return None
    if _bare(field.ctype).startswith("enum "):
        return (4 if field.size == 8 else field.size), field.signed
    known = _NAMED.get(_bare(field.ctype))
    return (known[0] or field.size, known[1]) if known else None


def _element(ctype: str, long_size: int, signed: bool) -> tuple[int, bool]:
    """Size and signedness of one element; size 0 if the type is unknown."""
    if "*" in ctype:
        return long_size, False
    if known := _NAMED.get(_bare(ctype)):
        return known[0] or long_size, known[1]
    if ctype.startswith("enum "):
        return 4, signed
    return 0, signed


def _decode(field: Field, raw: bytes) -> Value:
    end = field.offset + field.size
    if end > len(raw):
        raise ValueError(f"{field.name}: ends at {end} of a record of {len(raw)} bytes")
    own = raw[field.offset : end]
    match field.kind:
        case Kind.INTEGER | Kind.POINTER:
            return int.from_bytes(own, sys.byteorder, signed=field.signed)
        case Kind.BOOL:
            return int(any(own))
        case Kind.CHARS:
            return _text(own)
        case Kind.ARRAY:
            return _elements(field, own)
        case Kind.OPAQUE:
            return own
        case Kind.FLEXIBLE:
            rest = raw[field.offset :]
            return _text(rest) if field.is_string else _elements(field, rest)
        case Kind.DATA_LOCS:
            words = (own[at : at + 4] for at in range(0, field.size, 4))
            return tuple(_text(_located(field, word, 0, raw)) for word in words)
        case Kind.DATA_LOC | Kind.REL_LOC:
            data = _located(field, own, end if field.kind is Kind.REL_LOC else 0, raw)
            return _text(data) if field.is_string else _elements(field, data)


def _located(field: Field, word: bytes, base: int, raw: bytes) -> bytes:
    loc = int.from_bytes(word, sys.byteorder)
    start, length = base + (loc & 0xFFFF), loc >> 16
    if start + length > len(raw) and length:
        raise ValueError(f"{field.name}: ends at {start + length} of a record of {len(raw)} bytes")
    return raw[start : start + length]


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "replace")


def _elements(field: Field, data: bytes) -> bytes | tuple[int, ...]:
    if field.element_size <= 1:
        return data if not field.element_signed else tuple(_integers(data, 1, True))
    return tuple(_integers(data, field.element_size, field.element_signed))


def _integers(data: bytes, size: int, signed: bool) -> Iterator[int]:
    for at in range(0, len(data) - size + 1, size):
        yield int.from_bytes(data[at : at + size], sys.byteorder, signed=signed)
