#!/usr/bin/env bash
# Builds the site of the documentation (mkdocs.yml), without a network:  bash scripts/build_docs.sh [FOLDER]
# Open FOLDER/index.html (default: site). A broken link, an anchor that is not there or a page that README.md's table does
# not name is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_env.sh
export NO_MKDOCS_2_WARNING=1 # about what comes after mkdocs 1
site=${1:-site}
.venv/bin/python -m mkdocs build --strict --quiet --site-dir "$site"
echo "build_docs: $site/index.html"
