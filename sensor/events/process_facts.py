"""What process events say of themselves: as it is kept, and encoded.

Most is told to nobody and kept for those who look back, so it stays as it came until somebody wants it, in
plain tuples, which cost less than anything with names: there are many of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ringside.api.v0 import Event, ProcessEvent, ProcessEventType

from .. import wire

# a fork: pid and id of the child
# an exec: file name; arguments with a NUL behind each (what ends without is but a part of one, and left out)
# an exit: what wait(2) tells, None if that is not known; nothing
Facts = tuple[ProcessEventType, Any, Any]

FORK, EXEC, EXIT = ProcessEventType.FORK, ProcessEventType.EXEC, ProcessEventType.EXIT
_FIELDS = wire.fields(ProcessEvent)
_TYPE = {kind: _FIELDS["type"].encode(kind) for kind in ProcessEventType}
_EVENT = wire.fields(Event)["process"].tag
_FILENAME, _ARGUMENT = _FIELDS["exec_filename"], _FIELDS["exec_command_line"]
_FORKED = _TYPE[FORK] + _FIELDS["fork_child_pid"].tag
_CHILD_ID = _FIELDS["fork_child_id"].tag


def body_of(facts: Facts) -> bytes:
    """Event.process, encoded."""
    return _BODIES[facts[0]](facts[1], facts[2])


def text_in(facts: Facts) -> int:
    """Bytes of text, about."""
    return len(facts[1]) + len(facts[2]) if facts[0] is EXEC else 0


def _forked(pid: int, id: str) -> bytes:
    name = id.encode()
    return _nested(_FORKED + wire.varint(pid << 1) + _CHILD_ID + wire.varint(len(name)) + name)


def _executed(filename: bytes, arguments: bytes) -> bytes:
    tag, separate = _ARGUMENT.tag, arguments.split(b"\0")
    separate.pop()
    if arguments.isascii():
        encoded = [tag + wire.varint(len(one)) + one for one in separate]
    else:
        encoded = [tag + _ARGUMENT.write(one) for one in separate]
    return _nested(_TYPE[EXEC] + _FILENAME.encode(filename) + b"".join(encoded))


@lru_cache(4096)
def _exited(code: int | None, _: None) -> bytes:  # most are alike
    if code is None:
        return _nested(_TYPE[EXIT])
    return _nested(
        wire.encode(
            ProcessEvent,
            type=EXIT,
            exit_code=code,
            exit_status=code >> 8 & 0xFF,
            exit_signal=code & 0x7F,
            exit_core_dumped=bool(code & 0x80),
        )
    )


_BODIES: dict[ProcessEventType, Callable[[Any, Any], bytes]] = {FORK: _forked, EXEC: _executed, EXIT: _exited}


def _nested(body: bytes) -> bytes:
    return _EVENT + wire.varint(len(body)) + body
