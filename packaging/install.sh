#!/bin/sh
# Copies the libraries and the command nats-presence into PREFIX:   ./install.sh [PREFIX]   (default /usr/local)
#
# You may also leave it here, or copy the folders yourself: the pkg-config and CMake files find their neighbours.
set -eu
prefix=${1:-/usr/local}
cd "$(dirname "$0")"
mkdir -p "$prefix"
cp -R bin include lib share "$prefix/"
echo "installed below $prefix"
case $prefix in
  /usr | /usr/local) ldconfig 2>/dev/null || true ;;
  *) echo "pkg-config finds it as $(cd "$prefix" && pwd)/lib/pkgconfig/nats-presence.pc" ;;
esac
