"""Whole runs through the command line's entry, on a tiny project."""

import copy
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_apart, run_programs
from lavis.common.logger import setup_logger
from omegaconf import OmegaConf
from runs import logged, only_run
from tiny import project_yaml

from lavis_aurora import unmerge_adapter
from lavis_aurora.common.paths import PACKAGE_ROOT
from lavis_aurora.project import load_config
from lavis_aurora.training import rates
from lavis_aurora.training.tasks.retrieval import RetrievalAuroraTask
from lavis_aurora_cli import evaluate, train

ROOT = Path(__file__).resolve().parents[2]
UNTUNED = "the model is evaluated as before training"
NO_RANDOM_NEGATIVES = {"queue_size": 16, "alpha": 0.4}


def run(yaml: Path, *options: str) -> None:
    train(["--cfg-path", str(yaml), *(["--options", *options] if options else [])])


def test_a_run_leaves_configuration_checkpoints_results_and_log(tmp_path, capsys, caplog):
    run(project_yaml(tmp_path, run={"max_epoch": 2, "amp": True, "min_lr": 1e-5, "world_size": 8}))
    folder = only_run(tmp_path)
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "data.json",
        "log.txt",
        "metrics.csv",
        "summary.json",
        "checkpoint_best.pth",
        "checkpoint_latest.pth",
        "adapter_best",
        "adapter_last",
        "checkpoint_previous.pth",
        "result",
    }
    text = (folder / "config.yaml").read_text()
    assert "tokenizer: ${aurora.package:configs/models/tiny}" in text and str(PACKAGE_ROOT) not in text
    saved = OmegaConf.load(folder / "config.yaml").run
    assert saved.weight_decay == 0.05
    assert saved.world_size == 1 and not saved.distributed, "what ran, not what the YAML says"
    result = json.loads((folder / "result" / "test_epoch_best.json").read_text())
    assert len(result["ranks"]["image_to_text"]) == result["images"] == 8
    assert [entry["train_epoch"] for entry in logged(folder, "train_loss")] == [0, 1]
    # The cosine between 1e-3 and 1e-5 at the start and half-way.
    assert [entry["train_lr"] for entry in logged(folder, "train_loss")] == pytest.approx([1e-3, 5.05e-4])
    assert len([record for record in caplog.records if "run.amp: true is for a GPU" in record.message]) == 1
    out = capsys.readouterr().out
    assert "test: 8 images, 8 texts" in out
    for words in ("image-to-text", "text-to-image", "chance", "median rank", "ITC only"):
        assert words in out
    # Adapter, heads and their teachers alone: no queue, no backbone.
    state = torch.load(folder / "checkpoint_best.pth", weights_only=True)
    assert not [key for key in state["model"] if "queue" in key or key.startswith("visual_encoder")]
    assert any(key.startswith("mode_approx.sets.momentum") for key in state["model"])


def warn_and_log(rank: int, yaml: str, said: Path) -> None:
    """What a program does whose configuration is warned of, with its standard error in a file."""
    sys.stderr = said.open("w")  # where no handler of the log is yet
    for os.environ["RANK"] in "10":
        load_config(yaml)
    setup_logger()
    logging.info("losses")
    sys.stderr.close()


def test_a_warning_about_a_configuration_leaves_the_log_of_the_run_to_lavis(tmp_path):
    """In a process of its own: pytest has set up a log already. Said once of all processes."""
    yaml = str(project_yaml(tmp_path, run={"init_lr": 1e-5, "num_beams": 7}))
    run_apart(1, warn_and_log, yaml, tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert said.count("run.init_lr: 1e-05 is a rate for") == 1 and "losses" in said
    assert "does not read run.num_beams, a key of other tasks" in said


def test_what_starts_from_a_moved_runs_configuration_writes_beside_that_run(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder, yaml = tmp_path / "moved" / "RUN", project_yaml(tmp_path, run={"output_dir": str(tmp_path / "gone")})
    folder.mkdir(parents=True)
    config = folder / "config.yaml"
    config.write_text(yaml.read_text())
    assert load_config(str(config)).run_cfg.output_dir == str(tmp_path / "gone"), "no run's, a project"
    (folder / "summary.json").touch()
    assert load_config(str(config)).run_cfg.output_dir == str(tmp_path / "moved")
    assert f"run.output_dir: {tmp_path / 'gone'} is not there any more; outputs go to" in caplog.text
    for option in ("run.output_dir=new", "run={output_dir: new}"):
        assert load_config(str(config), [option]).run_cfg.output_dir == "new"
    (tmp_path / "gone").mkdir()
    assert load_config(str(config)).run_cfg.output_dir == str(tmp_path / "gone")


def test_the_best_epoch_is_tested_even_when_its_metric_is_zero(tmp_path, monkeypatch):
    original = RetrievalAuroraTask.after_evaluation
    values = iter([0.0, 0.0, 0.0])

    def worthless(self, val_result, split_name, epoch, **kwargs):
        log = original(self, val_result, split_name, epoch, **kwargs)
        return {**log, "agg_metrics": next(values)} if split_name == "val" else log

    monkeypatch.setattr(RetrievalAuroraTask, "after_evaluation", worthless)
    run(project_yaml(tmp_path, run={"max_epoch": 2}))
    folder = only_run(tmp_path)
    assert torch.load(folder / "checkpoint_best.pth", weights_only=True)["epoch"] == 0
    assert (folder / "result" / "test_epoch_best.json").exists()


def test_adapters_are_merged_while_they_are_evaluated(tmp_path, monkeypatch):
    original, seen = RetrievalAuroraTask.evaluation, []

    def best_scores(*args):
        return np.array(original(*args)["candidates"]["image_to_text"]["scores"])

    def watched(self, model, data_loader):
        seen.append(model.mode_approx.merged)
        beside = copy.deepcopy(model)
        unmerge_adapter(beside)
        merged, unmerged = (best_scores(self, one, data_loader) for one in (model, beside))
        np.testing.assert_allclose(merged, unmerged, atol=2e-4)
        return original(self, model, data_loader)

    monkeypatch.setattr(RetrievalAuroraTask, "evaluation", watched)
    run(project_yaml(tmp_path, run={"max_epoch": 2}))
    assert seen == ["default"] * 3  # two validations and the test


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_selects_no_epoch(tmp_path, monkeypatch, capsys, value):
    original = RetrievalAuroraTask.after_evaluation
    monkeypatch.setattr(
        RetrievalAuroraTask, "after_evaluation", lambda *args, **kw: {**original(*args, **kw), "agg_metrics": value}
    )
    with pytest.raises(SystemExit):
        run(project_yaml(tmp_path))
    assert f"run.valid_splits: agg_metrics of val is {value} in epoch 1" in capsys.readouterr().err
    assert not (only_run(tmp_path) / "checkpoint_best.pth").exists()


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """The folder of a run of one epoch, for tests that go on from it and leave it as it is."""
    folder = tmp_path_factory.mktemp("first")
    run(project_yaml(folder))
    return only_run(folder)


def test_evaluation_of_a_checkpoint_repeats_the_test(tmp_path, first, caplog):
    tested = json.loads((first / "result" / "test_epoch_best.json").read_text())
    checkpoint = first / "checkpoint_best.pth"
    evaluate(["--cfg-path", str(project_yaml(tmp_path)), "--options", f"run.resume_ckpt_path={checkpoint}"])
    second = only_run(tmp_path)
    again = json.loads((second / "result" / "test_epoch_0.json").read_text())
    assert again["ranks"] == tested["ranks"]
    assert not list(second.glob("*.pth"))
    assert UNTUNED not in caplog.text


def test_without_validation_the_last_epoch_is_evaluated_and_without_a_run_it_is_said(tmp_path, caplog):
    yaml, untuned = (project_yaml(tmp_path / name, run={"valid_splits": []}) for name in ("tuned", "untuned"))
    run(yaml)
    for one, options in ((yaml, ["--options", "run.resume=auto"]), (untuned, [])):
        assert UNTUNED not in caplog.text
        evaluate(["--cfg-path", str(one), *options])
    assert UNTUNED in caplog.text
    last, again = sorted(
        (tmp_path / "tuned" / "output").glob("*/result/test_*.json"), key=lambda p: p.stat().st_mtime
    )
    assert json.loads(again.read_text())["ranks"] == json.loads(last.read_text())["ranks"]


def test_evaluation_with_resume_auto_takes_the_runs_best(tmp_path, capsys):
    yaml = project_yaml(tmp_path, run={"max_epoch": 2})
    command = ["--cfg-path", str(yaml), "--options", "run.resume=auto"]

    def refused(*options: str) -> str:
        before = [path.name for path in tmp_path.rglob("*")]
        with pytest.raises(SystemExit):
            evaluate([*command, *options])
        [line] = capsys.readouterr().err.splitlines()
        assert [path.name for path in tmp_path.rglob("*")] == before
        return line

    nothing = f"error: run.resume: no run of this configuration under {tmp_path / 'output'} to evaluate; "
    assert refused().startswith(nothing)
    run(yaml, "run.seed=3")
    first = only_run(tmp_path)
    assert refused().startswith(f"{nothing}the newest, {first}, differs in run.seed; give its options, name its")
    # The last epoch is another one than the best.
    state = torch.load(first / "checkpoint_latest.pth", weights_only=True)
    torch.save({**state, "model": {key: x + 1 for key, x in state["model"].items()}}, first / "checkpoint_latest.pth")
    # Another number of processes would have another batch; how long it trained, and what it kept, is the run's own.
    evaluate([*command, "run.seed=3", "run.batch_size_train=2", "run.max_epoch=7", "run.save_queue=true"])
    [second] = [path for path in (tmp_path / "output").iterdir() if path != first]
    results = [path / "result" / f"test_epoch_{name}.json" for path, name in ((first, "best"), (second, "0"))]
    tested, again = (json.loads(path.read_text())["ranks"] for path in results)
    assert again == tested
    saved = OmegaConf.load(second / "config.yaml").run
    assert (saved.resume, saved.resume_ckpt_path) == ("none", str(first / "checkpoint_best.pth"))
    (first / "checkpoint_best.pth").unlink()
    assert refused("run.seed=3").startswith(f"error: run.resume: {first} has no checkpoint_best.pth; name a")


def test_resumed_training_continues_the_epochs_and_keeps_the_best(tmp_path, first):
    before = torch.load(first / "checkpoint_latest.pth", weights_only=True)
    run(project_yaml(tmp_path), "run.max_epoch=2", f"run.resume_ckpt_path={first / 'checkpoint_latest.pth'}")
    second = only_run(tmp_path)
    assert [entry["train_epoch"] for entry in logged(second, "train_loss")] == [1]
    after = torch.load(second / "checkpoint_latest.pth", weights_only=True)
    assert after["best_metric"] >= before["best_metric"]
    assert after["epoch"] == 1


def test_a_finished_run_is_not_resumed(tmp_path, first, capsys):
    with pytest.raises(SystemExit):
        run(project_yaml(tmp_path), f"run.resume_ckpt_path={first / 'checkpoint_latest.pth'}")
    assert "run.max_epoch: 1 epochs are done; raise it, or test with evaluate.py" in capsys.readouterr().err


@pytest.mark.slow
def test_without_its_file_the_best_epoch_is_looked_for_anew(tmp_path, caplog):
    yaml = project_yaml(tmp_path)
    run(yaml, "run.max_epoch=2")
    latest = only_run(tmp_path) / "checkpoint_latest.pth"
    state = torch.load(latest, weights_only=True)
    moved = tmp_path / "moved.pth"
    # An earlier epoch was the best, and its weights are not here.
    torch.save({**state, "best_metric": 1e9, "best_epoch": 0}, moved)
    run(yaml, "run.max_epoch=3", f"run.resume_ckpt_path={moved}")
    assert "the best so far, epoch 1, is lost" in caplog.text
    [second] = [p for p in (tmp_path / "output").iterdir() if p != latest.parent]
    validated = {entry["val_epoch"]: entry["val_agg_metrics"] for entry in logged(second, "val_agg_metrics")}
    assert list(validated) == [1, 2], "the one that it goes on from too"
    best = torch.load(second / "checkpoint_best.pth", weights_only=True)
    assert best["best_metric"] == validated[best["epoch"]] == max(validated.values())


def test_outputs_of_relative_folders_lie_under_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(project_yaml(tmp_path, run={"output_dir": "here", "valid_splits": []}))
    [folder] = (tmp_path / "here").iterdir()
    assert (folder / "checkpoint_latest.pth").exists()
    assert (folder / "result" / "test_epoch_0.json").exists()


@pytest.mark.parametrize("options", [["run.accum_grad_iters=2"], ["run.grad_clip=0.5"], ["model.tuning=full"]])
def test_options_of_training(tmp_path, options):
    run(project_yaml(tmp_path, run={"valid_splits": [], "test_splits": []}), *options)
    assert (only_run(tmp_path) / "checkpoint_latest.pth").exists()


def test_bfloat16_is_close_to_single_precision_and_not_the_same(tmp_path, caplog, monkeypatch):
    """On a CPU too, without a scaler; slow CPUs are told so, and that `true`, float16, is for a GPU."""
    losses, caplog_of = {}, {}
    monkeypatch.setattr(rates, "emulates_bfloat16", lambda cuda: not cuda)
    for amp in ("false", "bf16", "true"):
        folder = tmp_path / amp
        folder.mkdir()
        caplog.clear()
        run(project_yaml(folder, run={"valid_splits": [], "test_splits": []}), f"run.amp={amp}")
        losses[amp] = logged(only_run(folder), "train_loss")[-1]["train_loss"]
        caplog_of[amp] = caplog.text
        assert torch.load(only_run(folder) / "checkpoint_latest.pth", weights_only=True)["scaler"] is None
    assert losses["bf16"] == pytest.approx(losses["false"], rel=2e-2) and losses["bf16"] != losses["false"]
    assert losses["true"] == losses["false"]
    assert (
        "bf16 is for CPUs too" in caplog_of["true"] and "instructions" not in caplog_of["true"] + caplog_of["false"]
    )
    assert "run.amp: bf16: this processor has no instructions for bfloat16; single prec" in caplog_of["bf16"]


def test_a_model_without_the_method_is_refused_before_any_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RetrievalAuroraTask, "build_model", lambda self, cfg: torch.nn.Linear(2, 2))
    with pytest.raises(SystemExit):
        run(project_yaml(tmp_path))
    assert "wrap it: model: {arch: mode_approx, base: {arch: blip_retrieval_aurora}}" in capsys.readouterr().err


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path):
    """Heads alone, without negatives from the batch: the mean loss of two halves is that of the whole."""
    states = []
    for i, options in enumerate((["run.batch_size_train=4"], ["run.batch_size_train=4", "run.accum_grad_iters=2"])):
        folder = tmp_path / str(i)
        folder.mkdir()
        yaml = project_yaml(folder, run={"valid_splits": [], "test_splits": [], "init_lr": 0.0})
        run(yaml, *options)
        states.append(torch.load(only_run(folder) / "checkpoint_latest.pth", weights_only=True)["optimizer"]["state"])
    steps = [int(next(iter(state.values()))["step"]) for state in states]
    assert steps == [2, 1]


def test_two_processes_train_and_test_as_one(tmp_path):
    """Law 7 through the program: 9 pictures, an uneven number, in batches of 4 or 2 x 2."""
    logs, checkpoints = [], []
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        yaml = project_yaml(folder, count=9, model=NO_RANDOM_NEGATIVES, run={"max_epoch": 2})
        argv = ["--cfg-path", str(yaml), "--options", f"run.batch_size_train={batch}"]
        run_programs(processes, train, argv) if processes > 1 else train(argv)
        output = only_run(folder)
        logs.append(logged(output, "train_loss") + logged(output, "final_test_epoch"))
        checkpoints.append(torch.load(output / "checkpoint_latest.pth", weights_only=True)["model"])
    one, two = logs
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for key, value in a.items():
            # AdamW turns rounding in a vanishing gradient into a step of the learning rate, 1e-3 here;
            # losses and gradients themselves are compared in models/test_several_processes.py.
            assert b[key] == pytest.approx(value, abs=2e-3), key
    for name, value in checkpoints[0].items():
        assert (checkpoints[1][name] - value).abs().mean() < 5e-4, name
