"""What can go wrong, by whose fault it is.

    RingsideError
    ├── RequestError         the caller asked for something that makes no sense
    ├── UnservableError      the request is fine, this kernel or these privileges can't serve it
    ├── SetupError           the sensor itself can't run here: not root, no tracefs, a port in use
    ├── KernelError          the kernel refused an operation that should have worked
    └── EngineError          a container engine is unreachable or answered nonsense

A request's fault travels as INVALID_ARGUMENT, an unservable one as FAILED_PRECONDITION;
the command line prints every one of them as a single line, without a traceback.
"""

from __future__ import annotations

import errno as _errno
import os


class RingsideError(Exception):
    """Base of every error that Ringside raises on purpose."""


class RequestError(RingsideError):
    """The caller's request is wrong. `field` is the path of the field, as in the API."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class UnservableError(RingsideError):
    """A well-formed request that this machine can't serve.

    `family` names the event family, `cause` what is missing, `hint` how to get it.
    """

    def __init__(self, family: str, cause: str, hint: str = "") -> None:
        super().__init__(f"{family}: {cause}" + (f" ({hint})" if hint else ""))
        self.family = family
        self.cause = cause
        self.hint = hint


class SetupError(RingsideError):
    """The sensor can't run here; `hint` says what would let it."""

    def __init__(self, missing: str, hint: str = "") -> None:
        super().__init__(f"{missing}; {hint}" if hint else missing)
        self.missing = missing
        self.hint = hint


class KernelError(RingsideError):
    """The kernel refused `operation`; `errno` is its positive error number."""

    def __init__(self, operation: str, errno: int, detail: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{operation}: {os.strerror(errno)} ({name})" + (f": {detail}" if detail else ""))
        self.operation = operation
        self.errno = errno
        self.detail = detail


class EngineError(RingsideError):
    """A container engine could not be asked, or its answer makes no sense."""
