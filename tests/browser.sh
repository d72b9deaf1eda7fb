#!/bin/sh
# Debian's Chromium and its driver, for the tests that look at pages. Does nothing if they are there.
set -eu
command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit 0
command -v apt-get >/dev/null || { echo "no chromium here, and no apt-get to install it: install chromium and chromedriver" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "no chromium here, and only root can install it: apt-get install chromium chromium-driver" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install --quiet --yes --no-install-recommends chromium chromium-driver fonts-dejavu-core; }
install || { apt-get update --quiet && install; }
