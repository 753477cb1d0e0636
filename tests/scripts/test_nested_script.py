"""One nested training against trainings of each rank: which runs there are, and the table."""

from __future__ import annotations

import json
from pathlib import Path

import comparison
import nested
import pytest
from nested import RANKS, CutTest, area, main, table, trained_cells
from tiny import project_yaml

from lavis_aurora.common.paths import package_file
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import RetrievalAuroraConfig
from lavis_aurora.project import load_config


def test_cells_train_what_their_method_says(tmp_path):
    yaml = str(project_yaml(tmp_path))
    cells = trained_cells(tmp_path, ["growing", "uniform", "naive"], [1, 2], 4)
    assert list(cells) == [(m, 64, s) for s in (1, 2) for m in ("growing", "uniform", "dedicated")]
    assert len(trained_cells(tmp_path, ["dedicated", "naive"], [1], 4)) == len(RANKS)
    for (method, rank, seed), cell in cells.items():
        cfg = load_config(yaml, [f"{key}={value}" for key, value in cell.settings.items()])
        settings = parse_config(RetrievalAuroraConfig, cfg.model_cfg, "model").mode_approx
        assert (settings.rank, cfg.run_cfg.seed) == (rank, seed)
        assert settings.nested == (method != "dedicated")
        assert cfg.run_cfg.max_epoch == (1 if method == "dedicated" else 6)
        assert cfg.run_cfg.rank == (None if method == "dedicated" else "auto")
        if method != "dedicated":
            assert (settings.nested_ranks, settings.nested_steps) == ([4, 8, 16, 32], method)


def test_the_area_is_the_mean_over_the_logarithm_of_the_rank():
    assert area({4: 70.0, 8: 70.0, 64: 70.0}) == 70
    assert area({4: 60.0, 8: 80.0, 16: 80.0}) == (70 + 80) / 2
    assert area({4: 60.0, 16: 80.0, 32: 80.0}) == pytest.approx((2 * 70 + 80) / 3)


def test_the_table_has_mean_and_spread(tmp_path):
    found = {"growing": {1: dict.fromkeys(RANKS, 80.0), 2: dict.fromkeys(RANKS, 82.0)}}
    assert table(found, {"growing": 61.7}).splitlines()[2] == "| growing" + " | 81.0 (1.4)" * 6 + " | 62 |"


@pytest.mark.slow
def test_a_whole_comparison(tmp_path, monkeypatch, capsys):
    """Trains one nested run and the largest rank alone, cuts and tests both; the second call only prints."""
    weights = package_file("configs/models/tiny/model.safetensors")
    yaml = project_yaml(tmp_path, model={"pretrained": weights})
    monkeypatch.setitem(comparison.TASKS, "pictures", str(yaml))
    monkeypatch.setattr(nested, "RANKS", (2, 8))
    arguments = ["--seeds", "1", "--methods", "growing", "naive", "--output", str(tmp_path / "out"), "--jobs", "2"]
    main(arguments)
    first = capsys.readouterr().out
    assert "| growing |" in first and "| naive |" in first and "run.rank: auto chose" in first
    content = json.loads((tmp_path / "out" / "nested.json").read_text())
    assert content["recall"].keys() == {"growing", "naive"} and content["recall"]["growing"]["1"].keys() == {"2", "8"}
    assert content["auto"]["growing, seed 1"] in (2, 8)
    monkeypatch.setattr(CutTest, "start", None)
    main(arguments)
    assert capsys.readouterr().out.splitlines()[-5:] == first.splitlines()[-5:]
    assert Path(tmp_path / "out" / "both_8_seed1" / "rank_2" / "adapter").is_dir()
