"""A Podman of the tests' own: in one folder, without a network, with its service or without."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .engine import Engine, UnavailableError, image_archive, wait_until

# What it learned of layers, which is kept in one place for all folders.
CACHE = Path("/var/lib/containers/cache")
# With a registry's name: Podman would add one.
IMAGE = "ringside.test/box:1.0"
# Podman's own limits are more than some machines let root have.
CONFIG = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "{manager}"
events_logger = "file"
"""


@dataclass
class Podman(Engine):
    """Podman's containers and images; its process is the API's service, if that was started.

    `systemd`: has systemd make the cgroups.
    """

    systemd: bool = False
    _before: set[Path] = field(default_factory=set, init=False)
    _had_cache: bool = field(default=True, init=False)

    @property
    def socket(self) -> Path:
        return self.folder / "podman.sock"

    @property
    def root(self) -> Path:
        """What is /var/lib/containers/storage otherwise."""
        return self.folder / "root"

    @property
    def run_root(self) -> Path:
        """What is /run/containers/storage otherwise."""
        return self.folder / "run"

    def open(self) -> None:
        """With an image."""
        if shutil.which("podman") is None:
            raise UnavailableError("no podman: install Debian's podman")
        self._before = _pod_cgroups()
        self._had_cache = CACHE.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        config = CONFIG.format(manager="systemd" if self.systemd else "cgroupfs")
        (self.folder / "containers.conf").write_text(config)
        archive = self.folder / "image.tar"
        archive.write_bytes(image_archive(IMAGE, "sh"))
        self.podman("load", "--quiet", "--input", str(archive))

    def _command(self, *words: str) -> list[str]:
        places = ("--root", self.root, "--runroot", self.run_root, "--tmpdir", self.folder / "tmp")
        return ["podman", *map(str, places), *words]

    @property
    def _environment(self) -> dict[str, str]:
        return {"CONTAINERS_CONF": str(self.folder / "containers.conf")}

    def podman(self, *words: str) -> str:
        """What a command prints; CalledProcessError if it fails."""
        command = self._command(*words)
        said = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **self._environment},
        )
        if said.returncode:
            raise subprocess.CalledProcessError(said.returncode, command, said.stdout, said.stderr)
        return said.stdout.strip()

    def start_service(self) -> None:
        """Start the API's service and wait until it listens."""
        command = self._command("system", "service", "--time", "0", f"unix://{self.socket}")
        self.spawn(*command, **self._environment)
        wait_until(self.socket.exists, "Podman's service to listen")

    def stop_service(self) -> None:
        """End it; containers live on, for they are not its."""
        self.stop()
        self.socket.unlink(missing_ok=True)

    def create(self, name: str, *command: str, options: tuple[str, ...] = ()) -> str:
        """A new container's id."""
        network = () if "--pod" in options else ("--network", "host")
        container_id = self.podman("create", "--name", name, *network, *options, IMAGE, *command)
        self._ids.add(container_id)
        return container_id

    def run(self, name: str, *command: str, options: tuple[str, ...] = ()) -> str:
        """A new container's id, started."""
        container_id = self.create(name, *command, options=options)
        self.podman("start", container_id)
        return container_id

    def image_id(self) -> str:
        return self.podman("image", "inspect", "--format", "{{.Id}}", IMAGE)

    def remove(self, container_id: str) -> None:
        self.podman("rm", "--force", "--time", "0", container_id)

    def close(self) -> None:
        """Remove all it left."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.podman("pod", "rm", "--all", "--force")
            self.podman("rm", "--all", "--force", "--time", "0")
        self.stop_service()
        self.clear()
        if not self._had_cache:
            shutil.rmtree(CACHE, ignore_errors=True)
        for cgroup in self.cgroups():
            with contextlib.suppress(OSError):
                cgroup.rmdir()

    def cgroups(self) -> list[Path]:
        """Cgroups that were not there before, the inner first."""
        return sorted(_pod_cgroups() - self._before, reverse=True)


def _pod_cgroups() -> set[Path]:
    """Cgroups that Podman makes for containers and pods, in each hierarchy."""
    found: set[Path] = set()
    for top in Path("/sys/fs/cgroup").glob("**/libpod_parent"):
        found.update(path for path in (top, *top.rglob("*")) if path.is_dir())
    return found
