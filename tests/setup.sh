#!/usr/bin/env bash
# Installs the Debian packages that the tests need and that are missing. Without root or apt it only says which.
set -euo pipefail

# one a line: package, and the file by which to know that it (or the same from elsewhere) is there
needed() {
    cat <<'LIST'
gcc              /usr/bin/gcc
libc6-dev        /usr/include/stdio.h
linux-perf       /usr/bin/perf
qemu-system-x86  /usr/bin/qemu-system-x86_64
docker.io        /usr/sbin/dockerd
iptables         /usr/sbin/iptables
podman           /usr/bin/podman
debootstrap      /usr/sbin/debootstrap
busybox-static   /bin/busybox
kmod             /usr/sbin/depmod
e2fsprogs        /usr/sbin/mke2fs
apparmor         /usr/sbin/apparmor_parser
LIST
}

missing=()
while read -r package file; do
    [ -e "$file" ] || command -v "${file##*/}" >/dev/null || missing+=("$package")
done < <(needed)
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests/setup.sh: not here: ${missing[*]}. Tests that need them will skip." >&2
    exit 0
fi

install() { apt-get install -y --no-install-recommends "${missing[@]}" </dev/null; }
export DEBIAN_FRONTEND=noninteractive
# the package lists may be absent or old: refresh them only if it doesn't work without
install >/dev/null 2>&1 || { apt-get update </dev/null && install; }
