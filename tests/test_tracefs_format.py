"""Format files: those of five kernels, odd declarations, records decoded."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.sensor.tracefs.format import Field, Format, Kind, parse_format
from ringside.sensor.tracefs.mount import Tracefs, open_tracefs

from .support.formats import fixed_size

KERNELS = Path(__file__).parent / "data" / "kernels"
FILES = sorted(path for path in KERNELS.rglob("*") if path.is_file())
NEWEST, OLDEST, HERE = "7.3.4+deb13-amd64", "5.10.0-32-amd64", "6.18-no-kprobes"

COMMON = """\
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;
"""


def canned(kernel: str, event: str) -> Format:
    return parse_format((KERNELS / kernel / event).read_text())


def one(declaration: str, size: int, signed: int = 0, offset: int = 8, long_size: int = 8) -> Field:
    """A format with one field of its own, that field."""
    line = f"\tfield:{declaration};\toffset:{offset};\tsize:{size};\tsigned:{signed};\n"
    text = f'name: it\nID: 7\nformat:\n{COMMON}\n{line}\nprint fmt: ""\n'
    return parse_format(text, long_size).fields[-1]


def assert_plausible(parsed: Format, text: str) -> None:
    """What holds for every event: no field lost, none over another, kinds that fit their sizes."""
    assert len(parsed.fields) == text.count("\tfield:")
    end = 0
    for field in sorted(parsed.fields, key=lambda field: (field.offset, field.size)):
        assert field.offset >= end, f"{parsed.name}.{field.name} overlaps what is before it"
        end = field.offset + field.size
        assert field.name.isidentifier()
        match field.kind:
            case Kind.INTEGER | Kind.BOOL:
                assert field.size in (1, 2, 4, 8)
            case Kind.POINTER:
                assert field.size in (4, 8)
            case Kind.CHARS | Kind.ARRAY:
                assert field.count * field.element_size == field.size
            case Kind.DATA_LOC | Kind.REL_LOC:
                assert field.size == 4
                # 0 is a typedef that nothing tells the size of: landlock's access_mask_t
                assert field.element_size in (0, 1, 2, 4, 8)
            case Kind.DATA_LOCS:
                assert field.size == 4 * field.count
            case Kind.FLEXIBLE:
                assert field.size == 0
            case Kind.OPAQUE:
                # by its name, or a typedef of one: guid_t
                assert re.match("(const )?(struct|union) ", field.ctype) or field.size not in (1, 2, 4, 8)
    assert end == fixed_size(parsed)
    # All zeros is a record of every format: empty strings, no dynamic data.
    assert parsed.decode(bytes(fixed_size(parsed))).keys() == {field.name for field in parsed.fields}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KERNELS)))
def test_every_canned_format_parses(path: Path) -> None:
    text = path.read_text()
    parsed = parse_format(text)
    assert parsed.name in (path.name, "openu")
    assert parsed.id > 0
    assert [field.name for field in parsed.fields[:4]] == [
        "common_type",
        "common_flags",
        "common_preempt_count",
        "common_pid",
    ]
    assert_plausible(parsed, text)


def test_there_are_five_kernels() -> None:
    assert len({path.relative_to(KERNELS).parts[0] for path in FILES}) == 5


@pytest.mark.live
def test_every_format_of_the_running_kernel_parses() -> None:
    tracefs = open_tracefs()
    seen = 0
    for system in sorted(path.name for path in tracefs.path("events").iterdir() if path.is_dir()):
        for event in tracefs.events(system):
            if not tracefs.has_event(system, event):
                continue
            parsed = tracefs.read_format(system, event)
            assert parsed.name == event
            assert_plausible(parsed, tracefs.read("events", system, event, "format"))
            if tracefs.exists("events", system, event, "id"):
                assert parsed.id == tracefs.event_id(system, event)
            seen += 1
    assert seen > 500
    assert tracefs.has_event("ftrace", "print")


@pytest.mark.parametrize(
    ("declaration", "size", "signed", "kind", "element", "count"),
    [
        # as this or another kernel writes them
        ("pid_t pid", 4, 1, Kind.INTEGER, (4, True), 0),
        ("u8 state", 1, 0, Kind.INTEGER, (1, False), 0),
        ("u64 addr", 8, 0, Kind.INTEGER, (8, False), 0),
        ("__s32 res", 4, 1, Kind.INTEGER, (4, True), 0),
        ("s64 res", 8, 1, Kind.INTEGER, (8, True), 0),
        ("unsigned short family", 2, 0, Kind.INTEGER, (2, False), 0),
        ("unsigned n", 4, 0, Kind.INTEGER, (4, False), 0),
        ("long ret", 8, 1, Kind.INTEGER, (8, True), 0),
        ("unsigned long long runtime", 8, 0, Kind.INTEGER, (8, False), 0),
        ("enum migrate_mode mode", 4, 0, Kind.INTEGER, (4, False), 0),
        ("enum xfs_group_type type", 1, 0, Kind.INTEGER, (1, False), 0),
        ("umode_t mode", 2, 0, Kind.INTEGER, (2, False), 0),
        ("dma_addr_t dma", 8, 0, Kind.INTEGER, (8, False), 0),
        ("char correct", 1, 0, Kind.INTEGER, (1, False), 0),
        ("xfs_failaddr_t caller_ip", 8, 0, Kind.INTEGER, (8, False), 0),
        ("bool group_dead", 1, 0, Kind.BOOL, (1, False), 0),
        ("const char * filename", 8, 0, Kind.POINTER, (8, False), 0),
        ("const char *const * argv", 8, 0, Kind.POINTER, (8, False), 0),
        ("const void* xdp", 8, 0, Kind.POINTER, (8, False), 0),
        ("void __seg_gs * ptr", 8, 0, Kind.POINTER, (8, False), 0),
        ("struct iocb * * iocbpp", 8, 0, Kind.POINTER, (8, False), 0),
        ("union bpf_attr * uattr", 8, 0, Kind.POINTER, (8, False), 0),
        ("char comm[16]", 16, 1, Kind.CHARS, (1, False), 16),
        ("char comm[TASK_COMM_LEN]", 16, 0, Kind.CHARS, (1, False), 16),
        ("unsigned char addr[6]", 6, 0, Kind.ARRAY, (1, False), 6),
        ("u8 fsid[16]", 16, 1, Kind.ARRAY, (1, False), 16),
        ("__u8 saddr[sizeof(struct sockaddr_in6)]", 28, 0, Kind.ARRAY, (1, False), 28),
        ("__u8 saddr[sizeof(struct foo[3])]", 12, 0, Kind.ARRAY, (1, False), 12),
        ("unsigned long args[6]", 48, 0, Kind.ARRAY, (8, False), 6),
        ("long sysctl_mem[3]", 24, 0, Kind.ARRAY, (8, True), 3),
        ("int values[2][3]", 24, 1, Kind.ARRAY, (4, True), 6),
        ("void * callers[4]", 32, 0, Kind.ARRAY, (8, False), 4),
        ("xfs_agnumber_t agnos[4]", 16, 0, Kind.ARRAY, (4, False), 4),
        ("struct in6_addr a[2]", 16, 0, Kind.OPAQUE, (0, False), 0),
        ("__data_loc char[] filename", 4, 1, Kind.DATA_LOC, (1, False), 0),
        ("__data_loc u8[] buf", 4, 0, Kind.DATA_LOC, (1, False), 0),
        ("__data_loc int[] sizes", 4, 0, Kind.DATA_LOC, (4, True), 0),
        ("__data_loc unsigned int[] lengths", 4, 0, Kind.DATA_LOC, (4, False), 0),
        ("__data_loc unsigned long[] cpus", 4, 0, Kind.DATA_LOC, (8, False), 0),
        ("__data_loc cpumask_t cpumask", 4, 0, Kind.DATA_LOC, (8, False), 0),
        ("__data_loc access_mask_t[] grants", 4, 0, Kind.DATA_LOC, (0, False), 0),
        ("__rel_loc char[] name", 4, 0, Kind.REL_LOC, (1, False), 0),
        ("__data_loc char[][4] argv", 16, 1, Kind.DATA_LOCS, (1, False), 4),
        ("u32 words[4]", 16, 0, Kind.ARRAY, (4, False), 4),
        ("s16 halves[2]", 4, 1, Kind.ARRAY, (2, True), 2),
        ("char buf[]", 0, 0, Kind.FLEXIBLE, (1, False), 0),
        ("u32 buf[]", 0, 0, Kind.FLEXIBLE, (4, False), 0),
        ("struct timespec64 at", 16, 0, Kind.OPAQUE, (0, False), 0),
        ("struct in_addr a", 4, 0, Kind.OPAQUE, (0, False), 0),
        ("union ifreq u", 24, 0, Kind.OPAQUE, (0, False), 0),
        ("guid_t fru_id", 16, 0, Kind.OPAQUE, (0, False), 0),
    ],
)
def test_a_type_is_classified(
    declaration: str, size: int, signed: int, kind: Kind, element: tuple[int, bool], count: int
) -> None:
    field = one(declaration, size, signed)
    assert field.kind is kind
    assert (field.element_size, field.element_signed) == element
    assert field.count == count
    assert field.signed == bool(signed)


def test_plain_char_alone_is_text() -> None:
    assert one("char comm[16]", 16).is_string
    assert one("__data_loc char[] name", 4).is_string
    assert one("__rel_loc char[] name", 4).is_string
    assert one("__data_loc const char[] name", 4).is_string
    assert not one("unsigned char addr[6]", 6).is_string
    assert not one("__data_loc u8[] buf", 4).is_string
    assert not one("char constant", 1).is_string
    assert not one("char * name", 8).is_string


def test_a_32_bit_kernel_has_short_longs() -> None:
    assert one("__data_loc unsigned long[] cpus", 4, long_size=4).element_size == 4
    assert one("void * callers[4]", 16, long_size=4).count == 4


def test_the_natural_width_of_a_syscall_argument() -> None:
    openat = canned(NEWEST, "syscalls/sys_enter_openat")
    assert (openat["dfd"].size, openat["dfd"].natural_size, openat["dfd"].natural_signed) == (8, 4, True)
    assert (openat["mode"].natural_size, openat["mode"].natural_signed) == (2, False)
    assert openat["filename"].natural_size == 8
    assert one("unsigned long nr", 8).natural_size == 8
    assert one("some_typedef_t x", 8).natural_size == 8
    assert one("const enum landlock_rule_type rule_type", 8).natural_size == 4
    assert one("pid_t pid", 4, 1).natural_size == 4


def test_comm_became_dynamic() -> None:
    """The same field on an old and a new kernel: code that reads it must follow `kind`."""
    old = canned(OLDEST, "sched/sched_process_fork")["parent_comm"]
    new = canned(NEWEST, "sched/sched_process_fork")["parent_comm"]
    assert (old.kind, old.count) == (Kind.CHARS, 16)
    assert new.kind is Kind.DATA_LOC
    assert old.is_string
    assert new.is_string


def test_lookup() -> None:
    parsed = canned(HERE, "raw_syscalls/sys_enter")
    assert "id" in parsed
    assert "nothing" not in parsed
    assert parsed["id"].offset == 8
    assert parsed.get("nothing") is None
    with pytest.raises(KeyError):
        parsed["nothing"]
    assert [field.name for field in parsed.own_fields] == ["id", "args"]
    assert fixed_size(parsed) == 64


HEADER = struct.pack("=HBBi", 303, 1, 0, 4242)


def test_decode_syscall() -> None:
    parsed = canned(HERE, "raw_syscalls/sys_enter")
    raw = HEADER + struct.pack("=q6Q", 257, 2**64 - 100, 2, 3, 4, 5, 6)
    values = parsed.decode(raw)
    assert values["id"] == 257
    assert values["args"] == (2**64 - 100, 2, 3, 4, 5, 6)
    assert values["common_pid"] == 4242
    assert parsed.decode(raw + bytes(4)) == values


def test_decode_strings() -> None:
    fork = canned(OLDEST, "sched/sched_process_fork")
    raw = (
        HEADER
        + b"sh\0leftover\0\0\0\0\0"
        + struct.pack("=i", 10)
        + b"0123456789abcdef"
        + struct.pack("=i", 11)
    )
    values = fork.decode(raw)
    assert values["parent_comm"] == "sh"
    assert values["child_comm"] == "0123456789abcdef"
    assert (values["parent_pid"], values["child_pid"]) == (10, 11)

    fork = canned(NEWEST, "sched/sched_process_fork")
    raw = (
        HEADER + struct.pack("=IiIi", 3 << 16 | 24, 10, 6 << 16 | 27, 11) + b"sh\0" + b"caf\xe9!\0" + bytes(7)
    )
    values = fork.decode(raw)
    assert values["parent_comm"] == "sh"
    assert values["child_comm"] == "caf\N{REPLACEMENT CHARACTER}!"


def test_decode_probe() -> None:
    """A probe's fields are packed: u64 at offset 20, with no alignment."""
    opened = canned(OLDEST, "kprobe_open")
    raw = (
        HEADER
        + struct.pack("=QIQQ", 0xFFFF_FFFF_8123_4567, 5 << 16 | 36, 0o100, 0o644)
        + b"/etc\0"
        + bytes(3)
    )
    assert opened.decode(raw) == {
        "common_type": 303,
        "common_flags": 1,
        "common_preempt_count": 0,
        "common_pid": 4242,
        "__probe_ip": 0xFFFF_FFFF_8123_4567,
        "filename": "/etc",
        "flags": 0o100,
        "mode": 0o644,
    }


def decode_one(declaration: str, size: int, body: bytes, signed: int = 0) -> object:
    line = f"\tfield:{declaration};\toffset:8;\tsize:{size};\tsigned:{signed};\n"
    parsed = parse_format(f"name: it\nID: 7\nformat:\n{COMMON}\n{line}\n")
    return parsed.decode(HEADER + body)[parsed.fields[-1].name]


def test_decode_arrays() -> None:
    assert decode_one("unsigned char addr[6]", 6, b"\1\2\3\4\5\xff") == b"\1\2\3\4\5\xff"
    assert decode_one("s8 v[2]", 2, b"\xff\1", 1) == (-1, 1)
    assert decode_one("long v[2]", 16, struct.pack("=qq", -1, 2)) == (-1, 2)
    assert decode_one("__data_loc int[] v", 4, struct.pack("=Iii", 8 << 16 | 12, -5, 6)) == (-5, 6)
    assert decode_one("__data_loc u8[] v", 4, struct.pack("=I", 3 << 16 | 12) + b"abc") == b"abc"
    assert decode_one("__rel_loc char[] v", 4, struct.pack("=I", 3 << 16 | 1) + b".hi\0") == "hi"
    words = struct.pack("=II", 2 << 16 | 16, 3 << 16 | 18)
    assert decode_one("__data_loc char[][2] v", 8, words + b"a\0bc\0", 1) == ("a", "bc")
    assert decode_one("char buf[]", 0, b"hello\n\0") == "hello\n"
    assert decode_one("u32 buf[]", 0, struct.pack("=II", 1, 2)) == (1, 2)
    assert decode_one("struct x v", 16, b"0123456789abcdef") == b"0123456789abcdef"
    assert decode_one("bool v", 1, b"\1") == 1
    assert decode_one("int v", 4, b"\xff\xff\xff\xff", 1) == -1
    assert decode_one("void * v", 8, b"\xff" * 8) == 2**64 - 1


def test_a_record_cut_short_is_refused() -> None:
    parsed = canned(HERE, "raw_syscalls/sys_enter")
    with pytest.raises(ValueError, match="args"):
        parsed.decode(HEADER + bytes(8))
    opened = canned(OLDEST, "kprobe_open")
    with pytest.raises(ValueError, match="filename"):
        opened.decode(HEADER + struct.pack("=QIQQ", 0, 50 << 16 | 36, 0, 0) + b"/etc\0")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name: x\n",
        "name: x\nID: 1\nformat:\n\tfield:int;\toffset:0;\tsize:4;\tsigned:1;\n",
        "name: x\nID: 1\nformat:\n\tfield:int x;\tsize:4;\tsigned:1;\n",
        "name: x\nID: 1\nformat:\n\tfield:int x];\toffset:0;\tsize:4;\tsigned:1;\n",
        "name: x\nID: 1\nformat:\n\tfield:__data_loc char[] x;\toffset:0;\tsize:2;\tsigned:1;\n",
    ],
)
def test_what_is_not_a_format(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a|unbalanced|location"):
        parse_format(text)


@given(st.binary(max_size=200))
def test_decode_never_reads_beyond(raw: bytes) -> None:
    """Any bytes either decode or are refused with ValueError."""
    for event in ("sched/sched_process_fork", "raw_syscalls/sys_enter", "syscalls/sys_enter_openat"):
        parsed = canned(NEWEST, event)
        try:
            values = parsed.decode(raw)
        except ValueError:
            continue
        assert len(raw) >= fixed_size(parsed)
        assert all(len(value) <= len(raw) for value in values.values() if isinstance(value, str))


@given(
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-(2**31), 2**31 - 1),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40),
)
def test_decode_gives_back_what_was_written(pid: int, old_pid: int, name: str) -> None:
    parsed = canned(NEWEST, "sched/sched_process_exec")
    data = name.encode() + b"\0"
    raw = HEADER + struct.pack("=Iii", len(data) << 16 | 20, pid, old_pid) + data
    values = parsed.decode(raw)
    assert (values["filename"], values["pid"], values["old_pid"]) == (name, pid, old_pid)


def test_through_tracefs(tmp_path: Path) -> None:
    event = tmp_path / "events" / "sched" / "sched_process_exec"
    event.mkdir(parents=True)
    event.joinpath("format").write_text((KERNELS / OLDEST / "sched/sched_process_exec").read_text())
    event.joinpath("id").write_text("308\n")
    tracefs = Tracefs(tmp_path)
    assert tracefs.read_format("sched", "sched_process_exec").id == tracefs.event_id(
        "sched", "sched_process_exec"
    )
