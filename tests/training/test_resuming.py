"""Law 8: a run that is interrupted anywhere and resumed ends where an undisturbed one ends."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import project_yaml
from tiny_video import video_project, write_video_questions, write_videos
from tiny_vqa import vqa_project

from lavis_aurora.training.checkpoints import LATEST, read_checkpoint, write_checkpoint
from lavis_aurora.training.guards import Stopped
from lavis_aurora.training.runner import AuroraRunner
from lavis_aurora_cli import train

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600  # seconds that a run may take on a busy machine
RUN = {"max_epoch": 2, "batch_size_train": 2, "resume": "auto", "save_queue": True, "checkpoint_every": 1}
# Random crops, random context, dropout of paths, negatives from the queue: whatever draws random numbers.
MODEL = {"context": {"form": "random"}, "vit_drop_path_rate": 0.1, "queue_size": 16}
CROPS = {"coco_retrieval": {"vis_processor": {"train": {"name": "blip_image_train", "image_size": 48}}}}
STATE = ("model", "queue", "optimizer", "epoch", "step", "best_metric", "best_epoch", "processes")


def image_project(folder: Path, **run) -> Path:
    folder.mkdir(exist_ok=True)
    return project_yaml(folder, model=MODEL, datasets=CROPS, run={**RUN, **run})


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


def assert_same(one, other, path="") -> None:
    """Nested states are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{path}/{i}")
    else:
        assert one == other, path


def only_run(folder: Path) -> Path:
    [run] = (folder / "output").iterdir()
    return run


def final(folder: Path) -> dict:
    """What must be equal at the end, tested ranks included."""
    run = only_run(folder)
    states = {name: read_checkpoint(run / f"checkpoint_{name}.pth") for name in ("latest", "best")}
    results = {path.name: json.loads(path.read_text()) for path in (run / "result").glob("test_epoch_best*.json")}
    for result in results.values():
        if isinstance(result, dict):
            result.pop("seconds")
    return {name: {key: state[key] for key in STATE} for name, state in states.items()} | {"results": results}


def command(yaml: Path, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    return [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"), "--cfg-path", str(yaml)]


def start(yaml: Path, processes: int = 1) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(yaml, processes), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def stop_in(monkeypatch, step: int) -> None:
    """Send this process SIGTERM within the given step, counted over the whole run."""
    from lavis_aurora.training.loop import AuroraTrainMixin

    original, steps = AuroraTrainMixin._update, iter(range(10**6))

    def update(self, *args):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(AuroraTrainMixin, "_update", update)


PROJECTS = {
    "retrieval": image_project,
    "vqa": lambda folder: vqa_project(folder, run=RUN),
    "video retrieval": video_retrieval_project,
    "video qa": video_qa_project,
}


@pytest.mark.parametrize("make", PROJECTS.values(), ids=PROJECTS)
def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, capsys, make):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    train(["--cfg-path", str(make(tmp_path / "whole"))])
    yaml = make(tmp_path / "stopped")
    for step in (1, 3):
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
    before = final(tmp_path)
    train(["--cfg-path", str(yaml)])
    assert f"run.resume: {only_run(tmp_path)} is finished (epochs: 1) and is only tested again" in caplog.text
    assert "resumed at" not in caplog.text
    assert_same(before, final(tmp_path))


def test_another_number_of_processes_goes_on_with_their_mean_losses(tmp_path):
    train(["--cfg-path", str(image_project(tmp_path, max_epoch=1))])
    run = only_run(tmp_path)
    state = read_checkpoint(run / "checkpoint_latest.pth")
    [local] = state["processes"]
    others = {key: 3 * value for key, value in local["losses"].items()}
    state.update(validated=False, step=state["steps_per_epoch"] - 1, processes=[local, {**local, "losses": others}])
    write_checkpoint(state, tmp_path / "two.pth")
    options = [
        "run.resume=none",
        f"run.resume_ckpt_path={tmp_path / 'two.pth'}",
        "run.output_dir=" + str(tmp_path / "on"),
    ]
    train(["--cfg-path", str(image_project(tmp_path, max_epoch=1)), "--options", *options])
    [resumed] = (tmp_path / "on").iterdir()
    final = read_checkpoint(resumed / "checkpoint_latest.pth")
    [on] = final["processes"]
    # Those of the last step were added to the mean.
    assert all(2 * value < on["losses"][key] < 3 * value for key, value in local["losses"].items())


def test_settings_of_the_optimizer_are_the_yamls(tmp_path):
    train(["--cfg-path", str(image_project(tmp_path, max_epoch=1))])
    latest = only_run(tmp_path) / "checkpoint_latest.pth"
    changes = {"max_epoch": 2, "weight_decay": 0.25, "beta2": 0.9, "resume": "none", "resume_ckpt_path": str(latest)}
    yaml = image_project(tmp_path, **changes, output_dir=str(tmp_path / "on"))
    train(["--cfg-path", str(yaml)])
    [resumed] = (tmp_path / "on").iterdir()
    groups = read_checkpoint(resumed / "checkpoint_latest.pth")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0]
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.9)}


def test_a_run_killed_between_its_last_epoch_and_its_last_checkpoint(tmp_path, monkeypatch):
    run = {"max_epoch": 2, "init_lr": 1e-3}
    train(["--cfg-path", str(image_project(tmp_path / "whole", **run))])
    original = AuroraRunner._save_checkpoint

    def killed(self, epoch, step, validated=False, name=LATEST):
        if epoch == 1 and validated and name == LATEST:
            raise KeyboardInterrupt
        original(self, epoch, step, validated=validated, name=name)

    yaml = image_project(tmp_path / "killed", **run)
    with monkeypatch.context() as patched:
        patched.setattr(AuroraRunner, "_save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train(["--cfg-path", str(yaml)])
    assert (only_run(tmp_path / "killed") / "adapter_last" / "adapter_config.json").is_file()
    train(["--cfg-path", str(yaml)])
    assert_same(final(tmp_path / "whole"), final(tmp_path / "killed"))


def test_with_accumulated_steps_none_is_passed_over(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(AuroraRunner, "_save_checkpoint", lambda self, epoch, step, **_: saved.append(step))
    changes = {"max_epoch": 1, "batch_size_train": 1, "accum_grad_iters": 3, "checkpoint_every": 2}
    train(["--cfg-path", str(image_project(tmp_path, **changes, valid_splits=[], test_splits=[]))])
    assert saved[:2] == [3, 6]


def test_a_stop_is_no_unreadable_file(tmp_path, monkeypatch):
    """Whoever reads files catches what may be wrong with them."""

    def stopped(*_args, **_kwargs):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(torch, "load", stopped)
    with pytest.raises(Stopped):
        read_checkpoint(tmp_path / "any.pth")


def test_another_configuration_starts_a_new_run(tmp_path):
    yaml = image_project(tmp_path, max_epoch=1)
    train(["--cfg-path", str(yaml)])
    train(["--cfg-path", str(yaml), "--options", "run.init_lr=1e-4"])
    assert len(list((tmp_path / "output").iterdir())) == 2


def test_the_second_signal_and_one_outside_of_steps_stop_at_once():
    from lavis_aurora.training.guards import StopRequest

    with StopRequest() as stop:
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        stop.stepping = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum() == signal.SIGTERM
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


@pytest.mark.slow
def test_killed_a_dozen_times_a_run_ends_as_an_undisturbed_one(tmp_path):
    run = {"max_epoch": 60}  # on a quick machine an epoch takes a tenth of a second
    train(["--cfg-path", str(image_project(tmp_path / "whole", **run))])
    yaml, draw, output = image_project(tmp_path / "killed", **run), random.Random(0), tmp_path / "killed" / "output"

    def saved() -> list[int]:
        with suppress(FileNotFoundError):  # while a new one takes its place
            return [path.stat().st_mtime_ns for path in output.glob("*/checkpoint_latest.pth")]
        return []

    for _ in range(12):
        before, process, begin = saved(), start(yaml), time.time()
        # Once it goes on, at a random moment: within a step, a checkpoint or an evaluation.
        while saved() in ([], before) and process.poll() is None and time.time() < begin + PATIENCE:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        assert process.poll() is None, f"it ended before it was killed: {process.communicate()[0]}"
        process.kill()
        process.communicate()
        for path in output.glob("*/*.pth"):
            read_checkpoint(path)
    process = start(yaml)
    log, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, log
    assert_same(final(tmp_path / "whole"), final(tmp_path / "killed"))


@pytest.mark.slow
def test_two_processes_stop_together_and_resume(tmp_path):
    for name in ("whole", "stopped"):
        yaml = image_project(tmp_path / name)
        if name == "stopped":
            process = start(yaml, processes=2)
            deadline = time.time() + PATIENCE
            while not list((tmp_path / name / "output").glob("*/checkpoint_latest.pth")) and time.time() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=PATIENCE)
            assert process.returncode != 0 and "stopped by SIGTERM" in output, output
        process = start(yaml, processes=2)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    assert_same(final(tmp_path / "whole"), final(tmp_path / "stopped"))
