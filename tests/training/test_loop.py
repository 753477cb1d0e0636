"""Steps of several batches: what is accumulated, exchanged, and followed by the teacher."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import pytest
import torch
from distributed import run_processes
from lavis_models import build, hub_folder, samples
from runs import task_of, train_epoch, training_state
from tiny import activate, project_yaml, tiny_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lavis_aurora
from lavis_aurora import ModeApproxConfig
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.models.mode_approx_model import ModeApproxModel
from lavis_aurora.training.runner import AuroraRunner
from lavis_aurora_cli import train

CAPTIONS = ["a red circle", "a big blue square", "a ring", "a small pink heart"]
SIZE = len(CAPTIONS)
BATCHES, EACH = 7, 3  # two steps of three batches, and one of one
STEPS = 3


def epoch(model: nn.Module, batches: list[dict], folder: Path, before_step=None) -> nn.Module:
    """An epoch by the loop, with plain gradient descent; ``before_step`` is called before each step of it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if before_step is not None:
        optimizer.register_step_pre_hook(lambda *_: before_step())
    state = training_state(task_of("retrieval"), model.train(), batches, folder, optimizer, accum_grad_iters=EACH)
    train_epoch(state)
    return model


def picture_batches(rows: slice = slice(None)) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randn(BATCHES, SIZE, 3, 48, 48, generator=generator)
    ids = torch.arange(BATCHES * SIZE).view(BATCHES, SIZE)
    return [{"image": x[rows], "text_input": CAPTIONS[rows], "image_id": i[rows]} for x, i in zip(pictures, ids)]


# The teacher


def pairs(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [both for pair in model.model_pairs for both in zip(*(module.parameters() for module in pair))]


def aurora(tuning: str) -> nn.Module:
    return activate(tiny_model(tuning=tuning, momentum=0.75, queue_size=32), std=0.1)


@pytest.mark.parametrize("name", ["aurora", "full", "heads", "albef_retrieval", "blip_retrieval"])
def test_the_teacher_follows_once_a_step(name, tmp_path, monkeypatch):
    """Against the plain average of the weights with which each step was computed; also that of LAVIS's models."""
    if name in ("aurora", "full", "heads"):
        model, owner, batches = aurora(name), None, picture_batches()
    else:
        monkeypatch.chdir(hub_folder(tmp_path))
        model = activate(ModeApproxModel(build(name), ModeApproxConfig(rank=4, targets=name)), std=0.1)
        model.base.momentum, owner = 0.75, model.base
        batches = [{**samples(name, seed), "image_id": 3 * seed + torch.arange(3)} for seed in range(BATCHES)]
    owner = owner or model
    expected = [p_m.detach().clone() for _, p_m in pairs(owner)]
    seen = []

    def before_step() -> None:
        seen.append(1)
        for average, (p, _) in zip(expected, pairs(owner)):
            average.mul_(0.75).add_(p.detach(), alpha=0.25)

    before = [p.detach().clone() for p, _ in pairs(owner)]
    epoch(model, batches, tmp_path, before_step=before_step)
    assert len(seen) == STEPS and owner.momentum == 0.75
    assert any(not torch.equal(p, was) for (p, _), was in zip(pairs(owner), before))
    for average, (_, p_m) in zip(expected, pairs(owner)):
        torch.testing.assert_close(p_m, average)


def test_every_batch_of_a_step_enters_the_queue(tmp_path):
    model = aurora("aurora")
    epoch(model, picture_batches(), tmp_path)
    assert model.idx_queue[0, : SIZE * BATCHES].tolist() == list(range(SIZE * BATCHES))
    assert int(model.queue_ptr) == SIZE * BATCHES


# Several processes


def trained(model: nn.Module) -> dict[str, list]:
    return {name: p.tolist() for name, p in model.named_parameters() if p.requires_grad}


def count_exchanges(rank: int, folder: Path) -> tuple[int, dict[str, list]]:
    """Exchanges of gradients, and what is trained."""
    torch.manual_seed(0)
    model, sent = aurora("aurora"), []
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)

    def counted(_, bucket):
        sent.append(bucket.is_last())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, counted)
    epoch(wrapped, picture_batches(slice(rank, None, 2)), folder)
    return sum(sent), trained(model)


def test_gradients_are_exchanged_once_a_step(tmp_path):
    """And the processes compute what one does with their batches together."""
    torch.manual_seed(0)
    expected = trained(epoch(aurora("aurora"), picture_batches(), tmp_path))
    for count, found in run_processes(2, count_exchanges, tmp_path):
        assert count == STEPS
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), atol=1e-4, rtol=1e-3)


# The way of a step


def frames() -> list[str]:
    """Functions of the package that are running, from the runner's ``train`` on."""
    package = str(Path(lavis_aurora.__file__).parent / "training")
    names = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(package)]
    return names[names.index("train") :]


def test_the_way_of_a_step_is_what_contributing_says(tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## A training step\n")[2].partition("\n## ")[0]
    told = re.findall(r"^\d+\. `(?:\w+\.)?(\w+)`", section, re.MULTILINE)
    assert len(told) == 10
    losses, steps, after = [], [], []
    monkeypatch.setattr(BlipRetrievalAurora, "check_samples", lambda self, samples: losses.append(frames()))
    original = AuroraRunner._stop_if_requested
    monkeypatch.setattr(AuroraRunner, "_stop_if_requested", lambda *args: after.append(frames()) or original(*args))
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(frames()))
    try:
        train(["--cfg-path", str(project_yaml(tmp_path, run={"valid_splits": [], "test_splits": []}))])
    finally:
        hook.remove()
    assert losses[0] == told[:8]
    assert steps[0] == [*told[:5], told[8]] and len(steps[0]) <= 8
    assert after[0] == [*told[:4], told[9]]
