"""Tracefs: where it is mounted, and reading and writing what is in it.

The tree is found in /proc/self/mountinfo rather than at a fixed path: in a container it may
be bound to any place, older systems have it under debugfs only. A candidate is believed when
events can be listed in it. Where none is, one is mounted.

A trap on the way: `<debugfs>/tracing` is an automount point. Looking at the directory itself
(stat, open with O_PATH) does not mount anything and shows an empty directory; a path that
leads through it does. So a candidate is always judged by its `events/` below.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import KernelError, SetupError
from .format import Format, parse_format

STANDARD_PATH = Path("/sys/kernel/tracing")

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MNT_DETACH = 2, 4, 8, 2

# Opening these with O_TRUNC removes every entry, those of other tools too.
_SHARED_LISTS = frozenset(
    {"kprobe_events", "uprobe_events", "dynamic_events", "synthetic_events", "set_event"}
)


class Tracefs:
    """A tracefs tree under `root`; any directory of that shape will do.

    `writable` is False on a read-only mount: tracepoints can be used, probes not defined.
    """

    def __init__(self, root: Path | str, *, writable: bool = True, private: bool = False) -> None:
        self.root = Path(root)
        self.writable = writable
        self._private = private
        self._long_size: int | None = None

    def __repr__(self) -> str:
        return f"Tracefs({str(self.root)!r}, writable={self.writable})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmounts what `open_tracefs` had to mount in a private directory; idempotent."""
        if self._private:
            self._private = False
            _umount(self.root)

    def path(self, *parts: str) -> Path:
        """The path of a file or directory in the tree; it need not exist."""
        return self.root.joinpath(*parts)

    def exists(self, *parts: str) -> bool:
        """True if the tree has this file or directory."""
        return self.path(*parts).exists()

    # Control files

    def read(self, *parts: str) -> str:
        """The text of a file; KernelError if the kernel refuses."""
        try:
            return self.path(*parts).read_text("utf-8", "replace")
        except OSError as error:
            raise self._refused("read", parts, error) from error

    def write(self, text: str, *parts: str) -> None:
        """Replaces a control file's content, in one write(2); KernelError if the kernel refuses.

        Not for the lists that all tools share, kprobe_events and the like: use `append`.
        """
        if parts[-1] in _SHARED_LISTS:
            raise ValueError(f"writing {parts[-1]} would remove the entries of others")
        self._write(text, parts, os.O_TRUNC)

    def append(self, text: str, *parts: str) -> None:
        """Appends to a control file, in one write(2); KernelError if the kernel refuses."""
        self._write(text, parts, os.O_APPEND)

    def _write(self, text: str, parts: tuple[str, ...], flags: int) -> None:
        try:
            fd = os.open(self.path(*parts), os.O_WRONLY | os.O_CLOEXEC | flags)
            try:
                data = text.encode()
                # The kernel takes a command from one write: a part of one would be another command.
                if (written := os.write(fd, data)) != len(data):
                    raise OSError(errno.EIO, f"{written} of {len(data)} bytes taken")
            finally:
                os.close(fd)
        except OSError as error:
            raise self._refused("write", parts, error) from error

    def _refused(self, verb: str, parts: tuple[str, ...], error: OSError) -> KernelError:
        detail = "tracefs is mounted read-only" if error.errno == errno.EROFS else ""
        return KernelError(f"{verb} {'/'.join(parts)}", error.errno or errno.EIO, detail)

    # Instances: trace buffers of their own, with a copy of events/ each

    def instances(self) -> list[str]:
        """Names of the tracing instances, anybody's, sorted."""
        return self._directories("instances")

    def make_instance(self, name: str) -> None:
        """Makes a tracing instance; KernelError if that can't be."""
        try:
            self.path("instances", name).mkdir()
        except OSError as error:
            raise self._refused("make", ("instances", name), error) from error

    def remove_instance(self, name: str) -> None:
        """Removes a tracing instance; KernelError EBUSY while in use, none if it is gone already."""
        try:
            self.path("instances", name).rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._refused("remove", ("instances", name), error) from error

    # Events

    def events(self, system: str) -> list[str]:
        """Names of the events of a system, sorted; empty if there is no such system."""
        return self._directories("events", system) if _is_plain(system) else []

    def _directories(self, *parts: str) -> list[str]:
        try:
            with os.scandir(self.path(*parts)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._refused("list", parts, error) from error

    def has_event(self, system: str, name: str) -> bool:
        """True if this kernel has the event."""
        return _is_plain(system) and _is_plain(name) and self.exists("events", system, name, "format")

    def event_id(self, system: str, name: str) -> int:
        """The event's number, for perf_event_attr.config; KernelError if there is no such event."""
        self._require_plain(system, name)
        return int(self.read("events", system, name, "id"))

    def read_format(self, system: str, name: str) -> Format:
        """The event's parsed format; KernelError if there is no such event."""
        self._require_plain(system, name)
        return parse_format(self.read("events", system, name, "format"), self.long_size)

    def _require_plain(self, system: str, name: str) -> None:
        if not (_is_plain(system) and _is_plain(name)):
            raise KernelError(f"look up event {system}:{name}", errno.ENOENT)

    @property
    def long_size(self) -> int:
        """sizeof(long) of the kernel, which a 32-bit user space need not share."""
        if self._long_size is None:
            # field: local_t commit;  offset:8;  size:8;  signed:1;
            try:
                match = re.search(r"commit;\s*offset:\d+;\s*size:(\d+);", self.read("events", "header_page"))
            except KernelError:
                match = None
            self._long_size = int(match[1]) if match else ctypes.sizeof(ctypes.c_long)
        return self._long_size


def _is_plain(name: str) -> bool:
    """A name that stays inside its directory; requests reach here."""
    return bool(name) and name not in (".", "..") and "/" not in name and "\0" not in name


# Finding and mounting


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo, as far as it matters here."""

    path: Path
    fstype: str
    read_only: bool


def parse_mountinfo(text: str) -> list[Mount]:
    """The mounts in /proc/PID/mountinfo, in its order; lines of another shape are skipped.

    36 35 98:0 /root /mount/point rw,noatime master:1 - fstype source rw,errors=continue
    """
    mounts = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if not separator or len(left) < 6 or not right:
            continue
        options = left[5].split(",") + (right[2].split(",") if len(right) > 2 else [])
        mounts.append(Mount(Path(_unescape(left[4])), right[0], "ro" in options))
    return mounts


def _unescape(text: str) -> str:
    r"""Mountinfo writes space, tab, newline and backslash as \040 and so on."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def candidates(mounts: list[Mount]) -> Iterator[tuple[Path, bool]]:
    """Paths where tracefs may be, and whether read-only; best first.

    Writable ones before read-only ones, tracefs itself before debugfs, and of several the
    standard place, then the newest mount.
    """
    found: list[tuple[tuple[bool, bool, bool, int], Path]] = []
    for age, mount in enumerate(reversed(mounts)):
        if mount.fstype == "tracefs":
            key = (mount.read_only, False, mount.path != STANDARD_PATH, age)
            found.append((key, mount.path))
        elif mount.fstype == "debugfs":
            found.append(((mount.read_only, True, False, age), mount.path / "tracing"))
    seen: set[Path] = set()
    for key, path in sorted(found):
        if path not in seen:
            seen.add(path)
            yield path, key[0]


def open_tracefs(proc: Path | str = "/proc", *, may_mount: bool = True) -> Tracefs:
    """The best tracefs in sight, else one of our own; SetupError with a hint if impossible."""
    mountinfo = Path(proc, "self", "mountinfo")
    try:
        mounts = parse_mountinfo(mountinfo.read_text("utf-8", "surrogateescape"))
    except OSError as error:
        raise SetupError(f"{mountinfo} can't be read: {error.strerror}", "mount proc there") from error
    refusal: OSError | None = None
    for path, read_only in candidates(mounts):
        try:
            if _has_events(path):
                return Tracefs(path, writable=not read_only and _accepts_writes(path))
        except OSError as error:
            refusal = refusal or error
    if refusal is not None and os.geteuid() != 0:
        raise _unusable(refusal)
    if not may_mount:
        raise SetupError("no tracefs is mounted", "mount -t tracefs nodev /sys/kernel/tracing")
    return _mount_own()


def _has_events(path: Path) -> bool:
    with os.scandir(path / "events") as entries:
        return any(entry.is_dir(follow_symlinks=False) for entry in entries)


def _accepts_writes(path: Path) -> bool:
    # Opened, for access(2) does not know of AppArmor's profiles; to append, which by itself changes nothing.
    try:
        os.close(os.open(path / "set_event", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC))
    except OSError:
        return False
    return os.access(path / "events", os.W_OK)


def _mount_own() -> Tracefs:
    """Mounts tracefs at the standard place and leaves it there, as systemd would.

    Where that place is missing or refused, in a private directory that `close` removes.
    """
    if STANDARD_PATH.is_dir():
        try:
            _mount(STANDARD_PATH)
            if _has_events(STANDARD_PATH):
                return Tracefs(STANDARD_PATH, writable=_accepts_writes(STANDARD_PATH))
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENODEV):
                raise _unusable(error) from error
    private = Path(tempfile.mkdtemp(prefix="ringside-tracefs-"))
    try:
        _mount(private)
    except OSError as error:
        private.rmdir()
        raise _unusable(error) from error
    try:
        if not _has_events(private):
            raise FileNotFoundError(errno.ENOENT, "no events in it")
    except OSError as error:
        _umount(private)
        raise _unusable(error) from error
    return Tracefs(private, writable=_accepts_writes(private), private=True)


def _unusable(error: OSError) -> SetupError:
    """Says why there is no tracefs to be had, and what would help."""
    needed = "the kernel needs CONFIG_FTRACE and CONFIG_EVENT_TRACING"
    if error.errno == errno.ENODEV:
        return SetupError("the kernel has no tracefs", needed)
    if error.errno in (errno.EPERM, errno.EACCES):
        if os.geteuid() != 0:
            return SetupError("tracefs is not accessible", "run as root")
        if "[confidentiality]" in _lockdown():
            return SetupError("tracefs is locked down", "boot without lockdown=confidentiality")
        return SetupError(
            "tracefs is not mounted, and mounting it is not permitted",
            "in a container: bind /sys/kernel/tracing of the host into it, or grant CAP_SYS_ADMIN",
        )
    return SetupError(f"no usable tracefs: {error.strerror}", needed)


def _lockdown() -> str:
    try:
        return Path("/sys/kernel/security/lockdown").read_text()
    except OSError:
        return ""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mount(target: Path) -> None:
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    if _libc().mount(b"nodev", os.fsencode(target), b"tracefs", flags, None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def _umount(target: Path) -> None:
    # Detached, so that a file still open in it doesn't leave the directory behind.
    _libc().umount2(os.fsencode(target), _MNT_DETACH)
    with contextlib.suppress(OSError):
        target.rmdir()
