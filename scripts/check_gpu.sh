#!/usr/bin/env bash
# Checks the package on this machine's GPU, in at most 10 minutes:  bash scripts/check_gpu.sh [arguments of check_gpu.py]
# By .venv (scripts/setup_env.sh), or PYTHON=/path/to/python, or python3; torch and safetensors are enough for its first
# parts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
if [ -z "${PYTHON:-}" ] && ! command -v "$python" >/dev/null; then python=python3; fi
if ! command -v "$python" >/dev/null; then
    echo "check_gpu: no $python: nothing was checked; run scripts/setup_env.sh, or set PYTHON to an interpreter" >&2
    exit 2
fi
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# NVIDIA's images turn TF32 on for all matrix products, by this.
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0
exec "$python" scripts/check_gpu.py "$@"
