"""Reading requests, strictly: what is not understood in full is refused, by name, and never ignored.

All of a request says what its sender wants to see and what not. To leave out a part that a newer version of
the API knows would mostly mean to stream more than was asked for, and to read a wrong one leniently to guess,
so both are INVALID_ARGUMENT. Accepted beyond what encoders write is what protobuf's rules demand of every
reader: any order of fields, numbers longer than need be, and of a field given twice the last (messages are
merged) - but not two members of one oneof.

protobuf reads what has passed, and writes it anew for the dataclasses' parser, so that both read the same.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from ringside.api.descriptors import message_class
from ringside.api.v0 import GetEventsRequest

from .errors import RequestError

if TYPE_CHECKING:
    from grpclib.server import Stream

MAX_REQUEST = 4 << 20  # bytes
MAX_FIELDS = 1 << 15  # reading them, half a second, keeps everyone else waiting
MAX_DEPTH = 100  # protobuf's own bound
_REQUEST = "capsule8.api.v0.GetEventsRequest"
_PREFIX = struct.Struct(">BI")  # gRPC: compressed or not, length

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_FORMS = {_VARINT: "a number", _FIXED64: "8 bytes", _DELIMITED: "a block of bytes", _FIXED32: "4 bytes"}
_F = FieldDescriptor
_WIRE_TYPES = {
    **dict.fromkeys((_F.TYPE_FIXED64, _F.TYPE_SFIXED64, _F.TYPE_DOUBLE), _FIXED64),
    **dict.fromkeys((_F.TYPE_FIXED32, _F.TYPE_SFIXED32, _F.TYPE_FLOAT), _FIXED32),
    **dict.fromkeys((_F.TYPE_STRING, _F.TYPE_BYTES, _F.TYPE_MESSAGE), _DELIMITED),
}
_NARROW = (_F.TYPE_INT32, _F.TYPE_UINT32, _F.TYPE_SINT32, _F.TYPE_ENUM)


async def receive(stream: Stream[bytes, bytes]) -> bytes:
    """A call's one message. RequestError before it is read if it is too long, and if it ends too early."""
    inner = stream._stream
    try:
        prefix = await inner.recv_data(_PREFIX.size)
        if not prefix:
            return b""
        compressed, size = _PREFIX.unpack(prefix)
        if compressed == 1 and dict(inner.headers or ()).get("grpc-encoding"):
            raise GRPCError(
                Status.UNIMPLEMENTED, "a compressed request: send it as it is, without grpc-encoding"
            )
        if compressed:
            raise RequestError(
                "request", f"begins with the byte {compressed}, must begin with 0: not compressed"
            )
        if size > MAX_REQUEST:
            raise RequestError("request", f"{size} bytes; the most is {MAX_REQUEST}")
        data = await inner.recv_data(size)
        assert len(data) == size
    except AssertionError as error:  # grpclib's way to say that there was less
        raise RequestError("request", "ends before the message does") from error
    return data


def decode_request(data: bytes) -> GetEventsRequest:
    """A request's dataclass. RequestError for what is no GetEventsRequest, or more than one of this API."""
    if len(data) > MAX_REQUEST:
        raise RequestError("request", f"{len(data)} bytes; the most is {MAX_REQUEST}")
    kind: Any = message_class(_REQUEST)
    _Check().message(kind.DESCRIPTOR, data, 0, len(data), "", 1)
    try:
        read = kind.FromString(data)
    except DecodeError as error:
        raise RequestError("request", f"is no GetEventsRequest: {error}") from error
    return GetEventsRequest.parse(read.SerializeToString())


class _Check:
    """One walk over a message's wire form. RequestError at the first thing that is not sound."""

    def __init__(self) -> None:
        self._fields = 0
        self._elements: dict[str, int] = {}  # of repeated fields so far
        self._members: dict[tuple[str, str], str] = {}  # of oneofs that were given

    def message(self, kind: Any, data: bytes, at: int, end: int, path: str, depth: int) -> None:
        """A message of this kind, from `at` to `end`."""
        where = path or "request"
        if depth > MAX_DEPTH:
            raise RequestError(where, f"is nested deeper than {MAX_DEPTH} messages")
        while at < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise RequestError("request", f"has more than {MAX_FIELDS} fields")
            tag, at = _varint(data, at, end, where)
            number, wire_type = tag >> 3, tag & 7
            field = kind.fields_by_number.get(number)
            if field is None:
                raise RequestError(
                    where,
                    f"has a field with the number {number}, which this sensor's {kind.name} does not have",
                )
            inner = self._path(field, path)
            if wire_type != _WIRE_TYPES.get(field.type, _VARINT):
                raise RequestError(
                    inner,
                    f"is encoded as {_FORMS.get(wire_type, f'wire type {wire_type}')}, "
                    f"must be {_FORMS[_WIRE_TYPES.get(field.type, _VARINT)]}",
                )
            if field.containing_oneof is not None:
                self._only(field, path)
            if wire_type == _VARINT:
                value, at = _varint(data, at, end, inner)
                _check_number(field, value, inner)
                continue
            size = 8 if wire_type == _FIXED64 else 4
            if wire_type == _DELIMITED:
                size, at = _varint(data, at, end, inner)
            if size > end - at:
                raise RequestError(inner, f"is {size} bytes long, but only {end - at} follow")
            if field.type == _F.TYPE_MESSAGE:
                self.message(field.message_type, data, at, at + size, inner, depth + 1)
            elif field.type == _F.TYPE_STRING:
                _check_text(data[at : at + size], inner)
            at += size

    def _path(self, field: Any, path: str) -> str:
        inner = f"{path}.{field.name}" if path else str(field.name)
        if not _is_repeated(field):
            return inner
        count = self._elements.get(inner, 0)
        self._elements[inner] = count + 1
        return f"{inner}[{count}]"

    def _only(self, field: Any, path: str) -> None:
        oneof = field.containing_oneof.name
        other = self._members.setdefault((path, oneof), field.name)
        if other != field.name:
            raise RequestError(path, f"has both {other} and {field.name}, must have one {oneof}")


def _is_repeated(field: Any) -> bool:
    # protobuf 6 brought the one, 7 dropped the other
    return bool(field.is_repeated if hasattr(field, "is_repeated") else field.label == _F.LABEL_REPEATED)


def _varint(data: bytes, at: int, end: int, where: str) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
        shift += 7
        if shift == 70:
            break
    else:
        raise RequestError(where, "ends in the middle of a number")
    raise RequestError(where, "holds a number of more than 64 bits")


def _check_number(field: Any, value: int, path: str) -> None:
    if field.type in _NARROW and not (value < 1 << 32 or value >= (1 << 64) - (1 << 31)):
        raise RequestError(path, f"is {value}, which does not fit 32 bits")
    if field.type == _F.TYPE_ENUM and value not in field.enum_type.values_by_number:
        names = [one.name for one in field.enum_type.values if not one.name.endswith("_UNKNOWN")]
        signed = value - (1 << 64) if value >> 63 else value
        raise RequestError(path, f"is {signed}, must be {', '.join(names[:-1])} or {names[-1]}")


def _check_text(data: bytes, path: str) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            path, f"is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; text must be UTF-8"
        ) from error
