#!/usr/bin/env bash
# Makes one Parquet file from the text of Debian's linux-source package, or from a part of it with MEGABYTES:
#   bench/linux_corpus.sh OUT.parquet [MEGABYTES]
# Needs apt-get, dpkg-deb, tar, xz and the patchkernels command (or $PATCHKERNELS). The text is under GPL-2.0.
set -euo pipefail

out=$(realpath "${1:?usage: bench/linux_corpus.sh OUT.parquet [MEGABYTES]}")
megabytes=${2:-}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

cd "$scratch"
package=$(apt-cache depends linux-source | sed -n 's/^ *Depends: *//p' | head -n 1)
apt-get download "${package:?the package lists name no linux-source: apt-get update}"
version=$(dpkg-deb --field ./*.deb Version)
mkdir tree
dpkg-deb --fsys-tarfile ./*.deb | tar --extract --to-stdout --wildcards './usr/src/*.tar.xz' |
	tar --extract --xz --strip-components=1 --directory=tree
${PATCHKERNELS:-patchkernels} corpus --path tree --endings .c .h .S .rst .py .sh \
	--origin "$package $version" --out "$out" ${megabytes:+--megabytes "$megabytes"}
