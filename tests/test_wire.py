"""The wire form made from the dataclasses' metadata, read by Google's protobuf."""

from __future__ import annotations

from typing import Any

import betterproto2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.api import v0
from ringside.api.descriptors import message_class
from ringside.api.v0 import Event, NetworkAddress, Process, ProcessEvent
from ringside.sensor import wire

NAMES = [
    "Event",
    "ProcessEvent",
    "SyscallEvent",
    "NetworkEvent",
    "FileEvent",
    "ContainerEvent",
    "ChargenEvent",
    "TickerEvent",
    "Process",
    "IPv4Address",
    "IPv6Address",
    "IPv4AddressAndPort",
    "NetworkAddress",
]
PROTO = {name: message_class(f"capsule8.api.v0.{name}") for name in NAMES}
VALUES: dict[str, st.SearchStrategy[Any]] = {
    betterproto2.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    betterproto2.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    betterproto2.TYPE_UINT32: st.integers(0, 2**32 - 1),
    betterproto2.TYPE_UINT64: st.integers(0, 2**64 - 1),
    betterproto2.TYPE_SINT32: st.integers(-(2**31), 2**31 - 1),
    betterproto2.TYPE_SINT64: st.integers(-(2**63), 2**63 - 1),
    betterproto2.TYPE_FIXED32: st.integers(0, 2**32 - 1),
    betterproto2.TYPE_FIXED64: st.integers(0, 2**64 - 1),
    betterproto2.TYPE_BOOL: st.booleans(),
    betterproto2.TYPE_ENUM: st.integers(0, 2),
    betterproto2.TYPE_STRING: st.text(max_size=300),
    betterproto2.TYPE_BYTES: st.binary(max_size=300),
}


@pytest.mark.parametrize("name", list(PROTO))
@given(data=st.data())
def test_every_field_reads_back(name: str, data: st.DataObject) -> None:
    for field in wire.fields(getattr(v0, name)).values():
        if field.message is not None or field.repeated:
            continue
        value = data.draw(VALUES[field.type], label=field.name)
        message = PROTO[name].FromString(field.encode(value))
        assert getattr(message, field.name) == value
        assert message.SerializeToString() == field.encode(value)


def test_every_message_has_its_fields() -> None:
    """Numbers and tags as in the descriptors that protobuf itself has."""
    for name, proto in PROTO.items():
        told = {
            field.name: (field.number, field.repeated) for field in wire.fields(getattr(v0, name)).values()
        }
        assert told == {one.name: (one.number, one.is_repeated) for one in proto.DESCRIPTOR.fields}


@given(st.integers(-(2**63), 2**64 - 1))
def test_varints(value: int) -> None:
    data = wire.varint(value)
    assert sum((byte & 0x7F) << 7 * at for at, byte in enumerate(data)) == value & (1 << 64) - 1
    assert [byte >> 7 for byte in data] == [1] * (len(data) - 1) + [0]
    assert len(data) == max(1, ((value & (1 << 64) - 1).bit_length() + 6) // 7)


@given(st.integers(-(2**63), 2**63 - 1))
def test_zigzag(value: int) -> None:
    assert wire.zigzag(value) == (2 * value if value >= 0 else -2 * value - 1)


@given(st.binary(max_size=50))
def test_bytes_become_valid_text(data: bytes) -> None:
    assert wire.utf8(data) == data.decode("utf-8", "replace").encode()


@given(st.text(st.characters(codec=None), max_size=30))
def test_text_of_any_characters_becomes_valid(text: str) -> None:
    """Names of files come with surrogates where they were no UTF-8."""
    want = "".join("\ufffd" if "\ud800" <= one <= "\udfff" else one for one in text)
    assert wire.utf8(text).decode() == want


def test_defaults_are_left_out_but_not_in_a_oneof() -> None:
    assert wire.encode(ProcessEvent, type=0, exec_filename="", exit_code=0, exit_core_dumped=False) == b""
    assert wire.fields(NetworkAddress)["local_address"].encode("") == b"\xf2\x01\x00"


@given(st.lists(st.text(max_size=200), max_size=10), st.integers(-(2**31), 2**31 - 1))
def test_a_message_of_several_fields(line: list[str], code: int) -> None:
    data = wire.encode(ProcessEvent, type=2, exec_command_line=line, exit_code=code)
    message = PROTO["ProcessEvent"].FromString(data)
    assert (message.type, list(message.exec_command_line), message.exit_code) == (2, line, code)
    assert message.SerializeToString() == data


@given(st.integers(0, 2**31 - 1), st.binary(max_size=400))
def test_nested_messages(pid: int, name: bytes) -> None:
    data = wire.nest(Event, "process_lineage", wire.encode(Process, pid=pid, command=name))
    (entry,) = PROTO["Event"].FromString(data).process_lineage
    assert (entry.pid, entry.command) == (pid, name.decode("utf-8", "replace"))
