"""A run goes on whatever file of it is damaged or gone, and no damaged file is read as if it were whole."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from resumable import damage_in_data, few_by_default, image_project, stop_in
from runs import assert_same, final, only_run

from lavis_aurora import AuroraError
from lavis_aurora.adapters.files import read_adapter
from lavis_aurora.analysis.results import final_metrics, read_config
from lavis_aurora.project import load_config
from lavis_aurora.training.checkpoints import BEST, LATEST, read_checkpoint, write_checkpoint
from lavis_aurora.training.resuming import RunCheckpoints
from lavis_aurora_cli import train


def flipped(content: bytes, draw: random.Random) -> bytes:
    """With one random bit turned over."""
    damaged, bit = bytearray(content), draw.randrange(8 * len(content))
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


DAMAGES = {
    "latest": {"checkpoint_latest.pth": damage_in_data},
    "latest and previous": {"checkpoint_latest.pth": cut, "checkpoint_previous.pth": damage_in_data},
    "best": {"checkpoint_best.pth": damage_in_data},
    "best, of another program": {"checkpoint_best.pth": lambda path: torch.save({"state_dict": {}}, path)},
    "best, gone": {"checkpoint_best.pth": Path.unlink},
    "adapters, empty and cut": {
        "adapter_best/adapter_config.json": lambda path: path.write_text(""),
        "adapter_last/adapter_config.json": lambda path: path.write_text(path.read_text()[:50]),
    },
    "adapter, no tensors": {"adapter_best/adapter_model.safetensors": lambda path: path.write_text("")},
    "texts": dict.fromkeys(("config.yaml", "log.txt", "summary.json"), lambda path: path.write_bytes(b"\xff{")),
}


@pytest.fixture(scope="module")
def stopped_and_whole(tmp_path_factory) -> tuple[Path, dict]:
    """Folder of a run of three epochs that was stopped in the last one, and how an undisturbed one ends."""
    folder = tmp_path_factory.mktemp("runs")
    run = {"max_epoch": 3, "checkpoint_every": 0}
    train(["--cfg-path", str(image_project(folder / "whole", **run))])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_in(patch, 9)
        train(["--cfg-path", str(image_project(folder / "stopped", **run))])
    return folder / "stopped", final(folder / "whole")


@pytest.mark.parametrize("name", few_by_default(DAMAGES, ("latest and previous", "best", "texts")))
def test_a_run_goes_on_whatever_file_is_damaged(stopped_and_whole, tmp_path, name, caplog):
    damages, (stopped, whole) = DAMAGES[name], stopped_and_whole
    folder = tmp_path / "stopped"
    shutil.copytree(stopped, folder)
    yaml, run = folder / "project.yaml", only_run(folder)
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(yaml), {"run": {"output_dir": str(folder / "output")}}), yaml)
    for file, damage in damages.items():
        damage(run / file)
    train(["--cfg-path", str(yaml)])
    end = final(folder)
    assert_same(whole["latest"]["model"], end["latest"]["model"])
    lost = BEST in damages
    assert not lost or "is lost" in caplog.text or "is written anew" in caplog.text
    if not lost:
        assert_same({**whole["latest"], "processes": 0}, {**end["latest"], "processes": 0})
        assert_same(whole["results"], end["results"])
    assert ("is kept as checkpoint_damaged.pth" in caplog.text) == (LATEST in damages)
    for path in run.glob("checkpoint_[!d]*.pth"):
        read_checkpoint(path)
    for kind in ("best", "last"):
        read_adapter(run / f"adapter_{kind}")


@pytest.mark.parametrize("best_epoch", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_finished_run_whose_best_file_is_gone_writes_it_anew(tmp_path, caplog, best_epoch):
    yaml = image_project(tmp_path, max_epoch=2)
    train(["--cfg-path", str(yaml)])
    run = only_run(tmp_path)
    state = read_checkpoint(run / LATEST)
    write_checkpoint({**state, "best_epoch": best_epoch, "best_metric": 50.0}, run / LATEST)
    (run / BEST).unlink()
    train(["--cfg-path", str(yaml)])
    assert ("the best so far, epoch 1, is lost" if best_epoch == 0 else "it is written anew") in caplog.text
    best = read_checkpoint(run / BEST)
    assert best["epoch"] == 1
    assert_same(best["model"], state["model"])
    assert (best["best_metric"] == 50.0) == (best_epoch == 1)
    assert json.loads((run / "result" / "test_epoch_best.json").read_text())


def test_a_best_file_that_is_damaged_before_it_is_tested_is_named(tmp_path, monkeypatch, capsys):
    original = RunCheckpoints.save

    def damaging(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if kwargs.get("name") == BEST:
            damage_in_data(self.folder / BEST)

    yaml = image_project(tmp_path, max_epoch=1)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RunCheckpoints, "save", damaging)
        train(["--cfg-path", str(yaml)])
    error = capsys.readouterr().err
    assert f"{only_run(tmp_path) / BEST} is not a readable checkpoint" in error and "run.resume=auto" in error
    train(["--cfg-path", str(yaml)])
    assert final(tmp_path)["best"]["epoch"] == 0


@pytest.mark.slow
def test_no_file_of_a_run_loads_silently_changed(tmp_path):
    """A flipped bit or a lost page in a checkpoint is noticed, or is where nothing is read from."""
    train(["--cfg-path", str(image_project(tmp_path))])
    run, draw = only_run(tmp_path), random.Random(0)
    for path in run.glob("*.pth"):
        whole, content = read_checkpoint(path), path.read_bytes()
        pages = [page for page in range(0, len(content), 4096) if any(content[page : page + 4096])]
        damaged = [flipped(content, draw) for _ in range(200)]
        damaged += [content[:page] + bytes(min(4096, len(content) - page)) + content[page + 4096 :] for page in pages]
        refused = 0
        for one in damaged:
            path.write_bytes(one)
            try:
                assert_same(whole, read_checkpoint(path))
            except AuroraError:
                refused += 1
        assert refused > 150 + len(pages) // 2, f"{path}: {refused} of {len(damaged)}"
        path.write_bytes(content)
    assert len(list(run.glob("*.pth"))) == 3


@pytest.mark.slow
def test_a_damaged_text_of_a_run_ends_nothing(tmp_path):
    """Of config.yaml and log.txt a resumed run reads nothing; whoever shows them meets no traceback."""
    train(["--cfg-path", str(image_project(tmp_path, max_epoch=1))])
    run, draw = only_run(tmp_path), random.Random(0)
    for name in ("config.yaml", "log.txt"):
        content = (run / name).read_bytes()
        for i in range(200):
            (run / name).write_bytes(flipped(content, draw))
            final_metrics(run)
            with suppress(AuroraError):
                read_config(run)
            if name == "config.yaml" and i % 2:
                with suppress(AuroraError):
                    load_config(str(run / name))
        (run / name).write_bytes(content)
