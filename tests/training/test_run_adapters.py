"""The adapter folders of a run."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import project_yaml

from lavis_aurora.training.run_adapters import _plain
from lavis_aurora_cli import evaluate, train


def run(tmp_path: Path, *options: str, command=train, **sections) -> Path:
    """Train, and return the folder of the run."""
    yaml = project_yaml(tmp_path, **sections)
    before = set((tmp_path / "output").glob("*"))
    command(["--cfg-path", str(yaml), *(["--options", *options] if options else [])])
    [folder] = set((tmp_path / "output").glob("*")) - before
    return folder


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def test_best_and_last_hold_what_the_checkpoints_hold(tmp_path):
    folder = run(tmp_path, run={"max_epoch": 2, "init_lr": 1e-2})
    for adapter, checkpoint in (("adapter_best", "checkpoint_best.pth"), ("adapter_last", "checkpoint_latest.pth")):
        state = torch.load(folder / checkpoint, weights_only=True)
        tensors = load_file(folder / adapter / "adapter_model.safetensors")
        assert torch.equal(tensors["factors.P"], state["model"]["mode_approx.sets.default.P"])
        assert torch.equal(tensors["heads.itm_head.weight"], state["model"]["itm_head.weight"])
        gate = "text_encoder.encoder.layer.0.crossattention.gate.gamma"
        assert torch.equal(tensors[f"gate.{gate}"], state["model"][gate])
        metrics = config(folder / adapter)["metrics"]
        assert metrics["epoch"] == state["epoch"]
        assert "image_to_text_r1" in metrics["val"]
        assert ("test" in metrics) == (adapter == "adapter_best")
    assert config(folder / "adapter_best")["model"]["preprocess"]["vis_processor"]["eval"]["image_size"] == 48


def test_without_validation_the_last_one_is_tested(tmp_path):
    folder = run(tmp_path, run={"valid_splits": []})
    assert not (folder / "adapter_best").exists()
    assert set(config(folder / "adapter_last")["metrics"]) == {"epoch", "test"}


@pytest.mark.parametrize("tuning", ["lora", "uniadapter"])
def test_baselines_leave_adapters_that_evaluate_alike(tmp_path, tuning):
    """The folder says how the model was tuned; its YAML need not."""
    weights = {"pretrained": str(Path(__file__).parents[2] / "lavis_aurora/configs/models/tiny/model.safetensors")}
    options = (f"model.tuning={tuning}", f"model.{tuning}.rank=4")
    adapter = run(tmp_path, *options, model=weights, run={"init_lr": 1e-2}) / "adapter_last"
    written = config(adapter)
    assert written[tuning]["rank"] == 4 and written["model"]["settings"]["tuning"] == tuning
    again = run(tmp_path, f"model.adapter={adapter}", model=weights, run={"init_lr": 0.0}) / "adapter_last"
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, again))
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert config(again)["metrics"]["val"] == written["metrics"]["val"]


@pytest.mark.parametrize("tuning", ["heads", "full"])
def test_other_tunings_leave_no_adapter(tmp_path, tuning):
    folder = run(tmp_path, f"model.tuning={tuning}", run={"test_splits": []})
    assert not list(folder.glob("adapter_*"))


def test_tuning_goes_on_from_an_adapter_and_evaluation_writes_none(tmp_path):
    weights = {"pretrained": str(Path(__file__).parents[2] / "lavis_aurora/configs/models/tiny/model.safetensors")}
    first = run(tmp_path, model=weights, run={"init_lr": 1e-2})
    adapter = first / "adapter_last"
    second = run(tmp_path, f"model.adapter={adapter}", model=weights, run={"init_lr": 0.0})
    before, after = (load_file(f / "adapter_last" / "adapter_model.safetensors") for f in (first, second))
    assert all(torch.equal(after[key], value) for key, value in before.items())
    third = run(tmp_path, f"model.adapter={adapter}", command=evaluate, model=weights)
    assert not list(third.glob("adapter_*"))


def test_metrics_are_numbers_and_words():
    metrics = {"epoch": 1, "test": {"r1": 2.5, "bad": math.nan, "ranks": [1]}, "name": "x", "none": None}
    assert _plain(metrics) == {"epoch": 1, "test": {"r1": 2.5}, "name": "x"}
