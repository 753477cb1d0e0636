"""A batch computed in parts has the losses and gradients of the whole, and keeps the activations of one part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributed import run_processes
from tiny import CAPTIONS, activate, tiny_model
from tiny_retrieval import kept_bytes, model_and_batch, saved_for_backward, step
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.config.models import RetrievalAuroraConfig
from lavis_aurora.models import parts
from lavis_aurora.models.parts import compute_in_parts

ALL = slice(0, 4)
FORMS = {
    "aurora": {},
    "residual": {"gate": {"form": "residual"}, "mode_approx": {"targets": "all_linear"}},
    "own_batch": {"negative_all_rank": False, "context": {"form": "mean"}},
    "last_layer": {"mode_approx": {"layers": {"last": 1}}},
    "checkpointed": {"vit_grad_ckpt": True, "vit_ckpt_layer": 2},
}


def assert_same(found: tuple, expected: tuple) -> None:
    losses, grads, queue = found
    for name, value in expected[0].items():
        assert losses[name] == pytest.approx(value, abs=1e-5)
    assert grads.keys() == expected[1].keys()
    for name, grad in expected[1].items():
        # A gate's may nearly cancel out.
        assert np.linalg.norm(grads[name] - grad) < 1e-5 * max(np.linalg.norm(grad), 0.01), name
    assert (queue == expected[2]).all()


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_are_those_of_the_batch(form: str) -> None:
    model, samples = model_and_batch("aurora", ALL, **FORMS[form])
    whole = step(model, samples, model)
    for size in (1, 3):
        model, samples = model_and_batch("aurora", ALL, **FORMS[form], mini_batch_size=size)
        assert_same(step(model, samples, model), whole)


@pytest.mark.parametrize("tuning", ["full", "lora", "uniadapter"])
def test_of_other_tunings_too(tuning: str) -> None:
    model, samples = model_and_batch(tuning, ALL)
    whole = step(model, samples, model)
    model, samples = model_and_batch(tuning, ALL, mini_batch_size=2)
    assert_same(step(model, samples, model), whole)


def half_in_parts(rank: int) -> tuple:
    model, samples = model_and_batch("aurora", slice(rank, None, 2), mini_batch_size=1)
    return step(DistributedDataParallel(model, broadcast_buffers=False), samples, model)


def test_of_two_processes_too() -> None:
    model, samples = model_and_batch("aurora", ALL)
    whole = step(model, samples, model)
    found = run_processes(2, half_in_parts)
    losses = {name: (found[0][0][name] + found[1][0][name]) / 2 for name in whole[0]}
    for _, grads, queue in found:
        assert_same((losses, grads, queue), whole)


def share_of_sixteen(rank: int, processes: int = 8, **overrides) -> tuple:
    """A step on 16 pairs, or on a process's share of them; and what the teacher left in the queue."""
    torch.manual_seed(0)
    model = activate(tiny_model(queue_size=24, alpha=0.4, **overrides)).train()
    rows = slice(rank, None, processes)
    samples = {
        "image": torch.randn(16, 3, 48, 48, generator=torch.Generator().manual_seed(5))[rows],
        "text_input": CAPTIONS[:16][rows],
        "image_id": torch.arange(16)[rows],
        **{"epoch": 1, "iters": 3, "num_iters_per_epoch": 10},
    }
    trained = DistributedDataParallel(model, broadcast_buffers=False) if processes > 1 else model
    found = step(trained, samples, model)
    return found, torch.cat([model.image_queue, model.text_queue]).numpy()


@pytest.mark.slow
def test_one_process_in_eight_parts_is_eight_processes_is_the_whole_batch() -> None:
    whole, queue = share_of_sixteen(0, 1)
    parts_of_one, queue_of_parts = share_of_sixteen(0, 1, mini_batch_size=2)
    assert_same(parts_of_one, whole)
    eight = run_processes(8, share_of_sixteen)
    losses = {name: sum(found[0][name] for found, _ in eight) / 8 for name in whole[0]}
    for found, _ in eight:
        assert_same((losses, *found[1:]), whole)
    for other in (queue_of_parts, *(features for _, features in eight)):
        assert abs(other - queue).max() < 1e-5


def test_dropout_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same parts kept whole, as plain autograd does."""

    def dropping() -> tuple:
        model, samples = model_and_batch("aurora", ALL, mini_batch_size=3)
        for layer in (m for m in model.modules() if isinstance(m, nn.Dropout)):
            layer.p = 0.3
        torch.manual_seed(7)
        return step(model, samples, model)

    replayed = dropping()
    monkeypatch.setattr(parts, "checkpoint", lambda compute, *given, use_reentrant: compute(*given))
    assert_same(replayed, dropping())


def test_less_is_kept() -> None:
    def kept(size: int | None) -> int:
        model, samples = model_and_batch("aurora", ALL, mini_batch_size=size)
        with saved_for_backward() as tensors:
            model(samples)
        return kept_bytes(tensors, model)

    assert 0 < kept(1) < 0.2 * kept(None)


def test_the_towers_see_no_more_than_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = model_and_batch("aurora", ALL, mini_batch_size=2)
    seen: list[int] = []
    layers = (*model.visual_encoder.blocks, *model.text_encoder.encoder.layer)
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model(samples)
    assert set(seen) == {2, 6}  # matching has three rows for each pair


def test_parts_are_joined_in_order() -> None:
    x = torch.arange(10.0).view(5, 2).requires_grad_()
    [doubled, shifted] = compute_in_parts(lambda part, by: (part * 2, part + by), 2, x, whole=(torch.ones(2),))
    assert torch.equal(doubled, x * 2) and torch.equal(shifted, x + 1)
    doubled.sum().backward()
    assert torch.equal(x.grad, torch.full((5, 2), 2.0))


def test_a_part_has_a_sample_at_least() -> None:
    with pytest.raises(AuroraError, match="model.mini_batch_size"):
        RetrievalAuroraConfig(mini_batch_size=0)
