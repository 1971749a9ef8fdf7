"""Subscriptions in one line.

    events(syscalls("openat"), processes("exec"), network("connect", where="sin_port == 443"))
    events(files("/etc/*"), container="web*", limit=10)
    events(kernel("do_unlinkat", args={"name": "+0(+0($arg2)):string"}))

Each builder returns filters; events() puts them into a Subscription. What a sensor would refuse
anyway is refused here where this can be known: ValueError, or ParseError for `where`.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from ringside.api.v0 import (
    ChargenEventFilter,
    ContainerEventFilter,
    ContainerEventType,
    ContainerEventView,
    ContainerFilter,
    EventFilter,
    FileEventFilter,
    FileEventType,
    KernelFunctionCallEventType,
    KernelFunctionCallFilter,
    LimitModifier,
    Modifier,
    NetworkEventFilter,
    NetworkEventType,
    ProcessEventFilter,
    ProcessEventType,
    Subscription,
    SyscallEventFilter,
    SyscallEventType,
    ThrottleModifier,
    TickerEventFilter,
)
from ringside.sensor.expression import Expression, parse, predicates, to_message

from .syscalls import number_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Filter: TypeAlias = (
    SyscallEventFilter
    | ProcessEventFilter
    | FileEventFilter
    | KernelFunctionCallFilter
    | NetworkEventFilter
    | ContainerEventFilter
    | ChargenEventFilter
    | TickerEventFilter
)
Names: TypeAlias = "str | Iterable[str]"

_PLACES: dict[type, str] = {
    SyscallEventFilter: "syscall_events",
    ProcessEventFilter: "process_events",
    FileEventFilter: "file_events",
    KernelFunctionCallFilter: "kernel_events",
    NetworkEventFilter: "network_events",
    ContainerEventFilter: "container_events",
    ChargenEventFilter: "chargen_events",
    TickerEventFilter: "ticker_events",
}
_SIDES = ("enter", "exit", "both")


def events(
    *filters: Iterable[Filter],
    container: Names = (),
    container_id: Names = (),
    image: Names = (),
    image_id: Names = (),
    limit: int | None = None,
    throttle: float | None = None,
    since: float | None = None,
    duration: float | None = None,
) -> Subscription:
    """A subscription to what any of the filters wants, in all containers and outside or in the ones named.

    `container` and `image` are names and may be shell globs. `limit` ends the stream after so many
    events; `throttle`, `since` and `duration` are seconds.
    """
    made = EventFilter()
    for one in chain.from_iterable(filters):
        getattr(made, _PLACES[type(one)]).append(one)
    modifier = Modifier()
    if limit is not None:
        modifier.limit = LimitModifier(limit=_positive(limit, "limit"))
    if throttle is not None:
        modifier.throttle = ThrottleModifier(interval=_positive(round(throttle * 1000), "throttle"))
    within = ContainerFilter(
        ids=_names(container_id),
        names=_names(container),
        image_ids=_names(image_id),
        image_names=_names(image),
    )
    return Subscription(
        event_filter=made,
        container_filter=within or None,
        modifier=modifier or None,
        since_duration=None if since is None else _nanoseconds(since, "since"),
        for_duration=None if duration is None else _nanoseconds(duration, "duration"),
    )


def syscalls(*which: str | int, on: str = "enter", ret: int | None = None) -> list[SyscallEventFilter]:
    """System calls by name or number, all of them if none is given; on "enter", "exit" or "both".

    `ret` asks for exits with this result. Names are those of this machine's architecture.
    UnknownSyscall if there is none of the name.
    """
    _one_of(on, "on", _SIDES)
    if ret is not None:
        return [
            SyscallEventFilter(type=SyscallEventType.EXIT, id=number, ret=ret) for number in _numbers(which)
        ]
    return [
        SyscallEventFilter(type=kind, id=number)
        for number in _numbers(which)
        for kind, side in ((SyscallEventType.ENTER, "enter"), (SyscallEventType.EXIT, "exit"))
        if on in (side, "both")
    ]


def processes(
    *kinds: str, filename: str | None = None, pattern: str | None = None, exit_code: int | None = None
) -> list[ProcessEventFilter]:
    """Processes that "fork", "exec" or "exit"; all three if none is given.

    `filename` and `pattern` (a shell glob) narrow exec, `exit_code` (a wait status) narrows exit;
    kinds that are not given then follow from them.
    """
    narrowed = ["exec"] * (filename is not None or pattern is not None) + ["exit"] * (exit_code is not None)
    made = []
    for kind in _kinds(kinds or narrowed, ProcessEventType):
        one = ProcessEventFilter(type=kind)
        if kind is ProcessEventType.EXEC:
            one.exec_filename, one.exec_filename_pattern = filename, pattern
        if kind is ProcessEventType.EXIT:
            one.exit_code = exit_code
        made.append(one)
    return made


def files(*names: str, flags: int | None = None, mode: int | None = None) -> list[FileEventFilter]:
    """Opens of files with these names or shell globs, of all files if none is given.

    `flags` and `mode` are masks: one of these bits of the open(2) flags, of the mode, must be set.
    """
    return [
        FileEventFilter(
            type=FileEventType.OPEN,
            filename=None if name is None or _is_glob(name) else name,
            filename_pattern=name if name is not None and _is_glob(name) else None,
            open_flags_mask=flags,
            create_mode_mask=mode,
        )
        for name in names or (None,)
    ]


def network(*kinds: str, where: str | Expression | None = None) -> list[NetworkEventFilter]:
    """Network events: "connect", "bind", "listen", "accept", "sendto", "recvfrom"; all if none is given.

    Each of them means the attempt and its result, "connect:attempt" and "connect:result" only one
    of the two. `where` is an expression as in `sin_port == 443 && sin_addr == 10.0.0.1`. A result
    has the field `ret` only and an attempt all the others, so an expression picks its kind.
    """
    expression = parse(where) if isinstance(where, str) else where
    wanted = {"attempt", "result"}
    if expression is not None and (fields := {found.field for found in predicates(expression)}):
        wanted = ({"result"} if "ret" in fields else set()) | ({"attempt"} if fields - {"ret"} else set())
        if len(wanted) > 1:
            raise ValueError("where: `ret` belongs to results, the other fields to attempts; use two filters")
    made: list[NetworkEventFilter] = []
    for kind in kinds or _NETWORK:
        name, _, side = kind.partition(":")
        _one_of(name, "network event", _NETWORK)
        _one_of(side, "side", ("", "attempt", "result"))
        if side and side not in wanted:
            raise ValueError(f"where: its fields are none of a {kind}")
        for each in ("attempt", "result"):
            if each in wanted and side in ("", each):
                event_type = NetworkEventType[f"{name}_{each}".upper()]
                made.append(
                    NetworkEventFilter(
                        type=event_type, filter=None if expression is None else to_message(expression)
                    )
                )
    return made


_NETWORK = ("connect", "bind", "listen", "accept", "sendto", "recvfrom")


def kernel(
    symbol: str, args: Mapping[str, str] | None = None, *, where: str = "", on: str = "enter"
) -> list[KernelFunctionCallFilter]:
    """Calls of a kernel function, on "enter", "exit" or "both".

    `args` are what to fetch, as in {"path": "+0($arg1):string"}; `where` is in the kernel's own
    filter language, over the names of the arguments.
    """
    _one_of(on, "on", _SIDES)
    return [
        KernelFunctionCallFilter(type=kind, symbol=symbol, arguments=dict(args or {}), filter=where)
        for kind, side in (
            (KernelFunctionCallEventType.ENTER, "enter"),
            (KernelFunctionCallEventType.EXIT, "exit"),
        )
        if on in (side, "both")
    ]


def containers(*kinds: str, full: bool = False) -> list[ContainerEventFilter]:
    """Containers "created", "running", "exited" or "destroyed"; all four if none is given.

    `full` adds the engine's whole configuration to each event.
    """
    view = ContainerEventView.FULL if full else ContainerEventView.BASIC
    return [ContainerEventFilter(type=kind, view=view) for kind in _kinds(kinds, ContainerEventType)]


def ticker(seconds: float) -> list[TickerEventFilter]:
    """An event every so many seconds."""
    return [TickerEventFilter(interval=_nanoseconds(seconds, "ticker"))]


def chargen(length: int) -> list[ChargenEventFilter]:
    """Events of so many characters each, as fast as they are read."""
    return [ChargenEventFilter(length=_positive(length, "chargen"))]


def _names(given: Names) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _numbers(which: tuple[str | int, ...]) -> list[int | None]:
    return [number_of(one) for one in which] or [None]


def _is_glob(name: str) -> bool:
    return any(char in name for char in "*?[\\")


E = TypeVar("E", ProcessEventType, ContainerEventType)


def _kinds(given: Iterable[str], enum: type[E]) -> list[E]:
    """The members that are named, all but UNKNOWN if none is."""
    known = {member.name.lower(): member for member in enum if member}
    given = list(given)
    for kind in given:
        _one_of(kind, "kind", known)
    return [known[kind] for kind in given or known]


def _one_of(value: str, what: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r}: must be {', '.join(name for name in allowed if name)}")


def _positive(value: int, what: str) -> int:
    if value <= 0:
        raise ValueError(f"{what}: must be more than 0")
    return value


def _nanoseconds(seconds: float, what: str) -> int:
    return _positive(round(seconds * 1_000_000_000), what)
