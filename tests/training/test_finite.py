"""Numbers gone wrong."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from distributed import run_processes
from runs import task_of, train_epoch, training_state
from tiny import project_yaml
from torch.nn.parallel import DistributedDataParallel

from lavis_aurora.common.errors import AuroraError, Diverged
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.models.owner import RunState
from lavis_aurora.training.checkpoints import read_checkpoint
from lavis_aurora.training.guards import MAX_CONSECUTIVE_SKIPS, MAX_OVERFLOWS, FiniteGuard
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
    yaml = project_yaml(tmp_path, run={"init_lr": 1e12, "min_lr": 1e12, "batch_size_train": 2})
    with pytest.raises(SystemExit) as end:
        train(["--cfg-path", str(yaml)])
    assert end.value.code == Diverged.exit_status
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


@pytest.mark.parametrize("each", [1, 2])
def test_of_a_skipped_step_nothing_is_in_the_mean_loss(tmp_path, each):
    model, batches = NoLoss({1}), [{"x": torch.ones(1, 2)} for _ in range(4)]
    task, still = task_of("multimodal_classification"), torch.optim.SGD(model.parameters(), lr=0.0)
    state = training_state(task, model, batches, tmp_path, still, accum_grad_iters=each)
    state.guard = FiniteGuard(tmp_path, skip=True)
    loss = float(model({**batches[0], "iters": 0})["loss"])
    assert train_epoch(state)["loss"] == pytest.approx(loss)
    assert int(state.totals["loss"][1]) == 4 - each


def test_too_many_in_a_row_are_an_error(tmp_path):
    guard = FiniteGuard(tmp_path, skip=True)
    for _ in range(MAX_CONSECUTIVE_SKIPS):
        assert not guard.accepts(NAN, [NAN], SAMPLES)
    with pytest.raises(AuroraError, match="so were the 10 before it"):
        guard.accepts(NAN, [NAN], SAMPLES)


def test_one_good_step_ends_the_row(tmp_path):
    guard = FiniteGuard(tmp_path, skip=True)
    for _ in range(3 * MAX_CONSECUTIVE_SKIPS):
        assert guard.accepts(ONE, [ONE], SAMPLES)
        assert not guard.accepts(NAN, [ONE], SAMPLES)
    assert guard.skipped == 3 * MAX_CONSECUTIVE_SKIPS


def test_a_loss_without_gradient_counts_too(tmp_path):
    with pytest.raises(AuroraError, match="epoch 1, step 7"):
        FiniteGuard(tmp_path, skip=False).accepts(ONE, [torch.tensor(float("inf"))], SAMPLES)


# Half precision


@pytest.mark.parametrize("skip", [False, True])
def test_overflows_are_left_out_and_counted_but_not_for_ever(tmp_path, skip):
    guard = FiniteGuard(tmp_path, skip=skip)
    for _ in range(2):
        for _ in range(MAX_OVERFLOWS):
            assert not guard.accepts(NAN, [ONE], SAMPLES, scaled=True)
        assert guard.accepts(ONE, [ONE], SAMPLES, scaled=True)
    assert guard.skipped == 2 * MAX_OVERFLOWS and not list(tmp_path.iterdir())
    for _ in range(MAX_OVERFLOWS):
        guard.accepts(NAN, [ONE], SAMPLES, scaled=True)
    with pytest.raises(AuroraError, match="so were the 25 before it; lower run.init_lr, or set run.amp: false"):
        guard.accepts(NAN, [ONE], SAMPLES, scaled=True)


def test_a_loss_that_is_no_number_stops_in_half_precision_too(tmp_path):
    with pytest.raises(AuroraError, match="epoch 1, step 7.*set run.skip_nonfinite: true"):
        FiniteGuard(tmp_path, skip=False).accepts(NAN, [NAN], SAMPLES, scaled=True)
    guard = FiniteGuard(tmp_path, skip=True)
    for _ in range(MAX_OVERFLOWS):
        assert not guard.accepts(NAN, [NAN], SAMPLES, scaled=True)
    assert guard.skipped == MAX_OVERFLOWS
    with pytest.raises(AuroraError, match="so were the 25 before it"):
        guard.accepts(NAN, [NAN], SAMPLES, scaled=True)


class Line(RunState, torch.nn.Linear):
    """A loss whose gradient is not finite in the batches named."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__(2, 1)
        self.bad = bad

    def forward(self, samples: dict) -> dict:
        loss = super().forward(samples["x"]).square().sum()
        if samples["iters"] in self.bad:
            loss = loss + (self.weight.sum() * 0).sqrt()  # its value is finite, its gradient is not
        return {"loss": loss}


class NoLoss(Line):
    """A loss that is NaN itself."""

    def forward(self, samples: dict) -> dict:
        loss = super().forward(samples)["loss"]
        return {"loss": loss * float("nan") if samples["iters"] in self.bad else loss}


def epoch(folder, model, batches: int, each: int = 1, skip: bool = False, scaler=None) -> FiniteGuard:
    """An epoch on the CPU, ``each`` batches a step; returns what watched it."""
    samples = [{"x": torch.ones(1, 2), "text_input": [f"text {i}"]} for i in range(batches)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    task = task_of("multimodal_classification")
    state = training_state(task, model, samples, folder, optimizer, accum_grad_iters=each)
    state.scaler, state.guard = scaler, FiniteGuard(folder, skip=skip)
    train_epoch(state)
    return state.guard


def scaled_epoch(tmp_path, steps: int, bad: set[int]) -> tuple[FiniteGuard, Line, torch.amp.GradScaler]:
    """An epoch with torch's scaler of losses."""
    model, scaler = Line(bad), torch.amp.GradScaler("cpu")
    return epoch(tmp_path, model, steps, scaler=scaler), model, scaler


def test_the_loop_counts_what_the_scaler_leaves_out(tmp_path):
    guard, model, scaler = scaled_epoch(tmp_path, steps=30, bad=set(range(1, 30, 3)))
    assert guard.skipped == 10
    assert scaler.get_scale() == 2.0**16 / 2**10
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_loop_stops_where_no_scale_helps(tmp_path):
    with pytest.raises(Diverged, match="epoch 1, step 27: .*so were the 25 before it"):
        scaled_epoch(tmp_path, steps=60, bad=set(range(1, 60)))


def test_the_count_in_a_row_goes_on_over_epochs(tmp_path, spoiled, capsys, caplog):
    """Epochs of fewer steps than may be skipped in a row."""
    spoiled(0, 1, 2, 3)
    caplog.set_level(logging.INFO)
    run = {"skip_nonfinite": True, "batch_size_train": 2, "max_epoch": 4, "valid_splits": [], "test_splits": []}
    with pytest.raises(SystemExit):
        train(["--cfg-path", str(project_yaml(tmp_path, run=run))])
    assert "epoch 3, step 3: loss or gradient is not finite" in capsys.readouterr().err
    [folder] = (tmp_path / "output").iterdir()
    counts = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines() if "train_skipped" in line]
    assert [entry["train_skipped_steps"] for entry in counts] == [4, 4]
    assert not [entry for entry in counts if "train_loss" in entry], "of no step there is no mean"
    assert "No validation splits" not in caplog.text, "this run is to have none"


class Normed(Line):
    """With running statistics, into which a batch with NaN goes too."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__(bad)
        self.norm = torch.nn.BatchNorm1d(2)

    def forward(self, samples: dict) -> dict:
        x = samples["x"].expand(3, 2) * (float("nan") if samples["iters"] in self.bad else 1.0)
        return {"loss": torch.nn.functional.linear(self.norm(x), self.weight).square().sum()}


@pytest.mark.parametrize("each", [1, 2])
def test_a_skipped_step_leaves_no_trace_in_running_statistics(tmp_path, each):
    model = Normed({1})
    assert epoch(tmp_path, model, batches=4, each=each, skip=True).skipped == 1
    assert int(model.norm.num_batches_tracked) == 4 - each
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


# Steps of several batches


def named(folder) -> dict:
    [file] = folder.glob("not_finite*.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize("model", [Line, NoLoss])
@pytest.mark.parametrize("bad", [4, 5, 6, 7])
def test_of_a_step_the_batch_is_named_that_spoilt_it(tmp_path, model, bad):
    """Batches 5 to 8 are a step, from 1; the first bad one of them counts."""
    with pytest.raises(AuroraError, match=f"epoch 1, step {bad + 1}: loss or gradient is not finite"):
        epoch(tmp_path, model({bad, 7}), batches=12, each=4)
    assert named(tmp_path) == {"epoch": 0, "step": bad, "text_input": [f"text {bad}"]}


@pytest.mark.parametrize("skip", [False, True])
def test_no_number_in_an_earlier_batch_is_no_overflow(tmp_path, skip):
    """Nor is it skipped up to 25 times as if it were one."""
    scaler = torch.amp.GradScaler("cpu")
    if skip:
        assert epoch(tmp_path, NoLoss({1}), batches=4, each=2, skip=True, scaler=scaler).skipped == 1
    else:
        with pytest.raises(AuroraError, match="epoch 1, step 2: loss or gradient is not finite"):
            epoch(tmp_path, NoLoss({1}), batches=4, each=4, scaler=scaler)
    assert named(tmp_path)["step"] == 1


def test_an_overflow_in_an_earlier_batch_is_one(tmp_path):
    guard = epoch(tmp_path, Line({1}), batches=8, each=4, scaler=torch.amp.GradScaler("cpu"))
    assert guard.skipped == 1 and not list(tmp_path.glob("not_finite*"))


def test_a_finite_step_after_a_skipped_one_is_judged_by_itself(tmp_path):
    guard = epoch(tmp_path, NoLoss({0, 3}), batches=9, each=3, skip=True)
    assert guard.skipped == 2
    assert {json.loads(file.read_text())["step"] for file in tmp_path.glob("not_finite*")} == {0, 3}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu(tmp_path):
    guard, one = FiniteGuard(tmp_path, skip=False), ONE.cuda()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            guard.note(one, [one], SAMPLES)
        assert guard.accepts(one, [one], SAMPLES)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    guard.flush()


def spoilt_in_one_process(rank: int, folder, scaled: bool) -> str:
    model = DistributedDataParallel(NoLoss({1} if rank else set()))
    try:
        epoch(folder, model, batches=4, each=4, scaler=torch.amp.GradScaler("cpu") if scaled else None)
    except AuroraError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
def test_processes_name_the_same_batch(tmp_path, scaled):
    """The batch of one of them alone is NaN; for the others it is no overflow either."""
    for message in run_processes(2, spoilt_in_one_process, tmp_path, scaled):
        assert message.startswith("epoch 1, step 2: loss or gradient is not finite")
    assert {json.loads(file.read_text())["step"] for file in tmp_path.glob("not_finite*")} == {1}
