"""Which container a cgroup path belongs to. Pure: text in, names out.

The table below is all the knowledge there is. A path is read from its innermost component outwards and
the first component that names a container wins, so the answer is the *innermost* container: the one the
process is really in. With Docker in Docker that is the inner one; `outer` lists those around it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Final, Literal

_HEX = r"(?P<id>[0-9a-f]{64})"
# What runc, crun and LXC accept as a container's name.
_NAME = r"(?P<id>[\w+.-]+)"

#: (runtime, the whole component, what its parent's path must end with), best first.
#: A runtime of "" claims the component as *not* a container, so that no later rule takes it for one.
_RULES: Final[tuple[tuple[str, str, str], ...]] = (
    # Monitors live beside their containers and carry the container's id: they are host programs.
    ("", r"(?:crio|libpod)-conmon-.*", ""),
    ("", r"lxc\.(?:monitor|pivot)(?:[.-].*)?", ""),
    # A pod of Podman with the cgroupfs driver; its containers are the libpod-ID below it.
    ("", r"[0-9a-f]{64}", r"/libpod_parent"),
    # systemd's driver: PREFIX-ID.scope in any slice. Without .scope: the same runtimes on cgroupfs.
    ("docker", rf"docker-{_HEX}(?:\.scope)?", ""),
    ("containerd", rf"(?:cri-containerd|nerdctl|containerd)-{_HEX}(?:\.scope)?", ""),
    ("cri-o", rf"crio-{_HEX}(?:\.scope)?", ""),
    # `libpod-payload-ID` is what --cgroups=split makes, which is Quadlet's default.
    ("podman", rf"libpod-(?:payload-)?{_HEX}(?:\.scope)?", ""),
    # containerd told to use a systemd path while its driver is cgroupfs: SLICE:PREFIX:ID as one name.
    ("containerd", rf"[^/:]*:cri-containerd:{_HEX}", ""),
    ("cri-o", rf"[^/:]*:crio:{_HEX}", ""),
    # The plain id, wherever: /docker/ID, /kubepods/.../podUID/ID, /k8s.io/ID, /actions_job/ID, /../ID.
    ("docker", _HEX, r"/docker"),
    ("containerd", _HEX, r"(?:/kubepods.*|/k8s\.io|/moby|/default)"),
    ("", r".*\.mount", ""),
    ("unknown", _HEX, ""),
    ("unknown", rf"[\w.+]+(?:-[\w.+]+)*-{_HEX}\.scope", ""),
    # Runtimes whose containers have names: there the path has to say more.
    ("runc", rf"runc-{_NAME}\.scope", ""),
    ("crun", rf"crun-{_NAME}\.scope", ""),
    ("containerd", _NAME, r"^/default"),
    ("lxc", rf"lxc\.payload\.{_NAME}", ""),
    ("lxc", _NAME, r"(?:^|/)lxc(?:\.payload)?"),
)
_COMPILED: Final = tuple(
    (runtime, re.compile(component, re.ASCII), re.compile(rf"{parent}\Z") if parent else None)
    for runtime, component, parent in _RULES
)

_POD = re.compile(
    r"(?:kubepods(?:-burstable|-besteffort)?-)?pod"
    r"(?P<uid>[0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})"
    r"(?:\.slice(?::.*)?)?\Z"
)

#: v1 hierarchies, the one to believe first. systemd and runtimes put every process of a container there;
#: cpuset, net_cls and others are left to tools that move single processes.
_BELIEVED: Final = ("name=systemd", "pids", "memory", "devices", "freezer", "cpu", "cpuacct", "blkio")


@dataclass(frozen=True, slots=True)
class CgroupOwner:
    """The container that a cgroup belongs to. `outer`: the containers around it, outermost first."""

    id: str
    runtime: str
    pod_uid: str = ""
    outer: tuple[str, ...] = ()


@lru_cache(maxsize=8192)
def owner_of_cgroup(path: str) -> CgroupOwner | None:
    """The innermost container that the cgroup `path` (as within its hierarchy) is of; None for the host."""
    components = path.removesuffix(" (deleted)").split("/")
    found: list[tuple[str, str]] = []
    pod_uid = ""
    for position in range(len(components) - 1, -1, -1):
        component = components[position]
        if len(component) < 2 or component == "..":
            continue
        match = _container_in(component, components, position)
        if match is not None:
            found.append(match)
        if not pod_uid and len(found) < 2 and "pod" in component and (pod := _POD.match(component)):
            pod_uid = pod["uid"].replace("_", "-")
    if not found:
        return None
    identity, runtime = found[0]
    return CgroupOwner(identity, runtime, pod_uid, tuple(outer for outer, _ in reversed(found[1:])))


def _container_in(component: str, components: list[str], position: int) -> tuple[str, str] | None:
    """(id, runtime) that one component names; its parents decide where the name alone does not."""
    parent: str | None = None
    for runtime, pattern, parent_pattern in _COMPILED:
        match = pattern.fullmatch(component)
        if match is None:
            continue
        if parent_pattern is not None:
            if parent is None:
                parent = "/".join(components[:position])
            if not parent_pattern.search(parent):
                continue
        return (match["id"], runtime) if runtime else None
    return None


def owner_from_proc_cgroup(text: str) -> CgroupOwner | None:
    """The container that the content of /proc/PID/cgroup speaks of; None for the host.

    Each line is `hierarchy-ID:controller-list:cgroup-path`, cgroups(7): v2 has the one line `0::PATH`, v1 a
    line a hierarchy, a hybrid machine both. The deepest answer wins, since an inner engine may have been
    given only some hierarchies and leaves the others at the outer container; between equals, _BELIEVED.
    An older runc on a hybrid machine leaves `0::` at its service, so that line alone never says "host".
    """
    best: CgroupOwner | None = None
    best_key = (-1, 0)
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        owner = owner_of_cgroup(path)
        if owner is None:
            continue
        key = (len(owner.outer), -_distrust(controllers))
        if key > best_key:
            best, best_key = owner, key
    return best


def _distrust(controllers: str) -> int:
    for rank, name in enumerate(_BELIEVED):
        if name in controllers.split(","):
            return rank
    return len(_BELIEVED)


@dataclass(slots=True)
class CgroupPaths:
    """What the table cannot know: cgroups that a runtime's own state says are a container's.

    Bare runc lets the caller choose any path. `learn` what state files tell, then ask `owner` instead of
    owner_of_cgroup; the answer for a path below a learned one is that container.
    """

    limit: int = 16384
    _learned: dict[str, CgroupOwner] = field(default_factory=dict)

    def learn(self, path: str, owner: CgroupOwner) -> None:
        """Remember that `path` is `owner`'s; forgets the oldest beyond `limit`."""
        if path in ("", "/"):
            return  # the root cgroup is everybody's
        self._learned.pop(path, None)
        while len(self._learned) >= self.limit:
            self._learned.pop(next(iter(self._learned)))
        self._learned[path] = owner

    def forget(self, container_id: str) -> None:
        """Drop what was learned of one container."""
        for path in [path for path, owner in self._learned.items() if owner.id == container_id]:
            del self._learned[path]

    def owner(self, path: str) -> CgroupOwner | None:
        """As owner_of_cgroup, with what was learned; a container named inside a learned path is the inner."""
        known = owner_of_cgroup(path)
        if known is not None or not self._learned:
            return known
        while path:
            learned = self._learned.get(path)
            if learned is not None:
                return learned
            path = path.rpartition("/")[0]
        return None

    def container_id(self, path: str) -> str | None:
        """The id part of `owner`."""
        owner = self.owner(path)
        return None if owner is None else owner.id


class Attach(Enum):
    """What `attached` answers when the record alone can't tell."""

    REREAD = "read /proc/PID/cgroup"


def attached(current: str | None, new: str | None) -> str | Literal[Attach.REREAD] | None:
    """The container of a process of `current` after a cgroup_attach_task record to a cgroup of `new`.

    The kernel reports a move once for each hierarchy. Into a container from the host is what every start
    and exec looks like: believed at the first record. Anything else (out to the host, from one container to
    another) may be one controller's hierarchy only, and /proc/PID/cgroup has to decide: REREAD.
    """
    if new == current or current is None:
        return new
    return Attach.REREAD
