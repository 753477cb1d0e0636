#!/usr/bin/env bash
# Makes or reuses .venv in the repository root and installs the project there, for development.
# Does nothing where the last install is complete and its inputs are unchanged.
# PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV_PYTHON=.venv/bin/python
STAMP=.venv/installed.stamp
LOG=.venv/install.log

fail() {
    echo "setup_env: $*" >&2
    exit 1
}

# Prints "3.11" for an interpreter that runs, nothing for one that does not (a shim, a broken link).
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

supported() {
    case "$1" in 3.9 | 3.10 | 3.11) return 0 ;; *) return 1 ;; esac
}

find_python() {
    local candidate version found=""
    if [ -n "${PYTHON:-}" ]; then
        version=$(version_of "$PYTHON")
        [ -n "$version" ] || fail "PYTHON=$PYTHON does not run; set PYTHON to a Python 3.9, 3.10 or 3.11."
        supported "$version" ||
            fail "PYTHON=$PYTHON is Python $version, but 3.9, 3.10 or 3.11 is needed; set PYTHON to one of these."
        BASE_PYTHON=$PYTHON BASE_VERSION=$version
        return
    fi
    for candidate in python3.11 python3.10 python3.9 python3; do
        version=$(version_of "$candidate")
        if [ -n "$version" ] && supported "$version"; then
            BASE_PYTHON=$candidate BASE_VERSION=$version
            return
        fi
        if [ -n "$version" ]; then found="Python $version"; fi
    done
    fail "no Python 3.9, 3.10 or 3.11 on PATH (found: ${found:-no Python 3 that runs}); install" \
        "Python 3.11, or set PYTHON=/path/to/python3.11."
}

# The root is part of the stamp because an install points to the folder it was made in.
fingerprint() {
    echo "$PWD $(cat setup.cfg constraints.txt pyproject.toml | cksum)"
}

BASE_PYTHON="" BASE_VERSION=""
if [ -n "${PYTHON:-}" ]; then find_python; fi

version=""
if [ -x "$VENV_PYTHON" ]; then version=$(version_of "$VENV_PYTHON"); fi
if [ -n "$version" ]; then
    supported "$version" ||
        fail ".venv holds Python $version, but 3.9, 3.10 or 3.11 is needed; remove .venv and run this again."
    if [ -n "$BASE_VERSION" ] && [ "$BASE_VERSION" != "$version" ]; then
        fail ".venv holds Python $version, but PYTHON=$PYTHON is Python $BASE_VERSION; remove .venv or unset PYTHON."
    fi
    if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; then exit 0; fi
fi

rm -f "$STAMP"
# An interrupted set-up may have left an environment without a working interpreter or pip.
if [ -z "$version" ] || ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    if [ -z "$BASE_PYTHON" ]; then find_python; fi
    version=$BASE_VERSION
    if ! message=$("$BASE_PYTHON" -m venv --clear .venv 2>&1); then
        echo "$message" | tail -n 5 >&2
        fail "'$BASE_PYTHON -m venv .venv' failed (above); give that Python its venv module, or set PYTHON to another one."
    fi
fi

echo "setup_env: installing into .venv with Python $version (a first install downloads about 3 GB and" \
    "takes 5 to 10 minutes; log: $LOG)"
if ! {
    "$VENV_PYTHON" -m pip install --disable-pip-version-check --no-input --upgrade "pip>=24" &&
        "$VENV_PYTHON" -m pip install --disable-pip-version-check --no-input \
            -e ".[test,baselines]" -c constraints.txt
} >"$LOG" 2>&1; then
    echo "setup_env: the end of $LOG:" >&2
    tail -n 15 "$LOG" >&2
    fail "the install failed (above); once the cause is removed, run this again and it will continue."
fi
fingerprint >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
