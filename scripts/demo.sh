#!/usr/bin/env bash
# Sets up .venv and runs the demo:  bash scripts/demo.sh [arguments of scripts/demo.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_env.sh
exec .venv/bin/python scripts/demo.py "$@"
