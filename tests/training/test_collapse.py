"""Features that have become alike stop a run; those that are so at the start, or learn, do not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from distributed import run_processes
from lavis.models.blip_models.blip_outputs import BlipOutput, BlipSimilarity
from omegaconf import OmegaConf
from runs import only_run
from tiny import project_yaml

from lavis_aurora.common.errors import AuroraError, Diverged
from lavis_aurora.config.check import parse_run
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.training import guards
from lavis_aurora.training.guards import CHECK_EVERY, MAX_CHECKS, CollapseGuard
from lavis_aurora.training.tasks import base
from lavis_aurora.training.tasks.base import AuroraTaskBase, itc_in_batch
from lavis_aurora_cli import train

PAIRS = 32
CHANCE = math.log(PAIRS)


def stopped_at(losses: list[float], pairs: int = PAIRS, **run) -> int | None:
    """The step, from 1, at which the guard stops such a run."""
    guard = CollapseGuard(parse_run(run))
    for step, loss in enumerate(losses, start=1):
        try:
            guard.note((torch.tensor(loss), pairs), f"step {step}")
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
    assert stopped_at(losses, pairs=4) is None
    guard = CollapseGuard(parse_run({}))
    guard.note(None, "of a model without such a loss")


def test_steps_without_a_finite_loss_count_as_chance():
    assert stopped_at([*[0.5 * CHANCE] * 26, *[float("nan")] * 60]) == 26 + 50


def test_a_run_says_what_happened_and_what_to_do(tmp_path, monkeypatch, capsys):
    """Of the real losses: the features are those of a model that tells all apart, from the second epoch on alike."""
    original = BlipRetrievalAurora._itc_loss

    def collapsed(self, samples, teacher, image_feat, text_feat, idx):
        first = torch.zeros_like(image_feat).index_fill_(1, torch.tensor(0), 1.0)
        made = first if samples["epoch"] else torch.eye(*image_feat.shape)
        teacher = teacher._replace(image_feat=made, text_feat=made)
        return original(self, samples, teacher, image_feat * 0 + made, text_feat * 0 + made, idx)

    monkeypatch.setattr(BlipRetrievalAurora, "_itc_loss", collapsed)
    monkeypatch.setattr(guards, "CHECK_EVERY", 2)  # the true number is that of the guard alone, above
    run = {"max_epoch": 9, "batch_size_train": 8, "valid_splits": [], "test_splits": []}
    yaml = project_yaml(tmp_path, count=8, run=run)
    with pytest.raises(SystemExit) as end:
        train(["--cfg-path", str(yaml)])
    assert end.value.code == Diverged.exit_status == 3
    error = capsys.readouterr().err
    assert "epoch 5, step 1: for 4 steps the ITC loss among the pairs of a batch has been that of" in error
    assert "chance, ln(8) = 2.08" in error
    assert "lower run.init_lr (0.001)" in error and "run.stop_collapsed: false" in error
    assert (only_run(tmp_path) / "checkpoint_latest.pth").is_file()


def test_a_queue_that_starts_at_random_teaches_nothing():
    """Features that are alike differ from random ones; among themselves they are at chance, with any queue."""
    guard, pairs, queue = CollapseGuard(parse_run({})), 8, 1024
    for step in range(200):
        feats = F.normalize(torch.ones(pairs, 16) + 0.01 * torch.randn(pairs, 16), dim=1)
        others = F.normalize(torch.randn(queue, 16) if step < 100 else torch.ones(queue, 16), dim=1)
        sims = feats @ torch.cat([feats, others]).t() / 0.07
        output = BlipSimilarity(sim_i2t=sims, sim_i2t_targets=torch.eye(pairs, pairs + queue))
        if step == 0:
            assert F.cross_entropy(sims, torch.arange(pairs)) < 0.5 * math.log(pairs + queue)
        guard.note(itc_in_batch(output), f"step {step}")


def test_of_a_batch_its_own_pairs_count():
    sims, targets = torch.randn(3, 10), torch.rand(3, 10).softmax(dim=1)
    loss, pairs = itc_in_batch(BlipSimilarity(sim_i2t=sims, sim_i2t_targets=targets))
    rows = zip(sims[:, :3].softmax(dim=1), targets[:, :3] / targets[:, :3].sum(dim=1, keepdim=True))
    assert pairs == 3
    assert loss == pytest.approx(float(sum(-(p.log() * t).sum() for p, t in rows) / 3))
    assert itc_in_batch(None) is None and itc_in_batch(BlipSimilarity(sim_i2t=sims)) is None


@pytest.mark.parametrize("watched", [True, False])
def test_the_loss_of_a_batch_is_computed_where_it_is_looked_at(monkeypatch, watched):
    asked = []
    monkeypatch.setattr(base, "itc_in_batch", lambda sims: asked.append(sims))
    task = AuroraTaskBase()
    task.cfg = OmegaConf.create({"stop_collapsed": watched})
    task.train_step(lambda samples: BlipOutput(loss=torch.tensor(1.0)), {})
    assert len(asked) == watched


# In which processes features collapse, and the step at which both then stop.
WHERE = [((0,), None), ((0, 1), 51)]


def _collapses(rank: int) -> list[int | None]:
    return [stopped_at([0.5 * CHANCE, *[CHANCE if rank in where else 0.5 * CHANCE] * 100]) for where, _ in WHERE]


def test_processes_stop_together_by_the_mean_of_their_losses():
    assert run_processes(2, _collapses) == 2 * [[step for _, step in WHERE]]
