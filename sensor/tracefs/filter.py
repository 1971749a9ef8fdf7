"""Kernel filter text: what an event's fields must be for the kernel to record it.

The kernel's grammar (Documentation/trace/events.rst, kernel/trace/trace_events_filter.c):

    filter    = term { "||" term }            && binds tighter than ||; ( ) and ! as in C
    term      = predicate { "&&" predicate }
    predicate = FIELD op value
    op        = "==" "!=" "<" "<=" ">" ">=" "&"     numbers; & is true if any common bit is set
              | "==" "!=" "~"                       strings; ~ is a glob
    value     = decimal, hexadecimal or octal number, of at most 23 characters
              | text within " or ', of at most 255 bytes, without an escape for the quote

What it does not say, and this module minds:

- A number is cut to the field's width before it is compared, so `u8 == 257` is true of 1.
  Comparisons that a field of its size can't or must fulfil become NEVER and ALWAYS here.
- A negative number for an unsigned field is refused, and an unsigned one has the whole range.
- A glob that begins with `!` is negated, and one that begins with a digit is taken literally,
  stars and all (MATCH_INDEX in filter_parse_regex). An escape in front makes it a glob.
- `*text` and `*text*` are searched in all bytes of a fixed char array, behind the NUL too, so
  they miss what they should find and find what was there before. An escape in the pattern
  makes the kernel use its real glob matcher, which stops at the NUL.
- A `char *` field is dereferenced, as a kernel address: no comparison that we could want.

Filters are values: equal meaning in another order gives an equal filter and equal text.
Nothing but `explain_filter` touches the machine.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from ..errors import KernelError
from .format import Field, Kind
from .mount import Tracefs
from .owner import Owner

# PERF_EVENT_IOC_SET_FILTER takes a page with the NUL; 4096 is the smallest page there is.
MAX_FILTER_TEXT = 4095
MAX_FILTER_STRING = 255  # bytes; MAX_FILTER_STR_VAL counts the NUL

_INTEGER_OPS = frozenset({"==", "!=", "<", "<=", ">", ">=", "&"})


class CannotSay(Exception):
    """The kernel's filter language has no way to say this; decide it in user space."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A condition on a record. Make it with the functions below, not by hand.

    `op` is "" for one predicate, whose text is `predicate`, or "&&" or "||" with `parts`.
    """

    op: str = ""
    predicate: str = ""
    parts: tuple[Filter, ...] = ()

    @property
    def text(self) -> str:
        """The text for the kernel, "" for no filter at all; CannotSay if it is too long.

        Encode with UTF-8 and surrogateescape: strings compare bytewise.
        """
        if self == ALWAYS:
            return ""
        text = self._render()
        if (size := len(text.encode("utf-8", "surrogateescape"))) > MAX_FILTER_TEXT:
            raise CannotSay(f"a filter of {size} bytes; the kernel takes {MAX_FILTER_TEXT}")
        return text

    def _render(self) -> str:
        if not self.op:
            return self.predicate
        return f" {self.op} ".join(
            f"({part._render()})" if part.op else part._render() for part in self.parts
        )


ALWAYS = Filter("&&")  # the conjunction of nothing; "no filter" to the kernel
# The language has no constant: nothing is both.
NEVER = Filter(predicate="common_pid < 0 && common_pid > 0")


def any_of(filters: Iterable[Filter]) -> Filter:
    """True if any is; ALWAYS absorbs, the empty disjunction is NEVER."""
    return _join("||", filters, NEVER, ALWAYS)


def all_of(filters: Iterable[Filter]) -> Filter:
    """True if all are; NEVER absorbs, the empty conjunction is ALWAYS."""
    return _join("&&", filters, ALWAYS, NEVER)


def _join(op: str, filters: Iterable[Filter], neutral: Filter, absorbing: Filter) -> Filter:
    parts: set[Filter] = set()
    for part in filters:
        if part == absorbing:
            return absorbing
        if part != neutral:
            parts.update(part.parts if part.op == op else (part,))
    if not parts:
        return neutral
    if len(parts) == 1:
        return parts.pop()
    return Filter(op, "", tuple(sorted(parts, key=_order)))


def _order(part: Filter) -> tuple[bool, tuple[tuple[int, str], ...]]:
    """Single predicates first, and numbers by value: id == 2 before id == 10."""
    pieces = re.findall(r"\d+|\D+", part._render())
    return bool(part.op), tuple((int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces)


# Numbers


def compare(field: Field, op: str, value: int) -> Filter:
    """`field op value` in whole numbers, whatever fits the field; CannotSay if it isn't a number.

    An `op` of "&" asks whether any of the value's bits is set.
    """
    if op not in _INTEGER_OPS:
        raise CannotSay(f"{op} does not compare numbers")
    _require_number(field)
    bits = 8 * field.size
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if field.signed else (0, (1 << bits) - 1)
    if op == "&":
        mask = value & (1 << bits) - 1
        if not mask:
            return NEVER
        # kstrtoll refuses the sign bit as a positive number
        return _predicate(field.name, op, mask - (1 << bits) if mask > high else mask)
    if low <= value <= high:
        if (value, op) in ((low, "<"), (high, ">")):
            return NEVER
        if (value, op) in ((low, ">="), (high, "<=")):
            return ALWAYS
        return _predicate(field.name, op, value)
    above = value > high
    return ALWAYS if op == "!=" or op in (("<", "<=") if above else (">", ">=")) else NEVER


def exclude(field_name: str, values: Iterable[int]) -> Filter:
    """True if a common field, such as common_pid, is none of the values.

    common_pid is a thread's id, in the first pid namespace: a process has as many as threads.
    """
    return all_of(_predicate(field_name, "!=", value) for value in values)


def _predicate(name: str, op: str, value: int) -> Filter:
    return Filter(predicate=f"{name} {op} {value}")


def _require_number(field: Field) -> None:
    if field.kind in (Kind.INTEGER, Kind.BOOL):
        return
    if field.kind is Kind.POINTER and not re.fullmatch(r"(const )?char \*", field.ctype):
        return
    raise CannotSay(f"{field.name} ({field.ctype}) is no number to the kernel's filters")


# Strings


def equals(field: Field, value: str | bytes, *, negated: bool = False) -> Filter:
    """True if a string field is exactly this text, or isn't; CannotSay if it can't be written."""
    text = _require_string(field, value)
    if field.kind is Kind.CHARS and _size(text) > field.count:
        # The kernel would compare the array's length only, and find the beginning equal.
        return ALWAYS if negated else NEVER
    return Filter(predicate=f"{field.name} {'!=' if negated else '=='} {_quote(text)}")


def glob(field: Field, pattern: str | bytes) -> Filter:
    """True if a string field matches a glob of lib/glob.c: `*`, `?`, `[a-z]` and `\\` to escape.

    Sets are best not negated: what `[^a]` means depends on the kernel, and on older ones `[!a]`
    matches the NUL too.
    """
    text = _require_string(field, pattern)
    if not re.search(r"[*?\[\\]", text):
        return equals(field, text)
    if set(text) == {"*"}:
        return ALWAYS
    return Filter(predicate=f"{field.name} ~ {_quote(_as_real_glob(text))}")


def _as_real_glob(pattern: str) -> str:
    """The same pattern, with an escape where the kernel would otherwise not read it as a glob."""
    if len(pattern) - len(pattern.rstrip("\\")) & 1:
        raise CannotSay("a pattern that ends in an escape")
    if re.match("[!0-9]", pattern):
        return "\\" + pattern
    if pattern.startswith("*") and not re.search(r"[?\[\\]", pattern):
        stars = len(pattern) - len(pattern.lstrip("*"))
        return pattern[:stars] + "\\" + pattern[stars:]
    return pattern


def _require_string(field: Field, value: str | bytes) -> str:
    if not (field.is_string and field.kind in (Kind.CHARS, Kind.DATA_LOC, Kind.REL_LOC)):
        raise CannotSay(f"{field.name} ({field.ctype}) is no string to the kernel's filters")
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _quote(text: str) -> str:
    if "\0" in text:
        raise CannotSay("a NUL within a string")
    if _size(text) > MAX_FILTER_STRING:
        raise CannotSay(f"a string of {_size(text)} bytes; the kernel takes {MAX_FILTER_STRING}")
    for quote in "\"'":
        if quote not in text:
            return quote + text + quote
    raise CannotSay("a string with both kinds of quotes")


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


# What the kernel has against a filter


def explain_filter(tracefs: Tracefs, system: str, event: str, text: str) -> str | None:
    """The kernel's own words on why it refuses a filter, with the position; None if it has none.

    perf_event's ioctl gives an errno only, and not always EINVAL: a `)` too many is EPERM, a `(`
    ENOENT, a missing quote ESRCH (process_preds returns -1, -2 and -3). A tracing instance of
    our own, there for this moment only, takes the same text for the same event and shows:

        id == foo
               ^
        parse_error: Invalid value (did you forget quotes)?

    None also where no instance can be made or the event is gone.
    """
    instance = f"{Owner.current().group}_{next(_serial)}"
    try:
        tracefs.make_instance(instance)
    except KernelError:
        return None
    file = ("instances", instance, "events", system, event, "filter")
    try:
        tracefs.write(text, *file)
    except KernelError:
        try:
            return _verdict(tracefs.read(*file))
        except KernelError:
            return None
    finally:
        # Busy if another tool has just opened a file in it: sweep() takes it away later.
        with suppress(KernelError):
            tracefs.remove_instance(instance)
    return None


_serial = itertools.count()


def _verdict(answer: str) -> str | None:
    match = re.search(r"\n(?P<indent> *)\^\nparse_error: (?P<problem>.+)", answer)
    return f"{match['problem']} at character {len(match['indent']) + 1}" if match else None
