"""Protobuf's wire form, driven by the fields' metadata in the API's dataclasses.

The dataclasses are the only copy of the schema. What must be encoded faster than they do it
(process events, contexts, plans) asks here for tags and writers.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast

import betterproto2

_WIRE_TYPE = {
    **dict.fromkeys(betterproto2.WIRE_VARINT_TYPES, 0),
    **dict.fromkeys(betterproto2.WIRE_FIXED_64_TYPES, 1),
    **dict.fromkeys(betterproto2.WIRE_LEN_DELIM_TYPES, 2),
    **dict.fromkeys(betterproto2.WIRE_FIXED_32_TYPES, 5),
}
_MASK = (1 << 64) - 1
_SURROGATE = re.compile("[\ud800-\udfff]")  # in a str: bytes that were no UTF-8


def varint(value: int) -> bytes:
    """A base-128 varint of a number of up to 64 bits; negative ones take ten bytes."""
    if 0 <= value < 0x80:
        return _ONE[value]
    if 0 <= value < 0x4000:
        return _TWO[value & 0x7F] + _ONE[value >> 7]
    value &= _MASK
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_ONE = [bytes([n]) for n in range(0x80)]
_TWO = [bytes([n | 0x80]) for n in range(0x80)]


def zigzag(value: int) -> int:
    """The unsigned number that stands for a signed one in sint32 and sint64."""
    return (value << 1) ^ (value >> 63)


def utf8(text: str | bytes) -> bytes:
    """Text as a protobuf string may hold it: what is not UTF-8 is replaced by U+FFFD."""
    if isinstance(text, bytes):
        if text.isascii():
            return text
        text = text.decode("utf-8", "replace")
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text).encode()


MessageClass = type[betterproto2.Message]


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One field of a message: its number, protobuf type, tag as on the wire, message class if it has one."""

    name: str
    number: int
    type: str
    tag: bytes
    message: MessageClass | None
    in_oneof: bool
    repeated: bool
    write: Callable[[Any], bytes]

    def encode(self, value: Any) -> bytes:
        """Tag and value; empty for the default value of a field outside a oneof."""
        if not value and not self.in_oneof:
            return b""
        return self.tag + self.write(value)


def _delimited(data: bytes) -> bytes:
    size = len(data)
    return (_ONE[size] if size < 0x80 else varint(size)) + data


def _text(text: str | bytes) -> bytes:
    return _delimited(utf8(text))


_WRITERS: dict[str, Callable[[Any], bytes]] = {
    betterproto2.TYPE_SINT32: lambda v: varint(zigzag(v)),
    betterproto2.TYPE_SINT64: lambda v: varint(zigzag(v)),
    betterproto2.TYPE_FIXED32: lambda v: int(v).to_bytes(4, "little"),
    betterproto2.TYPE_FIXED64: lambda v: int(v).to_bytes(8, "little"),
    betterproto2.TYPE_STRING: _text,
    betterproto2.TYPE_BYTES: _delimited,
    betterproto2.TYPE_MESSAGE: _delimited,
}


@cache
def fields(message: type[betterproto2.Message]) -> dict[str, Field]:
    """The fields of a message class by name."""
    hints = typing.get_type_hints(message)
    found = {}
    for declared in dataclasses.fields(cast(Any, message)):  # type checkers don't see that it is one
        meta = betterproto2.FieldMetadata.get(declared)
        found[declared.name] = Field(
            name=declared.name,
            number=meta.number,
            type=meta.proto_type,
            tag=varint(meta.number << 3 | _WIRE_TYPE[meta.proto_type]),
            message=_message_in(hints[declared.name])
            if meta.proto_type in (betterproto2.TYPE_MESSAGE, betterproto2.TYPE_MAP)
            else None,
            in_oneof=meta.group is not None,
            repeated=bool(meta.repeated),
            write=_WRITERS.get(meta.proto_type, varint),
        )
    return found


def _message_in(hint: Any) -> type[betterproto2.Message] | None:
    for part in (hint, *typing.get_args(hint)):
        if typing.get_origin(part) is not None or not isinstance(part, type):
            continue
        if issubclass(part, betterproto2.Message):
            return part
    return None


def encode(message: type[betterproto2.Message], **values: Any) -> bytes:
    """The wire form of a message with these fields, in the order given.

    Nested messages are given as bytes already encoded; repeated fields as iterables of elements.
    """
    known = fields(message)
    parts = []
    for name, value in values.items():
        field = known[name]
        if field.repeated:
            parts.append(_repeated(field, value))
        elif value or field.in_oneof:
            parts.append(field.tag + field.write(value))
    return b"".join(parts)


def _repeated(field: Field, values: Iterable[Any]) -> bytes:
    return b"".join([field.tag + field.write(value) for value in values])


def nest(message: type[betterproto2.Message], name: str, body: bytes) -> bytes:
    """`body` as the message field `name`."""
    size = len(body)
    return fields(message)[name].tag + (_ONE[size] if size < 0x80 else varint(size)) + body
