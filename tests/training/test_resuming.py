"""Law 8: a run that is interrupted anywhere and resumed ends where an undisturbed one ends; in this process."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path

import pytest
import torch
from resumable import CROPS, MODEL, ONE_LAYER, RUN, few_by_default, image_project, stop_in
from runs import assert_same, final, only_run
from tiny import project_yaml, tiny_config
from tiny_video import video_project, write_video_questions, write_videos
from tiny_vqa import vqa_project

from lavis_aurora.common.summary import read_summary
from lavis_aurora.training.checkpoints import LATEST, read_checkpoint, write_checkpoint
from lavis_aurora.training.guards import Stopped
from lavis_aurora.training.resuming import RunCheckpoints
from lavis_aurora_cli import train


def released_project(folder: Path) -> Path:
    """The core with its dropout, and a teacher that has the student's factors."""
    method = {"form": "core", "rank": 4, "scale": 1.0, "dropout": 0.1, "targets": "released"}
    model = {**MODEL, "mode_approx": method, "gate": {"form": "affine"}, "context": {"form": "mean_right"}}
    model.update(teacher_factors="student", train_text_proj=False, train_temp=False, momentum=0.9)
    return project_yaml(folder, 6, model=model, datasets=CROPS, run={**RUN, "weight_decay_all": True})


def video_retrieval_project(folder: Path) -> Path:
    """Frames and crops are drawn at random, and another clip for one that is broken."""
    paths = write_videos(folder / "data")
    (paths["videos"] / "train_5.mp4").write_bytes(b"no video")
    run = {**RUN, "k_test": 4, "max_broken_share": 1.0}
    return video_project(folder, "msrvtt_ret", "msrvtt_retrieval", paths, model=MODEL, run=run)


def video_qa_project(folder: Path) -> Path:
    paths = write_video_questions(folder / "data")
    model = {"vit_drop_path_rate": 0.1}
    return video_project(folder, "msrvtt_qa", "msrvtt_qa_aurora", paths, model=model, run=RUN)


PROJECTS = {
    "retrieval": lambda folder: project_yaml(folder, 6, model=MODEL, datasets=CROPS, run=RUN),
    "released": released_project,
    "vqa": lambda folder: vqa_project(folder, run=RUN),
    "video retrieval": video_retrieval_project,
    "video qa": video_qa_project,
}


def test_the_shallow_text_tower_is_else_the_tiny_one():
    tiny = json.loads(Path(tiny_config().med_config_path).read_text())
    assert json.loads(ONE_LAYER.read_text()) == {**tiny, "num_hidden_layers": 1}


@pytest.mark.parametrize("name", few_by_default(PROJECTS, ("retrieval", "video qa", "released")))
def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, capsys, name):
    """The run of retrieval is stopped twice."""
    make = PROJECTS[name]
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    train(["--cfg-path", str(make(tmp_path / "whole"))])
    yaml = make(tmp_path / "stopped")
    for step in (1, 3) if name == "retrieval" else (1,):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_in(patch, step)
            train(["--cfg-path", str(yaml)])
        assert stopped.value.code == 128 + signal.SIGTERM
        assert "stopped by SIGTERM; go on with --options run.resume=auto" in capsys.readouterr().err
    train(["--cfg-path", str(yaml)])
    assert_same(final(tmp_path / "whole"), final(tmp_path / "stopped"))
    logs = [(only_run(tmp_path / name) / "log.txt").read_text().splitlines() for name in ("whole", "stopped")]
    epochs = [[line for line in log if line.startswith('{"train_epoch')] for log in logs]
    assert epochs[0] == epochs[1], "also the losses of the epochs that were interrupted"


def test_another_number_of_workers_draws_the_same_crops(tmp_path):
    ends = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        train(["--cfg-path", str(image_project(folder, max_epoch=1, num_workers=workers))])
        ends.append(final(folder))
    assert_same(*ends)


def test_without_the_queue_the_log_says_so(tmp_path, caplog):
    yaml = image_project(tmp_path, save_queue=False, max_epoch=1)
    train(["--cfg-path", str(yaml)])
    assert "queue of features starts anew" not in caplog.text
    train(["--cfg-path", str(yaml)])
    assert "the queue of features starts anew: it is not in" in caplog.text


def test_a_finished_run_is_tested_again_and_the_log_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    yaml = image_project(tmp_path, max_epoch=1)
    train(["--cfg-path", str(yaml)])
    assert "only tested again" not in caplog.text
    before, best = final(tmp_path), read_summary(only_run(tmp_path))["best_epoch"]
    train(["--cfg-path", str(yaml)])
    assert best == read_summary(only_run(tmp_path))["best_epoch"] == 0
    assert f"run.resume: {only_run(tmp_path)} is finished (epochs: 1) and is only tested again" in caplog.text
    assert "resumed at" not in caplog.text
    assert_same(before, final(tmp_path))


@pytest.fixture(scope="module")
def latest(tmp_path_factory) -> Path:
    """The checkpoint of a run of one epoch, to go on from; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("one_epoch")
    train(["--cfg-path", str(image_project(folder, max_epoch=1))])
    return only_run(folder) / LATEST


def test_another_number_of_processes_goes_on_with_their_mean_losses(tmp_path, latest):
    state = read_checkpoint(latest)
    [local] = state["processes"]
    others = {key: 3 * value for key, value in local["losses"].items()}
    local.update(skipped=2, broken=["clip.mp4 (no such file)"])
    state.update(validated=False, step=state["steps_per_epoch"] - 1, processes=[local, {**local, "losses": others}])
    write_checkpoint(state, tmp_path / "two.pth")
    options = [
        "run.resume=none",
        f"run.resume_ckpt_path={tmp_path / 'two.pth'}",
        "run.output_dir=" + str(tmp_path / "on"),
    ]
    train(["--cfg-path", str(image_project(tmp_path, max_epoch=1, max_broken_share=1.0)), "--options", *options])
    [resumed] = (tmp_path / "on").iterdir()
    final = read_checkpoint(resumed / "checkpoint_latest.pth")
    [on] = final["processes"]
    # Those of the last step were added to the mean.
    assert all(2 * value < on["losses"][key] < 3 * value for key, value in local["losses"].items())
    # What was skipped and what was broken before counts for the whole epoch.
    assert on["skipped"] == 2 and '"train_skipped_steps": 2' in (resumed / "log.txt").read_text()
    assert on["broken"] == 2 * local["broken"]
    assert (resumed / "broken_videos_epoch_0.txt").read_text().splitlines() == local["broken"]


def test_settings_of_the_optimizer_are_the_yamls(tmp_path, latest):
    changes = {"max_epoch": 2, "weight_decay": 0.25, "beta2": 0.9, "resume": "none", "resume_ckpt_path": str(latest)}
    yaml = image_project(tmp_path, **changes, output_dir=str(tmp_path / "on"))
    train(["--cfg-path", str(yaml)])
    [resumed] = (tmp_path / "on").iterdir()
    groups = read_checkpoint(resumed / "checkpoint_latest.pth")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0]
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.9)}


def test_moments_follow_their_parameters_into_other_groups_of_rates(tmp_path):
    """P and lambda have one shape: by their order alone, the one would go on with the moments of the other."""
    marks, latest = [], None
    for epochs, moved in enumerate(("slot factors P", "coefficients lambda"), 1):
        changes = {"max_epoch": epochs, "resume": "none", "resume_ckpt_path": latest, "lr_scales": {moved: 4.0}}
        changes |= {"init_lr": 0.0, "valid_splits": [], "test_splits": []}
        train(["--cfg-path", str(image_project(tmp_path / moved, **changes))])
        state = read_checkpoint(only_run(tmp_path / moved) / LATEST)
        names, moments = sum(state["trained"], []), state["optimizer"]["state"]
        if latest is None:
            for i, one in moments.items():
                one["exp_avg_sq"].fill_(1e6 * (i + 1))  # gradients add little to that
            latest = str(tmp_path / "marked.pth")
            write_checkpoint(state, latest)
        marks.append({name: float(moments[i]["exp_avg_sq"].mean()) for i, name in enumerate(names)})
    assert marks[1] == pytest.approx(marks[0], rel=0.01) and len(set(marks[0].values())) == len(names)


@pytest.mark.slow
def test_a_run_killed_between_its_last_epoch_and_its_last_checkpoint(tmp_path, monkeypatch):
    run = {"max_epoch": 2, "init_lr": 1e-3}
    train(["--cfg-path", str(image_project(tmp_path / "whole", **run))])
    original = RunCheckpoints.save

    def killed(self, epoch, validated=False, name=LATEST):
        if epoch == 1 and validated and name == LATEST:
            raise KeyboardInterrupt
        original(self, epoch, validated=validated, name=name)

    yaml = image_project(tmp_path / "killed", **run)
    with monkeypatch.context() as patched:
        patched.setattr(RunCheckpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(["--cfg-path", str(yaml)])
    assert (only_run(tmp_path / "killed") / "adapter_last" / "adapter_config.json").is_file()
    train(["--cfg-path", str(yaml)])
    assert_same(final(tmp_path / "whole"), final(tmp_path / "killed"))


@pytest.mark.parametrize("validated", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_epoch_that_is_done_again_has_one_line(tmp_path, monkeypatch, validated):
    """Killed after its line was written, and before its checkpoint."""
    original = RunCheckpoints.save

    def killed(self, epoch, validated=False, name=LATEST):
        if epoch == 1 and validated == at and name == LATEST:
            raise KeyboardInterrupt
        original(self, epoch, validated=validated, name=name)

    at, yaml = validated, image_project(tmp_path, checkpoint_every=0)
    with monkeypatch.context() as patched:
        patched.setattr(RunCheckpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(["--cfg-path", str(yaml)])
    train(["--cfg-path", str(yaml)])
    log = (only_run(tmp_path) / "log.txt").read_text()
    for split in ("train", "val"):
        for epoch in range(2):
            assert log.count(f'"{split}_epoch": {epoch},') == 1


def test_with_accumulated_steps_none_is_passed_over(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(RunCheckpoints, "save", lambda self, epoch, **_: saved.append(self.state.step))
    changes = {"max_epoch": 1, "batch_size_train": 1, "accum_grad_iters": 3, "checkpoint_every": 2}
    train(["--cfg-path", str(image_project(tmp_path, **changes, valid_splits=[], test_splits=[]))])
    assert saved[:2] == [3, 6]


def test_a_stop_is_no_unreadable_file(tmp_path, monkeypatch):
    """Whoever reads files catches what may be wrong with them."""

    def stopped(*_args, **_kwargs):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(torch, "load", stopped)
    (tmp_path / "any.pth").touch()
    with pytest.raises(Stopped):
        read_checkpoint(tmp_path / "any.pth")


def test_moments_of_other_parameters_are_refused(tmp_path, latest, capsys):
    yaml = image_project(tmp_path, max_epoch=1)
    state = read_checkpoint(latest)
    first = state["optimizer"]["state"][0]
    first.update({key: first[key][:1, :1] for key in ("exp_avg", "exp_avg_sq")})
    write_checkpoint(state, tmp_path / "other.pth")
    with pytest.raises(SystemExit):
        options = ["run.resume=none", f"run.resume_ckpt_path={tmp_path / 'other.pth'}"]
        train(["--cfg-path", str(yaml), "--options", *options])
    error = capsys.readouterr().err
    assert "other.pth does not fit the optimizer (moments of torch.Size([1, 1]) for" in error
    assert "the groups of run.lr_scales that it was trained with" in error
    del state["trained"]  # as of an older version
    write_checkpoint(state, tmp_path / "other.pth")
    with pytest.raises(SystemExit):
        train(["--cfg-path", str(yaml), "--options", *options, "run.lr_scales={heads: 0.5}"])
    assert "of an older version" in (error := capsys.readouterr().err) and "run.lr_scales" in error


def test_another_configuration_starts_a_new_run(tmp_path):
    yaml = image_project(tmp_path, max_epoch=1)
    train(["--cfg-path", str(yaml)])
    train(["--cfg-path", str(yaml), "--options", "run.init_lr=1e-4"])
    assert len(list((tmp_path / "output").iterdir())) == 2
