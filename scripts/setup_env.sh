#!/usr/bin/env bash
# Makes or reuses .venv in the repository root and installs the project there, for development.
# Does nothing where the last install is complete and its inputs are unchanged. Where uv is on PATH, it installs,
# and fetches Python 3.11 where there is no suitable one; else pip does.
# PYTHON=/path/to/python chooses the interpreter, VENV=/path/to/folder the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
VENV_PYTHON=$VENV/bin/python
STAMP=$VENV/installed.stamp
LOG=$VENV/install.log
NEEDED="Python 3.9 to 3.13"
LAVIS=(salesforce-lavis transformers peft)

fail() {
    echo "setup_env: $*" >&2
    exit 1
}

# Prints "3.11" for an interpreter that runs, nothing for one that does not (a shim, a broken link).
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

supported() {
    case "$1" in 3.9 | 3.10 | 3.11 | 3.12 | 3.13) return 0 ;; *) return 1 ;; esac
}

has_uv() {
    command -v uv >/dev/null 2>&1
}

find_python() {
    local candidate version found=""
    if [ -n "${PYTHON:-}" ]; then
        version=$(version_of "$PYTHON")
        [ -n "$version" ] || fail "PYTHON=$PYTHON does not run; set PYTHON to a $NEEDED."
        supported "$version" || fail "PYTHON=$PYTHON is Python $version, but $NEEDED is needed; set PYTHON to one of these."
        BASE_PYTHON=$PYTHON BASE_VERSION=$version
        return
    fi
    # LAVIS's pins fit the first three; what they lack on the others, lavis_aurora_compat.py gives.
    for candidate in python3.11 python3.10 python3.9 python3.12 python3.13 python3; do
        version=$(version_of "$candidate")
        if [ -n "$version" ] && supported "$version"; then
            BASE_PYTHON=$candidate BASE_VERSION=$version
            return
        fi
        if [ -n "$version" ]; then found="Python $version"; fi
    done
    if has_uv; then
        BASE_PYTHON=3.11 BASE_VERSION=3.11
        return
    fi
    fail "no $NEEDED on PATH (found: ${found:-no Python 3 that runs}); install uv, which fetches one" \
        "(pip install uv), and run this again; or install Python 3.11, or set PYTHON=/path/to/python3.11."
}

make_environment() {
    local message
    if has_uv; then
        # By its path, since by a name uv finds none in an active environment; 3.11 itself is one that uv fetches, and
        # must not be a shim of that name which does not run.
        local python=(--python "$(command -v "$BASE_PYTHON" || true)")
        if [ "$BASE_PYTHON" = 3.11 ]; then python=(--managed-python --python 3.11); fi
        message=$(uv venv --quiet --seed --clear "${python[@]}" "$VENV" 2>&1) && return
        echo "$message" | tail -n 5 >&2
        fail "'uv venv --seed ${python[*]}' failed (above); set PYTHON=/path/to/python3.11."
    fi
    message=$("$BASE_PYTHON" -m venv --clear "$VENV" 2>&1) && return
    echo "$message" | tail -n 5 >&2
    fail "'$BASE_PYTHON -m venv' failed (above); give that Python its venv module, set PYTHON to another, or install uv."
}

# LAVIS, transformers and peft are named because setup.cfg does not ask for them on Python 3.12 and later: uv resolves all
# with the overrides of pyproject.toml, pip takes these without what they require.
install_all() {
    if has_uv; then
        uv pip install --python "$VENV_PYTHON" --compile-bytecode -c constraints.txt \
            -e ".[dev]" "${LAVIS[@]}"
        return
    fi
    local pip=("$VENV_PYTHON" -m pip install --disable-pip-version-check --no-input)
    "${pip[@]}" --upgrade "pip>=24" &&
        "${pip[@]}" -e ".[dev]" -c constraints.txt &&
        "${pip[@]}" --no-deps "${LAVIS[@]}" -c constraints.txt
}

# The root is part of the stamp because an install points to the folder it was made in.
fingerprint() {
    echo "$PWD $(cat setup.cfg constraints.txt pyproject.toml requirements/*.txt | cksum)"
}

BASE_PYTHON="" BASE_VERSION=""
if [ -n "${PYTHON:-}" ]; then find_python; fi

version=""
if [ -x "$VENV_PYTHON" ]; then version=$(version_of "$VENV_PYTHON"); fi
if [ -n "$version" ]; then
    supported "$version" || fail "$VENV holds Python $version, but $NEEDED is needed; remove $VENV and run this again."
    if [ -n "$BASE_VERSION" ] && [ "$BASE_VERSION" != "$version" ]; then
        fail "$VENV holds Python $version, but PYTHON=$PYTHON is Python $BASE_VERSION; remove $VENV or unset PYTHON."
    fi
    if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; then exit 0; fi
fi

rm -f "$STAMP"
# An interrupted set-up may have left an environment without a working interpreter or pip.
if [ -z "$version" ] || ! { has_uv || "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; }; then
    if [ -z "$BASE_PYTHON" ]; then find_python; fi
    version=$BASE_VERSION
    make_environment
fi

if has_uv; then
    echo "setup_env: installing into $VENV with Python $version by uv (a first install downloads about 3 GB into" \
        "$(uv cache dir), which grows by about 7 GB and shares them with $VENV on the same disk; log: $LOG)"
else
    echo "setup_env: installing into $VENV with Python $version (a first install downloads about 3 GB and" \
        "takes 5 to 10 minutes, with uv on PATH 1 to 2; log: $LOG)"
fi
if ! install_all >"$LOG" 2>&1; then
    echo "setup_env: the end of $LOG:" >&2
    tail -n 15 "$LOG" >&2
    fail "the install failed (above); once the cause is removed, run this again and it will continue."
fi
fingerprint >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
