#!/bin/sh
# Builds the Debian package from a tree that `make install-files DESTDIR=TREE` has filled:
# build.sh TREE VERSION DIRECTORY. The tree becomes the package's; the package is left in DIRECTORY, and
# its path is printed. Needs dpkg-deb and dpkg-shlibdeps (packages dpkg and dpkg-dev), not root.
set -eu
[ $# = 3 ] || { echo "usage: $0 TREE VERSION DIRECTORY" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
tree=$(cd "$1" && pwd) version=$2 target=$3
architecture=$(dpkg --print-architecture)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The changelog and the terms, as Debian's policy has them.
doc=$tree/usr/share/doc/vmgang
install -D -m 0644 "$here/copyright" "$doc/copyright"
install -m 0644 "$here/../../docs/operations.md" "$doc/operations.md"
{
    echo "vmgang ($version) unstable; urgency=medium"
    echo
    echo "  * See /usr/share/doc/vmgang/CHANGELOG.md.gz."
    echo
    echo " -- $(sed -n 's/^Maintainer: //p' "$here/control.in")  $(date -R -d "@${SOURCE_DATE_EPOCH:-$(date +%s)}")"
} | gzip -9n > "$doc/changelog.gz"
gzip -9nc "$here/../../CHANGELOG.md" > "$doc/CHANGELOG.md.gz"
gzip -9nf "$tree"/usr/share/man/man*/*.[1-8]
find "$tree" -type d -exec chmod 0755 {} +

# Programs without symbols; libraries that they ask for.
mkdir -p "$work/debian"
printf 'Source: vmgang\n\nPackage: vmgang\nArchitecture: any\n' > "$work/debian/control"
for program in usr/bin/vmgang usr/sbin/vmgangd usr/sbin/vmgang-hook usr/libexec/vmgang/virsh; do
    strip --remove-section=.comment --remove-section=.note "$tree/$program"
done
libraries=$(cd "$work" && dpkg-shlibdeps -O -e"$tree/usr/bin/vmgang" -e"$tree/usr/sbin/vmgangd" \
        -e"$tree/usr/sbin/vmgang-hook" -e"$tree/usr/libexec/vmgang/virsh" |
    sed -n 's/^shlibs:Depends=//p')
[ -n "$libraries" ] || { echo "dpkg-shlibdeps found no libraries" >&2; exit 1; }

rm -rf "$tree/DEBIAN"
mkdir "$tree/DEBIAN"
# What an administrator may have changed stays as it is, unless they say otherwise.
(cd "$tree" && find etc -type f | sed 's|^|/|' | sort) > "$tree/DEBIAN/conffiles"
(cd "$tree" && find usr -type f -print0 | sort -z | xargs -0 md5sum) > "$tree/DEBIAN/md5sums"
sed -e "s|@version@|$version|" -e "s|@architecture@|$architecture|" \
    -e "s|@libraries@|$libraries|" \
    -e "s|@size@|$(du -k -s --exclude=DEBIAN "$tree" | cut -f1)|" \
    "$here/control.in" > "$tree/DEBIAN/control"
for script in postinst prerm postrm; do
    install -m 0755 "$here/$script" "$tree/DEBIAN/$script"
done
mkdir -p "$target"
package=$target/vmgang_${version}_$architecture.deb
dpkg-deb --root-owner-group -Zxz --build "$tree" "$package" >&2
echo "$package"
