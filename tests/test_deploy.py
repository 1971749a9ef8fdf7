"""What deploy/ has: valid, and with the privileges that docs/containers.md lists, no more and no fewer."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parents[1]
DOCS = (TOP / "docs/containers.md").read_text()
# appArmorProfile came with 1.30; "" is the newest that is known
VERSIONS = ("1.30", "1.32", "1.34", "")


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """The manifest's documents by kind."""
    yaml = pytest.importorskip("yaml")
    documents = yaml.safe_load_all((TOP / "deploy/kubernetes.yaml").read_text())
    return {one["kind"]: one for one in documents}


@pytest.fixture(scope="module")
def pod(manifest: dict[str, Any]) -> Any:
    return manifest["DaemonSet"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def schemas() -> Any:
    """Those that Kubernetes publishes; 100 MB, so that they are no part of what all suites install."""
    return pytest.importorskip("kubernetes_validate", reason="not installed: pip install -e '.[deploy]'")


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(TOP / "deploy/ringside.service")
    return parser["Service"]


def documented_capabilities() -> set[str]:
    """Those in the docs' tables, but for SYS_ADMIN, which stands for others where these are not known."""
    rows = "\n".join(line for line in DOCS.splitlines() if line.startswith("|"))
    header = Path("/usr/include/linux/capability.h").read_text()
    known = set(re.findall(r"#define CAP_(\w+)\s+\d+$", header, re.MULTILINE))
    return (set(re.findall(r"`([A-Z_]+)`", rows)) & known) - {"SYS_ADMIN"}


def docker_command() -> str:
    """The command line under Least privileges."""
    (command,) = re.findall(r"The same without `--privileged`:\n\n((?: {4}.*\n)+)", DOCS)
    return " ".join(command.replace("\\\n", " ").split())


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifest_is_what_kubernetes_takes(manifest: dict[str, Any], schemas: Any, version: str) -> None:
    for one in manifest.values():
        schemas.validate(one, version or schemas.latest_version(), strict=True)


def test_the_schema_finds_a_slip_of_the_pen(manifest: dict[str, Any], schemas: Any) -> None:
    daemons = manifest["DaemonSet"]
    slip = {**daemons, "spec": {**daemons["spec"], "updateStrategie": {}}}
    with pytest.raises(schemas.ValidationError, match="updateStrategie"):
        schemas.validate(slip, VERSIONS[0], strict=True)


def test_the_manifest_says_what_runs_where(manifest: dict[str, Any], pod: Any) -> None:
    daemons = manifest["DaemonSet"]
    assert daemons["metadata"]["namespace"] == manifest["Namespace"]["metadata"]["name"]
    labels = daemons["spec"]["template"]["metadata"]["labels"]
    assert daemons["spec"]["selector"]["matchLabels"].items() <= labels.items()
    mounted = {one["name"] for one in pod["containers"][0]["volumeMounts"]}
    assert mounted == {one["name"] for one in pod["volumes"]}


def test_capabilities(pod: Any) -> None:
    capabilities = pod["containers"][0]["securityContext"]["capabilities"]
    assert capabilities["drop"] == ["ALL"]
    assert set(capabilities["add"]) == documented_capabilities()
    names = {f"CAP_{name}" for name in documented_capabilities()}
    assert set(unit()["CapabilityBoundingSet"].split()) == names


def test_nothing_beyond_the_documented(pod: Any) -> None:
    (sensor,) = pod["containers"]
    context = sensor["securityContext"]
    assert (context["privileged"], context["allowPrivilegeEscalation"]) == (False, False)
    assert context["readOnlyRootFilesystem"]
    assert (pod["hostPID"], pod["hostNetwork"], pod.get("hostIPC", False)) == (True, True, False)
    assert not pod["automountServiceAccountToken"]
    assert (unit()["NoNewPrivileges"], unit()["ProtectSystem"]) == ("yes", "strict")


def test_every_mount_of_the_docker_command(pod: Any) -> None:
    """The manifest has them, and of the host's folders only those writable that it says."""
    command = docker_command()
    there = {one["mountPath"]: one.get("readOnly", False) for one in pod["containers"][0]["volumeMounts"]}
    wanted = re.findall(r"-v (\S+?):(\S+?)(:ro)? ", command)
    assert {target for _, target, _ in wanted} <= there.keys()
    writable = {target for target, read_only in there.items() if not read_only}
    # tracefs: where there are kprobes, as the docs' second table says
    assert writable == {"/run/ringside", "/sys/kernel/tracing"}
    alone = ("--pid=host", "--network=host", "--read-only", "--cap-drop=ALL")
    assert {*alone, "--security-opt=no-new-privileges"} <= set(command.split())
    assert set(re.findall(r"--cap-add=(\w+)", command)) < documented_capabilities()
