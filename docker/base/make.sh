#!/usr/bin/env bash
# Makes the base image of all our images from the Debian archive, for machines without a container registry:
# Debian with its Python, less what a service in a container never uses. The package database stays, for scanners.
#
#   docker/base/make.sh [NAME]     as root; needs debootstrap and podman. The mirror is apt's, or DEBIAN_MIRROR.
set -euo pipefail

name=${1:-localhost/fanlight/base:bookworm}
suite=bookworm
work=$(mktemp -d "${TMPDIR:-/var/tmp}/fanlight-base.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/root

# Installed by debootstrap, needed by nothing that runs later. No shell script of ours needs perl or a login.
unused=(
    adduser apt bsdutils debconf debian-archive-keyring e2fsprogs gpgv init-system-helpers libapt-pkg6.0 libext2fs2
    libss2 libpam-modules libpam-modules-bin libpam-runtime login logsave mount passwd perl-base sysvinit-utils
    tzdata usr-is-merged usrmerge util-linux util-linux-extra
)
# Libraries that only those, systemd, Kerberos or Sun's NIS loaded: the audit names what nothing links to.
unlinked=(
    libaudit-common libaudit1 libblkid1 libcap-ng0 libcap2 libcom-err2 libgcrypt20 libgnutls30 libgpg-error0
    libgssapi-krb5-2 libhogweed6 libidn2-0 libk5crypto3 libkeyutils1 libkrb5-3 libkrb5support0 liblz4-1 libmount1
    libnettle8 libnsl2 libp11-kit0 libpam0g libseccomp2 libsemanage-common libsemanage2 libsepol2 libsmartcols1
    libsystemd0 libtasn1-6 libtirpc-common libtirpc3 libudev1 libunistring2 libxxhash0
)
# Whole folders and files by what they are: documentation, other languages, caches, Python that no service imports.
waste=(
    usr/share/doc usr/share/man usr/share/info usr/share/locale usr/share/lintian usr/share/bash-completion
    usr/share/pixmaps usr/share/menu usr/share/zoneinfo var/cache var/lib/apt var/log usr/share/common-licenses/GFDL*
    usr/lib/python3.11/{ensurepip,idlelib,lib2to3,pydoc_data,test,tkinter,turtledemo,distutils}
    usr/lib/python3/dist-packages usr/lib/valgrind usr/share/gdb usr/share/perl5 usr/lib/x86_64-linux-gnu/gconv
    usr/lib/x86_64-linux-gnu/perl-base usr/lib/python3.11/lib-dynload/nis.*
)

debootstrap --variant=minbase --include=python3-minimal,python3,ca-certificates \
    "$suite" "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} > "$work/log" 2>&1 || { tail -20 "$work/log" >&2; exit 1; }
dpkg --root="$root" --force-all --purge "${unused[@]}" "${unlinked[@]}" >> "$work/log" 2>&1 || true
for path in "${waste[@]}"; do rm -rf "$root"/$path; done
find "$root/usr/lib/python3.11" -name __pycache__ -prune -exec rm -rf {} +
find "$root/var/lib/dpkg" -name '*-old' -delete
mkdir -p "$root"/var/cache "$root"/var/log "$root"/usr/share/locale "$root"/usr/share/zoneinfo
# Compiled once, by content: the same bytes on every machine, and a read-only root starts as fast.
chroot "$root" /usr/bin/python3 -m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3.11
ln -sf python3 "$root/usr/bin/python"
# Nothing that stays may miss a library.
missing=$(cd "$root" && find usr/bin usr/lib -type f \( -perm -u+x -o -name '*.so*' \) -printf '/%p\n' |
    chroot "$root" xargs ldd 2> /dev/null | grep 'not found' || true)
[ -z "$missing" ] || { echo "error: a library is missing: $missing" >&2; exit 1; }

tar --directory "$root" --sort=name --mtime=@0 --numeric-owner --exclude='./dev/*' --exclude='./proc/*' \
    --exclude='./sys/*' -cf "$work/base.tar" .
podman import --quiet --change 'ENV PATH=/usr/local/bin:/usr/bin:/bin' --change 'ENV LANG=C.UTF-8' \
    "$work/base.tar" "$name" > /dev/null
echo "$name: $(zstd -q -9 -T0 -c "$work/base.tar" | wc -c) bytes as zstd -9, $(stat -c %s "$work/base.tar") unpacked"
