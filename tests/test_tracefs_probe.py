"""Probes: what they look like, what is refused before the kernel sees it, and whose they are."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.sensor.errors import KernelError, RequestError, UnservableError
from ringside.sensor.tracefs.format import Kind, parse_format
from ringside.sensor.tracefs.mount import Tracefs, open_tracefs
from ringside.sensor.tracefs.owner import Owner
from ringside.sensor.tracefs.probe import (
    MAX_LINE,
    Fetchargs,
    Hits,
    KprobeSpec,
    RecordSize,
    Swept,
    check_record_size,
    create,
    find_complaint,
    is_blacklisted,
    list_probes,
    parse_profile,
    probe_features,
    read_profile,
    remove,
    sweep,
    trace_size_limit,
    unique_name,
)

from .support.formats import fixed_size

OPEN: Fetchargs = (("filename", "+0($arg2):ustring"), ("flags", "+0($arg3):u64"), ("mode", "+8($arg3):u64"))


def kprobe(symbol: str = "do_exit", *fetchargs: tuple[str, str], **more: int) -> KprobeSpec:
    return replace(KprobeSpec("group", "name", symbol), fetchargs=fetchargs, **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class UprobeSpec:
    """The one kind of probe that every kernel has; the sensor needs none, its tests do."""

    group: str
    name: str
    place: str
    fetchargs: Fetchargs = ()
    file: str = "dynamic_events"

    @property
    def record_size(self) -> RecordSize:
        return RecordSize(16, 0)

    def definition(self) -> str:
        return " ".join([f"p:{self.group}/{self.name}", self.place, *(f"{n}={w}" for n, w in self.fetchargs)])


# The text


def test_definitions() -> None:
    assert KprobeSpec("g", "n", "do_exit").definition() == "p:g/n do_exit"
    assert (
        KprobeSpec("g", "n", "do_sys_openat2", fetchargs=OPEN).definition()
        == "p:g/n do_sys_openat2 filename=+0($arg2):ustring flags=+0($arg3):u64 mode=+8($arg3):u64"
    )
    assert KprobeSpec("g", "n", "do_exit", offset=16).definition() == "p:g/n do_exit+16"
    assert KprobeSpec("g", "n", "vfs_read", is_return=True).definition() == "r:g/n vfs_read"
    spec = KprobeSpec("g", "n", "vfs_read", is_return=True, maxactive=64, fetchargs=(("ret", "$retval:s32"),))
    assert spec.definition() == "r64:g/n vfs_read ret=$retval:s32"
    assert KprobeSpec("g", "n", "nf_conntrack:nf_ct_get").definition() == "p:g/n nf_conntrack:nf_ct_get"


@pytest.mark.parametrize(
    "symbol", ["do_exit", "foo.isra.0", "foo.llvm.123", "mod-x:sym", "_RNvCs1_f", ".L1", "a$b"]
)
def test_symbols(symbol: str) -> None:
    assert kprobe(symbol).symbol == symbol


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"symbol": ""}, "symbol"),
        ({"symbol": "do exit"}, "symbol"),
        ({"symbol": "do_exit\n"}, "symbol"),
        ({"symbol": "do_exit\np:a/b c"}, "symbol"),
        ({"symbol": "0xffffffff81000000"}, "symbol"),
        ({"symbol": "do_exit%return"}, "symbol"),
        ({"symbol": "do_exit+4"}, "symbol"),
        ({"symbol": "/bin/true:0x10"}, "symbol"),
        ({"symbol": "a:b:c"}, "symbol"),
        ({"symbol": "é"}, "symbol"),
        ({"symbol": "a" * 512}, "symbol"),
        ({"offset": -1}, "offset"),
        ({"offset": 4, "is_return": True}, "offset"),
        ({"maxactive": 10}, "maxactive"),
        ({"maxactive": 4097, "is_return": True}, "maxactive"),
        ({"maxactive": -1, "is_return": True}, "maxactive"),
        ({"name": "a-b"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "n" * 64}, "name"),
        ({"group": "g/h"}, "group"),
        ({"fetchargs": (("", "%ax"),)}, "arguments['']"),
        ({"fetchargs": (("1a", "%ax"),)}, "arguments['1a']"),
        ({"fetchargs": (("a b", "%ax"),)}, "arguments['a b']"),
        ({"fetchargs": (("a=b", "%ax"),)}, "arguments['a=b']"),
        ({"fetchargs": (("é", "%ax"),)}, "arguments['é']"),
        ({"fetchargs": (("a" * 33, "%ax"),)}, f"arguments[{'a' * 33}]"),
        ({"fetchargs": (("common_pid", "%ax"),)}, "arguments[common_pid]"),
        ({"fetchargs": (("__probe_ip", "%ax"),)}, "arguments[__probe_ip]"),
        ({"fetchargs": (("a", "%ax"), ("b", "%bx"), ("a", "%cx"))}, "arguments[a]"),
        ({"fetchargs": (("a", ""),)}, "arguments[a]"),
        ({"fetchargs": (("a", "%ax b=%bx"),)}, "arguments[a]"),
        ({"fetchargs": (("a", "%ax\tb"),)}, "arguments[a]"),
        ({"fetchargs": (("a", "%ax\n-:b"),)}, "arguments[a]"),
        ({"fetchargs": (("a", "%ax;"),)}, "arguments[a]"),
        ({"fetchargs": (("a", "%ax#"),)}, "arguments[a]"),
        ({"fetchargs": (("a", "%ax\0"),)}, "arguments[a]"),
        ({"fetchargs": (("a", "%é"),)}, "arguments[a]"),
        ({"fetchargs": (("a", "+" * 64),)}, "arguments[a]"),
        ({"fetchargs": tuple((f"a{i}", "%ax") for i in range(129))}, "arguments"),
        ({"fetchargs": tuple((f"a{i}", "+" + "0" * 50 + "(%ax)") for i in range(128))}, "arguments"),
    ],
)
def test_what_is_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(RequestError) as error:
        replace(KprobeSpec("group", "name", "do_exit"), **change)  # type: ignore[arg-type]
    assert error.value.field == field
    assert len(str(error.value)) < 300


def test_what_just_fits() -> None:
    assert kprobe("a" * 511)
    assert kprobe("f", ("a" * 32, "+" * 63))
    assert kprobe("f", *((f"a{i}", "%ax") for i in range(128)))


WORD = st.text(max_size=70)


@given(WORD, st.lists(st.tuples(WORD, WORD), max_size=5))
def test_a_definition_is_one_line_of_as_many_words(symbol: str, fetchargs: list[tuple[str, str]]) -> None:
    """Whatever is asked for, nothing can smuggle another command or argument in."""
    try:
        spec = KprobeSpec("group", "name", symbol, fetchargs=tuple(fetchargs))
    except RequestError:
        return
    line = spec.definition()
    assert len(line.splitlines()) == 1
    assert line.isascii()
    assert len(line) <= MAX_LINE
    assert line.split() == line.split(" ")
    assert len(line.split()) == 2 + len(fetchargs)
    assert not set(line) & set("#;")


# Sizes


@pytest.mark.parametrize(
    ("fetchargs", "fixed", "strings"),
    [
        ((), 16, 0),
        ((("a", "%ax"),), 24, 0),
        ((("a", "%ax:u8"), ("b", "$arg1:s16"), ("c", "%ax:x32")), 23, 0),
        (OPEN, 16 + 4 + 8 + 8, 1),
        ((("a", "+0(%di):u32[4]"),), 32, 0),
        ((("a", "+0(%di):string[3]"),), 28, 3),
        ((("a", "$comm"),), 20, 1),
        ((("a", '\\"hello"'),), 20, 1),
        ((("a", "%ax:b4@4/32"),), 20, 0),
        ((("a", "%ax:symbol"),), 24, 0),
        ((("a", "%ax:symstr"),), 20, 1),
        ((("a", "$arg1:%pd"),), 20, 1),
        ((("a", "+0(%di):char[16]"),), 32, 0),
        ((("a", "%ax:nonsense"),), 24, 0),
        ((("a", "%ax:u8["),), 24, 0),
    ],
)
def test_record_size(fetchargs: Fetchargs, fixed: int, strings: int) -> None:
    assert kprobe("f", *fetchargs).record_size == RecordSize(fixed, strings)


def test_record_size_of_the_others() -> None:
    assert KprobeSpec("g", "n", "f", is_return=True).record_size.fixed == 24
    assert RecordSize(36, 1).least == 44
    assert RecordSize(36, 1).most == 4132
    assert RecordSize(37, 1).most == 4140


def test_record_size_is_what_the_kernels_formats_say() -> None:
    formats = list((Path(__file__).parent / "data" / "kernels").glob("*/kprobe_open"))
    assert len(formats) == 4
    for path in formats:
        assert kprobe("do_sys_openat2", *OPEN).record_size.fixed == fixed_size(parse_format(path.read_text()))


def test_a_record_that_can_never_fit() -> None:
    large = kprobe("f", *((f"a{i}", "+0($arg1):u64[64]") for i in range(4)))
    check_record_size(large, 8192)
    with pytest.raises(RequestError, match=r"arguments: .* 2068 bytes; this kernel takes 2048"):
        check_record_size(large, 2048)


# A fake kernel


class FakeKernel(Tracefs):
    """A directory in which probes come and go, with the errors that are asked for."""

    def __init__(self, root: Path, *files: str, writable: bool = True) -> None:
        super().__init__(root, writable=writable)
        for file in files:
            root.joinpath(file).touch()
        self.complaint = ""
        self.errno = 0
        self.busy: set[str] = set()
        self.before_removal: Callable[[], None] = lambda: None

    def append(self, text: str, *parts: str) -> None:
        path = self.path(*parts)
        line = text.rstrip("\n")
        if line.startswith("-:"):
            self.before_removal()
            found = [have for have in path.read_text().splitlines() if have.split()[0].endswith(line[1:])]
            if not found:
                raise KernelError("write", errno.ENOENT)
            if line[2:] in self.busy:
                raise KernelError("write", errno.EBUSY)
            path.write_text(
                "".join(f"{have}\n" for have in path.read_text().splitlines() if have not in found)
            )
        elif self.errno:
            if self.complaint:
                self.path("error_log").write_text(self.complaint.replace("COMMAND", line))
            raise KernelError("write", self.errno)
        else:
            path.write_text(path.read_text() + text)


def complain(problem: str, position: int) -> str:
    return f"[ 2260.013911] trace_kprobe: error: {problem}\n  Command: COMMAND\n{' ' * (11 + position)}^\n"


def test_create_and_close(tmp_path: Path) -> None:
    tracefs = FakeKernel(tmp_path, "kprobe_events")
    tmp_path.joinpath("kprobe_events").write_text("p:others/theirs do_exit\n")
    with create(tracefs, kprobe("do_exit")) as probe:
        assert tracefs.read("kprobe_events") == "p:others/theirs do_exit\np:group/name do_exit\n"
        probe.close()
        probe.close()
    assert tracefs.read("kprobe_events") == "p:others/theirs do_exit\n"


def test_close_while_in_use_can_be_tried_again(tmp_path: Path) -> None:
    tracefs = FakeKernel(tmp_path, "kprobe_events")
    probe = create(tracefs, kprobe("do_exit"))
    tracefs.busy.add("group/name")
    with pytest.raises(KernelError, match="EBUSY"):
        probe.close()
    tracefs.busy.clear()
    probe.close()
    assert tracefs.read("kprobe_events") == ""


@pytest.mark.parametrize(
    ("fetchargs", "code", "complaint", "field", "problem"),
    [
        ((), errno.ENOENT, complain("Invalid probed address or symbol", 13), "symbol", "no function do_exit"),
        ((), errno.EINVAL, complain("Invalid probed address or symbol", 13), "symbol", "no function do_exit"),
        ((), errno.ENOENT, "", "symbol", "no function do_exit"),
        ((), errno.EADDRNOTAVAIL, complain("The symbol is not unique", 13), "symbol", "not unique"),
        (
            (),
            errno.EINVAL,
            complain("Failed to register probe event", 13),
            "symbol",
            "on the kprobe blacklist",
        ),
        ((), errno.EILSEQ, "", "symbol", "do_exit can't be probed"),
        ((), errno.EINVAL, "", "symbol", "refuses 'p:group/name do_exit'"),
        (
            (("a", "@nosuch"),),
            errno.ENOENT,
            complain("Invalid probed address or symbol", 13),
            "symbol",
            "or no symbol that an argument names",
        ),
        (
            (("x", "%ax"), ("y", "+0(%nosuch)")),
            errno.EINVAL,
            complain("Invalid register name", 32),
            "arguments[y]",
            r"Invalid register name at character 4 of '\+0\(%nosuch\)'",
        ),
        ((("x", "%ax:u7"),), errno.EINVAL, complain("Unknown type", 27), "arguments[x]", "at character 5 of"),
        ((("x", "%ax"),), errno.EINVAL, complain("Too long", 99), "arguments[x]", "Too long"),
    ],
)
def test_the_kernels_words_are_passed_on(
    tmp_path: Path, fetchargs: Fetchargs, code: int, complaint: str, field: str, problem: str
) -> None:
    tracefs = FakeKernel(tmp_path, "kprobe_events")
    tmp_path.joinpath("kprobes").mkdir()
    tmp_path.joinpath("kprobes", "blacklist").write_text("0xffff-0xffff\tother\n\n0xfff0-0xffff\tdo_exit\n")
    tracefs.errno, tracefs.complaint = code, complaint
    with pytest.raises(RequestError, match=problem) as error:
        create(tracefs, kprobe("do_exit", *fetchargs), debugfs=tmp_path)
    assert error.value.field == field
    assert isinstance(error.value.__cause__, KernelError)


def test_whose_fault_else(tmp_path: Path) -> None:
    tracefs = FakeKernel(tmp_path, "kprobe_events", "dynamic_events")
    for code in (errno.EPERM, errno.EACCES):
        tracefs.errno = code
        with pytest.raises(UnservableError, match="lockdown"):
            create(tracefs, kprobe("do_exit"))
    for code in (errno.ENOMEM, errno.EEXIST):
        tracefs.errno = code
        with pytest.raises(KernelError):
            create(tracefs, kprobe("do_exit"))


def test_no_kprobes_in_the_kernel(tmp_path: Path) -> None:
    with pytest.raises(UnservableError, match="CONFIG_KPROBE_EVENTS"):
        create(Tracefs(tmp_path), kprobe("do_exit"))
    with pytest.raises(UnservableError, match="read-only"):
        create(FakeKernel(tmp_path, "kprobe_events", writable=False), kprobe("do_exit"))


def test_the_last_complaint_about_the_same_command_counts() -> None:
    log = "".join(
        complain(problem, position).replace("COMMAND", command)
        for problem, position, command in [
            ("first", 1, "p:g/n f"),
            ("of another", 2, "p:g/n f x=%ax"),
            ("second", 3, "p:g/n f"),
            ("of another, too", 4, "p:g/n ff"),
        ]
    )
    assert find_complaint(log, "p:g/n f") == ("second", 3)
    assert find_complaint(log, "p:g/n") is None
    assert find_complaint("", "p:g/n f") is None


def test_a_complaint_about_a_long_command_is_cut_short() -> None:
    """As on 5.10: 255 bytes, no newline before the marker's line, a position modulo 256."""
    command = "p:g/n f " + " ".join(f"argument{i}=%ax" for i in range(40))
    logged = ("\n  Command: " + command)[:255]
    log = f"[ 1.0] trace_kprobe: error: Unknown type is specified{logged}{' ' * (11 + 30)}^\n"
    assert find_complaint(log, command) == ("Unknown type is specified", None)


@pytest.mark.parametrize(
    ("code", "problem", "field"),
    [
        (errno.EINVAL, "Unknown type is specified", "arguments"),
        (errno.EINVAL, "Failed to register probe event", "symbol"),
        (errno.ENOENT, "Invalid probed address or symbol", "symbol"),
    ],
)
def test_whose_fault_without_a_position(tmp_path: Path, code: int, problem: str, field: str) -> None:
    tracefs = FakeKernel(tmp_path, "kprobe_events")
    spec = kprobe("do_exit", *((f"argument{i}", "%ax") for i in range(40)))
    logged = ("\n  Command: " + spec.definition())[:255]
    tracefs.errno, tracefs.complaint = code, f"[ 1.0] trace_kprobe: error: {problem}{logged}{' ' * 41}^\n"
    with pytest.raises(RequestError) as error:
        create(tracefs, spec, debugfs=tmp_path)
    assert error.value.field == field


def test_a_module_that_is_not_loaded(tmp_path: Path) -> None:
    tracefs = FakeKernel(tmp_path, "kprobe_events")
    (tmp_path / "modules").write_text("nf_conntrack 172032 3 nf_nat, Live 0x0\nxfs 1 0 - Live 0x0\n")
    with pytest.raises(RequestError, match="symbol: the module nosuch is not loaded"):
        create(tracefs, kprobe("nosuch:f"), proc=tmp_path)
    create(tracefs, kprobe("nf-conntrack:f"), proc=tmp_path)
    create(tracefs, kprobe("nosuch:f"), proc=tmp_path / "nothing")  # then it is for the kernel to say


def test_blacklist(tmp_path: Path) -> None:
    assert not is_blacklisted(tmp_path, "do_exit")


# The dead


def process(proc: Path, pid: int, start: int, *, namespace: int = 0xEFFFFFFC, state: str = "S") -> Path:
    """A process in a fake /proc."""
    directory = proc / str(pid)
    directory.joinpath("ns").mkdir(parents=True)
    directory.joinpath("task", str(pid)).mkdir(parents=True)
    directory.joinpath("ns", "pid").symlink_to(f"pid:[{namespace}]")
    directory.joinpath("stat").write_text(f"{pid} (a b) c) {state} " + "0 " * 18 + f"{start} 0 0\n")
    directory.joinpath("status").write_text(f"Name:\tx\nNSpid:\t{pid}\n")
    return directory


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    root = tmp_path / "proc"
    process(root, 1, 5)
    process(root, 100, 7000)
    return root


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    root = tmp_path / "tracing"
    root.mkdir()
    return FakeKernel(root, "dynamic_events")


def group(pid: int, start: int, namespace: int = 0xEFFFFFFC) -> str:
    return Owner(namespace, pid, start).group


def test_sweep(kernel: FakeKernel, proc: Path) -> None:
    others = [
        "p:kprobes/p_do_exit_0 do_exit",
        "r4:mine/x do_exit",
        "s:synthetic/lat u64 lat",
        "p:ringside/x do_exit",
    ]
    live = f"p:{group(100, 7000)}/open_1 do_sys_openat2 filename=+0($arg2):ustring"
    dead = [
        f"p:{group(100, 6999)}/open_1 do_sys_openat2",  # the pid is used again
        f"r16:{group(200, 7000)}/open_2 do_sys_openat2",  # the process is gone
        f"e:{group(200, 7000)}/open_3 syscalls.sys_enter_openat",
    ]
    kernel.path("dynamic_events").write_text("\n".join([*others, live, *dead]) + "\n")
    for name in (f"{group(100, 7000)}_1", f"{group(200, 7000)}_2", "theirs"):
        kernel.path("instances", name).mkdir(parents=True)
    assert sweep(kernel, proc) == Swept(
        (
            f"{group(100, 6999)}/open_1",
            f"{group(200, 7000)}/open_2",
            f"{group(200, 7000)}/open_3",
            f"instances/{group(200, 7000)}_2",
        )
    )
    assert kernel.read("dynamic_events").splitlines() == [*others, live]
    assert kernel.instances() == [f"{group(100, 7000)}_1", "theirs"]
    assert sweep(kernel, proc) == Swept()


def test_sweep_leaves_what_is_in_use(kernel: FakeKernel, proc: Path) -> None:
    kernel.path("dynamic_events").write_text(f"p:{group(7, 7)}/a f\np:{group(7, 7)}/b f\n")
    kernel.busy.add(f"{group(7, 7)}/a")
    assert sweep(kernel, proc) == Swept((f"{group(7, 7)}/b",), (f"{group(7, 7)}/a",))


def test_two_sweeps_at_once(kernel: FakeKernel, proc: Path) -> None:
    """Another sensor removes them first, each time just before we would."""
    kernel.path("dynamic_events").write_text(f"p:{group(7, 7)}/a f\np:{group(7, 7)}/b f\n")

    def others_do_it() -> None:
        kernel.path("dynamic_events").write_text("")

    kernel.before_removal = others_do_it
    sweep(kernel, proc)
    assert kernel.read("dynamic_events") == ""


def test_sweep_of_what_cannot_be_seen(kernel: FakeKernel, tmp_path: Path) -> None:
    """In a container of our own, somebody of another namespace may well be alive."""
    proc = tmp_path / "inner"
    process(proc, 1, 5, namespace=4026532000)
    kernel.path("dynamic_events").write_text(f"p:{group(7, 7)}/a f\np:{group(7, 7, 4026532000)}/b f\n")
    assert sweep(kernel, proc) == Swept((f"{group(7, 7, 4026532000)}/b",), (), (f"{group(7, 7)}/a",))


def test_sweep_where_nothing_can_be_removed(tmp_path: Path, proc: Path) -> None:
    assert sweep(FakeKernel(tmp_path, "kprobe_events", writable=False), proc) == Swept()
    assert sweep(Tracefs(tmp_path / "nothing"), proc) == Swept()


def test_sweep_without_dynamic_events(tmp_path: Path, proc: Path) -> None:
    root = tmp_path / "old"
    root.mkdir()
    kernel = FakeKernel(root, "kprobe_events", "uprobe_events")
    kernel.path("kprobe_events").write_text(f"p:{group(7, 7)}/a f\n")
    kernel.path("uprobe_events").write_text(f"p:{group(7, 7)}/b /bin/true:0x10\n")
    assert sweep(kernel, proc).removed == (f"{group(7, 7)}/a", f"{group(7, 7)}/b")
    assert list_probes(kernel) == []


# Features

README_5_10 = """\
  kprobe_events\t\t- Create/append/remove/show the kernel dynamic events
\t   Format: p[:[<group>/]<event>] <place> [<args>]
\t fetcharg: %<register>, @<address>, @<symbol>[+|-<offset>],
\t           $stack<index>, $stack, $retval, $comm, $arg<N>,
\t           +|-[u]<offset>(<fetcharg>), \\imm-value, \\"imm-string"
\t     type: s8/16/32/64, u8/16/32/64, x8/16/32/64, string, symbol,
\t           b<bit-width>@<bit-offset>/<container-size>, ustring,
\t           <type>\\[<array-size>\\]
"""


def test_features(tmp_path: Path) -> None:
    tracefs = FakeKernel(tmp_path, "kprobe_events", "README")
    tracefs.path("README").write_text(README_5_10)
    features = probe_features(tracefs)
    assert features.kprobes
    assert features.arguments
    assert not features.btf
    nothing = probe_features(Tracefs(tmp_path / "nothing"))
    assert not nothing.kprobes
    assert not nothing.arguments


def test_trace_size_limit(tmp_path: Path) -> None:
    assert trace_size_limit(Tracefs(tmp_path)) == 2048
    event = tmp_path / "events" / "syscalls" / "sys_enter_futex_waitv"
    event.mkdir(parents=True)
    event.joinpath("format").touch()
    assert trace_size_limit(Tracefs(tmp_path)) == 8192


def test_profile(tmp_path: Path) -> None:
    text = """\
  open_91fcba3c_3                                           1024               7
  p_do_exit_0                                                  3               0
  p_do_exit_0                                                  4               1
garbage
"""
    assert parse_profile(text) == {"open_91fcba3c_3": Hits(1024, 7), "p_do_exit_0": Hits(7, 1)}
    assert read_profile(Tracefs(tmp_path)) == {}


def test_unique_names() -> None:
    names = {unique_name("open") for _ in range(100)}
    assert len(names) == 100
    assert all(re.fullmatch(r"open_[0-9a-f]{8}_\d+", name) for name in names)


# The kernel


@pytest.fixture
def tracefs() -> Tracefs:
    return open_tracefs()


def uprobe(fetchargs: Fetchargs = (), *, owner: Owner | None = None) -> UprobeSpec:
    owner = owner or Owner.current()
    # An offset within the text of the program that runs this; the probe is never enabled.
    return UprobeSpec(owner.group, unique_name("test"), f"{Path(sys.executable).resolve()}:0x1000", fetchargs)


def exists(tracefs: Tracefs, spec: UprobeSpec | KprobeSpec) -> bool:
    return (spec.group, spec.name) in {(group, name) for _, group, name in list_probes(tracefs)}


@pytest.mark.live
def test_a_probe_lives_until_closed(tracefs: Tracefs) -> None:
    spec = uprobe(
        (("x", "%ax:u16"), ("s", "+0(%di):string"), ("v", "+0(%di):u32[4]"), ("n", "+0(%di):string[2]"))
    )
    with create(tracefs, spec) as probe:
        assert exists(tracefs, spec)
        parsed = probe.read_format()
        assert parsed.id == tracefs.event_id(spec.group, spec.name)
        kinds = {field.name: (field.kind, field.element_size, field.count) for field in parsed.own_fields}
        assert kinds == {
            "__probe_ip": (Kind.INTEGER, 8, 0),
            "x": (Kind.INTEGER, 2, 0),
            "s": (Kind.DATA_LOC, 1, 0),
            "v": (Kind.ARRAY, 4, 4),
            "n": (Kind.DATA_LOCS, 1, 2),
        }
        assert fixed_size(parsed) == 16 + 2 + 4 + 16 + 8
    assert not exists(tracefs, spec)
    assert not tracefs.has_event(spec.group, spec.name)


@pytest.mark.live
def test_what_the_kernel_refuses_leaves_nothing_behind(tracefs: Tracefs) -> None:
    before = list_probes(tracefs)
    spec = uprobe((("x", "%ax"), ("y", "+8(%nosuch):u8")))
    with pytest.raises(
        RequestError, match=r"Invalid register name at character 4 of '\+8\(%nosuch\):u8'"
    ) as error:
        create(tracefs, spec)
    assert error.value.field == "arguments[y]"
    with pytest.raises(RequestError, match="Unknown type"):
        create(tracefs, uprobe((("x", "%ax:u7"),)))
    assert list_probes(tracefs) == before


@pytest.mark.live
def test_removing_what_is_not_there(tracefs: Tracefs) -> None:
    remove(tracefs, "dynamic_events", Owner.current().group, "nosuch")


@pytest.mark.live
def test_a_killed_sensors_probes_are_swept(tracefs: Tracefs) -> None:
    """A process makes a probe and dies of SIGKILL; ours, and those of other tools, stay."""
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stat = Path(f"/proc/{killed.pid}/stat").read_text().rpartition(")")[2].split()
    theirs = uprobe(owner=Owner(Owner.current().namespace, killed.pid, int(stat[19])))
    ours = uprobe()
    foreign = replace(uprobe(), group="ringside_test_of_another_tool")
    with create(tracefs, ours), create(tracefs, foreign), create(tracefs, theirs):
        assert f"{theirs.group}/{theirs.name}" not in sweep(tracefs).removed
        assert exists(tracefs, theirs)
        killed.kill()
        # a zombie counts as dead: it holds nothing any more
        while Path(f"/proc/{killed.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            pass
        assert f"{theirs.group}/{theirs.name}" in sweep(tracefs).removed
        killed.communicate()
        assert not exists(tracefs, theirs)
        assert exists(tracefs, ours)
        assert exists(tracefs, foreign)
        assert f"{theirs.group}/{theirs.name}" not in sweep(tracefs).removed
    assert not exists(tracefs, ours)
    assert not exists(tracefs, foreign)


@pytest.mark.live
def test_kprobes_where_the_kernel_has_them(tracefs: Tracefs) -> None:
    owner = Owner.current()
    spec = KprobeSpec(owner.group, unique_name("exit"), "do_exit", fetchargs=(("code", "$arg1:s64"),))
    if not probe_features(tracefs).kprobes:
        with pytest.raises(UnservableError, match="no kprobes"):
            create(tracefs, spec)
        return
    with create(tracefs, spec) as probe:
        assert exists(tracefs, spec)
        assert probe.read_format()["code"].signed
        assert read_profile(tracefs)[spec.name] == Hits(0, 0)
    assert not exists(tracefs, spec)

    def refused(symbol: str, *fetchargs: tuple[str, str]) -> RequestError:
        with pytest.raises(RequestError) as error:
            create(tracefs, KprobeSpec(owner.group, unique_name("bad"), symbol, fetchargs=fetchargs))
        return error.value

    before = list_probes(tracefs)
    missing = refused("no_such_function")
    assert missing.field == "symbol"
    assert missing.problem == "the kernel has no function no_such_function"
    bad = refused("do_exit", ("x", "$arg1"), ("y", "+0($nosuch)"))
    assert bad.field == "arguments[y]"
    assert "at character 4" in bad.problem
    assert refused("do_exit", ("x", "$arg1:u7")).field == "arguments[x]"
    assert refused("no_such_module:do_exit").field == "symbol"
    blacklist = Path("/sys/kernel/debug/kprobes/blacklist")
    if blacklist.exists() and (names := [line.split()[-1] for line in blacklist.read_text().splitlines()]):
        assert refused(names[0]).field == "symbol"
    assert list_probes(tracefs) == before


@pytest.mark.live
def test_features_of_the_running_kernel(tracefs: Tracefs) -> None:
    features = probe_features(tracefs)
    assert features.kprobes == tracefs.exists("kprobe_events")
    assert features.arguments
    assert trace_size_limit(tracefs) in (2048, 8192)
