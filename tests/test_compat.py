"""LAVIS beside packages that are later than it, and without those that it hardly uses."""

from __future__ import annotations

import configparser
import importlib.util
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import lavis_aurora_compat

import numpy
import pytest
from lavis.datasets.datasets.retrieval_datasets import RetrievalDataset

from lavis_aurora.training.order import SeededDataset
from lavis_aurora_cli import main

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
BLOCK = """
import sys
from importlib.machinery import PathFinder
class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else super().find_spec(name, path, target)
sys.meta_path[:] = [Absent if finder is PathFinder else finder for finder in sys.meta_path]
"""
HEAVY = {"streamlit", "spacy", "plotly", "IPython", "opendatasets", "pre_commit", "magic", "contexttimer", "wheel"}
IMPORTS = """
import lavis_aurora, torch
from lavis.models.img2prompt_models import img2prompt_vqa
for name in ("blip_retrieval_aurora", "blip_vqa_aurora"):
    model, vis, txt = lavis_aurora.load_model_and_preprocess(name, "tiny", is_eval=True)
import lavis.tasks, lavis.datasets.builders
try:
    img2prompt_vqa.spacy.load
except AttributeError as error:
    assert "pip install spacy" in str(error)
else:
    raise SystemExit("spacy is there")
"""
LATER = """
import importlib.metadata, sys
original = importlib.metadata.version
importlib.metadata.version = lambda name: "0.23.3" if name == "tokenizers" else original(name)
"""


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)


def _requirements(name: str) -> set[str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found = (re.match(r"[A-Za-z0-9_.-]+", line) for line in lines)
    return {match[0].lower().replace("_", "-") for match in found if match}


def test_retrieval_and_vqa_need_the_minimal_list_alone() -> None:
    """Begun as a spawned data process begins, which is sent data and imports what they name.

    These begin with this package's class around them, whatever program started it: the stand-ins come before LAVIS.
    """
    data = SeededDataset(RetrievalDataset.__new__(RetrievalDataset), seed=0)
    spawned = (
        f"import pickle, sys; pickle.loads({pickle.dumps(data)!r}); names = list(sys.modules)\n"
        "assert names.index('lavis_aurora_compat') < names.index('lavis')"
    )
    done = _python(BLOCK.format(absent=HEAVY) + spawned + IMPORTS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["salesforce-lavis", "transformers"])
def test_the_minimal_list_holds_what_a_package_requires_but_the_heavy(package: str) -> None:
    """What is left out of LAVIS's requirements is left out on purpose: each is in a list."""
    from importlib.metadata import requires

    left_out = {"streamlit", "spacy", "plotly", "ipython", "opendatasets", "pre-commit", "python-magic"}
    left_out |= {"contexttimer", "wheel"}
    required = {re.match(r"[\w.-]+", line)[0].lower() for line in requires(package) or () if "extra ==" not in line}
    missing = required - _requirements("minimal.txt") - left_out - {"transformers", "importlib-metadata"}
    assert not missing


def test_install_requires_is_the_two_lists() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options"]["install_requires"] == "file: requirements/minimal.txt, requirements/lavis.txt"


def test_a_later_tokenizers_is_accepted_and_the_other_versions_are_still_checked() -> None:
    check = "import lavis_aurora_compat\nimport transformers\nprint(transformers.__version__)"
    assert "tokenizers" in _python(LATER + "import transformers").stderr
    assert _python(LATER + check).stdout == "4.26.1\n"
    old = LATER.replace('if name == "tokenizers"', 'if name == "tokenizers" else "1.0" if name == "tqdm"')
    assert "tqdm" in _python(old + check).stderr


@pytest.mark.slow
def test_lavis_imported_first_is_said() -> None:
    """As in a notebook whose first cell failed."""
    code = "try:\n    import lavis\nexcept ImportError: pass\nimport lavis_aurora"
    last = _python(LATER + code).stderr.splitlines()[-1]
    assert last == f"ImportError: {lavis_aurora_compat.BEFORE_US}"


@pytest.mark.slow
def test_a_transformers_that_lavis_does_not_run_with_is_said() -> None:
    """Also where it was imported first: another order would be no way out."""
    later = LATER.replace('"0.23.3" if name == "tokenizers"', '"4.57.6" if name == "transformers"')
    gone = "import transformers.modeling_utils as m\ndel m.apply_chunking_to_forward\n"
    last = _python(f"{later}{gone}import lavis_aurora").stderr.splitlines()[-1]
    assert last.startswith("ImportError: LAVIS runs with transformers 4.26, and 4.57.6 is installed (ImportError: ")
    assert last.endswith("in an environment without LAVIS, see docs/any_model.md")


def test_without_lavis_a_command_says_in_one_line_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(SystemExit) as caught:
        main(["targets", "blip_retrieval_aurora"])
    assert caught.value.code == (
        "error: lavis and transformers not installed; type: "
        "pip install --no-deps salesforce-lavis==1.0.2 transformers==4.26.1"
    )


def test_numpy_2_has_the_name_that_lavis_uses() -> None:
    assert vars(numpy)["Inf"] == float("inf")


@pytest.mark.parametrize(
    ("version", "expected"), [("4.5.5.64", (4, 5, 5, 64)), ("2.13.0+cpu", (2, 13, 0)), ("1.0rc1", (1, 0)), (None, ())]
)
def test_release(monkeypatch: pytest.MonkeyPatch, version: str | None, expected: tuple[int, ...]) -> None:
    monkeypatch.setattr(lavis_aurora_compat, "version", lambda name: version)
    assert lavis_aurora_compat.release("any") == expected
