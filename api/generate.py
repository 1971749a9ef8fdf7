"""Writes what is generated from the .proto files: `python api/generate.py`, or `--check` to only compare.

betterproto2's plugin lays its output out by proto package, as a tree that has to be importable from its
very top: capsule8/api/v0, google/ beside it, and imports that climb above the package. Here the top is
`ringside.api`, so capsule8/api/v0 becomes v0 and its imports climb two levels less.
"""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

API = Path(__file__).resolve().parent
PROTOS = sorted(str(path.relative_to(API)) for path in API.rglob("*.proto"))
# what the plugin writes, and where it goes here; the rest of its output is empty files
OUTPUT = {
    "capsule8/api/v0/__init__.py": "v0/__init__.py",
    "google/__init__.py": "google/__init__.py",
    "google/protobuf/__init__.py": "google/protobuf/__init__.py",
    "google/rpc/__init__.py": "google/rpc/__init__.py",
    "message_pool.py": "message_pool.py",
}
DESCRIPTORS = "descriptors.binpb"


# grpc_tools.protoc as a command would add its own -I, and take Google's files from there again
PROTOC = "import sys; from grpc_tools import protoc; sys.exit(protoc.main(sys.argv))"


def protoc(*arguments: str, cwd: Path) -> None:
    """Run protoc on all of PROTOS; its plugin and ruff come from beside this interpreter."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # -P: this folder's google/ must not hide Google's
    subprocess.run(
        [sys.executable, "-P", "-c", PROTOC, *arguments, *PROTOS],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        check=True,
        stderr=subprocess.PIPE,
    )


def without_foreign_comments(descriptors: bytes) -> bytes:
    """The same FileDescriptorSet without the comments of Google's own files: they aren't ours to copy."""
    from betterproto2_compiler.lib.google.protobuf import FileDescriptorSet, SourceCodeInfo

    files = FileDescriptorSet.parse(descriptors)
    for file in files.file:
        if file.name.startswith("google/protobuf/"):
            file.source_code_info = SourceCodeInfo()
    return bytes(files)


def generate() -> dict[str, bytes]:
    """Every generated file: its path under api/ and its content."""
    from grpc_tools import __file__ as tools

    includes = [f"-I{API}", f"-I{Path(tools).parent / '_proto'}"]
    # ruff, which the plugin calls, must not find this project's settings: hence the folder elsewhere
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        protoc(*includes, "--include_imports", f"--descriptor_set_out={DESCRIPTORS}", cwd=out)
        protoc(
            *includes, "--include_imports", "--include_source_info", "--descriptor_set_out=source", cwd=out
        )
        source = out / "source"
        source.write_bytes(without_foreign_comments(source.read_bytes()))
        protoc(
            "--descriptor_set_in=source",
            "--python_betterproto2_out=.",
            "--python_betterproto2_opt=client_generation=async,server_generation=async",
            cwd=out,
        )
        files = {to: (out / origin).read_bytes() for origin, to in OUTPUT.items()}
        files[DESCRIPTORS] = (out / DESCRIPTORS).read_bytes()
        files["v0/__init__.py"] = files["v0/__init__.py"].replace(b"\nfrom ....", b"\nfrom ..")
        return files


def differences(files: dict[str, bytes]) -> list[str]:
    """Lines that say how the committed files differ from `files`."""
    lines: list[str] = []
    for name, content in files.items():
        committed = API / name
        old = committed.read_bytes() if committed.exists() else b""
        if old == content:
            continue
        lines.append(f"{name} is not what the .proto files give")
        if name != DESCRIPTORS:
            diff = difflib.unified_diff(old.decode().splitlines(), content.decode().splitlines(), lineterm="")
            lines.extend(list(diff)[:40])
    return lines


def main() -> int:
    """0 if all is written, or with --check if all is as it should be."""
    parser = argparse.ArgumentParser(
        description="Generate Python code and descriptors from the .proto files."
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail if anything differs")
    check = parser.parse_args().check
    try:
        files = generate()
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.stderr.decode(errors="replace"))
        return 1
    if check:
        lines = differences(files)
        print("\n".join(lines) or f"{len(files)} generated files are as the .proto files give them")
        return 1 if lines else 0
    for name, content in files.items():
        path = API / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
