"""What `watch` is asked to watch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from ringside.client import builders
from ringside.sensor.what import WhatError, subscription

# --- what is watched


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("process", builders.processes()),
        ("process:exec", builders.processes("exec")),
        ("process:fork,exit", builders.processes("fork", "exit")),
        ("syscall", builders.syscalls()),
        ("syscall:*:exit", builders.syscalls(on="exit")),
        ("syscall:openat", builders.syscalls("openat")),
        ("syscall:connect:exit", builders.syscalls("connect", on="exit")),
        ("syscall:110", builders.syscalls(110)),
        ("syscall:0x6e:both", builders.syscalls(110, on="both")),
        ("syscall:read,write", builders.syscalls("read", "write")),
        ("file", builders.files()),
        ("file:/etc/*", builders.files("/etc/*")),
        ("file:/a:b", builders.files("/a:b")),
        ("network", builders.network()),
        ("network:connect", builders.network("connect")),
        ("network:connect:result", builders.network("connect:result")),
        ("network:bind,listen", builders.network("bind", "listen")),
        ("kernel:do_exit", builders.kernel("do_exit")),
        ("kernel:do_exit:exit", builders.kernel("do_exit", on="exit")),
        ("kernel:ext4:ext4_sync_fs:both", builders.kernel("ext4:ext4_sync_fs", on="both")),
        ("container", builders.containers()),
        ("container:running", builders.containers("running")),
        ("ticker", builders.ticker(1)),
        ("ticker:250ms", builders.ticker(0.25)),
        ("chargen:64", builders.chargen(64)),
    ],
)
def test_what(words: str, expected: Sequence[Any]) -> None:
    assert subscription([words]) == builders.events(expected)


def test_several_whats_are_one_subscription() -> None:
    assert subscription(["process:exec", "ticker:1s"], limit=3, container=["web*"]) == builders.events(
        builders.processes("exec"), builders.ticker(1), limit=3, container=["web*"]
    )


@pytest.mark.parametrize(
    ("word", "where", "expected"),
    [
        ("network", "sin_port == 443", builders.network(where="sin_port == 443")),
        ("network:connect", "ret < 0", builders.network("connect", where="ret < 0")),
        ("syscall:openat:exit", "ret == -2", builders.syscalls("openat", ret=-2)),
        ("syscall", "ret == -13", builders.syscalls(ret=-13)),
        ("process", 'exec_filename == "/bin/sh"', builders.processes(filename="/bin/sh")),
        ("process", 'exec_filename ~ "*/sh"', builders.processes(pattern="*/sh")),
        ("process", "exit_code == 256", builders.processes(exit_code=256)),
        ("file", 'filename ~ "/etc/*"', builders.files("/etc/*")),
        ("kernel:do_exit", "code & 1", builders.kernel("do_exit", where="code & 1")),
    ],
)
def test_filters(word: str, where: str, expected: Sequence[Any]) -> None:
    assert subscription([word], where=where) == builders.events(expected)


def test_arguments_of_kernel_functions() -> None:
    arguments = {"name": "+0($arg2):string", "flags": "+0($arg3):u64"}
    expected = builders.events(builders.kernel("do_sys_openat2", arguments))
    assert subscription(["kernel:do_sys_openat2"], arguments=arguments) == expected


def test_a_filter_goes_with_all_that_is_watched() -> None:
    with pytest.raises(WhatError, match="ticker takes no filter"):
        subscription(["network", "ticker"], where="sin_port == 443")
