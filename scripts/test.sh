#!/usr/bin/env bash
# Sets up .venv, lints, checks types and tests:  bash scripts/test.sh [--slow] [pytest arguments]
# --slow runs the long tests as well. The exit status is pytest's; where pytest passes, that of ruff and mypy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

markers=()
arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then
        markers=(-m "") # no selection in place of setup.cfg's "not slow"
    else
        arguments+=("$argument")
    fi
done

bash scripts/setup_env.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 MPLBACKEND=Agg

lint=0
.venv/bin/python -m ruff check . || lint=$?
.venv/bin/python -m mypy || lint=$?
status=0
# Two processes; a file's tests stay in one, which shares what they have made.
.venv/bin/python -m pytest -n 2 --dist loadfile ${markers[@]+"${markers[@]}"} ${arguments[@]+"${arguments[@]}"} || status=$?
if [ "$status" -ne 0 ]; then exit "$status"; fi
if [ "$lint" -ne 0 ]; then echo "test: pytest passed, but ruff or mypy did not (above)" >&2; fi
exit "$lint"
