#!/usr/bin/env bash
# Runs tests against LAVIS's main branch:  bash scripts/test_lavis_main.sh [pytest arguments]
# Without arguments these are the quick ones of models, datasets and tasks. Main's sources are those of ammico-lavis; they
# are kept in .venv/lavis_main and put before the LAVIS of .venv, which stays as it is. Where they cannot be downloaded
# the last line says that nothing was tested, and the exit status is 0, or 3 with AURORA_LAVIS_MAIN=required.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SOURCES=ammico-lavis==1.0.2.3
# What main imports at once for audio, 3D and diffusion, and BLIP has no use for: empty modules stand in for them.
UNUSED="torchaudio/transforms torchaudio/compliance/kaldi moviepy/editor diffusers/utils/pil_utils
    diffusers/models/cross_attention easydict h5py nltk open3d"
TESTS="tests/models/test_lavis_models.py tests/models/test_plain_lavis.py tests/models/test_blip_retrieval_aurora.py
    tests/models/test_blip_vqa_aurora.py tests/models/test_vqa_answers.py tests/training/test_lavis_tasks.py
    tests/training/test_task_needs.py tests/training/test_task_base.py tests/data/test_own.py tests/data/test_samples.py
    tests/data/test_video_qa.py tests/common/test_summary.py tests/config/test_dataset_keys.py"

python=.venv/bin/python
folder=$PWD/.venv/lavis_main

unpack() { # into $1
    "$python" -m pip download --quiet --no-deps --dest "$1" "$SOURCES" &&
        "$python" -m zipfile --extract "$1"/*.whl "$1/wheel" && mv "$1/wheel/lavis" "$1/lavis" || return 1
    rm -r "$1/wheel" "$1"/*.whl
    local module
    for module in $UNUSED; do
        mkdir -p "$1/$module"
        while [ "$module" != . ]; do
            printf '%s\n' 'def __getattr__(name):' '    if name.startswith("__"):' \
                '        raise AttributeError(name)' '    return type(name, (), {})' >"$1/$module/__init__.py"
            module=$(dirname "$module")
        done
    done
    echo "$SOURCES" >"$1/of"
}

bash scripts/setup_env.sh
if [ "$(cat "$folder/of" 2>/dev/null)" != "$SOURCES" ]; then
    rm -rf "$folder" "$folder.new"
    mkdir -p "$folder.new"
    if ! unpack "$folder.new"; then
        echo "test_lavis_main: NOT TESTED with LAVIS's main branch: $SOURCES could not be downloaded (above)" >&2
        if [ "${AURORA_LAVIS_MAIN:-}" = required ]; then exit 3; fi
        exit 0
    fi
    mv "$folder.new" "$folder"
fi

export PYTHONPATH=$folder:$PWD OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 MPLBACKEND=Agg
"$python" -c 'import sys, lavis; sys.exit(sys.argv[1] not in lavis.__file__)' "$folder" ||
    { echo "test_lavis_main: $folder is not the LAVIS that is imported" >&2; exit 1; }
if [ $# -eq 0 ]; then set -- $TESTS; fi
exec "$python" -m pytest -q -n 2 --dist loadfile "$@"
