"""What a run leaves beside its checkpoints: adapter folders and its summary."""

import json
from pathlib import Path

import pytest
import torch
from runs import logged, only_run
from safetensors.torch import load_file
from tiny import project_yaml

from lavis_aurora.common.summary import SUMMARY, read_summary
from lavis_aurora.training.runner import AuroraRunner
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


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    """The folder of a run, which tests read."""
    return run(tmp_path_factory.mktemp("two_epochs"), run={"max_epoch": 2, "init_lr": 1e-2})


def test_best_and_last_hold_what_the_checkpoints_hold(two_epochs):
    folder = two_epochs
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


@pytest.mark.parametrize("tuning", [pytest.param("lora", marks=pytest.mark.slow), "uniadapter"])
def test_baselines_leave_adapters_that_evaluate_alike(tmp_path, tuning):
    """The folder says how the model was tuned; its YAML need not."""
    weights = {"pretrained": str(Path(__file__).parents[2] / "lavis_aurora/configs/models/tiny/model.safetensors")}
    options = (f"model.tuning={tuning}", f"model.{tuning}.rank=4")
    untested = {"test_splits": []}
    adapter = run(tmp_path, *options, model=weights, run={"init_lr": 1e-2, **untested}) / "adapter_last"
    written = config(adapter)
    assert written[tuning]["rank"] == 4 and written["model"]["settings"]["tuning"] == tuning
    again = (
        run(tmp_path, f"model.adapter={adapter}", model=weights, run={"init_lr": 0.0, **untested}) / "adapter_last"
    )
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, again))
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert config(again)["metrics"]["val"] == written["metrics"]["val"]


@pytest.mark.parametrize("tuning", ["heads", pytest.param("full", marks=pytest.mark.slow)])
def test_other_tunings_leave_no_adapter(tmp_path, tuning):
    folder = run(tmp_path, f"model.tuning={tuning}", run={"test_splits": []})
    assert not list(folder.glob("adapter_*"))


def test_tuning_goes_on_from_an_adapter_and_evaluation_writes_none(tmp_path):
    weights = {"pretrained": str(Path(__file__).parents[2] / "lavis_aurora/configs/models/tiny/model.safetensors")}
    unscored = {"valid_splits": [], "test_splits": []}
    first = run(tmp_path, model=weights, run={"init_lr": 1e-2, **unscored})
    adapter = first / "adapter_last"
    second = run(tmp_path, f"model.adapter={adapter}", model=weights, run={"init_lr": 0.0, **unscored})
    before, after = (load_file(f / "adapter_last" / "adapter_model.safetensors") for f in (first, second))
    assert all(torch.equal(after[key], value) for key, value in before.items())
    third = run(tmp_path, f"model.adapter={adapter}", command=evaluate, model=weights)
    assert not list(third.glob("adapter_*"))


def test_a_run_leaves_a_summary(two_epochs):
    folder = two_epochs
    summary = read_summary(folder)
    assert (summary["status"], summary["task"]) == ("finished", "retrieval_aurora")
    assert (summary["arch"], summary["model_type"], summary["tuning"]) == ("blip_retrieval_aurora", "tiny", "aurora")
    counts = summary["parameters"]
    assert "heads" in counts["groups"] and "frozen" not in counts["groups"]
    assert counts["trainable"] == sum(group["parameters"] for group in counts["groups"].values()) < counts["total"]
    validated = logged(folder, "val_agg_metrics")
    assert [one["epoch"] for one in summary["validation"]] == [0, 1]
    for one, line in zip(summary["validation"], validated):
        assert one["split"] == "val" and one["metrics"]["image_to_text_r1"] == line["val_image_to_text_r1"]
    assert summary["best_epoch"] == validated[-1]["val_best_epoch"]
    [final] = logged(folder, "final_test_epoch")
    assert summary["metrics"]["test"]["agg_metrics"] == final["final_test_agg_metrics"]
    seconds = summary["seconds"]
    assert all(value > 0 for value in seconds.values())
    assert seconds["training"] + seconds["validation"] + seconds["test"] <= seconds["all"]
    assert seconds["per_step"] == pytest.approx(seconds["training"] / 4), "two epochs of two steps"
    assert summary["data"]["train"] == {"samples": 8}
    assert summary["data"]["test"] == {"samples": 8, "images": 8, "texts": 8}


def test_an_evaluation_leaves_a_summary_too(tmp_path):
    summary = read_summary(run(tmp_path, command=evaluate))
    assert summary["status"] == "finished" and summary["metrics"]["test"]["agg_metrics"] >= 0
    assert (summary["validation"], summary["best_epoch"], summary["seconds"]["training"]) == ([], None, 0)


def stop(monkeypatch, epoch: int) -> None:
    """End a run before it validates ``epoch``."""
    original = AuroraRunner._validate

    def stopped(self, number):
        if number == epoch:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(AuroraRunner, "_validate", stopped)


@pytest.mark.parametrize("damage", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_with_its_summary(tmp_path, monkeypatch, caplog, damage):
    sections = {"run": {"max_epoch": 2, "resume": "auto"}}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop(patch, 1)
        run(tmp_path, **sections)
    folder = only_run(tmp_path)
    before = read_summary(folder)
    assert (before["status"], before["error"]) == ("stopped", "KeyboardInterrupt")
    assert [one["epoch"] for one in before["validation"]] == [0]
    if damage:
        (folder / SUMMARY).write_text('{"format": 1')
    train(["--cfg-path", str(project_yaml(tmp_path, **sections))])
    after = read_summary(folder)
    assert (after["status"], after["error"]) == ("finished", None)
    if damage:
        assert "summary.json is not readable json" in caplog.text and "it is written anew" in caplog.text
        assert [one["epoch"] for one in after["validation"]] == [1]
        return
    assert [one["epoch"] for one in after["validation"]] == [0, 1]
    assert after["validation"][0] == before["validation"][0]
    # Both epochs were trained before: what is added is the second validation.
    assert after["seconds"]["training"] == before["seconds"]["training"]
    assert after["seconds"]["validation"] > before["seconds"]["validation"]
    assert after["seconds"]["all"] > before["seconds"]["all"]
    assert after["seconds"]["per_step"] == pytest.approx(before["seconds"]["per_step"])
