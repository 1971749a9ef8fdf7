"""A containerd of the tests' own, spoken to as a kubelet does: by CRI, without a network for pods."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpclib.exceptions import GRPCError

from . import cri
from .engine import Engine, UnavailableError, image_archive, wait_until

# With a registry's name: containerd takes names as they are.
IMAGE = "ringside.test/box:1.0"
PAUSE = "ringside.test/pause:1.0"
CONFIG = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
[grpc]
address = "{folder}/containerd.sock"
[ttrpc]
address = "{folder}/ttrpc.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
# where root may not make a process less likely to be killed
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = "{folder}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = {systemd}
"""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod's sandbox, and the configuration that goes with each of its containers."""

    id: str
    name: str
    namespace: str
    config: dict[str, Any]


@dataclass
class Containerd(Engine):
    """One containerd. start() and stop() may be called again and again; containers live on.

    `systemd`: has systemd make the cgroups.
    """

    pause: str = PAUSE
    systemd: bool = False
    pods: dict[str, Pod] = field(default_factory=dict, init=False)
    _before: set[Path] = field(default_factory=set, init=False)

    @property
    def socket(self) -> Path:
        return self.folder / "containerd.sock"

    @property
    def state(self) -> Path:
        """What is /run/containerd otherwise."""
        return self.folder / "state"

    @property
    def runtime(self) -> cri.Runtime:
        return cri.Runtime(self.socket)

    def open(self) -> None:
        """With images."""
        self._before = _pod_cgroups()
        self.start()
        self.import_images()

    def start(self) -> None:
        """Start it and wait until it answers."""
        if shutil.which("containerd") is None:
            raise UnavailableError("no containerd: install Debian's docker.io")
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "config.toml"
        config.write_text(
            CONFIG.format(folder=self.folder, pause=self.pause, systemd=str(self.systemd).lower())
        )
        self.spawn("containerd", "--config", str(config))
        wait_until(self._answers, "containerd to answer")

    def _answers(self) -> bool:
        self.check_alive()
        with contextlib.suppress(GRPCError, OSError):
            asyncio.run(self.image_id())
            return True
        return False

    def _ctr(self) -> tuple[str, ...]:
        return ("ctr", "--address", str(self.socket), "--namespace", "k8s.io")

    def import_images(self) -> None:
        """The tests' image, and that of pods' sandboxes."""
        for name, command in ((IMAGE, ("sh",)), (self.pause, ("sleep", "2147483647"))):
            archive = self.folder / "image.tar"
            archive.write_bytes(image_archive(name, *command))
            subprocess.run([*self._ctr(), "images", "import", str(archive)], check=True, capture_output=True)

    def close(self) -> None:
        """Remove all it left."""
        if self.process is not None:
            with contextlib.suppress(GRPCError, OSError):
                asyncio.run(self._remove_pods())
            self.stop()
        self.clear()
        for container_id in self._ids:  # runc's, of those that were killed above
            shutil.rmtree(f"/run/containerd/runc/k8s.io/{container_id}", ignore_errors=True)
        for cgroup in self.cgroups():
            for inner in sorted(cgroup.rglob("*/"), reverse=True):
                inner.rmdir()
            with contextlib.suppress(OSError):
                cgroup.rmdir()

    async def _remove_pods(self) -> None:
        for pod in list(self.pods.values()):
            await self.end(pod)

    def cgroups(self) -> list[Path]:
        """Cgroups of pods that were not there before, the inner first; a kubelet would remove them."""
        return sorted(_pod_cgroups() - self._before, reverse=True)

    # What a kubelet asks for

    async def pod(
        self, name: str, namespace: str = "shop", *, slices: bool = False, pid: int = cri.CONTAINER
    ) -> Pod:
        """Start a pod's sandbox. `slices`: its cgroup is named as systemd does; `pid`: whose namespace."""
        uid = str(uuid.uuid4())
        parent = f"/kubepods/besteffort/pod{uid}"
        if slices or self.systemd:
            below = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod"
            parent = f"{below}{uid.replace('-', '_')}.slice"
        config = {
            "metadata": {"name": name, "uid": uid, "namespace": namespace},
            "log_directory": str(self.folder / "logs"),
            "linux": {
                "cgroup_parent": parent,
                "security_context": {"namespace_options": {"network": cri.NODE, "pid": pid}},
            },
        }
        return await self.run_pod(config)

    async def run_pod(self, config: dict[str, Any]) -> Pod:
        """Start the sandbox of a pod that is configured so."""
        metadata = config["metadata"]
        answer = await self.runtime.call("RunPodSandbox", config=config)
        pod = Pod(answer.pod_sandbox_id, metadata["name"], metadata["namespace"], config)
        self.pods[pod.id] = pod
        self._ids.add(pod.id)
        return pod

    async def create(self, pod: Pod, name: str, *command: str, **more: Any) -> str:
        """A new container's id; `more` of its configuration."""
        options = pod.config["linux"]["security_context"]["namespace_options"]
        config = {
            "metadata": {"name": name},
            # a kubelet has found the image before, and says its id
            "image": {"image": await self.image_id(), "user_specified_image": IMAGE},
            "command": list(command),
            "log_path": f"{name}.log",
            "linux": {"security_context": {"namespace_options": options}},
            **more,
        }
        answer = await self.runtime.call(
            "CreateContainer", pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config
        )
        self._ids.add(answer.container_id)
        return str(answer.container_id)

    async def start_container(self, container_id: str) -> None:
        await self.runtime.call("StartContainer", container_id=container_id)

    async def run(self, pod: Pod, name: str, *command: str) -> str:
        """A new container's id, started."""
        container_id = await self.create(pod, name, *command)
        await self.start_container(container_id)
        return container_id

    async def execute(self, container_id: str, *command: str) -> tuple[str, int]:
        """Run a program in a container: what it printed, its exit code."""
        answer = await self.runtime.call("ExecSync", container_id=container_id, cmd=list(command), timeout=60)
        return answer.stdout.decode(), answer.exit_code

    async def wait(self, container_id: str) -> int:
        """The exit code, once it has ended."""
        async with asyncio.timeout(60):
            while True:
                answer = await self.runtime.call("ContainerStatus", container_id=container_id)
                if answer.status.state == cri.EXITED:
                    return int(answer.status.exit_code)
                await asyncio.sleep(0.01)

    async def kill(self, container_id: str) -> None:
        await self.stop_container(container_id, 0)

    async def stop_container(self, container_id: str, patience: int) -> None:
        """Ask it to end, and kill it after so many seconds."""
        within = 60 + patience
        await self.runtime.call("StopContainer", container_id=container_id, timeout=patience, within=within)

    async def remove(self, container_id: str) -> None:
        await self.runtime.call("RemoveContainer", container_id=container_id)

    async def end(self, pod: Pod) -> None:
        """Stop and remove a pod with all its containers."""
        for attempt in range(10):
            try:
                await self.runtime.call("StopPodSandbox", pod_sandbox_id=pod.id)
                break
            except GRPCError:  # a container was just ending by itself; a kubelet tries again, too
                if attempt == 9:
                    raise
                await asyncio.sleep(0.2)
        await self.runtime.call("RemovePodSandbox", pod_sandbox_id=pod.id)
        self.pods.pop(pod.id, None)

    async def image_id(self) -> str:
        answer = await self.runtime.call("ImageStatus", service="ImageService", image={"image": IMAGE})
        return str(answer.image.id)


def _pod_cgroups() -> set[Path]:
    """Cgroups of pods and those around them, in each hierarchy."""
    found: set[Path] = set()
    for top in Path("/sys/fs/cgroup").glob("**/kubepods*"):
        found.update(path for path in (top, *top.rglob("*")) if path.is_dir())
    return found
