"""Ways to command lines and exit statuses, the best that works is taken, and a proof that it does."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..errors import KernelError, RequestError, SetupError, UnservableError

log = logging.getLogger(__name__)
_FAMILY = "processes"


class Way(NamedTuple):
    """A way to something: its name in the configuration, its name for `ringside check`, how it begins."""

    name: str
    mechanism: str
    start: Callable[[], None]


class Proof(NamedTuple):
    """A program that ran for us and is gone: its pid, its command line, what wait(2) told."""

    pid: int
    arguments: list[bytes]
    status: int

    @classmethod
    def run(cls) -> Proof:
        """Python itself, which ends at once, and not with 0, when it sees an option that it does not know."""
        arguments = [sys.executable, "--ringside-proof", "", "of programs"]
        silent = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
        try:
            pid = os.posix_spawn(sys.executable, arguments, os.environ, file_actions=silent)
            status = os.waitpid(pid, 0)[1]  # none is to be had where SIGCHLD is ignored
        except OSError as error:
            raise UnservableError(_FAMILY, f"no program to prove it with: {error.strerror}") from error
        return cls(pid, [os.fsencode(one) for one in arguments], status)


class Reached:
    """The best way that works, and what the better ones lack. Its names are empty if none does."""

    def __init__(self, ways: Sequence[Way], wanted: str) -> None:
        notes = []
        self.name = self.mechanism = ""
        for way in ways:
            if way is not ways[-1] and wanted not in ("auto", way.name):
                continue
            try:
                way.start()
            except (UnservableError, KernelError, RequestError, SetupError) as error:
                cause = error.cause if isinstance(error, UnservableError) else str(error)
                log.info("not by %s: %s", way.mechanism, cause)
                notes.append(cause)
            else:
                self.name, self.mechanism = way.name, way.mechanism
                break
        self.note = "; ".join(notes)
