"""Debian's kernels for the matrix: found by the machine's own apt, unpacked into a cache, nothing installed.

`python -m tests.vm.kernels [--refresh] [NAME...]` fetches them and says what is there.

apt reads the machine's sources, whatever their syntax, and is asked which mirrors they name. The packages
then come through a second, private apt: its own sources list, package lists and state, all in the cache. The
machine's own apt is neither changed nor locked. Proxies, credentials and time-outs of the machine's apt
configuration hold for the private one too, for it reads the same apt.conf.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# the oldest that the project promises, the stable ones, and the newest there is
SUITES = ("bullseye", "bookworm", "trixie", "trixie-backports")
# the cloud kernels are a third of the size but have no 9p
META_PACKAGE = "linux-image-amd64"
# image: all in one up to 6.x; 7.x splits it. Initramfs generators and the like are not wanted
PARTS = re.compile(r"linux-(?:image|binary|modules|base)-\d[^ ]*-amd64")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class NoKernel(Exception):
    """A kernel can't be had: apt's refusal, or no mirror to ask."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: `release` is what uname -r says in it."""

    suite: str
    release: str
    root: Path

    @property
    def name(self) -> str:
        """What people call it: 6.1."""
        return ".".join(re.split(r"[.+-]", self.release)[:2])

    @property
    def modules(self) -> Path:
        return next(p for p in map(self.root.joinpath, self._module_folders()) if p.is_dir())

    @property
    def image(self) -> Path:
        places = (self.root / "boot" / f"vmlinuz-{self.release}", self.modules / "vmlinuz")
        return next(p for p in places if p.exists())

    def config(self) -> dict[str, str]:
        """CONFIG_X to its value; what is not set is absent."""
        places = (self.root / "boot" / f"config-{self.release}", self.modules / "config")
        text = next(p for p in places if p.exists()).read_text()
        return dict(re.findall(r"^(CONFIG_\w+)=(.*)$", text, re.MULTILINE))

    def _module_folders(self) -> tuple[str, str]:
        return f"usr/lib/modules/{self.release}", f"lib/modules/{self.release}"


def cache_folder() -> Path:
    """Where kernels are kept: $RINGSIDE_CACHE, else the system's cache for root and the user's for others."""
    if named := os.environ.get("RINGSIDE_CACHE"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/cache/ringside")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringside"


def get(names: tuple[str, ...] = (), *, refresh: bool = False) -> list[Kernel]:
    """The kernels of all suites, oldest first, fetched if need be; of these those named (6.1, or a suite)."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        kernels = {suite: _cached(cache, suite) for suite in SUITES}
        if refresh or not all(kernels.values()):
            apt = Apt(cache / "apt")
            apt.update()
            kernels = {suite: _fetch(cache, suite, apt) for suite in SUITES}
    found = [kernel for kernel in kernels.values() if kernel]
    if unknown := [name for name in names if not any(name in (k.name, k.suite) for k in found)]:
        raise NoKernel(f"no kernel {', '.join(unknown)}; there are {', '.join(k.name for k in found)}")
    return [kernel for kernel in found if not names or {kernel.name, kernel.suite} & set(names)]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cached(cache: Path, suite: str) -> Kernel | None:
    link = cache / "suites" / suite
    if not link.is_dir():
        return None
    root = link.resolve()
    return Kernel(suite, root.name, root)


def _fetch(cache: Path, suite: str, apt: Apt) -> Kernel:
    """The suite's current kernel, unpacked and indexed; only then does the cache name it."""
    packages = apt.parts_of(f"{META_PACKAGE}/{suite}")
    release = next(name for name in packages if name.startswith("linux-image-")).removeprefix("linux-image-")
    kernel = Kernel(suite, release, cache / "kernels" / release)
    link = cache / "suites" / suite
    if not kernel.root.is_dir():
        debs, tree = cache / "debs", cache / "unpacking"
        shutil.rmtree(tree, ignore_errors=True)
        debs.mkdir(exist_ok=True)
        for deb in apt.download(packages, debs):
            _run("dpkg-deb", "--extract", str(deb), str(tree))
            deb.unlink()  # the unpacked tree is kept; both would be 2 GB
        unpacked = Kernel(suite, release, tree)
        # depmod's base is the folder that has lib/modules in it
        _run(_program("depmod"), "--basedir", str(unpacked.modules.parents[2]), release)
        kernel.root.parent.mkdir(exist_ok=True)
        tree.rename(kernel.root)
    link.parent.mkdir(exist_ok=True)
    if link.is_symlink() and (old := link.resolve()) != kernel.root:
        shutil.rmtree(old, ignore_errors=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(kernel.root, link.parent))
    return kernel


class Apt:
    """An apt of our own beside the machine's: same mirror, same configuration, other suites."""

    def __init__(self, folder: Path) -> None:
        lists = folder / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        self._sources = folder / "sources.list"
        settings = {
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "Dir::Etc::sourcelist": self._sources,
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State::lists": lists,
            "Dir::State::status": folder / "status",
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Acquire::Languages": "none",
        }
        if os.geteuid() == 0:
            # the user _apt can't write into a cache that is not its own
            settings["APT::Sandbox::User"] = "root"
        self._options = [arg for key, value in settings.items() for arg in ("-o", f"{key}={value}")]

    def update(self) -> None:
        """Ask the machine's mirrors, one after the other, for the lists of our suites."""
        problems = []
        # with the key of each Debian release; where that package is missing, with what apt trusts anyway
        signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
        for mirror in mirrors():
            self._sources.write_text("".join(f"deb {signed}{mirror} {suite} main\n" for suite in SUITES))
            try:
                self._apt("apt-get", "update", "--error-on=any", "-qq")
            except NoKernel as error:
                problems.append(str(error))
            else:
                return
        raise NoKernel("; ".join(problems) or "apt's sources name no mirror of Debian")

    def parts_of(self, package: str) -> dict[str, str]:
        """The packages that make up a kernel, from its meta package on, and their versions."""
        found: dict[str, str] = {}
        wanted = [package]
        while wanted:
            text = self._apt("apt-cache", "show", "--no-all-versions", wanted.pop())
            depends = " ".join(re.findall(r"^(?:Pre-)?Depends: (.*)$", text, re.MULTILINE))
            for name, version in re.findall(r"([^\s,|]+) \(= ([^)]+)\)", depends):
                if PARTS.fullmatch(name) and name not in found:
                    found[name] = version
                    wanted.append(f"{name}={version}")
        if not found:
            raise NoKernel(f"{package} depends on no kernel")
        return found

    def download(self, packages: dict[str, str], folder: Path) -> list[Path]:
        names = [f"{name}={version}" for name, version in packages.items()]
        self._apt("apt-get", "download", "-qq", *names, cwd=folder)
        return [path for path in folder.iterdir() if path.name.split("_")[0] in packages]

    def _apt(self, program: str, *args: str, cwd: Path | None = None) -> str:
        return _run(program, *self._options, *args, cwd=cwd)


def mirrors() -> list[str]:
    """The Debian mirrors that the machine's own apt sources name, by apt's own reading of them."""
    text = _run(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"
    )
    rows = [line.split() for line in text.splitlines()]
    # archives of updates alone (security) have other suites; flat ones have no component
    whole = [row[0] for row in rows if len(row) == 3 and row[2] == "main" and "-" not in row[1]]
    return list(dict.fromkeys(whole))


def _program(name: str) -> str:
    """A program that may be in the administrator's part of the system only."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if not found:
        raise NoKernel(f"{name} is not installed")
    return found


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        )
    except FileNotFoundError as error:
        raise NoKernel(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise NoKernel(f"{command[0]}: {error.stderr.strip() or error}") from error
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="fetch Debian's kernels into the cache and list them")
    parser.add_argument("--refresh", action="store_true", help="look for newer ones")
    parser.add_argument("name", nargs="*", help="6.1, or a suite; all if none is named")
    arguments = parser.parse_args()
    for kernel in get(tuple(arguments.name), refresh=arguments.refresh):
        print(f"{kernel.name:6} {kernel.suite:18} {kernel.image}")


if __name__ == "__main__":
    try:
        main()
    except NoKernel as error:
        raise SystemExit(f"kernels: {error}") from None
