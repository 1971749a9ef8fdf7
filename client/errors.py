"""What can go wrong between a client and a sensor.

    ClientError             .status, a grpclib.const.Status, and .message
    ├── Unreachable         no sensor there, or it went away
    └── CallError           the sensor ended the stream; .details
        ├── BadRequest      the subscription makes no sense (INVALID_ARGUMENT)
        └── NotServable     that machine can serve none of it (FAILED_PRECONDITION)

What the client itself finds wrong with an address or an expression is a RequestError, as in
the sensor, and with the argument of a builder a ValueError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpclib.const import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringside.api import ErrorInfo


class ClientError(Exception):
    """Base of every error that the client raises on purpose."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Unreachable(ClientError):
    """Nobody listens at the address, or the connection was lost, or the sensor stopped."""

    def __init__(self, message: str) -> None:
        super().__init__(Status.UNAVAILABLE, message)


class CallError(ClientError):
    """The sensor ended the stream with an error; `details` are what it said about the cause."""

    def __init__(self, status: Status, message: str, details: Sequence[ErrorInfo] = ()) -> None:
        super().__init__(status, message)
        self.details = tuple(details)

    def __str__(self) -> str:
        return f"{self.status.name}: {self.message}"


class BadRequest(CallError):
    """The subscription makes no sense; the message names the field."""


class NotServable(CallError):
    """The sensor's machine can serve no part of the subscription; the message says what it lacks."""


def call_error(status: Status, message: str, details: Sequence[ErrorInfo] = ()) -> ClientError:
    """The error that a call's final status means."""
    if status is Status.UNAVAILABLE:
        return Unreachable(message or "the sensor stopped")
    kinds = {Status.INVALID_ARGUMENT: BadRequest, Status.FAILED_PRECONDITION: NotServable}
    return kinds.get(status, CallError)(status, message, details)
