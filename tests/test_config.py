"""Settings from options, variables and a file; what is wrong with them is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from ringside.sensor.config import (
    Address,
    Config,
    load,
    option_names,
    parse_address,
    parse_duration,
    parse_flag,
    parse_size,
)
from ringside.sensor.errors import RequestError


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("64k", 64 << 10), ("8M", 8 << 20), ("8MiB", 8 << 20), ("1 g", 1 << 30), ("0", 0)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5M", "8MM", "8Mx", "1e3"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("10", 10 * 10**9),
        ("10s", 10 * 10**9),
        ("250ms", 250 * 10**6),
        ("1.5m", 90 * 10**9),
        ("2h", 7200 * 10**9),
        ("3us", 3000),
        ("7ns", 7),
        ("0", 0),
    ],
)
def test_durations(text: str, nanoseconds: int) -> None:
    assert parse_duration(text) == nanoseconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 day", "1s2", ".5s", "1e3s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)


def test_flags() -> None:
    assert [parse_flag(text) for text in ("1", "yes", "True", "on")] == [True] * 4
    assert [parse_flag(text) for text in ("0", "no", "FALSE", "off")] == [False] * 4
    with pytest.raises(ValueError, match="neither yes nor no"):
        parse_flag("maybe")


@pytest.mark.parametrize(
    ("text", "address", "local"),
    [
        ("unix:/run/x.sock", Address(path="/run/x.sock"), True),
        ("unix:///run/x.sock", Address(path="/run/x.sock"), True),
        ("127.0.0.1:80", Address(host="127.0.0.1", port=80), True),
        ("127.9.9.9:80", Address(host="127.9.9.9", port=80), True),
        ("[::1]:80", Address(host="::1", port=80), True),
        ("localhost:0", Address(host="localhost", port=0), True),
        ("0.0.0.0:80", Address(host="0.0.0.0", port=80), False),
        ("sensor.example:65535", Address(host="sensor.example", port=65535), False),
    ],
)
def test_addresses(text: str, address: Address, local: bool) -> None:
    assert parse_address(text) == address
    assert address.is_local is local


@pytest.mark.parametrize(
    "text", ["", "unix:", "80", ":80", "host:", "host:x", "host:65536", "host:-1", "unix:/" + "x" * 107]
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(RequestError, match=r"^listen: "):
        parse_address(text)


def test_an_address_reads_back() -> None:
    for text in ("unix:/run/x.sock", "127.0.0.1:80", "sensor.example:443"):
        assert str(parse_address(text)) == text


# --- where settings come from


def test_defaults() -> None:
    assert load(environ={}) == Config()


def test_options_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ringside.toml"
    file.write_text('ring-size = "1M"\nqueue-size = "1M"\nhold = "1s"\nsensor_id = "file"\n')
    environ = {"RINGSIDE_QUEUE_SIZE": "2M", "RINGSIDE_HOLD": "2s"}
    config = load({"hold": "3s", "lineage": None, "listen": ()}, environ, file)
    assert (config.sensor_id, config.ring_size, config.queue_size, config.hold) == (
        "file",
        1 << 20,
        2 << 20,
        3 * 10**9,
    )
    assert config.lineage == "process"
    assert config.listen == Config().listen


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "ringside.toml"
    file.write_text("insecure = true\n")
    assert load(environ={"RINGSIDE_CONFIG": str(file)}).insecure


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("listen", "unix:/a,127.0.0.1:1", ("unix:/a", "127.0.0.1:1")),
        ("insecure", "yes", True),
        ("ring_size", "64K", 64 << 10),
        ("drain_interval", "5ms", 5 * 10**6),
        ("lineage", "all", "all"),
        ("metrics", "127.0.0.1:9", "127.0.0.1:9"),
    ],
)
def test_variables(name: str, text: str, value: Any) -> None:
    assert getattr(load(environ={"RINGSIDE_" + name.upper(): text}), name) == value


def test_the_file_may_use_the_types_that_toml_has(tmp_path: Path) -> None:
    file = tmp_path / "ringside.toml"
    file.write_text('listen = ["unix:/a", "unix:/b"]\nring-size = 65536\nhold = 0.25\ninclude-self = true\n')
    config = load(environ={}, file=file)
    assert config.listen == ("unix:/a", "unix:/b")
    assert (config.ring_size, config.hold, config.include_self) == (65536, 250_000_000, True)


def test_every_setting_can_be_given_in_each_way(tmp_path: Path) -> None:
    """No setting's default is refused when it is said."""
    for field in dataclasses.fields(Config):
        value = getattr(Config(), field.name)
        kind = field.metadata.get("kind")
        text = (
            ",".join(value)
            if isinstance(value, tuple)
            else f"{value}ns"
            if kind == "duration"
            else str(value)
        )
        assert load(environ={"RINGSIDE_" + field.name.upper(): text}) == Config()
        assert load({field.name: [text] if field.metadata.get("many") else text}, {}) == Config()
        file = tmp_path / f"{field.name}.toml"
        file.write_text(f'{field.name.replace("_", "-")} = "{text}"\n')
        assert load(environ={}, file=file) == Config()
        assert field.metadata["help"].endswith(".")


# --- what is wrong with them


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("ring_size", "100K", "ring-size"),
        ("ring_size", "2G", "ring-size"),
        ("ring_size", "many", "RINGSIDE_RING_SIZE"),
        ("lifecycle_ring_size", "1", "lifecycle-ring-size"),
        ("ring_total", "1K", "ring-total"),
        ("queue_size", "64K", "queue-size"),
        ("drain_interval", "1us", "drain-interval"),
        ("drain_interval", "2s", "drain-interval"),
        ("hold", "11s", "hold"),
        ("hold", "soon", "RINGSIDE_HOLD"),
        ("lineage", "none", "lineage"),
        ("sensor_id", "a b", "sensor-id"),
        ("sensor_id", "x" * 41, "sensor-id"),
        ("listen", "nowhere", "listen"),
        ("metrics", "nowhere", "metrics"),
        ("metrics", "unix:/run/metrics", "metrics"),
        ("insecure", "perhaps", "RINGSIDE_INSECURE"),
    ],
)
def test_a_wrong_setting_is_named(name: str, text: str, where: str) -> None:
    with pytest.raises(RequestError) as raised:
        load(environ={"RINGSIDE_" + name.upper(): text})
    assert raised.value.field == where
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("ring-sice = 1", "no such setting"),
        ("ring-size = true", "makes no sense"),
        ("ring-size = [1]", "makes no sense"),
        ("listen = 3", "list of texts"),
        ("listen = [3]", "list of texts"),
        ("hold = []", "makes no sense"),
        ("= 1", "is not TOML"),
        ("\x80", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "ringside.toml"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(RequestError, match=problem) as raised:
        load(environ={}, file=file)
    assert str(file) in str(raised.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        load(environ={}, file=tmp_path / "none.toml")


def test_a_config_can_not_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().ring_size = 1  # type: ignore[misc]


def test_option_names() -> None:
    assert option_names()[0] == "listen"
    assert "drain-interval" in option_names()
