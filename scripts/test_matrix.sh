#!/usr/bin/env bash
# Installs the project with each Python and tests it there:  bash scripts/test_matrix.sh 3.9 3.10 3.11 3.12 3.13
# Runs the law tests (--all first: the whole default suite) and `lavis-aurora doctor`, and prints a table, in Markdown.
# uv must be on PATH; it fetches the Pythons that are not there. Environments (7 GB each, of which those on the disk of
# uv's cache share what they can) are made by scripts/setup_env.sh in .venvs/VERSION and kept, with the tests' output.
# MATRIX=/path/to/folder puts them elsewhere. The exit status is 0 where everything passed everywhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LAWS=(
    tests/docs/test_reference.py tests/mode_approx tests/alignment tests/adapters/test_sets.py tests/adapters/test_merge.py
    tests/models/test_blip_retrieval_aurora.py tests/models/test_blip_vqa_aurora.py tests/models/test_vqa_answers.py
    tests/models/test_mode_approx_model.py tests/models/test_run_state.py tests/models/test_several_processes.py
    tests/test_compat.py tests/test_init.py
)
MATRIX=${MATRIX:-.venvs}

if [ "${1:-}" = --all ]; then
    LAWS=(tests)
    shift
fi
if [ $# -eq 0 ]; then
    echo "usage: bash scripts/test_matrix.sh [--all] VERSION..., e.g. 3.9 3.10 3.11 3.12 3.13" >&2
    exit 2
fi
if ! command -v uv >/dev/null; then
    echo "test_matrix: uv is not on PATH; install it (pip install uv) and run this again" >&2
    exit 2
fi
unset PYTHONPATH
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 MPLBACKEND=Agg
mkdir -p "$MATRIX"

# Prints a cell each of the versions and numbers in a report of the doctor.
cells() {
    "$1" - "$2" <<'PY'
import json
import sys

found = {one["name"]: one["value"] for one in json.load(open(sys.argv[1]))["findings"]}
opencv = next((found[name] for name in found if name.startswith("opencv")), "")
versions = [found["torch"], found["numpy"], opencv, found["tokenizers"]]
print(" | ".join([*versions, found.get("step of the tiny model") or "crashed"]))
PY
}

failed=0
rows=()
for version in "$@"; do
    venv=$MATRIX/$version python=$MATRIX/$version/bin/python began=$SECONDS
    interpreter=$(uv python find --no-project --system "$version" 2>/dev/null || true)
    if [ -z "$interpreter" ]; then
        uv python install "$version"
        interpreter=$(uv python find --no-project --managed-python "$version")
    fi
    if ! PYTHON=$interpreter VENV=$venv bash scripts/setup_env.sh; then
        rows+=("| $version | not installed | | | | | |")
        failed=1
        continue
    fi
    installed=$((SECONDS - began))
    "$python" -m pytest -q -p no:cacheprovider "${LAWS[@]}" >"$MATRIX/$version.tests.log" 2>&1 || failed=1
    tests=$(tail -n 1 "$MATRIX/$version.tests.log")
    "$python" lavis_aurora_cli.py doctor --json >"$MATRIX/$version.doctor.json" || failed=1
    rows+=("| $version | $(cells "$python" "$MATRIX/$version.doctor.json") | $tests | $installed |")
    echo "${rows[-1]}"
done

echo
echo "$(date +%F), $(uname -srm), $(nproc) cores:"
echo
echo "| Python | torch | numpy | opencv | tokenizers | step of the tiny model | tests | seconds to install |"
echo "| --- | --- | --- | --- | --- | --- | --- | --- |"
printf '%s\n' "${rows[@]}"
exit "$failed"
