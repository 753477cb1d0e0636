"""Numbers gone wrong."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import project_yaml

from lavis_aurora.errors import AuroraError
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.training.checkpointing import read_checkpoint
from lavis_aurora.training.finite import MOST_IN_A_ROW, FiniteGuard
from lavis_aurora_cli import train

SAMPLES = {"image_id": torch.tensor([3, 4]), "text_input": ["a", "b"], "epoch": 0, "iters": 6, "image": torch.ones(2)}
NAN, ONE = torch.tensor(float("nan")), torch.tensor(1.0)


@pytest.fixture
def spoiled(monkeypatch):
    """Losses of given steps are NaN."""

    def spoil(*steps: int) -> None:
        original = BlipRetrievalAurora.forward

        def forward(self, samples):
            output = original(self, samples)
            if samples["iters"] in steps:
                output.loss = output.loss * float("nan")
            return output

        monkeypatch.setattr(BlipRetrievalAurora, "forward", forward)

    return spoil


def test_a_run_stops_and_names_the_batch(tmp_path, capsys):
    # A rate with which the weights overflow at once.
    yaml = project_yaml(tmp_path, run={"init_lr": 1e30, "min_lr": 1e30, "batch_size_train": 2})
    with pytest.raises(SystemExit):
        train(["--cfg-path", str(yaml)])
    error = capsys.readouterr().err
    assert "epoch 1, step 2: loss or gradient is not finite; the batch is named in" in error
    assert "lower run.init_lr, or set run.skip_nonfinite: true" in error
    [run] = (tmp_path / "output").iterdir()
    [file] = run.glob("not_finite*.json")
    batch = json.loads(file.read_text())
    assert (batch["epoch"], batch["step"], len(batch["text_input"]), len(batch["image_id"])) == (0, 1, 2, 2)
    assert not list(run.glob("*.pth"))


def test_a_bad_step_is_skipped_and_counted(tmp_path, spoiled):
    spoiled(1)
    yaml = project_yaml(tmp_path, run={"skip_nonfinite": True, "batch_size_train": 2, "test_splits": []})
    train(["--cfg-path", str(yaml)])
    [run] = (tmp_path / "output").iterdir()
    assert '"train_skipped_steps": 1' in (run / "log.txt").read_text()
    state = read_checkpoint(run / "checkpoint_latest.pth")
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert {int(entry["step"]) for entry in state["optimizer"]["state"].values()} == {3}


def test_too_many_in_a_row_are_an_error(tmp_path):
    guard = FiniteGuard(tmp_path, skip=True)
    for _ in range(MOST_IN_A_ROW):
        assert not guard.accepts(NAN, [NAN], SAMPLES)
    with pytest.raises(AuroraError, match="so were the 10 before it"):
        guard.accepts(NAN, [NAN], SAMPLES)


def test_one_good_step_ends_the_row(tmp_path):
    guard = FiniteGuard(tmp_path, skip=True)
    for _ in range(3 * MOST_IN_A_ROW):
        assert guard.accepts(ONE, [ONE], SAMPLES)
        assert not guard.accepts(NAN, [ONE], SAMPLES)
    assert guard.skipped == 3 * MOST_IN_A_ROW


def test_a_loss_without_gradient_counts_too(tmp_path):
    with pytest.raises(AuroraError, match="epoch 1, step 7"):
        FiniteGuard(tmp_path, skip=False).accepts(ONE, [torch.tensor(float("inf"))], SAMPLES)
