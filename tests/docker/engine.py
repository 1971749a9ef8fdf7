"""A dockerd of the tests' own: in one folder, without a network, and gone without a trace at the end."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from ringside.sensor.cgroup import owner_from_proc_cgroup

if TYPE_CHECKING:
    from collections.abc import Callable

IMAGE = "ringside/box:1.0"
APPLETS = ("sh", "ls", "sleep", "true", "false", "cat", "echo", "kill", "nc", "test")


class UnavailableError(Exception):
    """Docker's engine can't run here; the message says why."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def wait_until(done: Callable[[], bool], what: str, within: float = 60) -> None:
    """Wait for something that nobody announces."""
    deadline = time.monotonic() + within
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.01)


def processes_of(place: Path, ids: set[str]) -> list[int]:
    """Processes with an argument below `place`, and those in these containers' cgroups."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit() and int(each.name) != os.getpid():
            with contextlib.suppress(OSError):
                arguments = (each / "cmdline").read_bytes().split(b"\0")
                owner = owner_from_proc_cgroup((each / "cgroup").read_text())
                ours = any(argument.startswith(os.fsencode(place)) for argument in arguments[1:])
                if ours or (owner is not None and owner.id in ids):
                    found.append(int(each.name))
    return found


def busybox_files() -> bytes:
    """A tar archive of busybox alone."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise UnavailableError("no busybox: install Debian's busybox-static")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(Path(busybox).resolve(), "bin/busybox")
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return packed.getvalue()


def image_archive(name: str, *command: str) -> bytes:
    """An image of busybox alone that runs this command, in the form of `docker save`."""
    layer = busybox_files()
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
        "os": "linux",
        "config": {"Cmd": command, "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        files = {"layer.tar": layer, "config.json": config, "manifest.json": manifest}
        for file, content in files.items():
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            entry = tarfile.TarInfo(file)
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    return packed.getvalue()


@dataclass
class Engine:
    """Runs containers, all in one folder; close() removes all it left."""

    folder: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _ids: set[str] = field(default_factory=set, init=False)  # of its containers, as far as they are known

    def open(self) -> None:
        """Get it to run; UnavailableError if that can't be."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove every container, process, mount, cgroup and folder of it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise UnavailableError("needs root")
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def spawn(self, *command: str, **environment: str) -> None:
        """Start its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    def check_alive(self) -> None:
        """UnavailableError, with its last words, if its process has ended."""
        if self.process is not None and self.process.poll() is not None:
            lines = (self.folder / "log").read_text(errors="replace").splitlines()
            raise UnavailableError("it ended: " + " | ".join(lines[-3:])[-600:])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End its process, gently or not, and wait until it is gone."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(how)
            self.process.wait(60)
            self.process = None

    def clear(self) -> None:
        """End what it left, take its mounts and its folder away."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.processes(), "the engine's processes to end")
        for mount in reversed(self.mounts()):
            subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[int]:
        """Processes that it left: its own, shims, and what runs in containers."""
        return processes_of(self.folder, self._ids)

    def cgroups(self) -> list[Path]:
        """Cgroups that it left, the inner first."""
        raise NotImplementedError

    def mounts(self) -> list[str]:
        """Mounts below its folder, in the order in which they were made."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        points = [line.split()[4] for line in lines]
        return [point for point in points if point.startswith(f"{self.folder}/")]


@dataclass
class Dockerd(Engine):
    """One engine. start() and stop() may be called again and again."""

    live_restore: bool = False
    _before: set[Path] = field(default_factory=set, init=False)

    @property
    def socket(self) -> Path:
        return self.folder / "docker.sock"

    @property
    def exec_root(self) -> Path:
        return self.folder / "exec"

    @property
    def bundles(self) -> tuple[tuple[str, str], ...]:
        """Where its OCI bundles are, for ringside.sensor.runtimes."""
        return (("docker", f"{self.exec_root}/containerd/daemon/io.containerd.runtime.v2.task/*/{{id}}"),)

    def open(self) -> None:
        """With an image."""
        self._before = _docker_cgroups()
        self.start()
        self.import_image()

    def start(self) -> None:
        """Start the engine and wait until it answers."""
        dockerd = shutil.which("dockerd", path=f"/usr/sbin:/usr/local/sbin:{os.environ.get('PATH', '')}")
        if dockerd is None:
            raise UnavailableError("no dockerd: install Debian's docker.io")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "daemon.json").write_text("{}")
        self.spawn(
            *(dockerd, "--config-file", str(self.folder / "daemon.json")),
            *("--data-root", str(self.folder / "data")),
            *("--exec-root", str(self.exec_root)),
            *("--pidfile", str(self.folder / "pid")),
            *("--host", f"unix://{self.socket}"),
            *("--bridge", "none", "--iptables=false", "--ip6tables=false"),
            *("--shutdown-timeout", "1"),
            *(["--live-restore"] if self.live_restore else []),
        )
        wait_until(self._answers, "dockerd to answer")

    def _answers(self) -> bool:
        self.check_alive()
        with contextlib.suppress(OSError, http.client.HTTPException):
            return bool(self.api("GET", "/_ping", parse=False) == b"OK")
        return False

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the engine, gently or not, and wait until it is gone."""
        super().stop(how)
        if how == signal.SIGKILL:
            # Its containerd dies with it, and where init is slow to bury it, the next one takes it for alive.
            (self.exec_root / "containerd/containerd.pid").unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove all it left."""
        if self.process is not None:
            with contextlib.suppress(OSError, http.client.HTTPException, EngineSaysError):
                for container in self.api("GET", "/containers/json?all=1"):
                    self.remove(container["Id"])
            self.stop()
        self.clear()
        for cgroup in self.cgroups():
            cgroup.rmdir()  # of containers that were killed above: nobody else removes them
        for cgroup in sorted(_docker_cgroups() - self._before, reverse=True):
            with contextlib.suppress(OSError):
                cgroup.rmdir()

    def cgroups(self) -> list[Path]:
        """Cgroups of this engine's containers."""
        each = [parent / container_id for parent in _docker_cgroups() for container_id in self._ids]
        return [cgroup for cgroup in each if cgroup.exists()]

    def processes(self) -> list[int]:
        """Processes that this engine left: containerd, shims and what runs in containers."""
        with contextlib.suppress(OSError):
            self._ids.update(os.listdir(self.folder / "data/containers"))
        return processes_of(self.exec_root, self._ids)

    # The API

    def api(
        self, method: str, path: str, body: Any = None, *, parse: bool = True, timeout: float = 60
    ) -> Any:
        """One request; EngineSaysError for a status that is no success."""
        connection = _Connection(self.socket, timeout)
        try:
            raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
            kind = "application/x-tar" if isinstance(body, bytes) else "application/json"
            connection.request(method, path, raw, {"Content-Type": kind} if raw is not None else {})
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status >= 300 and response.status != 304:
            raise EngineSaysError(response.status, answer.decode(errors="replace"))
        return json.loads(answer) if parse and answer else answer

    def import_image(self) -> None:
        """An image of busybox alone."""
        name, _, tag = IMAGE.partition(":")
        path = f"/images/create?fromSrc=-&repo={quote(name, safe='')}&tag={tag}"
        self.api("POST", path, busybox_files(), parse=False)

    def image_id(self) -> str:
        return str(self.api("GET", f"/images/{IMAGE}/json")["Id"]).removeprefix("sha256:")

    def create(self, *command: str, name: str = "", auto_remove: bool = False, **host: Any) -> str:
        """A new container's id."""
        config = {
            "Image": IMAGE,
            "StopTimeout": 0,
            "Cmd": list(command),
            # Without a network namespace of their own, containers start in a third of the time.
            "HostConfig": {"NetworkMode": "host", "AutoRemove": auto_remove, **host},
        }
        answer = self.api("POST", "/containers/create" + (f"?name={name}" if name else ""), config)
        return str(answer["Id"])

    def run(self, *command: str, name: str = "", auto_remove: bool = False, **host: Any) -> str:
        """A new container's id, started."""
        container_id = self.create(*command, name=name, auto_remove=auto_remove, **host)
        self.act(container_id, "start")
        return container_id

    def act(self, container_id: str, action: str) -> None:
        """start, stop?t=0, kill, restart?t=0, pause, rename?name=NEW ..."""
        self.api("POST", f"/containers/{container_id}/{action}")

    def execute(self, container_id: str, *command: str) -> str:
        """Run a program in a container and return what it printed."""
        config = {"Cmd": list(command), "AttachStdout": True, "Tty": True}
        exec_id = self.api("POST", f"/containers/{container_id}/exec", config)["Id"]
        raw = self.api("POST", f"/exec/{exec_id}/start", {"Detach": False, "Tty": True}, parse=False)
        return str(raw.decode())

    def wait(self, container_id: str) -> int:
        """The exit code, once it has ended."""
        return int(self.api("POST", f"/containers/{container_id}/wait")["StatusCode"])

    def inspect(self, container_id: str) -> dict[str, Any]:
        found = self.api("GET", f"/containers/{container_id}/json")
        assert isinstance(found, dict)
        return found

    def remove(self, container_id: str) -> None:
        self.api("DELETE", f"/containers/{container_id}?force=1")


class EngineSaysError(Exception):
    """The engine refused; the arguments are its status and its words."""


def _docker_cgroups() -> set[Path]:
    """Folders that engines make for their containers' cgroups, in each hierarchy."""
    return {path for path in Path("/sys/fs/cgroup").glob("**/docker") if path.is_dir()}
