"""Probes: events of our own on kernel functions, defined through tracefs.

A spec is a value that checks itself and renders one line; `create` writes the line, `Probe.close`
takes it back. The kernel's grammar (Documentation/trace/kprobetrace.rst):

    p[:[GRP/][EVENT]] [MOD:]SYM[+offs]|MEMADDR [FETCHARGS]             a function's beginning
    r[MAXACTIVE][:[GRP/][EVENT]] [MOD:]SYM[+offs]|MEMADDR [FETCHARGS]  its return
    -:[GRP/]EVENT                                                      removes

    FETCHARG = NAME=WHAT[:TYPE]
    WHAT     = %REG | $argN | $retval | $stack[N] | $comm | @ADDR | @SYM[+|-offs]
             | +|-[u]OFFS(WHAT) | \\VALUE | \\"STRING"
    TYPE     = u8..u64 s8..s64 x8..x64 char string ustring symbol symstr bW@O/SIZE, or TYPE[N]

Besides (kernel/trace/trace_probe.h, trace.c): 128 FETCHARGs, 63 bytes each, names to 32 bytes,
a line to 4094 bytes, words parted by blanks, `#` begins a comment. Older kernels drop arguments
beyond 128 without a word, so all that is checked here, before the write.

Two probes of one group and name become one event with both places, silently: names are unique
(see owner.py), and nothing is ever defined under a name that a caller of the API chose.
"""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from ..errors import KernelError, RequestError, UnservableError
from .format import Format
from .mount import Tracefs
from .owner import Life, Owner

MAX_ARGUMENTS = 128  # MAX_TRACE_ARGS
MAX_ARGUMENT_NAME = 32  # MAX_ARG_NAME_LEN
MAX_FETCHARG = 63  # MAX_ARGSTR_LEN
MAX_NAME = 63  # MAX_EVENT_NAME_LEN with the NUL
MAX_SYMBOL = 511  # KSYM_NAME_LEN with the NUL
MAX_LINE = 4094  # WRITE_BUFSIZE - 2
MAX_MAXACTIVE = 4096  # KRETPROBE_MAXACTIVE_MAX
MAX_STRING = 4096  # MAX_STRING_SIZE, PATH_MAX, with the NUL

Fetchargs = tuple[tuple[str, str], ...]


# Specs


class Spec(Protocol):
    """What can be created: a name, the file that takes it, its line."""

    @property
    def group(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def fetchargs(self) -> Fetchargs: ...
    @property
    def file(self) -> str: ...
    @property
    def record_size(self) -> RecordSize: ...
    def definition(self) -> str: ...


@dataclass(frozen=True, slots=True)
class RecordSize:
    """Bytes of a probe's records: the fixed part, and how many strings come behind it."""

    fixed: int
    strings: int

    @property
    def least(self) -> int:
        """Bytes with all strings empty, as the kernel counts them for perf."""
        return _perf_size(self.fixed + self.strings)

    @property
    def most(self) -> int:
        """Bytes with all strings as long as the kernel takes them."""
        return _perf_size(self.fixed + self.strings * MAX_STRING)


@dataclass(frozen=True, slots=True)
class KprobeSpec:
    """A probe on a kernel function: where it begins, or where it returns.

    RequestError names what is wrong: symbol, offset, maxactive, arguments[NAME], arguments.
    """

    group: str
    name: str
    symbol: str  # or module:symbol
    offset: int = 0
    is_return: bool = False
    maxactive: int = 0  # returns pending at once; 0 leaves it to the kernel
    fetchargs: Fetchargs = ()

    def __post_init__(self) -> None:
        _check_names(self.group, self.name)
        _check_symbol(self.symbol)
        if self.offset < 0:
            raise RequestError("offset", "must not be negative")
        if self.is_return and self.offset:
            raise RequestError("offset", "a return probe is on the function itself, without an offset")
        if not 0 <= self.maxactive <= MAX_MAXACTIVE:
            raise RequestError("maxactive", f"must be from 0 to {MAX_MAXACTIVE}")
        if self.maxactive and not self.is_return:
            raise RequestError("maxactive", "is for return probes only")
        _check_fetchargs(self.fetchargs, self.definition())

    @property
    def file(self) -> str:
        """The file that takes it; where it is missing, the kernel has no kprobes."""
        return "kprobe_events"

    @property
    def record_size(self) -> RecordSize:
        # struct kprobe_trace_entry_head, kretprobe_trace_entry_head
        return _record_size(24 if self.is_return else 16, self.fetchargs)

    def definition(self) -> str:
        """The line that defines it."""
        kind = f"r{self.maxactive or ''}" if self.is_return else "p"
        place = f"{self.symbol}+{self.offset}" if self.offset else self.symbol
        return _line(f"{kind}:{self.group}/{self.name}", place, self.fetchargs)


def _line(head: str, place: str, fetchargs: Fetchargs) -> str:
    return " ".join([head, place, *(f"{name}={what}" for name, what in fetchargs)])


# Checks

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Compilers add .isra.0, .constprop.1, .llvm.12345 and $hash; a module's name may hold dashes.
_SYMBOL = re.compile(r"(?:[A-Za-z0-9_-]+:)?[A-Za-z_.][A-Za-z0-9_.$]*")


def _check_names(group: str, name: str) -> None:
    for what, text in (("group", group), ("name", name)):
        if not _IDENTIFIER.fullmatch(text) or len(text) > MAX_NAME:
            raise RequestError(what, f"{text!r} must be a C identifier of at most {MAX_NAME} characters")


def _check_symbol(symbol: str) -> None:
    if not symbol:
        raise RequestError("symbol", "is required: the name of a kernel function")
    if not _SYMBOL.fullmatch(symbol):
        raise RequestError("symbol", f"{_shorten(symbol)} is no kernel symbol, nor module:symbol")
    if len(symbol) > MAX_SYMBOL:
        raise RequestError(
            "symbol", f"is {len(symbol)} characters long; kernel symbols have {MAX_SYMBOL} at most"
        )


def _check_fetchargs(fetchargs: Fetchargs, line: str) -> None:
    if len(fetchargs) > MAX_ARGUMENTS:
        raise RequestError("arguments", f"{len(fetchargs)} of them; the kernel takes {MAX_ARGUMENTS}")
    seen: set[str] = set()
    for name, what in fetchargs:
        field = f"arguments[{name}]" if _IDENTIFIER.fullmatch(name) else f"arguments[{_shorten(name)}]"
        if not _IDENTIFIER.fullmatch(name):
            raise RequestError(field, "the name must be a C identifier")
        if len(name) > MAX_ARGUMENT_NAME:
            raise RequestError(field, f"the name must be at most {MAX_ARGUMENT_NAME} characters long")
        if name.startswith(("common_", "__probe_")):
            raise RequestError(field, "names that begin with common_ or __probe_ are the kernel's")
        if name in seen:
            raise RequestError(field, "the name is used twice")
        seen.add(name)
        if not what:
            raise RequestError(field, "says nothing to fetch: %REGISTER, $argN, $retval, +OFFSET(...), ...")
        if bad := re.search(r"[^\x21-\x7e]|[;#]", what):
            raise RequestError(field, f"{bad[0]!r} at character {bad.start() + 1} has no place in a fetcharg")
        if len(what) > MAX_FETCHARG:
            raise RequestError(field, f"is {len(what)} characters long; the kernel takes {MAX_FETCHARG}")
    if len(line) > MAX_LINE:
        raise RequestError(
            "arguments", f"make a definition of {len(line)} bytes; the kernel takes {MAX_LINE}"
        )


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:64] + "...")


# How large records get
#
# perf copies a record into a buffer of PERF_MAX_TRACE_SIZE: 2048 bytes, 8192 since 5.16. A larger
# one is dropped, uncounted, with one warning in the kernel log (perf_trace_buf_alloc). Strings
# count with the length they have when the probe fires, up to 4096 each, and a fetcharg can't
# bound them. So what can never fit is refused, and what may not fit is for the caller to know:
# one string of a full PATH_MAX fits since 5.16, none before.


def trace_size_limit(tracefs: Tracefs) -> int:
    """PERF_MAX_TRACE_SIZE of this kernel, or 2048 in doubt.

    It can be seen nowhere, and provoking the warning is no way to ask (it may panic the
    machine). A system call that came in the same release stands in: futex_waitv, 5.16.
    """
    return 8192 if tracefs.has_event("syscalls", "sys_enter_futex_waitv") else 2048


def check_record_size(spec: Spec, limit: int) -> None:
    """RequestError if no record of this probe could fit into the kernel's buffer."""
    if (least := spec.record_size.least) > limit:
        raise RequestError("arguments", f"make records of {least} bytes; this kernel takes {limit}")


def _perf_size(size: int) -> int:
    # kprobe_perf_func: ALIGN(size + sizeof(u32), sizeof(u64)) - sizeof(u32)
    return (size + 4 + 7) // 8 * 8 - 4


def _record_size(head: int, fetchargs: Fetchargs) -> RecordSize:
    fixed, strings = head, 0
    for _, what in fetchargs:
        size, count, is_string = _argument_size(what)
        fixed += size * count
        strings += count if is_string else 0
    return RecordSize(fixed, strings)


_TYPE = re.compile(r"(?P<base>[^\[\]]+)(?:\[(?P<count>\d+)\])?")


def _argument_size(fetcharg: str) -> tuple[int, int, bool]:
    """Size of one element, number of elements, and whether each is a string behind the record."""
    what, _, suffix = fetcharg.partition(":")
    if what == "$comm" or what.startswith('\\"'):
        return 4, 1, True
    match = _TYPE.fullmatch(suffix)
    if match is None:
        return 8, 1, False  # untyped is an unsigned long; nonsense is for the kernel to refuse
    base, count = match["base"], int(match["count"] or 1)
    if base in ("string", "ustring", "symstr", "%pd", "%pD"):
        return 4, count, True
    if base == "char":
        return 1, count, False
    if bits := re.fullmatch(r"[usx](8|16|32|64)|b\d+@\d+/(8|16|32|64)", base):
        return int(bits[1] or bits[2]) // 8, count, False
    return 8, count, False


# Creating and removing


class Probe:
    """A probe that exists in the kernel, until `close`."""

    def __init__(self, tracefs: Tracefs, spec: Spec) -> None:
        self.spec = spec
        self._tracefs = tracefs
        self._exists = True

    def __repr__(self) -> str:
        return f"Probe({self.spec.definition()!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read_format(self) -> Format:
        """The event's parsed format; its `id` is what perf_event_open wants."""
        return self._tracefs.read_format(self.spec.group, self.spec.name)

    def close(self) -> None:
        """Removes the probe; idempotent. KernelError EBUSY while a perf event on it is open."""
        if self._exists:
            remove(self._tracefs, self.spec.file, self.spec.group, self.spec.name)
            self._exists = False


def create(
    tracefs: Tracefs,
    spec: Spec,
    *,
    proc: Path | str = "/proc",
    debugfs: Path | str = "/sys/kernel/debug",
) -> Probe:
    """Defines the probe, in the kernel's list after those of everybody else.

    RequestError, with the kernel's own words, if the definition is at fault; UnservableError if
    this kernel or these privileges allow no probes; KernelError otherwise.
    """
    _require_file(tracefs, spec.file)
    check_record_size(spec, trace_size_limit(tracefs))
    if isinstance(spec, KprobeSpec):
        _require_module(spec.symbol, Path(proc))
    try:
        tracefs.append(spec.definition() + "\n", spec.file)
    except KernelError as error:
        explained = _explained(tracefs, spec, error, Path(debugfs))
        if explained is None:
            raise
        raise explained from error
    return Probe(tracefs, spec)


def remove(tracefs: Tracefs, file: str, group: str, name: str) -> None:
    """Removes a probe; one that is gone already is no error. KernelError EBUSY if it is in use."""
    try:
        tracefs.append(f"-:{group}/{name}\n", file)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise


_FAMILIES = {
    "kprobe_events": ("kernel probes", "the kernel has no kprobes", "it needs CONFIG_KPROBE_EVENTS"),
    "uprobe_events": ("user probes", "the kernel has no uprobes", "it needs CONFIG_UPROBE_EVENTS"),
    "dynamic_events": ("probes", "the kernel has no dynamic_events", "it needs CONFIG_DYNAMIC_EVENTS"),
}


def _require_file(tracefs: Tracefs, file: str) -> None:
    family, missing, hint = _FAMILIES[file]
    if not tracefs.exists(file):
        raise UnservableError(family, missing, hint)
    if not tracefs.writable:
        raise UnservableError(family, "tracefs is mounted read-only", "mount it writable")


def _require_module(symbol: str, proc: Path) -> None:
    """The kernel takes any symbol of a module that isn't loaded, and waits for it, silently."""
    module, colon, _ = symbol.partition(":")
    if not colon:
        return
    try:
        loaded = {line.split()[0] for line in (proc / "modules").read_text().splitlines() if line.split()}
    except OSError:
        return
    if module.replace("-", "_") not in loaded:
        raise RequestError("symbol", f"the module {module} is not loaded")


# The errno of a definition that can't be: bad grammar, no such symbol, within an instruction,
# an ambiguous symbol, and what fetchargs overflow.
_AT_FAULT = frozenset(
    {errno.EINVAL, errno.ENOENT, errno.EILSEQ, errno.EADDRNOTAVAIL, errno.E2BIG, errno.ERANGE, errno.ENOSPC}
)


def _explained(
    tracefs: Tracefs, spec: Spec, error: KernelError, debugfs: Path
) -> RequestError | UnservableError | None:
    """Whose fault it is that a definition was refused, in the words of the kernel's error log."""
    family, _, _ = _FAMILIES[spec.file]
    if error.errno in (errno.EPERM, errno.EACCES, errno.EROFS):
        hint = "it takes root, CAP_SYS_ADMIN in the first user namespace and no kernel lockdown"
        return UnservableError(family, f"the kernel lets no probe be defined: {error}", hint)
    if error.errno not in _AT_FAULT:
        return None
    log = ""
    with suppress(KernelError):  # kernels before 5.2 have none
        log = tracefs.read("error_log")
    found = find_complaint(log, spec.definition())
    if found is not None:
        return RequestError(*_locate(spec, error, *found, debugfs))
    return RequestError(*_guess(spec, error))


def find_complaint(log: str, command: str) -> tuple[str, int | None] | None:
    """What the error log says last about a command, and at which of its characters (from 0).

        [  415.163] trace_kprobe: error: Invalid probed address or symbol
          Command: p:group/name nosuch
                                ^

    Older kernels (5.10) keep 255 bytes of the command, lose the newline behind a longer one and
    count the position modulo 256: for what was cut there is no position.
    """
    found: tuple[str, int | None] | None = None
    for match in re.finditer(r"error: (.+)\n  Command: (.+?)\n?( {11,})\^", log):
        problem, logged = match[1].strip(), match[2]
        if logged == command:
            found = problem, len(match[3]) - len("  Command: ")
        elif len(logged) > 200 and command.startswith(logged):
            found = problem, None
    return found


def _locate(
    spec: Spec, error: KernelError, problem: str, position: int | None, debugfs: Path
) -> tuple[str, str]:
    """The field of the request that a position in the definition belongs to, and what is wrong."""
    if position is None:
        if error.errno == errno.EINVAL and "register probe" not in problem:
            return "arguments", problem
        return "symbol", _about_symbol(spec, error, problem, debugfs)
    before = spec.definition()[:position]
    index = before.count(" ")
    if index == 0:
        return "maxactive" if "axactive" in problem else "name", problem
    if index == 1 or not spec.fetchargs:
        return "symbol", _about_symbol(spec, error, problem, debugfs)
    name, what = spec.fetchargs[min(index - 2, len(spec.fetchargs) - 1)]
    at = len(before.rpartition(" ")[2]) - len(f"{name}=")
    return f"arguments[{name}]", problem + (f" at character {at + 1} of {what!r}" if at >= 0 else "")


def _about_symbol(spec: Spec, error: KernelError, problem: str, debugfs: Path) -> str:
    place = spec.definition().split(" ")[1]
    # newer kernels (6.12) say EINVAL where older ones say ENOENT
    if error.errno == errno.ENOENT or problem == "Invalid probed address or symbol":
        # The symbol of an @SYM is looked up as late, and reported at the same place.
        late = any(re.search(r"@[A-Za-z_.]", what) for _, what in spec.fetchargs)
        return f"the kernel has no function {place}" + (
            ", or no symbol that an argument names" if late else ""
        )
    if error.errno == errno.EINVAL and "register probe" in problem:
        listed = is_blacklisted(debugfs, place.partition("+")[0].rpartition(":")[2])
        why = "on the kprobe blacklist" if listed else "not traceable, or blacklisted"
        return f"{problem}: {place} is {why}"
    return f"{problem} ({place})"


def _guess(spec: Spec, error: KernelError) -> tuple[str, str]:
    """The same without a word from the kernel."""
    place = spec.definition().split(" ")[1]
    if error.errno == errno.ENOENT:
        return "symbol", f"the kernel has no function {place}"
    if error.errno in (errno.EILSEQ, errno.EADDRNOTAVAIL):
        return "symbol", f"{place} can't be probed: {error}"
    line = _shorten(spec.definition())
    return "arguments" if spec.fetchargs else "symbol", f"the kernel refuses {line}: {error}"


def is_blacklisted(debugfs: Path | str, symbol: str) -> bool:
    """True if kprobes are known to be forbidden on a function.

    0xffffffff81000000-0xffffffff81000040	asm_exc_nmi
    """
    try:
        text = Path(debugfs, "kprobes", "blacklist").read_text()
    except OSError:
        return False
    return any(line.split()[-1] == symbol for line in text.splitlines() if line.split())


# Those of others, and of the dead


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did: probes and instances by name, `group/event` and `instances/name`."""

    removed: tuple[str, ...] = ()
    busy: tuple[str, ...] = ()  # of dead owners, but in use: left alone
    unknown: tuple[str, ...] = ()  # of owners that can't be seen from here: left alone


def sweep(tracefs: Tracefs, proc: Path | str = "/proc") -> Swept:
    """Removes what dead sensors left in tracefs; never what is of a live one, or of other tools.

    Safe while other sensors sweep too: what is gone already was removed by them.
    """
    if not tracefs.writable:
        return Swept()
    removed: list[str] = []
    busy: list[str] = []
    unknown: list[str] = []
    lives: dict[Owner, Life] = {}
    for label, group, take_away in _leftovers(tracefs):
        owner = Owner.of_group(group)
        if owner is None:
            continue
        life = lives.setdefault(owner, owner.life(proc))
        if life is Life.UNKNOWN:
            unknown.append(label)
        if life is not Life.DEAD:
            continue
        try:
            take_away()
        except KernelError as error:
            if error.errno != errno.EBUSY:
                raise
            busy.append(label)
        else:
            removed.append(label)
    return Swept(tuple(removed), tuple(busy), tuple(unknown))


def list_probes(tracefs: Tracefs) -> list[tuple[str, str, str]]:
    """All probes in the kernel, anybody's: the file to remove them through, group and name."""
    files = ("dynamic_events",) if tracefs.exists("dynamic_events") else ("kprobe_events", "uprobe_events")
    # p:group/name place ..., r16:group/name ..., e:group/name ..., s:synthetic/name ...
    entry = re.compile(r"^[a-z]\d*:([^/\s]+)/(\S+)", re.MULTILINE)
    return [
        (file, group, name)
        for file in files
        if tracefs.exists(file)
        for group, name in entry.findall(tracefs.read(file))
    ]


def _leftovers(tracefs: Tracefs) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """What may be a sensor's: its label, its group, and what removes it."""
    for file, group, name in list_probes(tracefs):
        yield f"{group}/{name}", group, partial(remove, tracefs, file, group, name)
    for name in tracefs.instances():
        yield f"instances/{name}", name, partial(tracefs.remove_instance, name)


# What the kernel can do


@dataclass(frozen=True, slots=True)
class ProbeFeatures:
    """If the kernel has kprobes, and what its README promises of them."""

    kprobes: bool
    arguments: bool  # $argN: the calling convention is known
    btf: bool  # arguments by name, their fields by ->


def probe_features(tracefs: Tracefs) -> ProbeFeatures:
    """Reads the README."""
    readme = tracefs.read("README") if tracefs.exists("README") else ""
    return ProbeFeatures(
        kprobes=tracefs.exists("kprobe_events"),
        arguments="$arg<N>" in readme,
        btf="<argname>[->field" in readme,
    )


def unique_name(stem: str) -> str:
    """An event name that no other probe of this or any other sensor has; `stem` is short."""
    return Owner.current().name(stem, next(_serial))


_serial = itertools.count()


# Hits and misses


@dataclass(frozen=True, slots=True)
class Hits:
    """How often a kprobe fired, and how often it should have and could not.

    Misses of a return probe are calls beyond maxactive. 5.10 also counts as missed what was
    recorded with memory that could not be read: there, misses are an upper bound.
    """

    hits: int
    misses: int


def parse_profile(text: str) -> dict[str, Hits]:
    """kprobe_profile by event name, without group; those of one name are added up.

    name                                              hits            misses
    """
    profile: dict[str, Hits] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[1].isdecimal() and words[2].isdecimal():
            before = profile.get(words[0], Hits(0, 0))
            profile[words[0]] = Hits(before.hits + int(words[1]), before.misses + int(words[2]))
    return profile


def read_profile(tracefs: Tracefs) -> dict[str, Hits]:
    """Hits and misses of all kprobes by event name; empty on a kernel without them."""
    return parse_profile(tracefs.read("kprobe_profile")) if tracefs.exists("kprobe_profile") else {}
