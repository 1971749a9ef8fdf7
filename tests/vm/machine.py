"""One emulated machine: a kernel of its own over this machine's files.

The guest sees all of this machine's files, the Python that runs this and the checkout among them, at the
same paths; what it writes stays in its memory. Only the results folder, /run/results inside, is shared for
writing.

QEMU is driven directly and not by virtme-ng, under which the kernels would boot too: measured on two cores,
that takes 5 s instead of 3 s to the first command, and its root file system, 9p without a cache, makes
`import pytest` take 7.5 s each time instead of 2 s. (On the real machine it is 0.14 s: what is left is the
price of emulation.)
"""

from __future__ import annotations

import lzma
import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .kernels import Kernel

INIT = Path(__file__).with_name("init.sh")
QEMU = "qemu-system-x86_64"
BUSYBOX = "busybox"
SYSTEMD = "/lib/systemd/systemd"
# what reaches the root, with what they depend on; built into some kernels, modules in others
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_blk", "crc32c_generic", "ext4")
# no watchdogs: emulation on a busy machine is slow enough to frighten them, the one of the TSC too, which all
# CPUs have in common here and which is the only clock that can be read without leaving the emulated CPU
PARAMETERS = (
    "console=ttyS0 quiet loglevel=5 panic=-1 nowatchdog tsc=reliable rcupdate.rcu_cpu_stall_suppress=1"
)
# what the kernel must not say while it is being traced
COMPLAINTS = ("WARNING: ", "BUG: ", "Oops", "general protection fault", "Kernel panic", "kernel BUG at")


class NotBooted(Exception):
    """The emulator or what it needs is missing, or the guest never came as far as running the command."""


@dataclass(frozen=True)
class Outcome:
    """What came of one boot. `code` is the command's exit status, None if it didn't finish in time."""

    kernel: Kernel
    code: int | None
    boot_seconds: float
    seconds: float
    results: Path
    complaints: tuple[str, ...]

    @property
    def output(self) -> str:
        return (self.results / "output").read_text(errors="replace")


def check() -> None:
    """Is all there that booting needs? NotBooted says what is not."""
    _program(QEMU)
    _program(BUSYBOX)


def boot(
    kernel: Kernel,
    script: str,
    results: Path,
    *,
    timeout: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    cgroup: str = "v2",
    memory: str = "2G",
    cpus: int = 2,
    image: Path | None = None,
    systemd: bool = False,
) -> Outcome:
    """Boot the kernel, run the shell script in it as root, power off.

    `systemd`: this machine's systemd is the first process, and the script a service of it.

    `results` gets the script's output, what it writes to /run/results, the kernel's messages, the console.
    `cgroup` is v2 or v1 (v1 hierarchies, as far as this kernel still has them), `image` a python_image().
    """
    results = results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    for old in ("output", "code", "boot", "dmesg", "console"):
        (results / old).unlink(missing_ok=True)
    (results / ".script").write_text(_wrapped(script, cwd or Path.cwd(), env or {}, systemd))
    (results / ".initramfs").write_bytes(_initramfs(kernel))
    command = [
        _program(QEMU),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        # One thread for all CPUs: with a thread each, an emulated CPU can run an instruction that another has
        # just patched as it was before, and the kernel patches itself whenever a tracepoint or probe is
        # switched ("Oops: int3" within a minute of switching events/sched on and off, QEMU 7.2). Two guests
        # side by side keep two cores busy anyway.
        # CPU: `max` is what TCG can do; no smaller model was faster.
        *("-machine", "q35", "-accel", "tcg,thread=single", "-cpu", "max", "-smp", str(cpus), "-m", memory),
        *("-serial", f"file:{results / 'console'}"),
        *("-kernel", str(kernel.image), "-initrd", str(results / ".initramfs")),
        *("-append", f"{PARAMETERS} cgroup={cgroup}"),
        *_shared("root", Path("/"), ",readonly=on"),
        *_shared("results", results),
    ]
    if image:
        command += ["-drive", f"if=virtio,format=raw,readonly=on,file={_quoted(image)}"]
    started = time.monotonic()
    with (results / "qemu").open("wb") as errors:
        try:
            subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, timeout=timeout, check=True
            )
        except subprocess.TimeoutExpired:
            pass  # a code is missing then
        except subprocess.CalledProcessError as error:
            said = (results / "qemu").read_text(errors="replace").strip()
            raise NotBooted(f"{QEMU}: {said or error}") from error
    seconds = time.monotonic() - started
    console = _text(results / "console")
    if not (booted := _text(results / "boot")):
        raise NotBooted(f"{kernel.release} did not come up in {seconds:.0f} s:\n{console[-2000:]}")
    code = _text(results / "code")
    return Outcome(
        kernel,
        int(code) if code else None,
        float(booted),
        seconds,
        results,
        tuple(line for line in (_text(results / "dmesg") or console).splitlines() if _complains(line)),
    )


def _complains(line: str) -> bool:
    return any(word in line for word in COMPLAINTS)


def _text(path: Path) -> str:
    return path.read_text(errors="replace").strip() if path.exists() else ""


def _shared(tag: str, path: Path, more: str = "") -> tuple[str, ...]:
    # multidevs=remap: file systems below the root may not have inode numbers in common
    return (
        *("-fsdev", f"local,id={tag},path={_quoted(path)},security_model=none,multidevs=remap{more}"),
        *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    )


def _quoted(path: Path) -> str:
    return str(path).replace(",", ",,")


# A unit that needs nothing else: what the script starts may, and then systemd starts that.
SERVICE = """\
[Unit]
DefaultDependencies=no
[Service]
ExecStart=/bin/sh /run/wrapped
StandardOutput=tty
TTYPath=/dev/console
"""


def _wrapped(script: str, cwd: Path, env: Mapping[str, str], systemd: bool) -> str:
    """What init runs: the script with its output and exit status kept, then the end."""
    kept = {
        "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
    }
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in {**kept, **env}.items())
    whole = f"""{exports}
cut -d' ' -f1 /proc/uptime >/run/results/boot
cat >/run/script <<'END OF SCRIPT'
{script}
END OF SCRIPT
cd {shlex.quote(str(cwd))} && sh /run/script >/run/results/output 2>&1 </dev/null
echo $? >/run/results/code
dmesg >/run/results/dmesg
sync
exec {shlex.quote(_program(BUSYBOX))} poweroff -f
"""
    if not systemd:
        return whole
    return f"""mkdir -p /run/systemd/system
# of what this machine starts, nothing: some of it waits for devices that nobody announces here
rm -rf /etc/systemd/system/*.wants /lib/systemd/system/*.wants
cat >/run/wrapped <<'END OF WRAPPED'
{whole}
END OF WRAPPED
cat >/run/systemd/system/script.service <<'END OF SERVICE'
{SERVICE}
END OF SERVICE
exec {shlex.quote(_program(SYSTEMD))} --unit=script.service --log-target=console --log-level=notice
"""


def _program(name: str) -> str:
    found = shutil.which(name)
    if not found:
        raise NotBooted(f"{name} is not installed (tests/setup.sh does it)")
    return found


# --- the Python that is run, on a disk


def python_image(image: Path) -> Path | None:
    """This Python and its packages as a file system for guests; None, and a slower guest, without mke2fs.

    Over 9p the first start of pytest costs 8 s more than the second, on 5.10, which asks for each page of a
    file alone, 30 s. The guest sees these files at the places they have here.
    """
    mke2fs = shutil.which("mke2fs") or shutil.which("mke2fs", path="/usr/sbin:/sbin")
    if not mke2fs:
        return None
    with tempfile.TemporaryDirectory(dir=image.parent) as folder:
        # below the root of the image, so that its lost+found is not in the way
        files = Path(folder) / "files"
        files.mkdir()
        size = sum(_staged(file, files) for file in _python_files())
        number = sum(1 for _ in files.rglob("*"))
        # blocks of 4 KB each begun, inodes of 256 bytes, and room for directories and tables
        megabytes = (size + number * 4096) // 2**20 * 11 // 10 + 16
        options = ["-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-b", "4096", "-m", "0"]
        subprocess.run(
            [mke2fs, *options, "-N", str(number + 1000), "-d", folder, str(image), f"{megabytes}M"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return image


def _python_files() -> Iterator[Path]:
    yield Path(sys.executable).resolve()
    library = Path(sysconfig.get_config_var("LIBDIR") or "/", sysconfig.get_config_var("INSTSONAME") or "")
    if library.is_file():
        yield library
    places = sysconfig.get_paths()
    standard = Path(places["stdlib"])
    for root in dict.fromkeys((places["stdlib"], places["purelib"], places["platlib"])):
        for folder, folders, names in os.walk(root):
            if folder == str(standard):
                # other Pythons' packages, and what nobody imports
                unwanted = {"site-packages", "dist-packages", "test", "idlelib", "tkinter", "ensurepip"}
                folders[:] = [name for name in folders if name not in unwanted]
            yield from (Path(folder, name) for name in names)


def _staged(file: Path, root: Path) -> int:
    """Put the file, its folders with their modes, below the root; its size."""
    place = root / file.relative_to("/")
    for folder in reversed([parent for parent in file.parents if parent != parent.parent]):
        there = root / folder.relative_to("/")
        if not there.exists():
            there.mkdir()
            shutil.copystat(folder, there)
    try:
        os.link(file, place, follow_symlinks=False)
    except FileExistsError:
        return 0
    except OSError:  # another file system
        shutil.copy2(file, place, follow_symlinks=False)
    return file.lstat().st_size


# --- initramfs: busybox, the modules that reach the root, init.sh


def _initramfs(kernel: Kernel) -> bytes:
    entries = [
        (name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "modules", "lower", "image", "memory", "root")
    ]
    entries += [(name, stat.S_IFDIR | 0o755, b"") for name in ("dev", "proc")]
    entries += [
        ("init", stat.S_IFREG | 0o755, INIT.read_bytes()),
        ("bin/busybox", stat.S_IFREG | 0o755, Path(_program(BUSYBOX)).read_bytes()),
        ("modules.folder", stat.S_IFREG | 0o644, str(kernel.modules).encode()),
    ]
    for number, path in enumerate(_modules(kernel)):
        content = path.read_bytes()
        if path.suffix == ".xz":
            content = lzma.decompress(content)
        # the name gives the order of loading
        entries.append((f"modules/{number:02}-{path.name.split('.')[0]}", stat.S_IFREG | 0o644, content))
    return _cpio(entries)


def _modules(kernel: Kernel) -> list[Path]:
    """The module files of MODULES, each after those that it depends on; what is built in is left out."""
    depends: dict[str, list[str]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        file, _, others = line.partition(":")
        depends[file] = others.split()
    files = {file.rpartition("/")[2].split(".")[0].replace("-", "_"): file for file in depends}
    wanted = [files[name] for name in MODULES if name in files]
    # modules.dep names the nearest first
    ordered = [needed for file in wanted for needed in (*reversed(depends[file]), file)]
    return [kernel.modules / file for file in dict.fromkeys(ordered)]


def _cpio(entries: list[tuple[str, int, bytes]]) -> bytes:
    """An archive in the newc format (cpio(5)) of these: name, mode, content."""
    archive = bytearray()
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        # magic ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
