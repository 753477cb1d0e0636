"""Features that have become alike stop a run; those that are so at the start, or learn, do not."""

from __future__ import annotations

import math

import pytest
import torch
from distributed import run_processes
from runs import only_run
from tiny import project_yaml

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.config.check import parse_run
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.training.guards import CHECK_EVERY, MAX_CHECKS, CollapseGuard
from lavis_aurora_cli import train

CANDIDATES = 32
CHANCE = math.log(CANDIDATES)


def stopped_at(losses: list[float], candidates: int = CANDIDATES, **run) -> int | None:
    """The step, from 1, at which the guard stops such a run."""
    guard = CollapseGuard(parse_run(run))
    for step, loss in enumerate(losses, start=1):
        try:
            guard.note(torch.tensor(loss), candidates, f"step {step}")
        except AuroraError:
            return step
    return None


def test_a_model_that_learned_and_then_gives_all_pairs_one_score_is_stopped():
    assert CHECK_EVERY * MAX_CHECKS == 50
    learning = [CHANCE * share for share in (0.95, *[0.6] * 60)]
    # Each check is of 25 steps, after the first: the window in which it collapses is not counted.
    assert stopped_at([*learning, *[CHANCE] * 100]) == 1 + 75 + 50
    assert stopped_at([*learning, *[1.2 * CHANCE] * 100]) == 1 + 75 + 50, "worse than chance is no better"


def test_one_that_was_better_before_its_first_step_is_stopped_sooner():
    assert stopped_at([0.85 * CHANCE, *[CHANCE] * 100]) == 1 + 50


@pytest.mark.parametrize(
    "losses",
    [
        [CHANCE] * 500,
        [1.05 * CHANCE] * 500,
        [CHANCE * max(0.2, 1 - 0.001 * step) for step in range(800)],
        [0.95 * CHANCE if step % 25 < 2 else CHANCE for step in range(500)],
        [0.5 * CHANCE, *[0.98 * CHANCE] * 500],
        [*[0.5 * CHANCE] * 30, *[CHANCE] * 25, *[0.9 * CHANCE] * 300],
    ],
    ids=["random weights", "worse than chance from the start", "slow", "never learned", "hard", "a bad patch"],
)
def test_others_go_on(losses):
    assert stopped_at(losses) is None


def test_it_can_be_turned_off_and_does_not_judge_a_handful():
    losses = [*[0.5 * CHANCE] * 60, *[CHANCE] * 500]
    assert stopped_at(losses) and stopped_at(losses, stop_collapsed=False) is None
    assert stopped_at(losses, candidates=4) is None and stopped_at(losses, candidates=0) is None
    guard = CollapseGuard(parse_run({}))
    guard.note(None, CANDIDATES, "of a model without such a loss")


def test_steps_without_a_finite_loss_count_as_chance():
    assert stopped_at([*[0.5 * CHANCE] * 26, *[float("nan")] * 60]) == 26 + 50


def test_a_run_says_what_happened_and_what_to_do(tmp_path, monkeypatch, capsys):
    """Of the real losses: the towers' features are replaced by constant ones from the second epoch on."""
    original = BlipRetrievalAurora._itc_loss

    def collapsed(self, samples, teacher, image_feat, text_feat, idx):
        if samples["epoch"]:
            same = torch.ones_like(image_feat) / 8
            teacher = teacher._replace(image_feat=same, text_feat=same)
            image_feat, text_feat = image_feat * 0 + 1 / 8, text_feat * 0 + 1 / 8
            self.image_queue.fill_(1 / 8)
            self.text_queue.fill_(1 / 8)
        else:
            image_feat, text_feat = teacher.image_feat.clone(), teacher.image_feat.clone()
            teacher = teacher._replace(text_feat=teacher.image_feat)
        loss, sims = original(self, samples, teacher, image_feat, text_feat, idx)
        return (loss if samples["epoch"] else loss * 0.5), sims

    monkeypatch.setattr(BlipRetrievalAurora, "_itc_loss", collapsed)
    run = {"max_epoch": 60, "batch_size_train": 8, "valid_splits": [], "test_splits": []}
    yaml = project_yaml(tmp_path, count=8, run=run)
    with pytest.raises(SystemExit):
        train(["--cfg-path", str(yaml)])
    error = capsys.readouterr().err
    assert "epoch 51, step 1: for 50 steps the ITC loss has been that of chance, ln(24) = 3.18" in error
    assert "lower run.init_lr (0.001)" in error and "run.stop_collapsed: false" in error
    assert (only_run(tmp_path) / "checkpoint_latest.pth").is_file()


def _collapses_in(rank: int, where: tuple[int, ...]) -> int | None:
    return stopped_at([0.5 * CHANCE, *[CHANCE if rank in where else 0.5 * CHANCE] * 100])


@pytest.mark.parametrize("where, step", [((0,), None), ((0, 1), 51)])
def test_processes_stop_together_by_the_mean_of_their_losses(where, step):
    assert run_processes(2, _collapses_in, where) == [step, step]
