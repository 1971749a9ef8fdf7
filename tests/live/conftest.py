"""What the live tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support import uring as uring_program
from ..support.foreign import build


@pytest.fixture(scope="session")
def program32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 32-bit program, to be told what to call."""
    return build(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="session")
def uring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that makes requests through io_uring, to be told which."""
    return uring_program.build(tmp_path_factory.mktemp("uring"))
