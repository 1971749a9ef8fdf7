"""What container runtimes leave on disk: names, images, pids and cgroups without asking any engine.

Everything is read below a root, so that a sensor in a container reads the host's through a mount. Some of
these folders belong to users (rootless Podman), so nothing is followed, waited for or read without a bound.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .cgroup import CgroupOwner, CgroupPaths, owner_of_cgroup
from .container import ContainerTable, Document, Facts, image_id_of, is_hex_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

#: (runtime, folder of a container's OCI bundle, which has its config.json). A `*` is any one folder.
_BUNDLES: Final = (
    ("containerd", "run/containerd/io.containerd.runtime.v2.task/*/{id}"),
    ("docker", "run/docker/containerd/daemon/io.containerd.runtime.v2.task/*/{id}"),
    ("containerd", "run/k3s/containerd/io.containerd.runtime.v2.task/*/{id}"),
    ("containerd", "var/snap/microk8s/common/run/containerd/io.containerd.runtime.v2.task/*/{id}"),
    ("cri-o", "run/containers/storage/*-containers/{id}/userdata"),
    ("podman", "var/lib/containers/storage/*-containers/{id}/userdata"),
)
#: (runtime, folder with the pid of a container's first process), where that is not the bundle
_PIDS: Final = (
    ("podman", "run/containers/storage/*-containers/{id}/userdata"),
    ("podman", "run/user/*/containers/*-containers/{id}/userdata"),
)
#: (runtime, folder with the state of a low-level runtime's container)
_STATES: Final = (
    ("runc", "run/runc/{id}"),
    ("crun", "run/crun/{id}"),
    ("docker", "run/docker/runtime-runc/*/{id}"),
    ("containerd", "run/containerd/runc/*/{id}"),
    ("podman", "run/user/*/crun/{id}"),
    ("podman", "run/user/*/runc/{id}"),
)
_DOCKER: Final = "var/lib/docker/containers/{id}/config.v2.json"
#: What is there for as long as a container is kept, whether it runs or not. containerd has a folder for each
#: container and each sandbox of a pod in its state, from before it is started until the kubelet removes it.
_CRI: Final = (
    "containerd/io.containerd.grpc.v1.cri/containers/{id}",
    "containerd/io.containerd.grpc.v1.cri/sandboxes/{id}",
)
_KEPT: Final = (
    _DOCKER,
    *(f"{run}/{place}" for run in ("run", "run/k3s", "var/snap/microk8s/common/run") for place in _CRI),
)
#: Runtimes that people run by hand, with names for ids and cgroups of any name.
_BARE: Final = ("runc", "crun")
_STORAGES: Final = ("var/lib/containers/storage",)

_NAME: Final = re.compile(r"[\w+.-]{1,1024}", re.ASCII)
_DOCUMENT_BYTES: Final = 1 << 20
_STORAGE_BYTES: Final = 16 << 20
_TEXT_LIMIT: Final = 4096
_PID_WAITS: Final = 1.0  # s that the news of a container may be late, for its pid
_PID_COMES: Final = 10.0  # s in which it may still come

# Annotations, best first.
_NAMESPACE: Final = ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace")
_POD: Final = ("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name")
_CONTAINER: Final = ("io.kubernetes.cri.container-name", "io.kubernetes.container.name")
_KIND: Final = ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType")
_OWN_NAME: Final = ("nerdctl/name", "io.kubernetes.cri-o.Name")
_IMAGE: Final = (
    "io.kubernetes.cri.image-name",
    "io.kubernetes.cri-o.ImageName",
    "io.kubernetes.cri-o.UserRequestedImage",
    "io.kubernetes.cri.podsandbox.image-name",  # of sandboxes, since containerd 2
    "org.opencontainers.image.ref.name",
)
_IMAGE_ID: Final = ("io.kubernetes.cri-o.Image", "io.kubernetes.cri-o.ImageRef")
_LABELS: Final = "io.kubernetes.cri-o.Labels"


@dataclass(frozen=True, slots=True)
class Found:
    """A container that a runtime keeps state of.

    `persistent`: it is kept also when nothing runs in it. `begins`: where its pid is written down is there.
    """

    id: str
    facts: Facts
    persistent: bool = False
    begins: bool = False


@dataclass(slots=True)
class Runtimes:
    """Reads the state that runtimes leave below `root`. `more`: further places, as in _BUNDLES."""

    root: Path = Path("/")
    more: tuple[tuple[str, str], ...] = ()
    _storages: dict[Path, tuple[tuple[int, int], dict[str, Facts]]] = field(default_factory=dict, repr=False)

    def find(self, container_id: str) -> Found | None:
        """What the disk knows of a container; None if nothing."""
        if not _is_name(container_id):
            return None
        facts, found = Facts(), False
        bundle = self._bundle(container_id)
        if bundle is not None:
            runtime, folder = bundle
            found = True
            facts = self._bundle_facts(runtime, folder)
        for runtime, folder in self._expand(_STATES, container_id):
            found = True
            facts = _join(facts, self._state_facts(runtime, folder, read_config=facts.oci_config is None))
        persistent = self._has_place(container_id)
        docker = _read_json(self.root / _DOCKER.format(id=container_id), _DOCUMENT_BYTES)
        if docker is not None:
            facts = _join(_docker_facts(docker), facts)
        for storage in self._storage_files(facts):
            stored = self._storage(storage).get(container_id)
            if stored is not None:
                persistent = True
                facts = _join(stored, facts)
        facts = _join(facts, Facts(host_pid=self.pid(container_id)))
        begins = bundle is not None or any(self._expand(_PIDS, container_id))
        return Found(container_id, facts, persistent, begins) if found or persistent or begins else None

    def oci_config(self, container_id: str) -> Document | None:
        """The config.json of a running container."""
        bundle = self._bundle(container_id) if _is_name(container_id) else None
        raw = None if bundle is None else _read(bundle[1] / "config.json", _DOCUMENT_BYTES)
        return None if raw is None else Document.of(raw)

    def running(self, container_id: str) -> Facts:
        """The pid and config.json of a container that runs or is about to; empty if there is no bundle."""
        return Facts(host_pid=self.pid(container_id), oci_config=self.oci_config(container_id))

    def pid(self, container_id: str) -> int:
        """The pid of a container's first process, perhaps of an earlier run; 0 if none is written down."""
        if not _is_name(container_id):
            return 0
        folders = (folder for _, folder in self._expand((*_BUNDLES, *self.more, *_PIDS), container_id))
        return next((pid for folder in folders if (pid := _pid(folder))), 0)

    def is_kept(self, container_id: str) -> bool:
        """Whether a container is still there when nothing runs in it."""
        if not _is_name(container_id):
            return False
        if self._has_place(container_id):
            return True
        lists = {*self._storage_files(Facts()), *self._storages}  # those of users were found before
        return any(container_id in self._storage(path) for path in lists)

    def bare(self) -> Iterator[tuple[CgroupOwner, tuple[str, ...]]]:
        """Containers of runtimes run by hand, and the cgroup paths that each is in."""
        for runtime in _BARE:
            for folder in _folders(self.root / "run" / runtime):
                paths = self._cgroups(runtime, folder)
                if paths and _is_name(folder.name):
                    yield CgroupOwner(folder.name, runtime), paths

    def bare_named(self, name: str) -> CgroupOwner | None:
        """The container of that name of a runtime run by hand: it has a folder before it has a process."""
        if _is_name(name):
            for runtime in _BARE:
                if _is_folder(self.root / "run" / runtime / name):
                    return CgroupOwner(name, runtime)
        return None

    def _has_place(self, container_id: str) -> bool:
        return any(os.path.exists(self.root / place.format(id=container_id)) for place in _KEPT)

    def _bundle(self, container_id: str) -> tuple[str, Path] | None:
        for runtime, folder in self._expand((*_BUNDLES, *self.more), container_id):
            if _is_file(folder / "config.json"):
                return runtime, folder
        return None

    def _expand(self, layouts: Iterable[tuple[str, str]], container_id: str) -> Iterator[tuple[str, Path]]:
        for runtime, layout in layouts:
            folders = [Path("/") if layout.startswith("/") else self.root]
            for part in layout.strip("/").format(id="\0").split("/"):
                if "*" in part:
                    suffix = part.removeprefix("*")
                    folders = [one for each in folders for one in _folders(each) if one.name.endswith(suffix)]
                else:
                    # The id may be a name, and is only a name: not a pattern, not a path.
                    folders = [each / part.replace("\0", container_id) for each in folders]
                    folders = [each for each in folders if _is_folder(each)]
            for folder in folders:
                yield runtime, folder

    def _bundle_facts(self, runtime: str, folder: Path) -> Facts:
        raw = _read(folder / "config.json", _DOCUMENT_BYTES)
        config = _json(raw)
        facts = _annotated(_get(config, "annotations"), runtime)
        return replace(
            facts,
            host_pid=_pid(folder),
            oci_config=Document.of(raw) if raw is not None and config is not None else None,
        )

    def _state_facts(self, runtime: str, folder: Path, *, read_config: bool) -> Facts:
        state = _read_json(folder / "state.json", _DOCUMENT_BYTES) or _read_json(
            folder / "status", _DOCUMENT_BYTES
        )
        pid = _get(state, "init_process_pid") or _get(state, "pid")
        facts = Facts(runtime=runtime, host_pid=pid if isinstance(pid, int) and 0 < pid < 1 << 22 else 0)
        labels = _get(state, "config", "labels")
        bundle = _text(_get(state, "bundle"))
        for label in labels if isinstance(labels, list) else ():
            if isinstance(label, str) and label.startswith("bundle="):
                bundle = label.removeprefix("bundle=")
        if bundle and read_config and ".." not in bundle:
            facts = _join(facts, self._bundle_facts(runtime, self.root / bundle.lstrip("/")))
        return facts

    def _cgroups(self, runtime: str, folder: Path) -> tuple[str, ...]:
        if runtime == "crun":
            path = _text(_get(_read_json(folder / "status", _DOCUMENT_BYTES), "cgroup-path"))
            return (path,) if path.startswith("/") else ()
        mounted = _get(_read_json(folder / "state.json", _DOCUMENT_BYTES), "cgroup_paths")
        paths = set()
        if isinstance(mounted, dict):
            for path in mounted.values():
                # As mounted: /sys/fs/cgroup/CONTROLLER/PATH in v1, /sys/fs/cgroup/PATH in v2 (key "").
                parts = _text(path).split("/")
                if parts[:4] == ["", "sys", "fs", "cgroup"]:
                    below = parts[4:] if list(mounted) == [""] else parts[5:]
                    if below:
                        paths.add("/" + "/".join(below))
        return tuple(sorted(paths))

    def _storage_files(self, facts: Facts) -> Iterator[Path]:
        """The lists of containers that containers/storage keeps: CRI-O's and Podman's."""
        roots = [self.root / storage for storage in _STORAGES]
        if facts.runtime == "podman" and facts.oci_config is not None:
            # Rootless: the list is in the user's home; the root file system lies beside it.
            merged = Path(_text(_get(_json(facts.oci_config.text().encode()), "root", "path")))
            if len(merged.parts) > 4 and ".." not in merged.parts:
                roots.append(self.root / merged.parents[2].relative_to("/"))
        for root in dict.fromkeys(roots):
            for folder in _folders(root):
                if folder.name.endswith("-containers"):
                    yield folder / "containers.json"

    def _storage(self, path: Path) -> dict[str, Facts]:
        try:
            status = path.stat()
        except OSError:
            self._storages.pop(path, None)
            return {}
        version = (status.st_mtime_ns, status.st_size)
        cached = self._storages.get(path)
        if cached is not None and cached[0] == version:
            return cached[1]
        entries = _read_json(path, _STORAGE_BYTES)
        stored = {}
        for entry in entries if isinstance(entries, list) else ():
            container_id = _text(_get(entry, "id"))
            if is_hex_id(container_id):
                stored[container_id] = _storage_facts(entry)
        if len(self._storages) > 64:
            self._storages.clear()
        self._storages[path] = (version, stored)
        return stored


class DiskSource:
    """Tells the table what runtimes left on disk, and finds the cgroups of those that choose any name."""

    name: Final = "disk"

    def __init__(
        self,
        table: ContainerTable,
        runtimes: Runtimes,
        *,
        on_cgroups: Callable[[CgroupOwner, tuple[str, ...]], None] = lambda _owner, _paths: None,
        is_in: Callable[[int, str], bool] = lambda _pid, _container_id: True,
        interval: float = 1.0,
    ) -> None:
        """`on_cgroups`: these cgroups turned out to be a container's, processes may be in them already.

        `is_in`: whether the process of this pid is in the container; the disk's may be of an earlier run.
        """
        self._table = table
        self._runtimes = runtimes
        self._on_cgroups = on_cgroups
        self._is_in = is_in
        self._interval = interval
        self._paths = CgroupPaths()
        self._hosts: dict[str, None] = {}
        self._bare: dict[str, tuple[str, ...]] = {}
        self._pidless: dict[str, asyncio.TimerHandle] = {}

    def owner(self, path: str) -> CgroupOwner | None:
        """The container of a cgroup path, by its form or by what runtimes say; None for the host."""
        owner = owner_of_cgroup(path)
        if owner is not None or path in self._hosts:
            return owner
        owner = self._paths.owner(path)
        if owner is None:
            # By default runc names the cgroup after the container.
            owner = self._runtimes.bare_named(path.rpartition("/")[2])
            if owner is not None:
                self._paths.learn(path, owner)
        if owner is None:
            if len(self._hosts) >= 8192:
                del self._hosts[next(iter(self._hosts))]
            self._hosts[path] = None
        return owner

    def start(self) -> None:
        """From now on answer the table; what is there now is found before this returns."""
        self._table.source_up(self.name, self._resolve)
        self._look()

    def forget(self, container_id: str) -> None:
        """The cgroups of this container are gone."""
        self._paths.forget(container_id)

    async def run(self) -> None:
        """Start, and look for what comes and goes, until cancelled."""
        self.start()
        try:
            while True:
                await asyncio.sleep(self._interval)
                self._look()
        finally:
            self._table.source_down(self.name)
            for handle in self._pidless.values():
                handle.cancel()
            self._pidless.clear()

    def look_up(self, container_id: str) -> Found | None:
        """Tell the table now what the disk knows of a container."""
        found = self._runtimes.find(container_id)
        if found is not None:
            if not self._is_in(found.facts.host_pid, container_id):
                found = replace(found, facts=replace(found.facts, host_pid=0))
            self._table.learn(container_id, self.name, found.facts, persistent=found.persistent)
        return found

    def _resolve(self, container_id: str) -> None:
        found = self.look_up(container_id)
        if found is None or found.facts.host_pid or not found.begins:
            self._table.disclaim(container_id, self.name)
        else:
            if container_id in self._pidless:  # of an earlier run
                self._pidless[container_id].cancel()
            self._await_pid(container_id, time.monotonic())

    def _await_pid(self, container_id: str, since: float) -> None:
        """Until it is written down, the news that the container runs wait, but not for long."""
        # Runtimes do that when the process is in its cgroup, and before it runs the container's program.
        self._pidless.pop(container_id, None)
        pid, waited = self._runtimes.pid(container_id), time.monotonic() - since
        container = self._table.get(container_id)
        if not self._is_in(pid, container_id):
            pid = 0
        if pid and container is not None and container.oci_config is not None:
            self._table.learn(container_id, self.name, Facts(host_pid=pid))
        elif pid:
            self.look_up(container_id)  # a user's container is found by what is written with the pid
        occupied = self._table.occupied(container_id)
        if pid or waited > _PID_WAITS or not occupied:
            self._table.disclaim(container_id, self.name)
        if occupied and not pid and waited < _PID_COMES:
            loop = asyncio.get_running_loop()
            pause = max(0.005, waited / 8)
            self._pidless[container_id] = loop.call_later(pause, self._await_pid, container_id, since)

    def _look(self) -> None:
        bare = {owner.id: (owner, paths) for owner, paths in self._runtimes.bare()}
        for container_id, (owner, paths) in bare.items():
            if self._bare.get(container_id) != paths:
                for path in paths:
                    self._paths.learn(path, owner)
                    self._hosts.clear()  # of what lies below
                self._on_cgroups(owner, paths)
        for container_id in self._bare.keys() - bare.keys():
            self._paths.forget(container_id)
            self._table.removed(container_id, time.time_ns())
        self._bare = {container_id: paths for container_id, (_, paths) in bare.items()}
        for container_id in self._table.kept_on_disk():
            if not self._runtimes.is_kept(container_id):
                self._table.gone(container_id, time.time_ns())


def _annotated(annotations: object, runtime: str) -> Facts:
    """Facts from an OCI bundle's annotations."""
    if not isinstance(annotations, dict):
        return Facts(runtime=runtime)
    labels = _json(_text(annotations.get(_LABELS)).encode())
    if isinstance(labels, dict):
        annotations = {**labels, **annotations}

    def first(keys: Iterable[str]) -> str:
        return next((text for key in keys if (text := _text(annotations.get(key)))), "")

    name = first(_OWN_NAME)
    pod = first(_POD)
    if pod:
        container = "POD" if first(_KIND) == "sandbox" else first(_CONTAINER) or name
        name = "/".join((first(_NAMESPACE) or "default", pod, container))
    manager = _text(annotations.get("io.container.manager"))
    return Facts(
        name=_slashed(name),
        image_name=first(_IMAGE),
        image_id=next((one for key in _IMAGE_ID if (one := _image_id(_text(annotations.get(key))))), ""),
        runtime={"libpod": "podman", "cri-o": "cri-o"}.get(manager, runtime),
    )


def _docker_facts(config: object) -> Facts:
    pid = _get(config, "State", "Pid")
    return Facts(
        name=_slashed(_text(_get(config, "Name"))),
        image_id=_image_id(_text(_get(config, "Image"))),
        image_name=_text(_get(config, "Config", "Image")),
        runtime="docker",
        host_pid=pid if isinstance(pid, int) and 0 < pid < 1 << 22 else 0,
    )


def _storage_facts(entry: object) -> Facts:
    metadata = _json(_text(_get(entry, "metadata")).encode())
    names = _get(entry, "names")
    name = _text(names[0]) if isinstance(names, list) and names else ""
    return Facts(
        name=_slashed(_text(_get(metadata, "name")) or name),
        image_id=_image_id(_text(_get(entry, "image")) or _text(_get(metadata, "image-id"))),
        image_name=_text(_get(metadata, "image-name")),
    )


def _join(facts: Facts, more: Facts) -> Facts:
    """The first's facts, and the second's where it has none."""
    return Facts(
        name=facts.name or more.name,
        image_id=facts.image_id or more.image_id,
        image_name=facts.image_name or more.image_name,
        runtime=facts.runtime or more.runtime,
        host_pid=facts.host_pid or more.host_pid,
        oci_config=facts.oci_config or more.oci_config,
    )


def _pid(folder: Path) -> int:
    """containerd's shim writes init.pid, CRI-O and Podman pidfile."""
    for name in ("init.pid", "pidfile"):
        raw = _read(folder / name, 64)
        if raw is not None and raw.strip().isdigit():
            return int(raw)
    return 0


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and text not in (".", "..")


def _slashed(name: str) -> str:
    """Every name begins with '/', as Docker's do."""
    return name if not name or name.startswith("/") else f"/{name}"


def _image_id(text: str) -> str:
    digits = image_id_of(text.rpartition("@")[2])
    return digits if is_hex_id(digits) else ""


def _text(value: object) -> str:
    return value[:_TEXT_LIMIT].encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _get(document: object, *path: str) -> Any:
    for key in path:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # not for us to see
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _folders(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir()]
    except OSError:
        return []


def _json(raw: bytes | None) -> Any:
    if not raw:
        return None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _read_json(path: Path, limit: int) -> Any:
    return _json(_read(path, limit))


def _read(path: Path, limit: int) -> bytes | None:
    """A regular file of at most `limit` bytes; None for anything else, without ever waiting."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            return None
        with os.fdopen(fd, "rb", closefd=False) as file:
            raw = file.read(limit + 1)
    except OSError:
        return None
    finally:
        os.close(fd)
    return raw if len(raw) <= limit else None
