"""Activations that are computed again: the same losses and gradients, and less kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from tiny_retrieval import kept_bytes, model_and_batch, saved_for_backward
from torch import Tensor, nn

from lavis_aurora.models import blip_retrieval_aurora, parts
from lavis_aurora.models.parts import recomputed_activations

ALL = slice(0, 4)


@contextmanager
def everything_kept(_: nn.Module) -> Iterator[None]:
    """torch's own way."""
    yield


def step(tuning: str, dtype: torch.dtype = torch.float32, **overrides) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients and bytes kept for the backward pass."""
    model, samples = model_and_batch(tuning, ALL, **overrides)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), saved_for_backward() as tensors:
        loss = model(samples)["loss"]
    kept = kept_bytes(tensors, model)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


FORMS: dict[str, dict] = {
    "aurora": {"mode_approx": {"targets": "all_linear"}},
    "merged": {"mode_approx": {"targets": "all_linear"}, "token_merging": 1},
    "checkpointed": {"vit_grad_ckpt": True, "vit_ckpt_layer": 2, "mode_approx": {"targets": "all_linear"}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [*FORMS, "full", "lora", "uniadapter"])
def test_gradients_are_the_same_bits(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning, overrides = ("aurora", FORMS[form]) if form in FORMS else (form, {})
    loss, grads, less = step(tuning, dtype, **overrides)
    monkeypatch.setattr(parts, "recomputed_activations", everything_kept)
    plain, expected, kept = step(tuning, dtype, **overrides)
    assert torch.equal(loss, plain) and grads.keys() == expected.keys() and grads
    assert [name for name, grad in grads.items() if not torch.equal(grad, expected[name])] == []
    assert less < kept, less / kept


def test_of_all_linear_layers_a_seventh_less_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    less = step("aurora", **FORMS["aurora"])[2]
    monkeypatch.setattr(blip_retrieval_aurora.parts, "recomputed_activations", everything_kept)
    assert less < 0.85 * step("aurora", **FORMS["aurora"])[2]


class Layers(nn.Module):
    """Products between what is computed again."""

    def __init__(self, **norm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.second = nn.LayerNorm(8, **norm), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(self.norm(x)), approximate="tanh"))


@pytest.mark.parametrize("norm", [{"eps": 0.3}, {"elementwise_affine": False}])
def test_each_normalisation_has_its_own_epsilon(norm: dict) -> None:
    grads = []
    for context in (everything_kept, recomputed_activations):
        model, x = Layers(**norm), torch.linspace(-1, 1, 24).view(3, 8).requires_grad_()
        with context(model):
            y = model(x * 2)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*grads))


def test_what_is_changed_in_place_is_still_refused() -> None:
    model = Layers()
    x = torch.ones(3, 8, requires_grad=True) * 2
    with recomputed_activations(model):
        y = model(x)
    x.zero_()
    with pytest.raises(RuntimeError, match=r"shape \(3, 8\) that the backward pass needs was changed in place"):
        y.sum().backward()


class Held:
    """Something that a node of the graph holds."""


def test_nothing_outlives_a_step() -> None:
    """An operation that saves its own result would hold itself."""
    gc.disable()
    try:
        x = torch.ones(3, requires_grad=True)
        with recomputed_activations(nn.Identity()):
            y = x.exp()
        node = y.grad_fn
        node.metadata["held"] = held = Held()
        alive = weakref.ref(held)
        del y, node, held
        assert alive() is None
    finally:
        gc.enable()
