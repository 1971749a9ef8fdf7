"""The wire contract: the names and numbers that clients know; the dataclasses against Google's protobuf."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import betterproto2
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from ringside.api import ErrorInfo, Status, descriptors, v0

CONTRACT = Path(__file__).parent / "data" / "contract.txt"
API_FILES = ["v0/types.proto", "v0/event.proto", "v0/subscription.proto", "v0/telemetry_service.proto"]
RPC_FILES = ["google/rpc/status.proto", "google/rpc/error_details.proto"]
PACKAGE = "capsule8.api.v0."
SHARED: dict[str, type[betterproto2.Message]] = {
    "google.rpc.Status": Status,
    "google.rpc.ErrorInfo": ErrorInfo,
}

SCALARS = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_FIXED32: "fixed32",
    FieldDescriptor.TYPE_FIXED64: "fixed64",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_SINT32: "sint32",
    FieldDescriptor.TYPE_SINT64: "sint64",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}
EXTREMES: dict[str, tuple[Any, Any]] = {
    "bool": (True, True),
    "bytes": (b"\x00\xff" * 70, b"x"),
    "fixed32": (2**32 - 1, 1),
    "fixed64": (2**64 - 1, 1),
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "sint32": (-(2**31), 2**31 - 1),
    "sint64": (-(2**63), 2**63 - 1),
    "string": ("käse \N{SLICE OF PIZZA} \x00" * 20, "x"),
    "uint32": (2**32 - 1, 1),
    "uint64": (2**64 - 1, 1),
}


def short(name: str) -> str:
    return name.removeprefix(PACKAGE)


def messages() -> Iterator[Descriptor]:
    """Every message of the API, nested ones too, without the entries of maps."""

    def walk(found: Descriptor) -> Iterator[Descriptor]:
        if found.GetOptions().map_entry:
            return
        yield found
        for nested in found.nested_types:
            yield from walk(nested)

    for name in API_FILES + RPC_FILES:
        for top in descriptors.pool().FindFileByName(name).message_types_by_name.values():
            # the google.rpc files may come from elsewhere and have more in them
            if name in API_FILES or top.full_name in SHARED:
                yield from walk(top)


MESSAGES = {found.full_name: found for found in messages()}


def type_of(field: FieldDescriptor) -> str:
    """A field's type as the contract writes it."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return f"map<{type_of(key)}, {type_of(value)}>"
    if field.message_type is not None:
        name = short(field.message_type.full_name)
    elif field.enum_type is not None:
        name = "enum " + short(field.enum_type.full_name)
    else:
        name = SCALARS[field.type]
    return f"repeated {name}" if field.is_repeated else name


def contract() -> set[str]:
    lines = CONTRACT.read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def dataclass_of(full_name: str) -> type[betterproto2.Message]:
    if full_name in SHARED:
        return SHARED[full_name]
    found: type[betterproto2.Message] = getattr(v0, short(full_name).replace(".", ""))
    return found


def fields_of(message: Any) -> tuple[dataclasses.Field[Any], ...]:
    """Of a betterproto2 message or its class; type checkers don't see a dataclass there."""
    return dataclasses.fields(message)


def test_protos_are_the_contract() -> None:
    found = set()
    for name, message in MESSAGES.items():
        for field in message.fields:
            oneof = f" oneof {field.containing_oneof.name}" if field.containing_oneof else ""
            found.add(f"{short(name)}.{field.name} = {field.number} {type_of(field)}{oneof}")
        for enum in message.enum_types:
            found.update(f"{short(enum.full_name)}.{v.name} = {v.number} value" for v in enum.values)
    for file in API_FILES:
        for enum in descriptors.pool().FindFileByName(file).enum_types_by_name.values():
            found.update(f"{short(enum.full_name)}.{v.name} = {v.number} value" for v in enum.values)
    assert sorted(found) == sorted(contract())


def test_dataclasses_are_the_contract() -> None:
    """Numbers, types and oneofs in the dataclasses' own metadata, which is what plans are made from."""
    wanted: dict[str, set[tuple[str, int, str, str | None]]] = {}
    enums: dict[str, dict[str, int]] = {}
    for line in contract():
        name, _, rest = line.partition(" = ")
        owner, _, member = name.rpartition(".")
        number, _, kind = rest.partition(" ")
        kind, _, oneof = kind.partition(" oneof ")
        if kind == "value":
            enums.setdefault(owner, {})[member] = int(number)
            continue
        kind = "map" if kind.startswith("map<") else kind.removeprefix("repeated ")
        kind = "enum" if kind.startswith("enum ") else kind
        kind = kind if kind in {*SCALARS.values(), "map", "enum"} else "message"
        wanted.setdefault(owner, set()).add((member, int(number), kind, oneof or None))
    for owner, fields in wanted.items():
        found = set()
        for field in fields_of(dataclass_of(owner)):
            meta = betterproto2.FieldMetadata.get(field)
            found.add((field.name, meta.number, meta.proto_type, meta.group))
        assert found == fields, owner
    for owner, values in enums.items():
        enum = getattr(v0, owner.replace(".", ""))
        assert {value.proto_name or value.name: value.value for value in enum} == values, owner


def test_service_path() -> None:
    service = (
        descriptors.pool().FindFileByName("v0/telemetry_service.proto").services_by_name["TelemetryService"]
    )
    assert service.full_name == "capsule8.api.v0.TelemetryService"
    method = service.methods_by_name["GetEvents"]
    assert (method.client_streaming, method.server_streaming) == (False, True)
    mapping = v0.TelemetryServiceBase().__mapping__()
    handler = mapping["/capsule8.api.v0.TelemetryService/GetEvents"]
    assert (handler.request_type, handler.reply_type) == (v0.GetEventsRequest, v0.GetEventsResponse)


def value(field: FieldDescriptor, which: int, depth: int) -> Any:
    if field.message_type is not None:
        return filled(field.message_type, which, depth + 1, {})
    if field.enum_type is not None:
        return field.enum_type.values[-1 - which].number
    return EXTREMES[SCALARS[field.type]][which]


def filled(found: Descriptor, which: int, depth: int, arms: dict[str, str]) -> Message:
    """A message with every field set: of a oneof the arm named in `arms`, else the first."""
    message = descriptors.message_class(found.full_name)()
    for field in found.fields:
        oneof = field.containing_oneof
        if oneof is not None and field.name != arms.get(oneof.name, oneof.fields[0].name):
            continue
        if field.message_type is not None and depth > 4:  # FilterExpression contains itself
            continue
        target = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, item = field.message_type.fields
            if item.message_type is None:
                target[value(key, which, depth)] = value(item, which, depth)
            else:
                target[value(key, which, depth)].CopyFrom(value(item, which, depth))
        elif field.message_type is not None and field.message_type.full_name == "google.protobuf.Any":
            target.add().Pack(filled(MESSAGES["google.rpc.ErrorInfo"], which, depth + 1, {}))
        elif field.is_repeated:
            target.extend([value(field, one, depth) for one in (which, 1 - which)])
        elif field.message_type is not None:
            target.CopyFrom(value(field, which, depth))
        else:
            setattr(message, field.name, value(field, which, depth))
    return message


def examples() -> Iterator[Any]:
    for name, found in MESSAGES.items():
        for which in (0, 1):
            yield pytest.param(filled(found, which, 0, {}), id=f"{short(name)}-{which}")
        for oneof in found.oneofs:
            for field in oneof.fields:
                message = filled(found, 0, 0, {oneof.name: field.name})
                yield pytest.param(message, id=f"{short(name)}-{field.name}")
        yield pytest.param(descriptors.message_class(name)(), id=f"{short(name)}-empty")


def unknown(message: Any) -> list[str]:
    """Where in a dataclass bytes were left that it has no field for."""
    if not isinstance(message, betterproto2.Message):
        return []
    found = [type(message).__name__] if message._unknown_fields else []
    for field in fields_of(message):
        content = getattr(message, field.name)
        inner = (
            content.values()
            if isinstance(content, dict)
            else content
            if isinstance(content, list)
            else [content]
        )
        for one in inner:
            found.extend(unknown(one))
    return found


def plain(value: Any) -> Any:
    """JSON without the one difference that means nothing: betterproto2 wraps 64-bit integers as numbers."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


@pytest.mark.parametrize("message", list(examples()))
def test_dataclasses_speak_protobuf(message: Message) -> None:
    cls = dataclass_of(message.DESCRIPTOR.full_name)
    decoded = cls.parse(message.SerializeToString())
    assert unknown(decoded) == []
    # names and values, by way of both sides' JSON; then the way back
    assert plain(decoded.to_dict()) == plain(json_format.MessageToDict(message))
    encoded = bytes(decoded)
    assert type(message).FromString(encoded) == message
    assert len(encoded) == message.ByteSize()
    assert cls.parse(encoded) == decoded


def test_every_field_of_every_message_was_filled() -> None:
    """The examples above can't pass by being empty."""
    seen: set[str] = set()
    for parameter in examples():
        message = parameter.values[0]
        seen.update(field.full_name for field, _ in message.ListFields())
    assert seen == {field.full_name for found in MESSAGES.values() for field in found.fields}


def test_absent_is_not_zero() -> None:
    """A filter for system call 0 is not a filter for every system call."""
    one = v0.SyscallEventFilter.parse(bytes(v0.SyscallEventFilter(id=0)))
    every = v0.SyscallEventFilter.parse(bytes(v0.SyscallEventFilter()))
    assert (one.id, every.id) == (0, None)


def test_older_clients_skip_what_they_do_not_know() -> None:
    old = descriptor_pb2.FileDescriptorProto(name="old.proto", package="old", syntax="proto3")
    old.message_type.add(name="GetEventsResponse")
    response = v0.GetEventsResponse(statuses=[Status(code=15, message="lost")])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(old)
    cls = message_factory.GetMessageClass(pool.FindMessageTypeByName("old.GetEventsResponse"))
    assert cls.FromString(bytes(response)).ListFields() == []


def test_descriptors_are_loaded_once_and_only_when_asked() -> None:
    assert descriptors.pool() is descriptors.pool()
    assert descriptors.message_class("capsule8.api.v0.Event") is descriptors.message_class(
        "capsule8.api.v0.Event"
    )
    with pytest.raises(KeyError):
        descriptors.message_class("capsule8.api.v0.Nothing")
    code = "import sys, ringside.api.v0, ringside.api.descriptors; print('google.protobuf' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_descriptors_beside_googles_own(tmp_path: Path) -> None:
    """Where another package brings google.rpc, both orders of import work."""
    google = tmp_path / "google" / "rpc"
    google.mkdir(parents=True)
    (google / "status_pb2.py").write_text(
        "from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool\n"
        "file = descriptor_pb2.FileDescriptorProto(name='google/rpc/status.proto', package='google.rpc')\n"
        "file.syntax = 'proto3'\n"
        "file.dependency.append('google/protobuf/any.proto')\n"
        "message = file.message_type.add(name='Status')\n"
        "message.field.add(name='code', number=1, type=5, label=1)\n"
        "message.field.add(name='message', number=2, type=9, label=1)\n"
        "message.field.add(name='details', number=3, type=11, label=3, type_name='.google.protobuf.Any')\n"
        "file.options.java_package = 'theirs'\n"
        "descriptor_pool.Default().AddSerializedFile(file.SerializeToString())\n"
    )
    before = f"import google, sys; google.__path__.append({str(tmp_path / 'google')!r})\n"
    ours = "from ringside.api import descriptors; descriptors.pool()\n"
    theirs = "import google.rpc.status_pb2\n"
    check = "print(descriptors.message_class('capsule8.api.v0.GetEventsResponse')().DESCRIPTOR.name)"
    for code in (ours + theirs, theirs + ours):
        command = [sys.executable, "-c", before + code + check]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (found.returncode, found.stdout) == (0, "GetEventsResponse\n"), found.stderr


def test_every_module_of_the_tree_is_packaged() -> None:
    """pyproject.toml lists the packages one by one; a new folder must not be forgotten there."""
    top = Path(__file__).parent.parent
    setuptools = tomllib.loads((top / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"api", "client", "sensor"}
    wanted = {
        ".".join(("ringside", *path.parent.relative_to(top).parts))
        for folder in folders
        for path in (top / folder).rglob("*.py")
    }
    assert wanted <= set(setuptools["packages"])
    for name in wanted:
        importlib.import_module(name)
