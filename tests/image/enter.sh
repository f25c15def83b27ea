#!/usr/bin/env bash
# A container without a container runtime: enter.sh ROOT UID:GID MODELS COMMAND..., with the caller's environment.
#
# As the pods run it: namespaces of its own for mounts, processes and IPC; the root filesystem read-only; /tmp and
# /dev/shm empty and writable; MODELS at /models, read-only; no capabilities, no new ones. The command is process 1.
set -euo pipefail
root=$1 user=$2 models=$3
shift 3
if [[ ${NVFP4_ENTERED:-} != 1 ]]; then
  NVFP4_ENTERED=1 exec unshare --mount --pid --ipc --fork --kill-child --propagation private \
    "$0" "$root" "$user" "$models" "$@"
fi
unset NVFP4_ENTERED
# Folders that mounts need are made while it can be written.
mkdir -p "$root/models"
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount --bind "$models" "$root/models"
mount -o remount,bind,ro "$root/models"
mount -t proc proc "$root/proc"
mount -t tmpfs -o nosuid,mode=755 tmpfs "$root/dev"
for device in null zero full random urandom; do
  touch "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm"
mount -t tmpfs -o nosuid,nodev,mode=1777,size=1g tmpfs "$root/dev/shm"
mount -t tmpfs -o nosuid,nodev,mode=1777,size=4g tmpfs "$root/tmp"
mount --rbind /sys "$root/sys"
# To another user: capabilities go with the change.
exec setpriv --no-new-privs chroot --userspec="$user" --groups= "$root" "$@"
