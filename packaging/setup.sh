#!/bin/sh
# Installs the Debian packages that building vmgang needs, and those that are named, and only those.
# The lab's own needs (libvirt, QEMU, debootstrap) stay inside the lab's root file system.
set -eu
missing=
for package in libvirt-dev pkg-config gcc libc6-dev make "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' ||
        missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ]; then
    echo "missing packages:$missing; run as root: apt-get install$missing" >&2
    exit 1
fi
echo "installing:$missing" >&2
apt-get update -qq
# shellcheck disable=SC2086  # a list of packages
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
