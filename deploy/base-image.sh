#!/usr/bin/env bash
# deploy/base-image.sh [NAME]: an image of Debian's libraries, shell and python3, for machines that can pull none.
# debootstrap fetches, checks and unpacks; nothing is configured, so that it takes seconds and holds no package
# manager. Needs root, a docker engine and a Debian mirror (DEBIAN_MIRROR).
set -euo pipefail

name=${1:-soppu-base:bookworm}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
# beside minbase: what python3 and the wheels link to; and what no container needs
include=python3,libstdc++6,zlib1g,netbase,media-types,tzdata
exclude=apt,debconf,e2fsprogs,init-system-helpers,login,logsave,mount,perl-base,sysvinit-utils,util-linux-extra

if docker image inspect "$name" >/dev/null 2>&1; then echo "$name: is here already"; exit; fi
[ "$(id -u)" = 0 ] || { echo "debootstrap needs root: run this as root, or give a base: make image BASE=..." >&2; exit 1; }
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" DEBIAN_FRONTEND=noninteractive LC_ALL=C
install() { apt-get install --quiet --yes --no-install-recommends debootstrap debian-archive-keyring; }
command -v debootstrap >/dev/null || install >/dev/null 2>&1 || { apt-get update --quiet && install; } >&2

work=$(mktemp -d)
trap 'cd /; umount "$work" 2>/dev/null || true; rm -rf "$work"' EXIT
mount -t tmpfs -o size=1g,dev,exec soppu-base "$work" 2>/dev/null || true   # in memory: thousands of small files
root=$work/root

debootstrap --foreign --variant=minbase --include="$include" --exclude="$exclude" bookworm "$root" "$mirror" \
    >"$work/log" 2>&1 || { echo "debootstrap failed:" >&2; tail -n 5 "$work/log" "$root/debootstrap/debootstrap.log" >&2; exit 1; }
for package in "$root"/var/cache/apt/archives/*.deb; do   # /bin and /lib are links to those below /usr: they stay
    dpkg-deb --fsys-tarfile "$package" | tar --extract --keep-directory-symlink --directory "$root"
done

# what the packages' scripts would have written
cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
ln -sf /usr/share/zoneinfo/UTC "$root/etc/localtime"
ldconfig -r "$root"
cd "$root"
for folder in proc sys dev; do [ ! -L "$folder" ] || rm "$folder"; mkdir -p "$folder"; done   # links to the host's
rm -rf debootstrap var/cache/* var/lib/apt var/lib/dpkg var/log/* boot home media mnt srv opt/* \
    usr/share/{doc,man,locale,info,lintian,bash-completion,i18n,python3,doc-base,menu,bug,gcc,gdb,pixmaps,applications} \
    usr/lib/python3.11/{test,idlelib,lib2to3,ensurepip,turtledemo,pydoc_data} \
    usr/lib/x86_64-linux-gnu/gconv usr/lib/*/security usr/lib/systemd usr/lib/udev usr/include

tar --numeric-owner -c . | docker import --change 'CMD ["python3"]' --change 'ENV LANG=C.UTF-8' - "$name" >/dev/null
echo "$name: made from $mirror"
