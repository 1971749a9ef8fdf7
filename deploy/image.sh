#!/usr/bin/env bash
# Builds the container image NAME: the wheels on this machine, the image from them. Nothing else is fetched.
#
#   deploy/image.sh NAME [BASE]
#
# BASE is an image with python3 (3.11 or newer), as python:3.13-slim. Without one, debootstrap makes a Debian
# with Python, once: it is kept in $RINGSIDE_CACHE (/var/cache/ringside). PYTHON and PIP_* are as usual.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 base=${2:-}
python=${PYTHON:-python3}
folder=build/image

make_base() {
    local suite cache
    suite=${SUITE:-$(. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}")}
    cache=${RINGSIDE_CACHE:-/var/cache/ringside}/image
    base=ringside-base:$suite
    docker image inspect "$base" >/dev/null 2>&1 && return
    if [ ! -e "$cache/$suite.tar" ]; then
        mkdir -p "$cache"
        root=$(mktemp -d) # not local: the trap runs when the function is long left
        trap 'rm -rf "$root"' EXIT
        debootstrap --variant=minbase --include=python3-minimal,libpython3-stdlib "$suite" "$root" >&2
        rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info}/*
        tar -C "$root" -cf "$cache/$suite.tar.part" .
        mv "$cache/$suite.tar.part" "$cache/$suite.tar"
    fi
    docker import "$cache/$suite.tar" "$base" >/dev/null
}

[ -n "$base" ] || make_base
version=$(docker run --rm --network none --entrypoint python3 "$base" \
    -c 'import sys; print("%d.%d" % sys.version_info[:2])')

rm -rf "$folder"
mkdir -p "$folder/wheels"
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
pip wheel --no-deps --wheel-dir "$folder/wheels" .
machine=$(uname -m)
pip download --dest "$folder/wheels" --only-binary :all: \
    --implementation cp --python-version "$version" \
    --platform "linux_$machine" --platform "manylinux2014_$machine" --platform "manylinux_2_17_$machine" \
    --platform "manylinux_2_28_$machine" pip "$folder"/wheels/ringside-*.whl  # the file: the name is another's on PyPI
docker build --quiet --network none --build-arg BASE="$base" --tag "$name" --file Dockerfile "$folder"
