"""The benchmark of the evaluation runs, and LAVIS's own model and function give the scores of ours at BLIP base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_eval_models import RandomTokenEncoder

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_eval.py"


@pytest.mark.slow
def test_both_sides_are_measured_and_agree(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = ["--kinds", "images", "--k", "2", "--runs", "1", "--threads", "1", "--merge", "16"]
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, check=True)
    assert "images: pairs reranked per second" in done.stdout and "images: peak main memory" in done.stdout
    row = json.loads(path.read_text())["images"]
    assert row["lavis"]["pairs"] == row["ours"]["pairs"] == 4
    assert row["max_score_difference"] < 1e-4 < row["score_deviation"]
    assert row["merged"]["pairs"] == 4 and "images, tokens merged: pairs reranked per second" in done.stdout


def test_the_stand_in_leaves_as_many_tokens_as_the_tower() -> None:
    kept = RandomTokenEncoder(577, 1, merge=16).forward_features(torch.zeros(2, 3, 1, 1))
    assert kept.shape == (2, 577 - 12 * 16, 769)
    # Each stands for as many patches as it takes for all of them.
    torch.testing.assert_close(kept[..., 768].sum(1), torch.full((2,), 577.0))
    assert RandomTokenEncoder(577, 1).forward_features(torch.zeros(1, 3, 1, 1)).shape == (1, 577, 768)
    assert RandomTokenEncoder(10, 1, merge=64).tokens == 2
