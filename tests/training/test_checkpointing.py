import os

import pytest
import torch

from lavis_aurora import AuroraError
from lavis_aurora.training.checkpoints import (
    LATEST,
    PREVIOUS,
    read_checkpoint,
    read_latest,
    run_to_resume,
    same_run,
    write_checkpoint,
)

STATE = {
    "model": {"a": torch.ones(2)},
    "optimizer": {"lr": 0.1},
    "scaler": None,
    "epoch": 3,
    "step": 5,
    "best_metric": 1.0,
    "best_epoch": 2,
}


def test_round_trip_leaves_one_file(tmp_path):
    write_checkpoint(STATE, tmp_path / "a.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    state = read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(state["model"]["a"], torch.ones(2))
    assert state["epoch"] == 3


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    write_checkpoint(STATE, tmp_path / "a.pth")

    def full(_state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(AuroraError, match="cannot write .*a.pth .*No space left.*; free some space"):
        write_checkpoint({**STATE, "epoch": 4}, tmp_path / "a.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    assert read_checkpoint(tmp_path / "a.pth")["epoch"] == 3


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_unreadable_checkpoints_are_named(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(AuroraError, match="a.pth is not a readable checkpoint"):
        read_checkpoint(tmp_path / "a.pth")


def test_foreign_files_are_named(tmp_path):
    torch.save({"model": {}}, tmp_path / "a.pth")
    with pytest.raises(AuroraError, match="not a checkpoint of a run: it has no best_epoch, best_metric, epoch"):
        read_checkpoint(tmp_path / "a.pth")


def test_the_one_before_is_kept_and_used_when_the_newest_is_broken(tmp_path):
    for epoch in (1, 2):
        write_checkpoint({**STATE, "epoch": epoch}, tmp_path / LATEST, previous=tmp_path / PREVIOUS)
    state, path = read_latest(tmp_path)
    assert (state["epoch"], path.name) == (2, LATEST)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    state, path = read_latest(tmp_path)
    assert (state["epoch"], path.name) == (1, PREVIOUS)
    path.unlink()
    assert read_latest(tmp_path) is None


def test_the_newest_run_of_the_same_configuration_is_found(tmp_path):
    config = {"model": {"arch": "a"}, "run": {"seed": 1, "num_workers": 0}}
    for i, seed in enumerate((1, 1, 2)):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        write_checkpoint({**STATE, "config": {**config, "run": {"seed": seed, "num_workers": i}}}, folder / LATEST)
        os.utime(folder, (i, i))
    assert run_to_resume(tmp_path, config).name == "run1"
    assert run_to_resume(tmp_path, {**config, "model": {"arch": "b"}}) is None
    assert run_to_resume(tmp_path / "nowhere", config) is None


def of(processes, batch, **model):
    run = {"world_size": processes, "batch_size_train": batch, "distributed": processes > 1, "seed": 1}
    return {"model": {"arch": "blip_retrieval_aurora", **model}, "run": run}


def test_the_global_batch_says_whether_other_processes_go_on_with_a_run():
    assert same_run(of(8, 16), of(1, 128)) and same_run(of(8, 16), of(4, 32))
    assert not same_run(of(8, 16), of(1, 16))
    alone = of(1, 16)
    del alone["run"]["world_size"]  # as LAVIS writes it
    assert same_run(alone, of(1, 16))


@pytest.mark.parametrize("model", [{"negative_all_rank": False}, {"arch": "mode_approx"}])
def test_where_each_process_has_negatives_of_its_own_their_number_counts(model):
    assert not same_run(of(8, 16, **model), of(1, 128, **model))
    assert same_run(of(8, 16, **model), of(8, 16, **model))
