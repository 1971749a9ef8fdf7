"""A Docker engine for the session, and for tests that stop it one of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .engine import Dockerd, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def dockerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dockerd]:
    """An engine that every test may use but not stop. It ends with nothing left behind."""
    yield from _engine(Dockerd(tmp_path_factory.mktemp("dockerd")))


@pytest.fixture
def own_dockerd(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Dockerd]:
    """An engine that the test may stop; the parameter says whether containers then live on."""
    live_restore = bool(getattr(request, "param", False))
    yield from _engine(Dockerd(tmp_path_factory.mktemp("dockerd"), live_restore))


def _engine(engine: Dockerd) -> Iterator[Dockerd]:
    try:
        engine.__enter__()
    except UnavailableError as error:
        pytest.skip(f"no Docker engine: {error}")
    try:
        yield engine
    finally:
        engine.close()
        assert engine.processes() == []
        assert engine.mounts() == []
        assert engine.cgroups() == []
        assert not engine.folder.exists()
