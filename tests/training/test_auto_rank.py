"""The rank that is enough of a nested run: how it is chosen, ``run.rank: auto``, and the command ``rank``."""

from __future__ import annotations

import fcntl
import json
import logging

import numpy as np
import pytest
import torch
from lavis.tasks.retrieval import RetrievalTask
from resumable import RUN, stop_in
from runs import assert_same, final, only_run
from tiny import project_yaml, tiny_model

from lavis_aurora import AuroraError
from lavis_aurora.adapters.config import read_adapter
from lavis_aurora.project import load_config
from lavis_aurora.training.checkpoints import read_checkpoint
from lavis_aurora.training.nested import RankRow, enough, standard_error, table
from lavis_aurora.training.runner import AuroraRunner
from lavis_aurora.training.start import find_rank
from lavis_aurora.training.tasks.base import check_model, runnable_task
from lavis_aurora.training.tasks.retrieval import image_scores
from lavis_aurora_cli import main, train

MODEL = {"mode_approx": {"rank": 8, "nested": True, "nested_ranks": [2, 4]}, "queue_size": 16}


# Whole runs


@pytest.mark.slow
def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        yaml = project_yaml(tmp_path / name, count=4, model=MODEL, run={**RUN, "rank": "auto"})
        if name == "stopped":
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                stop_in(patch, 2)  # of two epochs of two steps
                train(["--cfg-path", str(yaml)])
        train(["--cfg-path", str(yaml)])
    assert_same(*(final(tmp_path / name) for name in ("whole", "stopped")))
    tables = [read_adapter(only_run(tmp_path / name) / "adapter_auto")[1] for name in ("whole", "stopped")]
    assert_same(*tables)


def test_auto_writes_the_smallest_rank_that_is_enough(tmp_path, capsys, caplog):
    yaml = project_yaml(tmp_path, count=10, model=MODEL, run={"rank": "auto"})
    with caplog.at_level(logging.INFO):
        train(["--cfg-path", str(yaml)])
    run = only_run(tmp_path)
    table = json.loads((run / "ranks.json").read_text())
    rows = [RankRow(**row) for row in table["ranks"]]
    assert [row.rank for row in rows] == [2, 4, 8] and table["split"] == "val"
    assert table["chosen"] == enough(rows).rank
    whole = json.loads((run / "result" / "val_epoch_rank_8.json").read_text())
    assert rows[-1].metric == pytest.approx(whole["metrics"]["agg_metrics"])
    # Pictures with one text each: the plain error over pictures.
    hits = [[np.mean([r < k for k in (1, 5, 10)]) for r in whole["ranks"][d]] for d in whole["k_test"]]
    assert rows[-1].error == pytest.approx(100 * np.std(np.mean(hits, axis=0), ddof=1) / 10**0.5)
    config, tensors = read_adapter(run / "adapter_auto")
    best, whole_tensors = read_adapter(run / "adapter_best")
    chosen = table["chosen"]
    assert config.settings.rank == chosen
    assert torch.equal(tensors["factors.P"], whole_tensors["factors.P"][:, :chosen])
    assert config.metrics["test"]["agg_metrics"] == pytest.approx(table["metrics"]["test"]["agg_metrics"])
    assert config.metrics["epoch"] == best.metrics["epoch"]
    assert rows[-1].parameters == sum(tensor.numel() for tensor in whole_tensors.values())
    assert next(row for row in rows if row.rank == chosen).parameters == sum(x.numel() for x in tensors.values())
    assert (run / "ranks.png").is_file()
    assert f"run.rank: {chosen} of 8 components are enough" in caplog.text
    assert "enough" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_test_the_best_epoch_is_ranked_all_the_same(tmp_path, monkeypatch):
    """The adapter that is cut is the best epoch's, and so the model that is measured must be."""
    metrics, original = iter([90.0, 10.0, 20.0]), AuroraRunner.eval_epoch

    def eval_epoch(self, split_name, cur_epoch, **kwargs):
        log = original(self, split_name=split_name, cur_epoch=cur_epoch, **kwargs)
        if not str(cur_epoch).startswith("rank"):
            return {**log, "agg_metrics": next(metrics)}
        measured.append({name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad})
        return log

    measured: list[dict] = []
    monkeypatch.setattr(AuroraRunner, "eval_epoch", eval_epoch)
    run = {"rank": "auto", "test_splits": [], "max_epoch": 3}
    train(["--cfg-path", str(project_yaml(tmp_path, count=4, model=MODEL, run=run))])
    best = read_checkpoint(only_run(tmp_path) / "checkpoint_best.pth")
    assert best["epoch"] == 0 and len(measured) == 3
    for name, value in measured[0].items():
        assert torch.equal(value, best["model"][name]), name
    # Gone on from in another folder, where no epoch is better.
    source, run["max_epoch"] = only_run(tmp_path), 4
    run["resume_ckpt_path"] = str(source / "checkpoint_latest.pth")
    run["output_dir"] = str(tmp_path / "more" / "output")
    metrics = iter([5.0])
    train(["--cfg-path", str(project_yaml(tmp_path, model=MODEL, run=run))])
    again = only_run(tmp_path / "more") / "adapter_best"
    assert_same(read_adapter(again)[1], read_adapter(source / "adapter_best")[1])


def test_the_rank_of_a_finished_run(tmp_path, monkeypatch, capsys):
    yaml = project_yaml(tmp_path, count=5, model=MODEL)
    train(["--cfg-path", str(yaml)])
    run = only_run(tmp_path)
    checkpoints = {path.name: path.read_bytes() for path in run.glob("*.pth")}
    monkeypatch.chdir(tmp_path)
    main(["rank", str(run)])
    table = json.loads((run / "ranks.json").read_text())
    main(["rank", str(run), "--options", "run.batch_size_eval=3"])
    assert json.loads((run / "ranks.json").read_text()) == table
    assert only_run(tmp_path) == run
    assert (run / "adapter_auto").is_dir() and (run / "ranks.png").is_file()
    assert {path.name: path.read_bytes() for path in run.glob("*.pth")} == checkpoints
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"

    def held(*_args: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", held)
    with pytest.raises(SystemExit):
        main(["rank", str(run)])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: RUN: {run} is in use by another process")


def test_what_has_no_rank_to_find_is_refused(tmp_path):
    plain = project_yaml(tmp_path)
    with pytest.raises(AuroraError, match="run.rank: auto compares ranks on the first of run.valid_splits"):
        load_config(str(plain), ["run.rank=auto", "run.valid_splits=[]"])
    with pytest.raises(AuroraError, match="run.rank: unknown value"):
        load_config(str(plain), ["run.rank=automatic"])
    with pytest.raises(AuroraError, match="model.mode_approx.nested: true"):
        load_config(str(plain), ["run.rank=auto"])
    nested = project_yaml(tmp_path, model=MODEL)
    with pytest.raises(AuroraError, match="train it with model.tuning: aurora"):
        load_config(str(nested), ["run.rank=auto", "model.tuning=lora", "model.context.form=none"])
    cfg = load_config(str(nested), ["run.rank=auto"])
    with pytest.raises(AuroraError, match="run.rank: auto needs the score of each sample, which run.task retrieval"):
        check_model(runnable_task(RetrievalTask), tiny_model(**MODEL), cfg)
    with pytest.raises(AuroraError, match="no folder of a finished run"):
        find_rank(str(tmp_path))


# The choice


def test_the_smallest_within_one_standard_error_is_enough():
    rows = [RankRow(4, 70, 2, 1), RankRow(8, 78.5, 2, 2), RankRow(16, 80, 1.5, 4), RankRow(32, 79, 9, 8)]
    assert enough(rows).rank == 8
    assert enough([row._replace(error=1) for row in rows]).rank == 16
    assert enough(rows[::-1]).rank == 8
    assert len(table("val", rows, enough(rows)).splitlines()) == 5
    chance = [row._replace(metric=20.0 - row.rank / 32) for row in rows]
    assert enough(chance).rank == 4
    assert table("val", chance, enough(chance)).splitlines()[5].startswith("the ranks do not differ by more than")


def test_error_of_a_mean():
    assert standard_error([1, 2, 3, 4]) == pytest.approx((5 / 3) ** 0.5 / 2)
    assert standard_error([1]) == float("inf")


def test_a_picture_counts_with_its_texts():
    """Their mean is that of both directions, however many texts a picture has."""
    image_ranks, text_ranks, image_of = [0, 7, 20], [0, 3, 12, 0, 6], [0, 0, 1, 2, 2]
    scores = image_scores(image_ranks, text_ranks, image_of)
    recalls = [np.mean(np.array(ranks) < k) for ranks in (image_ranks, text_ranks) for k in (1, 5, 10)]
    assert np.mean(scores) == pytest.approx(100 * np.mean(recalls))
    assert scores[1] == pytest.approx(50 * (1 / 3 + 0))
