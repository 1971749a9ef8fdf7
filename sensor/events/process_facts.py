"""What process events say of themselves: as it is kept, and encoded.

Most is told to nobody and kept for those who look back, so it stays as it came until somebody wants it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ringside.api.v0 import Event, ProcessEvent, ProcessEventType

from .. import wire

_FIELDS = wire.fields(ProcessEvent)
_TYPE = {kind: _FIELDS["type"].encode(kind) for kind in ProcessEventType}
_EVENT = wire.fields(Event)["process"].tag
_ARGUMENT = _FIELDS["exec_command_line"]


class Forked(NamedTuple):
    """A process was made."""

    pid: int
    id: str
    kind: ProcessEventType = ProcessEventType.FORK

    @property
    def size(self) -> int:
        """Bytes of text."""
        return 0

    def body(self) -> bytes:
        """Event.process, encoded."""
        return _nested(
            _TYPE[self.kind]
            + _FIELDS["fork_child_pid"].encode(self.pid)
            + _FIELDS["fork_child_id"].encode(self.id)
        )


class Executed(NamedTuple):
    """A program began. `arguments`: a NUL ends each; what none ends is but a part, and left out."""

    filename: bytes
    arguments: bytes
    kind: ProcessEventType = ProcessEventType.EXEC

    @property
    def size(self) -> int:
        """Bytes of text."""
        return len(self.filename) + len(self.arguments)

    def body(self) -> bytes:
        """Event.process, encoded."""
        tag = _ARGUMENT.tag
        if self.arguments.isascii():
            arguments = [tag + wire.varint(len(one)) + one for one in self.arguments.split(b"\0")[:-1]]
        else:
            arguments = [tag + _ARGUMENT.write(one) for one in self.arguments.split(b"\0")[:-1]]
        return _nested(
            _TYPE[self.kind] + _FIELDS["exec_filename"].encode(self.filename) + b"".join(arguments)
        )


class Exited(NamedTuple):
    """A process ended; `code` is what wait(2) tells, None if that is not known."""

    code: int | None
    kind: ProcessEventType = ProcessEventType.EXIT

    @property
    def size(self) -> int:
        """Bytes of text."""
        return 0

    def body(self) -> bytes:
        """Event.process, encoded."""
        return _exit_body(self.code)


Facts = Forked | Executed | Exited


@lru_cache(4096)
def _exit_body(code: int | None) -> bytes:  # most are alike
    if code is None:
        return _nested(_TYPE[ProcessEventType.EXIT])
    return _nested(
        wire.encode(
            ProcessEvent,
            type=ProcessEventType.EXIT,
            exit_code=code,
            exit_status=code >> 8 & 0xFF,
            exit_signal=code & 0x7F,
            exit_core_dumped=bool(code & 0x80),
        )
    )


def _nested(body: bytes) -> bytes:
    return _EVENT + wire.varint(len(body)) + body
