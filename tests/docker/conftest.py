"""Container engines for the session, and for tests that stop them one of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import pytest

from .containerd import Containerd
from .engine import Dockerd, Engine, UnavailableError
from .podman import Podman

if TYPE_CHECKING:
    from collections.abc import Iterator

AnyEngine = TypeVar("AnyEngine", bound=Engine)


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
    yield from _engine(Dockerd(tmp_path_factory.mktemp("dockerd"), live_restore=live_restore))


@pytest.fixture(scope="session")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """A containerd that every test may use but not stop."""
    yield from _engine(Containerd(tmp_path_factory.mktemp("containerd")))


@pytest.fixture
def own_containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """A containerd that the test may stop."""
    yield from _engine(Containerd(tmp_path_factory.mktemp("containerd")))


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """A Podman that every test may use; it ends with nothing left behind."""
    yield from _engine(Podman(tmp_path_factory.mktemp("podman")))


def _engine(engine: AnyEngine) -> Iterator[AnyEngine]:
    try:
        engine.__enter__()
    except UnavailableError as error:
        pytest.skip(f"no engine: {error}")
    try:
        yield engine
    finally:
        engine.close()
        assert engine.processes() == []
        assert engine.mounts() == []
        assert engine.cgroups() == []
        assert not engine.folder.exists()
