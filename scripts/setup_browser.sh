#!/usr/bin/env bash
# A Chromium for tests/test_app_browser.py:  bash scripts/setup_browser.sh
# The one that is there, or Debian's by apt-get where this may install it; without one, those tests are skipped.
set -euo pipefail

for name in "${CHROMIUM:-chromium}" chromium google-chrome; do
    if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
said="setup_browser: the page is not tested in a browser;"
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "$said install chromium (e.g. sudo apt-get install chromium), or set CHROMIUM to a browser of its kind" >&2
    exit 0
fi
log=$(mktemp)
if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
    >"$log" 2>&1; then
    tail -n 3 "$log" >&2
    echo "$said apt-get could not install chromium (above)" >&2
fi
rm -f "$log"
