"""``lavis-aurora doctor``: right where all is well, and of use where nothing else works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import lavis_aurora_compat

import pytest
import torch

import lavis_aurora_doctor
from lavis_aurora_cli import main
from lavis_aurora_doctor import ERROR, OK, WARNING, Finding, _conflicts, _remedy, _stages, _step, doctor, report

ROOT = Path(__file__).resolve().parents[1]


def _doctor(path: Path | None = None, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(path or ""), str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "lavis_aurora_cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})


@pytest.mark.slow
def test_here_all_is_well() -> None:
    done = _doctor(None, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["ok"], done.stdout
    by_name = {one["name"]: one for one in found["findings"]}
    assert {"Python", "LAVIS", "torch", "numpy", "Hugging Face cache", "AURORA_DATA"} <= set(by_name)
    assert by_name["step of the tiny model"]["value"].startswith("ITC 0.7387")


def test_the_step_of_the_tiny_model_has_the_numbers_of_every_python() -> None:
    """See docs/install.md; in this process."""
    with torch.random.fork_rng():
        assert re.fullmatch(
            r"ITC 0\.7387\d, ITM 0\.0030\d, loss 6\.424\d+, gradient 1290\.\d+, answers green, square", _step()
        )


def test_a_broken_package_is_named_with_the_remedy_and_the_rest_is_still_tried(tmp_path: Path) -> None:
    """Broken as in life: torch cannot be loaded, cv2 ends the process, opencv is not for this numpy."""
    (tmp_path / "torch.py").write_text("raise OSError('libcublas.so.13: cannot open shared object file')")
    (tmp_path / "decord.py").write_text("import nowhere_to_be_had")
    done = _doctor(tmp_path)
    assert done.returncode == 1 and not done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("error    import torch ") and "libcublas.so.13" in line for line in lines)
    assert any("pip install -c constraints.txt nowhere_to_be_had" in line for line in lines)
    assert any(line.startswith("ok       import transformers") or "import transformers" in line for line in lines)
    assert any("step of the tiny model" in line and "not tried" in line for line in lines)


def test_a_process_that_dies_is_reported_at_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cv2.py").write_text("import os, sys; print('Illegal instruction', file=sys.stderr); os._exit(4)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    *_, last = _stages()
    assert (last.name, last.status) == ("import cv2", ERROR)
    assert "exit status 4" in last.value and "Illegal instruction" in last.value


def test_a_process_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(lavis_aurora_doctor, "TIMEOUT", 2)
    [last] = _stages()
    assert last.name == "import numpy" and "no answer within 2 s" in last.value


CONFLICTS = [
    ({"torch": (2, 5, 1)}, "torch", ERROR, "pip install -c constraints.txt torch"),
    ({"torch": (2, 16, 0)}, "torch", WARNING, "newer than tested"),
    ({"transformers": (4, 40, 0)}, "transformers", ERROR, "salesforce-lavis==1.0.2 transformers==4.26.1"),
    ({"huggingface-hub": (1, 2)}, "huggingface-hub", ERROR, "huggingface-hub<1"),
    (
        {"numpy": (2, 1, 0), "opencv-python-headless": (4, 5, 5, 64)},
        "opencv-python-headless",
        ERROR,
        "pip install 'numpy<2'",
    ),
    ({"opencv-python": (4, 5, 5, 64)}, "opencv-python", WARNING, "uninstall all"),
    ({"accelerate": (1,), "safetensors": ()}, "accelerate", ERROR, "pip install safetensors"),
    ({"peft": (0, 17)}, "peft", WARNING, "peft==0.13.2"),
]
WELL = {
    "torch": (2, 15, 0),
    "transformers": (4, 26, 1),
    "huggingface-hub": (0, 36, 2),
    "numpy": (1, 26, 4),
    "opencv-python-headless": (4, 5, 5, 64),
    "safetensors": (0, 8),
    "accelerate": (1, 15),
    "peft": (0, 13, 2),
}


@pytest.mark.parametrize(("change", "name", "status", "remedy"), CONFLICTS, ids=[case[1] for case in CONFLICTS])
def test_known_conflicts(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, tuple[int, ...]], name: str, status: str, remedy: str
) -> None:
    monkeypatch.setattr(lavis_aurora_compat, "release", lambda package: WELL.get(package, ()))
    assert not list(_conflicts())
    monkeypatch.setattr(lavis_aurora_compat, "release", lambda package: {**WELL, **change}.get(package, ()))
    found = dict(_conflicts())[name]
    assert found[0] == status and remedy in found[1]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("RuntimeError: operator torchvision::nms does not exist", "of two builds"),
        ("ImportError: numpy.core.multiarray failed to import", "numpy"),
        ("ImportError: libGL.so.1: cannot open shared object file", "pip uninstall opencv-python"),
        ("ModuleNotFoundError: No module named 'lavis'", lavis_aurora_compat.INSTALL_LAVIS),
        ("ModuleNotFoundError: No module named 'cv2'", "opencv-python-headless"),
        ("ModuleNotFoundError: No module named 'skimage.io'", "scikit-image"),
        ("tokenizers<0.14 is required for a normal functioning of this module", "import lavis_aurora"),
        ("ValueError: something else", ""),
    ],
)
def test_remedies(error: str, remedy: str) -> None:
    assert remedy in _remedy(error) and bool(remedy) == bool(_remedy(error))


def test_report_and_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("numpy", "2.0"), Finding("torch", "3", WARNING, "pip install it")]
    assert report(findings).splitlines()[-2:] == ["         -> pip install it", "no errors: it works here"]
    monkeypatch.setattr(lavis_aurora_doctor, "examine", lambda: [*findings, Finding("LAVIS", "none", ERROR)])
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--json"])
    assert caught.value.code == 1
    assert json.loads(capsys.readouterr().out)["findings"][0] == {
        "name": "numpy",
        "value": "2.0",
        "status": OK,
        "remedy": "",
    }
    assert doctor() == 1 and "1 error" in capsys.readouterr().out


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AURORA_DATA", str(tmp_path / "absent"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--bert-base-uncased/snapshots/1").mkdir(parents=True)
    cache, data = lavis_aurora_doctor._places()
    assert "holds bert-base-uncased" in cache.value
    assert data.status == WARNING and "no such folder" in data.remedy
