#!/bin/sh
# Install what the browser test needs of Debian: Chromium, and a font that can draw Japanese. Does nothing where both are there.
set -eu
for package in chromium fonts-ipafont-gothic; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="${missing:-} $package"
done
[ -n "${missing:-}" ] || exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086 # a list of names
apt-get install -y -qq --no-install-recommends $missing >/dev/null
