#!/bin/busybox sh
# The guest's first program, in the initramfs: makes this machine's files the root, read-only and under a
# layer of memory that takes the writes, then hands over to the script that machine.py left with the results.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
for module in /modules/*; do $b insmod "$module" || echo "init: no $module"; done

# cache=loose: the guest asks once for each file. It lives for minutes, in which nobody should edit what it
# runs; without the cache an import in Python costs some thirty round trips a module, again and again.
nine=trans=virtio,version=9p2000.L,access=any,msize=512000
$b mount -t 9p -o ro,cache=loose,$nine root /lower
$b mount -t tmpfs memory /memory
$b mkdir /memory/upper /memory/work
layers=/lower
if [ -b /dev/vda ] && $b mount -t ext4 -o ro /dev/vda /image; then layers=/image/files:/lower; fi
$b mount -t overlay -o lowerdir=$layers,upperdir=/memory/upper,workdir=/memory/work overlay /root

$b mount -t proc proc /root/proc
$b mount -t sysfs sys /root/sys
$b mount -t devtmpfs dev /root/dev
$b mkdir -p /root/dev/pts /root/dev/shm
$b mount -t devpts devpts /root/dev/pts
$b mount -t tmpfs shm /root/dev/shm
$b mount -t tmpfs run /root/run
$b mount -t debugfs debug /root/sys/kernel/debug
$b mount -t tracefs trace /root/sys/kernel/tracing
# what udev does elsewhere; without /dev/fd no container starts where TOMOYO looks at execveat's path
$b ln -s /proc/self/fd /root/dev/fd
for i in 0:stdin 1:stdout 2:stderr; do $b ln -s /proc/self/fd/${i%:*} /root/dev/${i#*:}; done

# the kernel hands what it doesn't know on its command line to init
case $cgroup in
v2)
    $b mount -t cgroup2 cgroup2 /root/sys/fs/cgroup
    # as systemd does; until somebody does, cgroups below have not even perf_event
    for controller in $($b cat /root/sys/fs/cgroup/cgroup.controllers); do
        echo "+$controller" >/root/sys/fs/cgroup/cgroup.subtree_control
    done
    ;;
v1)
    # hybrid, as systemd made it: each controller its own tree, and one without any
    $b mount -t tmpfs cgroup /root/sys/fs/cgroup
    while read -r name _ _ enabled; do
        [ "$enabled" = 1 ] || continue
        $b mkdir "/root/sys/fs/cgroup/$name"
        $b mount -t cgroup -o "$name" cgroup "/root/sys/fs/cgroup/$name"
    done </proc/cgroups
    $b mkdir /root/sys/fs/cgroup/systemd /root/sys/fs/cgroup/unified
    $b mount -t cgroup -o none,name=systemd cgroup /root/sys/fs/cgroup/systemd
    $b mount -t cgroup2 cgroup2 /root/sys/fs/cgroup/unified
    ;;
esac

$b mkdir -p /root/lib/modules /root/run/results
$b ln -sfn "$(cat /modules.folder)" "/root/lib/modules/$($b uname -r)"
$b ip link set lo up
$b mount -t 9p -o rw,$nine results /root/run/results
exec $b switch_root /root /bin/sh /run/results/.script
