"""What a kubelet says to a container runtime: CRI's calls, as far as the tests make them.

The protocol is Kubernetes' runtime.v1. Only the messages and fields that are used here are known, by their
numbers; maps are what they are on the wire, lists of keys with values, and enumerations are numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpclib.client import Channel, UnaryUnaryMethod

_PACKAGE: Final = "runtime.v1"
#: Message, then field=number of a string, field=number:TYPE of anything else, TYPE* of several.
_MESSAGES: Final = """
VersionRequest version=1
VersionResponse version=1 runtime_name=2 runtime_version=3 runtime_api_version=4

PodSandboxMetadata name=1 uid=2 namespace=3 attempt=4:uint32
NamespaceOption network=1:int32 pid=2:int32 ipc=3:int32
Int64Value value=1:int64
SecurityProfile profile_type=1:int32
LinuxSandboxSecurityContext namespace_options=1:NamespaceOption \
seccomp=9:SecurityProfile apparmor=10:SecurityProfile
LinuxPodSandboxConfig cgroup_parent=1 security_context=2:LinuxSandboxSecurityContext
PodSandboxConfig metadata=1:PodSandboxMetadata hostname=2 log_directory=3 linux=8:LinuxPodSandboxConfig
RunPodSandboxRequest config=1:PodSandboxConfig
RunPodSandboxResponse pod_sandbox_id=1
StopPodSandboxRequest pod_sandbox_id=1
StopPodSandboxResponse
RemovePodSandboxRequest pod_sandbox_id=1
RemovePodSandboxResponse

ImageSpec image=1 user_specified_image=18
KeyValue key=1 value=2
Mount container_path=1 host_path=2 readonly=3:bool propagation=5:int32
LinuxContainerResources cpu_shares=3:int64 memory_limit_in_bytes=4:int64 oom_score_adj=5:int64
Capability add_capabilities=1:string* drop_capabilities=2:string*
LinuxContainerSecurityContext capabilities=1:Capability privileged=2:bool \
namespace_options=3:NamespaceOption run_as_user=5:Int64Value readonly_rootfs=7:bool \
apparmor_profile=9 no_new_privs=11:bool masked_paths=13:string* readonly_paths=14:string* \
seccomp=15:SecurityProfile apparmor=16:SecurityProfile
LinuxContainerConfig resources=1:LinuxContainerResources security_context=2:LinuxContainerSecurityContext
ContainerMetadata name=1 attempt=2:uint32
ContainerConfig metadata=1:ContainerMetadata image=2:ImageSpec command=3:string* args=4:string* \
working_dir=5 envs=6:KeyValue* mounts=7:Mount* log_path=11 linux=15:LinuxContainerConfig
CreateContainerRequest pod_sandbox_id=1 config=2:ContainerConfig sandbox_config=3:PodSandboxConfig
CreateContainerResponse container_id=1
StartContainerRequest container_id=1
StartContainerResponse
StopContainerRequest container_id=1 timeout=2:int64
StopContainerResponse
RemoveContainerRequest container_id=1
RemoveContainerResponse
ExecSyncRequest container_id=1 cmd=2:string* timeout=3:int64
ExecSyncResponse stdout=1:bytes stderr=2:bytes exit_code=3:int32

ContainerStatusRequest container_id=1 verbose=2:bool
ContainerStatus id=1 state=3:int32 exit_code=7:int32
ContainerStatusResponse status=1:ContainerStatus
ImageStatusRequest image=1:ImageSpec
Image id=1 repo_tags=2:string*
ImageStatusResponse image=1:Image
"""

#: NamespaceMode
POD, CONTAINER, NODE = range(3)
#: MountPropagation, by the names that a pod's manifest has for it
PROPAGATION: Final = {"None": 0, "HostToContainer": 1, "Bidirectional": 2}
#: SecurityProfile.ProfileType, by a manifest's names
PROFILE: Final = {"RuntimeDefault": 0, "Unconfined": 1}
#: ContainerState
EXITED: Final = 2


def _pool() -> descriptor_pool.DescriptorPool:
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="cri.proto", package=_PACKAGE, syntax="proto3")
    for line in _MESSAGES.replace("\\\n", "").split("\n"):
        name, *fields = line.split() or [""]
        if not name:
            continue
        message = file.message_type.add(name=name)
        for text in fields:
            field, _, rest = text.partition("=")
            number, _, kind = rest.partition(":")
            several, kind = kind.endswith("*"), kind.rstrip("*") or "string"
            one = message.field.add(
                name=field,
                number=int(number),
                label=field_type.LABEL_REPEATED if several else field_type.LABEL_OPTIONAL,
            )
            if kind[0].isupper():
                one.type, one.type_name = field_type.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                one.type = field_type.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


_POOL: Final = _pool()


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime at a socket. GRPCError for what it refuses."""

    socket: Path

    async def call(
        self, method: str, *, service: str = "RuntimeService", within: float = 60, **fields: Any
    ) -> Any:
        """One call; the fields of its request as JSON has them."""
        request, reply = _message(f"{method}Request"), _message(f"{method}Response")
        channel = Channel(path=str(self.socket))
        try:
            unary = UnaryUnaryMethod(channel, f"/{_PACKAGE}.{service}/{method}", request, reply)
            return await unary(json_format.ParseDict(fields, request()), timeout=within)
        finally:
            channel.close()
