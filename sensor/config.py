"""One frozen configuration behind the command line, the environment and the TOML file.

Each setting is a field here, with its default, its check and its help text; its option is `--ring-size`,
its variable `RINGSIDE_RING_SIZE`, its key in the file `ring-size`. Options win over variables, variables
over the file.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import RequestError

DEFAULT_SOCKET = "unix:/run/ringside/sensor.sock"
_SIZE = re.compile(r"(\d+)\s*(k|m|g)?(?:i?b)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ns|us|ms|s|m|h)?")
_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


def parse_size(text: str) -> int:
    """Bytes, from "8M", "64k", "4096"; ValueError otherwise."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write 8M, 64K or a number of bytes")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[(match[2] or "").lower()]


def parse_duration(text: str) -> int:
    """Nanoseconds, from "10s", "250ms", "1.5m"; a bare number is seconds. ValueError otherwise."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no duration; write 10s, 250ms, 5m or a number of seconds")
    return round(float(match[1]) * _UNITS[match[2] or "s"])


def parse_flag(text: str) -> bool:
    """True or False, from "yes", "no", "1", "0" and the like; ValueError otherwise."""
    value = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if text.strip().lower() not in value:
        raise ValueError(f"{text!r} is neither yes nor no")
    return value[text.strip().lower()]


def _setting(default: Any, help: str, parse: Callable[[str], Any] = str, **more: Any) -> Any:
    metadata = {"help": help, "parse": parse, **more}
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Config:
    """How a sensor runs. Sizes are bytes, times nanoseconds."""

    listen: tuple[str, ...] = _setting(
        (DEFAULT_SOCKET,), "Where to serve: unix:PATH or HOST:PORT; may be given more than once.", many=True
    )
    insecure: bool = _setting(False, "Allow plain TCP on an address that is not loopback.", parse_flag)
    ring_size: int = _setting(8 << 20, "Size of each CPU's ring for bulk events.", parse_size, kind="size")
    lifecycle_ring_size: int = _setting(
        2 << 20, "Size of each CPU's ring for process events.", parse_size, kind="size"
    )
    ring_total: int = _setting(
        512 << 20, "What all rings together may take; on many CPUs each gets less.", parse_size, kind="size"
    )
    queue_size: int = _setting(
        32 << 20, "What may wait for one subscriber before its events are dropped.", parse_size, kind="size"
    )
    drain_interval: int = _setting(
        10_000_000,
        "How often the rings are read while somebody subscribes; 2.5 times that while they are empty.",
        parse_duration,
        kind="duration",
    )
    include_self: bool = _setting(False, "Include what the sensor itself does.", parse_flag)
    lineage: str = _setting(
        "process", "Which events carry the lineage: process (and container) events, or all."
    )
    mechanism: str = _setting(
        "auto",
        "How command lines, exit statuses, file names and addresses are had: auto (the best), program (bpf),"
        " kprobe or memory.",
    )
    sensor_id: str = _setting("", "The sensor's name in events; made from the host's boot id if not given.")
    proc: str = _setting("/proc", "Where the host's procfs is mounted.")
    engine: str = _setting(
        "auto", "The container engine's socket: auto, none, or a path such as /run/docker.sock."
    )
    host_root: str = _setting(
        "/", "Where the host's root directory is, to read the container runtimes' state."
    )
    hold: int = _setting(
        100_000_000,
        "How long a new container's first events may wait for its name.",
        parse_duration,
        kind="duration",
    )
    scope: str = _setting(
        "auto",
        "Where events of certain containers are made: system, cgroup (only there, if that misses none), or"
        " auto (whichever is cheaper).",
    )
    history_size: int = _setting(
        12 << 20,
        "What is kept of past process events for `since_duration`; a fourth more for those of containers.",
        parse_size,
        kind="size",
    )
    metrics: str = _setting("", "HOST:PORT to serve Prometheus metrics on; none if empty.")

    def __post_init__(self) -> None:
        for name in ("ring_size", "lifecycle_ring_size"):
            value = getattr(self, name)
            if not 64 << 10 <= value <= 1 << 30 or value & (value - 1):
                raise RequestError(name.replace("_", "-"), f"{value} is not a power of two from 64K to 1G")
        if self.ring_total < 1 << 20:
            raise RequestError("ring-total", f"{self.ring_total} is less than 1M")
        if self.queue_size < 128 << 10:
            raise RequestError("queue-size", f"{self.queue_size} is less than 128K, two messages")
        if not 1_000_000 <= self.drain_interval <= 10**9:
            raise RequestError("drain-interval", "must be from 1ms to 1s")
        if not 0 <= self.hold <= 10 * 10**9:
            raise RequestError("hold", "must be from 0 to 10s")
        if self.lineage not in ("process", "all"):
            raise RequestError("lineage", f"{self.lineage!r} is neither process nor all")
        if self.mechanism not in ("auto", "program", "kprobe", "memory"):
            raise RequestError("mechanism", f"{self.mechanism!r} is none of auto, program, kprobe, memory")
        if self.scope not in ("auto", "system", "cgroup"):
            raise RequestError("scope", f"{self.scope!r} is none of auto, system, cgroup")
        if self.sensor_id and not re.fullmatch(r"[\w.-]{1,40}", self.sensor_id):
            raise RequestError("sensor-id", "1 to 40 letters, digits, dots, dashes or underscores")
        for address in self.listen:
            parse_address(address, "listen")
        if self.metrics and parse_address(self.metrics, "metrics").path:
            raise RequestError("metrics", f"{self.metrics!r} is not HOST:PORT")


@dataclass(frozen=True, slots=True)
class Address:
    """A place to serve at: `path` of a unix socket, or `host` and `port`."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """True if only this machine can reach it."""
        return (
            bool(self.path) or self.host in ("127.0.0.1", "::1", "localhost") or self.host.startswith("127.")
        )


def parse_address(text: str, field: str = "listen") -> Address:
    """unix:PATH or HOST:PORT ([::1]:PORT for IPv6); RequestError otherwise."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path or len(os.fsencode(path)) > 107:
            raise RequestError(field, f"{text!r}: a unix socket's path has 1 to 107 bytes")
        return Address(path=path)
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise RequestError(field, f"{text!r} is neither unix:PATH nor HOST:PORT")
    return Address(host=host.strip("[]"), port=int(port))


def load(
    options: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: str | Path | None = None,
) -> Config:
    """A Config from options (None: unset), RINGSIDE_* variables and a TOML file. RequestError if wrong."""
    environ = os.environ if environ is None else environ
    file = file or environ.get("RINGSIDE_CONFIG")
    values: dict[str, Any] = {}
    settings = {field.name: field for field in dataclasses.fields(Config)}
    for key, value in _read_file(file).items() if file else ():
        name = key.replace("-", "_")
        if name not in settings:
            raise RequestError(f"{file}: {key}", f"no such setting; there are {', '.join(option_names())}")
        values[name] = _convert(settings[name], value, f"{file}: {key}")
    for name, field in settings.items():
        variable = "RINGSIDE_" + name.upper()
        if variable in environ:
            value = environ[variable]
            values[name] = _convert(
                field, value.split(",") if field.metadata.get("many") else value, variable
            )
    for name, value in (options or {}).items():
        if value is not None and value != ():
            values[name] = _convert(settings[name], value, "--" + name.replace("_", "-"))
    return Config(**values)


def option_names() -> list[str]:
    """Every setting's name, as on the command line and in the file."""
    return [field.name.replace("_", "-") for field in dataclasses.fields(Config)]


def _read_file(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise RequestError("config", f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError("config", f"{path} is not TOML: {error}") from error


def _convert(field: dataclasses.Field[Any], value: Any, where: str) -> Any:
    if field.metadata.get("many"):
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(isinstance(one, str) for one in values):
            raise RequestError(where, "must be text, or a list of texts")
        return tuple(one.strip() for one in values)
    parse = field.metadata["parse"]
    if isinstance(value, bool) and parse is not parse_flag:
        raise RequestError(where, f"{value!r} makes no sense here")
    if isinstance(value, str):
        try:
            return parse(value)
        except ValueError as error:
            raise RequestError(where, str(error)) from error
    if parse is parse_flag and isinstance(value, bool):
        return value
    if parse is parse_size and isinstance(value, int):
        return value
    if parse is parse_duration and isinstance(value, int | float):
        return round(value * 10**9)
    raise RequestError(where, f"{value!r} makes no sense here")
