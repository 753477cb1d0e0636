"""The benchmark of the evaluation runs, and LAVIS's own model and function give the scores of ours at BLIP base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_eval.py"


@pytest.mark.slow
def test_both_sides_are_measured_and_agree(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--kinds", "images", "--k", "2", "--runs", "1", "--threads", "1"]
    done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, check=True)
    assert "images: pairs reranked per second" in done.stdout and "images: peak main memory" in done.stdout
    row = json.loads(path.read_text())["images"]
    assert row["lavis"]["pairs"] == row["ours"]["pairs"] == 4
    assert row["max_score_difference"] < 1e-4 < row["score_deviation"]
