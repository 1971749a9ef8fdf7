"""What runtimes leave on disk, from trees laid out as each of them does."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from ringside.sensor.cgroup import CgroupOwner
from ringside.sensor.container import ContainerState, ContainerTable, Facts, Transition
from ringside.sensor.runtimes import DiskSource, Found, Runtimes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

UNKNOWN, CREATED, RUNNING, EXITED, DESTROYED = ContainerState
A, B = (digit * 64 for digit in "ab")
IMAGE = "d" * 64


def put(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def bundle(folder: Path, annotations: dict[str, str] | None = None, pid: int = 0, **more: Any) -> None:
    put(folder / "config.json", {"ociVersion": "1.0.2", "annotations": annotations or {}, **more})
    if pid:
        put(folder / "init.pid", str(pid))


def told(found: Found | None) -> tuple[str, str, str, str, int]:
    assert found is not None
    facts = found.facts
    return facts.name, facts.image_name, facts.image_id, facts.runtime, facts.host_pid


CRI = {
    "io.kubernetes.cri.container-name": "dns",
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.image-name": "registry.k8s.io/coredns/coredns:v1.11.1",
    "io.kubernetes.cri.sandbox-name": "coredns-5d78c9869d-abcde",
    "io.kubernetes.cri.sandbox-namespace": "kube-system",
    "io.kubernetes.cri.sandbox-id": B,
}


@pytest.mark.parametrize(
    "state",
    [
        "run/containerd",
        "run/k3s/containerd",
        "var/snap/microk8s/common/run/containerd",
    ],
)
def test_kubernetes_on_containerd(tmp_path: Path, state: str) -> None:
    bundle(tmp_path / state / "io.containerd.runtime.v2.task/k8s.io" / A, CRI, 42)
    pause = {
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-name": "coredns-5d78c9869d-abcde",
        "io.kubernetes.cri.sandbox-namespace": "kube-system",
        "io.kubernetes.cri.podsandbox.image-name": "registry.k8s.io/pause:3.10",
    }
    bundle(tmp_path / state / "io.containerd.runtime.v2.task/k8s.io" / B, pause)
    runtimes = Runtimes(tmp_path)
    name = "/kube-system/coredns-5d78c9869d-abcde"
    image = "registry.k8s.io/coredns/coredns:v1.11.1"
    assert told(runtimes.find(A)) == (f"{name}/dns", image, "", "containerd", 42)
    assert told(runtimes.find(B)) == (f"{name}/POD", "registry.k8s.io/pause:3.10", "", "containerd", 0)
    found = runtimes.find(A)
    assert found is not None
    assert not found.persistent
    assert found.facts.oci_config is not None
    assert json.loads(found.facts.oci_config.text())["annotations"] == CRI
    assert runtimes.oci_config(A) == runtimes.running(A).oci_config == found.facts.oci_config
    assert runtimes.running(A).host_pid == 42


def test_nerdctl(tmp_path: Path) -> None:
    bundle(
        tmp_path / "run/containerd/io.containerd.runtime.v2.task/default" / A,
        {"nerdctl/name": "web", "nerdctl/namespace": "default"},
    )
    assert told(Runtimes(tmp_path).find(A))[0] == "/web"


def test_ctr_has_names_for_ids(tmp_path: Path) -> None:
    bundle(tmp_path / "run/containerd/io.containerd.runtime.v2.task/default/redis")
    assert told(Runtimes(tmp_path).find("redis")) == ("", "", "", "containerd", 0)


STORED = {
    "id": A,
    "names": ["k8s_web_shop-1_default_9ae8_0"],
    "image": IMAGE,
    "metadata": json.dumps({"image-name": "quay.io/shop/web:3", "image-id": IMAGE, "name": "k8s_web_shop-1"}),
}


def test_cri_o(tmp_path: Path) -> None:
    bundle(
        tmp_path / "run/containers/storage/overlay-containers" / A / "userdata",
        {
            "io.container.manager": "cri-o",
            "io.kubernetes.cri-o.Name": "k8s_web_shop-1_default_9ae8_0",
            "io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.cri-o.ImageName": "quay.io/shop/web:3",
            "io.kubernetes.cri-o.ImageRef": f"quay.io/shop/web@sha256:{IMAGE}",
            "io.kubernetes.cri-o.Labels": json.dumps(
                {
                    "io.kubernetes.container.name": "web",
                    "io.kubernetes.pod.name": "shop-1",
                    "io.kubernetes.pod.namespace": "default",
                }
            ),
        },
    )
    put(tmp_path / "run/containers/storage/overlay-containers" / A / "userdata/pidfile", "77\n")
    found = Runtimes(tmp_path).find(A)
    assert told(found) == ("/default/shop-1/web", "quay.io/shop/web:3", IMAGE, "cri-o", 77)


def test_podman(tmp_path: Path) -> None:
    bundle(
        tmp_path / "var/lib/containers/storage/overlay-containers" / A / "userdata",
        {"io.container.manager": "libpod"},
    )
    put(tmp_path / "run/containers/storage/overlay-containers" / A / "userdata/pidfile", "77")
    stored = STORED | {"metadata": json.dumps({"image-name": "docker.io/library/nginx:1", "name": "web"})}
    put(tmp_path / "var/lib/containers/storage/overlay-containers/containers.json", [stored, None, {"id": 5}])
    runtimes = Runtimes(tmp_path)
    assert told(runtimes.find(A)) == ("/web", "docker.io/library/nginx:1", IMAGE, "podman", 77)
    assert runtimes.running(A).host_pid == 77
    assert runtimes.oci_config(A) is not None
    found = runtimes.find(A)
    assert found is not None
    assert found.persistent
    assert runtimes.is_kept(A)
    assert not runtimes.is_kept(B)
    put(tmp_path / "var/lib/containers/storage/overlay-containers/containers.json", "[]")
    assert not runtimes.is_kept(A)


def test_rootless_podman(tmp_path: Path) -> None:
    """The low-level runtime's state leads to the user's home."""
    storage = "home/me/.local/share/containers/storage"
    userdata = f"{storage}/overlay-containers/{A}/userdata"
    put(tmp_path / "run/user/1000/crun" / A / "status", {"pid": 5, "bundle": f"/{userdata}"})
    bundle(
        tmp_path / userdata,
        {"io.container.manager": "libpod"},
        root={"path": f"/{storage}/overlay/cafe/merged"},
    )
    put(tmp_path / storage / "overlay-containers/containers.json", [STORED])
    runtimes = Runtimes(tmp_path)
    assert not runtimes.is_kept(A)
    found = runtimes.find(A)
    assert told(found) == ("/k8s_web_shop-1", "quay.io/shop/web:3", IMAGE, "podman", 5)
    assert runtimes.is_kept(A)


def test_docker(tmp_path: Path) -> None:
    put(
        tmp_path / "var/lib/docker/containers" / A / "config.v2.json",
        {
            "Name": "/web",
            "Image": f"sha256:{IMAGE}",
            "Config": {"Image": "nginx"},
            "State": {"Pid": 9, "Running": True},
        },
    )
    bundle(tmp_path / "run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby" / A, pid=9)
    put(tmp_path / "run/docker/runtime-runc/moby" / A / "state.json", {"init_process_pid": 9})
    found = Runtimes(tmp_path).find(A)
    assert told(found) == ("/web", "nginx", IMAGE, "docker", 9)
    assert found is not None
    assert found.persistent
    assert found.facts.oci_config is not None


def test_a_further_place(tmp_path: Path) -> None:
    bundle(tmp_path / "elsewhere/tasks/moby" / A, pid=5)
    more = (("docker", str(tmp_path / "elsewhere/tasks/*/{id}")),)
    assert Runtimes(tmp_path / "root", more).running(A).host_pid == 5


RUNC_V1 = {
    "id": "web",
    "init_process_pid": 11,
    "cgroup_paths": {
        "memory": "/sys/fs/cgroup/memory/any/where",
        "cpu": "/sys/fs/cgroup/cpu/any/where",
        "odd": 5,
    },
    "config": {"labels": ["bundle=/srv/web", "x"]},
}
RUNC_V2 = {"id": "job", "init_process_pid": 12, "cgroup_paths": {"": "/sys/fs/cgroup/any/job"}}
CRUN = {"pid": 13, "cgroup-path": "/any/box", "bundle": "/srv/box"}


def test_bare_runtimes(tmp_path: Path) -> None:
    put(tmp_path / "run/runc/web/state.json", RUNC_V1)
    put(tmp_path / "run/runc/job/state.json", RUNC_V2)
    put(tmp_path / "run/crun/box/status", CRUN)
    put(tmp_path / "run/runc/new/other", "")
    bundle(tmp_path / "srv/web", {"org.opencontainers.image.ref.name": "web:1"})
    runtimes = Runtimes(tmp_path)
    assert told(runtimes.find("web")) == ("", "web:1", "", "runc", 11)
    assert told(runtimes.find("box")) == ("", "", "", "crun", 13)
    assert sorted(runtimes.bare(), key=lambda one: one[0].id) == [
        (CgroupOwner("box", "crun"), ("/any/box",)),
        (CgroupOwner("job", "runc"), ("/any/job",)),
        (CgroupOwner("web", "runc"), ("/any/where",)),
    ]
    assert runtimes.bare_named("new") == CgroupOwner("new", "runc")
    assert runtimes.bare_named("nobody") is None


@pytest.mark.parametrize("name", ["", ".", "..", "../etc", "a/b", "*", "a\0b", "x" * 2000, "ü"])
def test_ids_that_are_none(tmp_path: Path, name: str) -> None:
    bundle(tmp_path / "run/containerd/io.containerd.runtime.v2.task/default/redis")
    runtimes = Runtimes(tmp_path)
    assert runtimes.find(name) is None
    assert runtimes.oci_config(name) is None
    assert runtimes.running(name) == Facts()
    assert runtimes.bare_named(name) is None
    assert not runtimes.is_kept(name)


@pytest.mark.parametrize(
    "content",
    ["", "null", "[]", "5", "[" * 100_000, '{"annotations": []}', '{"annotations": {"a": 5}}', "\x00"],
)
def test_nonsense_on_disk(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "run/containerd/io.containerd.runtime.v2.task/k8s.io" / A
    put(folder / "config.json", content)
    put(folder / "init.pid", "many")
    put(tmp_path / "var/lib/docker/containers" / A / "config.v2.json", content)
    put(tmp_path / "var/lib/containers/storage/overlay-containers/containers.json", content)
    put(tmp_path / "run/runc/web/state.json", content)
    runtimes = Runtimes(tmp_path)
    assert told(runtimes.find(A))[:3] == ("", "", "")
    assert list(runtimes.bare()) == []
    assert told(runtimes.find("web"))[3] == "runc"


def test_files_that_would_block_or_lead_elsewhere(tmp_path: Path) -> None:
    for container_id in (A, B):
        state = {"bundle": f"/home/me/{container_id}"}
        put(tmp_path / "run/user/1000/crun" / container_id / "status", state)
        (tmp_path / "home/me" / container_id).mkdir(parents=True)
        (tmp_path / "run/user/1000/containers/overlay-containers" / container_id / "userdata").mkdir(
            parents=True
        )
    put(tmp_path / "secret", {"annotations": {"nerdctl/name": "stolen"}})
    put(tmp_path / "number", "5")
    os.mkfifo(tmp_path / "home/me" / A / "config.json")
    (tmp_path / "home/me" / B / "config.json").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "run/user/1000/containers/overlay-containers" / A / "userdata/pidfile")
    pidfile = tmp_path / "run/user/1000/containers/overlay-containers" / B / "userdata/pidfile"
    pidfile.symlink_to(tmp_path / "number")
    runtimes = Runtimes(tmp_path)
    for container_id in (A, B):
        found = runtimes.find(container_id)
        assert found is not None
        assert (found.facts.name, found.facts.oci_config, found.facts.host_pid) == ("", None, 0)


def test_documents_that_are_too_long(tmp_path: Path) -> None:
    folder = tmp_path / "run/containerd/io.containerd.runtime.v2.task/k8s.io" / A
    put(folder / "config.json", json.dumps({"annotations": CRI, "x": "y" * 2_000_000}))
    assert told(Runtimes(tmp_path).find(A))[0] == ""


class Watch:
    def __init__(self, table: ContainerTable) -> None:
        self.told: list[Transition] = []
        self.news = asyncio.Event()
        table.on_transition.append(self._note)

    def _note(self, transition: Transition) -> None:
        self.told.append(transition)
        self.news.set()

    async def until_kinds(self, *kinds: ContainerState) -> None:
        async with asyncio.timeout(20):
            while [step.kind for step in self.told] != list(kinds):
                self.news.clear()
                await self.news.wait()


async def test_the_disk_as_a_witness(tmp_path: Path) -> None:
    storage = tmp_path / "var/lib/containers/storage/overlay-containers/containers.json"
    bundle(tmp_path / "var/lib/containers/storage/overlay-containers" / A / "userdata")
    put(tmp_path / "run/containers/storage/overlay-containers" / A / "userdata/pidfile", "42")
    put(storage, [STORED])
    table = ContainerTable()
    watch = Watch(table)
    source = DiskSource(table, Runtimes(tmp_path), interval=0.01)
    task = asyncio.create_task(source.run())
    await asyncio.sleep(0)
    table.seen(A, 1)
    table.seen(B, 1)
    assert table.settled(A)
    await watch.until_kinds(CREATED, RUNNING, CREATED, RUNNING)
    assert watch.told[0].container.name == "/k8s_web_shop-1"
    assert watch.told[0].container.oci_config_json
    assert watch.told[2].container.name == ""
    watch.told.clear()
    table.removed(A, 2)
    await watch.until_kinds(EXITED)
    put(storage, "[]")
    await watch.until_kinds(EXITED, DESTROYED)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@asynccontextmanager
async def witnessed(root: Path, **options: Any) -> AsyncIterator[tuple[ContainerTable, Watch]]:
    table = ContainerTable()
    watch = Watch(table)
    task = asyncio.create_task(DiskSource(table, Runtimes(root), interval=0.01, **options).run())
    await asyncio.sleep(0)
    try:
        yield table, watch
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_the_pid_is_written_after_the_first_process_is_there(tmp_path: Path) -> None:
    """As runc's shims do: news of the container wait for it, but not for long."""
    tasks = tmp_path / "run/containerd/io.containerd.runtime.v2.task/k8s.io"
    bundle(tasks / A, CRI)
    bundle(tasks / B, CRI)
    async with witnessed(tmp_path) as (table, watch):
        table.seen(A, 1)
        assert watch.told == []
        put(tasks / A / "init.pid", "42")
        await watch.until_kinds(CREATED, RUNNING)
        assert watch.told[1].container.host_pid == 42
        watch.told.clear()
        table.seen(B, 1)
        await watch.until_kinds(CREATED, RUNNING)
        assert watch.told[1].container.host_pid == 0
        put(tasks / B / "init.pid", "43")
        known = asyncio.Event()
        table.on_change.append(lambda container: known.set() if container.host_pid == 43 else None)
        async with asyncio.timeout(20):
            await known.wait()
        assert len(watch.told) == 2


async def test_rootless_podman_from_its_first_process_on(tmp_path: Path) -> None:
    """What leads to the user's home is written last."""
    storage = f"home/me/.local/share/containers/storage/overlay-containers/{A}/userdata"
    run = tmp_path / "run/user/1000"
    bundle(tmp_path / storage, {"nerdctl/name": "mine"})
    userdata = run / "containers/overlay-containers" / A / "userdata"
    userdata.mkdir(parents=True)
    async with witnessed(tmp_path) as (table, watch):
        table.seen(A, 1)
        assert watch.told == []
        put(run / "runc" / A / "state.json", {"config": {"labels": [f"bundle=/{storage}"]}})
        put(userdata / "pidfile", "42")
        await watch.until_kinds(CREATED, RUNNING)
        assert watch.told[0].container.name == "/mine"
        assert watch.told[1].container.host_pid == 42


async def test_a_pid_of_an_earlier_run(tmp_path: Path) -> None:
    """Podman leaves it when the container has ended, and it is another process's by now, or nobody's."""
    tasks = tmp_path / "run/containerd/io.containerd.runtime.v2.task/k8s.io"
    bundle(tasks / A, CRI, 41)
    async with witnessed(tmp_path, is_in=lambda pid, container: (pid, container) == (42, A)) as (
        table,
        watch,
    ):
        table.seen(A, 1)
        assert watch.told == []
        put(tasks / A / "init.pid", "42")
        await watch.until_kinds(CREATED, RUNNING)
        assert watch.told[1].container.host_pid == 42


@pytest.mark.parametrize("kind", ["containers", "sandboxes"])
async def test_containerd_keeps_what_a_kubelet_has_not_removed(tmp_path: Path, kind: str) -> None:
    state = tmp_path / "run/containerd"
    bundle(state / "io.containerd.runtime.v2.task/k8s.io" / A, CRI, 42)
    kept = state / "io.containerd.grpc.v1.cri" / kind / A
    kept.mkdir(parents=True)
    async with witnessed(tmp_path) as (table, watch):
        table.seen(A, 1)
        await watch.until_kinds(CREATED, RUNNING)
        table.removed(A, 2)
        await watch.until_kinds(CREATED, RUNNING, EXITED)
        assert table.kept_on_disk() == [A]
        kept.rmdir()
        await watch.until_kinds(CREATED, RUNNING, EXITED, DESTROYED)


async def test_cgroups_of_runtimes_run_by_hand(tmp_path: Path) -> None:
    table = ContainerTable()
    watch = Watch(table)
    learned: list[tuple[str, tuple[str, ...]]] = []
    news = asyncio.Event()

    def on_cgroups(owner: CgroupOwner, paths: tuple[str, ...]) -> None:
        learned.append((owner.id, paths))
        news.set()

    source = DiskSource(table, Runtimes(tmp_path), on_cgroups=on_cgroups, interval=0.01)
    assert source.owner("/any/where") is None
    assert source.owner("/user.slice/early") is None
    (tmp_path / "run/runc/named").mkdir(parents=True)
    assert source.owner("/user.slice/named") == CgroupOwner("named", "runc"), "it names its cgroup"
    assert source.owner(f"/docker/{A}") == CgroupOwner(A, "docker")
    put(tmp_path / "run/runc/web/state.json", RUNC_V1)
    task = asyncio.create_task(source.run())
    async with asyncio.timeout(20):
        await news.wait()
    assert learned == [("web", ("/any/where",))]
    assert source.owner("/any/where") == source.owner("/any/where/below") == CgroupOwner("web", "runc")
    table.seen("web", 1)
    (tmp_path / "run/runc/web/state.json").unlink()
    await watch.until_kinds(CREATED, RUNNING, EXITED, DESTROYED)
    assert source.owner("/any/where") is None
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
