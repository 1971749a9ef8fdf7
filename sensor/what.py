"""From the words of `ringside watch WHAT... --filter ...` to a subscription."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ringside.api.v0 import ContainerEventType, ProcessEventType, Subscription
from ringside.client import UnknownSyscall, builders

from .config import parse_duration
from .errors import RingsideError
from .expression import And, Expression, Op, Predicate, parse


class WhatError(RingsideError):
    """Nothing that can be watched is called that."""


def subscription(
    words: Sequence[str], *, where: str = "", arguments: Mapping[str, str] | None = None, **more: Any
) -> Subscription:
    """What the words ask for; `more` goes to builders.events(). WhatError, or ParseError for `where`."""
    reader = _Reader(where, arguments or {})
    try:
        filters = [reader.read(word) for word in words]
        reader.check()
        return builders.events(*filters, **more)
    except (ValueError, UnknownSyscall) as error:
        raise WhatError(str(error)) from error


class _Reader:
    """Reads one WHAT after the other; they share the filter and the arguments."""

    def __init__(self, where: str, arguments: Mapping[str, str]) -> None:
        self.where = where
        self.arguments = arguments
        self.any_kernel = False
        self._expression: Expression | None = None
        self._families: Mapping[str, Callable[[str], Any]] = {
            "process": self.process,
            "syscall": self.syscall,
            "file": self.file,
            "network": self.network,
            "kernel": self.kernel,
            "container": self.container,
            "ticker": self.ticker,
            "chargen": self.chargen,
        }

    def read(self, word: str) -> Any:
        """The filters of one WHAT."""
        family, _, rest = word.partition(":")
        if family not in self._families:
            raise WhatError(f"{word!r} can't be watched; {suggest(family, self._families)}")
        self.any_kernel |= family == "kernel"
        return self._families[family](rest)

    def check(self) -> None:
        """What only all of them together show."""
        if self.arguments and not self.any_kernel:
            raise WhatError("--arg goes with kernel:SYMBOL only")

    def expression(self) -> Expression | None:
        """The filter; None if there is none."""
        if self._expression is None and self.where:
            self._expression = parse(self.where)
        return self._expression

    def equals(self, family: str, fields: Mapping[str, tuple[Op, ...]]) -> dict[str, Predicate]:
        """The filter of a family whose events can be filtered by a few fields, by == mostly."""
        expression = self.expression()
        if expression is None:
            return {}
        terms = expression.terms if isinstance(expression, And) else (expression,)
        found: dict[str, Predicate] = {}
        for term in terms:
            known = isinstance(term, Predicate) and term.op in fields.get(term.field, ())
            if not isinstance(term, Predicate) or not known or term.field in found:
                can = [f"{field} {op.value} ..." for field, ops in fields.items() for op in ops]
                raise WhatError(f"--filter '{self.where}': {family} takes {', '.join(can) or 'no filter'}")
            found[term.field] = term
        return found

    # -- one for each family

    def process(self, rest: str) -> Any:
        kinds = _words(rest, _kinds(ProcessEventType), "process")
        found = self.equals("process", {"exec_filename": (Op.EQ, Op.GLOB), "exit_code": (Op.EQ,)})
        file, code = found.get("exec_filename"), found.get("exit_code")
        return builders.processes(
            *kinds,
            filename=str(file.value) if file and file.op is Op.EQ else None,
            pattern=str(file.value) if file and file.op is Op.GLOB else None,
            exit_code=code.number if code else None,
        )

    def syscall(self, rest: str) -> Any:
        names, _, side = rest.partition(":")
        if side not in ("", "enter", "exit", "both"):
            raise WhatError(f"'syscall:{rest}': a system call is watched on enter, exit or both")
        ret = self.equals("syscall", {"ret": (Op.EQ,)}).get("ret")
        if ret and side in ("enter", "both"):
            raise WhatError(f"--filter '{self.where}': only calls that return have a result, not {side}")
        which = [] if names in ("", "*") else names.split(",")
        return builders.syscalls(*which, on=side or "enter", ret=ret.number if ret else None)

    def file(self, rest: str) -> Any:
        named = self.equals("file", {"filename": (Op.EQ, Op.GLOB)}).get("filename")
        if named and rest:
            raise WhatError(f"'file:{rest}' names the files already; leave out --filter '{self.where}'")
        return builders.files(*([rest] if rest else []), *([str(named.value)] if named else []))

    def network(self, rest: str) -> Any:
        return builders.network(*_words(rest, None, "network"), where=self.expression())

    def kernel(self, rest: str) -> Any:
        symbol, _, side = rest.rpartition(":")
        if side not in ("enter", "exit", "both"):
            symbol, side = rest, "enter"
        if not symbol:
            raise WhatError("'kernel' needs a function, as in kernel:do_exit")
        return builders.kernel(symbol, self.arguments, where=self.where, on=side)

    def container(self, rest: str) -> Any:
        self.equals("container", {})
        return builders.containers(*_words(rest, _kinds(ContainerEventType), "container"))

    def ticker(self, rest: str) -> Any:
        self.equals("ticker", {})
        return builders.ticker((parse_duration(rest) if rest else 10**9) / 10**9)

    def chargen(self, rest: str) -> Any:
        self.equals("chargen", {})
        if rest and not rest.isdecimal():
            raise WhatError(f"'chargen:{rest}': give the number of characters, as in chargen:64")
        return builders.chargen(int(rest or 64))


def _kinds(enum: Iterable[ProcessEventType] | Iterable[ContainerEventType]) -> list[str]:
    return [kind.name.lower() for kind in enum if kind]


def _words(rest: str, allowed: Sequence[str] | None, family: str) -> list[str]:
    words = rest.split(",") if rest else []
    for word in words:
        if allowed is not None and word not in allowed:
            raise WhatError(f"'{family}:{word}' can't be watched; {suggest(word, allowed, f'{family}:')}")
    return words


def suggest(word: str, known: Sequence[str] | Mapping[str, Any], prefix: str = "") -> str:
    """A hint for who wrote a word that is not known."""
    near = difflib.get_close_matches(word, list(known), 1)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"there are {', '.join(prefix + one for one in known)}"


def symbols(of: Subscription) -> list[str]:
    """The kernel functions that a subscription asks for."""
    return [one.symbol for one in of.event_filter.kernel_events] if of.event_filter else []


def may_be_id(name: str) -> bool:
    """True for what may as well be a container's id as its name: twelve hexadecimal digits or more."""
    return 12 <= len(name) <= 64 and all(char in "0123456789abcdef" for char in name)


def is_id(name: str) -> bool:
    """True for what is a container's whole id, and surely no name."""
    return len(name) == 64 and may_be_id(name)
