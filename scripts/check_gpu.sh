#!/usr/bin/env bash
# Checks the package on this machine's GPU, in at most 10 minutes:  bash scripts/check_gpu.sh [arguments of check_gpu.py]
# With .venv (scripts/setup_env.sh), or with PYTHON=/path/to/python; torch and safetensors are enough for its first parts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then python=python3; fi
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
exec "$python" scripts/check_gpu.py "$@"
