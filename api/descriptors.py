"""The API for Google's protobuf runtime: descriptors for reflection, message classes that decode fast.

The dataclasses in `ringside.api.v0` need none of this; protobuf is imported when a function here is called.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.descriptor_pool import DescriptorPool
    from google.protobuf.message import Message

# Modules of others that register the same files in the default pool. Only one of two copies can be there, and
# an import that finds ours already registered would fail: so theirs go first, where they are installed.
_OTHERS = (
    "google.protobuf.any_pb2",
    "google.protobuf.wrappers_pb2",
    "google.rpc.status_pb2",
    "google.rpc.error_details_pb2",
)


@cache
def pool() -> DescriptorPool:
    """protobuf's default descriptor pool, with the API's files in it: where grpclib's reflection looks."""
    from google.protobuf import descriptor_pb2, descriptor_pool

    for name in _OTHERS:
        try:
            import_module(name)
        except ModuleNotFoundError:
            pass
    default: DescriptorPool = descriptor_pool.Default()
    for file in descriptor_pb2.FileDescriptorSet.FromString(_serialized()).file:
        try:
            default.FindFileByName(file.name)
        except KeyError:
            default.AddSerializedFile(file.SerializeToString())
    return default


@cache
def message_class(full_name: str) -> type[Message]:
    """protobuf's class for a message, as in message_class("capsule8.api.v0.Event"); KeyError if none."""
    from google.protobuf import message_factory

    found: type[Message] = message_factory.GetMessageClass(pool().FindMessageTypeByName(full_name))
    return found


def _serialized() -> bytes:
    """The serialized FileDescriptorSet, all imports included."""
    return files(__package__).joinpath("descriptors.binpb").read_bytes()
