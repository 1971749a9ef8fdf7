#!/bin/sh
# For inside a guest: starts containerd and a Docker engine and returns when they answer. Needs Debian's docker.io on
# the machine.
#
#   python -m tests.vm.run --shell 'tests/vm/docker.sh && docker info'
#
# No bridge and no iptables, for the guest has no network: containers run with --network none or host.
set -eu
# overlayfs doesn't go on top of overlayfs, which the guest's root is
mkdir -p /var/lib/docker /var/lib/containerd
mount -t tmpfs docker /var/lib/docker
mount -t tmpfs containerd /var/lib/containerd
# as systemd does: what is mounted later is seen in containers that want so
mount --make-rshared /
# started by dockerd itself it would have to come up within 15 s, too little for an emulator on a busy machine
containerd --log-level warn >/run/results/containerd.log 2>&1 &
until [ -S /run/containerd/containerd.sock ]; do sleep 0.1; done
dockerd --containerd /run/containerd/containerd.sock --bridge none --iptables=false --ip6tables=false \
    --log-level warn >/run/results/dockerd.log 2>&1 &
engine=$!
until [ -S /run/docker.sock ]; do
    kill -0 $engine || { cat /run/results/dockerd.log; exit 1; }
    sleep 0.1
done
# answered as soon as the engine is up
docker version >/dev/null
