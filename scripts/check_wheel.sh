#!/usr/bin/env bash
# Builds the source distribution, and from it the wheel; checks both (twine) and that the wheel carries the package data;
# loads a model from the wheel in a fresh environment, outside the source tree. Dependencies come from .venv
# (scripts/setup_env.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
python=$root/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
unset PYTHONPATH PYTHONHOME
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 MPLBACKEND=Agg
export PIP_DISABLE_PIP_VERSION_CHECK=1

quietly() { # runs a command, and shows its output only where it fails
    "$@" >"$work/log" 2>&1 || {
        tail -n 30 "$work/log" >&2
        echo "check_wheel: failed: $*" >&2
        exit 1
    }
}

# A copy is built, so that neither an old build/ nor a stale file list reaches the wheel.
mkdir "$work/source" "$work/empty"
for file in setup.cfg pyproject.toml README.md LICENSE lavis_aurora_*.py; do
    if [ -f "$file" ]; then cp "$file" "$work/source/"; fi
done
# lavis_aurora/projects is a link to projects/aurora.
cp -R lavis_aurora projects requirements "$work/source/"
quietly "$python" -m build --no-isolation --outdir "$work/dist" "$work/source"
quietly "$python" -m twine check --strict "$work"/dist/*
wheel=$(echo "$work"/dist/lavis_aurora-*.whl)

"$python" - "$wheel" "$root" <<'PY'
import pathlib
import sys
import zipfile

wheel, root = sys.argv[1], pathlib.Path(sys.argv[2])
packed = set(zipfile.ZipFile(wheel).namelist())
kinds = (".py", ".typed", ".yaml", ".json", ".txt", ".safetensors")
source = {p.relative_to(root).as_posix() for p in (root / "lavis_aurora").rglob("*") if p.suffix in kinds}
if not any(name.endswith(".yaml") for name in source):
    sys.exit("check_wheel: lavis_aurora holds no .yaml file")
projects = root / "projects/aurora"  # to which a link leads, that rglob does not follow
source |= {f"lavis_aurora/projects/{p.relative_to(projects).as_posix()}" for p in projects.rglob("*.yaml")}
missing = sorted(source - packed)
if missing:
    sys.exit("check_wheel: not in the wheel: " + ", ".join(missing) + "; see package_data in setup.cfg")
PY

quietly "$python" -m venv --without-pip "$work/venv"
quietly "$python" -m pip --python "$work/venv/bin/python" install --no-deps --no-index "$wheel"
# The path alone is added: .pth files in .venv, the editable install among them, stay unread.
"$python" - "$work/venv" <<'PY'
import glob
import sys
import sysconfig

[site] = glob.glob(sys.argv[1] + "/lib/python3*/site-packages")
with open(site + "/dependencies.pth", "w", encoding="utf-8") as file:
    file.write(sysconfig.get_path("purelib") + "\n")
PY

cd "$work/empty"
quietly "$work/venv/bin/python" -c '
import pathlib, sys
import lavis_aurora
file = pathlib.Path(lavis_aurora.__file__).resolve()
if pathlib.Path(sys.prefix).resolve() not in file.parents:
    sys.exit(f"lavis_aurora was imported from {file}, not from the wheel")
'
quietly "$work/venv/bin/python" -c \
    "from lavis_aurora import load_model_and_preprocess as f; f('blip_retrieval_aurora', 'tiny')"
quietly "$work/venv/bin/lavis-aurora" --help
quietly "$work/venv/bin/lavis-aurora" configs demo_ret
echo "check_wheel: $(basename "$wheel") holds its data files and loads a model outside the source tree"
