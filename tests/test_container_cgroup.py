"""Cgroup paths as real machines show them, and paths that must not be taken for containers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.sensor.cgroup import (
    Attach,
    CgroupOwner,
    CgroupPaths,
    attached,
    owner_from_proc_cgroup,
    owner_of_cgroup,
)

A = "4f797c539e6c745de61a93ca3ff892358ecbcaccd8414d5db545c38428142970"
B = "9ec39b91f3d70e1beff50a308f77067065ea6be0d91a3378375056cd4422cf3d"
UID = "74ba62da-1a3d-11e7-bb11-080027cb0e22"
UID_ = UID.replace("-", "_")
STATIC = "8cc69e30e0ba4a1baa6be2fcd0ef9c93"  # a static pod's uid: a hash of its manifest
SLICE = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice"
USER = "/user.slice/user-1000.slice/user@1000.service"

CONTAINERS = [
    # Docker
    (f"/docker/{A}", "docker", ""),
    (f"/system.slice/docker-{A}.scope", "docker", ""),
    (f"/docker/{A}/init.scope", "docker", ""),
    (f"/docker/{A}/system.slice/sshd.service", "docker", ""),
    (f"/system.slice/docker-{A}.scope/init", "docker", ""),
    (f"{USER}/user.slice/docker-{A}.scope", "docker", ""),
    (f"/mygroup.slice/docker-{A}.scope", "docker", ""),
    (f"/{A}", "unknown", ""),
    (f"/mygroup/{A}", "unknown", ""),
    (f"/actions_job/{A}", "unknown", ""),
    (f"/ecs/2c3d-task/{A}", "unknown", ""),
    (f"/moby/{A}", "containerd", ""),
    (f"/system.slice/docker-{A}.scope (deleted)", "docker", ""),
    # seen from a sensor in a cgroup namespace of its own
    (f"/../{A}", "unknown", ""),
    (f"/../../docker/{A}", "docker", ""),
    (f"/../docker-{A}.scope", "docker", ""),
    # Kubernetes with containerd, both drivers, each quality of service
    (f"/kubepods/besteffort/pod{UID}/{A}", "containerd", UID),
    (f"/kubepods/burstable/pod{UID}/{A}", "containerd", UID),
    (f"/kubepods/pod{UID}/{A}", "containerd", UID),
    (f"/kubepods/burstable/pod{STATIC}/{A}", "containerd", STATIC),
    (f"/kubepods/besteffort/pod{UID}/{A}/kube-proxy", "containerd", UID),
    (f"{SLICE}/cri-containerd-{A}.scope", "containerd", UID),
    (f"/kubepods.slice/kubepods-pod{UID_}.slice/cri-containerd-{A}.scope", "containerd", UID),
    (
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice/docker-{A}.scope",
        "docker",
        UID,
    ),
    (
        f"/system.slice/containerd.service/kubepods-burstable-pod{UID_}.slice:cri-containerd:{A}",
        "containerd",
        UID,
    ),
    (f"/kubepods-besteffort-pod{UID_}.slice:cri-containerd:{A}", "containerd", UID),
    (f"/k8s.io/{A}", "containerd", ""),
    (f"/default/{A}", "containerd", ""),
    (f"/system.slice/nerdctl-{A}.scope", "containerd", ""),
    # CRI-O; crun puts the container one level down
    (f"{SLICE}/crio-{A}.scope", "cri-o", UID),
    (f"{SLICE}/crio-{A}.scope/container", "cri-o", UID),
    (f"/kubepods/burstable/pod{UID}/crio-{A}", "cri-o", UID),
    # Podman: root, rootless, in a pod, cgroupfs, --cgroups=split
    (f"/machine.slice/libpod-{A}.scope", "podman", ""),
    (f"/machine.slice/libpod-{A}.scope/container", "podman", ""),
    (f"{USER}/user.slice/libpod-{A}.scope/container", "podman", ""),
    (f"/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope", "podman", ""),
    (f"/libpod_parent/libpod-{A}", "podman", ""),
    (f"/libpod_parent/{B}/libpod-{A}", "podman", ""),
    (f"/system.slice/web.service/libpod-payload-{A}", "podman", ""),
    # a runtime that nobody has heard of, in the form that everybody uses
    (f"/system.slice/sandboxd-{A}.scope", "unknown", ""),
]

NAMED = [
    ("/system.slice/runc-web.scope", "web", "runc"),
    ("/user.slice/crun-my.box.scope", "my.box", "crun"),
    ("/default/redis", "redis", "containerd"),
    ("/lxc/web", "web", "lxc"),
    ("/lxc.payload/web/init.scope", "web", "lxc"),
    ("/lxc.payload.web", "web", "lxc"),
    ("/lxc.payload.web/system.slice/cron.service", "web", "lxc"),
]

HOST = [
    "",
    "/",
    "/..",
    "/init.scope",
    "/user/1000.user/c2.session",
    "/system.slice/docker.service",
    "/system.slice/docker.socket",
    "/system.slice/containerd.service",
    f"{USER}/app.slice/app-gnome-1.scope",
    "/user.slice/user-0.slice/session-4.scope",
    "/docker",
    "/docker/buildkit",
    "/kubepods.slice",
    f"/kubepods/burstable/pod{UID}",
    SLICE,
    "/kubelet",
    # monitors carry their container's id and are not in it
    f"{SLICE}/crio-conmon-{A}.scope",
    f"/kubepods/burstable/pod{UID}/crio-conmon-{A}",
    f"/machine.slice/libpod-conmon-{A}.scope",
    f"{USER}/user.slice/libpod-conmon-{A}.scope",
    "/libpod_parent/conmon",
    f"/libpod_parent/{A}",
    f"/libpod_parent/{A}/conmon",
    f"/machine.slice/machine-libpod_pod_{A}.slice",
    "/lxc.monitor.web",
    "/lxc.monitor/web",
    "/lxc.pivot",
    # a mount of a container is made by the host
    f"/system.slice/var-lib-docker-containers-{A}-mounts-shm.mount",
    # systemd-nspawn is a machine, not a container with an image
    "/machine.slice/machine-debian.scope",
    "/machine.slice/systemd-nspawn@debian.service/payload",
    # almost ids
    f"/docker/{A[:63]}",
    f"/docker/{A}0",
    f"/docker/{A.upper()}",
    f"/system.slice/docker-{A[:12]}.scope",
]


@pytest.mark.parametrize(("path", "runtime", "pod_uid"), CONTAINERS)
def test_container_paths(path: str, runtime: str, pod_uid: str) -> None:
    assert owner_of_cgroup(path) == CgroupOwner(A, runtime, pod_uid)


@pytest.mark.parametrize(("path", "name", "runtime"), NAMED)
def test_containers_with_names_for_ids(path: str, name: str, runtime: str) -> None:
    assert owner_of_cgroup(path) == CgroupOwner(name, runtime)


@pytest.mark.parametrize("path", HOST)
def test_host_paths(path: str) -> None:
    assert owner_of_cgroup(path) is None


@pytest.mark.parametrize(
    "path",
    [
        f"/docker/{B}/docker/{A}",
        f"/system.slice/docker-{B}.scope/docker/{A}",
        f"/docker/{B}/kubelet/kubepods/burstable/pod{UID}/{A}",
        f"/system.slice/docker-{B}.scope/kubelet.slice/kubelet-kubepods.slice/cri-containerd-{A}.scope",
        f"/machine.slice/libpod-{B}.scope/container/libpod_parent/libpod-{A}",
        f"/lxc.payload.{B}/docker/{A}",
        f"/kubepods/pod{UID}/{B}/docker/{A}/system.slice/x.service",
    ],
)
def test_the_innermost_container_is_the_one(path: str) -> None:
    owner = owner_of_cgroup(path)
    assert owner is not None
    assert (owner.id, owner.outer) == (A, (B,))


def test_a_monitor_inside_a_container_belongs_to_the_container_around_it() -> None:
    owner = owner_of_cgroup(f"/docker/{B}/libpod-conmon-{A}.scope")
    assert owner is not None
    assert owner.id == B


V1 = "\n".join(
    f"{number}:{name}:/docker/{A}"
    for number, name in enumerate(["cpu,cpuacct", "memory", "pids", "name=systemd"], start=1)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"0::/system.slice/docker-{A}.scope\n", A),
        ("0::/\n", None),
        ("", None),
        ("garbage\n::\n0:\n", None),
        (V1, A),
        # hybrid, with a runc that does not enter the unified hierarchy
        (V1 + "\n0::/system.slice/containerd.service\n", A),
        (V1 + f"\n0::/docker/{A}\n", A),
        # one controller moved elsewhere does not take the process out of its container
        (f"1:cpuset:/\n2:net_cls:/vpn\n3:name=systemd:/docker/{A}\n0::/\n", A),
        # Docker in Docker whose inner engine has only some hierarchies
        (f"1:name=systemd:/docker/{B}\n2:memory:/docker/{B}/docker/{A}\n", A),
        # hierarchies that disagree: systemd's is believed
        (f"1:cpuset:/docker/{B}\n2:name=systemd:/docker/{A}\n", A),
        (f"1:name=systemd:/docker/{A}\n2:cpuset:/docker/{B}\n", A),
        (f"5:cpu,cpuacct:/system.slice/cd.service/x.slice:cri-containerd:{A}\n", A),
    ],
)
def test_proc_cgroup(text: str, expected: str | None) -> None:
    owner = owner_from_proc_cgroup(text)
    assert (owner.id if owner else None) == expected


def test_learned_paths_cover_what_is_below_them_and_yield_to_a_container_inside() -> None:
    paths = CgroupPaths(limit=2)
    box = CgroupOwner("box", "runc")
    paths.learn("/anywhere/box", box)
    paths.learn("/", CgroupOwner("everything", "runc"))
    assert paths.owner("/anywhere/box") == box
    assert paths.container_id("/anywhere/box/child/grandchild") == "box"
    assert paths.owner("/anywhere") is None
    assert paths.owner("/anywhere/boxes") is None
    assert paths.container_id(f"/anywhere/box/docker/{A}") == A
    paths.learn("/second", CgroupOwner("second", "runc"))
    paths.learn("/third", CgroupOwner("third", "runc"))
    assert paths.owner("/anywhere/box") is None, "the oldest goes when the limit is reached"
    paths.forget("third")
    assert paths.owner("/third") is None


def test_attach_records() -> None:
    assert attached(None, A) == A
    assert attached(None, None) is None
    assert attached(A, A) == A
    assert attached(A, None) is Attach.REREAD
    assert attached(A, B) is Attach.REREAD


COMPONENT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["docker", "kubepods", "lxc", "default", "..", "libpod_parent", A, f"docker-{B}.scope"]),
    st.from_regex(r"(docker-|crio-|lxc\.payload\.|)[0-9a-f]{0,70}(\.scope)?", fullmatch=True),
)


@given(st.lists(COMPONENT, max_size=8))
def test_any_path_gets_an_answer_that_is_part_of_it(components: list[str]) -> None:
    path = "/" + "/".join(components)
    owner = owner_of_cgroup(path)
    if owner is not None:
        assert owner.id
        assert owner.id in path
        for outer in owner.outer:
            assert outer in path


@given(st.text(max_size=400))
def test_any_text_gets_an_answer(text: str) -> None:
    owner_from_proc_cgroup(text)
