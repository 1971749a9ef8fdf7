"""Pods on cgroup v2 and under AppArmor, by containerd as a kubelet speaks to it, inside a guest.

Among them deploy/kubernetes.yaml's, from the file itself: what a kubelet makes of a pod is written here as
far as that pod goes. Not named test_*.py, for it belongs inside a guest: test_containers.py has pytest run
it there.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from ringside.client import kernel

from tests.docker import cri
from tests.docker.containerd import Containerd
from tests.docker.test_containerd import test_a_pods_whole_life, test_exec_and_kill

from .containers import PATIENCE, SCRIPT, SOCKET, TOP, told_of

yaml: Any = pytest.importorskip("yaml")

PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
PROGRAM = str(Path(sys.executable).with_name("ringside"))
# what a kubelet has hidden from every container that doesn't ask for it
MASKED = ("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list")
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}

__all__ = ["test_a_pods_whole_life", "test_exec_and_kill"]


def bytes_of(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def namespaces(spec: dict[str, Any]) -> dict[str, int]:
    return {
        "network": cri.NODE if spec.get("hostNetwork") else cri.POD,
        "pid": cri.NODE if spec.get("hostPID") else cri.CONTAINER,
        "ipc": cri.NODE if spec.get("hostIPC") else cri.POD,
    }


def sandbox(name: str, namespace: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a pod's sandbox."""
    uid = str(uuid.uuid4())
    return {
        "metadata": {"name": name, "uid": uid, "namespace": namespace},
        "log_directory": f"/run/results/{name}",
        "linux": {
            "cgroup_parent": f"/kubepods/burstable/pod{uid}",
            "security_context": {"namespace_options": namespaces(spec)},
        },
    }


def container(spec: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a container, but for its image."""
    context = one["securityContext"]
    assert not context["privileged"]
    volumes = {volume["name"]: volume["hostPath"] for volume in spec["volumes"]}
    mounts = []
    for mount in one["volumeMounts"]:
        host = volumes[mount["name"]]
        if host["type"] == "DirectoryOrCreate":
            Path(host["path"]).mkdir(parents=True, exist_ok=True)
        assert Path(host["path"]).is_dir()
        mounts.append(
            {
                "container_path": mount["mountPath"],
                "host_path": host["path"],
                "readonly": mount.get("readOnly", False),
                "propagation": cri.PROPAGATION[mount.get("mountPropagation", "None")],
            }
        )
    cpu = one["resources"]["requests"]["cpu"]
    assert cpu.endswith("m")
    return {
        "metadata": {"name": one["name"]},
        "args": one["args"],
        "mounts": mounts,
        "log_path": f"{one['name']}.log",
        "linux": {
            "resources": {
                "cpu_shares": int(cpu[:-1]) * 1024 // 1000,
                "memory_limit_in_bytes": bytes_of(one["resources"]["limits"]["memory"]),
            },
            "security_context": {
                "capabilities": {
                    "add_capabilities": context["capabilities"]["add"],
                    "drop_capabilities": context["capabilities"]["drop"],
                },
                "namespace_options": namespaces(spec),
                "run_as_user": {"value": context["runAsUser"]},
                "readonly_rootfs": context["readOnlyRootFilesystem"],
                "no_new_privs": not context["allowPrivilegeEscalation"],
                "masked_paths": MASKED,
                "readonly_paths": READ_ONLY,
                "seccomp": {"profile_type": cri.PROFILE[context["seccompProfile"]["type"]]},
                "apparmor": {"profile_type": cri.PROFILE[context["appArmorProfile"]["type"]]},
                "apparmor_profile": context["appArmorProfile"]["type"].lower(),  # for older runtimes
            },
        },
    }


def manifest() -> dict[str, Any]:
    """The spec of the pods that deploy/kubernetes.yaml's DaemonSet is to make."""
    documents = list(yaml.safe_load_all((TOP / "deploy/kubernetes.yaml").read_text()))
    (daemons,) = [one for one in documents if one["kind"] == "DaemonSet"]
    spec = daemons["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


@asynccontextmanager
async def sensing(containerd: Containerd, *more: str) -> AsyncIterator[str]:
    """The manifest's pod, ready, with these capabilities too; its container's id.

    The image's files are this guest's, for the image takes minutes to build in an emulator.
    """
    spec = manifest()
    (one,) = spec["containers"]
    config = container(spec, one)
    config["linux"]["security_context"]["capabilities"]["add_capabilities"] += more
    paths = {sys.base_prefix, sys.prefix, str(TOP), *(f"/{name}" for name in ("usr", "lib", "lib64", "etc"))}
    config["mounts"] += [
        {"container_path": path, "host_path": path, "readonly": True} for path in sorted(paths)
    ]
    config["envs"] = [{"key": "RINGSIDE_HOST_ROOT", "value": "/host"}]  # as the image says
    pod = await containerd.run_pod(sandbox("ringside-x7k2p", "ringside", spec))
    sensor = await containerd.create(pod, one["name"], PROGRAM, **config)
    await containerd.start_container(sensor)
    try:
        async with asyncio.timeout(PATIENCE):
            probe = one["readinessProbe"]["exec"]["command"]
            while (await containerd.execute(sensor, *probe))[1]:  # noqa: ASYNC110, a kubelet asks so, too
                await asyncio.sleep(0.5)
        yield sensor
    finally:
        await containerd.stop_container(sensor, 30)
        code = await containerd.wait(sensor)
        log = Path(pod.config["log_directory"], config["log_path"]).read_text()
        await containerd.end(pod)
    assert code == 0, log
    assert not SOCKET.exists()
    assert Path("/sys/kernel/tracing/dynamic_events").read_text() == ""


@pytest.mark.parametrize(
    ("paranoid", "more"), [("2", ()), ("3", ("SYS_ADMIN",))], ids=["as it is", "with SYS_ADMIN"]
)
async def test_the_manifest(containerd: Containerd, paranoid: str, more: tuple[str, ...]) -> None:
    PARANOID.write_text(paranoid)
    async with sensing(containerd, *more) as sensor:
        said, status = await containerd.execute(sensor, PROGRAM, "check", "--json")
        rows = json.loads(said)["mechanisms"]
        assert (status, [row for row in rows if not row["served"]]) == (0, [])

        other = await containerd.pod("web-0")

        async def run() -> str:
            return await containerd.run(other, "app", "sh", "-c", SCRIPT)

        told, notes, one = await told_of("/shop/web-0/app", run, kernel("do_unlinkat"))
        assert notes == []
        assert told.count("/bin/ls") >= 2
        assert {"/bin/cat /bin/ls /bin/ls", "getppid", "do_unlinkat", "exit 3"} <= set(told)
        assert await containerd.wait(one) == 3
        await containerd.end(other)

        (limit,) = Path("/sys/fs/cgroup").glob(f"kubepods/burstable/*/{sensor}/memory.max")
        assert limit.read_text().strip() == str(1 << 30)
        (init,) = limit.with_name("cgroup.procs").read_text().split()
        status_of = Path(f"/proc/{init}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status_of.splitlines() if ":\t" in line)
        assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "0")
        assert Path(f"/proc/{init}/attr/current").read_text().strip() == "unconfined"
